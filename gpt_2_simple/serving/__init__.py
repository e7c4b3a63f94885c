"""Loaded models in, an HTTP server out: OpenAI's completions API."""

from __future__ import annotations

import importlib
from typing import Any


def __getattr__(name: str) -> Any:
    """Imports `app`, and TensorFlow with it, when it is first asked for."""
    if name == "app":
        return importlib.import_module(".launch", __name__).app
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
