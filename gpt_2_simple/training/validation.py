"""A validation set in, the model's mean loss on it out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from .. import model, session
from ..adapter import Adapter
from ..common.report import say
from ..data.token_file import hash_json
from ..data.windows import Batch, fixed_windows
from .settings import TrainingSettings

# Rows of logits that exist at once: 256 of 50,257 float32 are 51 MB.
LOGIT_ROWS = 256


class EvaluationOps(NamedTuple):
    """What is fed, and the loss.

    Attributes:
        tokens: int32 [batch, time]; each but the first is to be predicted.
        losses: float32 [batch, time - 1], the cross-entropy of each, in nats.
    """

    tokens: tf.Tensor
    losses: tf.Tensor


def build_evaluation(
    sess: tf.compat.v1.Session, state: session.GraphState, batch_size: int, time: int
) -> EvaluationOps:
    """The operations that measure a batch of windows, built once in a session's graph.

    Args:
        sess: holds the model.
        state: what its graph remembers.
        batch_size: windows in a batch.
        time: tokens in a window.

    Returns:
        EvaluationOps.
    """
    return state.build_once(_build, state, state.adapter, batch_size, time)


def _build(
    state: session.GraphState, adapter: Adapter | None, batch_size: int, time: int
) -> EvaluationOps:
    with tf.compat.v1.name_scope("evaluation"):
        tokens = tf.compat.v1.placeholder(tf.int32, [batch_size, time], "tokens")
        weights = session.read_weights(state, adapter)
        hidden = model.hidden_states(weights, state.hparams, tokens[:, :-1], gpus=state.gpus)
        h = tf.reshape(hidden.h, [batch_size * (time - 1), state.hparams.n_embd])
        labels = tf.reshape(tokens[:, 1:], [-1])
        losses: list[tf.Tensor] = []
        n_rows = h.shape.as_list()[0]
        for start in range(0, n_rows, LOGIT_ROWS):
            rows = slice(start, min(start + LOGIT_ROWS, n_rows))
            with tf.control_dependencies(losses[-1:]):
                logits = model.unembed(weights, tf.identity(h[rows]))  # [rows, n_vocab]
            losses.append(
                tf.nn.sparse_softmax_cross_entropy_with_logits(labels=labels[rows], logits=logits)
            )
        return EvaluationOps(tokens, tf.reshape(tf.concat(losses, axis=0), [batch_size, time - 1]))


def mean_loss(sess: tf.compat.v1.Session, ops: EvaluationOps, windows: Batch) -> float:
    """The mean loss over all tokens of `windows` that are to be predicted.

    Args:
        sess: holds the model.
        ops: from build_evaluation.
        windows: a batch of any number of windows.

    Returns:
        Nats a token; its exponential is the perplexity.
    """
    batch_size, _ = ops.tokens.shape.as_list()
    starts = range(0, len(windows.tokens), batch_size)
    totals = [total_loss(sess, ops, windows, start) for start in starts]
    return sum(totals) / float(windows.loss_mask.sum())


def total_loss(sess: tf.compat.v1.Session, ops: EvaluationOps, windows: Batch, start: int) -> float:
    """The summed loss of the batch of windows that begins with window `start`, in nats."""
    batch_size, time = ops.tokens.shape.as_list()
    batch = windows.tokens[start : start + batch_size]
    # The last batch may be smaller than the graph's; what fills it up is not counted.
    filled = np.resize(batch, (batch_size, time))
    losses = sess.run(ops.losses, {ops.tokens: filled})[: len(batch)]
    return float((losses * windows.loss_mask[start : start + batch_size]).sum())


class Validation:
    """A fixed set of windows, and the model's loss on them.

    Attributes:
        identity: a digest of the windows: losses on different windows do not compare.
    """

    def __init__(
        self,
        sess: tf.compat.v1.Session,
        state: session.GraphState,
        chunks: Sequence[np.ndarray],
        settings: TrainingSettings,
        window: int,
    ):
        """Chooses the windows.

        Args:
            sess: holds the model.
            state: what its graph remembers.
            chunks: the validation set's tokens.
            settings: batch_size, val_batch_count and pad_documents.
            window: tokens in a window, if the validation set has that many.

        Raises:
            ValueError: there are fewer than 2 tokens, and one is predicted from another; or none
                of them is to be learned.
        """
        size = sum(map(len, chunks))
        if size < 2:
            raise ValueError(f"the validation set has {size} tokens: at least 2 are needed")
        if size < window:
            say(f"the validation set is shorter than {window} tokens: one window of {size}")
        count = settings.val_batch_count * settings.batch_size
        self.windows = fixed_windows(chunks, min(window, size), count, settings.pad_documents)
        if not self.windows.loss_mask.any():
            raise ValueError(
                "the validation set has nothing to learn: its windows lie outside what train_on= "
                "names; give a higher val_split or val_batch_count, or pad_documents=True"
            )
        rows, time = self.windows.tokens.shape
        self.ops = build_evaluation(sess, state, min(settings.batch_size, rows), time)
        self.sess = sess
        # The mask has a column for the first token too: so do the digests in saved runs.
        mask = np.pad(self.windows.loss_mask, ((0, 0), (1, 0)))
        self.identity = hash_json([self.windows.tokens.tolist(), mask.tolist()])

    @property
    def starts(self) -> Sequence[int]:
        """The first window of each batch."""
        batch_size, _ = self.ops.tokens.shape.as_list()
        return range(0, len(self.windows.tokens), batch_size)

    def total(self, start: int) -> float:
        """The summed loss now of the batch that begins with window `start`, in nats."""
        return total_loss(self.sess, self.ops, self.windows, start)

    def mean(self, totals: Sequence[float]) -> float:
        """The mean loss, in nats a token, from the total of each batch."""
        return sum(totals) / float(self.windows.loss_mask.sum())

    def loss(self) -> float:
        """The mean loss now, in nats a token."""
        return mean_loss(self.sess, self.ops, self.windows)
