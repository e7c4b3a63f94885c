"""Command line arguments in, calls of the public functions out."""
