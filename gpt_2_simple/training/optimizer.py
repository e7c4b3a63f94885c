"""Gradients in, updates of variables in place out: Adam, Adafactor, SGD, and accumulation.

All of this is written to need little memory. A variable is updated in its own buffer, which
TensorFlow does only while nobody else holds that buffer. Variables are updated one after the other,
so that the temporary tensors of only one update exist at a time. Zeros are made when they are
needed: they are no constants of the graph.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import tensorflow as tf

from ..distributed.collectives import Collectives
from ..memory_saving_gradients import Gradient
from ..model import get_variable

# Adafactor reads larger matrices than this in chunks of rows.
CHUNK_BYTES = 32 * 2**20


def zeros(shape: Sequence[int] | tf.TensorShape, dtype: Any = tf.float32, **_: Any) -> tf.Tensor:
    """Makes zeros that take no memory before they are evaluated; usable as an initializer.

    Grappler folds tf.zeros of a static shape into a constant. The constant stays in memory as long
    as the session, and a variable initialised from it has to be copied at its first update. Empty
    is stateful, and no pass folds a stateful operation.
    """
    sizes = tf.TensorShape(shape).as_list()
    return tf.raw_ops.Empty(shape=sizes, dtype=tf.as_dtype(dtype), init=True)


def dense(gradient: Gradient) -> tf.Tensor:
    """Returns the gradient as a dense tensor."""
    if not isinstance(gradient, tf.IndexedSlices):
        return gradient
    rows = gradient.dense_shape[0]
    return tf.math.unsorted_segment_sum(gradient.values, gradient.indices, rows)


class Optimizer(abc.ABC):
    """Updates variables in place, each by an operation of its own.

    State is kept in variables named `optimizer/<optimizer>/<slot>/<variable>`, made when a variable
    is first updated. Two optimizers of one kind in one graph share them.
    """

    name: str

    def __init__(self, learning_rate: float | tf.Tensor, weight_decay: float = 0.0):
        """Makes the step counter in the default graph.

        Args:
            learning_rate: a number or a scalar tensor, such as a placeholder that is fed.
            weight_decay: decoupled decay (Loshchilov & Hutter 2019): each update first multiplies
                the variable by 1 - learning_rate * weight_decay. Variables with fewer than two axes
                longer than 1 (biases and gains) do not decay.

        Raises:
            ValueError: a negative weight_decay or learning_rate.
        """
        if not tf.is_tensor(learning_rate) and not learning_rate >= 0:
            raise ValueError(f"learning_rate={learning_rate} must not be negative")
        if not weight_decay >= 0:
            raise ValueError(f"weight_decay={weight_decay} must not be negative")
        self.learning_rate = tf.cast(learning_rate, tf.float32)
        self.weight_decay = weight_decay
        self._slots: dict[str, tf.Variable] = {}
        self._step = self._variable("step", [], tf.int64)
        self._next_step = tf.cast(self._step.read_value() + 1, tf.float64)

    def apply(self, gradient: Gradient, variable: tf.Variable) -> tf.Operation:
        """Updates `variable` in place.

        The update makes no copy of the variable if all operations that read its value have run
        before. Give these operations as control dependencies.

        Args:
            gradient: shaped as `variable`, dense or tf.IndexedSlices.
            variable: a float32 resource variable.

        Returns:
            The operation that updates the variable and its slots.

        Raises:
            ValueError: `variable` is no resource variable.
        """
        if not hasattr(variable, "handle"):
            raise ValueError(
                f"{variable.name} is a reference variable; make it with use_resource=True"
            )
        with tf.name_scope(f"update_{self.name}"), tf.device(variable.device):
            gradient = dense(gradient)
            with tf.control_dependencies(self._decay(variable)):
                return self._update(gradient, variable)

    def finish(self, updates: Iterable[tf.Operation]) -> tf.Operation:
        """Counts the step when all of its updates have run."""
        with tf.control_dependencies(list(updates)):
            return self._step.assign_add(1, read_value=False)

    def apply_gradients(
        self, grads_and_vars: Iterable[tuple[Gradient | None, tf.Variable]]
    ) -> tf.Operation:
        """Takes a whole step: updates the variables one after the other, then counts the step.

        Args:
            grads_and_vars: pairs of a gradient and its variable. If the gradient is None, the
                variable stays as it is.

        Returns:
            The operation that does all of it.
        """
        updates: list[tf.Operation] = []
        for gradient, variable in grads_and_vars:
            if gradient is not None:
                with tf.control_dependencies(updates[-1:]):
                    updates.append(self.apply(gradient, variable))
        return self.finish(updates)

    def variables(self) -> list[tf.Variable]:
        """The step counter and the slots made so far, in order of creation."""
        return list(self._slots.values())

    @abc.abstractmethod
    def _update(self, gradient: tf.Tensor, variable: tf.Variable) -> tf.Operation:
        """Updates `variable` and its slots from a dense gradient."""

    def _decay(self, variable: tf.Variable) -> list[tf.Operation]:
        if not self.weight_decay or len(_long_axes(variable.shape)) < 2:
            return []
        share = self.learning_rate * self.weight_decay
        return [variable.assign_sub(variable.read_value() * share, read_value=False)]

    def _slot(self, slot: str, variable: tf.Variable, shape: Any = None) -> tf.Variable:
        shape = variable.shape if shape is None else shape
        return self._variable(f"{slot}/{variable.name.partition(':')[0]}", shape, tf.float32)

    def _variable(self, name: str, shape: Any, dtype: tf.DType) -> tf.Variable:
        name = f"optimizer/{self.name}/{name}"
        if name not in self._slots:
            root = tf.compat.v1.VariableScope(tf.compat.v1.AUTO_REUSE, use_resource=True)
            # Without control dependencies: an initializer must not wait for a gradient.
            with (
                tf.control_dependencies(None),
                tf.compat.v1.variable_scope(root, auxiliary_name_scope=False),
            ):
                self._slots[name] = get_variable(
                    name, shape, dtype, initializer=zeros, trainable=False
                )
        return self._slots[name]


class Adam(Optimizer):
    """Adam (Kingma & Ba 2015, arXiv:1412.6980), as tf.compat.v1.train.AdamOptimizer computes it.

    The bias correction is part of the step size, and epsilon is added to the uncorrected root.
    """

    name = "adam"
    beta1, beta2, epsilon = 0.9, 0.999, 1e-8

    def __init__(self, learning_rate: float | tf.Tensor, weight_decay: float = 0.0):
        """See Optimizer."""
        super().__init__(learning_rate, weight_decay)
        # In float64, since 1 - 0.999 loses three of float32's seven digits, but from the float32
        # values with which the moments are averaged.
        first = 1.0 - tf.cast(tf.constant(self.beta1), tf.float64) ** self._next_step
        second = 1.0 - tf.cast(tf.constant(self.beta2), tf.float64) ** self._next_step
        self._step_size = self.learning_rate * tf.cast(tf.sqrt(second) / first, tf.float32)

    def _update(self, gradient: tf.Tensor, variable: tf.Variable) -> tf.Operation:
        return tf.raw_ops.ResourceApplyAdam(
            var=variable.handle,
            m=self._slot("m", variable).handle,
            v=self._slot("v", variable).handle,
            beta1_power=0.0,  # the correction is in the step size
            beta2_power=0.0,
            lr=self._step_size,
            beta1=self.beta1,
            beta2=self.beta2,
            epsilon=self.epsilon,
            grad=gradient,
        )


class SGD(Optimizer):
    """Stochastic gradient descent, without momentum: the step counter is its only state."""

    name = "sgd"

    def _update(self, gradient: tf.Tensor, variable: tf.Variable) -> tf.Operation:
        return tf.raw_ops.ResourceApplyGradientDescent(
            var=variable.handle, alpha=self.learning_rate, delta=gradient
        )


class Adafactor(Optimizer):
    """Adafactor (Shazeer & Stern 2018, arXiv:1804.04235), algorithms 4 and 5, without momentum.

    A matrix keeps the mean squares of its rows and columns instead of a second moment for each
    element. The learning rate is the step size, instead of the paper's relative step size.

    Attributes:
        decay_rate: the second moments' decay at step t is 1 - t ** -decay_rate.
        clipping_threshold: an update's root mean square never exceeds it, before the step size.
        epsilon1: added to squared gradients.
    """

    name = "adafactor"
    decay_rate, clipping_threshold, epsilon1 = 0.8, 1.0, 1e-30

    def __init__(self, learning_rate: float | tf.Tensor, weight_decay: float = 0.0):
        """See Optimizer."""
        super().__init__(learning_rate, weight_decay)
        self._one_minus_beta2 = tf.cast(self._next_step**-self.decay_rate, tf.float32)

    def _update(self, gradient: tf.Tensor, variable: tf.Variable) -> tf.Operation:
        # The variable is not read after this: its buffer is free when the learning rate is known.
        with tf.control_dependencies([self.learning_rate]):
            if len(_long_axes(variable.shape)) < 2:
                update = self._update_of_vector(gradient, variable)
            else:
                update = self._update_of_matrix(gradient, variable)
            return variable.assign_sub(tf.reshape(update, variable.shape), read_value=False)

    def _update_of_vector(self, gradient: tf.Tensor, variable: tf.Variable) -> tf.Tensor:
        second = self._average("v", variable, variable.shape, tf.square(gradient) + self.epsilon1)
        update = gradient * tf.math.rsqrt(second)
        return update * self._clipped_step_size(tf.reduce_mean(tf.square(update)))

    def _update_of_matrix(self, gradient: tf.Tensor, variable: tf.Variable) -> tf.Tensor:
        gradient = _as_matrix(gradient)
        rows, columns = gradient.shape.as_list()
        row_sums, column_sums = _sum_both(lambda g: tf.square(g) + self.epsilon1, gradient)
        row_mean = self._average("rows", variable, [rows], row_sums / columns)
        column_mean = self._average("columns", variable, [columns], column_sums / rows)
        row_factor = tf.math.rsqrt(row_mean / tf.reduce_mean(row_mean))
        column_root = tf.sqrt(column_mean)
        with tf.control_dependencies([row_factor, column_root]):
            squares = _sum_rows(lambda g: tf.square(g / column_root), gradient)
            mean_square = tf.reduce_sum(squares * tf.square(row_factor)) / (rows * columns)
        # The step size multiplies the row's factor, so that the rest happens in the gradient's own
        # buffer. Of two products, Grappler would compute rows * columns first: a new matrix.
        row_factor *= self._clipped_step_size(mean_square)
        return gradient * row_factor[:, tf.newaxis] / column_root

    def _average(self, slot: str, variable: tf.Variable, shape: Any, value: tf.Tensor) -> tf.Tensor:
        average = self._slot(slot, variable, shape)
        old = average.read_value()
        return average.assign(old + self._one_minus_beta2 * (value - old))

    def _clipped_step_size(self, mean_square: tf.Tensor) -> tf.Tensor:
        root = tf.sqrt(mean_square)
        return self.learning_rate / tf.maximum(1.0, root / self.clipping_threshold)


def _long_axes(shape: tf.TensorShape) -> list[int]:
    """Sizes of the axes longer than 1. A linear layer's w [1, nx, nf] has two, as a matrix."""
    return [size for size in shape.as_list() if size != 1]


