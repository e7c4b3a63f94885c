"""Settings in, the operations of one training step out: the loss, its gradients, the updates."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import tensorflow as tf

from .. import memory_saving_gradients as recompute
from .. import model, session
from ..storage.runs import LOSS_SCALE
from .optimizer import (
    AccumulatingOptimizer,
    Gradient,
    make_optimizer,
)
from .settings import StepSettings

# Rows of logits that exist at once, with their gradient: 256 of 50,257 float32 are 51 MB.
LOSS_ROWS = 256

# Dynamic loss scaling (Micikevicius et al. 2018, arXiv:1710.03740) for float16.
FIRST_LOSS_SCALE = 2.0**15
GOOD_STEPS = 2000


class Head(NamedTuple):
    """The loss, and its gradient where the blocks end.

    Attributes:
        loss: sum of weights * cross-entropy, a scalar.
        dh: its gradient by the hidden states, [rows, n_embd], in their type.
        dwte: its gradient by the output projection, float32 [n_vocab, n_embd]; None if that is not
            trained, or was handed out in parts.
    """

    loss: tf.Tensor
    dh: tf.Tensor
    dwte: tf.Tensor | None


OnPart = Callable[[tf.Tensor], tf.Operation]


def output_head(
    h: tf.Tensor,
    wte: tf.Tensor,
    labels: tf.Tensor,
    weights: tf.Tensor,
    trains_wte: bool = True,
    on_part: OnPart | None = None,
    loss_scale: tf.Tensor | float = 1.0,
) -> Head:
    """Cross-entropy of wte's predictions and its gradient, LOSS_ROWS rows at a time.

    Gradients are computed along with the loss, so that no more than one chunk's logits exist at
    once and none are computed twice.

    Args:
        h: hidden states [rows, n_embd], in any float type; rows is static.
        wte: the output projection, float32 [n_vocab, n_embd].
        labels: int32 next tokens [rows].
        weights: float32 [rows]: each row's share in the loss.
        trains_wte: whether wte's gradient is wanted.
        on_part: takes each chunk's part of it, and returns the operation that adds it somewhere.
        loss_scale: what gradients are multiplied by.

    Returns:
        Head.
    """
    table = model.cast_like(h, wte)
    losses, dhs, dwte = [], [], None
    finished: list[Any] = []
    for start in range(0, h.shape[0], LOSS_ROWS):
        rows = slice(start, min(start + LOSS_ROWS, h.shape[0]))
        with tf.control_dependencies(finished):
            x = tf.identity(h[rows])
        logits = tf.cast(tf.matmul(x, table, transpose_b=True), tf.float32)  # [rows, n_vocab]
        loss, dlogits = tf.raw_ops.SparseSoftmaxCrossEntropyWithLogits(
            features=logits, labels=labels[rows]
        )
        losses.append(tf.reduce_sum(loss * weights[rows]))
        dlogits = tf.cast(dlogits * (weights[rows, tf.newaxis] * loss_scale), x.dtype)
        dhs.append(tf.matmul(dlogits, table))
        finished = [dhs[-1]]
        if trains_wte:
            part = tf.cast(tf.matmul(dlogits, x, transpose_a=True), tf.float32)
            if on_part is not None:
                finished.append(on_part(part))
            else:
                dwte = part if dwte is None else dwte + part
                finished.append(dwte)
    with tf.control_dependencies(finished):
        dh = tf.concat(dhs, axis=0)
    return Head(tf.add_n(losses), dh, dwte)


class TrainOps(NamedTuple):
    """What the loop feeds and runs.

    Attributes:
        tokens: int32 [batch, time]; each but the first is to be predicted.
        weights: float32 [batch, time - 1]: each prediction's share in the micro-batch's loss.
        learning_rate: a scalar.
        dropout_seed: int32 [2], another for each micro-batch; feeding it does nothing if there is
            no dropout.
        reset: empties the accumulators; None without them.
        micro_step: adds a micro-batch's gradients; None without accumulators.
        apply: takes the step and gives the loss.
        finite: whether the step can be taken, None if it always can: with float16, see `skip`.
        skip: gives the loss, and halves the loss scale instead of taking the step.
        initialize: empties the optimizer's state.
        state: the variables to save with a run beside its weights.
    """

    tokens: tf.Tensor
    weights: tf.Tensor
    learning_rate: tf.Tensor
    dropout_seed: tf.Tensor
    reset: tf.Operation | None
    micro_step: tf.Operation | None
    apply: tf.Tensor
    finite: tf.Tensor | None
    skip: tf.Tensor | None
    initialize: tf.Operation
    state: list[tf.Variable]


def build(
    sess: tf.compat.v1.Session, state: session.GraphState, settings: StepSettings, time_: int
) -> TrainOps:
    """The training operations for windows of `time_` tokens, built once in a session's graph."""
    # How many micro-batches there are is the loop's business, not the graph's.
    shared = dataclasses.replace(settings, accumulate_gradients=1 + settings.accumulates)
    return state.build_once(_build, state, shared, time_)


