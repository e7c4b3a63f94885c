"""Contents in, files that land whole out: nobody ever sees, or keeps, half of one."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterator
from typing import IO, Any, BinaryIO

from .locks import wait_for_lock
from .report import say

# A temporary file that nobody wrote to for so many seconds belongs to a process that died.
STALE_SECONDS = 86400

# What file systems answer that cannot flush a file, and those that cannot flush a folder: network
# drives and FUSE answer EIO there. For a file, EIO means that its data are lost.
_CANNOT_FLUSH = (errno.EBADF, errno.EINVAL, errno.ENOSYS, errno.ENOTSUP)
_CANNOT_FLUSH_FOLDER = (*_CANNOT_FLUSH, errno.EIO, errno.EACCES, errno.EPERM)

_is_flush_failure_said = False


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
            sync_file(file)
        replace(temporary, os.path.join(folder, name))
    except BaseException:
        with contextlib.suppress(OSError):
            os.remove(temporary)
        raise


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Writes a text file whole, in UTF-8, and keeps its line ends; see write_whole()."""
    with write_whole(path) as file:
        file.write(text.encode("utf-8"))


def replace(source: str | os.PathLike[str], target: str | os.PathLike[str]) -> None:
    """Renames a file, in place of the file `target` if there is one.

    Some file systems refuse to rename onto a file that exists. There `target` is removed first.
    """
    try:
        os.replace(source, target)
    except FileExistsError:
        os.remove(target)
        os.replace(source, target)


def sync_file(file: IO[Any]) -> None:
    """Flushes a file that is open for writing to the disk.

    A file system that cannot do that is no error; a line says so, once a process.
    """
    file.flush()
    try:
        os.fsync(file.fileno())
    except OSError as error:
        if error.errno not in _CANNOT_FLUSH:
            raise
        _say_flush_failure(file.name, error)


def sync(path: str) -> None:
    """Flushes a file's data, or a folder's entries, to the disk; see sync_file()."""
    if not os.path.isdir(path):
        with open(path, "rb+") as file:  # Windows flushes only what is open for writing.
            sync_file(file)
        return
    if os.name == "nt":
        return  # Windows cannot flush a folder.
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in _CANNOT_FLUSH_FOLDER:
            raise
        _say_flush_failure(path, error)


def _say_flush_failure(path: str, error: OSError) -> None:
    global _is_flush_failure_said
    if not _is_flush_failure_said:
        _is_flush_failure_said = True
        say(
            f"note: {path} cannot be flushed to its disk ({error.strerror}): files are written, "
            "but a power failure may lose the latest ones"
        )


@contextlib.contextmanager
def write_folder_whole(path: str, overwrite: bool = True) -> Iterator[str]:
    """Makes an empty folder beside `path`, which replaces the folder `path` if the block ends well.

    If the block fails, `path` stays as it was. What a killed process left is removed. If `path` is
    a link, the folder that it leads to is replaced. Without `overwrite`, FileExistsError is raised
    if there is something at `path` when the block has ended. Of several processes one at a time
    does so.
    """
    if os.path.islink(path):
        path = os.path.realpath(path)
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    lock = _hidden_sibling(path, "lock")
    with wait_for_lock(lock, f"Waiting for another process that writes {path}"):
        yield from _write_folder(path, overwrite)


def _write_folder(path: str, overwrite: bool) -> Iterator[str]:
    """write_folder_whole(), for who holds the lock."""
    restore_replaced(path)
    new, old = _hidden_sibling(path, "new"), _hidden_sibling(path, "old")
    for leftover in (new, old):
        remove_folder(leftover)
    os.makedirs(new)
    try:
        yield new
        if not overwrite and os.path.lexists(path):
            raise FileExistsError(f"{path} was made meanwhile, and is not replaced")
        if os.path.isdir(path):
            os.rename(path, old)
        os.rename(new, path)
    except BaseException:
        restore_replaced(path)
        remove_folder(new)
        raise
    remove_folder(old)


def remove_folder(path: str) -> None:
    """Removes a folder and what is in it, as far as that is possible."""
    shutil.rmtree(path, ignore_errors=True)
    # Where each look at a folder gives another inode number, shutil takes it for a link, and stops.
    for parent, folders, names in os.walk(path, topdown=False):
        links = [name for name in folders if os.path.islink(os.path.join(parent, name))]
        for name in [*names, *links]:
            with contextlib.suppress(OSError):
                os.remove(os.path.join(parent, name))
        with contextlib.suppress(OSError):
            os.rmdir(parent)


@contextlib.contextmanager
def temporary_folder(parent: str | None = None, prefix: str = "tmp") -> Iterator[str]:
    """A new folder for this block, in `parent` or in the system's folder for such."""
    folder = tempfile.mkdtemp(prefix=prefix, dir=parent)
    try:
        yield folder
    finally:
        remove_folder(folder)


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


def check_writable(folder: str) -> None:
    """Raises PermissionError if a folder cannot be written, or not be made."""
    place = os.path.abspath(folder)
    while not os.path.lexists(place) and os.path.dirname(place) != place:
        place = os.path.dirname(place)
    if not os.access(place, os.W_OK):
        raise PermissionError(f"cannot write in {place}, where {folder} is to be; name another")


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
