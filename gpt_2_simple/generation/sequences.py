"""Token ids in, new token ids out: sequences that grow together, a chunk of tokens at a time.

A generation keeps its cache in the session between one chunk and the next; see kv_cache. Row i of
the cache holds the keys and values of sequence i, from the first column on. Sequences come and go
between chunks.
"""

from __future__ import annotations

import dataclasses
import random
import time
from collections import abc
from typing import Any, NamedTuple, Protocol

import numpy as np
import tensorflow as tf

from .. import session
from ..common.checks import check_whole
from ..common.report import warn
from .decode import Likeliest, StepInputs, build_decode, build_prefill, build_verify
from .kv_cache import (
    SessionGenerator,
    build_copy_rows,
    build_grow,
    build_once,
    build_rearrange,
    cache_ops,
    free_unused,
    model_precision,
    run,
    unused_keys,
)
from .memory_plan import cache_bytes
from .operations import operations_for
from .sampling import HEALTHY, check_status, sampling_feeds
from .settings import MAX_TOKENS_PER_RUN, SamplingParams
from .stopping import ends_with

# Columns by which a full cache grows at least. Each growth copies the cache, and each unused column
# costs some work.
MIN_CACHE_GROWTH = 64

# A chunk of new tokens should take this long: Ctrl-C and streams wait for its end.
CHUNK_SECONDS = 0.4
FIRST_CHUNK, MAX_CHUNK = 4, 64


class Strategy(Protocol):
    """Another way to find the tokens of plain decoding; see speculative."""

    sessions: abc.Sequence[tf.compat.v1.Session]  # further ones that it generates in

    def generate(
        self, generation: Generation, rows: list[Sequence], length: int, chunk: int | None
    ) -> abc.Generator[np.ndarray, Any, None]:
        """As generate_tokens, for a generation without rows yet."""


def generate_tokens(
    sess: tf.compat.v1.Session,
    prefixes: abc.Sequence[abc.Sequence[int]],
    length: int,
    sampling: SamplingParams | abc.Sequence[SamplingParams] | None = None,
    seed: int | None = None,
    row_ids: abc.Sequence[int] | None = None,
    chunk: int | None = None,
    strategy: Strategy | None = None,
) -> abc.Generator[np.ndarray, Any, None]:
    """Continues token sequences.

    A row whose context is full continues from its last n_ctx // 2 tokens. A row's tokens depend on
    its own prefix, settings, the seed and its id, and not on the other rows (except for rounding,
    where two tokens are equally likely to seven digits).

    Args:
        sess: a session that holds a model.
        prefixes: token ids, at least one a row; the rows may differ in length.
        length: new tokens a row.
        sampling: how to choose; a list has one for each row; None for the defaults.
        seed: a whole number; None draws one.
        row_ids: whole numbers that distinguish rows with the same seed; None counts from 0.
        chunk: tokens in a chunk, at most; None for chunks of about half a second.
        strategy: how to find the tokens; None for one after the other.

    Returns:
        A generator of chunks, int32 [rows, time]: `length` columns in all, or fewer when all rows
        end. After a row's end its tokens are -1. `send` a bool [rows] to end rows. Closing the
        generator frees what it holds in the session.

    Raises:
        ValueError: an argument is out of range; during generation, no token is left to choose.
        RuntimeError: the session is closed or holds no model; during generation, the weights are
            not finite numbers.
    """
    length = check_whole("length", length, 1)
    of_rows = _each_row("sampling", sampling or SamplingParams(), len(prefixes))
    prefixes = fit_prefixes(sess, prefixes, length, of_rows)
    if chunk is not None:
        chunk = check_whole("chunk", chunk, 1)
    seed = random.SystemRandom().getrandbits(64) if seed is None else seed
    seed = check_whole("seed", seed, -(2**63))
    ids = _each_row("row_ids", range(len(prefixes)) if row_ids is None else row_ids, len(prefixes))
    rows = [
        Sequence(list(prefix), params, length, random_stream(seed, row_id))
        for prefix, params, row_id in zip(prefixes, of_rows, ids, strict=True)
    ]
    if strategy is None:
        return SessionGenerator(sess, _generate(Generation(sess), rows, length, chunk))
    chunks = SessionGenerator(sess, strategy.generate(Generation(sess), rows, length, chunk))
    for further in strategy.sessions:
        chunks = SessionGenerator(further, chunks)
    return chunks


