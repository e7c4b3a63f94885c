"""What a device's memory is worth to TensorFlow."""

MEGABYTE = 2**20

# The share of a card's nominal memory that TensorFlow can use, about: 15 GB of a T4's 16.
USABLE = 0.93

# Memory that a GPU's BFC allocator loses between tensors, as a share of theirs.
FRAGMENTATION = 0.06
