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
    """Prints to standard output, above any progress bar that is being drawn.

    Output that fails never ends work: characters that the console cannot show are replaced, and an
    output that cannot be written to (closed, on a full disk) is left out after one note.

    Raises:
        BrokenPipeError: the reader of standard output has gone away, as in `... | head`.
    """
    if not is_silent():
        _print(sys.stdout, " ".join(map(str, parts)) + end)


def complain(*parts: object) -> None:
    """Prints to standard error, whatever the verbosity: for the command line's errors."""
    with contextlib.suppress(BrokenPipeError):
        _print(sys.stderr, " ".join(map(str, parts)) + "\n")


# The streams that could not be written to.
_dead_streams: list[Any] = []


def _print(stream: Any, text: str) -> None:
    if stream is None or any(stream is dead for dead in _dead_streams):
        return  # A daemon has no streams.
    try:
        with tqdm.external_write_mode(file=stream):
            try:
                stream.write(text)
            except UnicodeEncodeError:
                encoding = getattr(stream, "encoding", None) or "ascii"
                stream.write(text.encode(encoding, "replace").decode(encoding))
            stream.flush()
    except BrokenPipeError:
        raise
    except (OSError, ValueError) as error:  # Python raises ValueError for a closed file.
        _dead_streams.append(stream)
        complain(f"gpt_2_simple: note: output cannot be printed ({error}); the work goes on")


def warn(message: str) -> None:
    """Warns the user; the warning points to the last line outside of this package."""
    level = 1
    frame: types.FrameType | None = sys._getframe()
    while frame is not None and frame.f_code.co_filename.startswith(_PACKAGE):
        level, frame = level + 1, frame.f_back
    with contextlib.suppress(OSError, ValueError):  # Standard error may be closed.
        warnings.warn(message, UserWarning, stacklevel=level)


def progress(*, total: float | None, desc: str, unit: str, **options: Any) -> tqdm:
    """Makes a tqdm bar, which is drawn only where a user watches; `options` are tqdm's."""
    quiet = is_silent() or not is_interactive()
    return tqdm(total=total, desc=desc, unit=unit, disable=quiet, dynamic_ncols=True, **options)
