"""Settings and a number of workers in; processes on this machine that train together; a Result out.

Each process gets its own GPU, or its share of the cores. They are no processes of multiprocessing,
which import the user's script again: many scripts have no `if __name__ == "__main__"`. Nothing here
imports TensorFlow before the training is over.
"""

from __future__ import annotations

import builtins
import contextlib
import dataclasses
import errno
import os
import pickle
import secrets
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import IO, Annotated, Any, NamedTuple, cast

from ..common.report import complain, say, verbosity
from ..common.settings import Setting, fields_of, settings_function
from ..common.stderr_filter import LOG_LEVEL, is_note, wants_notes
from ..training.history import Entry
from ..training.interruption import Interruption
from ..training.settings import MEMORY, TrainingSettings
from .channel import as_connection
from .tf_config import VARIABLE, tf_config

AUTO = "auto"
VISIBLE_GPUS = "CUDA_VISIBLE_DEVICES"

# Another program may take a port between its choice and its use.
MAX_TRIES = 3
POLL_SECONDS = 0.2
_SIGKILL = 9
# subprocess has the name on Windows alone.
_NEW_PROCESS_GROUP = 0x200
# How long the others may take to end after one worker has failed; worker 0 may be saving.
GRACE_SECONDS = 20.0
WRITER_GRACE_SECONDS = 120.0


@dataclasses.dataclass(frozen=True)
class LaunchSettings(TrainingSettings):
    """All that launch() can be told: finetune()'s settings, and how many workers."""

    # fmt: off
    _: dataclasses.KW_ONLY
    workers: Annotated[int | str, Setting(
        MEMORY, "Processes on this machine that train together: each has a GPU, or its share of "
        "the cores, and takes its share of a step's `accumulate_gradients` micro-batches. 'auto' "
        "is one a GPU, or else 1", at_least=1, choices=(AUTO,))] = AUTO
    # fmt: on

    @property
    def training(self) -> dict[str, Any]:
        """finetune()'s arguments."""
        return {name: getattr(self, name) for name in fields_of(TrainingSettings)}


@settings_function(LaunchSettings)
def launch(settings: LaunchSettings) -> Any:
    """Trains a model on a text with several processes on this machine; finetune() for several GPUs.

    The result is the same for any number of workers, to float32 rounding. Ctrl-C saves once, and
    ends all processes. `on_step` is called in this process.

    Args:
        settings: finetune()'s, and `workers`.

    Returns:
        finetune()'s Result.

    Raises:
        RuntimeError: a worker was killed, or froze; names it, and the last checkpoint.
        ValueError: a setting is out of range, there are fewer GPUs than workers, or TF_CONFIG says
            that this process is a worker already.
        KeyboardInterrupt: a second Ctrl-C.
    """
    with verbosity(settings.verbose):
        return as_result(train_in_processes(settings, count_workers(settings.workers)))


def as_result(values: dict[str, Any]) -> Any:
    """finetune()'s Result from what a worker process sent."""
    from ..training.trainer import Result

    return Result(**values)


def count_workers(workers: int | str) -> int:
    """How many processes to start.

    Raises:
        ValueError: there are GPUs, but fewer than that; or this process is a worker already.
    """
    if os.environ.get(VARIABLE):
        raise ValueError(
            f"workers={workers!r} starts workers on this machine, but {VARIABLE} says that this "
            f"process is one itself: leave out workers, or unset {VARIABLE}"
        )
    n_gpus = len(_visible_gpus())
    if isinstance(workers, str):
        return max(n_gpus, 1)
    if 0 < n_gpus < workers:
        raise ValueError(
            f"workers={workers}, but this machine has {n_gpus} GPUs: give workers={n_gpus}, or "
            f"set {VISIBLE_GPUS}= to an empty text to train on the CPU"
        )
    return workers