def _as_matrix(x: tf.Tensor) -> tf.Tensor:
    """Reshapes x to a matrix: the last long axis becomes the columns, all others the rows."""
    columns = (_long_axes(x.shape) or [1])[-1]
    return tf.reshape(x, [x.shape.num_elements() // columns, columns])


def _chunks(matrix: tf.Tensor) -> Iterable[tf.Tensor]:
    """Chunks of rows of `matrix`, CHUNK_BYTES each; a slice of rows copies nothing."""
    rows, columns = matrix.shape.as_list()
    size = max(1, CHUNK_BYTES // (columns * matrix.dtype.size))
    if rows <= size:
        yield matrix
        return
    for start in range(0, rows, size):
        yield matrix[start : start + size]


def _sum_both(
    function: Callable[[tf.Tensor], tf.Tensor], matrix: tf.Tensor
) -> tuple[tf.Tensor, tf.Tensor]:
    """Sums of function(matrix) by row [rows] and by column [columns]."""
    by_row: list[tf.Tensor] = []
    by_column = tf.zeros(matrix.shape[1:], matrix.dtype)
    for chunk in _chunks(matrix):
        with tf.control_dependencies([*by_row[-1:], by_column]):
            values = function(chunk)
            by_row.append(tf.reduce_sum(values, axis=1))
            by_column += tf.reduce_sum(values, axis=0)
    return tf.concat(by_row, axis=0), by_column


def _sum_rows(function: Callable[[tf.Tensor], tf.Tensor], matrix: tf.Tensor) -> tf.Tensor:
    """Sums of function(matrix) by row, [rows]."""
    sums: list[tf.Tensor] = []
    for chunk in _chunks(matrix):
        with tf.control_dependencies(sums[-1:]):
            sums.append(tf.reduce_sum(function(chunk), axis=1))
    return tf.concat(sums, axis=0)


OPTIMIZERS: dict[str, type[Optimizer]] = {
    optimizer.name: optimizer for optimizer in (Adam, Adafactor, SGD)
}


def make_optimizer(
    name: str, learning_rate: float | tf.Tensor, weight_decay: float = 0.0
) -> Optimizer:
    """Makes an optimizer by name in the default graph.

    Args:
        name: 'adam', 'adafactor' or 'sgd'.
        learning_rate: a number or a scalar tensor, such as a placeholder that is fed.
        weight_decay: see Optimizer.

    Returns:
        The optimizer.

    Raises:
        ValueError: no optimizer of that name, or a negative number.
    """
    if name not in OPTIMIZERS:
        raise ValueError(f"optimizer={name!r} is unknown; there are {sorted(OPTIMIZERS)}")
    return OPTIMIZERS[name](learning_rate, weight_decay)


class AccumulatingOptimizer:
    """Trains k micro-batches of n windows as one batch of k * n.

    For each step run `reset()`, then `compute_gradients(loss)` for each micro-batch, then
    `apply_gradients()`. The update is by the mean of the micro-batches' gradients, and the loss
    returned is the mean of their losses. Each variable has one accumulator, shaped as it is.
    """

    def __init__(
        self, opt: Optimizer | tf.compat.v1.train.Optimizer, var_list: Sequence[tf.Variable]
    ):
        """Makes the accumulators in the default graph; they must be initialised before use.

        Args:
            opt: one of this module's optimizers, or a tf.compat.v1.train.Optimizer.
            var_list: the variables to train.
        """
        self.opt = opt
        self.var_list = list(var_list)
        self._accumulators = {v.name: self._accumulator(v) for v in self.var_list}
        # Names of the variables for which there are gradients.
        self._reached: set[str] = set()
        self._total_loss = self._counter("total_loss")
        self._count = self._counter("count")

    def reset(self) -> tf.Operation:
        """Forgets the micro-batches so far; accumulators are zeroed one after the other."""
        last: tf.Operation = tf.group(
            self._total_loss.assign(0.0, read_value=False),
            self._count.assign(0.0, read_value=False),
        )
        for accumulator in self._accumulators.values():
            with tf.control_dependencies([last]), tf.device(accumulator.device):
                value = zeros(accumulator.shape, accumulator.dtype)
                last = accumulator.assign(value, read_value=False)
        return last

    def compute_gradients(self, loss: tf.Tensor) -> tf.Operation:
        """Adds a micro-batch: its gradients and its loss.

        Args:
            loss: scalar, the micro-batch's mean loss.

        Returns:
            The operation that adds them.

        Raises:
            ValueError: `loss` depends on none of the variables.
        """
        found = zip(tf.gradients(loss, self.var_list), self.var_list, strict=True)
        additions = [self.add(variable, g) for g, variable in found if g is not None]
        if not additions:
            raise ValueError(f"{loss.name} depends on none of the {len(self.var_list)} variables")
        return self.end_micro_batch(loss, additions)

    def add(self, variable: tf.Variable, part: Gradient) -> tf.Operation:
        """Adds a part of a variable's gradient, for callers who differentiate by themselves.

        Args:
            variable: one of var_list.
            part: shaped as the variable.

        Returns:
            The operation that adds; give those of a micro-batch to `end_micro_batch`.
        """
        self._reached.add(variable.name)
        accumulator = self._accumulators[variable.name]
        with tf.device(accumulator.device):
            return accumulator.assign_add(dense(part), read_value=False)

    def end_micro_batch(self, loss: tf.Tensor, additions: Iterable[tf.Operation]) -> tf.Operation:
        """Ends a micro-batch, for callers of `add`.

        Args:
            loss: scalar, the micro-batch's mean loss.
            additions: what `add` returned.

        Returns:
            The operation that runs the additions, adds the loss and counts the micro-batch.
        """
        return tf.group(
            *additions,
            self._total_loss.assign_add(tf.cast(loss, tf.float32), read_value=False),
            self._count.assign_add(1.0, read_value=False),
        )

    def sum_over_workers(
        self,
        collectives: Collectives,
        last_micro_batch: tf.Operation,
        additions: Mapping[str, Sequence[tf.Operation]],
        wants_stop: tf.Tensor,
    ) -> tf.Tensor:
        """Sums gradients, losses and counts over all workers: all then take the same step.

        Gradients are sent as soon as they are complete: those of the last blocks come first.

        Args:
            collectives: the workers'.
            last_micro_batch: from `end_micro_batch`; it is run, too.
            additions: what `add` returned in it, by the variables' names.
            wants_stop: float32 scalar, which the statuses pass on.

        Returns:
            The statuses, float32 [workers, 3]: each worker's sum of losses, its count of
            micro-batches, and its `wants_stop`.
        """
        written = {total.name: additions[v.name] for total, v in self._totals()}
        totals = [total for total, _ in reversed(self._totals())]
        summed = collectives.sum_variables(totals, lambda total: written[total.name])
        with tf.control_dependencies([last_micro_batch]):
            mine = [self._total_loss.read_value(), self._count.read_value(), wants_stop]
        statuses = collectives.gather(tf.stack(mine))
        loss, count, _ = tf.unstack(tf.reduce_sum(statuses, axis=0))
        work = tf.group(
            *summed,
            self._total_loss.assign(loss, read_value=False),
            self._count.assign(count, read_value=False),
        )
        return collectives.guarded(work, statuses)

    def global_norm(self) -> tf.Tensor:
        """The Euclidean norm of the mean gradient over all variables: a scalar."""
        squares = [tf.nn.l2_loss(total.read_value()) for total, _ in self._totals()]
        return tf.sqrt(2.0 * tf.add_n(squares)) / self._count.read_value()

    def all_finite(self) -> tf.Tensor:
        """Whether all accumulated gradients are finite: a scalar, bool."""
        sums = [tf.reduce_sum(total.read_value()) for total, _ in self._totals()]
        return tf.reduce_all(tf.math.is_finite(tf.stack(sums)))

    def apply_gradients(self, scale: float | tf.Tensor = 1.0) -> tf.Tensor:
        """Updates the variables by the mean gradient; the accumulators then hold that mean.

        Args:
            scale: a factor for the gradients, such as 1 / loss scale, or
                tf.minimum(1.0, clip / opt.global_norm()).

        Returns:
            The mean loss of the micro-batches, a scalar; evaluating it does the update.

        Raises:
            ValueError: `compute_gradients` was not called before.
        """
        pairs = self._totals()
        if not pairs:
            raise ValueError("call compute_gradients(loss) before apply_gradients()")
        factor = scale / self._count.read_value()
        loss = self.mean_loss()
        # One after the other and before all updates, so that only one gradient exists twice.
        last: list[tf.Operation] = []
        for accumulator, _ in pairs:
            with tf.control_dependencies(last), tf.device(accumulator.device):
                mean = accumulator.read_value() * factor
                last = [accumulator.assign(mean, read_value=False)]
        with tf.control_dependencies([*last, loss, factor]):
            counted = [
                self._total_loss.assign(loss, read_value=False),
                self._count.assign(1.0, read_value=False),
            ]
            applied = self.opt.apply_gradients([(mean.read_value(), v) for mean, v in pairs])
        with tf.control_dependencies([applied, *counted]):
            return tf.identity(loss)

    def mean_loss(self) -> tf.Tensor:
        """The mean loss of the micro-batches so far, a scalar."""
        return self._total_loss.read_value() / self._count.read_value()

    def variables(self) -> list[tf.Variable]:
        """The accumulators and counters. They live from one reset to the next.

        The state that outlives a step is the optimizer's: `opt.variables()`.
        """
        return [*self._accumulators.values(), self._total_loss, self._count]

    def _totals(self) -> list[tuple[tf.Variable, tf.Variable]]:
        """Pairs of an accumulator and its variable, for all variables that have a gradient."""
        return [(self._accumulators[v.name], v) for v in self.var_list if v.name in self._reached]

    @staticmethod
    def _accumulator(variable: tf.Variable) -> tf.Variable:
        name = variable.name.partition(":")[0]
        with tf.device(variable.device):
            return tf.compat.v1.Variable(
                zeros(variable.shape, variable.dtype.base_dtype),
                trainable=False,
                use_resource=True,
                name=f"optimizer/accumulated/{name}",
            )

    @staticmethod
    def _counter(name: str) -> tf.Variable:
        return tf.compat.v1.Variable(
            0.0, trainable=False, use_resource=True, name=f"optimizer/accumulated/{name}"
        )
