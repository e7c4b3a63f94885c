"""Settings and text in, a trained run out."""
