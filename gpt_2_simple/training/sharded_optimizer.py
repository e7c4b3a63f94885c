"""The optimizer's state in shares, one a worker: how it is updated, saved and restored.

This is ZeRO's first stage (Rajbhandari et al. 2019, arXiv:1910.02054): each variable has an owner,
the worker that alone holds the optimizer's state for it, updates it, and sends it to the others.
"""

from __future__ import annotations

import functools
import heapq
import math
import os
from collections.abc import Collection, Iterable, Sequence
from typing import Any, NamedTuple

import tensorflow as tf

from .. import session
from ..distributed.collectives import Collectives
from ..memory_saving_gradients import Gradient
from ..model import get_variable
from ..storage import checkpoint_tensors
from ..storage.optimizer_state import OptimizerState
from .optimizer import Optimizer, make_optimizer

# The size of a group of slots that travels at once: what worker 0 holds beside its own share.
GROUP_BYTES = 64 * 2**20


class Slot(NamedTuple):
    """A variable of the optimizer's state, float32, which one worker holds."""

    name: str
    shape: tuple[int, ...]
    owner: int


def assign_owners(sizes: Sequence[int], n_workers: int) -> list[int]:
    """Gives each variable to a worker, the largest first, to the one that has least so far.

    Args:
        sizes: the variables' sizes, in any unit.
        n_workers: how many workers there are.

    Returns:
        The owners' indices, in the order of `sizes`; the same on all workers.
    """
    owners = [0] * len(sizes)
    loads = [(0, worker) for worker in range(n_workers)]
    for index in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        load, owners[index] = loads[0]
        heapq.heapreplace(loads, (load + sizes[index], owners[index]))
    return owners


class ShardedOptimizer:
    """An optimizer that updates this worker's share of the variables, and gets the others'.

    Attributes:
        slots: the whole state but its step counter, which all workers hold.
    """

    def __init__(
        self, optimizer: Optimizer, collectives: Collectives, variables: Sequence[tf.Variable]
    ):
        """Adds nothing to the graph yet.

        Args:
            optimizer: what updates a variable, and holds the state for it.
            collectives: the workers'.
            variables: all that are trained, in the same order on all workers.
        """
        self._optimizer, self._collectives = optimizer, collectives
        sizes = [variable.shape.num_elements() for variable in variables]
        owners = assign_owners(sizes, collectives.cluster.spec.count)
        self._owners = {v.name: owner for v, owner in zip(variables, owners, strict=True)}
        self.slots = [
            Slot(name, shape, self._owners[variable.name])
            for variable in variables
            for name, shape in _slot_shapes(optimizer.name, variable)
        ]

    def apply_gradients(
        self, grads_and_vars: Iterable[tuple[Gradient, tf.Variable]]
    ) -> tf.Operation:
        """Takes a whole step, as Optimizer.apply_gradients() does, with all workers.

        A variable is sent as soon as its owner has updated it. Give what runs after this to
        Collectives.guarded().
        """
        pairs = list(grads_and_vars)
        updates: dict[str, list[tf.Operation]] = {}
        last: list[tf.Operation] = []
        for gradient, variable in pairs:
            if self._owners[variable.name] == self._collectives.cluster.spec.index:
                with tf.control_dependencies(last):
                    last = updates[variable.name] = [self._optimizer.apply(gradient, variable)]
        copies = [
            self._collectives.copy_variable(
                variable, self._owners[variable.name], updates.get(variable.name, [])
            )
            for _, variable in pairs
        ]
        return self._optimizer.finish([*last, *copies])


def _slot_shapes(optimizer: str, variable: tf.Variable) -> list[tuple[str, tuple[int, ...]]]:
    """The names and shapes of what an optimizer holds for a variable."""
    with tf.Graph().as_default():
        probe = make_optimizer(optimizer, 0.0)
        counter = len(probe.variables())
        twin = get_variable(variable.op.name, variable.shape, tf.float32, use_resource=True)
        probe.apply(tf.compat.v1.placeholder(tf.float32, variable.shape), twin)
        found = probe.variables()[counter:]
        return [(slot.op.name, tuple(slot.shape.as_list())) for slot in found]


