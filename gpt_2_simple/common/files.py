"""Contents in, files that land whole out: nobody ever sees, or keeps, half of one."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from typing import BinaryIO

# A temporary file that nobody wrote to for so many seconds belongs to a process that died.
STALE_SECONDS = 86400


@contextlib.contextmanager
def write_whole(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Opens a temporary file beside `path`, which replaces `path` if the block ends well.

    If the block fails, `path` stays as it was, and the temporary file is removed. If `path` is a
    link, the file that it leads to is replaced. If it is a device or a named pipe, the block writes
    to that. The folder of `path` must exist.
    """
    if is_special(path):
        with open(path, "wb") as file:
            yield file
        return
    folder, name = os.path.split(os.path.realpath(path))
    _remove_stale(folder, name)
    temporary = os.path.join(folder, f".{name}.{secrets.token_hex(4)}.tmp")
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


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Writes a text file whole, in UTF-8, and keeps its line ends; see write_whole()."""
    with write_whole(path) as file:
        file.write(text.encode("utf-8"))


@contextlib.contextmanager
def write_folder_whole(path: str) -> Iterator[str]:
    """Makes an empty folder beside `path`, which replaces the folder `path` if the block ends well.

    If the block fails, `path` stays as it was. What a killed process left is removed. If `path` is
    a link, the folder that it leads to is replaced.
    """
    if os.path.islink(path):
        path = os.path.realpath(path)
    restore_replaced(path)
    new, old = _hidden_sibling(path, "new"), _hidden_sibling(path, "old")
    for leftover in (new, old):
        if os.path.isdir(leftover):
            shutil.rmtree(leftover)
    os.makedirs(new)
    try:
        yield new
        if os.path.isdir(path):
            os.rename(path, old)
        os.rename(new, path)
    except BaseException:
        restore_replaced(path)
        shutil.rmtree(new, ignore_errors=True)
        raise
    shutil.rmtree(old, ignore_errors=True)


def restore_replaced(path: str) -> None:
    """Puts the earlier folder back if a process was killed between the two renames."""
    old = _hidden_sibling(path, "old")
    if os.path.isdir(old) and not os.path.exists(path):
        os.rename(old, path)


def _hidden_sibling(path: str, suffix: str) -> str:
    # Not normalised: 'models/' and 'models/.' must fail, not replace the folder of all models.
    folder, name = os.path.split(path)
    return os.path.join(folder, f".{name}.{suffix}")


def is_temporary(name: str) -> bool:
    """Whether a file has the name of a temporary file of write_whole()."""
    return re.fullmatch(r"\..+\.[0-9a-f]{8}\.tmp", name) is not None


def is_special(path: str | os.PathLike[str]) -> bool:
    """Whether `path` is neither a file nor a folder, but a device or a named pipe."""
    return os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path)


def check_folder(name: str, path: str | os.PathLike[str]) -> None:
    """Raises FileNotFoundError if the folder of the file `path`, argument `name`, is missing."""
    folder = os.path.dirname(os.path.abspath(path))
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"{name}={os.fspath(path)!r}: there is no folder {folder!r}")


def _remove_stale(folder: str, name: str) -> None:
    """Removes the temporary files that dead processes left of the file `name`."""
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if is_temporary(entry.name) and entry.name.startswith(f".{name}."):
                with contextlib.suppress(OSError):
                    if entry.stat().st_mtime < time.time() - STALE_SECONDS:
                        os.remove(entry.path)
