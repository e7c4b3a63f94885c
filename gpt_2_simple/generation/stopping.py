"""A text, or its tokens, in; the place where it ends out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


def ends_with(tokens: Sequence[int], stop_token: int | None) -> bool:
    """Whether the last of the tokens is the stop token."""
    return len(tokens) > 0 and bool(tokens[-1] == stop_token)


class StopCriteria(NamedTuple):
    """What ends a text; see GenerationSettings."""

    truncate: str | None = None
    stop: tuple[str, ...] = ()
    stop_token: int | None = None  # its id
    include_stop: bool = False

    @property
    def strings(self) -> tuple[str, ...]:
        """All strings that end a text."""
        return ((self.truncate,) if self.truncate else ()) + self.stop

    def find_end(self, text: str, n_searched: int = 0) -> int | None:
        """Finds where a text ends.

        The stop string that is complete first ends it, and of several the longest. So the end does
        not depend on the pieces in which the text came.

        Args:
            text: the text after the prefix.
            n_searched: characters at its start that were searched before, and held no end.

        Returns:
            The end, as a number of characters; None if the text has not ended.
        """
        strings = self.strings
        start = max(0, n_searched - max(map(len, strings), default=1) + 1)
        found = [(text.find(string, start), string) for string in strings]
        ends = [(place + len(string), place, string) for place, string in found if place >= 0]
        if not ends:
            return None
        end, place, string = min(ends)
        return end if self.include_stop and string in self.stop else place

    def count_ready(self, text: str) -> int:
        """Characters of a text without an end that cannot become the start of a stop string."""
        held = (
            n for string in self.strings for n in range(1, len(string)) if text.endswith(string[:n])
        )
        return len(text) - max(held, default=0)

    def drop_stop_token(self, tokens: Sequence[int]) -> Sequence[int]:
        """The tokens that are part of the text: all, or all except a stop token at the end."""
        drops = ends_with(tokens, self.stop_token) and not self.include_stop
        return tokens[:-1] if drops else tokens
