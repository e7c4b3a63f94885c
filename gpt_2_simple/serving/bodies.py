"""Requests in, their bodies out; together these hold a bounded number of bytes."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

from starlette.requests import Request

from .completion import BadRequestError

MAX_BODY_BYTES = 2**20
BODY_SECONDS = 30.0  # a body that takes longer to arrive is not waited for
MAX_BODIES_BYTES = 64 * 2**20  # of all bodies that arrive or are read

# Bodies that are read at the same time. As Python's objects, one may take 24 times its bytes.
MAX_READERS = 4


class _Body:
    """A body that arrives, or that is read."""

    def __init__(self) -> None:
        self.content = bytearray()
        self.gave_way = False
        self.receiving: asyncio.Future[None]


class Bodies:
    """The bodies that an application holds; all methods belong to one event loop."""

    def __init__(self) -> None:
        self._n_bytes = 0
        self._arriving: list[_Body] = []  # the oldest first
        self._readers = asyncio.Semaphore(MAX_READERS)

    @contextlib.asynccontextmanager
    async def read(self, request: Request) -> AsyncIterator[bytearray]:
        """The body of a request. It counts, and others wait for this reader, until the `with` ends.

        Raises:
            BadRequestError: it is too large (413), or slow (408), or it gave way to others (503).
            ClientDisconnect: the client has gone.
        """
        body = _Body()
        try:
            await self._arrive(request, body)
            async with self._readers:
                yield body.content
        finally:
            self._free(body)

    async def _arrive(self, request: Request, body: _Body) -> None:
        length = request.headers.get("content-length", "0")
        if length.isdigit() and int(length) > MAX_BODY_BYTES:
            raise _too_large()
        body.receiving = asyncio.ensure_future(self._receive(request, body))
        self._arriving.append(body)
        try:
            await asyncio.wait({body.receiving}, timeout=BODY_SECONDS)
            if body.gave_way:
                raise BadRequestError(
                    "the server receives too much at the same time; try again later",
                    status=503,
                    kind="server_error",
                )
            if not body.receiving.done():
                raise BadRequestError(
                    "the body did not arrive in time", status=408, kind="timeout_error"
                )
            body.receiving.result()
        finally:
            self._arriving.remove(body)
            body.receiving.cancel()
            await asyncio.gather(body.receiving, return_exceptions=True)
            del body.receiving  # a circle, through the task's error, which would keep all parts

    async def _receive(self, request: Request, body: _Body) -> None:
        async for part in request.stream():
            body.content += part
            self._n_bytes += len(part)
            if len(body.content) > MAX_BODY_BYTES:
                raise _too_large()
            self._make_room()
            if body.gave_way:
                return

    def _make_room(self) -> None:
        """Gives up those that take longest: an honest client's body is there in no time."""
        for body in self._arriving:
            if self._n_bytes <= MAX_BODIES_BYTES:
                return
            if body.content and not body.gave_way:
                self._free(body)
                body.gave_way = True
                body.receiving.cancel()

    def _free(self, body: _Body) -> None:
        self._n_bytes -= len(body.content)
        body.content.clear()


def _too_large() -> BadRequestError:
    return BadRequestError(f"the body is above {MAX_BODY_BYTES} bytes", status=413)
