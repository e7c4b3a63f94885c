"""What a caller asks to be generated, checked: prefixes, settings, where texts end."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from ..common.checks import check_whole
from ..encoder import Encoder
from .settings import Beams, SamplingParams
from .stopping import StopCriteria

ONE_BEAM = Beams()


class GenerationRequest(NamedTuple):
    """What to generate.

    Attributes:
        prefixes: what texts start with; '' for nothing.
        nsamples: texts for each prefix.
        batch_size: texts generated at once; None for as many as is sensible.
        length: tokens to generate for each.
        settings: how tokens are drawn.
        seed: the same gives the same texts; None draws one.
        end: where texts end.
        beams: above one: the likeliest texts are searched, none is drawn.
    """

    prefixes: tuple[str, ...]
    nsamples: int
    batch_size: int | None
    length: int
    settings: SamplingParams
    seed: int | None
    end: StopCriteria
    beams: Beams = ONE_BEAM

    @property
    def total(self) -> int:
        """How many texts there will be."""
        return len(self.prefixes) * self.nsamples


def as_strings(name: str, value: str | Iterable[str]) -> tuple[str, ...]:
    """An argument that is a string or several.

    Raises:
        ValueError: it is neither.
    """
    values = (value,) if isinstance(value, str) else value
    if isinstance(values, Iterable):
        values = tuple(values)
        if all(isinstance(one, str) for one in values):
            return values
    raise ValueError(f"{name}={value!r} must be a string or a list of strings")


def make_request(
    prefix: str | Sequence[str] | None,
    nsamples: int,
    batch_size: int | None,
    length: int,
    settings: SamplingParams,
    seed: int | None,
    end: StopCriteria,
    beams: Beams = ONE_BEAM,
) -> GenerationRequest:
    """Checks what generate() was given.

    Raises:
        ValueError: a number out of range, no prefix in the list, an empty stop, or texts that do
            not fill their batches.
    """
    check_whole("nsamples", nsamples, 1)
    check_whole("length", length, 1)
    if batch_size is not None:
        check_whole("batch_size", batch_size, 1)
        if nsamples % batch_size and (prefix is None or isinstance(prefix, str)):
            raise ValueError(f"nsamples={nsamples} must be a multiple of batch_size={batch_size}")
    if seed is not None:
        check_whole("seed", seed, 0)
    if any(not stop for stop in end.stop):
        raise ValueError(f"stop={list(end.stop)!r} holds an empty string; leave it out")
    prefixes = ("",) if prefix is None else as_strings("prefix", prefix)
    if not prefixes:
        raise ValueError("prefix=[] must hold at least one prefix; '' or None is one without text")
    if 1 < beams.count < nsamples:
        raise ValueError(
            f"nsamples={nsamples} must not be above num_beams={beams.count}: a search finds so many"
        )
    return GenerationRequest(prefixes, nsamples, batch_size, length, settings, seed, end, beams)


def with_tokens(
    request: GenerationRequest,
    enc: Encoder,
    stop_token: str | int | None,
    bad_words: Sequence[str] | None,
) -> GenerationRequest:
    """The request with what only the vocabulary can tell.

    Raises:
        ValueError: no such token, no token that `min_length` could hold back, or an empty bad word.
    """
    if request.settings.min_length and stop_token is None:
        raise ValueError(
            f"min_length={request.settings.min_length} needs a stop_token to hold back"
        )
    if isinstance(stop_token, str):
        ids = encode(enc, stop_token)
        if len(ids) != 1:
            raise ValueError(f"stop_token={stop_token!r} is no token; give its id, or use stop=")
        (stop_token,) = ids
    bad_words = as_strings("bad_words", bad_words or ())
    if "" in bad_words:
        raise ValueError(f"bad_words={list(bad_words)!r} holds an empty string; leave it out")
    # A word has other tokens within a line than at its start.
    words = {tuple(enc.encode(form)) for word in bad_words for form in (word, f" {word}")}
    settings = dataclasses.replace(
        request.settings, stop_token=stop_token, bad_words=tuple(sorted(words))
    )
    return request._replace(settings=settings, end=request.end._replace(stop_token=stop_token))


def encode(enc: Encoder, text: str) -> list[int]:
    """The tokens of a text as a dataset has them: `<|endoftext|>` is one, if there is such."""
    return enc.encode(text, allow_special=enc.end_of_text is not None)


def start_ids(enc: Encoder, prefix: str) -> list[int]:
    """The tokens that a text starts from: the prefix's, or the end of the text before.

    Raises:
        ValueError: there is no prefix, and no `<|endoftext|>` in the vocabulary.
    """
    if prefix:
        return encode(enc, prefix)
    if enc.end_of_text is None:
        raise ValueError("this vocabulary has no <|endoftext|> to start from; give a prefix")
    return [enc.end_of_text]
