"""Texts in; a file that appears whole, or printed lines, out."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
from collections.abc import Callable, Iterator

from ..common.files import check_folder, is_special, replace, sync_file
from ..common.report import say

# Adds a string to a file, or prints it.
Append = Callable[[str], None]


def json_line(prefix: str, text: str) -> str:
    """A line of JSON for a text and the prefix that it was generated from."""
    line = json.dumps({"prefix": prefix, "text": text}, ensure_ascii=False) + "\n"
    # UTF-8 cannot hold lone surrogates; JSON writes them as Python's backslashreplace does.
    return line.encode("utf-8", "backslashreplace").decode("utf-8")


@contextlib.contextmanager
def open_output(path: str) -> Iterator[Append]:
    """Yields a function that adds a string to a file, which gets its name when the block ends.

    Until then the text is in `<path>.<letters>.part`. If an error ends the block, the file keeps
    what was added before; if nothing was, it stays as it was before the block.

    Raises:
        FileNotFoundError: there is no folder for it.
        ValueError: there is a folder of that name.
    """
    if os.path.isdir(path):
        raise ValueError(f"destination_path={path!r} is a folder; name a file in it")
    check_folder("destination_path", path)
    if is_special(path):
        with open(path, "w", encoding="utf-8", errors="surrogatepass", newline="\n") as file:
            yield lambda text: print(text, end="", file=file, flush=True)
        return
    path = os.path.realpath(path)
    part = f"{path}.{secrets.token_hex(4)}.part"
    is_kept = False
    try:
        with open(part, "x", encoding="utf-8", errors="surrogatepass", newline="\n") as file:

            def append(text: str) -> None:
                nonlocal is_kept
                is_kept = True
                file.write(text)
                file.flush()

            yield append
            is_kept = True
            sync_file(file)
    finally:
        if is_kept:
            replace(part, path)
        else:
            os.remove(part)


def print_text(text: str) -> None:
    """Prints a text as it is; what UTF-8 cannot hold becomes a question mark."""
    say(text.encode("utf-8", "replace").decode("utf-8"), end="")
