"""Ctrl-C and SIGTERM in; whether a loop should stop, out."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any


class Interruption:
    """Within its block, the first Ctrl-C or SIGTERM is noted, and the second raises.

    A handler of the user's own is called when the block ends, so when the work is saved. A signal
    that is ignored stays ignored, and a handler that was not set in Python stays in its place.

    Python lets only the main thread handle signals. In other threads this changes nothing.
    """

    def __init__(self, on_first: Callable[[], object] = lambda: None) -> None:
        """Sets up nothing yet; entering the block does.

        Args:
            on_first: called at the first signal, unless that signal ends a block (`ends_block`).
        """
        self._on_first = on_first
        self._count = 0
        self._raises_at_first = False
        self._previous: dict[int, Any] = {}
        self._received: dict[int, FrameType | None] = {}
        self._process = os.getpid()

    @property
    def requested(self) -> bool:
        """Whether there was a signal."""
        return self._count > 0

    @property
    def requested_twice(self) -> bool:
        """Whether there were several signals: the user wants no more work."""
        return self._count > 1

    def note(self) -> None:
        """Takes note of a signal that came elsewhere, to another process that works on the same."""
        self._count = max(self._count, 1)

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                # getsignal() returns None for a handler of C, which nobody could set again.
                if signal.getsignal(number) not in (None, signal.SIG_IGN):
                    self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        for number, frame in self._received.items():
            handler = self._previous[number]
            if callable(handler) and handler is not signal.default_int_handler:
                handler(number, frame)

    @contextlib.contextmanager
    def ends_block(self) -> Iterator[None]:
        """The first signal ends this block, wherever it is: it must be safe to leave anywhere."""
        try:
            self._raises_at_first = True
            yield
        except KeyboardInterrupt:
            if self._count > 1:
                raise
        finally:
            self._raises_at_first = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # A forked child inherits this handler.
            signal.signal(number, self._previous[number])
            signal.raise_signal(number)
            return
        self._count += 1
        self._received[number] = frame
        if self._count > 1 or self._raises_at_first:
            raise KeyboardInterrupt
        # A signal may come in the middle of a print, and Python's print cannot be entered twice.
        with contextlib.suppress(RuntimeError):
            self._on_first()
