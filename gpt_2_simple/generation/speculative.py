"""A text so far in, likely next tokens out, and texts that grow by them: speculative decoding.

Each proposed token is compared with the token that decoding chooses in its place, with the same
random number, and the first one that differs ends the proposal. So texts are those of plain
decoding, greedy and drawn ones alike; only rounding may differ, as between batches. For proposals
that are certain, as those of prompt lookup are, this accepts a token as often as the rejection
sampling of Leviathan et al. (2022, arXiv:2211.17192) and Chen et al. (2023, arXiv:2302.01318).
"""

from __future__ import annotations

import abc
import time
from collections.abc import Generator, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from .. import session
from . import sequences
from .kv_cache import model_precision
from .sampling import HEALTHY, check_status
from .settings import PROMPT_LOOKUP

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

# Tokens before the second look at whether speculation pays.
FIRST_BLOCK = 4

# A draft model starts as if so many of so many tokens had been accepted. Where it is not asked, its
# counts return to that by this factor a token: in about 200 tokens it gets another chance.
DRAFT_PRIOR, RECOVERY = (3.6, 4.0), 0.995


def strategy(
    sess: tf.compat.v1.Session, speculative: str | None, draft: tf.compat.v1.Session | None
) -> Speculation | None:
    """What a request's settings mean; None for plain decoding."""
    if draft is not None:
        return DraftSpeculation(draft, _n_weights(draft) / _n_weights(sess))
    return LookupSpeculation() if speculative == PROMPT_LOOKUP else None


def _n_weights(sess: tf.compat.v1.Session) -> int:
    """Weights that a token reads, about: its time is the time to read them."""
    sizes = session.graph_state(sess).hparams
    return 12 * sizes.n_layer * sizes.n_embd**2 + sizes.n_vocab * sizes.n_embd


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


def choose_length(
    acceptances: Sequence[float], n_rows: int, limit: int, draft_cost: float = 0.0
) -> int:
    """How many tokens to propose, 0 if plain decoding is quicker.

    Of k proposed tokens, each right with a probability a, so many come with the token after them:
    (1 - a ** (k + 1)) / (1 - a) (Leviathan et al. 2022, equation 1).

    Args:
        acceptances: the probability for each row that has a proposal.
        n_rows: all rows; those without a proposal get one token.
        limit: tokens to propose, at most.
        draft_cost: what it takes to propose a token, as a share of decoding one.
    """
    best, gain = 0, MIN_GAIN
    plain = 1.0 if n_rows == 1 else PASS_COST + TOKEN_COST * n_rows
    expected = float(n_rows)
    for count in range(1, limit + 1):
        expected += sum(a**count for a in acceptances)
        cost = (PASS_COST + TOKEN_COST * n_rows * (count + 1)) / plain + draft_cost * count
        if expected / n_rows / cost > gain:
            best, gain = count, expected / n_rows / cost
    return best


class Speculation(abc.ABC):
    """Generates by proposals where that pays, and plainly where it does not."""

    max_block = 32  # tokens between two looks at whether speculation pays, at most
    sessions: Sequence[tf.compat.v1.Session] = ()  # see sequences.Strategy

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
        emitter = _Emitter(rows, chunk)
        block, pace = FIRST_BLOCK, 0.0
        n_plain = 0  # tokens until the next look
        try:
            generation.add(rows)
            self._begin(rows)
            while emitter.is_open(length):
                generation.slide_windows()
                growing = [row for row in generation.rows if _grows(row)]
                before = {row: len(row.tokens) for row in growing}
                proposals = {} if n_plain else self._propose(generation, growing)
                if proposals:
                    generation.verify([proposals.get(row, []) for row in generation.rows])
                    self.n_passes, block = self.n_passes + 1, 1
                elif growing:
                    if not n_plain:
                        n_plain, block = block, min(self.max_block, 2 * block)
                    started = time.monotonic()
                    limits = (min(row.n_missing, generation.room(row)) for row in growing)
                    # The pace decides when tokens are given, not how they are found.
                    steps = int(sequences.CHUNK_SECONDS / pace) if pace else sequences.FIRST_CHUNK
                    steps = max(1, min(n_plain, chunk or steps, steps, *limits))
                    n_new = generation.decode(steps).tokens.shape[1]
                    n_plain -= steps
                    pace = (time.monotonic() - started) / n_new
                for row in growing:
                    self._count(row, row.tokens[before[row] :], proposals.get(row, []))
                    row.ended = row.ended or row.n_generated >= length
                yield from emitter.emit()
                emitter.check(generation)
        finally:
            generation.release()
            self._end()

    def _count(self, row: sequences.Sequence, new: list[int], proposal: list[int]) -> None:
        same = [a == b for a, b in zip(new, proposal, strict=False)]
        self.n_proposed += len(proposal)
        self.n_accepted += (*same, False).index(False)
        self._observe(row, new, proposal)

    @abc.abstractmethod
    def _begin(self, rows: list[sequences.Sequence]) -> None:
        """Meets the rows before they grow."""

    @abc.abstractmethod
    def _propose(
        self, generation: sequences.Generation, rows: list[sequences.Sequence]
    ) -> dict[sequences.Sequence, list[int]]:
        """Proposals for some of the growing rows; none at all if plain decoding is quicker."""

    @abc.abstractmethod
    def _observe(self, row: sequences.Sequence, new: list[int], proposal: list[int]) -> None:
        """Is told which tokens came, and what was proposed for them, if anything."""

    @abc.abstractmethod
    def _end(self) -> None:
        """Frees what it holds; runs nothing, as the garbage collector may have ended the rows."""