def _visible_gpus() -> list[str]:
    """This machine's NVIDIA GPUs as CUDA_VISIBLE_DEVICES names them, or those that it allows."""
    if VISIBLE_GPUS in os.environ:
        names = [name.strip() for name in os.environ[VISIBLE_GPUS].split(",")]
        return [name for name in names if name and not name.startswith("-")]
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    try:
        done = subprocess.run([program, "-L"], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return []
    lines = [line for line in done.stdout.splitlines() if line.startswith("GPU ")]
    return [str(number) for number in range(len(lines))] if done.returncode == 0 else []


def _n_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def train_in_processes(settings: LaunchSettings, count: int) -> dict[str, Any]:
    """Trains with `count` processes; returns the fields of worker 0's Result.

    Raises:
        Exception: as launch() does.
    """
    settings.check_workers(count)
    for attempt in range(MAX_TRIES):
        with _Workers(settings, count) as workers:
            try:
                return workers.wait()
            except OSError as error:
                if error.errno != errno.EADDRINUSE or attempt == MAX_TRIES - 1:
                    raise
    raise AssertionError("unreachable")


# --- what the processes are told ------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Job:
    """What a worker process is told.

    Attributes:
        address: where the launching process listens.
        token: proves that it is this worker that connects there.
        index: the worker's.
        threads: as in start_tf_sess().
        settings: finetune()'s arguments, without on_step.
        calls_back: whether steps are told to the launching process, which answers.
    """

    address: tuple[str, int]
    token: str
    index: int
    threads: int
    settings: dict[str, Any]
    calls_back: bool


class Failure(NamedTuple):
    """How a worker process failed.

    Attributes:
        kind: the name of the error's class, or of its closest base that Python has.
        message: what it says.
        number: an OSError's errno.
        is_consequence: whether another worker's failure caused it.
    """

    kind: str
    message: str
    number: int | None = None
    is_consequence: bool = False

    def error(self) -> BaseException:
        """The error, to be raised here."""
        found = getattr(builtins, self.kind, None)
        if not isinstance(found, type) or not issubclass(found, BaseException):
            found = RuntimeError
        if found is Exception:
            found = RuntimeError
        error: BaseException = found(self.message)
        if isinstance(error, OSError):
            error.errno = self.number
        return error


class _Worker:
    """A worker process.

    Attributes:
        connection: to it, None before it has connected.
        result: its Result's fields, None as long as there is none.
        failure: how it failed, None if it did not.
    """

    def __init__(self, job: Job, environment: dict[str, str], inherits_output: bool):
        self.job = job
        self.connection: Connection | None = None
        self.result: dict[str, Any] | None = None
        self.failure: Failure | None = None
        path = [*map(os.fspath, sys.path), str(Path(__file__).parents[2])]
        code = f"import sys; sys.path[:] = {path!r}; from {_WORKER} import main; main()"
        # Ctrl-C in a terminal reaches only this process, which tells worker 0.
        group: dict[str, Any] = (
            {"creationflags": _NEW_PROCESS_GROUP}
            if sys.platform == "win32"
            else {"start_new_session": True}
        )
        output = None if inherits_output else subprocess.PIPE
        lines = output if job.index == 0 else subprocess.DEVNULL
        self.process = subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=subprocess.PIPE, stdout=lines, stderr=output, env=environment, **group,
        )  # fmt: skip
        self._pumps = [
            threading.Thread(target=self._pump, args=[stream, is_error], daemon=True)
            for stream, is_error in ((self.process.stdout, False), (self.process.stderr, True))
            if stream is not None
        ]
        for pump in self._pumps:
            pump.start()
        with contextlib.suppress(OSError):  # it has ended already
            assert self.process.stdin is not None
            self.process.stdin.write(pickle.dumps(job))
            self.process.stdin.close()

    def _pump(self, stream: IO[bytes], is_error: bool) -> None:
        """Passes on what the process prints, but for TensorFlow's notes."""
        for raw in stream:
            line = raw.decode("utf-8", "replace").rstrip("\r\n")
            with contextlib.suppress(BrokenPipeError):
                if is_error and is_note(line) and (self.job.index or not wants_notes()):
                    continue
                if self.job.index:
                    complain(f"worker {self.job.index}: {line}")
                elif is_error:
                    complain(line)
                else:
                    say(line)

    def send(self, message: Any) -> None:
        if self.connection is not None:
            with contextlib.suppress(OSError):
                self.connection.send(message)

    @property
    def has_ended(self) -> bool:
        return self.process.poll() is not None

    def close(self) -> None:
        """Ends the process, whatever it does."""
        if not self.has_ended:
            self.process.kill()
        self.process.wait()
        for pump in self._pumps:
            pump.join(timeout=5)
        for stream in (self.process.stdout, self.process.stderr):
            if stream is not None:
                stream.close()
        if self.connection is not None:
            self.connection.close()


_WORKER = "gpt_2_simple.distributed.worker"


# --- the processes --------------------------------------------------------------------------------


