"""Token ids in, new token ids out: sequences that grow together, a chunk of tokens at a time.

A generation keeps its cache in the session between one chunk and the next; see kv_cache. Rows of
unequal length are padded on the left: a row sees the columns from its left pad on.
"""

from __future__ import annotations

import dataclasses
import random
import time
from collections import abc
from typing import Any

import numpy as np
import tensorflow as tf

from .. import session
from ..common.checks import check_whole
from ..common.report import warn
from .decode import StepInputs, build_decode, build_prefill
from .kv_cache import (
    SessionGenerator,
    build_merge,
    build_once,
    cache_ops,
    free_unused,
    model_precision,
    run,
    unused_keys,
)
from .sampling import HEALTHY, SamplingPlaceholders, check_status
from .settings import SamplingParams
from .stopping import ends_with

# Columns by which a full cache grows at least. Each growth copies the cache, and each unused column
# costs some work.
MIN_CACHE_GROWTH = 64

# Given tokens that go through the model in one run, over all rows. It bounds the memory, and the
# time for which a run cannot be interrupted.
MAX_TOKENS_PER_RUN = 1024

# A chunk of new tokens should take this long: Ctrl-C and streams wait for its end.
CHUNK_SECONDS = 0.4
FIRST_CHUNK, MAX_CHUNK = 4, 64


def generate_tokens(
    sess: tf.compat.v1.Session,
    prefixes: abc.Sequence[abc.Sequence[int]],
    length: int,
    sampling: SamplingParams | None = None,
    seed: int | None = None,
    row_ids: abc.Sequence[int] | None = None,
    chunk: int | None = None,
) -> abc.Generator[np.ndarray, Any, None]:
    """Continues token sequences.

    A row whose context is full continues from its last n_ctx // 2 tokens. A row's tokens depend on
    its own prefix, the seed and its id, and not on the other rows (except for rounding, where two
    tokens are equally likely to seven digits).

    Args:
        sess: a session that holds a model.
        prefixes: token ids, at least one a row; the rows may differ in length.
        length: new tokens a row.
        sampling: how to choose; None for the defaults.
        seed: a whole number; None draws one.
        row_ids: whole numbers that distinguish rows with the same seed; None counts from 0.
        chunk: tokens in a chunk, at most; None for chunks of about half a second.

    Returns:
        A generator of chunks, int32 [rows, time]: `length` columns in all, or fewer when all rows
        end. After a row's end its tokens are -1. `send` a bool [rows] to end rows. Closing the
        generator frees what it holds in the session.

    Raises:
        ValueError: an argument is out of range; during generation, no token is left to choose.
        RuntimeError: the session is closed or holds no model; during generation, the weights are
            not finite numbers.
    """
    sampling = sampling or SamplingParams()
    length = check_whole("length", length, 1)
    prefixes = fit_prefixes(sess, prefixes, length, sampling)
    if chunk is not None:
        chunk = check_whole("chunk", chunk, 1)
    seed = random.SystemRandom().getrandbits(64) if seed is None else seed
    seed = check_whole("seed", seed, -(2**63))
    ids = range(len(prefixes)) if row_ids is None else row_ids
    if len(ids) != len(prefixes):
        raise ValueError(f"{len(ids)} row_ids for {len(prefixes)} prefixes; give one each")
    rows = []
    for prefix, row_id in zip(prefixes, ids, strict=True):
        key = np.array([seed % 2**64, int(row_id) % 2**64], np.uint64)
        rows.append(Sequence(list(prefix), np.random.Philox(key=key)))
    return SessionGenerator(sess, Generation(sess, rows, length, sampling).generate(chunk))


