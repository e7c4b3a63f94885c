"""A launcher's Job in, finetune()'s result or failure out: what a worker process does."""

from __future__ import annotations

import _thread
import builtins
import contextlib
import pickle
import queue
import signal
import socket
import sys
import threading
from multiprocessing.connection import Connection
from typing import Any

from ..common.errors import first_line
from ..session import start_tf_sess
from ..training.finetune import finetune
from ..training.history import Entry
from .channel import WorkerLost, as_connection
from .launcher import Failure, Job


class _Launcher:
    """The connection to the process that launched this one."""

    def __init__(self, job: Job):
        self._connection: Connection = as_connection(socket.create_connection(job.address))
        self._connection.send_bytes(job.token.encode())
        self._answers: queue.Queue[Any] = queue.Queue()
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        """Ctrl-C there is Ctrl-C here; if that process is gone, this one saves and ends."""
        while True:
            try:
                message = self._connection.recv()
            except (EOFError, OSError):
                self._answers.put(("answer", False))
                _thread.interrupt_main()
                return
            if message == "stop":
                _thread.interrupt_main()
            else:
                self._answers.put(message)

    def send(self, message: Any) -> None:
        with contextlib.suppress(OSError):
            self._connection.send(message)

    def on_step(self, entry: Entry) -> Any:
        self.send(entry)
        kind, answer = self._answers.get()
        if kind == "error":
            raise RuntimeError(answer)
        return answer


def main() -> None:
    """Trains as the Job on standard input says."""
    # A shell's background job is started with SIGINT ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    job: Job = pickle.load(sys.stdin.buffer)
    launcher = _Launcher(job)
    try:
        with start_tf_sess(job.threads) as sess:
            on_step = launcher.on_step if job.calls_back else None
            result = finetune(sess, **job.settings, on_step=on_step)
    except BaseException as error:
        launcher.send(as_failure(error))
        sys.exit(1)
    history = [tuple(entry) for entry in result.history]
    launcher.send({**result._asdict(), "history": history})


def as_failure(error: BaseException) -> Failure:
    """What the launching process is told of an error."""
    kinds = [kind.__name__ for kind in type(error).__mro__ if kind.__module__ == builtins.__name__]
    is_known = kinds[0] not in ("Exception", "object")
    message = str(error) if is_known else first_line(error)
    number = error.errno if isinstance(error, OSError) else None
    return Failure(kinds[0], message or kinds[0], number, isinstance(error, WorkerLost))
