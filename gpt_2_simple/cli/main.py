"""Command line arguments in, an exit status out."""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from collections.abc import Collection, Iterator, Sequence
from typing import Any

from ..common.errors import first_line
from ..common.report import complain
from .commands import COMMANDS, EXIT_INTERRUPTED, LEGACY_FLAGS
from .completion import complete
from .parser import DEBUG_VARIABLE, PROGRAM, in_shell_words, parse

EXIT_CLOSED_PIPE = 141  # what shells report for a program whose reader went away: `... | head`
INTERRUPTED = "interrupted"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command, as the program `gpt_2_simple` does.

    Args:
        argv: the arguments after the program's name; None takes them from the process.

    Returns:
        The exit status: 0 done, 1 an error (told in one line on standard error), 2 wrong usage,
        130 stopped by Ctrl-C, 141 standard output was closed by its reader.
    """
    argv = sys.argv[1:] if argv is None else argv
    flags: Collection[str] = ()
    is_printed = True
    try:
        try:
            with _one_line_warnings():
                command, options = parse(COMMANDS, argv, LEGACY_FLAGS, complete)
                flags = command.flags
                status = command.run(options)
        finally:
            is_printed = _flush_output()
        return status or int(not is_printed)
    except SystemExit as stop:  # argparse, after --help or wrong usage
        return int(stop.code or not is_printed)
    except KeyboardInterrupt:
        complain(f"{PROGRAM}: {INTERRUPTED}")
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        _discard_output()
        return EXIT_CLOSED_PIPE
    except Exception as error:
        message = _message(error)
        if message is None or wants_traceback(argv):
            raise
        complain(f"{PROGRAM}: error: {in_shell_words(message, COMMANDS, flags)}")
        return 1


def wants_traceback(argv: Sequence[str]) -> bool:
    """Whether the user asked to see all that goes on."""
    return "--debug" in argv or os.environ.get(DEBUG_VARIABLE, "0") not in ("", "0")


def _flush_output() -> bool:
    """Whether all that was printed has gone out; otherwise a line on standard error says why."""
    if sys.stdout is None:  # a daemon has none
        return True
    try:
        sys.stdout.flush()  # a closed pipe shows here rather than after the end
    except BrokenPipeError:
        raise
    except (OSError, ValueError) as error:
        _discard_output()
        complain(f"{PROGRAM}: error: standard output cannot be written: {error}")
        return False
    return True


def _discard_output() -> None:
    """What is still buffered must go somewhere when Python ends, its documentation says."""
    with contextlib.suppress(OSError, ValueError):  # no file, or closed already
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _message(error: Exception) -> str | None:
    """What an error says, in one line; None if a user cannot do anything about it."""
    name = type(error).__name__
    if type(error).__module__.startswith("tensorflow"):
        line = first_line(error)
        return f"{name}: {line}" if line else name
    if isinstance(error, (ValueError, OSError, RuntimeError, ImportError, MemoryError)):
        return " ".join(str(error).split()) or name
    return None


@contextlib.contextmanager
def _one_line_warnings() -> Iterator[None]:
    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        complain(f"{PROGRAM}: warning: {message}")

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield
