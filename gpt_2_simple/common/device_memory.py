"""What a device's memory is worth to TensorFlow, and bytes as a table."""

from __future__ import annotations

from collections.abc import Iterable

MEGABYTE = 2**20

# The share of a card's nominal memory that TensorFlow can use, about: 15 GB of a T4's 16.
USABLE = 0.93

# Memory that a GPU's BFC allocator loses between tensors, as a share of theirs.
FRAGMENTATION = 0.06


def usable_bytes(gpu_gb: float) -> int:
    """The bytes that TensorFlow can use of a card of so many GB of 2**30 bytes, about."""
    return int(gpu_gb * USABLE * 2**30)


def megabyte_table(rows: Iterable[tuple[str, int]]) -> str:
    """Names and bytes as lines of MB of 2**20 bytes."""
    return "\n".join(f"{name:30}{size / MEGABYTE:10,.0f} MB" for name, size in rows)
