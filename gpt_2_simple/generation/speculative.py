"""A text so far in, likely next tokens out, and texts that grow by them: speculative decoding.

Each proposed token is compared with the token that decoding chooses in its place, with the same
random number, and the first one that differs ends the proposal. So texts are those of plain
decoding, greedy and drawn ones alike; only rounding may differ, as between batches. For proposals
that are certain, as those of prompt lookup are, this accepts a token as often as the rejection
sampling of Leviathan et al. (2022, arXiv:2211.17192) and Chen et al. (2023, arXiv:2302.01318).
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterable, Sequence
from typing import Any

import numpy as np

from . import sequences
from .kv_cache import model_precision
from .sampling import HEALTHY, check_status

# Prompt lookup finds earlier places of the last so many tokens, the longest first.
NGRAM_SIZES = (3, 2)

# Proposed tokens a row, at most.
MAX_PROPOSAL = 15

# What is left of an observation's weight after the next: the share of accepted tokens is that of
# the last 7 or so.
DECAY = 0.85

# A text starts as if so many tokens had been proposed wrongly.
PRIOR_MISSES = 4.0

# What a pass for n tokens takes, over all rows: PASS_COST + TOKEN_COST * n, in units of a pass for
# one token. From 124M on two cores. Decisions come from counts and these numbers, never from a
# clock, so that a text is repeatable to the last bit.
PASS_COST, TOKEN_COST = 1.5, 0.09

# Speculation must promise so many times the tokens of plain decoding in the same time.
MIN_GAIN = 1.25

# Tokens between two looks at whether speculation pays: at the start, and at most.
FIRST_BLOCK, MAX_BLOCK = 4, 32


class PromptLookup:
    """Proposes what followed the text's last tokens where they came before (Saxena 2023).

    It also watches how often it is right, whether its proposals are used or not.
    """

    def __init__(self, tokens: Iterable[int]) -> None:
        """Starts with a text's tokens."""
        self.tokens: list[int] = []
        self.hits, self.trials = 0.0, PRIOR_MISSES  # decayed counts of tokens
        self._source: int | None = None  # the place of the token that is expected next
        self._ends: dict[tuple[int, ...], int] = {}  # the place after each n-gram's last occurrence
        self.observe(tokens)

    @property
    def acceptance(self) -> float:
        """The share of tokens that were, or would have been, proposed rightly lately."""
        return self.hits / self.trials

    def propose(self, count: int) -> list[int]:
        """The tokens that may come next, so many or none."""
        if self._source is None:
            return []
        # What it copies may reach into the proposal itself, where a short text repeats.
        period = self.tokens[self._source :]
        return [period[i % len(period)] for i in range(count)]

    def observe(self, tokens: Iterable[int]) -> None:
        """Adds tokens that came."""
        for token in tokens:
            is_hit = self._source is not None and self.tokens[self._source] == token
            self.hits = DECAY * self.hits + is_hit
            self.trials = DECAY * self.trials + 1
            self._source = self._source + 1 if is_hit and self._source is not None else None
            self.tokens.append(token)
            end = len(self.tokens)
            for size in NGRAM_SIZES:
                if size <= end:
                    ngram = tuple(self.tokens[-size:])
                    if self._source is None:
                        self._source = self._ends.get(ngram)
                    self._ends[ngram] = end


def choose_length(acceptances: Sequence[float], n_rows: int, limit: int) -> int:
    """How many tokens to propose, 0 if plain decoding is quicker.

    Of k proposed tokens, each right with a probability a, so many come with the token after them:
    (1 - a ** (k + 1)) / (1 - a) (Leviathan et al. 2022, equation 1).

    Args:
        acceptances: the probability for each row that has a proposal.
        n_rows: all rows; those without a proposal get one token.
        limit: tokens to propose, at most.
    """
    best, gain = 0, MIN_GAIN
    plain = 1.0 if n_rows == 1 else PASS_COST + TOKEN_COST * n_rows
    expected = float(n_rows)
    for count in range(1, limit + 1):
        expected += sum(a**count for a in acceptances)
        cost = (PASS_COST + TOKEN_COST * n_rows * (count + 1)) / plain
        if expected / n_rows / cost > gain:
            best, gain = count, expected / n_rows / cost
    return best


