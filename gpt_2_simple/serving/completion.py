"""A completion's parameters as JSON in; requests to the engine, and OpenAI's answers, out."""

from __future__ import annotations

import json
import math
import re
import secrets
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from ..common.hparams import HParams
from ..common.settings import Field, fields_of
from ..encoder import Encoder
from ..generation.request import Prompt, build_prompt
from ..generation.settings import MAX_BIAS, SamplingParams
from ..generation.stopping import StopCriteria
from .engine import Delta, EngineRequest, Event, TokenScore
from .settings import MAX_CHOICES, MAX_STOPS, STRUCTURED_PARAMETERS, CompletionSettings

# Longer values are cut where an error shows them.
_MAX_SHOWN = 60


class BadRequestError(Exception):
    """What is wrong with a request: OpenAI's error object."""

    def __init__(
        self,
        message: str,
        param: str | None = None,
        status: int = 400,
        code: str | None = None,
        kind: str = "invalid_request_error",
    ) -> None:
        super().__init__(message)
        self.message, self.param, self.status, self.code = message, param, status, code
        self.kind = kind

    @property
    def body(self) -> dict[str, Any]:
        """As OpenAI's API answers."""
        error = {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}
        return {"error": error}


class Completion(NamedTuple):
    """A checked request for completions."""

    settings: CompletionSettings
    prompts: list[Prompt]
    stop: StopCriteria
    logit_bias: tuple[tuple[int, float], ...]
    include_usage: bool
    n_texts: int  # texts to write for each prompt; the best n are returned

    @property
    def n_prompt_tokens(self) -> int:
        """Tokens of all prompts."""
        return sum(len(prompt.tokens) for prompt in self.prompts)


def parse_json(body: bytes | bytearray) -> dict[str, Any]:
    """A request's body as a JSON object."""
    try:
        found = json.loads(body.decode("utf-8"), parse_constant=_no_constant)
    except (ValueError, RecursionError):
        raise BadRequestError("the body is not JSON in UTF-8") from None
    if not isinstance(found, dict):
        raise BadRequestError("the body must be a JSON object")
    return found


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def find_model(body: Mapping[str, Any], names: Iterable[str]) -> str:
    """The model that a request names."""
    names = list(names)
    known = ", ".join(names)
    model = body.get("model")
    if model is None:
        raise BadRequestError(f"model is missing; it may be: {known}", "model")
    if not isinstance(model, str):
        raise BadRequestError("model must be a string", "model")
    if model not in names:
        shown = f"model={shortened(model)} is not served here; it may be: {known}"
        raise BadRequestError(shown, "model", 404, "model_not_found")
    return model


def read_completion(
    body: Mapping[str, Any], encoder: Encoder, hparams: HParams, max_batch: int, max_prompts: int
) -> Completion:
    """Checks a request for a model with this vocabulary and these sizes."""
    _check_names(body)
    settings = _read_settings(body)
    n_texts = settings.n if settings.best_of is None else settings.best_of
    limit, name = min(max_batch, MAX_CHOICES), "n" if settings.best_of is None else "best_of"
    if n_texts > limit:
        raise BadRequestError(f"{name}={n_texts} must not be above {limit}", name)
    if settings.best_of is not None and settings.best_of < settings.n:
        raise BadRequestError(f"best_of={n_texts} must not be below n={settings.n}", "best_of")
    if settings.stream and n_texts > settings.n:
        raise BadRequestError("best_of cannot stream: all texts are compared first", "best_of")
    stop_token = None if settings.ignore_eos else encoder.end_of_text
    completion = Completion(
        settings=settings,
        prompts=_read_prompts(body.get("prompt"), encoder, max_prompts),
        stop=StopCriteria(None, _read_stop(body.get("stop")), stop_token),
        logit_bias=_read_logit_bias(body.get("logit_bias"), hparams.n_vocab),
        include_usage=_read_include_usage(body, settings.stream),
        n_texts=n_texts,
    )
    return completion._replace(prompts=_fit(completion, hparams.n_ctx))


def _check_names(body: Mapping[str, Any]) -> None:
    if "messages" in body:
        raise BadRequestError(
            "messages are not supported: GPT-2 continues a text and does not chat; give prompt",
            "messages",
        )
    if body.get("suffix") not in (None, ""):
        raise BadRequestError(
            "suffix is not supported: GPT-2 only continues a text; leave it out", "suffix"
        )
    known = {*fields_of(CompletionSettings), *STRUCTURED_PARAMETERS}
    for name in body:
        if name not in known:
            shown = shortened(name)
            raise BadRequestError(
                f"unknown parameter {shown}", name[:_MAX_SHOWN], 400, "unknown_parameter"
            )


def _read_settings(body: Mapping[str, Any]) -> CompletionSettings:
    """The parameters that are single values; null stands for the default, as in OpenAI's API."""
    values = {}
    for name, field in fields_of(CompletionSettings).items():
        value = body.get(name)
        if value is None:
            continue
        if not _has_type(value, field):
            wanted = "true or false" if bool in field.kinds else _type_names(field)
            raise BadRequestError(f"{name}={shortened(value)} must be {wanted}", name)
        values[name] = value
    for name, value in values.items():
        try:
            CompletionSettings(**{"model": values["model"], name: value})
        except ValueError as error:
            raise BadRequestError(str(error), name) from None
    return CompletionSettings(**values)


