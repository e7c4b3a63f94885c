"""HTTP requests in, OpenAI's completions API out."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import importlib.metadata
import json
import secrets
import time
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any, NamedTuple

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from ..common.report import say
from . import completion as completions
from .bodies import Bodies
from .completion import BadRequestError, Choice, Completion
from .engine import ClosedError, Delta, Engine, Event, Failure, Job, PromptScores, QueueFullError
from .guard import Guard
from .metrics import Metrics
from .openapi import describe
from .page import page_response
from .settings import MAX_CHOICES

RETRY_SECONDS = 2  # what Retry-After says when there is no room at present

_REASONS = {404: "there is nothing at this address", 405: "this address has no such method"}
_KINDS = {429: "rate_limit_error", 500: "server_error", 503: "server_error", 408: "timeout_error"}
_CLIENT_GONE = 499  # as nginx logs it; nobody gets this answer


class Limits(NamedTuple):
    """What an application allows."""

    api_key: str | None = None
    allow_origin: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()  # the names by which it may be called; empty for all
    timeout: float = 120.0  # seconds for a request
    log_prompts: bool = False
    in_frames: bool = False  # whether other pages may show the page to write with


def make_app(
    engines: Mapping[str, Engine],
    limits: Limits,
    on_shutdown: Callable[[], None] | None = None,
) -> Guard:
    """The ASGI application for engines that have started, by the models' names."""
    api = _Api(engines, limits)

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        yield
        if on_shutdown is not None:
            await asyncio.to_thread(on_shutdown)

    app = Starlette(
        routes=[
            Route("/", api.page, methods=["GET"]),
            Route("/v1/completions", api.complete, methods=["POST"]),
            Route("/v1/chat/completions", api.chat, methods=["POST"]),
            Route("/v1/models", api.models, methods=["GET"]),
            Route("/v1/models/{model:path}", api.model, methods=["GET"]),
            Route("/health", api.health, methods=["GET"]),
            Route("/metrics", api.metrics_text, methods=["GET"]),
            Route("/openapi.json", api.openapi, methods=["GET"]),
        ],
        exception_handlers={
            BadRequestError: api.bad_request,
            HTTPException: api.http_error,
            Exception: api.crash,
        },
        lifespan=lifespan,
    )
    return Guard(app, error_response, limits.api_key, limits.allow_origin, limits.hosts)