def _build(state: session.GraphState, settings: StepSettings, time_: int) -> TrainOps:
    with tf.compat.v1.name_scope("train"):
        return _Builder(state, settings, time_).build()


def trained_variables(weights: model.Weights, settings: StepSettings) -> list[tf.Variable]:
    """The variables to train: all, those of the blocks, or those of the last blocks.

    Raises:
        ValueError: the model does not have that many blocks.
    """
    count = settings.trained_blocks(len(weights.blocks))
    if count is None:
        return model.flatten(weights)
    return [leaf for block in weights.blocks[-count:] for part in block for leaf in part]


class _LossScale:
    """The factor that keeps float16 gradients from vanishing: halved when they overflow."""

    def __init__(self) -> None:
        def variable(name: str, value: float) -> tf.Variable:
            return tf.compat.v1.get_variable(
                f"{LOSS_SCALE}/{name}", [], tf.float32, trainable=False,
                initializer=tf.compat.v1.constant_initializer(value), use_resource=True,
            )  # fmt: skip

        with tf.compat.v1.variable_scope(
            tf.compat.v1.get_variable_scope(), reuse=tf.compat.v1.AUTO_REUSE
        ):
            self.scale = variable("scale", FIRST_LOSS_SCALE)
            self.good = variable("good_steps", 0.0)

    def grow(self) -> tf.Operation:
        """Counts a good step; doubles the scale after GOOD_STEPS of them."""
        enough = tf.cast(self.good.read_value() + 1 >= GOOD_STEPS, tf.float32)
        good = (self.good.read_value() + 1) * (1 - enough)
        scale = self.scale.read_value() * (1 + enough)
        with tf.control_dependencies([good, scale]):
            return tf.group(self.good.assign(good), self.scale.assign(scale))

    def halve(self) -> tf.Operation:
        """Halves the scale after a step that was not finite."""
        halved = tf.maximum(self.scale.read_value() / 2, 1.0)
        with tf.control_dependencies([halved]):
            return tf.group(self.good.assign(0.0), self.scale.assign(halved))


