"""HTTP requests in; those of allowed pages and with the right key out, with safe headers."""

from __future__ import annotations

import hmac
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response

from ..common.report import say
from .completion import BadRequestError

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

# Nothing that an answer holds may load or run anything; the page has a policy of its own.
NOTHING_ALLOWED = "default-src 'none'; frame-ancestors 'none'"


class Guard:
    """An ASGI application around another one."""

    def __init__(
        self,
        app: App,
        respond: Callable[[BadRequestError], Response],
        api_key: str | None,
        allow_origin: Iterable[str],
        hosts: Iterable[str],
    ) -> None:
        """Wraps `app`.

        Args:
            app: the application.
            respond: makes an error's answer.
            api_key: what requests to /v1/ must give; None for no key.
            allow_origin: pages whose scripts may use the server, beside its own; '*' for all.
            hosts: the names by which the server may be called; empty for all. Without this check a
                page could make its own name mean this machine (DNS rebinding).
        """
        self._app, self._respond = app, respond
        self._key = None if api_key is None else api_key.encode()
        self._origins = {origin.rstrip("/").lower() for origin in allow_origin}
        self._hosts = set(hosts)

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answers a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        origin = headers.get("origin")
        app: App = self._app
        try:
            self._check_host(headers)
            self._check_origin(headers, origin)
            if scope["method"] == "OPTIONS" and "access-control-request-method" in headers:
                app = Response(status_code=204)
            elif _path_of(scope).startswith("/v1/"):
                self._check_key(headers)
        except BadRequestError as error:
            app = self._respond(error)

        async def send_safely(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._add_headers(MutableHeaders(scope=message), origin)
            await send(message)

        try:
            await app(scope, receive, send_safely)
        except Exception as error:
            # It was answered already. Its message and its place in the code may hold what no log
            # should: a prompt, or a path.
            say(f"a request failed: {type(error).__name__}")

    def _check_host(self, headers: Headers) -> None:
        host = headers.get("host", "")
        if self._hosts and _name_of(host) not in self._hosts:
            raise BadRequestError(
                "this server answers to its own address only; give serve a key (--api_key) to use "
                "it under another name",
                status=403,
                code="host_not_allowed",
            )

    def _check_origin(self, headers: Headers, origin: str | None) -> None:
        if origin is None or self._is_allowed(origin):
            return
        if not _netloc_of(origin) or _netloc_of(origin) != headers.get("host", "").lower():
            raise BadRequestError(
                "scripts of this page may not use the server; the option --allow_origin allows it",
                status=403,
                code="origin_not_allowed",
            )

    def _is_allowed(self, origin: str) -> bool:
        return "*" in self._origins or origin.lower() in self._origins

    def _check_key(self, headers: Headers) -> None:
        if self._key is None:
            return
        kind, _, given = headers.get("authorization", "").partition(" ")
        # In constant time, so that the time tells nothing of the key. Starlette reads a header's
        # bytes as Latin-1; those of curl and of the page are UTF-8.
        is_right = hmac.compare_digest(given.strip().encode("latin-1", "replace"), self._key)
        if kind.lower() != "bearer" or not is_right:
            raise BadRequestError(
                "the key is missing or wrong; send the header 'Authorization: Bearer KEY'",
                status=401,
                code="invalid_api_key",
                kind="authentication_error",
            )

    def _add_headers(self, headers: MutableHeaders, origin: str | None) -> None:
        headers.setdefault("content-security-policy", NOTHING_ALLOWED)
        headers["x-content-type-options"] = "nosniff"
        headers["referrer-policy"] = "no-referrer"
        headers.setdefault("cache-control", "no-store")
        if self._origins:
            headers.add_vary_header("Origin")
        if origin is not None and self._is_allowed(origin):
            headers["access-control-allow-origin"] = origin
            headers["access-control-allow-methods"] = "GET, POST"
            headers["access-control-allow-headers"] = "authorization, content-type"


def _path_of(scope: Message) -> str:
    """The path below the place where the application is mounted."""
    path, root = str(scope["path"]), str(scope.get("root_path", "")).rstrip("/")
    return path[len(root) :] if path.startswith(f"{root}/") else path


def _netloc_of(origin: str) -> str:
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:
        return ""


def _name_of(host: str) -> str:
    """The name in a Host header, without the port."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""
