"""An ASGI application in, a uvicorn server that ends well and bounds its connections out."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

# A connection has so many seconds to send the head of a request; between two requests it may rest
# for so many.
HEAD_SECONDS, KEEP_ALIVE_SECONDS = 15, 5

# In so many seconds a client takes at least so many bytes of an answer that waits for it.
WRITE_SECONDS, MIN_BYTES_TAKEN = 30, 4096

# Bytes of an answer that the system holds for each connection. With the megabytes that it would
# hold, it shows for minutes nothing of what a slow client takes.
SEND_BUFFER_BYTES = 64 * 1024

# Bytes of a request's head.
MAX_HEAD_BYTES = 16 * 1024

# Connections at the same time; more are closed at once.
MAX_CONNECTIONS = 4096


class _Protocol(H11Protocol):
    """HTTP/1.1 for connections that may be slow, half open, or too many."""

    def connection_made(self, transport: Any) -> None:
        self._head_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None
        super().connection_made(transport)
        transport.get_extra_info("socket").setsockopt(
            socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES
        )
        transport.set_write_buffer_limits(high=0)  # pause_writing() while any byte waits
        if len(self.connections) > MAX_CONNECTIONS:
            transport.close()
            return
        self._wait_for_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop(self._head_timer)
        self._stop(self._write_timer)
        super().connection_lost(exc)
        if self.cycle is not None:
            self.cycle.body = bytearray()  # these objects form a circle, which may live for long

    def data_received(self, data: bytes) -> None:
        # It ends the timer of resting connections.
        super().data_received(data)
        if not self._awaits_head:
            self._stop(self._head_timer)
            self._head_timer = None
        elif self._head_timer is None:
            self._wait_for_head()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._wait_until_taken()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stop(self._write_timer)

    @property
    def _awaits_head(self) -> bool:
        """Whether no request is being answered."""
        return self.cycle is None or self.cycle.response_complete

    @staticmethod
    def _stop(timer: asyncio.TimerHandle | None) -> None:
        if timer is not None:
            timer.cancel()

    def _wait_for_head(self) -> None:
        self._head_timer = self.loop.call_later(HEAD_SECONDS, self._close_if_headless)

    def _close_if_headless(self) -> None:
        self._head_timer = None
        if self._awaits_head and not self.transport.is_closing():
            self.transport.close()

    def _wait_until_taken(self) -> None:
        n_waiting = self.transport.get_write_buffer_size()
        self._write_timer = self.loop.call_later(WRITE_SECONDS, self._abort_if_stuck, n_waiting)

    def _abort_if_stuck(self, n_waited: int) -> None:
        """Drops a connection whose client reads nothing; closing would wait for it too."""
        n_taken = n_waited - self.transport.get_write_buffer_size()
        if n_taken < min(MIN_BYTES_TAKEN, n_waited):
            self.transport.abort()
        else:
            self._wait_until_taken()


class Server(uvicorn.Server):
    """A server whose signals end it without an error."""

    def __init__(self, app: Any, grace_seconds: int) -> None:
        config = uvicorn.Config(
            app,
            http=_Protocol,
            ws="none",
            lifespan="on",
            log_level="error",
            access_log=False,
            server_header=False,
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=grace_seconds,
            h11_max_incomplete_event_size=MAX_HEAD_BYTES,
        )
        super().__init__(config)
        self._on_start: Callable[[str], None] = lambda address: None

    def serve_until_stopped(self, listener: socket.socket, on_start: Callable[[str], None]) -> None:
        """Answers on a bound socket until stop(), Ctrl-C or SIGTERM; tells its address first."""
        _allow_many_files()
        self._on_start = on_start
        asyncio.run(self.serve([listener]))

    def stop(self) -> None:
        """Lets what is being written be finished, then ends the server; from any thread."""
        self.should_exit = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """As uvicorn's; then tells the address."""
        await super().startup(sockets)
        if self.started:
            self._on_start(address_of((sockets or [])[0]))

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """As uvicorn's, which afterwards raises the signals again: that would not be status 0."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        signals = (signal.SIGINT, signal.SIGTERM)
        before = {number: signal.signal(number, self.handle_exit) for number in signals}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


@contextlib.contextmanager
def bound_socket(host: str, port: int) -> Iterator[socket.socket]:
    """A socket that is bound and does not listen yet; OSError if the port is taken."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as found:
        if sys.platform != "win32":  # where it would let two servers share the port
            found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            found.bind((host, port))
        except OSError as error:
            raise OSError(
                f"cannot listen on host={host!r}, port={port} ({error.strerror}); give another port"
            ) from error
        yield found


def address_of(listener: socket.socket) -> str:
    """The address to open in a browser."""
    host, port = listener.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def _allow_many_files() -> None:
    """Lets the process have as many connections as the system allows it."""
    with contextlib.suppress(ImportError, OSError, ValueError):  # Windows has no such limit
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = 2 * MAX_CONNECTIONS
        most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        if soft != resource.RLIM_INFINITY and soft < most:
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
