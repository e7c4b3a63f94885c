"""Settings in, the operations of one training step out: the loss, its gradients, the updates."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from . import memory_saving_gradients as recompute
from . import model, session
from .optimizer import (
    OPTIMIZERS,
    AccumulatingOptimizer,
    Gradient,
    Optimizer,
    make_optimizer,
)

# Rows of logits that exist at once, with their gradient: 256 of 50,257 float32 are 51 MB.
LOSS_ROWS = 256


@dataclasses.dataclass(frozen=True)
class StepConfig:
    """What shapes the graph of a training step; see finetune() for the meanings."""

    batch_size: int = 1
    accumulate_gradients: int = 5
    use_memory_saving_gradients: bool = False
    only_train_transformer_layers: bool = False
    optimizer: str = "adam"
    sequence_length: int | None = None

    def __post_init__(self) -> None:
        """Raises ValueError for a value out of its range."""
        check_whole("batch_size", self.batch_size, 1)
        check_whole("accumulate_gradients", self.accumulate_gradients, 1)
        if self.sequence_length is not None:
            check_whole("sequence_length", self.sequence_length, 2)
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(f"optimizer={self.optimizer!r} must be one of {list(OPTIMIZERS)}")


def check_whole(name: str, value: Any, least: int, but: str = "") -> None:
    """Raises ValueError if `value` is not a whole number of `least` or above."""
    whole = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    if not whole or value < least:
        raise ValueError(f"{name}={value!r} must be a whole number, {least} or above{but}")


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
        tokens: int32 [batch, time]; each but the first is to be predicted.
        weights: float32 [batch, time - 1]: each prediction's share in the micro-batch's loss.
        learning_rate: a scalar.
        reset: empties the accumulators; None without accumulation.
        micro_step: adds a micro-batch's gradients; None without accumulation.
        apply: takes the step and gives the loss.
        initialize: empties the optimizer's state.
        optimizer: holds the state.
    """

    tokens: tf.Tensor
    weights: tf.Tensor
    learning_rate: tf.Tensor
    reset: tf.Operation | None
    micro_step: tf.Operation | None
    apply: tf.Tensor
    initialize: tf.Operation
    optimizer: Optimizer


def build(
    sess: tf.compat.v1.Session, state: session.Memory, config: StepConfig, time_: int
) -> TrainOps:
    """The training operations for windows of `time_` tokens, built once in a session's graph."""
    accumulate = config.accumulate_gradients > 1
    # How many micro-batches there are is the loop's business, not the graph's.
    key = (dataclasses.replace(config, accumulate_gradients=1 + accumulate), time_)
    with state.lock, sess.graph.as_default():
        if key not in state.built:
            with tf.compat.v1.name_scope("train"):
                state.built[key] = _build(state, config, time_, accumulate)
        return state.built[key]


def trained_variables(weights: model.Weights, only_layers: bool) -> list[tf.Variable]:
    """The variables to train: all, or only those of the blocks."""
    if only_layers:
        return [leaf for block in weights.blocks for part in block for leaf in part]
    return model.flatten(weights)


class _Forward(NamedTuple):
    """The forward pass of a micro-batch, to be differentiated.

    Attributes:
        h: hidden states [rows, n_embd].
        head: the loss, and its gradient by h.
        checkpoints: the tensors to keep for the backward pass.
    """

    h: tf.Tensor
    head: Head
    checkpoints: list[tf.Tensor]


def _build(state: session.Memory, config: StepConfig, time_: int, accumulate: bool) -> TrainOps:
    variables = state.weights
    xs = trained_variables(variables, config.only_train_transformer_layers)
    tokens = tf.compat.v1.placeholder(tf.int32, [config.batch_size, time_], "tokens")
    weights = tf.compat.v1.placeholder(tf.float32, [config.batch_size, time_ - 1], "weights")
    learning_rate = tf.compat.v1.placeholder(tf.float32, [], "learning_rate")
    forward = _forward(state, tokens, weights, with_dwte=any(x is variables.wte for x in xs))
    optimizer = make_optimizer(config.optimizer, learning_rate)
    save_memory = config.use_memory_saving_gradients
    if accumulate:
        return _accumulating(variables, xs, forward, optimizer, save_memory)._replace(
            tokens=tokens, weights=weights, learning_rate=learning_rate
        )
    updates = _update_each(variables, xs, forward, optimizer, save_memory)
    with tf.control_dependencies([optimizer.finish(updates)]):
        apply = tf.identity(forward.head.loss)
    initialize = tf.compat.v1.variables_initializer(optimizer.variables())
    return TrainOps(tokens, weights, learning_rate, None, None, apply, initialize, optimizer)


def _forward(
    state: session.Memory, tokens: tf.Tensor, weights: tf.Tensor, with_dwte: bool
) -> _Forward:
    hparams = state.hparams
    tensors = model.read(state.weights)
    graph = tf.compat.v1.get_default_graph()
    graph.clear_collection(model.CHECKPOINTS)
    h = model.hidden_states(tensors, hparams, tokens[:, :-1], gpus=state.gpus).h
    # The last block's activations are needed first, so they are kept, not recomputed.
    checkpoints = graph.get_collection(model.CHECKPOINTS)[:-1]
    graph.clear_collection(model.CHECKPOINTS)
    rows = tokens.shape[0] * (tokens.shape[1] - 1)
    h = tf.reshape(h, [rows, hparams.n_embd])
    labels = tf.reshape(tokens[:, 1:], [rows])
    head = output_head(h, tensors.wte, labels, tf.reshape(weights, [rows]), with_dwte)
    return _Forward(h, head, checkpoints)


def _update_each(
    variables: model.Weights,
    xs: Sequence[tf.Variable],
    forward: _Forward,
    optimizer: Optimizer,
    save_memory: bool,
) -> list[tf.Operation]:
    """Updates each variable; saving memory, as soon as its gradient is there."""
    updates = []

    def update(x: tf.Variable, gradient: Gradient) -> tf.Operation:
        if x is variables.wte:
            gradient = recompute.add(forward.head.dwte, gradient)
        updates.append(optimizer.apply(gradient, x))
        return updates[-1]

    dh = forward.head.dh
    if save_memory:
        recompute.gradients(forward.h, xs, dh, forward.checkpoints, on_gradient=update)
        return updates
    found = tf.gradients(forward.h, xs, grad_ys=dh)
    with tf.control_dependencies([g.values if hasattr(g, "values") else g for g in found]):
        # Each reader of a variable has run, so that the update needs no copy of it.
        all_done = tf.no_op()
    for x, gradient in zip(xs, found, strict=True):
        with tf.control_dependencies([all_done, *updates[-1:]]):
            update(x, gradient)
    return updates


def _accumulating(
    variables: model.Weights,
    xs: Sequence[tf.Variable],
    forward: _Forward,
    optimizer: Optimizer,
    save_memory: bool,
) -> TrainOps:
    """Accumulators, to which each gradient is added as soon as it is there."""
    dh, dwte = forward.head.dh, forward.head.dwte

    def save(_: tf.Tensor, xs: Sequence[tf.Variable], on_part: recompute.Hook) -> None:
        start = dh
        if dwte is not None:
            with tf.control_dependencies([on_part(variables.wte, dwte)]):
                start = tf.identity(dh)
        recompute.gradients(forward.h, xs, start, forward.checkpoints, on_part=on_part)

    def keep(_: tf.Tensor, xs: Sequence[tf.Variable]) -> list[Gradient | None]:
        found = tf.gradients(forward.h, xs, grad_ys=dh)
        return [
            g if x is not variables.wte else recompute.add(dwte, g)
            for x, g in zip(xs, found, strict=True)
        ]

    accumulating = AccumulatingOptimizer(optimizer, xs, save if save_memory else keep)
    micro_step = accumulating.compute_gradients(forward.head.loss)
    apply = accumulating.apply_gradients()
    initialize = tf.compat.v1.variables_initializer(
        [*optimizer.variables(), *accumulating.variables()]
    )
    reset = accumulating.reset()
    return TrainOps(None, None, None, reset, micro_step, apply, initialize, optimizer)
