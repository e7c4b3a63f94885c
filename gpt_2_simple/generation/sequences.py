"""Token ids in, token ids out: sequences that grow together, a chunk of tokens at a time.

A call keeps its cache in the session, under a key of its own, between one chunk of tokens and the
next: each block's keys and its values [rows, n_head, columns, width], to which the loop writes in
place. Rows of unequal length are padded on the left: a row sees the columns from its `pads` on.
"""

from __future__ import annotations

import dataclasses
import math
import random
import time
from collections.abc import Generator
from collections.abc import Sequence as Seq
from typing import Any

import numpy as np
import tensorflow as tf

from .. import session
from ..common.checks import check_whole
from ..common.report import warn
from .decode import BeamStep, Decode, build_prefill, decoder
from .kv_cache import build_merge, build_once, engine
from .sampling import SamplingPlaceholders, check_status
from .settings import SamplingParams

# Columns by which a full cache grows: each time costs a copy of it, each unused column some work.
GROWTH = 64

# Given tokens that go through the model at once, over all rows: bounds the memory, and the time for
# which a run cannot be interrupted.
TOKENS_AT_ONCE = 1024

# A chunk of new tokens should take about this long, so that Ctrl-C and streams wait no longer.
CHUNK_SECONDS = 0.4
LONGEST_CHUNK = 64


def generate_tokens(
    sess: tf.compat.v1.Session,
    prefixes: Seq[Seq[int]],
    length: int,
    sampling: SamplingParams | None = None,
    seed: int | None = None,
    row_ids: Seq[int] | None = None,
    chunk: int | None = None,
) -> Generator[np.ndarray, Any, None]:
    """Continues token sequences.

    A row whose context is full goes on from its last n_ctx // 2 tokens. A row's tokens depend on
    its own prefix, the seed and its id, not on its neighbours (but for rounding, where two tokens
    are equally likely to seven digits).

    Args:
        sess: a session that holds a model.
        prefixes: token ids, at least one a row; the rows may differ in length.
        length: new tokens a row.
        sampling: how to choose; None for the defaults.
        seed: a whole number; None draws one.
        row_ids: whole numbers that tell rows with the same seed apart; None counts from 0.
        chunk: most tokens in one piece; None for pieces of about half a second.

    Returns:
        A generator of int32 [rows, time] pieces, `length` columns in all, or fewer when all rows
        end. After a row's end its tokens are -1. `send` a bool [rows] to end rows. Closing the
        generator frees what it holds in the session.

    Raises:
        ValueError: an argument out of range.
        RuntimeError: the session is closed or holds no model; while writing, weights that are not
            numbers, or nothing left to choose from.
    """
    sampling = sampling or SamplingParams()
    texts = checked_prefixes(sess, prefixes, length, sampling)
    if chunk is not None:
        check_whole("chunk", chunk, 1)
    if seed is not None:
        check_whole("seed", seed, -(2**63), math.inf)
    ids = range(len(texts)) if row_ids is None else row_ids
    if len(ids) != len(texts):
        raise ValueError(f"{len(ids)} row_ids for {len(texts)} prefixes; give one each")
    rows = [Sequence(text, stream) for text, stream in zip(texts, _noise(seed, ids), strict=True)]
    return Generation(sess, rows, sampling).write(length, chunk)


def checked_prefixes(
    sess: tf.compat.v1.Session, prefixes: Seq[Seq[int]], length: int, sampling: SamplingParams
) -> list[list[int]]:
    """The prefixes, as much of them as is read; raises as generate_tokens does."""
    engine(sess)
    hparams = session.graph_state(sess).hparams
    check_whole("length", length, 1)
    texts = [checked_tokens(prefix, hparams.n_vocab) for prefix in prefixes]
    if not texts:
        raise ValueError("prefixes=[] must hold at least one prefix")
    if sampling.stop_token is not None and sampling.stop_token >= hparams.n_vocab:
        raise ValueError(f"stop_token={sampling.stop_token} must be below {hparams.n_vocab}")
    for word in sampling.bad_words:
        checked_tokens(word, hparams.n_vocab)
    return _cut(texts, hparams.n_ctx, length)


def checked_tokens(tokens: Seq[int], n_vocab: int) -> list[int]:
    tokens = [int(token) for token in tokens]
    if not tokens:
        raise ValueError("an empty prefix has nothing to continue; begin with <|endoftext|>")
    for token in tokens:
        if not 0 <= token < n_vocab:
            raise ValueError(f"token {token} is not in the vocabulary of {n_vocab} tokens")
    return tokens