def _has_type(value: Any, field: Field) -> bool:
    """Whether a JSON value has one of the field's types; true is no number here, nor 1 true."""
    if isinstance(value, bool):
        return bool in field.kinds
    if isinstance(value, str):
        return str in field.kinds
    is_whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    return (int in field.kinds and is_whole) or (
        float in field.kinds and isinstance(value, (int, float))
    )


def _type_names(field: Field) -> str:
    names = {int: "a whole number", float: "a number", str: "a string"}
    return next(names[kind] for kind in field.kinds if kind in names)


def shortened(value: Any) -> str:
    """A value as Python writes it, cut if it is long."""
    shown = repr(value)
    return shown if len(shown) <= _MAX_SHOWN else f"{shown[:_MAX_SHOWN]}..."


# --- parameters that are not single values --------------------------------------------------------


def _read_prompts(value: Any, encoder: Encoder, max_prompts: int) -> list[Prompt]:
    is_list = isinstance(value, list)
    values = value if is_list else ["" if value is None else value]
    if is_list and values and all(_is_token(each) for each in values):
        values = [values]
    if not values:
        raise BadRequestError("prompt=[] must hold at least one prompt", "prompt")
    if len(values) > max_prompts:
        raise BadRequestError(
            f"prompt holds {len(values)} prompts; {max_prompts} are allowed, as more cannot wait",
            "prompt",
        )
    return [_read_prompt(each, encoder) for each in values]


