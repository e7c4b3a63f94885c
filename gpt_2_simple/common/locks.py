"""One process at a time in a folder."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
from collections.abc import Iterator
from typing import Any

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"


@contextlib.contextmanager
def lock(folder: str) -> Iterator[None]:
    """Keeps a run's folder, made if need be, for this block alone.

    The kernel lets go of the lock when the process ends, however it ends. Where it has none to
    give (Windows, some network drives) nothing is kept.

    Raises:
        NotADirectoryError: `folder` is a file.
        OSError: nothing can be written there.
        RuntimeError: another process, or thread, is training this run; says which.
    """
    if os.path.lexists(folder) and not os.path.isdir(folder):
        raise NotADirectoryError(f"{folder} is a file; give another run_name or checkpoint_dir")
    try:
        os.makedirs(folder, exist_ok=True)
        file = open(os.path.join(folder, LOCK), "a+", encoding="utf-8")  # noqa: SIM115
    except OSError as error:
        raise type(error)(
            f"cannot write in {folder} ({error}); give another checkpoint_dir, or its rights back"
        ) from error
    with file:
        _take(file, folder)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield


def _take(file: Any, folder: str) -> None:
    if fcntl is None:
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
            return
        file.seek(0)
        holder = file.read().strip() or "another process"
        raise RuntimeError(
            f"{folder} is being trained by {holder}; wait for it, or give another run_name"
        ) from error
