"""Requests in, finished texts out, in order or as they come."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Iterator, Sequence

import numpy as np
import tensorflow as tf

from .. import model, session
from ..common.report import progress
from ..encoder import Encoder, IncrementalDecoder
from . import beam_search, sequences
from .request import GenerationRequest, start_ids
from .stopping import StopCriteria

# Rows generated at once where the caller leaves it open: more are hardly quicker on a CPU.
MOST_ROWS = 32

# Bytes of keys and values that these rows may take together, with their contexts full.
CACHE_BYTES = 2 * 2**30


class _Text:
    """One text as it grows.

    Attributes:
        new: what was generated so far after the prefix, up to its end.
        ended: whether there will be no more.
    """

    def __init__(self, enc: Encoder, prefix: str, end: StopCriteria):
        self.prefix, self.end = prefix, end
        self.decoder = IncrementalDecoder(enc)
        self.new = ""
        self.told = 0
        self.started = self.ended = False

    def feed(self, ids: np.ndarray | Sequence[int]) -> None:
        """Takes the next tokens; -1 stands for none."""
        if self.ended:
            return
        ids = np.asarray(ids, np.int32)
        ids = ids[ids >= 0]
        stops = len(ids) and ids[-1] == self.end.stop_token
        self._add(self.decoder.feed(ids[:-1] if stops and not self.end.include_stop else ids))
        if stops:
            self.finish()

    def finish(self) -> None:
        """Ends the text; half a character at its end becomes U+FFFD."""
        if not self.ended:
            self._add(self.decoder.flush())
            self.ended = True

    def _add(self, more: str) -> None:
        # A stop may have begun in what was there before.
        start = max(0, len(self.new) - self.end.longest + 1)
        self.new += more
        place = self.end.find(self.new, start)
        if place is not None:
            self.new, self.ended = self.new[:place], True

    def tell(self) -> str:
        """What can be shown that was not yet: no more of it can turn out to be a stop's start."""
        safe = len(self.new)
        if not self.ended:
            for stop in self.end.strings:
                held = (n for n in range(len(stop) - 1, 0, -1) if self.new.endswith(stop[:n]))
                safe = min(safe, len(self.new) - next(held, 0))
        piece, self.told = self.new[self.told : safe], max(self.told, safe)
        if self.started or not (piece or self.ended):
            return piece
        self.started = True
        return self._start() + piece

    def _start(self) -> str:
        return self.prefix if self.end.include_prefix else ""

    @property
    def whole(self) -> str:
        """The text as the caller gets it."""
        if self.prefix and self.end.include_prefix:
            return self.prefix + self.new
        return self.new.lstrip("\n")


def rows_at_once(hparams: model.HParams, request: GenerationRequest) -> int:
    """The batch size: the caller's, or what fits CACHE_BYTES with full contexts."""
    if request.batch_size is not None:
        return request.batch_size
    cache = 4 * 2 * hparams.n_layer * hparams.n_ctx * hparams.n_embd
    return max(1, min(request.total, MOST_ROWS, CACHE_BYTES // cache))


def generate_texts(
    sess: tf.compat.v1.Session, state: session.GraphState, request: GenerationRequest
) -> Iterator[str]:
    """Generates a request's texts, a batch at a time.

    Yields:
        Each finished text, for each prefix in turn. After Ctrl-C, those that are finished and what
        there is of the others in the batch.

    Raises:
        KeyboardInterrupt: once all of that was given.
    """
    if request.beams.count > 1:
        yield from _search_texts(sess, state, request)
        return
    seed = secrets.randbits(31) if request.seed is None else request.seed
    prefixes = [prefix for prefix in request.prefixes for _ in range(request.nsamples)]
    step = rows_at_once(state.hparams, request)
    with progress(total=len(prefixes) * request.length, desc="Generating", unit="tok") as bar:
        for first in range(0, len(prefixes), step):
            rows = range(first, min(first + step, len(prefixes)))
            texts = [_Text(state.encoder, prefixes[row], request.end) for row in rows]
            interrupted = False
            try:
                for count in _write(sess, state.encoder, request, texts, rows, seed):
                    bar.update(count)
            except KeyboardInterrupt:
                interrupted = True
            bar.set_postfix(texts=rows.stop, refresh=False)
            yield from (text.whole for text in texts)
            if interrupted:
                raise KeyboardInterrupt


def _search_texts(
    sess: tf.compat.v1.Session, state: session.GraphState, request: GenerationRequest
) -> Iterator[str]:
    """As generate_texts, by beam search: for each prefix the `nsamples` best texts."""

    def ends(new: list[int]) -> bool:
        return request.end.find(state.encoder.decode(new), 0) is not None

    step = max(1, rows_at_once(state.hparams, request) // request.beams.count)
    with progress(
        total=len(request.prefixes) * request.length, desc="Searching", unit="tok"
    ) as bar:
        for first in range(0, len(request.prefixes), step):
            prefixes = request.prefixes[first : first + step]
            starts = [start_ids(state.encoder, prefix) for prefix in prefixes]
            interrupted = False
            with beam_search.BeamSearch(
                sess, starts, request.length, request.beams, request.settings,
                ends if request.end.strings else None,
            ) as search:  # fmt: skip
                try:
                    while not search.done:
                        bar.update(search.step())
                except KeyboardInterrupt:
                    interrupted = True
                found = search.best()
            for prefix, texts in zip(prefixes, found, strict=True):
                for _, ids in texts[: request.nsamples]:
                    text = _Text(state.encoder, prefix, request.end)
                    text.feed(ids)
                    text.finish()
                    yield text.whole
            if interrupted:
                raise KeyboardInterrupt


def stream_text(
    sess: tf.compat.v1.Session, state: session.GraphState, request: GenerationRequest
) -> Iterator[str]:
    """Generates a request's texts one after the other, each in pieces as they come.

    Yields:
        Pieces: never half a character, never the start of a stop. An empty piece ends a text.
    """
    seed = secrets.randbits(31) if request.seed is None else request.seed
    prefixes = [prefix for prefix in request.prefixes for _ in range(request.nsamples)]
    for row, prefix in enumerate(prefixes):
        text = _Text(state.encoder, prefix, request.end)
        for _ in _write(sess, state.encoder, request, [text], range(row, row + 1), seed):
            piece = text.tell()
            if piece:
                yield piece
        yield ""


def _write(
    sess: tf.compat.v1.Session,
    enc: Encoder,
    request: GenerationRequest,
    texts: Sequence[_Text],
    rows: range,
    seed: int,
) -> Iterator[int]:
    """Lets `texts` grow to their ends; yields how many tokens were added each time."""
    starts = [start_ids(enc, text.prefix) for text in texts]
    tokens = sequences.generate_tokens(
        sess, starts, request.length, request.settings, seed, list(rows)
    )
    with contextlib.closing(tokens):
        try:
            piece = next(tokens)
            while True:
                for text, ids in zip(texts, piece, strict=True):
                    text.feed(ids)
                yield int(np.count_nonzero(piece >= 0))
                if all(text.ended for text in texts):
                    return
                piece = tokens.send(np.array([text.ended for text in texts]))
        except StopIteration:
            pass
        finally:
            for text in texts:
                text.finish()
    yield 0
