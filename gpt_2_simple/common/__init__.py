"""What every other part uses; no TensorFlow."""
