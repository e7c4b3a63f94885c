"""A folder in, a lock on it out, which one process or thread at a time holds.

The kernel releases a lock when its process ends, however it ends. Some network drives know no
locks: what needs one goes ahead there without it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import sys
import time
from collections.abc import Iterator
from typing import IO, Any

from .report import say

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

RUN_LOCK = ".lock"

# Windows forbids others to read a locked byte; this one lies behind all that is written.
_LOCKED_BYTE = 1 << 30
_POLL_SECONDS = 0.2


@contextlib.contextmanager
def lock_run(folder: str) -> Iterator[None]:
    """Holds the lock of a run's folder for this block, and makes the folder if it is missing.

    Raises:
        OSError: the folder is a file, or cannot be written.
        RuntimeError: another process or thread holds the lock; names it.
    """
    if os.path.lexists(folder) and not os.path.isdir(folder):
        raise NotADirectoryError(f"{folder} is a file; give another run_name or checkpoint_dir")
    try:
        os.makedirs(folder, exist_ok=True)
        file = open(os.path.join(folder, RUN_LOCK), "a+", encoding="utf-8")  # noqa: SIM115
    except OSError as error:
        raise type(error)(
            f"cannot write in {folder} ({error}); give another checkpoint_dir, or make it writable"
        ) from error
    with file:
        if not _try_lock(file):
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise RuntimeError(
                f"{folder} is being trained by {holder}; wait for it, or give another run_name"
            )
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield


@contextlib.contextmanager
def wait_for_lock(path: str | os.PathLike[str], notice: str) -> Iterator[None]:
    """Holds the lock file `path` for this block, after waiting for whoever holds it.

    The file is made, and removed at the end. The `notice` is printed if somebody holds it.
    """
    waiting = False
    while True:
        with open(path, "ab") as file:
            if _try_lock(file) and _is_current(file, path):
                try:
                    yield
                finally:
                    with contextlib.suppress(OSError):  # Windows does not remove an open file.
                        os.remove(path)
                return
        if not waiting:
            say(notice)
            waiting = True
        time.sleep(_POLL_SECONDS)


def _try_lock(file: IO[Any]) -> bool:
    """Whether this process may go ahead: it has the lock now, or there are no locks here."""
    try:
        if sys.platform == "win32":
            os.lseek(file.fileno(), _LOCKED_BYTE, os.SEEK_SET)
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.EACCES, errno.EAGAIN, errno.EDEADLK)
    return True


def _is_current(file: IO[bytes], path: str | os.PathLike[str]) -> bool:
    """Whether `path` still is the opened file: the last holder may have removed it meanwhile."""
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    return False