class Speculation:
    """Generates by prompt lookup where that pays, and plainly where it does not."""

    def __init__(self) -> None:
        """Starts without counts."""
        self.n_passes = self.n_proposed = self.n_accepted = 0  # of all its generations

    def generate(
        self,
        generation: sequences.Generation,
        rows: list[sequences.Sequence],
        length: int,
        chunk: int | None,
    ) -> Generator[np.ndarray, Any, None]:
        """As sequences.generate_tokens, for a generation without rows yet."""
        lookups = {row: PromptLookup(row.tokens) for row in rows}
        emitter = _Emitter(rows, chunk)
        block, pace = FIRST_BLOCK, 0.0
        n_plain = 0  # tokens until the next look
        try:
            generation.add(rows)
            while emitter.is_open(length):
                generation.slide_windows()
                growing = [row for row in generation.rows if _grows(row)]
                proposals = {} if n_plain else self._propose(generation, growing, lookups)
                if proposals:
                    self._verify(generation, proposals)
                    block = 1
                elif growing:
                    if not n_plain:
                        n_plain, block = block, min(MAX_BLOCK, 2 * block)
                    started = time.monotonic()
                    limits = (min(row.n_missing, generation.room(row)) for row in growing)
                    # The pace decides when tokens are given, not how they are found.
                    steps = int(sequences.CHUNK_SECONDS / pace) if pace else sequences.FIRST_CHUNK
                    steps = max(1, min(n_plain, chunk or steps, steps, *limits))
                    n_new = generation.decode(steps).tokens.shape[1]
                    n_plain -= steps
                    pace = (time.monotonic() - started) / n_new
                for row in growing:
                    lookups[row].observe(row.tokens[len(lookups[row].tokens) :])
                    row.ended = row.ended or row.n_generated >= length
                yield from emitter.emit()
                emitter.check(generation)
        finally:
            generation.release()

    def _propose(
        self,
        generation: sequences.Generation,
        rows: list[sequences.Sequence],
        lookups: dict[sequences.Sequence, PromptLookup],
    ) -> dict[sequences.Sequence, list[int]]:
        """A proposal for each row that has one; none at all if plain decoding is quicker."""
        found = [row for row in rows if lookups[row].propose(1)]
        most = {row: min(row.n_missing, generation.room(row)) - 1 for row in found}
        limit = min(MAX_PROPOSAL, max(most.values(), default=0))
        count = choose_length([lookups[row].acceptance for row in found], len(rows), limit)
        return {row: lookups[row].propose(min(count, most[row])) for row in found if count}

    def _verify(
        self,
        generation: sequences.Generation,
        proposals: dict[sequences.Sequence, list[int]],
    ) -> None:
        before = {row: len(row.tokens) for row in proposals}
        generation.verify([proposals.get(row, []) for row in generation.rows])
        self.n_passes += 1
        for row, proposal in proposals.items():
            new = row.tokens[before[row] :]
            same = [a == b for a, b in zip(new, proposal, strict=False)]
            self.n_proposed += len(proposal)
            self.n_accepted += (*same, False).index(False)


def _grows(row: sequences.Sequence) -> bool:
    return not row.ended and row.status == HEALTHY


class _Emitter:
    """Gives the new tokens of rows that grow unevenly as chunks in which all have equally many."""

    def __init__(self, rows: list[sequences.Sequence], chunk: int | None) -> None:
        self.rows, self.chunk = rows, chunk
        self.n_emitted = 0
        self._starts = [len(row.tokens) for row in rows]

    def is_open(self, length: int) -> bool:
        """Whether more chunks may come."""
        return self.n_emitted < length and not all(row.ended for row in self.rows)

    def _waiting(self) -> list[int]:
        """How many tokens of each row were not given yet."""
        starts = zip(self.rows, self._starts, strict=True)
        return [len(row.tokens) - start - self.n_emitted for row, start in starts]

    def emit(self) -> Generator[np.ndarray, Any, None]:
        """Yields what all rows have that still grow; `send` as in sequences.generate_tokens."""
        while True:
            waiting = self._waiting()
            pairs = list(zip(self.rows, waiting, strict=True))
            n_new = min((n for row, n in pairs if _grows(row)), default=max(waiting))
            n_new = min(n_new, self.chunk or n_new)
            if n_new < 1:
                return
            tokens = np.full([len(self.rows), n_new], -1, np.int32)
            for line, row, start in zip(tokens, self.rows, self._starts, strict=True):
                first = start + self.n_emitted
                new = row.tokens[first : first + n_new]
                line[: len(new)] = new
            self.n_emitted += n_new
            ended = yield tokens
            self._end([False] * len(self.rows) if ended is None else ended)

    def _end(self, ended: Sequence[bool]) -> None:
        """Ends rows; what they have beyond the tokens that were given is dropped."""
        for row, start, has_ended in zip(self.rows, self._starts, ended, strict=True):
            if has_ended:
                row.ended = True
                del row.tokens[start + self.n_emitted :]

    def check(self, generation: sequences.Generation) -> None:
        """Raises check_status()'s errors for rows that stand at a fault and have not ended."""
        pairs = zip(self.rows, self._waiting(), strict=True)
        status = [row.status for row, n in pairs if not row.ended and n < 1]
        check_status(np.array(status), model_precision(generation.sess))
