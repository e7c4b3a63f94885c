"""An exception in, what it says in one line out."""

from __future__ import annotations

import re

# What TensorFlow puts around its messages: places in the graph, and in the code that built it.
_PLACES = re.compile(
    r"\s|$|From /job:|Graph execution error|Detected at|Node:|Hint:|Original stack trace"
)


def first_line(error: BaseException) -> str:
    """The first line of an error's message, without the places that TensorFlow adds; may be ''."""
    lines = (line for line in str(error).splitlines() if not _PLACES.match(line))
    return next(lines, "")


def file_reason(error: BaseException) -> str:
    """What a file's error says; TensorFlow's messages name a temporary file before the reason."""
    return first_line(error).rpartition("; ")[2]
