"Arrays in, numbers out: scores, calibration, guarantees, two-sample tests. No files, no PyTorch."
