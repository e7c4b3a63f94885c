"""Tensors of one worker in, sums over all workers out: operations of a session's graph.

All workers build the same operations in the same order, and run them as often. Pieces travel one
after the other, as NCCL needs it; a piece starts as soon as its gradients are complete.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import tensorflow as tf

from .channel import WorkerLost
from .cluster import Cluster

# Variables are joined into pieces of this size, so that few messages are sent, and large ones are
# cut, so that little memory is needed.
PIECE_BYTES = 32 * 2**20
# So many pieces exist at once: one that travels, what has come of it, its sum, and the next one.
PIECES_AT_ONCE = 4

# A run that another worker's failure ended is told here; see Collectives.guarded.
_GOES_ON, _ABORTED = 0, 1

# How long to wait for the reason after a run failed: a killed worker is noticed at once.
REASON_SECONDS = 10.0

Additions = Callable[[tf.Variable], Sequence[tf.Operation]]


class _Alarm(NamedTuple):
    """Ends a run that waits for other workers.

    A collective operation waits for ever for a worker that is frozen, but ends when another
    operation of its run fails. So each run also waits for a number from a queue: it sends itself
    _GOES_ON at its end, or another thread sends _ABORTED, which fails.
    """

    queue: Any
    number: tf.Tensor
    sound: tf.Operation


class Collectives:
    """Adds operations over all workers to a session's graph."""

    def __init__(self, cluster: Cluster):
        self.cluster = cluster
        self._n_in_run = 0
        self._last: list[tf.Operation] = []
        with tf.compat.v1.name_scope("workers"), tf.device("/cpu:0"):
            queue = tf.queue.FIFOQueue(1000, [tf.int32], [[]], name="alarm")
            number = tf.compat.v1.placeholder(tf.int32, [], "number")
            self._alarm = _Alarm(queue, number, queue.enqueue(number))

    # --- graph ------------------------------------------------------------------------------------

    def _options(self, kind: str, dtype: tf.DType, shape: Any, device: str) -> dict[str, Any]:
        """What a collective operation is told: its group, and which of a run's operations it is.

        TensorFlow keeps a process's operations by these numbers, and refuses to use one again for
        another kind or type. They must not depend on what else a worker's graph holds.
        """
        self._n_in_run += 1
        what = f"{kind} {self._n_in_run}: {dtype.name} {tf.TensorShape(shape).as_list()}"
        # A group's members are on devices of one kind, which is the same for values of one type.
        group = f"{dtype.name} {device}"
        return {
            "group_size": self.cluster.spec.count,
            "group_key": _number(group),
            "instance_key": _number(what),
            "communication_hint": "auto",
        }

    def sum(self, value: tf.Tensor, device: str = "") -> tf.Tensor:
        """The sum of all workers' values, the same bits on all of them."""
        with tf.device(device), tf.control_dependencies(self._last):
            summed = tf.raw_ops.CollectiveReduceV2(
                input=value, ordering_token=[], merge_op="Add", final_op="Id",
                **self._options("sum", value.dtype.base_dtype, value.shape, device),
            )  # fmt: skip
        self._last = [summed.op]
        return summed

    def gather(self, value: tf.Tensor) -> tf.Tensor:
        """All workers' values, [workers, ...]; one that is not a number stays in its own row."""
        spec = self.cluster.spec
        rows = [[spec.index, spec.count - spec.index - 1]]
        padding = rows + [[0, 0]] * value.shape.ndims
        return self.sum(tf.pad(value[tf.newaxis], padding))

    def sum_variables(
        self, variables: Sequence[tf.Variable], written: Additions
    ) -> list[tf.Operation]:
        """Sums variables over all workers, in place.

        Args:
            variables: float32, in the order in which they become complete.
            written: the operations after which a variable can be sent.

        Returns:
            The operations that write the sums.
        """
        sums: list[tf.Operation] = []
        writes: dict[str, list[tf.Operation]] = {}
        for piece in _pieces(variables):
            device = piece[0].variable.device
            # A piece is joined while the one before it travels, and not earlier: if sums are slower
            # than the backward pass, all gradients would come to be there twice.
            with tf.control_dependencies(sums[-2:-1]), tf.device(device):
                values = [part.read(written(part.variable)) for part in piece]
                joined = values[0] if len(values) == 1 else tf.concat(values, axis=0)
            summed = self.sum(joined, device)
            sums.append(summed.op)
            start = 0
            for part in piece:
                with tf.device(device):
                    write = part.write(summed[start : start + part.size])
                writes.setdefault(part.variable.name, []).append(write)
                start += part.size
        done = []
        for variable in variables:
            # TensorFlow copies a variable in each read once a part of it was written.
            with tf.control_dependencies(writes[variable.name]), tf.device(variable.device):
                done.append(tf.raw_ops.DisableCopyOnRead(resource=variable.handle))
        return done

    def broadcast(
        self,
        source: int,
        value: Callable[[], tf.Tensor],
        dtype: tf.DType,
        shape: Any,
        device: str = "",
    ) -> tf.Tensor:
        """One worker's value, on all of them.

        Args:
            source: the index of the worker that has the value.
            value: makes the tensor there; it is called on no other worker.
            dtype: the value's type.
            shape: its static shape.
            device: where it is sent from, and received.
        """
        kind = f"copy from {source}"
        with tf.device(device), tf.control_dependencies(self._last):
            options = self._options(kind, dtype, shape, device)
            if source == self.cluster.spec.index:
                sent = _as_type(value(), _sent_type(dtype))
                result = tf.raw_ops.CollectiveBcastSendV2(input=sent, **options)
            else:
                result = tf.raw_ops.CollectiveBcastRecvV2(
                    T=_sent_type(dtype), shape=tf.TensorShape(shape).as_list(), **options
                )
            self._last = [result.op]
            return _as_type(result, dtype)

    def copy_variable(
        self, variable: tf.Variable, source: int, after: Sequence[tf.Operation] = ()
    ) -> tf.Operation:
        """The operation that gives all workers the value which one worker's variable has.

        Args:
            variable: has the same name, type and shape on all workers.
            source: the index of the worker whose value it is.
            after: operations that come first: on that worker, they set the value.
        """

        def value() -> tf.Tensor:
            with tf.control_dependencies(after):
                return variable.read_value()

        dtype, device = variable.dtype.base_dtype, variable.device
        copied = self.broadcast(source, value, dtype, variable.shape, device)
        if source != self.cluster.spec.index:
            with tf.device(device):
                self._last = [variable.assign(copied, read_value=False)]
        return self._last[0]

    def copy_from_writer(self, variables: Sequence[tf.Variable]) -> tf.Operation:
        """The operation that gives all workers the values that worker 0's variables have."""
        return self.guarded(tf.group(*[self.copy_variable(v, source=0) for v in variables]))

    def guarded(self, work: tf.Operation, value: tf.Tensor | None = None) -> Any:
        """An operation, or `value` after it, that abort() can end; see _Alarm."""
        self._last, self._n_in_run = [], 0  # what comes next is another run
        with tf.device("/cpu:0"):
            with tf.control_dependencies([work]):
                goes_on = self._alarm.queue.enqueue(_GOES_ON)
            number = self._alarm.queue.dequeue()
            intact = tf.raw_ops.Assert(
                condition=tf.equal(number, _GOES_ON), data=["another worker failed"]
            )
        with tf.control_dependencies([goes_on, intact]):
            return tf.no_op() if value is None else tf.identity(value)

    # --- session ----------------------------------------------------------------------------------

    def run(self, sess: tf.compat.v1.Session, guarded: Any, feed: Any = None) -> Any:
        """Runs what guarded() returned.

        Raises:
            WorkerLost: another worker failed meanwhile, or before.
        """
        channel = self.cluster.channel

        def abort() -> None:
            try:
                sess.run(self._alarm.sound, {self._alarm.number: _ABORTED})
            except (RuntimeError, tf.errors.OpError):
                pass  # the session is closed: nothing runs in it

        channel.on_failure = abort
        if channel.failure is not None:
            raise WorkerLost(channel.failure)
        try:
            return sess.run(guarded, feed)
        except tf.errors.ResourceExhaustedError:
            raise
        except tf.errors.OpError as error:
            reason = channel.wait_for_failure(REASON_SECONDS)
            if reason is None:
                raise
            raise WorkerLost(reason) from error
        finally:
            channel.on_failure = lambda: None


