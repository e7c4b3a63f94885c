"""Contents in, files that land whole out: nobody ever sees, or keeps, half of one."""

from __future__ import annotations

import contextlib
import os
import secrets
import time
from collections.abc import Iterator
from typing import BinaryIO

# A temporary file that nobody wrote to for so many seconds was left by a process that is no more.
STALE = 86400


@contextlib.contextmanager
def write_whole(path: str | os.PathLike[str], mark: str = ".") -> Iterator[BinaryIO]:
    """Opens a temporary file beside `path` that takes its place if the block ends well.

    Whatever ends the block otherwise leaves `path` as it was, and nothing else behind. A link
    stays, and what it leads to is replaced. What is no file, such as a pipe, is written to.

    Args:
        path: the file to make or to replace; its folder must exist.
        mark: what the temporary file's name starts with; a killed process leaves it, and this
            tells it from what users keep there.

    Raises:
        OSError: the folder is missing or cannot be written, or the disk is full.
    """
    if is_special(path):
        with open(path, "wb") as file:
            yield file
        return
    folder, name = os.path.split(os.path.realpath(path))
    _remove_stale(folder, f"{mark}{name}.")
    temporary = os.path.join(folder, f"{mark}{name}.{secrets.token_hex(4)}.tmp")
    file = open(temporary, "xb")
    try:
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, os.path.join(folder, name))
    except BaseException:
        with contextlib.suppress(OSError):
            os.remove(temporary)
        raise


def is_special(path: str | os.PathLike[str]) -> bool:
    """Whether there is something that is neither file nor folder: a device, or a named pipe."""
    return os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path)


def _remove_stale(folder: str, start: str) -> None:
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith(start) and entry.name.endswith(".tmp"):
                with contextlib.suppress(OSError):
                    if entry.stat().st_mtime < time.time() - STALE:
                        os.remove(entry.path)


def check_folder(name: str, path: str | os.PathLike[str]) -> None:
    """Raises FileNotFoundError if the file that argument `name` asks for has no folder to go to."""
    folder = os.path.dirname(os.path.abspath(path))
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"{name}={os.fspath(path)!r}: there is no folder {folder!r}")


def write_text(path: str | os.PathLike[str], text: str, mark: str = ".") -> None:
    """Writes a text file whole, in UTF-8 and with line ends as they are; see write_whole()."""
    with write_whole(path, mark) as file:
        file.write(text.encode("utf-8"))
