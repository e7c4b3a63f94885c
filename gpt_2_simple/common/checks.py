"""Values out of range in, ValueErrors that name them and the remedy out."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

# The largest int32, which is what placeholders of whole numbers hold.
MAX_INT32 = 2**31 - 1


def check_number(name: str, value: Any, remedy: str, least: float, most: float = math.inf) -> None:
    """Raises ValueError if `value` is not a finite number from `least` to `most`."""
    number = isinstance(value, (int, float, np.number)) and not isinstance(value, bool)
    if not number or not least <= value <= most or math.isinf(value):
        raise ValueError(f"{name}={value!r} must be {remedy}")


def check_whole(
    name: str, value: Any, least: int = 0, but: str = "", most: float = math.inf
) -> None:
    """Raises ValueError if `value` is not a whole number from `least` to `most`."""
    whole = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    if not whole or not least <= value <= most:
        limit = f" and at most {most}" if whole and value > most else ""
        raise ValueError(f"{name}={value!r} must be a whole number, {least} or above{limit}{but}")
