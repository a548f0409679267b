"""Wiring only: one pipeline a file, named by a noun."""