def _sent_type(dtype: tf.DType) -> tf.DType:
    """The type in which a value's bits travel: there is no broadcast of bfloat16."""
    return tf.float16 if dtype == tf.bfloat16 else dtype


def _as_type(value: tf.Tensor, dtype: tf.DType) -> tf.Tensor:
    """The same bits in another type of the same size."""
    return value if value.dtype == dtype else tf.bitcast(value, dtype)


def _number(text: str) -> int:
    """A positive int32 that stands for a text, on all workers alike."""
    return zlib.crc32(text.encode()) & 0x7FFFFFFF


class _Rows(NamedTuple):
    """Some of a variable's rows: of its first axis."""

    variable: tf.Variable
    start: int
    end: int

    @property
    def size(self) -> int:
        """How many numbers they are."""
        return (self.end - self.start) * math.prod(self.variable.shape.as_list()[1:])

    def read(self, after: Sequence[tf.Operation]) -> tf.Tensor:
        """A copy of their numbers, flat, as they are after some operations.

        A slice of the whole value would hold the variable's memory, and a write would copy it.
        """
        with tf.control_dependencies(after):
            value = tf.raw_ops.ResourceGather(
                resource=self.variable.handle, indices=tf.range(self.start, self.end),
                dtype=self.variable.dtype,
            )  # fmt: skip
        return tf.reshape(value, [-1])

    def write(self, values: tf.Tensor) -> tf.Operation:
        """Writes their numbers into the variable's memory, so that it needs no other."""
        shape = [self.end - self.start, *self.variable.shape.as_list()[1:]]
        return tf.raw_ops.ResourceStridedSliceAssign(
            ref=self.variable.handle, begin=[self.start], end=[self.end], strides=[1],
            value=tf.reshape(values, shape),
        )  # fmt: skip


def _pieces(variables: Sequence[tf.Variable]) -> list[list[_Rows]]:
    """Rows of variables of one device, joined and cut so that a piece has PIECE_BYTES at most."""
    pieces: list[list[_Rows]] = []
    room = 0
    for variable in variables:
        n_rows, *row = variable.shape.as_list()
        row_bytes = math.prod(row) * variable.dtype.size
        start = 0
        while start < n_rows:
            if not pieces or room < row_bytes or pieces[-1][0].variable.device != variable.device:
                pieces.append([])
                room = max(PIECE_BYTES, row_bytes)
            end = min(n_rows, start + room // row_bytes)
            pieces[-1].append(_Rows(variable, start, end))
            room -= (end - start) * row_bytes
            start = end
    return pieces