def _each_row(name: str, values: Any, n_rows: int) -> abc.Sequence[Any]:
    values = [values] * n_rows if isinstance(values, SamplingParams) else values
    if len(values) != n_rows:
        raise ValueError(f"{len(values)} {name} for {n_rows} prefixes; give one each")
    return list(values)


def random_stream(seed: int, row_id: int) -> np.random.Philox:
    """The random numbers of a row; they depend on the seed and its id alone."""
    return np.random.Philox(key=np.array([seed % 2**64, int(row_id) % 2**64], np.uint64))


def fit_prefixes(
    sess: tf.compat.v1.Session,
    prefixes: abc.Sequence[abc.Sequence[int]],
    length: int,
    sampling: abc.Iterable[SamplingParams],
) -> list[list[int]]:
    """Checks arguments as generate_tokens() says; cuts prefixes that are longer than the context.

    `length` is checked already. The end of such a prefix stays, with room for new tokens after it.
    """
    hparams = session.graph_state(sess).hparams
    n_ctx, n_vocab = hparams.n_ctx, hparams.n_vocab
    checked = [check_tokens(prefix, n_vocab) for prefix in prefixes]
    if not checked:
        raise ValueError("prefixes=[] must hold at least one prefix")
    for params in dict.fromkeys(sampling):
        check_sampling(params, n_vocab)
    longest, kept = max(map(len, checked)), n_ctx - min(length, n_ctx // 2)
    if longest > n_ctx:
        warn(
            f"a prefix is longer than the context of {n_ctx} tokens: its first {longest - kept} "
            "tokens are not read"
        )
    return [prefix[-kept:] if len(prefix) > n_ctx else prefix for prefix in checked]


def check_sampling(params: SamplingParams, n_vocab: int) -> None:
    """Raises ValueError if the parameters name a token that the vocabulary lacks."""
    if params.stop_token is not None and params.stop_token >= n_vocab:
        raise ValueError(f"stop_token={params.stop_token} must be below {n_vocab}")
    biased = [token for token, _ in params.logit_bias]
    for tokens in (*params.bad_words, *([biased] if biased else [])):
        check_tokens(tokens, n_vocab)


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
    sampling: SamplingParams
    length: int  # new tokens, at most
    stream: np.random.Philox | None = None  # the n-th number draws the n-th new token, if at all
    window_start: int = 0  # the model sees the tokens from this one on
    n_generated: int = 0  # new tokens that it has
    ended: bool = False  # whether it needs no more tokens
    status: int = HEALTHY  # see sampling.check_status
    unused: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0))  # random numbers

    def draw(self, count: int) -> np.ndarray:
        """The next random numbers in [0, 1)."""
        assert self.stream is not None
        n_new = max(0, count - len(self.unused))
        new = (self.stream.random_raw(n_new) >> np.uint64(11)) * 2.0**-53
        drawn = np.concatenate([self.unused, new])
        self.unused = drawn[count:]
        return drawn[:count]

    def put_back(self, numbers: np.ndarray) -> None:
        """Lets random numbers be drawn again, before all others."""
        self.unused = np.concatenate([numbers, self.unused])

    @property
    def cached_tokens(self) -> tuple[int, ...]:
        """The tokens that the cache holds: all that the model sees except the last one."""
        return tuple(self.tokens[self.window_start : -1])

    @property
    def n_cached(self) -> int:
        """How many tokens the cache holds."""
        return len(self.tokens) - 1 - self.window_start

    @property
    def n_missing(self) -> int:
        """How many new tokens it still needs."""
        return 0 if self.ended else self.length - self.n_generated


class Chunk(NamedTuple):
    """The new tokens of a generation's rows."""

    tokens: np.ndarray  # int32 [rows, time]; -1 after a row's end or fault
    likeliest: Likeliest | None  # if they were asked for


