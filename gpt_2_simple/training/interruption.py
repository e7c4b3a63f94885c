"""Ctrl-C and SIGTERM in, a wish to stop that a loop can ask for out."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any


class Interruption:
    """While the block runs, the first Ctrl-C or SIGTERM is remembered, the second raises.

    Python lets only the main thread handle signals; elsewhere they go where they went before.
    """

    def __init__(self, tell: Callable[[], object] = lambda: None) -> None:
        """Takes what is called at the first signal, unless that ends a block at once."""
        self._tell = tell
        self._count = 0
        self._at_once = False
        self._previous: dict[int, Any] = {}

    @property
    def requested(self) -> bool:
        """Whether there was a signal."""
        return self._count > 0

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    @contextlib.contextmanager
    def ends_block(self) -> Iterator[None]:
        """Within this block, which must be safe to leave anywhere, the first signal ends it."""
        try:
            self._at_once = True
            yield
        except KeyboardInterrupt:
            if self._count > 1:
                raise
        finally:
            self._at_once = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._count += 1
        if self._count > 1 or self._at_once:
            raise KeyboardInterrupt
        # A signal may come in the middle of a print, which cannot be begun a second time.
        with contextlib.suppress(RuntimeError):
            self._tell()
