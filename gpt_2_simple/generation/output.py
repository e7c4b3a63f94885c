"""Texts in, a file that lands whole or the terminal out."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Callable, Iterator

from ..common.files import check_folder, is_special
from ..common.report import say


@contextlib.contextmanager
def file_writer(path: str) -> Iterator[Callable[[str], None]]:
    """A function that adds text to a file, which gets its name when the block ends.

    Until then the text is in `<path>.<letters>.part`. A block that ends by an error keeps what
    there is, or, if there is nothing, the file that was there before.

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
    keep = False
    try:
        with open(part, "x", encoding="utf-8", errors="surrogatepass", newline="\n") as file:

            def write(text: str) -> None:
                nonlocal keep
                keep = True
                file.write(text)
                file.flush()

            yield write
            keep = True
            file.flush()
            os.fsync(file.fileno())
    finally:
        if keep:
            os.replace(part, path)
        else:
            os.remove(part)


def print_text(text: str) -> None:
    """Prints a text as it is; what UTF-8 cannot hold becomes a question mark."""
    say(text.encode("utf-8", "replace").decode("utf-8"), end="")