def _is_token(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _read_prompt(value: Any, encoder: Encoder) -> Prompt:
    if isinstance(value, str):
        try:
            return build_prompt(value, encoder)
        except ValueError as error:
            raise BadRequestError(str(error), "prompt") from None
    if not isinstance(value, list) or not value or not all(map(_is_token, value)):
        raise BadRequestError(
            "prompt must be a string, a list of token ids, or a list of either", "prompt"
        )
    try:
        return Prompt(encoder.decode(value, surrogates=False), value)
    except ValueError:
        raise BadRequestError(
            f"prompt holds a token that is not in the vocabulary of {encoder.n_vocab} tokens",
            "prompt",
        ) from None


def _fit(completion: Completion, n_ctx: int) -> list[Prompt]:
    """The prompts, truncated if that was asked for, as long as they fit in the context."""
    settings = completion.settings
    n_new = max(1, settings.max_tokens)
    longest = n_ctx - n_new
    if longest < 1:
        raise BadRequestError(
            f"max_tokens={settings.max_tokens} must be below {n_ctx}, the model's context",
            "max_tokens",
        )
    wanted = settings.truncate_prompt_tokens
    fitted = []
    for prompt in completion.prompts:
        kept = longest if wanted == -1 else wanted
        if kept is not None and kept < len(prompt.tokens):
            prompt = Prompt("", prompt.tokens[-kept:])
        if len(prompt.tokens) > longest:
            raise BadRequestError(
                f"the prompt has {len(prompt.tokens)} tokens; with max_tokens={n_new} it may have "
                f"{longest}, as the model's context is {n_ctx} tokens. Shorten it, lower "
                "max_tokens, or give truncate_prompt_tokens=-1",
                "prompt",
                code="context_length_exceeded",
            )
        fitted.append(prompt)
    return fitted


def _read_stop(value: Any) -> tuple[str, ...]:
    stops = [value] if isinstance(value, str) else [] if value is None else value
    if not isinstance(stops, list) or not all(isinstance(s, str) and s for s in stops):
        raise BadRequestError("stop must be a string or a list of strings, none empty", "stop")
    if len(stops) > MAX_STOPS:
        raise BadRequestError(f"stop holds {len(stops)} strings; {MAX_STOPS} are allowed", "stop")
    return tuple(stops)


def _read_logit_bias(value: Any, n_vocab: int) -> tuple[tuple[int, float], ...]:
    if value is None:
        return ()
    biases: dict[int, float] = {}
    entries: Iterable[Any] = value.items() if isinstance(value, dict) else [("", None)]
    for key, bias in entries:
        is_token = re.fullmatch(r"[0-9]{1,9}", key) and int(key) < n_vocab
        is_number = isinstance(bias, (int, float)) and not isinstance(bias, bool)
        if not is_token or not is_number or not -MAX_BIAS <= bias <= MAX_BIAS:
            raise BadRequestError(
                f"logit_bias must be an object: token ids below {n_vocab}, as strings, with "
                f"numbers from -{MAX_BIAS} to {MAX_BIAS}",
                "logit_bias",
            )
        biases[int(key)] = float(bias)
    return tuple(biases.items())


def _read_include_usage(body: Mapping[str, Any], streams: bool) -> bool:
    options = body.get("stream_options")
    if options is None:
        return False
    name = "stream_options"
    if not streams:
        raise BadRequestError("stream_options is for stream=true only", name)
    if not isinstance(options, dict) or set(options) - {"include_usage"}:
        raise BadRequestError("stream_options may hold include_usage only", name)
    include_usage = options.get("include_usage", False)
    if not isinstance(include_usage, bool):
        raise BadRequestError("stream_options.include_usage must be true or false", name)
    return include_usage


# --- to the engine --------------------------------------------------------------------------------


def engine_requests(
    completion: Completion, deadline: float, listeners: Sequence[Any]
) -> list[EngineRequest]:
    """What the engine is to do for each prompt; each has a listener."""
    settings = completion.settings
    stop_token = completion.stop.stop_token
    sampling = SamplingParams(
        temperature=settings.temperature,
        top_k=max(0, settings.top_k),
        top_p=settings.top_p,
        repetition_penalty=settings.repetition_penalty,
        presence_penalty=settings.presence_penalty,
        frequency_penalty=settings.frequency_penalty,
        min_length=settings.min_tokens if stop_token is not None else 0,
        stop_token=stop_token,
        logit_bias=completion.logit_bias,
    )
    is_compared = completion.n_texts > settings.n
    wants_scores = settings.logprobs is not None or is_compared
    seed = secrets.randbits(63) if settings.seed is None else settings.seed
    return [
        EngineRequest(
            prompt=prompt,
            sampling=sampling,
            length=max(1, settings.max_tokens),
            stop=completion.stop,
            n_texts=completion.n_texts,
            seed=seed,
            first_text=number * completion.n_texts,
            n_likeliest=(settings.logprobs or 0) if wants_scores else -1,
            scores_prompt=settings.logprobs is not None and settings.echo,
            streams=settings.stream,
            deadline=deadline,
            listener=listeners[number],
        )
        for number, prompt in enumerate(completion.prompts)
    ]


# --- to the client --------------------------------------------------------------------------------


class Choice(NamedTuple):
    """A piece of a text, or all of it, for the client."""

    text: str
    scores: list[TokenScore]
    finish_reason: str | None
    prompt_scores: list[TokenScore] | None = None  # if the text starts with its prompt


def completion_object(
    name: str, created: int, model: str, choices: list[dict[str, Any]], usage: Any = None
) -> dict[str, Any]:
    """OpenAI's completion object; a stream's pieces have its form too."""
    found = {
        "id": name,
        "object": "text_completion",
        "created": created,
        "model": model,
        "choices": choices,
    }
    return found | ({"usage": usage} if usage is not None else {})


def usage_object(n_prompt_tokens: int, n_new_tokens: int) -> dict[str, int]:
    """OpenAI's usage object."""
    return {
        "prompt_tokens": n_prompt_tokens,
        "completion_tokens": n_new_tokens,
        "total_tokens": n_prompt_tokens + n_new_tokens,
    }


def choice_object(
    completion: Completion,
    index: int,
    choice: Choice,
    prompt: Prompt,
    offset: int,
    encoder: Encoder,
) -> dict[str, Any]:
    """OpenAI's choice object.

    Args:
        completion: what was asked for.
        index: of the choice, over all prompts.
        choice: what came.
        prompt: what it continues.
        offset: characters of the choice's text that come before its new text.
        encoder: the vocabulary.
    """
    logprobs = None
    if completion.settings.logprobs is not None:
        logprobs = _logprobs_object(choice, prompt, offset, encoder)
    return {
        "index": index,
        "text": choice.text,
        "logprobs": logprobs,
        "finish_reason": choice.finish_reason,
    }


def _logprobs_object(
    choice: Choice, prompt: Prompt, offset: int, encoder: Encoder
) -> dict[str, Any]:
    offsets = [offset + score.offset for score in choice.scores]
    scores = choice.scores
    if choice.prompt_scores:
        before = [
            len(encoder.decode(prompt.tokens[: score.offset], surrogates=False))
            for score in choice.prompt_scores
        ]
        scores, offsets = [*choice.prompt_scores, *scores], [*before, *offsets]
    return {
        "tokens": [token_text(score.token, encoder) for score in scores],
        "token_logprobs": [_finite(score.log_probability) for score in scores],
        "top_logprobs": [
            {token_text(token, encoder): _finite(value) for token, value in score.likeliest}
            if score.log_probability is not None
            else None
            for score in scores
        ],
        "text_offset": offsets,
    }


def _finite(value: float | None) -> float | None:
    """JSON has no infinite numbers; a probability of 0 in float32 becomes a very small one."""
    return value if value is None or math.isfinite(value) else -9999.0


def token_text(token: int, encoder: Encoder) -> str:
    r"""A token as OpenAI's API shows it: its text, or 'bytes:\xe2\x80' for a part of characters."""
    raw = encoder.decode_bytes([token])
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def prompt_text(prompt: Prompt, encoder: Encoder) -> str:
    """The prompt as `echo` shows it; nothing for a start without text."""
    if prompt.text or prompt.tokens == [encoder.end_of_text]:
        return prompt.text
    return encoder.decode(prompt.tokens, surrogates=False)


def is_last(event: Event) -> bool:
    """Whether nothing comes after this event for its text."""
    return isinstance(event, Delta) and event.finish_reason is not None