def fit_prefixes(
    sess: tf.compat.v1.Session,
    prefixes: abc.Sequence[abc.Sequence[int]],
    length: int,
    sampling: SamplingParams,
) -> list[list[int]]:
    """Checks arguments as generate_tokens() says; cuts prefixes that are longer than the context.

    `length` is checked already. The end of such a prefix stays, with room for new tokens after it.
    """
    hparams = session.graph_state(sess).hparams
    n_ctx, n_vocab = hparams.n_ctx, hparams.n_vocab
    checked = [check_tokens(prefix, n_vocab) for prefix in prefixes]
    if not checked:
        raise ValueError("prefixes=[] must hold at least one prefix")
    if sampling.stop_token is not None and sampling.stop_token >= n_vocab:
        raise ValueError(f"stop_token={sampling.stop_token} must be below {n_vocab}")
    for word in sampling.bad_words:
        check_tokens(word, n_vocab)
    longest, kept = max(map(len, checked)), n_ctx - min(length, n_ctx // 2)
    if longest > n_ctx:
        warn(
            f"a prefix is longer than the context of {n_ctx} tokens: its first {longest - kept} "
            "tokens are not read"
        )
    return [prefix[-kept:] if len(prefix) > n_ctx else prefix for prefix in checked]


def check_tokens(tokens: abc.Sequence[int], n_vocab: int) -> list[int]:
    """The tokens as Python's whole numbers; ValueError if there are none, or one is unknown."""
    tokens = [int(token) for token in tokens]
    if not tokens:
        raise ValueError("an empty prefix has nothing to continue; begin with <|endoftext|>")
    for token in tokens:
        if not 0 <= token < n_vocab:
            raise ValueError(f"token {token} is not in the vocabulary of {n_vocab} tokens")
    return tokens


@dataclasses.dataclass(eq=False)
class Sequence:
    """A text that grows."""

    tokens: list[int]  # all, the prefix included
    stream: np.random.Philox | None = None  # the n-th number draws the n-th new token, if at all
    window_start: int = 0  # the model sees the tokens from this one on
    ended: bool = False  # whether it needs no more tokens

    def draw(self, count: int) -> np.ndarray:
        """The next random numbers in [0, 1)."""
        assert self.stream is not None
        return (self.stream.random_raw(count) >> np.uint64(11)) * 2.0**-53

    @property
    def cached_tokens(self) -> tuple[int, ...]:
        """The tokens that the cache holds: all that the model sees except the last one."""
        return tuple(self.tokens[self.window_start : -1])

    @property
    def n_cached(self) -> int:
        """How many tokens the cache holds."""
        return len(self.tokens) - 1 - self.window_start


class Generation:
    """Sequences that grow together, and their cache in the session."""

    def __init__(
        self,
        sess: tf.compat.v1.Session,
        rows: list[Sequence],
        length: int,
        sampling: SamplingParams,
    ) -> None:
        self.sess, self.cache_ops, self.unused = sess, cache_ops(sess), unused_keys(sess)
        self.precision = model_precision(sess)
        self.n_ctx = session.graph_state(sess).hparams.n_ctx
        self.rows, self.length, self.sampling = rows, length, sampling
        self.live: list[Sequence] = []  # the rows in the cache
        self.cache_rows: list[int] = []  # the row of the cache that each of these continues from
        self.cache_length = self.cache_capacity = 0  # columns in use, and all columns
        self.n_generated = 0  # new tokens that each row has
        self.status = np.zeros(0, np.int32)  # of the live rows; see sampling.check_status
        self.keys: list[int] = []  # of all caches that were made
        self.key = self.new_key()

    def generate(self, chunk: int | None) -> abc.Generator[np.ndarray, Any, None]:
        """Yields the new tokens; see generate_tokens. At its end the caches are unused."""
        steps = FIRST_CHUNK
        try:
            self.start()
            while self.n_generated < self.length and not all(row.ended for row in self.rows):
                self.slide_windows()
                started = time.monotonic()
                limit = min(self.length - self.n_generated, *map(self.room, self.live))
                tokens = self.decode(min(chunk or steps, limit))
                pace = (time.monotonic() - started) / tokens.shape[1]
                steps = max(1, min(MAX_CHUNK, 2 * steps, int(CHUNK_SECONDS / pace)))
                ended = yield tokens
                if ended is not None:
                    for row, has_ended in zip(self.rows, ended, strict=True):
                        row.ended = row.ended or bool(has_ended)
                # Only now: a text that ended before the fault is whole, however long the chunk was.
                self.check(self.status)
        finally:
            self.unused.extend(self.keys)

    def start(self) -> None:
        """Fills the cache with the prefixes."""
        self.build_cache(self.key, [])
        self.prefill(self.rows)

    def room(self, row: Sequence) -> int:
        """New tokens before the row's context is full."""
        return self.n_ctx if row.ended else self.n_ctx - row.n_cached

    def slide_windows(self) -> None:
        """Moves the windows of full contexts; drops ended rows once they are many."""
        full = [row for row in self.live if self.room(row) < 1]
        for row in full:
            row.window_start = len(row.tokens) - max(1, self.n_ctx // 2)
        if full or 4 * sum(row.ended for row in self.live) > len(self.live):
            self.prefill(full)

    def prefill(self, rows: list[Sequence]) -> None:
        """Computes the cache of `rows`, and joins it with that of the other rows still growing."""
        contexts = list(dict.fromkeys(row.cached_tokens for row in rows))
        new_key = self.new_key()
        new_length = self.build_cache(new_key, contexts)
        kept = [row for row in self.live if not row.ended and row not in rows]
        kept_length = max((row.n_cached for row in kept), default=0)
        if kept or len(contexts) < len(rows):
            merge = build_once(self.sess, build_merge)
            kept_rows = [self.cache_rows[self.live.index(row)] for row in kept]
            new_rows = [len(self.live) + contexts.index(row.cached_tokens) for row in rows]
            feeds = {
                merge.key: self.key,
                merge.other_key: new_key,
                merge.cache_lengths: [self.cache_length, new_length],
                merge.kept_columns: [kept_length, new_length],
                merge.rows: kept_rows + new_rows,
            }
            run(self.sess, merge.run, feeds)
        else:
            run(self.sess, self.cache_ops.free, {self.cache_ops.key: self.key})
            self.key = new_key
        self.live = [*kept, *rows]
        self.cache_rows = list(range(len(self.live)))
        self.cache_length = self.cache_capacity = max(kept_length, new_length)

    def build_cache(self, key: int, contexts: list[tuple[int, ...]]) -> int:
        """Makes a cache of these contexts, as wide as the longest; returns its width."""
        ops, longest = self.cache_ops, max(map(len, contexts), default=0)
        shape = {ops.rows: len(contexts), ops.capacity: longest}
        run(self.sess, ops.allocate, {ops.key: key, **shape})
        if not longest:
            return 0
        prefill = build_once(self.sess, build_prefill)
        pads = [longest - len(context) for context in contexts]
        tokens = np.array([[0] * pad + [*c] for pad, c in zip(pads, contexts, strict=True)])
        step = max(1, MAX_TOKENS_PER_RUN // len(contexts))
        for start in range(0, longest, step):
            feeds = {
                prefill.cache_key: key,
                prefill.tokens: tokens[:, start : start + step],
                prefill.left_pads: pads,
                prefill.cache_length: start,
            }
            run(self.sess, prefill.run, feeds)
        return longest

    def decode(self, steps: int) -> np.ndarray:
        """Generates up to `steps` tokens, int32 [rows, time]; -1 after a fault, see `status`."""
        ops = build_once(self.sess, build_decode, len(self.live) == 1)
        feeds: dict[Any, Any] = {
            **self.step_feeds(ops, steps),
            ops.text_tokens: self.text_tokens(steps),
            ops.uniform: np.array([row.draw(steps) for row in self.live]).T,
            ops.ended: [row.ended for row in self.live],
        }
        new, self.status, _ = run(self.sess, [ops.tokens, ops.status, ops.run], feeds)
        self.cache_length += new.shape[1]
        self.n_generated += new.shape[1]
        tokens = np.full([len(self.rows), new.shape[1]], -1, np.int32)
        for row, row_tokens in zip(self.live, new, strict=True):
            tokens[self.rows.index(row)] = row_tokens
            row.tokens.extend(row_tokens[row_tokens >= 0].tolist())
            row.ended = row.ended or ends_with(row.tokens, self.sampling.stop_token)
        return tokens

    def check(self, status: np.ndarray) -> None:
        """Raises check_status()'s errors for the live rows that have not ended."""
        has_ended = [row.ended for row in self.live]
        check_status(np.where(has_ended, HEALTHY, status), self.precision)

    def step_feeds(self, inputs: StepInputs, steps: int) -> dict[Any, Any]:
        """Feeds for the next `steps` tokens, except text_tokens; the cache grows by what is fed."""
        missing = self.cache_length + steps - self.cache_capacity
        remaining = self.length - self.n_generated
        added = min(max(missing, MIN_CACHE_GROWTH), remaining) if missing > 0 else 0
        self.cache_capacity += added
        return {
            inputs.cache_key: self.key,
            inputs.last_tokens: [row.tokens[-1] for row in self.live],
            inputs.left_pads: [self.cache_length - row.n_cached for row in self.live],
            inputs.cache_length: self.cache_length,
            inputs.added_columns: added,
            inputs.n_generated: self.n_generated,
            **_sampling_feeds(inputs.sampling, self.sampling),
        }

    def text_tokens(self, steps: int) -> np.ndarray:
        """The texts [rows, time] for StepInputs.text_tokens, with room for `steps` tokens."""
        if not self.sampling.changes_logits:
            return np.zeros([len(self.live), 0], np.int32)
        words = [len(word) for word in self.sampling.bad_words]
        lengths = [len(row.tokens) for row in self.live]
        width = max(self.sampling.no_repeat_ngram_size, *words, *lengths)
        tokens = np.full([len(self.live), width + steps], -1, np.int32)
        for row, line in zip(self.live, tokens, strict=True):
            line[width - len(row.tokens) : width] = row.tokens
        return tokens

    def new_key(self) -> int:
        """A key that no other generation uses; `free` removes what is under it."""
        self.keys.append(random.SystemRandom().getrandbits(62))
        return self.keys[-1]

    def free(self) -> None:
        """Removes all of its caches from the session."""
        self.unused.extend(self.keys)
        free_unused(self.sess)


def _sampling_feeds(placeholders: SamplingPlaceholders, sampling: SamplingParams) -> dict[Any, Any]:
    words = sampling.bad_words
    longest = max(map(len, words), default=1)
    padded = [(-1,) * (longest - len(word)) + word for word in words]
    values = {
        **dataclasses.asdict(sampling),
        "bad_words": np.reshape(padded, [-1, longest]),
        # In float32 a smaller one would be 0, which means off.
        "top_p": sampling.top_p and max(sampling.top_p, float(np.finfo(np.float32).tiny)),
        "stop_token": -1 if sampling.stop_token is None else sampling.stop_token,
        "changes_logits": sampling.changes_logits,
    }
    return {getattr(placeholders, name): value for name, value in values.items()}
