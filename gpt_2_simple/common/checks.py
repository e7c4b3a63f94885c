"""Values out of range in, ValueErrors that name them and the remedy out."""

from __future__ import annotations

from typing import Any

import numpy as np


def check_whole(name: str, value: Any, at_least: int) -> int:
    """`value` as Python's int. Raises ValueError if it is not whole, or not `at_least` or above."""
    is_whole = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    if not is_whole or value < at_least:
        raise ValueError(f"{name}={value!r} must be a whole number, {at_least} or above")
    return int(value)
