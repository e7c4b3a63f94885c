"""Settings and a vocabulary in, a complete request out: token ids, stop criteria, seed, batches."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Any, NamedTuple

import tensorflow as tf

from ..common.hparams import HParams
from ..encoder import Encoder
from .memory_plan import cache_bytes
from .settings import Beams, GenerationSettings, SamplingParams
from .stopping import StopCriteria

# Rows to generate at the same time where the caller leaves it open: on a CPU, more are hardly
# faster.
MAX_ROWS = 32

# Bytes of keys and values that these rows may take together when their contexts are full.
MAX_CACHE_BYTES = 2 * 2**30


class Prompt(NamedTuple):
    """What a text starts with."""

    text: str  # the prefix; '' for none
    tokens: list[int]  # its token ids, or `<|endoftext|>` if there is no prefix


class GenerationRequest(NamedTuple):
    """What to generate: the settings, and what they mean for this model and its vocabulary."""

    settings: GenerationSettings
    encoder: Encoder
    prompts: list[Prompt]
    max_rows: int  # rows to generate at the same time; a beam is a row
    sampling: SamplingParams
    beams: Beams  # if there is only one, the texts are drawn
    seed: int
    stop: StopCriteria
    draft: tf.compat.v1.Session | None = None  # holds the draft model


def build_request(
    settings: GenerationSettings, encoder: Encoder, hparams: HParams
) -> GenerationRequest:
    """Makes the request.

    Raises:
        ValueError: stop_token is not one token, or there is nothing to start from.
    """
    stop_token = _stop_token(settings.stop_token, encoder)
    sampling = SamplingParams(
        temperature=settings.temperature,
        top_k=settings.top_k,
        top_p=settings.top_p,
        repetition_penalty=settings.repetition_penalty,
        presence_penalty=settings.presence_penalty,
        frequency_penalty=settings.frequency_penalty,
        no_repeat_ngram_size=settings.no_repeat_ngram_size,
        min_length=settings.min_length,
        bad_words=_bad_words(settings.bad_words or (), encoder),
        stop_token=stop_token,
        logit_bias=_logit_bias(settings.logit_bias or {}, encoder),
    )
    stop = tuple(settings.stop or ())
    return GenerationRequest(
        settings=settings,
        encoder=encoder,
        prompts=[build_prompt(prefix, encoder) for prefix in settings.prefixes],
        max_rows=settings.batch_size or max_rows(hparams, settings.n_texts),
        sampling=sampling,
        beams=Beams(settings.num_beams, settings.length_penalty),
        seed=secrets.randbits(31) if settings.seed is None else settings.seed,
        stop=StopCriteria(settings.truncate, stop, stop_token, settings.include_stop),
    )


def build_prompt(prefix: str, encoder: Encoder) -> Prompt:
    """The prompt for a prefix, '' for none; ValueError if then `<|endoftext|>` is unknown."""
    if prefix:
        return Prompt(prefix, encode_text(prefix, encoder))
    if encoder.end_of_text is None:
        raise ValueError("this vocabulary has no <|endoftext|> to start from; give a prefix")
    return Prompt(prefix, [encoder.end_of_text])


def encode_text(text: str, encoder: Encoder) -> list[int]:
    """The token ids of a user's text; special tokens are one token each, as in datasets."""
    return encoder.encode(text, allow_special=encoder.end_of_text is not None)


def max_rows(hparams: HParams, n_texts: int) -> int:
    """How many rows to generate at the same time where the caller leaves it open."""
    of_row = cache_bytes(hparams, 1, hparams.n_ctx)
    return max(1, min(n_texts, MAX_ROWS, MAX_CACHE_BYTES // of_row))


def _stop_token(stop_token: str | int | None, encoder: Encoder) -> int | None:
    if not isinstance(stop_token, str):
        return stop_token
    ids = encode_text(stop_token, encoder)
    if len(ids) != 1:
        raise ValueError(f"stop_token={stop_token!r} is no token; give its id, or use stop=")
    return ids[0]


def _logit_bias(biases: Any, encoder: Encoder) -> tuple[tuple[int, float], ...]:
    """Biases by token id; a token that is given as text and as id gets the later bias."""
    found: dict[int, float] = {}
    for token, bias in biases.items():
        ids = encode_text(token, encoder) if isinstance(token, str) else [token]
        if len(ids) != 1:
            parts = [encoder.decode([part]) for part in ids]
            raise ValueError(f"logit_bias of {token!r}: it is no token; its tokens are {parts}")
        found[ids[0]] = bias
    return tuple(found.items())


def _bad_words(words: Sequence[str], encoder: Encoder) -> tuple[tuple[int, ...], ...]:
    # After a space a word has other tokens than at the start of a text.
    forms = {form for word in words for form in (word, f" {word}")}
    ids = {tuple(encode_text(form, encoder)) for form in forms}
    return tuple(sorted(ids))
