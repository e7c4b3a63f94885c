"""File systems that lack what a local Linux one has, simulated by replacing functions of `os`.

Windows, SMB and WSL shares, Google Drive and other FUSE mounts each have some of these defects.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterable
from typing import Any


def _refuse(number: int) -> Callable[..., Any]:
    def call(*_: Any, **__: Any) -> None:
        raise OSError(number, os.strerror(number))

    return call


def _no_flush() -> None:
    """Nothing can be flushed to the disk."""
    os.fsync = _refuse(errno.EINVAL)


def _no_folder_flush() -> None:
    """Folders cannot be flushed (EIO), nor what is open for reading only (EBADF), as on Windows."""
    import fcntl

    real_fsync = os.fsync

    def fsync(file: Any) -> None:
        descriptor = file if isinstance(file, int) else file.fileno()
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        real_fsync(descriptor)

    os.fsync = fsync


def _no_locks() -> None:
    """Files cannot be locked."""
    import fcntl

    fcntl.flock = _refuse(errno.ENOTSUP)


def _no_links_modes_or_times() -> None:
    """No hard links, and neither modes nor times of files can be set."""
    os.link = os.chmod = os.utime = _refuse(errno.EPERM)


def _no_rename_onto_a_file() -> None:
    """A file that exists is never replaced by renaming another."""
    real_rename = os.rename

    def rename(source: Any, target: Any, **options: Any) -> None:
        if os.path.lexists(target):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), target)
        real_rename(source, target, **options)

    os.rename = os.replace = rename


def _unstable_inodes() -> None:
    """Each look at a file gives another inode number."""
    os.path.samestat = lambda one, other: False
    os.path.samefile = lambda one, other: False
    real_stat = os.stat
    count = 0

    def look(*arguments: Any, **options: Any) -> os.stat_result:
        nonlocal count
        count += 1
        found = real_stat(*arguments, **options)
        names = {name: getattr(found, name) for name in dir(found) if name.startswith("st_")}
        return os.stat_result([found.st_mode, count, *tuple(found)[2:]], names)

    os.stat = look


DEFECTS = {
    "no-flush": _no_flush,
    "no-folder-flush": _no_folder_flush,
    "no-locks": _no_locks,
    "no-links": _no_links_modes_or_times,
    "no-rename": _no_rename_onto_a_file,
    "unstable-inodes": _unstable_inodes,
}


def simulate(names: Iterable[str]) -> None:
    """Gives this process, and those that it forks from now on, file systems with these defects."""
    for name in names:
        DEFECTS[name]()
