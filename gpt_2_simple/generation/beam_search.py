"""Prefixes in, their likeliest continuations out: beam search."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from collections.abc import Sequence as Seq
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from .. import session
from .decode import build_beam_step
from .kv_cache import build_once
from .sampling import HEALTHY, NOTHING_LEFT, check_status
from .sequences import Generation, Sequence, checked_prefixes
from .settings import Beams, SamplingParams


class Hypothesis(NamedTuple):
    """A text that a search came upon.

    Attributes:
        score: see Beams.
        tokens: what was added to the prefix, the stop token included.
    """

    score: float
    tokens: list[int]


class _Beam(Sequence):
    """A text that is followed. Its cache is still that of the text that it was made from, `parent`.

    Attributes:
        total: its log-probability after the prefix.
    """

    def __init__(self, text: list[int], total: float) -> None:
        super().__init__(list(text))
        self.parent: _Beam = self
        self.total = total

    def become(self, text: list[int], total: float, parent: _Beam) -> None:
        """Takes over another text of the same length."""
        self.text, self.total, self.parent, self.start = text, total, parent, parent.start


@dataclasses.dataclass(eq=False)
class BeamGroup:
    """The search from one prefix."""

    prefix: int
    beams: list[_Beam]
    found: list[Hypothesis] = dataclasses.field(default_factory=list)
    done: bool = False


class BeamSearch(Generation):
    """Beam search from several prefixes at once, token by token.

    Each prefix is followed until as many texts have ended as there are beams and no other looks
    better, or to `length` tokens.
    """

    def __init__(
        self,
        sess: tf.compat.v1.Session,
        prefixes: Seq[Seq[int]],
        length: int,
        beams: Beams,
        sampling: SamplingParams | None = None,
        ends: Callable[[list[int]], bool] | None = None,
    ) -> None:
        """Begins.

        Args:
            sess: a session that holds a model.
            prefixes: token ids, at least one each.
            length: new tokens at most.
            beams: how many, and how they are compared.
            sampling: its stop_token, min_length and penalties count here, before the softmax; how
                to draw does not.
            ends: whether a text with these new tokens ends here; None for no other ends than
                stop_token.

        Raises:
            ValueError: an argument out of range.
            RuntimeError: the session is closed or holds no model.
        """
        sampling = sampling or SamplingParams()
        texts = checked_prefixes(sess, prefixes, length, sampling)
        self.beams, self.length, self.ends, self.written = beams, length, ends, 0
        # Only one of a prefix's equal beams may branch at first.
        totals = [0.0, *[-math.inf] * (beams.count - 1)]
        self.trees = [BeamGroup(len(text), [_Beam(text, t) for t in totals]) for text in texts]
        super().__init__(sess, [beam for tree in self.trees for beam in tree.beams], sampling)

    def __enter__(self) -> BeamSearch:
        try:
            self.fill(self.key, [])
            self.prime(self.rows)
        except BaseException:
            self.free()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.free()

    @property
    def done(self) -> bool:
        """Whether all is found."""
        return all(tree.done for tree in self.trees)

    def best(self) -> list[list[Hypothesis]]:
        """For each prefix what was found, the best first; before the end, what is followed too."""
        return [
            sorted(tree.found + (self.followed(tree) if not tree.done else []), reverse=True)
            for tree in self.trees
        ]

    def followed(self, tree: BeamGroup) -> list[Hypothesis]:
        """The texts that are followed, as if they ended here."""
        beams = [beam for beam in tree.beams if self.written and beam.total > -math.inf]
        return [self.judge(tree, beam.text, beam.total) for beam in beams]

    def judge(self, tree: BeamGroup, text: list[int], total: float) -> Hypothesis:
        """What is there of a text."""
        new = text[tree.prefix :]
        return Hypothesis(self.beams.score(total, len(new)), new)

    def prime(self, rows: list[Sequence]) -> None:
        """As for any call; afterwards these beams have caches of their own."""
        super().prime(rows)
        for beam in rows:
            beam.parent = beam

    def step(self) -> int:
        """Goes a token further; returns for how many prefixes.

        Raises:
            RuntimeError: the weights are not numbers.
            ValueError: the penalties leave nothing to choose from.
        """
        self.make_room()
        branch = build_once(self.sess, build_beam_step)
        hparams = session.graph_state(self.sess).hparams
        feeds = {
            **self.feeds(branch, 1, self.written, self.length),
            branch.parents: [self.live.index(row.parent) for row in self.live],
            branch.count: min(2 * self.beams.count, hparams.n_vocab),
            branch.history: self.history(0),
        }
        fetches = [branch.tokens, branch.scores, branch.status, branch.run]
        tokens, scores, status, _ = self.sess.run(fetches, feeds)
        check_status(np.where([row.ended for row in self.live], HEALTHY, status))
        self.used += 1
        self.written += 1
        going = [tree for tree in self.trees if not tree.done]
        for tree in going:
            places = [self.live.index(beam) for beam in tree.beams]
            self.branch(tree, tokens[places], scores[places])
        return len(going)

    def branch(self, tree: BeamGroup, tokens: np.ndarray, scores: np.ndarray) -> None:
        """Follows the likeliest of all ways to go on, tokens and scores [beams, ways]."""
        totals = scores + np.array([[beam.total] for beam in tree.beams])
        totals[np.isnan(totals)] = -math.inf  # nothing was left to go on with
        if totals.max() == -math.inf:
            check_status(np.array([NOTHING_LEFT]))
        kept = []
        best = np.argsort(-totals, axis=None, kind="stable")[: 2 * self.beams.count]
        for rank, place in enumerate(best):
            beam, way = np.unravel_index(place, totals.shape)
            total, token = float(totals[beam, way]), int(tokens[beam, way])
            if total == -math.inf:
                break
            text = [*tree.beams[beam].text, token]
            if self.ended(tree, text):
                if rank < self.beams.count:
                    tree.found.append(self.judge(tree, text, total))
            elif len(kept) < self.beams.count:
                kept.append((text, total, tree.beams[beam]))
        missing = self.beams.count - len(kept)
        kept += [(beam.text + [0], -math.inf, beam) for beam in tree.beams[:missing]]
        for beam, way in zip(tree.beams, kept, strict=True):
            beam.become(*way)
        self.conclude(tree)

    def ended(self, tree: BeamGroup, text: list[int]) -> bool:
        """Whether nothing comes after this text."""
        stopped = text[-1] == self.sampling.stop_token
        return stopped or (self.ends is not None and self.ends(text[tree.prefix :]))

    def conclude(self, tree: BeamGroup) -> None:
        """Keeps the best of what was found; ends the search where no better can be hoped for."""
        followed = self.followed(tree)
        if self.written >= self.length:
            tree.found += followed
        tree.found = sorted(tree.found, reverse=True)[: self.beams.count]
        full = len(tree.found) == self.beams.count
        hope = max(followed, default=None)
        tree.done = (
            self.written >= self.length
            or hope is None
            or (full and tree.found[-1].score >= hope.score)
        )
        for beam in tree.beams:
            beam.ended = tree.done