def _longest_proposals(
    generation: sequences.Generation, rows: Iterable[sequences.Sequence]
) -> dict[sequences.Sequence, int]:
    """Each row may have so many proposed tokens: one more is generated."""
    return {row: min(row.n_missing, generation.room(row)) - 1 for row in rows}


class LookupSpeculation(Speculation):
    """Proposes by prompt lookup."""

    def _begin(self, rows: list[sequences.Sequence]) -> None:
        self.lookups = {row: PromptLookup(row.tokens) for row in rows}

    def _propose(
        self, generation: sequences.Generation, rows: list[sequences.Sequence]
    ) -> dict[sequences.Sequence, list[int]]:
        found = [row for row in rows if self.lookups[row].propose(1)]
        most = _longest_proposals(generation, found)
        limit = min(MAX_PROPOSAL, max(most.values(), default=0))
        count = choose_length([self.lookups[row].acceptance for row in found], len(rows), limit)
        return {row: self.lookups[row].propose(min(count, most[row])) for row in found if count}

    def _observe(self, row: sequences.Sequence, new: list[int], _proposal: list[int]) -> None:
        self.lookups[row].observe(new)

    def _end(self) -> None:
        self.lookups = {}


class _Draft(NamedTuple):
    """A row of the draft model."""

    sequence: sequences.Sequence
    counts: list[float]  # of accepted and of all proposed tokens, decayed


class DraftSpeculation(Speculation):
    """Proposes what a smaller model with the same vocabulary generates.

    It draws with the random numbers that the larger model will draw with.
    """

    max_block = 256

    def __init__(self, sess: tf.compat.v1.Session, cost: float) -> None:
        """The session holds the draft model; see choose_length for its cost."""
        super().__init__()
        self.sessions, self.cost = [sess], cost

    def _begin(self, rows: list[sequences.Sequence]) -> None:
        self.generation = sequences.Generation(self.sessions[0])
        n_ctx = self.generation.hparams.n_ctx
        self.drafts = {}
        for row in rows:
            draft = sequences.Sequence(list(row.tokens), row.sampling, row.length, row.stream)
            draft.window_start = 0 if draft.n_cached < n_ctx else len(row.tokens) - n_ctx // 2
            self.drafts[row] = _Draft(draft, list(DRAFT_PRIOR))
        self.generation.add([draft.sequence for draft in self.drafts.values()])

    def _end(self) -> None:
        if hasattr(self, "generation"):
            self.generation.release()

    def _propose(
        self, generation: sequences.Generation, rows: list[sequences.Sequence]
    ) -> dict[sequences.Sequence, list[int]]:
        most = _longest_proposals(generation, rows)
        limit = min(MAX_PROPOSAL, max(most.values(), default=0))
        shares = [self.drafts[row].counts[0] / self.drafts[row].counts[1] for row in rows]
        count = choose_length(shares, len(rows), limit, self.cost)
        if not count:
            return {}
        self._catch_up()
        sequences_ = [self.drafts[row].sequence for row in rows]
        count = min(count, *map(self.generation.room, sequences_))
        for row, draft in zip(rows, sequences_, strict=True):
            draft.unused = row.draw(count)
            row.put_back(draft.unused)
        self.generation.decode(count)
        found = {
            row: draft.tokens[len(row.tokens) :][: most[row]]
            for row, draft in zip(rows, sequences_, strict=True)
        }
        return {row: proposal for row, proposal in found.items() if proposal}

    def _catch_up(self) -> None:
        """Gives the draft model's rows the texts as they are now."""
        n_cached: dict[sequences.Sequence, int] = {}
        for row, (draft, _) in self.drafts.items():
            pairs = zip(draft.tokens, row.tokens, strict=False)
            n_same = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
            if n_same is None:
                n_same = min(len(draft.tokens), len(row.tokens))
            n_cached[draft] = min(n_same, len(draft.tokens) - 1)
            draft.tokens, draft.n_generated = list(row.tokens), row.n_generated
            draft.ended, draft.status = not _grows(row), HEALTHY
        starts = {draft: draft.window_start for draft in n_cached}
        self.generation.slide_windows()
        missing = []
        for draft in self.generation.rows:
            is_new = draft.ended or draft.window_start != starts[draft]
            first = len(draft.tokens) if is_new else n_cached[draft] + 1
            missing.append(draft.tokens[first:])
        if any(missing):
            for draft, tokens in zip(self.generation.rows, missing, strict=True):
                del draft.tokens[len(draft.tokens) - len(tokens) :]
            self.generation.extend(missing)

    def _observe(self, row: sequences.Sequence, new: list[int], proposal: list[int]) -> None:
        counts = self.drafts[row].counts
        for token, guess in zip(new, proposal, strict=False):
            counts[:] = DECAY * counts[0] + (token == guess), DECAY * counts[1] + 1
        if not proposal:  # in another place of the text, the draft model may do better
            kept = RECOVERY ** len(new)
            for i, prior in enumerate(DRAFT_PRIOR):
                counts[i] = kept * counts[i] + (1 - kept) * prior


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
