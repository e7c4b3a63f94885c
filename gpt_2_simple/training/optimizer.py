"""Gradients in, updates of variables in place out: Adam, Adafactor, SGD, and accumulation.

Memory decides how everything here is written. A variable is updated in its own buffer, which
TensorFlow does only while nobody else holds that buffer; updates of many variables run one after
the other, so that what one of them needs for a moment is never needed twice; zeros are made when
they are needed instead of lying in the graph.
"""

from __future__ import annotations

import abc
import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import tensorflow as tf

Gradient = tf.Tensor | tf.IndexedSlices

# Adafactor looks at matrices larger than this a few rows at a time.
CHUNK_BYTES = 32 * 2**20


def zeros(shape: Sequence[int] | tf.TensorShape, dtype: Any = tf.float32, **_: Any) -> tf.Tensor:
    """Zeros that cost no memory before they are asked for; usable as an initializer.

    tf.zeros of a static shape is folded into a constant by Grappler. The constant stays in memory
    as long as the session, and a variable initialised from it has to be copied at its first update.
    Empty is stateful, which no pass folds.
    """
    sizes = tf.TensorShape(shape).as_list()
    return tf.raw_ops.Empty(shape=sizes, dtype=tf.as_dtype(dtype), init=True)


def dense(gradient: Gradient) -> tf.Tensor:
    """The gradient as one dense tensor; a dense one is returned as it is."""
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
                the variable by 1 - learning_rate * weight_decay. Biases and gains, whatever has
                fewer than two axes longer than 1, are left out.

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

        The update costs no second copy of the variable if all operations that hold its value have
        run before: give them as control dependencies.

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
        """Ends a step: counts it when all of its updates have run."""
        with tf.control_dependencies(list(updates)):
            return self._step.assign_add(1, read_value=False)

    def apply_gradients(
        self, grads_and_vars: Iterable[tuple[Gradient | None, tf.Variable]]
    ) -> tf.Operation:
        """A whole step: updates the variables one after the other, then counts the step.

        Args:
            grads_and_vars: pairs of a gradient and its variable; pairs with None are left out.

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
        """The state: the step counter and the slots made so far, in order of creation."""
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
                self._slots[name] = tf.compat.v1.get_variable(
                    name, shape, dtype, initializer=zeros, trainable=False
                )
        return self._slots[name]


class Adam(Optimizer):
    """Adam (Kingma & Ba 2015, arXiv:1412.6980), as tf.compat.v1.train.AdamOptimizer does it.

    The bias correction is part of the step size, and epsilon is added to the uncorrected root.
    """

    name = "adam"

    def __init__(
        self,
        learning_rate: float | tf.Tensor,
        beta1: float = 0.9,
        beta2: float = 0.999,
        epsilon: float = 1e-8,
        weight_decay: float = 0.0,
    ):
        """See Optimizer; `beta1` and `beta2` are the decay rates of the two moments."""
        super().__init__(learning_rate, weight_decay)
        self.beta1, self.beta2, self.epsilon = beta1, beta2, epsilon
        # In float64, since 1 - 0.999 loses three of float32's seven digits, but from the float32
        # values with which the moments are averaged.
        first = 1.0 - tf.cast(tf.constant(beta1), tf.float64) ** self._next_step
        second = 1.0 - tf.cast(tf.constant(beta2), tf.float64) ** self._next_step
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
    """Stochastic gradient descent, with momentum if it is above 0."""

    name = "sgd"

    def __init__(
        self, learning_rate: float | tf.Tensor, momentum: float = 0.0, weight_decay: float = 0.0
    ):
        """See Optimizer; without `momentum` there is no state but the step counter."""
        super().__init__(learning_rate, weight_decay)
        self.momentum = momentum

    def _update(self, gradient: tf.Tensor, variable: tf.Variable) -> tf.Operation:
        if not self.momentum:
            return tf.raw_ops.ResourceApplyGradientDescent(
                var=variable.handle, alpha=self.learning_rate, delta=gradient
            )
        return tf.raw_ops.ResourceApplyMomentum(
            var=variable.handle,
            accum=self._slot("momentum", variable).handle,
            lr=self.learning_rate,
            grad=gradient,
            momentum=self.momentum,
        )


class Adafactor(Optimizer):
    """Adafactor (Shazeer & Stern 2018, arXiv:1804.04235), algorithms 4 and 5, without momentum.

    A matrix keeps the mean squares of its rows and columns instead of a second moment for each
    element. By default the learning rate is used as it is; the paper's own step sizes are those of
    relative_step=True, scale_parameter=True and learning_rate=1e-2.
    """

    name = "adafactor"

    def __init__(
        self,
        learning_rate: float | tf.Tensor,
        relative_step: bool = False,
        scale_parameter: bool = False,
        decay_rate: float = 0.8,
        clipping_threshold: float = 1.0,
        epsilon1: float = 1e-30,
        epsilon2: float = 1e-3,
        weight_decay: float = 0.0,
    ):
        """See Optimizer.

        Args:
            learning_rate: the step size, or with `relative_step` its upper bound.
            relative_step: the step size is min(learning_rate, 1 / sqrt(step)).
            scale_parameter: the step size is multiplied by the variable's root mean square, at
                least `epsilon2`.
            decay_rate: the second moments' decay at step t is 1 - t ** -decay_rate.
            clipping_threshold: an update's root mean square never exceeds it, before the step size.
            epsilon1: added to squared gradients.
            epsilon2: see `scale_parameter`.
            weight_decay: see Optimizer.
        """
        super().__init__(learning_rate, weight_decay)
        self.scale_parameter = scale_parameter
        self.clipping_threshold = clipping_threshold
        self.epsilon1, self.epsilon2 = epsilon1, epsilon2
        self._new_share = tf.cast(self._next_step**-decay_rate, tf.float32)  # 1 - decay
        self._step_size = self.learning_rate
        if relative_step:
            bound = tf.cast(tf.math.rsqrt(self._next_step), tf.float32)
            self._step_size = tf.minimum(self.learning_rate, bound)

    def _update(self, gradient: tf.Tensor, variable: tf.Variable) -> tf.Operation:
        step_size = self._step_size
        if self.scale_parameter:
            squares = _sum_rows(tf.square, _as_matrix(variable.read_value()))
            scale = tf.sqrt(tf.reduce_sum(squares) / variable.shape.num_elements())
            step_size *= tf.maximum(scale, self.epsilon2)
        # The variable is read no more: its buffer is free when this is known.
        with tf.control_dependencies([step_size]):
            if len(_long_axes(variable.shape)) < 2:
                update = self._direction_of_vector(gradient, variable, step_size)
            else:
                update = self._direction_of_matrix(gradient, variable, step_size)
            return variable.assign_sub(tf.reshape(update, variable.shape), read_value=False)

    def _direction_of_vector(
        self, gradient: tf.Tensor, variable: tf.Variable, step_size: tf.Tensor
    ) -> tf.Tensor:
        second = self._average("v", variable, variable.shape, tf.square(gradient) + self.epsilon1)
        update = gradient * tf.math.rsqrt(second)
        return update * self._clipped(step_size, tf.reduce_mean(tf.square(update)))

    def _direction_of_matrix(
        self, gradient: tf.Tensor, variable: tf.Variable, step_size: tf.Tensor
    ) -> tf.Tensor:
        gradient = _as_matrix(gradient)
        rows, columns = gradient.shape
        row_sums, column_sums = _sum_both(lambda g: tf.square(g) + self.epsilon1, gradient)
        row_mean = self._average("rows", variable, [rows], row_sums / columns)
        column_mean = self._average("columns", variable, [columns], column_sums / rows)
        row_factor = tf.math.rsqrt(row_mean / tf.reduce_mean(row_mean))
        column_root = tf.sqrt(column_mean)
        with tf.control_dependencies([row_factor, column_root]):
            squares = _sum_rows(lambda g: tf.square(g / column_root), gradient)
            mean_square = tf.reduce_sum(squares * tf.square(row_factor)) / (rows * columns)
        # The step size is in the row's factor, so that all of this happens in the gradient's own
        # buffer. Of two products Grappler would form that of rows and columns first, a new matrix.
        row_factor *= self._clipped(step_size, mean_square)
        return gradient * row_factor[:, tf.newaxis] / column_root

    def _average(self, slot: str, variable: tf.Variable, shape: Any, value: tf.Tensor) -> tf.Tensor:
        average = self._slot(slot, variable, shape)
        new = average.read_value()
        return average.assign(new + self._new_share * (value - new))

    def _clipped(self, step_size: tf.Tensor, mean_square: tf.Tensor) -> tf.Tensor:
        return step_size / tf.maximum(1.0, tf.sqrt(mean_square) / self.clipping_threshold)


def _long_axes(shape: tf.TensorShape) -> list[int]:
    """Sizes of the axes longer than 1: a conv1d weight [1, nx, nf] has the two of a matrix."""
    return [size for size in shape.as_list() if size != 1]


def _as_matrix(x: tf.Tensor) -> tf.Tensor:
    """A matrix of x, with its last long axis as columns and all others as rows."""
    columns = (_long_axes(x.shape) or [1])[-1]
    return tf.reshape(x, [x.shape.num_elements() // columns, columns])


def _chunks(matrix: tf.Tensor) -> Iterable[tf.Tensor]:
    """Rows of `matrix`, CHUNK_BYTES at a time; a slice of leading rows copies nothing."""
    rows, columns = matrix.shape
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
    by_column = tf.zeros([matrix.shape[1]], matrix.dtype)
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


def make_optimizer(name: str, learning_rate: float | tf.Tensor, **options: Any) -> Optimizer:
    """Makes an optimizer by name in the default graph.

    Args:
        name: 'adam', 'adafactor' or 'sgd'.
        learning_rate: a number or a scalar tensor, such as a placeholder that is fed.
        **options: the optimizer's own, such as weight_decay or momentum.

    Returns:
        The optimizer.

    Raises:
        ValueError: no optimizer of that name, or it has no such option.
    """
    if name not in OPTIMIZERS:
        raise ValueError(f"optimizer={name!r} is unknown; there are {sorted(OPTIMIZERS)}")
    known = list(inspect.signature(OPTIMIZERS[name]).parameters)
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise ValueError(f"optimizer {name!r} has no options {unknown}; it has {known}")
    return OPTIMIZERS[name](learning_rate, **options)


class AccumulatingOptimizer:
    """Makes k micro-batches of n train as one batch of k * n.

    `reset()`, then `compute_gradients(loss)` for each micro-batch, then `apply_gradients()`: the
    update is by the mean of the micro-batches' gradients, and the loss returned is the mean of
    their losses. One accumulator a variable is the only extra copy.
    """

    def __init__(
        self,
        opt: Optimizer | tf.compat.v1.train.Optimizer,
        var_list: Sequence[tf.Variable],
        gradients_function: Callable[..., list[Gradient | None]] | None = None,
    ):
        """Makes the accumulators in the default graph; they must be initialised before use.

        Args:
            opt: one of this module's optimizers, or a tf.compat.v1.train.Optimizer.
            var_list: the variables to train.
            gradients_function: called as tf.gradients, the default. One with a parameter `on_part`,
                such as memory_saving_gradients.gradients, adds to the accumulators by it.
        """
        self.opt = opt
        self.var_list = list(var_list)
        self.gradients_function = gradients_function or tf.gradients
        self._accumulators = [self._accumulator(variable) for variable in self.var_list]
        self._reached: set[int] = set()
        self._total_loss = self._counter("total_loss")
        self._count = self._counter("count")

    def reset(self) -> tf.Operation:
        """Forgets the micro-batches so far; accumulators are zeroed one after the other."""
        last: tf.Operation = tf.group(
            self._total_loss.assign(0.0, read_value=False),
            self._count.assign(0.0, read_value=False),
        )
        for accumulator in self._accumulators:
            with tf.control_dependencies([last]), tf.device(accumulator.device):
                value = zeros(accumulator.shape, accumulator.dtype)
                last = accumulator.assign(value, read_value=False)
        return last

    def compute_gradients(
        self, loss: tf.Tensor, gradients: Sequence[Gradient | None] | None = None, **options: Any
    ) -> tf.Operation:
        """Adds one micro-batch: each gradient as soon as it is there, and the loss.

        Args:
            loss: scalar, the micro-batch's mean loss.
            gradients: one for each variable, if they are known already.
            **options: for the gradients function, such as grad_ys or checkpoints.

        Returns:
            The operation that adds.

        Raises:
            ValueError: `loss` depends on none of the variables, or `gradients` are not as many.
        """
        additions: list[tf.Operation] = []

        def add(variable: tf.Variable, part: Gradient) -> tf.Operation:
            additions.append(self.add(variable, part))
            return additions[-1]

        function = self.gradients_function
        if gradients is None and "on_part" in inspect.signature(function).parameters:
            function(loss, self.var_list, on_part=add, **options)
        else:
            if gradients is None:
                gradients = function(loss, self.var_list, **options)
            if len(gradients) != len(self.var_list):
                raise ValueError(f"{len(gradients)} gradients for {len(self.var_list)} variables")
            for variable, gradient in zip(self.var_list, gradients, strict=True):
                if gradient is not None:
                    add(variable, gradient)
        if not additions:
            raise ValueError(f"{loss.name} depends on none of the {len(self.var_list)} variables")
        return self.count(loss, additions)

    def add(self, variable: tf.Variable, part: Gradient) -> tf.Operation:
        """Adds a part of a variable's gradient, for callers who differentiate by themselves.

        Args:
            variable: one of var_list.
            part: shaped as the variable.

        Returns:
            The operation that adds. `count` ends the micro-batch.
        """
        index = next(i for i, known in enumerate(self.var_list) if known is variable)
        self._reached.add(index)
        accumulator = self._accumulators[index]
        with tf.device(accumulator.device):
            return accumulator.assign_add(dense(part), read_value=False)

    def count(self, loss: tf.Tensor, additions: Iterable[tf.Operation]) -> tf.Operation:
        """Ends a micro-batch: all of its additions, and its loss."""
        return tf.group(
            *additions,
            self._total_loss.assign_add(tf.cast(loss, tf.float32), read_value=False),
            self._count.assign_add(1.0, read_value=False),
        )

    def global_norm(self) -> tf.Tensor:
        """The Euclidean norm of the mean gradient over all variables: a scalar."""
        squares = [tf.nn.l2_loss(self._accumulators[i].read_value()) for i in sorted(self._reached)]
        return tf.sqrt(2.0 * tf.add_n(squares)) / self._count.read_value()

    def all_finite(self) -> tf.Tensor:
        """Whether all accumulated gradients are finite: a scalar, bool."""
        sums = [tf.reduce_sum(self._accumulators[i].read_value()) for i in sorted(self._reached)]
        return tf.reduce_all(tf.math.is_finite(tf.stack(sums)))

    def apply_gradients(self, scale: float | tf.Tensor = 1.0) -> tf.Tensor:
        """Updates the variables by the mean gradient; accumulators then hold that mean.

        Args:
            scale: what gradients are multiplied by, such as 1 / loss scale, or
                tf.minimum(1.0, clip / opt.global_norm()).

        Returns:
            The mean loss of the micro-batches, a scalar; evaluating it does the update.

        Raises:
            ValueError: `compute_gradients` was not called before.
        """
        if not self._reached:
            raise ValueError("call compute_gradients(loss) before apply_gradients()")
        pairs = [(self._accumulators[i], self.var_list[i]) for i in sorted(self._reached)]
        factor = scale / self._count.read_value()
        loss = self.mean_loss()
        # One after the other and before all updates: at any time one gradient exists twice.
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
        """The accumulators and counters, which live from one reset to the next, unlike the state.

        The state is the optimizer's: `opt.variables()`.
        """
        return [*self._accumulators, self._total_loss, self._count]

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
