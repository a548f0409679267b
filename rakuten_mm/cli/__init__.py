"Commands of the library."
