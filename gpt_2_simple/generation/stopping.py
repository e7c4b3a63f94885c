"""Where a text ends: stop strings, stop tokens, and what of them is kept."""

from __future__ import annotations

from typing import NamedTuple


class StopCriteria(NamedTuple):
    """Where texts end, and what of them is kept.

    Attributes:
        truncate: a text ends before the first of these after its prefix; None for none.
        stop: the same, for several strings.
        include_stop: whether a text keeps the `stop` it ends with.
        stop_token: a text ends with this token, which is no part of it unless include_stop.
        include_prefix: whether a text starts with its prefix.
    """

    truncate: str | None = None
    stop: tuple[str, ...] = ()
    include_stop: bool = False
    stop_token: int | None = None
    include_prefix: bool = True

    def find(self, text: str, start: int) -> int | None:
        """The place at which `text` ends, looking from `start` on; None if it does not yet.

        The stop that is complete first counts, and of several the longest: so it makes no
        difference in which pieces the text came.
        """
        found = [(text.find(stop, start), stop) for stop in self.strings]
        ends = [(place + len(stop), place, stop) for place, stop in found if place >= 0]
        if not ends:
            return None
        end, place, stop = min(ends)
        return end if self.include_stop and stop in self.stop else place

    @property
    def strings(self) -> tuple[str, ...]:
        """All that a text may end at."""
        return ((self.truncate,) if self.truncate else ()) + self.stop

    @property
    def longest(self) -> int:
        """Characters of the longest of them."""
        return max(map(len, self.strings), default=0)
