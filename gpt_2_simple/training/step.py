"""Settings in, the operations of one training step out: the loss, its gradients, the updates."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import tensorflow as tf

from .. import memory_saving_gradients as recompute
from .. import model, session
from ..adapter import Adapter
from ..distributed.collectives import Collectives
from ..memory_saving_gradients import Gradient
from .loss_scale import LossScale
from .optimizer import AccumulatingOptimizer, make_optimizer
from .settings import StepSettings
from .sharded_optimizer import ShardedOptimizer, Slot

# Rows of logits that exist at once, with their gradient: 256 of 50,257 float32 are 51 MB.
LOSS_ROWS = 256

# The number of the adapter's first dropout: the model's own are fewer, even with 48 blocks.
ADAPTER_DROPOUT_CALL = 2**15


class LossAndGradients(NamedTuple):
    """The loss, and its gradients by what the logits are computed from.

    Attributes:
        loss: sum of loss_weights * cross-entropy, a scalar.
        dh: by the hidden states, [rows, n_embd], in their type.
        dwte: by the output projection, float32 [n_vocab, n_embd]; None if that is not trained, or
            if `on_part` took the parts.
    """

    loss: tf.Tensor
    dh: tf.Tensor
    dwte: tf.Tensor | None


OnPart = Callable[[tf.Tensor], tf.Operation]


def linear_cross_entropy(
    h: tf.Tensor,
    wte: tf.Tensor,
    labels: tf.Tensor,
    loss_weights: tf.Tensor,
    trains_wte: bool = True,
    on_part: OnPart | None = None,
    loss_scale: tf.Tensor | float = 1.0,
) -> LossAndGradients:
    """Computes the cross-entropy of the logits h wte^T and its gradients, LOSS_ROWS rows at a time.

    Gradients are computed along with the loss. So only one chunk's logits exist at once, and none
    are computed twice.

    Args:
        h: hidden states [rows, n_embd], in any float type; rows is static.
        wte: the output projection, float32 [n_vocab, n_embd].
        labels: int32 next tokens [rows].
        loss_weights: float32 [rows]: each row's share in the loss.
        trains_wte: whether wte's gradient is wanted.
        on_part: takes each chunk's part of wte's gradient; returns the operation that adds it to an
            accumulator.
        loss_scale: a factor for the gradients.

    Returns:
        LossAndGradients.
    """
    table = model.cast_like(h, wte)
    losses, dhs, dwte = [], [], None
    finished: list[Any] = []
    n_rows = h.shape.as_list()[0]
    for start in range(0, n_rows, LOSS_ROWS):
        rows = slice(start, min(start + LOSS_ROWS, n_rows))
        with tf.control_dependencies(finished):
            x = tf.identity(h[rows])
        logits = tf.cast(tf.matmul(x, table, transpose_b=True), tf.float32)  # [rows, n_vocab]
        loss, dlogits = tf.raw_ops.SparseSoftmaxCrossEntropyWithLogits(
            features=logits, labels=labels[rows]
        )
        losses.append(tf.reduce_sum(loss * loss_weights[rows]))
        dlogits = tf.cast(dlogits * (loss_weights[rows, tf.newaxis] * loss_scale), x.dtype)
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
    return LossAndGradients(tf.add_n(losses), dh, dwte)


class TrainOps(NamedTuple):
    """The placeholders and operations of a training step.

    Attributes:
        tokens: int32 [batch, time]; each but the first is to be predicted.
        loss_weights: float32 [batch, time - 1]: each prediction's share in the micro-batch's loss.
        learning_rate: float32 scalar.
        dropout_seed: int32 [2], another for each micro-batch; has no effect without dropout.
        initialize_state: sets the optimizer's state to its first values.
        state_variables: the variables that a run saves beside the model's weights.
        apply_gradients: takes the step; evaluates to the loss, a float32 scalar.
        reset_gradients: sets the accumulators to 0; None if gradients are not accumulated.
        add_micro_batch: adds a micro-batch's gradients; None if gradients are not accumulated.
        gradients_finite: bool scalar, whether the step can be taken; None if it always can. With
            float16, gradients may overflow: run `skip_step` then.
        skip_step: halves the loss scale instead of taking the step; evaluates to the loss.
        loss_scale: float32 scalar, the factor of float16's loss; None in other precisions.
        sum_over_workers: adds this worker's last micro-batch, then sums all workers' gradients;
            evaluates to their statuses, see AccumulatingOptimizer. None without other workers.
        wants_stop: float32 scalar: 1 tells the other workers that this one wants to stop.
        slots: the optimizer's state if each worker holds a share of it; else empty. All workers
            then run apply_gradients together, by Collectives.run().
    """

    tokens: tf.Tensor
    loss_weights: tf.Tensor
    learning_rate: tf.Tensor
    dropout_seed: tf.Tensor
    initialize_state: tf.Operation
    state_variables: list[tf.Variable]
    apply_gradients: tf.Tensor
    reset_gradients: tf.Operation | None = None
    add_micro_batch: tf.Operation | None = None
    gradients_finite: tf.Tensor | None = None
    skip_step: tf.Tensor | None = None
    loss_scale: tf.Tensor | None = None
    sum_over_workers: tf.Tensor | None = None
    wants_stop: tf.Tensor | None = None
    slots: Sequence[Slot] = ()


def build_train_ops(state: session.GraphState, settings: StepSettings, time: int) -> TrainOps:
    """Builds a training step, once in a session's graph.

    Args:
        state: what the graph remembers; it holds the model. If it has an adapter, that is trained
            instead of the model.
        settings: the step's settings.
        time: tokens in a window.

    Returns:
        TrainOps.

    Raises:
        ValueError: the model has fewer blocks than are to be trained.
    """
    # The graph of a micro-batch is the same for any number of them above 1.
    shared = dataclasses.replace(settings, accumulate_gradients=1 + settings.accumulates)
    return state.build_once(_build, state, state.adapter, shared, time)


def _build(
    state: session.GraphState, adapter: Adapter | None, settings: StepSettings, time: int
) -> TrainOps:
    with tf.compat.v1.name_scope("train"):
        return _StepBuilder(state, adapter, settings, time).build()


def trained_variables(weights: model.Weights, settings: StepSettings) -> list[tf.Variable]:
    """The variables to train: all, those of the blocks, or those of the last blocks.

    Raises:
        ValueError: the model does not have that many blocks.
    """
    count = settings.trained_blocks(len(weights.blocks))
    if count is None:
        return model.flatten(weights)
    return model.flatten_blocks(weights.blocks[-count:])


class _StepBuilder:
    """Adds a step's operations to the default graph."""

    def __init__(
        self,
        state: session.GraphState,
        adapter: Adapter | None,
        settings: StepSettings,
        time: int,
    ):
        self.hparams, self.gpus, self.settings = state.hparams, state.gpus, settings
        self.collectives: Collectives | None = None
        if state.cluster is not None:
            self.collectives = state.build_once(Collectives, state.cluster)
        self.variables = state.weights
        self.xs = adapter.flatten() if adapter else trained_variables(state.weights, settings)
        batch = settings.batch_size
        placeholder = tf.compat.v1.placeholder
        self.tokens = placeholder(tf.int32, [batch, time], "tokens")
        self.loss_weights = placeholder(tf.float32, [batch, time - 1], "loss_weights")
        self.learning_rate = placeholder(tf.float32, [], "learning_rate")
        self.seed = tf.compat.v1.placeholder_with_default([0, 0], [2], "dropout_seed")
        self.optimizer = make_optimizer(
            settings.optimizer, self.learning_rate, settings.weight_decay
        )
        self.loss_scale = LossScale() if settings.precision == "float16" else None
        self.tensors = session.read_weights(state, adapter, self._adapter_dropout())
        self.h, self.checkpoints = self._forward()

    def build(self) -> TrainOps:
        """Adds all of the operations."""
        return self._accumulating() if self.settings.accumulates else self._immediate()

    def _adapter_dropout(self) -> model.Dropout | None:
        rate = self.settings.lora_dropout
        return model.Dropout(rate, self.seed, ADAPTER_DROPOUT_CALL) if rate else None

    def _forward(self) -> tuple[tf.Tensor, list[tf.Tensor]]:
        """The hidden states [rows, n_embd], and the tensors to keep for the backward pass."""
        settings = self.settings
        hidden = model.hidden_states(
            self.tensors,
            self.hparams,
            self.tokens[:, :-1],
            gpus=self.gpus,
            dtype=tf.as_dtype(settings.precision),
            dropout=model.Dropout(settings.dropout, self.seed) if settings.dropout else None,
        )
        rows = self.loss_weights.shape.num_elements()
        return tf.reshape(hidden.h, [rows, self.hparams.n_embd]), hidden.outputs

    def _loss(self, on_part: OnPart | None = None) -> LossAndGradients:
        rows = self.h.shape.as_list()[0]
        return linear_cross_entropy(
            self.h,
            self.tensors.wte,
            tf.reshape(self.tokens[:, 1:], [rows]),
            tf.reshape(self.loss_weights, [rows]),
            any(x is self.variables.wte for x in self.xs),
            on_part,
            self.loss_scale.scale.read_value() if self.loss_scale else 1.0,
        )

    def _immediate(self) -> TrainOps:
        """Updates each variable as soon as its gradient is known, if that saves memory."""
        loss = self._loss()
        updates: list[tf.Operation] = []

        def update(x: tf.Variable, gradient: Gradient) -> tf.Operation:
            if x is self.variables.wte:
                gradient = recompute.add(loss.dwte, gradient)
            updates.append(self.optimizer.apply(gradient, x))
            return updates[-1]

        if self.settings.use_memory_saving_gradients:
            recompute.gradients(self.h, self.xs, loss.dh, self.checkpoints, on_gradient=update)
        else:
            found = tf.gradients(self.h, self.xs, grad_ys=loss.dh)
            # When all gradients are known, all readers of the variables have run: an update copies
            # no variable.
            with tf.control_dependencies([getattr(g, "values", g) for g in found]):
                updates.append(tf.no_op())
            for x, gradient in zip(self.xs, found, strict=True):
                with tf.control_dependencies(updates[-1:]):
                    update(x, gradient)
        with tf.control_dependencies([self.optimizer.finish(updates)]):
            apply = tf.identity(loss.loss)
        return self._train_ops(apply)

    def _accumulating(self) -> TrainOps:
        """Adds gradients to accumulators, and applies them when all micro-batches have run."""
        collectives, sharded = self.collectives, None
        if collectives is not None and self.settings.shard_optimizer:
            sharded = ShardedOptimizer(self.optimizer, collectives, self.xs)
        total = AccumulatingOptimizer(sharded or self.optimizer, self.xs)
        additions: dict[str, list[tf.Operation]] = {x.name: [] for x in self.xs}
        add_micro_batch = self._add_micro_batch(total, additions)
        summed = stop = None
        if collectives is not None:
            stop = tf.compat.v1.placeholder_with_default(0.0, [], "wants_stop")
            summed = total.sum_over_workers(collectives, add_micro_batch, additions, stop)
        apply = total.apply_gradients(self._gradient_factor(total))
        if self.loss_scale:
            with tf.control_dependencies([apply]):
                grown = self.loss_scale.grow()
            with tf.control_dependencies([grown]):
                apply = tf.identity(apply)
        if collectives is not None and sharded is not None:
            apply = collectives.guarded(apply.op, apply)
        ops = self._train_ops(apply, total.variables())._replace(
            reset_gradients=total.reset(),
            add_micro_batch=add_micro_batch,
            sum_over_workers=summed,
            wants_stop=stop,
            slots=sharded.slots if sharded else (),
        )
        if not self.loss_scale:
            return ops
        loss = total.mean_loss()
        with tf.control_dependencies([self.loss_scale.halve()]):
            skip = tf.identity(loss)
        return ops._replace(
            gradients_finite=total.all_finite(),
            skip_step=skip,
            loss_scale=self.loss_scale.scale.read_value(),
        )

    def _add_micro_batch(
        self, total: AccumulatingOptimizer, additions: dict[str, list[tf.Operation]]
    ) -> tf.Operation:
        """Adds each part of a gradient to its accumulator as soon as it is known.

        `additions` gets the operations that do so, by the variables' names.
        """

        def add(x: tf.Variable, part: Gradient) -> tf.Operation:
            additions[x.name].append(total.add(x, part))
            return additions[x.name][-1]

        loss = self._loss(on_part=lambda part: add(self.variables.wte, part))
        if self.settings.use_memory_saving_gradients:
            recompute.gradients(self.h, self.xs, loss.dh, self.checkpoints, on_part=add)
        else:
            found = tf.gradients(self.h, self.xs, grad_ys=loss.dh)
            for x, gradient in zip(self.xs, found, strict=True):
                add(x, gradient)
        return total.end_micro_batch(loss.loss, itertools.chain(*additions.values()))

    def _gradient_factor(self, total: AccumulatingOptimizer) -> tf.Tensor | float:
        """Takes the loss scale out of the gradients, and clips them by their global norm."""
        scale = 1.0 / self.loss_scale.scale.read_value() if self.loss_scale else 1.0
        clip = self.settings.gradient_clip
        if not clip:
            return scale
        return scale * clip / tf.maximum(total.global_norm() * scale, clip)

    def _train_ops(
        self, apply_gradients: tf.Tensor, accumulators: Sequence[tf.Variable] = ()
    ) -> TrainOps:
        state = self.optimizer.variables()
        if self.loss_scale:
            state += [self.loss_scale.scale, self.loss_scale.good_steps]
        return TrainOps(
            tokens=self.tokens,
            loss_weights=self.loss_weights,
            learning_rate=self.learning_rate,
            dropout_seed=self.seed,
            initialize_state=tf.compat.v1.variables_initializer([*state, *accumulators]),
            state_variables=state,
            apply_gradients=apply_gradients,
        )
