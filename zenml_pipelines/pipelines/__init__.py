"""Wiring only: one pipeline a file, named by the act."""
