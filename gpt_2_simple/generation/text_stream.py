"""A request in; finished texts out, or the pieces of a text while it is generated."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from ..common.report import progress
from ..encoder import Encoder, IncrementalDecoder
from . import beam_search, sequences, speculative
from .kv_cache import SessionGenerator
from .request import GenerationRequest, Prompt
from .stopping import StopCriteria, ends_with


class GeneratedText(NamedTuple):
    """A finished text."""

    prefix: str  # that it was generated from; '' for none
    text: str  # the whole text, with its prefix if that was wanted


class GrowingText:
    """A text that gets its tokens one chunk after the other."""

    def __init__(
        self, prompt: Prompt, encoder: Encoder, stop: StopCriteria, include_prefix: bool
    ) -> None:
        self.prompt = prompt
        self.new_text = ""  # after the prefix, up to the text's end
        self.ended = False
        self._prefix = prompt.text if include_prefix else ""
        self._stop = stop
        self._decoder = IncrementalDecoder(encoder)
        self._n_taken: int | None = None  # characters; None before the prefix was taken

    def append(self, tokens: Sequence[int]) -> None:
        """Adds the next tokens, unless the text has ended."""
        if not self.ended:
            self._add(self._decoder.feed(self._stop.drop_stop_token(tokens)))
            if ends_with(tokens, self._stop.stop_token):
                self.finish()

    def finish(self) -> None:
        """Ends the text; half a character at its end becomes U+FFFD."""
        if not self.ended:
            self._add(self._decoder.flush())
            self.ended = True

    def _add(self, more: str) -> None:
        n_searched = len(self.new_text)
        self.new_text += more
        end = self._stop.find_end(self.new_text, n_searched)
        if end is not None:
            self.new_text, self.ended = self.new_text[:end], True

    def take_ready(self) -> str:
        """What can be shown and was not taken yet; the prefix comes first.

        The start of a stop string is not ready before it is known not to be one.
        """
        text = self.new_text
        n_ready = len(text) if self.ended else self._stop.count_ready(text)
        if self._n_taken is None:
            if not (n_ready or self.ended):
                return ""
            self._n_taken = n_ready
            return self._prefix + text[:n_ready]
        ready = text[self._n_taken : n_ready]
        self._n_taken = max(self._n_taken, n_ready)
        return ready

    def result(self) -> GeneratedText:
        """The text so far, as the caller gets it."""
        text = self._prefix + self.new_text if self._prefix else self.new_text.lstrip("\n")
        return GeneratedText(self.prompt.text, text)


def generate_texts(
    sess: tf.compat.v1.Session, request: GenerationRequest
) -> SessionGenerator[GeneratedText]:
    """Generates a request's texts, a batch at a time.

    Yields:
        Each finished text, for each prompt in turn. After Ctrl-C: the finished texts, and the
        others of the batch as far as they have come.

    Raises:
        KeyboardInterrupt: after Ctrl-C, once all of these were given.
    """
    return SessionGenerator(sess, _texts(sess, request))


def _texts(
    sess: tf.compat.v1.Session, request: GenerationRequest
) -> Generator[GeneratedText, Any, None]:
    searches = request.beams.count > 1
    generate_batch = _search_batch if searches else _sample_batch
    n_sequences = len(request.prompts) if searches else request.settings.n_texts
    step = max(1, request.max_rows // request.beams.count)
    total = n_sequences * request.settings.n_new_tokens
    with progress(total=total, desc="Searching" if searches else "Generating", unit="tok") as bar:
        for first in range(0, n_sequences, step):
            batch = range(first, min(first + step, n_sequences))
            texts: list[GrowingText] = []
            is_interrupted = False
            try:
                for n_tokens in generate_batch(sess, request, batch, texts):
                    bar.update(n_tokens)
            except KeyboardInterrupt:
                is_interrupted = True
            bar.set_postfix(texts=batch.stop, refresh=False)
            for text in texts:
                yield text.result()
            if is_interrupted:
                raise KeyboardInterrupt


def stream_text(
    sess: tf.compat.v1.Session, request: GenerationRequest, index: int
) -> SessionGenerator[str]:
    """Yields pieces of one text, by its number from 0: never half a character or stop string."""
    return SessionGenerator(sess, _text_pieces(sess, request, index))


def _text_pieces(
    sess: tf.compat.v1.Session, request: GenerationRequest, index: int
) -> Generator[str, Any, None]:
    texts: list[GrowingText] = []
    for _ in _sample_batch(sess, request, range(index, index + 1), texts):
        yield from _pieces(texts)
    yield from _pieces(texts)


def _pieces(texts: list[GrowingText]) -> Iterator[str]:
    return filter(None, (text.take_ready() for text in texts))


def _sample_batch(
    sess: tf.compat.v1.Session, request: GenerationRequest, indices: range, texts: list[GrowingText]
) -> Iterator[int]:
    """Lets the texts with these numbers grow in `texts`; yields each chunk's count of tokens."""
    nsamples = request.settings.nsamples
    texts += [_new_text(request, request.prompts[index // nsamples]) for index in indices]
    chunks = sequences.generate_tokens(
        sess,
        [text.prompt.tokens for text in texts],
        request.settings.n_new_tokens,
        request.sampling,
        request.seed,
        list(indices),
        strategy=speculative.strategy(sess, request.settings.speculative, request.draft),
    )
    ended = None
    try:
        with contextlib.suppress(StopIteration):
            while not all(text.ended for text in texts):
                chunk = chunks.send(ended)
                for text, tokens in zip(texts, chunk, strict=True):
                    text.append(tokens[tokens >= 0])
                yield int(np.count_nonzero(chunk >= 0))
                ended = np.array([text.ended for text in texts])
        # Not in `finally`, where the garbage collector may have ended this; see unused_keys.
        chunks.close()
    finally:
        for text in texts:
            text.finish()


def _new_text(request: GenerationRequest, prompt: Prompt) -> GrowingText:
    return GrowingText(prompt, request.encoder, request.stop, request.settings.include_prefix)


def _search_batch(
    sess: tf.compat.v1.Session, request: GenerationRequest, indices: range, texts: list[GrowingText]
) -> Iterator[int]:
    """Adds the best texts for these prompts to `texts`; yields each step's count of tokens."""

    def ends(new_tokens: list[int]) -> bool:
        return request.stop.find_end(request.encoder.decode(new_tokens)) is not None

    prompts = [request.prompts[index] for index in indices]
    with beam_search.BeamSearch(
        sess,
        [prompt.tokens for prompt in prompts],
        request.settings.n_new_tokens,
        request.beams,
        request.sampling,
        ends if request.stop.strings else None,
    ) as search:
        try:
            while not search.done:
                yield search.step()
        finally:
            for prompt, hypotheses in zip(prompts, search.best(), strict=True):
                for hypothesis in hypotheses[: request.settings.nsamples]:
                    text = _new_text(request, prompt)
                    text.append(hypothesis.tokens)
                    text.finish()
                    texts.append(text)