def _cut(texts: list[list[int]], n_ctx: int, length: int) -> list[list[int]]:
    """Takes from texts that are too long their start, leaving room for at most half a context."""
    kept = n_ctx - min(length, n_ctx // 2)
    cut = max((len(text) - kept for text in texts if len(text) > n_ctx), default=0)
    if cut:
        warn(
            f"a prefix is longer than the context of {n_ctx} tokens: its first {cut} tokens are "
            "not read"
        )
    return [text[-kept:] if len(text) > n_ctx else text for text in texts]


def _noise(seed: int | None, ids: Seq[int]) -> list[np.random.Philox]:
    """One stream of random numbers a row; the n-th number belongs to the n-th new token."""
    seed = random.SystemRandom().getrandbits(64) if seed is None else int(seed)
    keys = [np.array([seed % 2**64, int(row) % 2**64], np.uint64) for row in ids]
    return [np.random.Philox(key=key) for key in keys]


@dataclasses.dataclass(eq=False)
class Sequence:
    """A text on its way: all its tokens, of which the model sees those from `start` on."""

    text: list[int]
    noise: np.random.Philox | None = None
    start: int = 0
    ended: bool = False

    @property
    def context(self) -> tuple[int, ...]:
        """What the cache holds: all that the model sees but the last token."""
        return tuple(self.text[self.start : -1])

    @property
    def cached(self) -> int:
        """Length of the context."""
        return len(self.text) - 1 - self.start


class Generation:
    """One call's rows, and its cache in the session under a key of its own."""

    def __init__(
        self, sess: tf.compat.v1.Session, rows: list[Sequence], sampling: SamplingParams
    ) -> None:
        self.sess = sess
        self.engine = engine(sess)
        self.n_ctx = session.graph_state(sess).hparams.n_ctx
        self.sampling = sampling
        self.rows = rows
        self.live: list[Sequence] = []  # those in the cache, in its order
        self.keys: list[int] = []
        self.key = self.new_key()
        self.used = self.columns = 0

    def write(self, length: int, chunk: int | None) -> Generator[np.ndarray, Any, None]:
        """Yields the new tokens; see generate_tokens."""
        written, steps = 0, 4
        try:
            self.fill(self.key, [])
            self.prime(self.rows)
            while written < length and not all(row.ended for row in self.rows):
                self.make_room()
                began = time.monotonic()
                limit = min(length - written, *map(self.room, self.live))
                tokens = self.decode(min(chunk or steps, limit), written, length)
                written += tokens.shape[1]
                pace = (time.monotonic() - began) / tokens.shape[1]
                steps = max(1, min(LONGEST_CHUNK, 2 * steps, int(CHUNK_SECONDS / pace)))
                ended = yield tokens
                if ended is not None:
                    for row, end in zip(self.rows, ended, strict=True):
                        row.ended = row.ended or bool(end)
        finally:
            self.free()

    def room(self, row: Sequence) -> int:
        """New tokens before the row's context is full."""
        return self.n_ctx if row.ended else self.n_ctx - row.cached

    def make_room(self) -> None:
        """Shortens contexts that are full; drops ended rows once they are many."""
        full = [row for row in self.live if self.room(row) < 1]
        for row in full:
            row.start = len(row.text) - max(1, self.n_ctx // 2)
        if full or 4 * sum(row.ended for row in self.live) > len(self.live):
            self.prime(full)

    def prime(self, rows: list[Sequence]) -> None:
        """Puts the contexts of `rows` in the cache, beside those of the other unended rows."""
        contexts = list(dict.fromkeys(row.context for row in rows))
        key = self.new_key()
        longest = self.fill(key, contexts)
        kept = [row for row in self.live if not row.ended and row not in rows]
        columns = max((row.cached for row in kept), default=0)
        if kept or len(contexts) < len(rows):
            merge = build_once(self.sess, build_merge)
            places = [self.live.index(row) for row in kept]
            places += [len(self.live) + contexts.index(row.context) for row in rows]
            feeds = {
                merge.key: self.key,
                merge.other: key,
                merge.used: [self.used, longest],
                merge.columns: [columns, longest],
                merge.rows: places,
            }
            self.sess.run(merge.run, feeds)
        else:
            self.run(self.engine.free, {})
            self.key = key
        self.live = [*kept, *rows]
        self.used = self.columns = max(columns, longest)

    def fill(self, key: int, contexts: list[tuple[int, ...]]) -> int:
        """Makes a cache of these contexts, as wide as the longest; returns its width."""
        begin = self.engine.begin
        longest = max(map(len, contexts), default=0)
        self.run(begin.run, {begin.rows: len(contexts), begin.columns: longest}, key)
        if not longest:
            return 0
        extend = build_once(self.sess, build_prefill)
        pads = [longest - len(context) for context in contexts]
        tokens = np.array([[0] * pad + [*c] for pad, c in zip(pads, contexts, strict=True)])
        block = max(1, TOKENS_AT_ONCE // len(contexts))
        for at in range(0, longest, block):
            part = tokens[:, at : at + block]
            feeds = {extend.key: key, extend.tokens: part, extend.pads: pads, extend.used: at}
            self.sess.run(extend.run, feeds)
        return longest

    def decode(self, steps: int, written: int, length: int) -> np.ndarray:
        """Writes up to `steps` tokens, int32 [rows, time]."""
        decode = decoder(self.sess, len(self.live))
        raw = np.array([row.noise.random_raw(steps) for row in self.live]).T
        feeds = {
            **self.feeds(decode, steps, written, length),
            decode.uniform: (raw >> np.uint64(11)) * 2.0**-53,
            decode.history: self.history(steps),
            decode.ended: [row.ended for row in self.live],
        }
        new, status, _ = self.sess.run([decode.tokens, decode.status, decode.run], feeds)
        check_status(status)
        self.used += new.shape[1]
        tokens = np.full([len(self.rows), new.shape[1]], -1, np.int32)
        for row, more in zip(self.live, new, strict=True):
            tokens[self.rows.index(row)] = more
            row.text.extend(more[more >= 0].tolist())
            row.ended = row.ended or row.text[-1] == self.sampling.stop_token
        return tokens

    def feeds(
        self, ops: Decode | BeamStep, steps: int, written: int, length: int
    ) -> dict[Any, Any]:
        """What both ways to go on are told; counts on the cache to grow as they are told."""
        missing = max(0, self.used + steps - self.columns)
        grow = min(max(missing, GROWTH), length - written) if missing else 0
        self.columns += grow
        return {
            ops.key: self.key,
            ops.last: [row.text[-1] for row in self.live],
            ops.pads: [self.used - row.cached for row in self.live],
            ops.used: self.used,
            ops.grow: grow,
            ops.written: written,
            **self.controls(ops.controls),
        }

    def history(self, steps: int) -> np.ndarray:
        """The texts [rows, time] as Decode.history wants them."""
        if not self.sampling.changes_logits:
            return np.zeros([len(self.live), 0], np.int32)
        words = [len(word) for word in self.sampling.bad_words]
        width = max(self.sampling.no_repeat_ngram_size, *words, *(len(r.text) for r in self.live))
        history = np.full([len(self.live), width + steps], -1, np.int32)
        for row, line in zip(self.live, history, strict=True):
            line[width - len(row.text) : width] = row.text
        return history

    def controls(self, controls: SamplingPlaceholders) -> dict[Any, Any]:
        """What to feed for the sampling."""
        words = self.sampling.bad_words
        longest = max(map(len, words), default=1)
        values = {
            **dataclasses.asdict(self.sampling),
            "bad_words": np.reshape([(-1,) * (longest - len(w)) + w for w in words], [-1, longest]),
            "stop_token": -1 if self.sampling.stop_token is None else self.sampling.stop_token,
            "controlled": self.sampling.changes_logits,
        }
        return {getattr(controls, name): value for name, value in values.items()}

    def run(self, fetches: Any, feeds: dict[Any, Any], key: int | None = None) -> Any:
        return self.sess.run(fetches, {self.engine.key: self.key if key is None else key, **feeds})

    def new_key(self) -> int:
        """A key that no other call uses; what is under it goes in the end."""
        self.keys.append(random.SystemRandom().getrandbits(62))
        return self.keys[-1]

    def free(self) -> None:
        """Removes from the session what this call left there."""
        if not getattr(self.sess, "_closed", False):
            for key in self.keys:
                self.run(self.engine.free, {}, key)
