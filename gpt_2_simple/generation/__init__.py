"""A model and prefixes in, texts out."""
