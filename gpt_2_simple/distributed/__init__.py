"""Several processes that train one model together: who they are, how they sum, how they start."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .launcher import launch
    from .ray import finetune_on_ray

__all__ = ["finetune_on_ray", "launch"]

_PLACES = {"finetune_on_ray": "ray", "launch": "launcher"}


def __getattr__(name: str) -> Any:
    """Imports a public function when it is first asked for."""
    if name in _PLACES:
        return getattr(importlib.import_module(f".{_PLACES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """Lists the public names."""
    return sorted({*globals(), *__all__})
