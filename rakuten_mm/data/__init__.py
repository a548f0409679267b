"A raw folder to an immutable dataset version."