class PrefillPiece(NamedTuple):
    """What a step of Generation.join() has computed."""

    likeliest: Likeliest | None  # of its tokens, if they were asked for
    is_last: bool  # whether the sequences join in the next step, which computes nothing


class Generation:
    """Sequences that grow together, and their cache in the session."""

    def __init__(self, sess: tf.compat.v1.Session) -> None:
        """Starts with no rows."""
        self.sess, self.cache_ops, self.unused = sess, cache_ops(sess), unused_keys(sess)
        self.hparams = session.graph_state(sess).hparams
        self.rows: list[Sequence] = []  # row i of the cache is rows[i]'s
        self.n_slots = self.capacity = 0  # the cache's rows and columns, in use or not
        self.joining = range(0)  # the cache's rows that are being prefilled for new sequences
        self.joining_columns = 0
        self.key = random.SystemRandom().getrandbits(62)  # no other generation uses it

    # --- rows come and go -------------------------------------------------------------------------

    def add(self, rows: list[Sequence]) -> None:
        """Adds sequences, which grow from the next chunk on."""
        for _ in self.join(rows):
            pass

    def join(
        self, rows: list[Sequence], max_tokens: int = MAX_TOKENS_PER_RUN, n_likeliest: int = -1
    ) -> abc.Iterator[PrefillPiece]:
        """Adds sequences step by step; between two steps the other rows may grow, and leave.

        Each step computes the keys and values of up to max_tokens tokens. Equal prefixes are
        computed once. Each step gives Likeliest for its tokens if n_likeliest is 0 or above; the
        columns are then those of the prefixes, from their second token on.
        """
        contexts = list(dict.fromkeys(row.cached_tokens for row in rows))
        contexts.sort(key=len, reverse=True)  # for _prefill
        self.joining_columns = len(contexts[0])
        first = len(self.rows)
        self._make_room(first + len(rows), self.joining_columns)
        self.joining = range(first, first + len(contexts))
        next_tokens = [rows[0].tokens[1:]] if n_likeliest >= 0 else None
        try:
            yield from self._prefill(contexts, max_tokens, next_tokens, n_likeliest)
            targets = range(len(self.rows), len(self.rows) + len(rows))
            sources = [self.joining[contexts.index(row.cached_tokens)] for row in rows]
            self._make_room(targets.stop, 0)
            self._copy_rows(sources, targets)
            self.rows += rows
        finally:
            self.joining, self.joining_columns = range(0), 0

    def _prefill(
        self,
        contexts: list[tuple[int, ...]],
        max_tokens: int,
        next_tokens: list[list[int]] | None = None,
        n_likeliest: int = -1,
        first_row: int | None = None,
    ) -> abc.Iterator[PrefillPiece]:
        """Computes the cache's rows from `first_row` on, or else those that are joining.

        No context is longer than the one before it: those that go on in a piece are the first rows.
        """
        ops, start, longest = build_once(self.sess, build_prefill), 0, len(contexts[0])
        while start < longest:
            contexts = [context for context in contexts if len(context) > start]
            end = min(start + max(1, max_tokens // len(contexts)), longest)
            pieces = [context[start:end] for context in contexts]
            feeds = {
                ops.cache_key: self.key,
                ops.first_row: self.joining.start if first_row is None else first_row,
                ops.first_column: start,
                ops.tokens: [[*piece] + [0] * (end - start - len(piece)) for piece in pieces],
            }
            likeliest = None
            if next_tokens is None:
                run(self.sess, ops.run, feeds)
            else:
                feeds[ops.next_tokens] = [line[start:end] for line in next_tokens]
                feeds[ops.n_likeliest] = n_likeliest
                _, likeliest = run(self.sess, [ops.run, ops.likeliest], feeds)
            yield PrefillPiece(likeliest, end == longest)
            start = end

    def remove(self, rows: abc.Collection[Sequence]) -> None:
        """Removes sequences; once many leave, the cache becomes smaller."""
        leaving = set(map(id, rows))
        kept = [row for row in self.rows if id(row) not in leaving]
        if len(kept) == len(self.rows):
            return
        if 4 * (len(self.rows) - len(kept)) > len(self.rows) or 2 * self._needed(kept) < (
            self.capacity - MIN_CACHE_GROWTH
        ):
            self._rearrange([self.rows.index(row) for row in kept], self._needed(kept))
            self.rows = kept
            return
        # The last rows fill the holes, so that little is copied.
        stay = self.rows[: len(kept)]
        fillers = [row for row in self.rows[len(kept) :] if id(row) not in leaving]
        holes = [i for i, row in enumerate(stay) if id(row) in leaving]
        self._copy_rows([self.rows.index(row) for row in fillers], holes)
        for i, row in zip(holes, fillers, strict=True):
            stay[i] = row
        self.rows = stay

    def _needed(self, rows: abc.Iterable[Sequence]) -> int:
        """The columns that these rows and the joining ones use."""
        return max([self.joining_columns, *(row.n_cached for row in rows)])

    def n_bytes(self, n_rows: int, n_columns: int) -> int:
        """The bytes that the cache takes once it has so many rows and columns, at least."""
        n_slots, columns = max(self.n_slots, n_rows), max(self.capacity, n_columns)
        return cache_bytes(self.hparams, n_slots, columns)

    def _make_room(self, n_rows: int, n_columns: int) -> None:
        """Gives the cache so many rows and columns at least."""
        n_slots, columns = max(self.n_slots, n_rows), max(self.capacity, n_columns)
        if not self.n_slots:
            ops = self.cache_ops
            shape = {ops.rows: n_slots, ops.capacity: columns}
            run(self.sess, ops.free, {ops.key: self.key})
            run(self.sess, ops.allocate, {ops.key: self.key, **shape})
            self.n_slots, self.capacity = n_slots, columns
        elif n_slots > self.n_slots or columns > self.capacity:
            added = n_slots - self.n_slots, columns - self.capacity
            self._rearrange(range(self.n_slots), self.capacity, added)

    def _rearrange(
        self, slots: abc.Sequence[int], kept_columns: int, added: tuple[int, int] = (0, 0)
    ) -> None:
        """Copies these rows of the cache and their first columns; then joining rows, if not yet."""
        joining = [slot for slot in self.joining if slot not in slots]
        ops = build_once(self.sess, build_rearrange)
        feeds = {
            ops.key: self.key,
            ops.rows: [*slots, *joining],
            ops.kept_columns: kept_columns,
            ops.added: added,
        }
        run(self.sess, ops.run, feeds)
        if joining:
            self.joining = range(len(slots), len(slots) + len(joining))
        self.n_slots = len(slots) + len(joining) + added[0]
        self.capacity = kept_columns + added[1]

    def _copy_rows(self, sources: abc.Sequence[int], targets: abc.Sequence[int]) -> None:
        pairs = [(s, t) for s, t in zip(sources, targets, strict=True) if s != t]
        if pairs:
            ops = build_once(self.sess, build_copy_rows)
            feeds = {ops.sources: [s for s, _ in pairs], ops.targets: [t for _, t in pairs]}
            run(self.sess, ops.run, {ops.key: self.key, **feeds})

    # --- rows grow --------------------------------------------------------------------------------

    def room(self, row: Sequence) -> int:
        """New tokens before the row's context is full."""
        return self.hparams.n_ctx if row.ended else self.hparams.n_ctx - row.n_cached

    def slide_windows(self) -> None:
        """Moves the windows of full contexts; removes ended rows once they are many."""
        full = [row for row in self.rows if self.room(row) < 1]
        ended = [row for row in self.rows if row.ended]
        for row in full:
            row.window_start = len(row.tokens) - max(1, self.hparams.n_ctx // 2)
        if full or 4 * len(ended) > len(self.rows):
            self.remove(ended)
        if full:
            self._refill(full)

    def _refill(self, rows: list[Sequence]) -> None:
        """Computes the cache of these rows, whose windows have moved."""
        longest = self._needed(self.rows)
        if longest < self.capacity:
            self._rearrange(range(len(self.rows)), longest)
        slots = [self.rows.index(row) for row in rows]
        while slots:  # a run of neighbours after the other
            count = next((i for i, slot in enumerate(slots) if slot != slots[0] + i), len(slots))
            contexts = [self.rows[slot].cached_tokens for slot in slots[:count]]
            if any(contexts):
                for _ in self._prefill(contexts, MAX_TOKENS_PER_RUN, first_row=slots[0]):
                    pass
            slots = slots[count:]

    def decode(self, steps: int, n_likeliest: int = -1) -> Chunk:
        """Generates up to `steps` tokens for each row; fewer if all rows end.

        The rows get the tokens, and a fault's status. With n_likeliest of 0 or above, the chunk
        holds the tokens' log-probabilities, and those of so many of the likeliest.
        """
        ops = build_once(self.sess, build_decode, operations_for(self.sess, len(self.rows) == 1))
        self.grow(steps)
        feeds: dict[Any, Any] = {
            **self.step_feeds(ops),
            ops.text_tokens: self.text_tokens(steps),
            ops.uniform: np.array([row.draw(steps) for row in self.rows]).T,
            ops.ended: [row.ended for row in self.rows],
            ops.n_likeliest: n_likeliest,
        }
        tokens, status, likeliest, _ = run(
            self.sess, [ops.tokens, ops.status, ops.likeliest, ops.run], feeds
        )
        for row, new, fault in zip(self.rows, tokens, status.tolist(), strict=True):
            row.tokens.extend(new[new >= 0].tolist())
            row.n_generated += new.size
            row.ended = row.ended or ends_with(row.tokens, row.sampling.stop_token)
            row.status = fault
        return Chunk(tokens, likeliest if n_likeliest >= 0 else None)

    def verify(self, proposals: abc.Sequence[abc.Sequence[int]]) -> None:
        """Generates tokens for each row in one pass, where the next ones are guessed.

        Args:
            proposals: for each row its guessed tokens, any number of them, at least one over all.
                A row gets those that are right, and the token after them. Room and length of a row
                must hold one token more than its proposal has.
        """
        ops = build_once(self.sess, build_verify, operations_for(self.sess))
        longest = max(map(len, proposals))
        uniform = np.array([row.draw(longest + 1) for row in self.rows])
        self.grow(longest + 1)
        feeds = {
            **self.step_feeds(ops, longest + 1),
            ops.proposals: [[*p] + [0] * (longest - len(p)) for p in proposals],
            ops.text_tokens: self.text_tokens(0, longest),
            ops.uniform: uniform,
        }
        found = run(self.sess, [ops.tokens, ops.status, ops.run], feeds)[:2]
        for row, proposal, tokens, status, numbers in zip(
            self.rows, proposals, *found, uniform, strict=True
        ):
            if row.ended or row.status != HEALTHY:
                continue
            same = (*(tokens[: len(proposal)] == proposal), False)
            new = tokens[: same.index(False) + 1].tolist()
            faults = np.flatnonzero(status[: len(new)])
            if faults.size:
                new, row.status = new[: faults[0]], int(status[faults[0]])
            if row.sampling.stop_token in new:
                new = new[: new.index(row.sampling.stop_token) + 1]
                row.ended, row.status = True, HEALTHY
            row.tokens.extend(new)
            row.n_generated += len(new)
            row.put_back(numbers[len(new) :])

    def extend(self, given: abc.Sequence[abc.Sequence[int]]) -> None:
        """Adds given tokens to each row, some or none, which fit in its window."""
        ops = build_once(self.sess, build_verify, operations_for(self.sess))
        longest = max(1, *map(len, given))
        proposals = np.zeros([len(self.rows), longest - 1], np.int32)
        for line, tokens in zip(proposals, given, strict=True):
            line[: max(0, len(tokens) - 1)] = tokens[:-1]
        self.grow(longest)
        run(self.sess, ops.run, {**self.step_feeds(ops), ops.proposals: proposals})
        for row, tokens in zip(self.rows, given, strict=True):
            row.tokens.extend(tokens)

    def check(self) -> None:
        """Raises check_status()'s errors for the rows that have not ended."""
        status = [row.status for row in self.rows if not row.ended]
        check_status(np.array(status), model_precision(self.sess))

    @property
    def _columns(self) -> list[int]:
        """The column of each row's last token, which is not in the cache yet."""
        return [0 if row.ended else row.n_cached for row in self.rows]

    def grow(self, steps: int) -> None:
        """Gives the cache columns for the next `steps` tokens, and for more if it lacks some."""
        columns = self._columns
        missing = max(columns) + steps - self.capacity
        remaining = max(row.n_missing for row in self.rows)
        if len(set(columns)) > 1:
            ends = (c + row.n_missing for c, row in zip(columns, self.rows, strict=True))
            remaining = max(ends) - self.capacity
        added = min(max(missing, MIN_CACHE_GROWTH), max(missing, remaining)) if missing > 0 else 0
        if added:
            ops = build_once(self.sess, build_grow)
            run(self.sess, ops.run, {ops.key: self.key, ops.added_columns: added})
            self.capacity += added

    def step_feeds(self, inputs: StepInputs, n_places: int = 1) -> dict[Any, Any]:
        """Feeds for the next tokens, except text_tokens; the cache has room for them, see grow().

        The settings of sampling are fed `n_places` times for each row.
        """
        sampling = [row.sampling for row in self.rows for _ in range(n_places)]
        return {
            inputs.cache_key: self.key,
            inputs.last_tokens: [row.tokens[-1] for row in self.rows],
            inputs.columns: self._columns,
            inputs.n_generated: [row.n_generated for row in self.rows],
            **sampling_feeds(inputs.sampling, sampling, self.hparams.n_vocab),
        }

    def text_tokens(self, steps: int, n_pads: int = 0) -> np.ndarray:
        """The texts [rows, time] for StepInputs.text_tokens, with room for `steps` tokens.

        `n_pads` further -1 stand on the left.
        """
        if not any(row.sampling.changes_logits for row in self.rows):
            return np.zeros([len(self.rows), 0], np.int32)
        words = [len(word) for row in self.rows for word in row.sampling.bad_words]
        width = max(*words, *(len(row.tokens) for row in self.rows), 1) + n_pads
        tokens = np.full([len(self.rows), width + steps], -1, np.int32)
        for row, line in zip(self.rows, tokens, strict=True):
            line[width - len(row.tokens) : width] = row.tokens
        return tokens

    # --- the cache's life -------------------------------------------------------------------------

    def release(self) -> None:
        """Leaves its cache to the session's next free_unused(); runs nothing."""
        self.unused.append(self.key)

    def free(self) -> None:
        """Removes its cache from the session."""
        self.release()
        free_unused(self.sess)


def _generate(
    generation: Generation, rows: list[Sequence], length: int, chunk: int | None
) -> abc.Generator[np.ndarray, Any, None]:
    """Yields the new tokens of all rows; see generate_tokens. At its end the cache is unused."""
    steps, n_generated = FIRST_CHUNK, 0
    try:
        generation.add(rows)
        while n_generated < length and not all(row.ended for row in rows):
            generation.slide_windows()
            started = time.monotonic()
            limit = min(length - n_generated, *map(generation.room, generation.rows))
            new = generation.decode(min(chunk or steps, limit)).tokens
            n_generated += new.shape[1]
            pace = (time.monotonic() - started) / new.shape[1]
            steps = max(1, min(MAX_CHUNK, 2 * steps, int(CHUNK_SECONDS / pace)))
            tokens = np.full([len(rows), new.shape[1]], -1, np.int32)
            for row, row_tokens in zip(generation.rows, new, strict=True):
                tokens[rows.index(row)] = row_tokens
            ended = yield tokens
            if ended is not None:
                for row, has_ended in zip(rows, ended, strict=True):
                    row.ended = row.ended or bool(has_ended)
            # Only now: a text that ended before the fault is whole, however long the chunk was.
            generation.check()
    finally:
        generation.release()
