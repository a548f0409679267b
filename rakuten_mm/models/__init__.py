"A listing to calibrated probabilities."
