"""One thin step a file, named by its verb."""
