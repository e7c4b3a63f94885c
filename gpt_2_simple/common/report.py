"""Lines and counts in, the user's terminal or notebook out: the one place that prints."""

from __future__ import annotations

import contextlib
import contextvars
import os
import sys
import types
import warnings
from collections.abc import Iterator
from typing import Any

from tqdm.auto import tqdm

# It ends with a separator: the name of another folder may start with the package's.
_PACKAGE = os.path.join(os.path.dirname(os.path.dirname(__file__)), "")

_verbose: contextvars.ContextVar[int] = contextvars.ContextVar("gpt_2_simple_verbose", default=1)


@contextlib.contextmanager
def verbosity(verbose: int) -> Iterator[None]:
    """Within this block `say` and `progress` are silent if `verbose` is 0."""
    token = _verbose.set(verbose)
    try:
        yield
    finally:
        _verbose.reset(token)


def is_silent() -> bool:
    """Whether the caller asked for no output."""
    return _verbose.get() <= 0


def in_notebook() -> bool:
    """Whether this runs in a notebook's kernel."""
    ipython = sys.modules.get("IPython")
    return ipython is not None and hasattr(ipython.get_ipython(), "kernel")


def is_interactive() -> bool:
    """Whether a user watches: standard error is a terminal, or this runs in a notebook."""
    return in_notebook() or bool(getattr(sys.stderr, "isatty", lambda: False)())


def say(*parts: object, end: str = "\n") -> None:
    """Prints to standard output, above any progress bar that is being drawn."""
    if is_silent():
        return
    with tqdm.external_write_mode(file=sys.stdout):
        print(*parts, end=end, flush=True)


def complain(*parts: object) -> None:
    """Prints to standard error, whatever the verbosity: for the command line's errors."""
    with tqdm.external_write_mode(file=sys.stderr):
        print(*parts, file=sys.stderr, flush=True)


def warn(message: str) -> None:
    """Warns the user; the warning points to the last line outside of this package."""
    level = 1
    frame: types.FrameType | None = sys._getframe()
    while frame is not None and frame.f_code.co_filename.startswith(_PACKAGE):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, UserWarning, stacklevel=level)


def progress(*, total: float | None, desc: str, unit: str, **options: Any) -> tqdm:
    """Makes a progress bar, which is drawn only where a user watches.

    Args:
        total: how many units there are; None if that is not known.
        desc: what is being done.
        unit: what is counted: 'B' (with unit_scale=True), 'step', 'tok'.
        **options: passed to tqdm.

    Returns:
        A tqdm bar: a context manager with `update(n)` and `set_postfix`.
    """
    quiet = is_silent() or not is_interactive()
    return tqdm(total=total, desc=desc, unit=unit, disable=quiet, dynamic_ncols=True, **options)
