"""Prefixes in, their likeliest continuations out: beam search."""

from __future__ import annotations

import dataclasses
import math
from collections import abc
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from ..common.checks import check_whole
from .decode import build_beam_step
from .kv_cache import build_once, model_precision, run
from .operations import operations_for
from .sampling import NOTHING_LEFT, check_status
from .sequences import Generation, Sequence, fit_prefixes
from .settings import Beams, SamplingParams
from .stopping import ends_with


class Hypothesis(NamedTuple):
    """A text that a search found."""

    score: float  # see Beams
    tokens: list[int]  # the new tokens, the stop token included


class Beam(NamedTuple):
    """A text that the search extends."""

    new_tokens: list[int]  # its tokens after the prefix
    log_probability: float  # of its new tokens; -inf for a beam without a text
    parent: int  # number of the beam of the same group whose text it continues


@dataclasses.dataclass(eq=False)
class BeamGroup:
    """The search from one prefix."""

    prefix: list[int]
    rows: list[Sequence]  # they compute the beams, one each
    beams: list[Beam]
    finished: list[Hypothesis] = dataclasses.field(default_factory=list)  # the best first
    done: bool = False


class BeamSearch(Generation):
    """Beam search from several prefixes at once, token by token.

    The search from a prefix is over when as many texts have ended as there are beams and none of
    the beams has a better score, or when the beams have `length` new tokens.
    """

    def __init__(
        self,
        sess: tf.compat.v1.Session,
        prefixes: abc.Sequence[abc.Sequence[int]],
        length: int,
        beams: Beams,
        sampling: SamplingParams | None = None,
        ends: abc.Callable[[list[int]], bool] | None = None,
    ) -> None:
        """Prepares a search; it runs in a `with` block.

        Args:
            sess: a session that holds a model.
            prefixes: token ids, at least one each.
            length: new tokens, at most.
            beams: how many, and how they are compared.
            sampling: its stop_token, min_length and penalties are applied before the softmax; how
                it draws has no effect.
            ends: whether a text with these new tokens ends here; None if only stop_token ends one.

        Raises:
            ValueError: an argument is out of range.
            RuntimeError: the session is closed or holds no model.
        """
        sampling = sampling or SamplingParams()
        length = check_whole("length", length, 1)
        super().__init__(sess)
        self.settings, self.ends, self.length, self.sampling = beams, ends, length, sampling
        self.n_generated = 0  # new tokens that each beam has
        # The beams of a prefix are equal at first: only one of them may be extended.
        start = [Beam([], 0.0, 0), *[Beam([], -math.inf, 0)] * (beams.count - 1)]
        self.groups = [
            BeamGroup(prefix, [Sequence(list(prefix), sampling, length) for _ in start], start)
            for prefix in fit_prefixes(sess, prefixes, length, [sampling])
        ]
        self.parents: list[int] = []  # the cache's row that each of the rows continues from

    def __enter__(self) -> BeamSearch:
        try:
            self.add([row for group in self.groups for row in group.rows])
            self.parents = list(range(len(self.rows)))
        except BaseException:
            self.free()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is GeneratorExit:  # perhaps the garbage collector's; see unused_keys
            self.release()
        else:
            self.free()

    @property
    def done(self) -> bool:
        """Whether the search is over for all prefixes."""
        return all(group.done for group in self.groups)

    def best(self) -> list[list[Hypothesis]]:
        """The texts found for each prefix, the best first; the beams too while it still runs."""
        return [
            sorted(group.finished + ([] if group.done else self._hypotheses(group)), reverse=True)
            for group in self.groups
        ]

    def step(self) -> int:
        """Extends all beams by a token; returns for how many prefixes.

        Raises:
            RuntimeError: the weights are not finite numbers.
            ValueError: the penalties leave no token to choose.
        """
        self._leave_groups()
        ops = build_once(self.sess, build_beam_step, operations_for(self.sess))
        self.grow(1)
        feeds = {
            **self.step_feeds(ops),
            ops.text_tokens: self.text_tokens(0),
            ops.parents: self.parents,
            # Even if every beam has an end among its candidates, enough others are left.
            ops.count: min(2 * self.settings.count, self.hparams.n_vocab),
        }
        fetches = [ops.tokens, ops.log_probabilities, ops.status, ops.run]
        tokens, log_probabilities, status, _ = run(self.sess, fetches, feeds)
        self.n_slots = len(self.rows)
        for row, fault in zip(self.rows, status.tolist(), strict=True):
            row.status = fault
        self.check()
        self.n_generated += 1
        self.parents = list(range(len(self.rows)))
        running = [group for group in self.groups if not group.done]
        for group in running:
            places = [self.rows.index(row) for row in group.rows]
            self._extend(group, tokens[places], log_probabilities[places])
            self._update_finished(group)
            for row, beam in zip(group.rows, group.beams, strict=True):
                row.tokens = group.prefix + beam.new_tokens
                row.ended, row.n_generated = group.done, self.n_generated
                self.parents[self.rows.index(row)] = places[beam.parent]
        return len(running)

    def _leave_groups(self) -> None:
        """Drops the rows of finished searches once they are many; moves full windows."""
        full = [row for row in self.rows if self.room(row) < 1]
        if not full and 4 * sum(row.ended for row in self.rows) <= len(self.rows):
            return
        kept = [(row, p) for row, p in zip(self.rows, self.parents, strict=True) if not row.ended]
        self.rows, self.parents = [row for row, _ in kept], [parent for _, parent in kept]
        self._rearrange(self.parents, self.capacity)
        self.parents = list(range(len(self.rows)))
        self.slide_windows()

    def _extend(self, group: BeamGroup, tokens: np.ndarray, log_probabilities: np.ndarray) -> None:
        """Replaces the beams by their likeliest extensions, given candidates [beams, count]."""
        count = self.settings.count
        beams: list[Beam] = []
        likeliest = _likeliest(group.beams, tokens, log_probabilities, 2 * count)
        first = next(likeliest, None)
        if first is None:
            check_status(np.array([NOTHING_LEFT]), model_precision(self.sess))
        for rank, beam in enumerate(filter(None, [first, *likeliest])):
            if self._has_ended(beam.new_tokens):
                if rank < count:
                    group.finished.append(self._hypothesis(beam))
            elif len(beams) < count:
                beams.append(beam)
        for parent, beam in enumerate(group.beams[: count - len(beams)]):
            beams.append(Beam([*beam.new_tokens, 0], -math.inf, parent))
        group.beams = beams

    def _has_ended(self, new_tokens: list[int]) -> bool:
        is_stopped = ends_with(new_tokens, self.sampling.stop_token)
        return is_stopped or (self.ends is not None and self.ends(new_tokens))

    def _update_finished(self, group: BeamGroup) -> None:
        """Keeps the best of the finished texts; ends the search if none can become better."""
        running = self._hypotheses(group)
        is_last_step = self.n_generated >= self.length
        if is_last_step:
            group.finished += running
        group.finished = sorted(group.finished, reverse=True)[: self.settings.count]
        is_full = len(group.finished) == self.settings.count
        group.done = (
            is_last_step
            or not running
            or (is_full and group.finished[-1].score >= max(running).score)
        )

    def _hypotheses(self, group: BeamGroup) -> list[Hypothesis]:
        """The beams, as if they ended here."""
        beams = [beam for beam in group.beams if beam.log_probability > -math.inf]
        return [self._hypothesis(beam) for beam in beams if beam.new_tokens]

    def _hypothesis(self, beam: Beam) -> Hypothesis:
        score = self.settings.score(beam.log_probability, len(beam.new_tokens))
        return Hypothesis(score, beam.new_tokens)


def _likeliest(
    beams: list[Beam], tokens: np.ndarray, log_probabilities: np.ndarray, count: int
) -> abc.Iterator[Beam]:
    """Yields up to `count` extensions of the beams by candidates [beams, n], the best first."""
    totals = log_probabilities + np.array([[beam.log_probability] for beam in beams])
    totals[np.isnan(totals)] = -math.inf  # all tokens of this beam are forbidden
    for place in np.argsort(-totals, axis=None, kind="stable")[:count]:
        parent, candidate = np.unravel_index(place, totals.shape)
        total = float(totals[parent, candidate])
        if total == -math.inf:
            return
        new_tokens = [*beams[parent].new_tokens, int(tokens[parent, candidate])]
        yield Beam(new_tokens, total, int(parent))