class _Workers:
    """The worker processes of one training; none of them outlives the block."""

    def __init__(self, settings: LaunchSettings, count: int):
        self.settings, self.count = settings, count
        self._workers: list[_Worker] = []
        self._own_error: BaseException | None = None

    def __enter__(self) -> _Workers:
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=self.count)
        self._listener.settimeout(0)
        try:
            for job, environment in self._jobs():
                inherits = job.index == 0 and _is_real_output()
                self._workers.append(_Worker(job, environment, inherits))
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.close()
        for worker in self._workers:
            worker.close()

    def _jobs(self) -> Iterator[tuple[Job, dict[str, str]]]:
        """What each process is told, and its environment."""
        arguments = self.settings.training
        calls_back = arguments.pop("on_step") is not None
        gpus = _visible_gpus()
        threads = -1 if gpus else max(1, _n_cores() // self.count)
        addresses = free_addresses(self.count)
        for index in range(self.count):
            environment = {LOG_LEVEL: "2", **os.environ, "PYTHONUNBUFFERED": "1"}
            if self.count > 1:
                environment[VARIABLE] = tf_config(addresses, index)
            if gpus:
                environment[VISIBLE_GPUS] = gpus[index]
            job = Job(
                self._listener.getsockname()[:2], secrets.token_hex(), index, threads, arguments,
                calls_back and index == 0,
            )  # fmt: skip
            yield job, environment

    def wait(self) -> dict[str, Any]:
        """Waits until all have ended; returns worker 0's result, or raises what went wrong."""
        n_told = 0
        deadlines: dict[int, float] = {}
        with Interruption() as interruption:
            while not all(worker.has_ended for worker in self._workers):
                self._accept()
                self._take_messages()
                if interruption.requested and not n_told and self._workers[0].connection:
                    self._workers[0].send("stop")
                    n_told = 1
                if any(self._has_failed(worker) for worker in self._workers):
                    deadlines = deadlines or self._deadlines()
                    self._kill_late(deadlines)
            self._take_messages()
        return self._outcome()

    def _accept(self) -> None:
        """Takes the connections of processes that have started."""
        with contextlib.suppress(OSError):  # nobody is there
            accepted, _ = self._listener.accept()
            connection = as_connection(accepted)
            token = connection.recv_bytes(1000).decode() if connection.poll(5) else ""
            for worker in self._workers:
                if secrets.compare_digest(worker.job.token, token):
                    worker.connection = connection
                    return
            connection.close()

    def _take_messages(self) -> None:
        """Takes what the processes say, for a short while."""
        speaking = {w.connection: w for w in self._workers if w.connection and not w.result}
        if not speaking:
            time.sleep(POLL_SECONDS)
        for found in wait(list(speaking), POLL_SECONDS):
            connection = cast(Connection, found)
            worker = speaking[connection]
            try:
                self._take(worker, connection.recv())
            except (EOFError, OSError):
                worker.connection = None

    def _take(self, worker: _Worker, message: Any) -> None:
        if isinstance(message, Failure):
            worker.failure = message
        elif isinstance(message, Entry):
            worker.send(self._call_on_step(message))
        else:
            message["history"] = [Entry(*values) for values in message["history"]]
            worker.result = message

    def _call_on_step(self, entry: Entry) -> Any:
        """The caller's answer; what his function raises ends the workers, and is raised here."""
        assert self.settings.on_step is not None
        try:
            return ("answer", self.settings.on_step(entry))
        except BaseException as error:
            self._own_error = error
            return ("error", f"on_step raised {error!r}")

    def _has_failed(self, worker: _Worker) -> bool:
        return worker.failure is not None or bool(worker.process.poll())

    def _deadlines(self) -> dict[int, float]:
        now = time.monotonic()
        return {
            worker.job.index: now + (GRACE_SECONDS if worker.job.index else WRITER_GRACE_SECONDS)
            for worker in self._workers
        }

    def _kill_late(self, deadlines: dict[int, float]) -> None:
        for worker in self._workers:
            if not worker.has_ended and time.monotonic() > deadlines[worker.job.index]:
                worker.process.kill()

    def _outcome(self) -> dict[str, Any]:
        if self._own_error is not None:
            raise self._own_error
        for worker in self._workers:
            if worker.failure is not None and not worker.failure.is_consequence:
                raise worker.failure.error()
        writer = self._workers[0]
        if writer.result is not None:
            return writer.result
        causes = [_how_it_ended(w) for w in self._workers if w.failure is None and not w.result]
        told = [w.failure.message for w in self._workers if w.failure is not None][:1]
        raise RuntimeError(". ".join([*causes, *told]))


def _how_it_ended(worker: _Worker) -> str:
    """What became of a process that told nothing."""
    name, code = f"worker {worker.job.index}", worker.process.returncode
    if code < 0:
        cause = "; maybe the machine is short of memory" if code == -_SIGKILL else ""
        return f"{name} was killed by signal {-code}{cause}"
    return f"{name} ended with exit status {code}; its output says why"


def _is_real_output() -> bool:
    """Whether a process that inherits this one's output writes where this one does."""
    try:
        streams: list[Any] = [sys.stdout, sys.stderr]
        is_first = sys.stdout is sys.__stdout__ and sys.stderr is sys.__stderr__
        return is_first and all(stream.fileno() >= 0 for stream in streams)
    except (AttributeError, OSError, ValueError):
        return False


def free_addresses(count: int) -> tuple[str, ...]:
    """Addresses on this machine with ports that nobody has now."""
    sockets = []
    try:
        for _ in range(count):
            sockets.append(socket.create_server(("127.0.0.1", 0)))
        return tuple(f"127.0.0.1:{s.getsockname()[1]}" for s in sockets)
    finally:
        for s in sockets:
            s.close()
