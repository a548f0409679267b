"A bundle to evidence."
