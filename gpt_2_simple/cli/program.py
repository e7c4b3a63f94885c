"""A process of the command line's own in, the exit status of main() out.

What changes a whole process is here: its standard error, and what Ctrl-C does to imports.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from types import FrameType

from ..common.report import complain
from ..common.stderr_filter import LOG_LEVEL, filter_stderr, wants_notes
from . import main, plain_commands
from .commands import EXIT_INTERRUPTED


def run_program() -> int:
    """Runs the command in sys.argv; returns the exit status, see main()."""
    if main.wants_traceback(sys.argv):
        os.environ.setdefault(LOG_LEVEL, "0")
    plain_commands.importing = _importing
    return main.main()


@contextlib.contextmanager
def _importing() -> Iterator[None]:
    """Within this block TensorFlow may be imported: it makes no notes, and Ctrl-C ends the process.

    An import of compiled modules takes seconds, and turns a KeyboardInterrupt into other errors.
    Nothing is open yet that would have to be closed.
    """
    if "tensorflow" in sys.modules:
        yield
        return
    if not wants_notes():
        filter_stderr()
    before = signal.getsignal(signal.SIGINT)
    if before is not signal.default_int_handler:  # as in a background process of a shell
        yield
        return
    signal.signal(signal.SIGINT, _end)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _end(number: int, frame: FrameType | None) -> None:
    complain(f"{main.PROGRAM}: {main.INTERRUPTED}")
    with contextlib.suppress(Exception):
        sys.stdout.flush()
    os._exit(EXIT_INTERRUPTED)