def json_response(
    value: Any, status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    """JSON in ASCII, which can hold what UTF-8 cannot: lone surrogates of the prompt."""
    return Response(json.dumps(value), status, headers, "application/json")


def error_response(error: BadRequestError) -> Response:
    """OpenAI's error object."""
    headers = {"Retry-After": str(RETRY_SECONDS)} if error.status in (429, 503) else {}
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return json_response(error.body, error.status, headers)


class _Flow:
    """A completion that is being written: its jobs, and their events as they come."""

    def __init__(self, completion: Completion, engine: Engine, timeout: float) -> None:
        self.completion, self.engine = completion, engine
        self.began = time.monotonic()
        self.first_token_at: float | None = None
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self._timeout = timeout
        self.jobs: list[Job] = []
        self._n_open = len(completion.prompts) * completion.n_texts
        self.n_new = 0  # tokens of the texts that are over

    async def submit(self) -> None:
        """Queues what the engine has to write. In a thread: it may be thousands of texts."""
        self.jobs = await asyncio.to_thread(self._submit)

    def _submit(self) -> list[Job]:
        listeners = [functools.partial(self._put, i) for i in range(len(self.completion.prompts))]
        deadline = self.began + self._timeout
        requests = completions.engine_requests(self.completion, deadline, listeners)
        try:
            return self.engine.submit(requests)
        except QueueFullError:
            raise BadRequestError(
                f"too many prompts wait (at most {self.engine.max_queue}); try again later",
                status=429,
                code="queue_full",
                kind=_KINDS[429],
            ) from None
        except ClosedError as error:
            raise BadRequestError(str(error), status=503, kind=_KINDS[503]) from None

    def _put(self, number: int, event: Event) -> None:
        self._loop.call_soon_threadsafe(self._events.put_nowait, (number, event))

    async def events(self) -> AsyncIterator[tuple[int, Delta | PromptScores]]:
        """Events with the number of their prompt, until all texts are over."""
        while self._n_open:
            number, event = await self._events.get()
            if isinstance(event, Failure):
                raise BadRequestError(
                    event.message,
                    status=event.status,
                    kind=_KINDS.get(event.status, "invalid_request_error"),
                )
            if isinstance(event, Delta):
                if self.first_token_at is None:
                    self.first_token_at = event.first_token_at
                if event.finish_reason is not None:
                    self._n_open -= 1
                    self.n_new += self._counted(event.n_tokens)
            yield number, event

    def _counted(self, n_tokens: int) -> int:
        return n_tokens if self.completion.settings.max_tokens else 0

    def usage(self) -> dict[str, int]:
        """OpenAI's usage object."""
        return completions.usage_object(self.completion.n_prompt_tokens, self.n_new)

    def cancel(self) -> None:
        """Frees what is not finished."""
        for job in self.jobs:
            job.cancel()


class _EventStream(StreamingResponse):
    """Server-sent events; `on_end` is called when all are sent or the client has gone."""

    def __init__(self, pieces: AsyncIterator[str], on_end: Callable[[], None]) -> None:
        super().__init__(pieces, media_type="text/event-stream")
        self._on_end = on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            with contextlib.suppress(ClientDisconnect):
                await super().__call__(scope, receive, send)
        finally:
            self._on_end()


class _Api:
    """The handlers."""

    def __init__(self, engines: Mapping[str, Engine], limits: Limits) -> None:
        self.engines, self.limits = dict(engines), limits
        self.metrics, self.bodies = Metrics(self.engines), Bodies()
        self.created = int(time.time())
        max_choices = min([MAX_CHOICES, *(e.max_batch for e in self.engines.values())])
        version = importlib.metadata.version("gpt_2_simple")
        contexts = {name: engine.hparams.n_ctx for name, engine in self.engines.items()}
        self.description = describe(version, contexts, max_choices, limits.api_key is not None)

    # --- errors -----------------------------------------------------------------------------------

    async def bad_request(self, _: Request, error: Exception) -> Response:
        assert isinstance(error, BadRequestError)
        return error_response(error)

    async def http_error(self, _: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        message = _REASONS.get(error.status_code, str(error.detail))
        response = error_response(BadRequestError(message, status=error.status_code))
        response.headers.update(error.headers or {})
        return response

    async def crash(self, _: Request, error: Exception) -> Response:
        return error_response(BadRequestError("the server failed", status=500, kind="server_error"))

    # --- small answers ----------------------------------------------------------------------------

    async def page(self, _: Request) -> Response:
        return page_response(self.limits.in_frames)

    async def chat(self, _: Request) -> Response:
        raise BadRequestError(
            "chat is not supported: GPT-2 continues a text; use /v1/completions", status=404
        )

    async def models(self, _: Request) -> Response:
        return json_response({"object": "list", "data": [self._model(n) for n in self.engines]})

    async def model(self, request: Request) -> Response:
        return json_response(self._model(completions.find_model(request.path_params, self.engines)))

    def _model(self, name: str) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": self.created,
            "owned_by": "gpt_2_simple",
            "max_model_len": self.engines[name].hparams.n_ctx,
        }

    async def health(self, _: Request) -> Response:
        if any(engine.error is not None for engine in self.engines.values()):
            return error_response(
                BadRequestError("a model cannot write any more", status=503, kind=_KINDS[503])
            )
        return json_response({"status": "ok"})

    async def metrics_text(self, _: Request) -> Response:
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def openapi(self, _: Request) -> Response:
        return json_response(self.description)

    # --- completions ------------------------------------------------------------------------------

    async def complete(self, request: Request) -> Response:
        model, status = "", 500
        try:
            async with self.bodies.read(request) as content:
                body = completions.parse_json(content)
                model = completions.find_model(body, self.engines)
                completion = await self._read(model, body)
                del body  # it may be large
            response = await self._complete(request, model, completion)
            status = response.status_code
            return response
        except BadRequestError as error:
            status = error.status
            raise
        except ClientDisconnect:
            status = _CLIENT_GONE
            return Response(status_code=_CLIENT_GONE)
        finally:
            self.metrics.answered(model, status)

    async def _read(self, model: str, body: dict[str, Any]) -> Completion:
        engine = self.engines[model]
        limits = engine.max_batch, engine.max_queue
        # In a thread: encoding a long prompt takes a while.
        return await asyncio.to_thread(
            completions.read_completion, body, engine.encoder, engine.hparams, *limits
        )

    async def _complete(self, request: Request, model: str, completion: Completion) -> Response:
        engine = self.engines[model]
        if self.limits.log_prompts:
            say(f"{model}: {[prompt.text for prompt in completion.prompts]!r}")
        flow = _Flow(completion, engine, self.limits.timeout)
        await flow.submit()
        writer = _Writer(model, flow)
        if completion.settings.stream:
            pieces = writer.pieces()
            try:
                # An error before the first token still gets its status.
                first = await _unless_gone(request, anext(pieces))
            except BaseException:
                flow.cancel()
                raise
            return _EventStream(_chain(first, pieces), lambda: self._end(model, flow))
        try:
            return json_response(await _unless_gone(request, writer.whole()))
        finally:
            self._end(model, flow)

    def _end(self, model: str, flow: _Flow) -> None:
        flow.cancel()
        now = time.monotonic()
        if flow.first_token_at is not None:
            self.metrics.first_token(model, flow.first_token_at - flow.began)
            self.metrics.finished(
                model, now - flow.began, flow.completion.n_prompt_tokens, flow.n_new
            )


async def _unless_gone(request: Request, work: Any) -> Any:
    """The result of `work`; raises ClientDisconnect if the client goes away before it is there."""

    async def watch() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    working, watching = asyncio.ensure_future(work), asyncio.ensure_future(watch())
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientDisconnect
    finally:
        for task in (working, watching):
            task.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)


