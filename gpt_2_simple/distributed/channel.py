"""Workers' small values in, the values of all of them out; and who is gone, and why.

Worker 0 is the centre: each other worker holds one connection to it. The workers find each other at
worker 0's address before TensorFlow's server takes it over; the connections stay. Messages are
JSON. Each side sends a heartbeat, so that a frozen peer is told from a busy one, and a failure of
one worker reaches all others as a text.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection, wait
from typing import Any, cast

from ..common.report import say
from .tf_config import ClusterSpec, split_address

# How long to wait at the start until all workers are there.
START_VARIABLE = "GPT2_START_SECONDS"
START_SECONDS = 50.0
# A line says whom one waits for after so long.
NOTICE_SECONDS = 5.0
HEARTBEAT_SECONDS = 2.0
# A peer that sent nothing for so long is frozen, or its network is.
SILENCE_SECONDS = 25.0
HELLO_SECONDS = 5.0
RETRY_SECONDS = 0.2
MAX_HELLO = 1 << 20  # bytes

Message = dict[str, Any]


class WorkerLost(RuntimeError):
    """Another worker failed, was killed, froze or never came; the message says which and why."""


class _Peer:
    """A connection to another worker."""

    def __init__(self, index: int, connection: Connection):
        self.index, self.connection = index, connection
        self.last_heard = time.monotonic()
        self.has_left = False
        self._lock = threading.Lock()

    def send(self, message: Message) -> None:
        """Sends; that the other side is gone is noticed where it is read."""
        with self._lock:
            self._send(message)

    def send_heartbeat(self) -> None:
        """Sends a heartbeat, unless another message is on its way: that is one just as well."""
        if self._lock.acquire(blocking=False):
            try:
                self._send({"heartbeat": True})
            finally:
                self._lock.release()

    def _send(self, message: Message) -> None:
        with contextlib.suppress(OSError, ValueError):
            self.connection.send_bytes(json.dumps(message).encode())


class Channel:
    """Exchanges small values with all workers.

    All workers must call gather() and broadcast() in the same order.

    Attributes:
        spec: the workers.
        failure: why the cluster is at its end; None as long as it is not.
        on_failure: called once, in a thread of its own, when another worker fails.
        notes: what worker 0 told by note().
    """

    def __init__(self, spec: ClusterSpec, peers: Mapping[int, Connection]):
        """`peers` are connections by the workers' indices: worker 0's to all, the others' to it."""
        self.spec = spec
        self.failure: str | None = None
        self.on_failure: Callable[[], None] = lambda: None
        self.notes: Message = {}
        self._peers = {index: _Peer(index, peers[index]) for index in peers}
        self._changed = threading.Condition()
        self._n_exchanges = 0
        self._values: dict[int, dict[int, Any]] = {}  # by exchange, then by worker
        self._answers: dict[int, Any] = {}
        self._is_closed = False
        for run in (self._receive, self._watch):
            threading.Thread(target=run, name=f"gpt_2_simple{run.__name__}", daemon=True).start()

    @property
    def is_center(self) -> bool:
        """Whether this is worker 0."""
        return self.spec.index == 0

    # --- exchanges --------------------------------------------------------------------------------

    def gather(self, value: Any) -> list[Any]:
        """The values of all workers, in the order of their indices; waits for all of them.

        Args:
            value: what JSON can hold.

        Raises:
            WorkerLost: one of them failed or is gone.
        """
        exchange = self._next_exchange()
        if not self.is_center:
            self._send({"value": value, "exchange": exchange})
            return self._wait_for_answer(exchange)
        with self._changed:
            values = self._values.setdefault(exchange, {})
            values[0] = value
            self._wait(lambda: len(values) == self.spec.count)
            del self._values[exchange]
        gathered = [values[index] for index in range(self.spec.count)]
        self._send({"answer": gathered, "exchange": exchange})
        return gathered

    def broadcast(self, value: Any = None) -> Any:
        """Worker 0's value, on all workers; only the others wait.

        Raises:
            WorkerLost: worker 0 failed or is gone.
        """
        exchange = self._next_exchange()
        if not self.is_center:
            return self._wait_for_answer(exchange)
        self._send({"answer": value, "exchange": exchange})
        return value

    def note(self, **notes: Any) -> None:
        """Tells the others something that they need not wait for; only worker 0 can."""
        self.notes.update(notes)
        self._send({"notes": notes})

    def _next_exchange(self) -> int:
        if self.failure is not None:
            raise WorkerLost(self.failure)
        self._n_exchanges += 1
        return self._n_exchanges

    def _wait_for_answer(self, exchange: int) -> Any:
        with self._changed:
            self._wait(lambda: exchange in self._answers)
            return self._answers.pop(exchange)

    def _wait(self, is_there: Callable[[], bool]) -> None:
        """Waits, with the condition held; short waits let Ctrl-C through on Windows."""
        while not is_there():
            if self.failure is not None:
                raise WorkerLost(self.failure)
            left = [peer.index for peer in self._peers.values() if peer.has_left]
            if left:
                raise WorkerLost(
                    f"{self.spec.name(left[0])} has ended while others wait for it: all workers "
                    "must run the same script"
                )
            self._changed.wait(1.0)

    def _send(self, message: Message, but: int | None = None) -> None:
        for peer in self._peers.values():
            if peer.index != but:
                peer.send(message)

    # --- failures ---------------------------------------------------------------------------------

    def fail(self, message: str) -> None:
        """Tells all other workers that this one failed; the cluster is at its end."""
        self._note_failure(message, told_by=None)

    def wait_for_failure(self, seconds: float) -> str | None:
        """The failure, if there is one within so many seconds."""
        deadline = time.monotonic() + seconds
        with self._changed:
            while self.failure is None and time.monotonic() < deadline:
                self._changed.wait(0.1)
        return self.failure

    def _note_failure(self, message: str, told_by: int | None) -> None:
        with self._changed:
            if self.failure is not None or self._is_closed:
                return
            self.failure = message
            self._changed.notify_all()
        if self.is_center or told_by is None:
            self._send({"failure": message}, but=told_by)
        if told_by is not None:
            threading.Thread(target=self.on_failure, daemon=True).start()

    # --- threads ----------------------------------------------------------------------------------

    def _receive(self) -> None:
        """Reads what comes, until the channel is closed or nobody is left."""
        open_peers = {peer.connection: peer for peer in self._peers.values()}
        while open_peers and not self._is_closed:
            for connection in wait(list(open_peers), HEARTBEAT_SECONDS):
                peer = open_peers[cast(Connection, connection)]
                try:
                    message = json.loads(peer.connection.recv_bytes())
                except (EOFError, OSError, ValueError):
                    del open_peers[peer.connection]
                    self._note_end(peer)
                    continue
                peer.last_heard = time.monotonic()
                self._take(peer, message)

    def _note_end(self, peer: _Peer) -> None:
        if not peer.has_left:
            name = self.spec.name(peer.index)
            self._note_failure(f"{name} is gone: it was killed, or its network is", peer.index)

    def _take(self, peer: _Peer, message: Message) -> None:
        with self._changed:
            if "value" in message:
                self._values.setdefault(message["exchange"], {})[peer.index] = message["value"]
            elif "answer" in message:
                self._answers[message["exchange"]] = message["answer"]
            elif "notes" in message:
                self.notes.update(message["notes"])
            elif "bye" in message:
                peer.has_left = True
            self._changed.notify_all()
        if "failure" in message:
            self._note_failure(message["failure"], peer.index)

    def _watch(self) -> None:
        """Sends heartbeats, and finds out whose have stopped."""
        while not self._is_closed and self.failure is None:
            for peer in self._peers.values():
                peer.send_heartbeat()
                silence = time.monotonic() - peer.last_heard
                if silence > SILENCE_SECONDS and not peer.has_left:
                    self._note_failure(
                        f"{self.spec.name(peer.index)} has not answered for {silence:.0f} s: it is "
                        "frozen, or its network is",
                        peer.index,
                    )
            time.sleep(HEARTBEAT_SECONDS)

    def close(self) -> None:
        """Takes leave of the others: this worker ends, and nothing is wrong."""
        if self._is_closed:
            return
        self._is_closed = True
        self._send({"bye": True})


