"A dataset version to a bundle."
