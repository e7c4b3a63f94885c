"""A short block of work in; Ctrl-C takes effect after it, never within it."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType


@contextlib.contextmanager
def delayed_interrupt() -> Iterator[None]:
    """Within this block SIGINT waits; its handler is called when the block ends.

    For work that must not be left half done and takes milliseconds. A handler that was not set in
    Python stays in its place, and an ignored signal stays ignored. Only the main thread handles
    signals: in other threads this changes nothing.
    """
    previous = signal.getsignal(signal.SIGINT)
    in_main = threading.current_thread() is threading.main_thread()
    if not in_main or not callable(previous):
        yield
        return
    received: list[FrameType | None] = []
    signal.signal(signal.SIGINT, lambda number, frame: received.append(frame))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
        if received:
            previous(signal.SIGINT, received[0])