# --- the start ------------------------------------------------------------------------------------


def start_seconds() -> float:
    """How long to wait at the start until all workers are there."""
    text = os.environ.get(START_VARIABLE, "")
    try:
        return float(text) if text else START_SECONDS
    except ValueError as error:
        raise ValueError(f"{START_VARIABLE}={text!r} must be a number of seconds") from error


@dataclasses.dataclass(frozen=True)
class _Hello:
    """What a worker says of itself when it connects."""

    index: int
    addresses: list[str]
    code: str
    place: str

    @classmethod
    def of(cls, spec: ClusterSpec, code: str) -> _Hello:
        place = f"process {os.getpid()} on {socket.gethostname()}"
        return cls(spec.index, list(spec.addresses), code, place)


class _Rejected(Exception):
    """Two workers do not fit together."""


def bind(spec: ClusterSpec) -> socket.socket:
    """Takes this worker's port, so that nobody else can.

    Raises:
        OSError: another program has it.
    """
    _, port = split_address(spec.address)
    try:
        try:
            return _listen(port, spec.count, socket.AF_INET6)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise
            return _listen(port, spec.count, socket.AF_INET)  # this machine has no IPv6
    except OSError as error:
        raise OSError(
            error.errno,
            f"port {port} of {spec.name(spec.index)} is taken ({error.strerror}): another program "
            "has it, or a second worker of this index runs here. End that, or give another port",
        ) from error


def _listen(port: int, backlog: int, family: socket.AddressFamily) -> socket.socket:
    """A socket that listens at a port of all interfaces: with IPv6, those of IPv4 too."""
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        if os.name == "posix":
            # A port that a process has just left is free.
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        listener.bind(("", port))
        # Linux gives a port that is only bound to a second process too.
        listener.listen(backlog)
    except BaseException:
        listener.close()
        raise
    return listener