class _Builder:
    """Adds a step's operations to the default graph."""

    def __init__(self, state: session.GraphState, settings: StepSettings, time_: int):
        self.hparams, self.gpus, self.settings = state.hparams, state.gpus, settings
        self.variables = state.weights
        self.xs = trained_variables(state.weights, settings)
        self.trains_wte = any(x is self.variables.wte for x in self.xs)
        batch = settings.batch_size
        placeholder = tf.compat.v1.placeholder
        self.tokens = placeholder(tf.int32, [batch, time_], "tokens")
        self.weights = placeholder(tf.float32, [batch, time_ - 1], "weights")
        self.learning_rate = placeholder(tf.float32, [], "learning_rate")
        self.seed = tf.compat.v1.placeholder_with_default([0, 0], [2], "dropout_seed")
        self.optimizer = make_optimizer(
            settings.optimizer, self.learning_rate, weight_decay=settings.weight_decay
        )
        self.loss_scale = _LossScale() if settings.precision == "float16" else None
        self.tensors = model.read(self.variables)
        self.h, self.checkpoints = self.hidden()

    def hidden(self) -> tuple[tf.Tensor, list[tf.Tensor]]:
        """The hidden states [rows, n_embd], and the tensors to keep for the backward pass."""
        settings, graph = self.settings, tf.compat.v1.get_default_graph()
        graph.clear_collection(model.CHECKPOINTS)
        h = model.hidden_states(
            self.tensors,
            self.hparams,
            self.tokens[:, :-1],
            gpus=self.gpus,
            dtype=tf.as_dtype(settings.precision),
            dropout=model.Dropout(settings.dropout, self.seed) if settings.dropout else None,
        ).h
        checkpoints = graph.get_collection(model.CHECKPOINTS)
        graph.clear_collection(model.CHECKPOINTS)
        rows = self.weights.shape.num_elements()
        return tf.reshape(h, [rows, self.hparams.n_embd]), checkpoints

    def head(self, on_part: OnPart | None = None) -> Head:
        """The loss and where its gradient starts."""
        rows = self.h.shape[0]
        return output_head(
            self.h,
            self.tensors.wte,
            tf.reshape(self.tokens[:, 1:], [rows]),
            tf.reshape(self.weights, [rows]),
            self.trains_wte,
            on_part,
            self.loss_scale.scale.read_value() if self.loss_scale else 1.0,
        )

    def build(self) -> TrainOps:
        """All of the operations."""
        return self.accumulating() if self.settings.accumulates else self.immediate()

    def immediate(self) -> TrainOps:
        """Each variable is updated as soon as its gradient is there, if that saves memory."""
        head = self.head()
        updates: list[tf.Operation] = []

        def update(x: tf.Variable, gradient: Gradient) -> tf.Operation:
            if x is self.variables.wte:
                gradient = recompute.add(head.dwte, gradient)
            updates.append(self.optimizer.apply(gradient, x))
            return updates[-1]

        if self.settings.use_memory_saving_gradients:
            recompute.gradients(self.h, self.xs, head.dh, self.checkpoints, on_gradient=update)
        else:
            found = tf.gradients(self.h, self.xs, grad_ys=head.dh)
            # When all are there, each reader of a variable has run: no update needs a copy of it.
            with tf.control_dependencies([getattr(g, "values", g) for g in found]):
                updates.append(tf.no_op())
            for x, gradient in zip(self.xs, found, strict=True):
                with tf.control_dependencies(updates[-1:]):
                    update(x, gradient)
        with tf.control_dependencies([self.optimizer.finish(updates)]):
            apply = tf.identity(head.loss)
        return self.ops(apply=apply)

    def accumulating(self) -> TrainOps:
        """Each gradient is added to its accumulator as soon as it is there."""
        wte, settings = self.variables.wte, self.settings
        total = AccumulatingOptimizer(self.optimizer, self.xs)
        additions: list[tf.Operation] = []

        def add(x: tf.Variable, part: Gradient) -> tf.Operation:
            additions.append(total.add(x, part))
            return additions[-1]

        head = self.head(on_part=lambda part: add(wte, part))
        if settings.use_memory_saving_gradients:
            recompute.gradients(self.h, self.xs, head.dh, self.checkpoints, on_part=add)
        else:
            found = tf.gradients(self.h, self.xs, grad_ys=head.dh)
            for x, gradient in zip(self.xs, found, strict=True):
                add(x, gradient)
        micro_step = total.count(head.loss, additions)
        scale = 1.0 / self.loss_scale.scale.read_value() if self.loss_scale else 1.0
        factor = scale
        if settings.gradient_clip:
            norm = total.global_norm() * scale
            factor = scale * settings.gradient_clip / tf.maximum(norm, settings.gradient_clip)
        apply = total.apply_gradients(factor)
        reset, own = total.reset(), total.variables()
        if not self.loss_scale:
            return self.ops(apply, reset, micro_step, own=own)
        with tf.control_dependencies([apply]), tf.control_dependencies([self.loss_scale.grow()]):
            apply = tf.identity(apply)
        loss = total.mean_loss()
        with tf.control_dependencies([self.loss_scale.halve()]):
            skip = tf.identity(loss)
        return self.ops(apply, reset, micro_step, total.all_finite(), skip, own)

    def ops(
        self,
        apply: tf.Tensor,
        reset: tf.Operation | None = None,
        micro_step: tf.Operation | None = None,
        finite: tf.Tensor | None = None,
        skip: tf.Tensor | None = None,
        own: Sequence[tf.Variable] = (),
    ) -> TrainOps:
        """TrainOps of these and of what both ways share."""
        state = self.optimizer.variables()
        if self.loss_scale:
            state += [self.loss_scale.scale, self.loss_scale.good]
        return TrainOps(
            tokens=self.tokens,
            weights=self.weights,
            learning_rate=self.learning_rate,
            dropout_seed=self.seed,
            reset=reset,
            micro_step=micro_step,
            apply=apply,
            finite=finite,
            skip=skip,
            initialize=tf.compat.v1.variables_initializer([*state, *own]),
            state=state,
        )
