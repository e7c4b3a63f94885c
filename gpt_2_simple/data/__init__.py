"""Files in, windows of tokens out; no TensorFlow."""
