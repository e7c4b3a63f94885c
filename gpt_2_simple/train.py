"""Batches in, trained variables and their checkpoints out: the loss, a step, the loop."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from . import checkpoint, model, sample, session, texts
from . import memory_saving_gradients as recompute
from .optimizer import OPTIMIZERS, AccumulatingOptimizer, make_optimizer
from .report import progress, say
from .sampler import Sampler, window_length

# Rows of logits that exist at once, with their gradient: 256 of 50,257 float32 are 51 MB.
LOSS_ROWS = 256

SAMPLES = "samples"


@dataclasses.dataclass(frozen=True)
class Config:
    """finetune()'s settings, checked; see there."""

    steps: int = -1
    batch_size: int = 1
    learning_rate: float = 0.0001
    accumulate_gradients: int = 5
    sample_every: int = 100
    sample_length: int = 1023
    sample_num: int = 1
    save_every: int = 1000
    print_every: int = 1
    max_checkpoints: int = 1
    use_memory_saving_gradients: bool = False
    only_train_transformer_layers: bool = False
    optimizer: str = "adam"
    sequence_length: int | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        """Raises ValueError for a value out of its range."""
        for name in ("batch_size", "accumulate_gradients", "save_every", "print_every"):
            _check_whole(name, getattr(self, name), 1)
        for name in ("sample_every", "sample_num", "max_checkpoints"):
            _check_whole(name, getattr(self, name), 0)
        _check_whole("sample_length", self.sample_length, 1)
        if self.steps != -1:
            _check_whole("steps", self.steps, 1, " (or -1: until Ctrl-C)")
        if self.sequence_length is not None:
            _check_whole("sequence_length", self.sequence_length, 2)
        rate = self.learning_rate
        if not isinstance(rate, (int, float, np.number)) or not 0 < rate < math.inf:
            raise ValueError(f"learning_rate={rate!r} must be a number above 0")
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(f"optimizer={self.optimizer!r} must be one of {list(OPTIMIZERS)}")


def _check_whole(name: str, value: Any, least: int, but: str = "") -> None:
    whole = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    if not whole or value < least:
        raise ValueError(f"{name}={value!r} must be a whole number, {least} or above{but}")


class Result(NamedTuple):
    """What finetune() reached.

    Attributes:
        step: the run's last step, counted from its first call.
        loss: the last step's loss, in nats a token.
        average_loss: the printed average.
        checkpoint: the prefix of the checkpoint with the final weights.
        interrupted: whether Ctrl-C, and not `steps`, ended the training.
        history: (step, loss) of this call's steps.
    """

    step: int
    loss: float
    average_loss: float
    checkpoint: str
    interrupted: bool
    history: list[tuple[int, float]]


# --- graph --------------------------------------------------------------------------------------


class Head(NamedTuple):
    """The loss, and its gradient where the blocks end.

    Attributes:
        loss: sum of weights * cross-entropy, a scalar.
        dh: its gradient by the hidden states, [rows, n_embd].
        dwte: its gradient by the output projection, [n_vocab, n_embd]; None if not wanted.
    """

    loss: tf.Tensor
    dh: tf.Tensor
    dwte: tf.Tensor | None


def output_head(
    h: tf.Tensor, wte: tf.Tensor, labels: tf.Tensor, weights: tf.Tensor, with_dwte: bool = True
) -> Head:
    """Cross-entropy of wte's predictions and its gradient, LOSS_ROWS rows at a time.

    Gradients are computed along with the loss, so that no more than one chunk's logits exist at
    once and none are computed twice.

    Args:
        h: float hidden states [rows, n_embd]; rows is static.
        wte: the output projection [n_vocab, n_embd].
        labels: int32 next tokens [rows].
        weights: float32 [rows]: each row's share in the loss.
        with_dwte: whether wte is trained.

    Returns:
        Head. Fetching only the loss computes no gradient of the last chunk, but of the others.
    """
    losses, dhs, dwte = [], [], None
    finished: list[tf.Tensor] = []
    for start in range(0, h.shape[0], LOSS_ROWS):
        rows = slice(start, min(start + LOSS_ROWS, h.shape[0]))
        with tf.control_dependencies(finished):
            x = tf.identity(h[rows])
        logits = tf.matmul(x, wte, transpose_b=True)  # [rows, n_vocab]
        loss, dlogits = tf.raw_ops.SparseSoftmaxCrossEntropyWithLogits(
            features=logits, labels=labels[rows]
        )
        dlogits *= weights[rows, tf.newaxis]
        losses.append(tf.reduce_sum(loss * weights[rows]))
        dhs.append(tf.matmul(dlogits, wte))
        finished = [dhs[-1]]
        if with_dwte:
            part = tf.matmul(dlogits, x, transpose_a=True)
            dwte = part if dwte is None else dwte + part
            finished.append(dwte)
    return Head(tf.add_n(losses), tf.concat(dhs, axis=0), dwte)


class TrainOps(NamedTuple):
    """What the loop feeds and runs.

    Attributes:
        tokens: int32 [batch, time + 1]: inputs and, one further, what they should predict.
        weights: float32 [batch, time]: each prediction's share in the micro-batch's loss.
        micro_step: adds a micro-batch's gradients; gives its loss. None without accumulation.
        apply: takes the step; without accumulation it gives the loss.
    """