def open_channel(spec: ClusterSpec, code: str, listener: socket.socket) -> Channel:
    """Waits until all workers have found each other.

    Args:
        spec: the workers.
        code: a digest of the code that this worker runs.
        listener: from bind(); of use for worker 0 alone.

    Raises:
        WorkerLost: some worker did not come in time, or runs other code or another cluster, or two
            have one index.
    """
    hello = _Hello.of(spec, code)
    if spec.index == 0:
        return Channel(spec, _welcome_all(spec, hello, listener))
    return Channel(spec, {0: _find_center(spec, hello)})


def _welcome_all(
    spec: ClusterSpec, hello: _Hello, listener: socket.socket
) -> dict[int, Connection]:
    """Worker 0's part: a connection to each other worker."""
    seconds = start_seconds()
    joined: dict[int, Connection] = {}
    hellos = {0: hello}
    notice = _Notice()
    deadline = time.monotonic() + seconds
    try:
        while len(hellos) < spec.count:
            missing = [spec.name(i) for i in range(spec.count) if i not in hellos]
            if time.monotonic() > deadline:
                raise _Rejected(
                    f"{', '.join(missing)} did not start within {seconds:g} s: start all workers "
                    f"together, or wait longer by the variable {START_VARIABLE}"
                )
            notice.say_once(f"Waiting for {', '.join(missing)}")
            found = _accept(listener)
            if found is None:
                continue
            other, connection = found
            try:
                _check_fits(hello, other, hellos.get(other.index))
            except _Rejected:
                joined[-1] = connection  # is told, too
                raise
            hellos[other.index], joined[other.index] = other, connection
    except _Rejected as reason:
        for connection in joined.values():
            _reply(connection, {"failure": str(reason)})
            connection.close()
        raise WorkerLost(str(reason)) from None
    for connection in joined.values():
        _reply(connection, {"welcome": True})
    return joined


class _Notice:
    """Says whom one waits for, once, if it takes long."""

    def __init__(self) -> None:
        self._started: float | None = time.monotonic()

    def say_once(self, text: str) -> None:
        if self._started is not None and time.monotonic() > self._started + NOTICE_SECONDS:
            self._started = None
            say(text)


def _accept(listener: socket.socket) -> tuple[_Hello, Connection] | None:
    """A worker that connects; None if nobody does in a while, or somebody else does."""
    listener.settimeout(RETRY_SECONDS)
    try:
        accepted, _ = listener.accept()
    except OSError:
        return None
    connection = as_connection(accepted)
    try:
        if connection.poll(HELLO_SECONDS):
            return _Hello(**json.loads(connection.recv_bytes(MAX_HELLO))["hello"]), connection
    except (EOFError, OSError, ValueError, TypeError, LookupError):
        pass  # a health check, or a scan of ports
    connection.close()
    return None


def _check_fits(center: _Hello, other: _Hello, before: _Hello | None) -> None:
    """Raises _Rejected if a worker does not belong to this cluster."""
    if before is not None or other.index == 0:
        raise _Rejected(
            f"two processes are worker {other.index}: {(before or center).place}, and "
            f"{other.place}. Give each its own index"
        )
    if other.addresses != center.addresses:
        raise _Rejected(
            f"worker {other.index} ({other.place}) lists other addresses ({other.addresses}) than "
            f"worker 0 ({center.addresses}): give all workers the same cluster"
        )
    if other.code != center.code:
        raise _Rejected(
            f"worker {other.index} ({other.place}) runs other code of gpt_2_simple "
            f"({other.code}) than worker 0 ({center.code}): install the same release on all"
        )


def _find_center(spec: ClusterSpec, hello: _Hello) -> Connection:
    """The other workers' part: a connection to worker 0."""
    seconds = start_seconds()
    deadline = time.monotonic() + seconds
    notice = _Notice()
    reason = "nothing answers there"
    while time.monotonic() < deadline:
        notice.say_once(f"Waiting for {spec.name(0)}: {reason}")
        try:
            host = split_address(spec.addresses[0])
            connection = as_connection(socket.create_connection(host, HELLO_SECONDS))
        except OSError as error:
            reason = str(error)
            time.sleep(RETRY_SECONDS)
            continue
        _reply(connection, {"hello": dataclasses.asdict(hello)})
        try:
            # Worker 0 gives up first, and says why.
            if connection.poll(max(deadline - time.monotonic(), 0) + HELLO_SECONDS):
                answer = json.loads(connection.recv_bytes(MAX_HELLO))
                if "failure" in answer:
                    raise WorkerLost(answer["failure"])
                return connection
            reason = "it does not answer"
        except (EOFError, OSError, ValueError):
            reason = "what answers there is no worker 0 that waits for others"
        connection.close()
        time.sleep(RETRY_SECONDS)
    raise WorkerLost(
        f"{spec.name(0)} was not found within {seconds:g} s ({reason}): start all workers "
        f"together, or wait longer by the variable {START_VARIABLE}"
    )


def as_connection(of: socket.socket) -> Connection:
    """A TCP connection that carries whole messages."""
    of.settimeout(None)
    of.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return Connection(of.detach())


def _reply(connection: Connection, message: Message) -> None:
    with contextlib.suppress(OSError):
        connection.send_bytes(json.dumps(message).encode())