async def _chain(first: str, rest: AsyncIterator[str]) -> AsyncIterator[str]:
    yield first
    async for piece in rest:
        yield piece


class _Writer:
    """Makes OpenAI's objects of a flow's events."""

    def __init__(self, model: str, flow: _Flow) -> None:
        self.flow, self.completion = flow, flow.completion
        self.settings, self.encoder = flow.completion.settings, flow.engine.encoder
        name, created = f"cmpl-{secrets.token_hex(12)}", int(time.time())
        self.object = functools.partial(completions.completion_object, name, created, model)
        self.prompt_scores: dict[int, list[Any]] = {}  # by the prompt's number

    def _choice(self, number: int, delta: Delta, rank: int, is_first: bool) -> dict[str, Any]:
        """A choice object for a text, or for a piece of it."""
        prompt = self.completion.prompts[number]
        start = completions.prompt_text(prompt, self.encoder) if self.settings.echo else ""
        text, scores = delta.text, delta.tokens
        if not self.settings.max_tokens:
            text, scores = "", []
        prompt_scores = self.prompt_scores.get(number) if is_first else None
        choice = Choice(
            (start if is_first else "") + text,
            scores,
            "length" if delta.finish_reason and not self.settings.max_tokens
            else delta.finish_reason,
            prompt_scores,
        )  # fmt: skip
        index = number * self.settings.n + rank
        return completions.choice_object(
            self.completion, index, choice, prompt, len(start), self.encoder
        )

    async def whole(self) -> dict[str, Any]:
        """The completion object, once all texts are over."""
        texts: dict[int, list[Delta]] = {}
        async for number, event in self.flow.events():
            if isinstance(event, PromptScores):
                self.prompt_scores[number] = event.tokens
            else:
                texts.setdefault(number, []).append(event)
        choices = []
        for number in sorted(texts):
            for rank, delta in enumerate(self._best(texts[number])):
                choices.append(self._choice(number, delta, rank, is_first=True))
        return self.object(choices, self.flow.usage())

    def _best(self, texts: list[Delta]) -> list[Delta]:
        """The n texts to return."""
        in_order = sorted(texts, key=lambda delta: delta.number)
        if len(texts) == self.settings.n:
            return in_order
        in_order.sort(key=lambda delta: -delta.log_probability / max(1, delta.n_tokens))
        return in_order[: self.settings.n]

    async def pieces(self) -> AsyncIterator[str]:
        """Server-sent events."""
        begun: set[tuple[int, int]] = set()
        try:
            async for number, event in self.flow.events():
                if isinstance(event, PromptScores):
                    self.prompt_scores[number] = event.tokens
                    continue
                is_first = (number, event.number) not in begun
                begun.add((number, event.number))
                yield self._event([self._choice(number, event, event.number, is_first)])
        except BadRequestError as error:
            if not begun:
                raise
            yield f"data: {json.dumps(error.body)}\n\n"
            return
        if self.completion.include_usage:
            yield _data(self.object([], self.flow.usage()))
        yield "data: [DONE]\n\n"

    def _event(self, choices: list[dict[str, Any]]) -> str:
        found = self.object(choices)
        return _data(found | {"usage": None} if self.completion.include_usage else found)


def _data(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value)}\n\n"
