"A stand-in for the confidential catalogue."
