"""A folder in, a lock on it out, which one process or thread at a time holds.

The kernel releases a lock when its process ends, however it ends. Some network drives know no
locks: what needs one goes ahead there without it.
"""

from __future__ import annotations

import contextlib
import enum
import errno
import os
import secrets
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
# Lock files that are open. A forked process shares the lock of each, and would keep it when this
# process has ended.
_open_files: set[IO[Any]] = set()

_POLL_SECONDS = 0.2
_PROBE_SECONDS = 0.005  # how long to wait for a process that only asks who holds a lock


def _close_in_child() -> None:
    for file in _open_files:
        file.close()
    _open_files.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_in_child)


@contextlib.contextmanager
def _open(path: str | os.PathLike[str]) -> Iterator[IO[Any]]:
    """Opens a lock file, which is made if it is missing, for this block and this process alone."""
    with open(path, "ab+") as file:
        _open_files.add(file)
        try:
            yield file
        finally:
            _open_files.discard(file)


class LockState(enum.Enum):
    """What a try to lock a file found out."""

    FREE = "nobody else holds it"
    HELD = "another process or thread holds it"
    UNSUPPORTED = "the file system has no locks"


@contextlib.contextmanager
def lock_run(folder: str) -> Iterator[LockState]:
    """Holds the lock of a run's folder for this block, and makes the folder if it is missing.

    Yields:
        FREE; or UNSUPPORTED, and then another process may hold the folder just as well.

    Raises:
        OSError: the folder is a file, or cannot be written.
        RuntimeError: another process or thread holds the lock; names it.
    """
    if os.path.lexists(folder) and not os.path.isdir(folder):
        raise NotADirectoryError(f"{folder} is a file; give another run_name or checkpoint_dir")
    with contextlib.ExitStack() as stack:
        try:
            os.makedirs(folder, exist_ok=True)
            file = stack.enter_context(_open(os.path.join(folder, RUN_LOCK)))
        except OSError as error:
            raise type(error)(
                f"cannot write in {folder} ({error}); give another checkpoint_dir, or make it "
                "writable"
            ) from error
        state = _lock_exclusively(file)
        if state is LockState.HELD:
            file.seek(0)
            holder = file.read().decode("utf-8", "replace").strip() or "another process"
            raise RuntimeError(
                f"{folder} is being trained by {holder}; wait for it, or give another run_name"
            )
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        file.flush()
        yield state


def run_lock_state(folder: str) -> LockState:
    """Whether the lock of a run's folder could be taken; it is not, and nothing is written."""
    try:
        with open(os.path.join(folder, RUN_LOCK), "rb") as file:
            return _try_lock(file, shared=True)
    except OSError:
        return LockState.FREE  # Nobody ever locked it.


@contextlib.contextmanager
def wait_for_lock(path: str | os.PathLike[str], notice: str) -> Iterator[None]:
    """Holds the lock file `path` for this block, after waiting for whoever holds it.

    The file is made, and removed at the end. The `notice` is printed if somebody holds it.
    """
    waiting = False
    while True:
        with _open(path) as file:
            if _try_lock(file) is not LockState.HELD and _is_current(file, path):
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


def _lock_exclusively(file: IO[Any]) -> LockState:
    """Takes the lock unless somebody else has it exclusively; run_lock_state() is waited for."""
    while True:
        state = _try_lock(file)
        if state is not LockState.HELD or sys.platform == "win32":
            return state
        if _try_lock(file, shared=True) is LockState.HELD:
            return LockState.HELD
        fcntl.flock(file, fcntl.LOCK_UN)
        time.sleep(_PROBE_SECONDS)


def _try_lock(file: IO[Any], shared: bool = False) -> LockState:
    """Takes a file's lock if that is possible at once.

    A `shared` lock keeps out only exclusive ones. Windows knows no such lock.
    """
    try:
        if sys.platform == "win32":
            os.lseek(file.fileno(), _LOCKED_BYTE, os.SEEK_SET)
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
            fcntl.flock(file, kind | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN, errno.EDEADLK):
            return LockState.HELD
        return LockState.UNSUPPORTED
    return LockState.FREE


def _is_current(file: IO[bytes], path: str | os.PathLike[str]) -> bool:
    """Whether `path` still is the opened file: the last holder may have removed it meanwhile.

    What is written to the file must be found at `path`. Numbers of inodes would tell nothing where
    each look at a file gives another one.
    """
    mark = secrets.token_bytes(8)
    file.truncate(0)
    file.write(mark)
    file.flush()
    with contextlib.suppress(FileNotFoundError), open(path, "rb") as found:
        return found.read() == mark
    return False