class ShardedState(OptimizerState):
    """An optimizer's state in shares, in the same files as a whole one.

    Worker 0 reads and writes it, and holds one group of another worker's slots at a time. So a run
    may be continued by any number of workers.
    """

    def __init__(
        self,
        sess: tf.compat.v1.Session,
        state: session.GraphState,
        variables: Sequence[tf.Variable],
        slots: Sequence[Slot],
        collectives: Collectives,
    ):
        """Builds the operations.

        Args:
            sess: holds the variables.
            state: what its graph remembers.
            variables: this worker's slots, and what all workers hold.
            slots: see ShardedOptimizer.
            collectives: the workers'.
        """
        self._slots, self._collectives = slots, collectives
        self._channel = collectives.cluster.channel
        self._is_writer, self._index = collectives.cluster.is_writer, collectives.cluster.spec.index
        held = {variable.op.name: variable for variable in variables}
        names = {slot.name for slot in slots}
        super().__init__(sess, state, [v for name, v in held.items() if name not in names])
        self._exchanges = [
            state.build_once(
                _build_exchange, collectives, group, *(held.get(slot.name) for slot in group)
            )
            for group in _groups(slots)
        ]
        self._restored_path: str | None = None
        self._others_know = False

    # --- save -------------------------------------------------------------------------------------

    def write(self, prefix: str) -> None:
        """See OptimizerState.write(); the other workers are in take_part_in_save()."""
        self._channel.broadcast(True)
        self._others_know = True
        folder, base = os.path.split(prefix)
        with checkpoint_tensors.write_checkpoint(folder, base) as write:
            for name, variable in self.variables.items():
                write(name, self.sess.run(variable))
            for exchange in self._exchanges:
                if exchange.owner == self._index:
                    values = self.sess.run(exchange.own)
                else:
                    values = self._collectives.run(self.sess, exchange.save)
                for slot, value in zip(exchange.slots, values, strict=True):
                    write(slot.name, value)

    def end_save(self) -> None:
        """Ends a save of worker 0: the others need not wait for it if it wrote no state."""
        if not self._others_know:
            self._channel.broadcast(False)
        self._others_know = False

    def take_part_in_save(self) -> None:
        """Sends this worker's share to worker 0, if that writes it."""
        if self._channel.broadcast():
            for exchange in self._exchanged():
                self._collectives.run(self.sess, exchange.save)

    def _exchanged(self) -> list[_Exchange]:
        """What travels to or from worker 0. All workers take part in each."""
        return [exchange for exchange in self._exchanges if exchange.owner != 0]

    # --- restore ----------------------------------------------------------------------------------

    def _expected(self) -> dict[str, tuple[tuple[int, ...], int]]:
        float32 = tf.float32.as_datatype_enum
        return {**super()._expected(), **{s.name: (s.shape, float32) for s in self._slots}}

    def _fill(self, path: str, saved: Collection[str]) -> None:
        """Reads what all workers hold, and looks whether the shares can be read."""
        super()._fill(path, saved)
        with checkpoint_tensors.open_checkpoint(path) as read:
            for slot in self._slots:
                read(slot.name)
        self._restored_path = path

    def deal_out(self) -> None:
        """Gives each worker its share of what worker 0 has restored, if it has."""
        if not self._channel.broadcast(self._restored_path is not None):
            return
        if not self._is_writer:
            for exchange in self._exchanged():
                self._collectives.run(self.sess, exchange.restore)
            return
        assert self._restored_path is not None
        with checkpoint_tensors.open_checkpoint(self._restored_path) as read:
            for exchange in self._exchanges:
                feed = {
                    value: read(slot.name)
                    for slot, value in zip(exchange.slots, exchange.values, strict=True)
                }
                if exchange.owner == self._index:
                    self.sess.run(exchange.restore, feed)
                else:
                    self._collectives.run(self.sess, exchange.restore, feed)


def _groups(slots: Sequence[Slot]) -> list[tuple[Slot, ...]]:
    """Slots of one owner that travel together: a run for each would take long for small ones."""
    groups: list[list[Slot]] = []
    room: dict[int, int] = {}
    last: dict[int, list[Slot]] = {}
    for slot in slots:
        size = 4 * math.prod(slot.shape)
        if size > room.get(slot.owner, -1):
            last[slot.owner] = []
            groups.append(last[slot.owner])
            room[slot.owner] = GROUP_BYTES
        last[slot.owner].append(slot)
        room[slot.owner] -= size
    return [tuple(group) for group in groups]


class _Exchange(NamedTuple):
    """How a group of slots gets to worker 0, and from it.

    Attributes:
        slots: the group; all have one owner.
        owner: its index.
        own: their variables, on the owner.
        save: evaluates to their values on worker 0; all workers run it, unless that is the owner.
        values: what worker 0 feeds to `restore`.
        restore: sets the variables on the owner; all workers run it, unless worker 0 is the owner.
    """

    slots: tuple[Slot, ...]
    owner: int
    own: list[tf.Variable]
    save: Any
    values: list[tf.Tensor]
    restore: Any


def _build_exchange(
    collectives: Collectives, slots: tuple[Slot, ...], *held: tf.Variable | None
) -> _Exchange:
    owner, own = slots[0].owner, [variable for variable in held if variable is not None]
    with tf.compat.v1.name_scope("shares"):
        values = [tf.compat.v1.placeholder(tf.float32, slot.shape) for slot in slots]
        if owner == 0:
            return _Exchange(slots, owner, own, None, values, _assign_all(own, values))
        sent = [
            collectives.broadcast(
                owner,
                functools.partial(_read, variable),
                tf.float32,
                slot.shape,
                "/cpu:0",
            )
            for slot, variable in zip(slots, held, strict=True)
        ]
        save = collectives.guarded(tf.group(*sent))
        if collectives.cluster.is_writer:
            with tf.control_dependencies([save]):
                save = [tf.identity(value) for value in sent]
        given = [
            collectives.broadcast(
                0, functools.partial(tf.identity, value), tf.float32, slot.shape, "/cpu:0"
            )
            for slot, value in zip(slots, values, strict=True)
        ]
        restore = collectives.guarded(_assign_all(own, given) if own else tf.group(*given))
        return _Exchange(slots, owner, own, save, values, restore)


def _read(variable: tf.Variable | None) -> tf.Tensor:
    assert variable is not None
    return variable.read_value()


def _assign_all(variables: Sequence[tf.Variable], values: Sequence[tf.Tensor]) -> tf.Operation:
    return tf.group(
        *(v.assign(value, read_value=False) for v, value in zip(variables, values, strict=False))
    )
