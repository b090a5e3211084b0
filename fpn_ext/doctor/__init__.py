"""What is wrong with an installation; needs Python's standard library only."""
