"""A graph's ys and xs in, gradients out that recompute activations instead of keeping them.

After Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost" (arXiv:1604.06174). Tensors
called checkpoints cut the forward graph into segments. Only the checkpoints are kept. Going
backwards, each segment but the last is run again from the checkpoints it starts at, and the copy is
differentiated instead of the original.

What makes this save memory in TensorFlow: a copy reads its inputs through identities that depend,
by a control edge, on everything the segment after it has computed. So it runs when its gradient is
there and not before, at most one segment's activations exist at a time, and Grappler cannot merge
the copy with the original, whose operations have no such edge.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import tensorflow as tf
from toposort import toposort

Gradient = tf.Tensor | tf.IndexedSlices
Hook = Callable[[Any, Gradient], tf.Operation]

COLLECTION = "checkpoints"

# Operations that share their input's buffer: those of a variable's value need no second run.
VIEWS = frozenset({"ExpandDims", "Identity", "ReadVariableOp", "Reshape", "Squeeze"})

# What tf.while_loop and tf.cond consist of where tf.compat.v1.disable_control_flow_v2() was called.
FRAMES = frozenset({"Enter", "Exit", "LoopCond", "Merge", "NextIteration", "Switch"})


def gradients(
    ys: Any,
    xs: Any,
    grad_ys: Any = None,
    checkpoints: str | Sequence[tf.Tensor] = "collection",
    *,
    on_gradient: Hook | None = None,
    on_part: Hook | None = None,
    stop_gradients: Any = None,
    unconnected_gradients: tf.UnconnectedGradients = tf.UnconnectedGradients.NONE,
    name: str = "gradients",
    **kwargs: Any,
) -> list[Gradient | None]:
    """As tf.gradients, but keeps only checkpoints and recomputes what lies between.

    Each forward operation is run again at most once, and none after the last checkpoint. Not run
    again are stateful operations, such as tf.random.uniform, and calls of a tf.function: their
    values are kept (those of tf.random.stateless_uniform and the like are recomputed, equal).

    Args:
        ys: a tensor or several, to be differentiated.
        xs: a tensor or variable or several, by which to differentiate.
        grad_ys: gradients by the ys, each shaped as its y or None for ones.
        checkpoints: the tensors to keep, or 'collection' for those of the graph collection
            'checkpoints', or 'memory' to choose among the tensors through which all of the forward
            graph passes, such that those kept and the largest segment between them are smallest.
        on_gradient: called as on_gradient(x, gradient) while the graph is built, once for each x
            that ys depend on; returns an operation. That runs when x's gradient is complete and all
            operations of its segment are done with x, so that it can update x in place, and before
            the segments in front of it are recomputed: then gradients never exist all at once.
        on_part: called as on_part(x, part) for each summand of x's gradient; returns an operation
            that runs as soon as the part is there, and before other segments are recomputed. For
            callers who add up by themselves: no sum is formed but where it is used.
        stop_gradients: tensors not to differentiate through, as in tf.gradients.
        unconnected_gradients: as in tf.gradients.
        name: scope of the operations that are made.
        **kwargs: for tf.gradients, such as aggregation_method.

    Returns:
        One gradient for each x: a tensor or tf.IndexedSlices, or None if no y depends on it.

    Raises:
        ValueError: there are no such checkpoints, or a segment has a loop or condition of
            TensorFlow 1's kind in it.
    """
    ys, xs = _as_list(ys), _as_list(xs)
    graph = ys[0].graph
    with graph.as_default(), tf.compat.v1.name_scope(name):
        ys = [tf.convert_to_tensor(y) for y in ys]
        forward = _Forward(ys, [_source(x) for x in xs], _as_list(stop_gradients))
        chosen = _choose(checkpoints, forward)
        backward = _Backward(forward, _levels(forward, chosen), xs, kwargs, on_gradient, on_part)
        backward.run(ys, _as_list(grad_ys) or [None] * len(ys))
        if backward.random:
            warnings.warn(
                f"random values are kept, not recomputed: {', '.join(sorted(backward.random)[:3])}"
                "; tf.random.stateless_uniform and its like, or "
                "tf.nn.experimental.stateless_dropout, would save their memory",
                stacklevel=2,
            )
        found = [backward.gradient(_source(x)) for x in xs]
        if tf.UnconnectedGradients(unconnected_gradients) == tf.UnconnectedGradients.ZERO:
            found = [tf.zeros_like(x) if g is None else g for g, x in zip(found, xs, strict=True)]
    return found


def add(a: Gradient | None, b: Gradient) -> Gradient:
    """Sum of two gradients, in a's buffer where nobody else holds it.

    tf.gradients makes a dense copy of tf.IndexedSlices to add them to a dense gradient, which for a
    token embedding tied to the output projection is one copy too many.
    """
    if a is None:
        return b
    sparse = [g for g in (a, b) if isinstance(g, tf.IndexedSlices)]
    if not sparse:
        return a + b
    if len(sparse) == 1:
        whole, rows = (b, a) if sparse[0] is a else (a, b)
        return tf.tensor_scatter_nd_add(whole, rows.indices[:, tf.newaxis], rows.values)
    indices = tf.concat([tf.cast(g.indices, tf.int64) for g in sparse], axis=0)
    return tf.IndexedSlices(tf.concat([a.values, b.values], axis=0), indices, a.dense_shape)


def _as_list(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _source(x: Any) -> tf.Tensor:
    """The tensor that stands for x in the graph: a variable's handle or reference."""
    if tf.is_tensor(x) and not isinstance(x, tf.Variable):
        return x
    return x.handle if hasattr(x, "handle") else x.op.outputs[0]


def _carries_gradient(t: tf.Tensor) -> bool:
    kind = t.dtype.base_dtype
    return kind.is_floating or kind.is_complex or kind in (tf.resource, tf.variant)


class _Forward:
    """What ys are computed from, and how they depend on the sources.

    Attributes:
        ops: all operations ys need, each after its inputs.
        readers: operations by the name of the tensor they read.
        sources, stops: names of the xs' tensors and of those not to differentiate through.
        tensors: names of the tensors through which the ys depend on a source.
        path: operations that read one of these tensors.
        kept: operations that are never run again.
        leaves: those of kept and path that come before all others, such as reads of variables.
    """

    def __init__(
        self, ys: Sequence[tf.Tensor], sources: Sequence[tf.Tensor], stops: Sequence[tf.Tensor]
    ):
        self.ys = {y.name for y in ys}
        self.ops = _ancestors([y.op for y in ys])
        self.sources = {t.name for t in sources}
        self.stops = {t.name for t in stops}
        self.readers: dict[str, list[tf.Operation]] = {}
        self.tensors = set(self.sources)
        self.path: set[tf.Operation] = set()
        self.kept: set[tf.Operation] = set()
        self.leaves: set[tf.Operation] = set()
        for op in self.ops:
            for t in op.inputs:
                self.readers.setdefault(t.name, []).append(op)
            if _must_be_kept(op) or (
                op.type in VIEWS and all(t.op in self.kept for t in op.inputs)
            ):
                self.kept.add(op)
            inputs = self.path_inputs(op)
            if not inputs:
                continue
            self.path.add(op)
            outputs = (t.name for t in op.outputs if _carries_gradient(t))
            self.tensors.update(name for name in outputs if name not in self.stops)
            if op in self.kept and len(inputs) == 1 and self._is_leaf(inputs[0]):
                self.leaves.add(op)

    def path_inputs(self, op: tf.Operation) -> list[tf.Tensor]:
        """The inputs of `op` that depend on a source."""
        return [t for t in op.inputs if t.name in self.tensors]

    def read_by(self, op: tf.Operation) -> Iterable[tuple[tf.Tensor, tf.Operation]]:
        """The outputs of `op`, each with an operation that reads it."""
        return ((t, reader) for t in op.outputs for reader in self.readers.get(t.name, ()))

    def _is_leaf(self, t: tf.Tensor) -> bool:
        """Whether t is a source or one's value, as it was read."""
        return t.name in self.sources or t.op in self.leaves


def _ancestors(ends: Iterable[tf.Operation]) -> list[tf.Operation]:
    """`ends` and all operations they take data from, each after its inputs."""
    ordered: list[tf.Operation] = []
    seen: set[tf.Operation] = set()
    stack = [(op, False) for op in ends]
    while stack:
        op, inputs_done = stack.pop()
        if inputs_done:
            ordered.append(op)
        elif op not in seen:
            seen.add(op)
            stack.append((op, True))
            stack.extend((t.op, False) for t in reversed(op.inputs) if t.op not in seen)
    return ordered


def _must_be_kept(op: tf.Operation) -> bool:
    """Whether a second run could give something else, or costs what it saves."""
    # A copied call of a tf.function has lost its gradient, which is no part of the operation.
    if not len(op.inputs) or op.op_def.is_stateful or op.type == "PartitionedCall":
        return True
    return any(t.dtype == tf.resource or t.dtype != t.dtype.base_dtype for t in op.inputs)


def _levels(forward: _Forward, checkpoints: set[str]) -> dict[tf.Operation, int]:
    """The segment of each operation that may be run again, counted from the first.

    An operation's segment is the number of checkpoints that data passes on its way to it. Where
    data has not passed any, as in a cast of a weight or in the making of a mask, the operation
    belongs to the segment that first needs it; without a gradient to pass back and needed by
    several, to none: its value is kept.
    """

    def cuts(t: tf.Tensor, reader: tf.Operation) -> bool:
        return t.name in checkpoints or t.op in forward.kept or reader in forward.kept

    passed: dict[tf.Operation, int] = {}
    for op in forward.ops:
        if op in forward.leaves or (op in forward.kept and op not in forward.path):
            continue
        inputs = forward.path_inputs(op) if op in forward.path else op.inputs
        counts = [passed[t.op] + cuts(t, op) for t in inputs if t.op in passed]
        passed[op] = max(counts, default=0)
    top = max((n for op, n in passed.items() if op in forward.path), default=0)
    levels = {op: n for op, n in passed.items() if n}
    rest = [op for op in passed if op not in levels]
    for op in reversed(rest):
        if op in forward.path:
            readers = ((t, r) for t, r in forward.read_by(op) if r in forward.path and r in levels)
            levels[op] = min((levels[r] - cuts(t, r) for t, r in readers), default=top)
    for op in rest:
        before = [levels[t.op] for t in op.inputs if t.op in levels]
        if op not in levels and before:
            levels[op] = max(before)
    for op in reversed(rest):
        needed = {levels[r] for _, r in forward.read_by(op) if r in levels}
        if op not in levels and len(needed) == 1:
            levels[op] = needed.pop()
    return levels


class _Segment(NamedTuple):
    """A part of the forward graph that is differentiated at once.

    Attributes:
        ops: its operations, as far as its outputs need them.
        outputs: the tensors whose gradients are known.
        inputs: tensors that come from elsewhere and depend on a source.
    """

    ops: set[tf.Operation]
    outputs: list[tf.Tensor]
    inputs: list[tf.Tensor]


class _Backward:
    """Differentiates segment after segment, the last one first."""

    def __init__(
        self,
        forward: _Forward,
        levels: Mapping[tf.Operation, int],
        xs: Sequence[Any],
        options: Mapping[str, Any],
        on_gradient: Hook | None,
        on_part: Hook | None,
    ):
        self.forward = forward
        self.levels = levels
        self.xs: dict[str, Any] = {}
        for x in xs:
            self.xs.setdefault(_source(x).name, x)
        self.options = options
        self.on_gradient = on_gradient
        self.on_part = on_part
        self.position = {op: i for i, op in enumerate(forward.ops)}
        self.top = max((levels[op] for op in forward.path if op in levels), default=0)
        # By tensor name, the tensor and the sum of the parts of its gradient so far.
        self.sums: dict[str, tuple[tf.Tensor, Gradient]] = {}
        # Operations whose random values segments need that are run again.
        self.random: set[str] = set()
        # What has to be done before another segment is run again.
        self.done: list[Any] = []

    def gradient(self, t: tf.Tensor) -> Gradient | None:
        """The sum of the parts that t has received."""
        return self.sums[t.name][1] if t.name in self.sums else None

    def run(self, ys: Sequence[tf.Tensor], grad_ys: Sequence[tf.Tensor | None]) -> None:
        """Passes gradients from ys back to the xs."""
        last_use = self._last_use()
        for y, gradient in zip(ys, grad_ys, strict=True):
            if y.name in self.forward.tensors:
                self._receive(y, tf.ones_like(y) if gradient is None else gradient)
        for level in range(self.top, -1, -1):
            for segment in self._segments(level):
                if level == self.top or segment.ops & self.forward.kept:
                    parts = self._differentiate(segment, {})
                else:
                    parts = self._recompute(segment)
                for t, part in zip(segment.inputs, parts, strict=True):
                    if part is not None:
                        self._receive(t, part)
            if self.on_gradient is not None:
                self._complete(name for name, last in last_use.items() if last == level)

    def _last_use(self) -> dict[str, int]:
        """By name of a source, the segment from which its gradient's last part comes."""
        forward = self.forward
        origins = {name: {name} for name in forward.sources}
        last: dict[str, int] = dict.fromkeys(self.xs, self.top)
        for op in forward.ops:
            if op not in forward.path:
                continue
            inputs = [origins.get(t.name, set()) for t in forward.path_inputs(op)]
            if op in forward.leaves:
                for t in op.outputs:
                    origins.setdefault(t.name, set()).update(*inputs)
            else:
                for name in set().union(*inputs):
                    last[name] = min(last[name], self.levels[op])
        return last

    def _segments(self, level: int) -> list[_Segment]:
        """The operations of `level` that pass gradients on; each kept one is a segment alone."""
        path, kept, stops = self.forward.path, self.forward.kept, self.forward.stops
        known = [t for t, _ in self.sums.values() if t.op in path and t.name not in stops]
        outputs = [t for t in known if self.levels.get(t.op) == level]
        alone = [op for op in dict.fromkeys(t.op for t in outputs) if op in kept]
        groups = [[t for t in outputs if t.op not in kept]]
        groups += [[t for t in outputs if t.op is op] for op in alone]
        return [self._segment(level, group) for group in groups if group]

    def _segment(self, level: int, outputs: list[tf.Tensor]) -> _Segment:
        """Walks back from `outputs` as far as operations belong to `level`."""
        ops, inputs = {t.op for t in outputs}, {}
        stack = list(ops)
        while stack:
            for t in stack.pop().inputs:
                inside = self.levels.get(t.op) == level and t.name not in self.forward.sources
                if not inside or t.op in self.forward.kept:
                    if t.name in self.forward.tensors:
                        inputs[t.name] = t
                elif t.op not in ops:
                    ops.add(t.op)
                    stack.append(t.op)
        return _Segment(ops, outputs, list(inputs.values()))

    def _recompute(self, segment: _Segment) -> list[Gradient | None]:
        """Runs the segment again when all gradients so far are there, and differentiates that."""
        self._check(segment)
        with tf.control_dependencies([_tensor(g) for g in self.done]):
            gate = tf.no_op("gate")
        self.done = [gate]
        with tf.control_dependencies([gate]), tf.compat.v1.name_scope("recompute"):
            copies = {t.name: tf.identity(t) for t in segment.inputs}
            ordered = _order(segment.ops, self.position)
            _copy(ordered, copies)
        return self._differentiate(segment, copies)

    def _differentiate(
        self, segment: _Segment, copies: dict[str, tf.Tensor]
    ) -> list[Gradient | None]:
        """Gradients by the segment's inputs; `copies` replace the tensors of their names."""
        graph = tf.compat.v1.get_default_graph()
        before = len(graph.get_operations()) if copies else 0
        inputs = [copies.get(t.name, t) for t in segment.inputs]
        stops = [copies[name] for name in self.forward.stops if name in copies]
        found = tf.compat.v1.gradients(
            [copies.get(t.name, t) for t in segment.outputs],
            inputs,
            [self.sums[t.name][1] for t in segment.outputs],
            stop_gradients=[*inputs, *stops],
            **self.options,
        )
        if copies:
            found = _use_copies(found, graph.get_operations()[before:], copies)
        return found

    def _receive(self, t: tf.Tensor, part: Gradient) -> None:
        """Adds a part to the gradient of t, or of the x whose value t is."""
        forward = self.forward
        while t.op in forward.leaves and t.name not in forward.stops:
            if t.name in forward.sources:
                self._add(t, part)
            t, part = _through_leaf(t, part, forward.path_inputs(t.op)[0])
        self._add(t, part)

    def _add(self, t: tf.Tensor, part: Gradient) -> None:
        total = add(self.gradient(t), part)
        self.sums[t.name] = t, total
        if self.on_part is not None and t.name in self.xs:
            self.done.append(self.on_part(self.xs[t.name], part))
        if self.on_part is None or t.name not in self.xs or t.op in self.levels:
            self.done.append(total)

    def _complete(self, names: Iterable[str]) -> None:
        """Hands complete gradients out, one after the other."""
        with tf.control_dependencies([_tensor(g) for g in self.done]):
            last = tf.no_op("segment_done")
        for name in names:
            if name in self.sums:
                with tf.control_dependencies([last]):
                    last = self.on_gradient(self.xs[name], self.sums[name][1])
        self.done = [last]

    def _check(self, segment: _Segment) -> None:
        """Raises for what cannot be run again, and notes what costs the memory to be saved."""
        for op in segment.ops:
            if op.type in FRAMES:
                raise ValueError(
                    f"{op.name} is part of a loop or condition of TensorFlow 1's kind and cannot "
                    "be recomputed: call tf.compat.v1.enable_control_flow_v2() before building "
                    "it, or make its result and what it starts from the last checkpoints"
                )
            self.random.update(t.op.name for t in op.inputs if _is_random(t.op))


def _is_random(op: tf.Operation) -> bool:
    return op.op_def.is_stateful and "Random" in op.type


def _tensor(gradient: Any) -> Any:
    """What a control edge can start from."""
    return gradient.values if isinstance(gradient, tf.IndexedSlices) else gradient


def _through_leaf(t: tf.Tensor, part: Gradient, before: tf.Tensor) -> tuple[tf.Tensor, Gradient]:
    """From a variable's value back to what it was read from.

    Args:
        t: the value.
        part: of its gradient.
        before: the input of t's operation that depends on a source.

    Returns:
        `before` and the part of its gradient.
    """
    if t.op.type not in VIEWS:
        return before, tf.gradients([t], before, [part], stop_gradients=before)[0]
    # By hand, since tf.gradients would walk all of the graph for it.
    if t.op.type in ("Identity", "ReadVariableOp") or t.shape.as_list() == before.shape.as_list():
        return before, part
    return before, tf.reshape(part, tf.shape(before))


def _order(ops: Iterable[tf.Operation], position: Mapping[tf.Operation, int]) -> list[tf.Operation]:
    """`ops`, each after those it takes data from; the same order at each call."""
    needs = {op: {t.op for t in op.inputs} for op in ops}
    needs = {op: before.intersection(needs) for op, before in needs.items()}
    return [op for batch in toposort(needs) for op in sorted(batch, key=position.__getitem__)]


def _copy(ops: Iterable[tf.Operation], copies: dict[str, tf.Tensor]) -> None:
    """Makes each operation again on the copies of its inputs where there are any.

    Args:
        ops: in order.
        copies: by the name of the original; the outputs' copies are added.
    """
    for op in ops:
        attrs = dict(op.node_def.attr)
        # Colocation with the original says nothing that its device does not.
        attrs.pop("_class", None)
        with tf.device(op.device or None):
            copy = op.graph.create_op(
                op.type,
                [copies.get(t.name, t) for t in op.inputs],
                [t.dtype for t in op.outputs],
                name=op.name,
                attrs=attrs,
                op_def=op.op_def,
            )
        for t, made in zip(op.outputs, copy.outputs, strict=True):
            made.set_shape(t.shape)
            copies[t.name] = made


def _use_copies(
    found: list[Gradient | None],
    made: Sequence[tf.Operation],
    copies: Mapping[str, tf.Tensor],
) -> list[Gradient | None]:
    """Makes gradient operations again that read originals where there are copies.

    The gradient function of tf.custom_gradient knows the forward pass's tensors by closure, and so
    would keep the originals in memory.

    Args:
        found: the gradients.
        made: operations made for them, in order.
        copies: by the name of the original.

    Returns:
        The gradients, such that only copies are read.
    """
    stale: set[tf.Operation] = set()
    for op in made:
        if any(t.name in copies or t.op in stale for t in op.inputs):
            stale.add(op)
    if not stale:
        return found
    renewed = dict(copies)
    _copy([op for op in made if op in stale], renewed)

    def renew(gradient: Gradient | None) -> Gradient | None:
        if isinstance(gradient, tf.IndexedSlices):
            parts = (gradient.values, gradient.indices, gradient.dense_shape)
            return tf.IndexedSlices(*map(renew, parts))
        return None if gradient is None else renewed.get(gradient.name, gradient)

    return [renew(gradient) for gradient in found]


def _choose(checkpoints: str | Sequence[tf.Tensor], forward: _Forward) -> set[str]:
    """Names of the checkpoints; an x that is computed from another x is one as well."""
    if isinstance(checkpoints, str):
        if checkpoints == "collection":
            checkpoints = tf.compat.v1.get_collection(COLLECTION)
            if not checkpoints:
                raise ValueError(
                    "checkpoints='collection', but the graph collection 'checkpoints' is empty: "
                    "fill it with tf.compat.v1.add_to_collection, or give a list or 'memory'"
                )
        elif checkpoints == "memory":
            checkpoints = _cheapest(_bottlenecks(forward))
        else:
            raise ValueError(
                f"checkpoints={checkpoints!r} must be 'collection', 'memory' or a list of tensors"
            )
    return {t.name for t in checkpoints} | forward.sources


class _Bottleneck(NamedTuple):
    """A tensor through which all of the forward graph passes.

    Attributes:
        tensor: the tensor.
        size: its bytes.
        before: bytes of all forward tensors up to and with it.
    """

    tensor: tf.Tensor
    size: int
    before: int


def _bottlenecks(forward: _Forward) -> list[_Bottleneck]:
    """Tensors that separate ys from all that comes before, the total at the end.

    Operations are visited along the longest chain first. So a side branch, such as the cast of a
    weight, comes after the chain it joins, and a tensor is a bottleneck if, when it has been made,
    it is the only one that is still needed.
    """
    trunk = [op for op in forward.ops if op in forward.path and op not in forward.leaves]
    depth: dict[tf.Operation, int] = {}
    for op in trunk:
        depth[op] = 1 + max((depth.get(t.op, 0) for t in forward.path_inputs(op)), default=0)
    ends = [op for op in trunk if any(t.name in forward.ys for t in op.outputs)]
    ends.sort(key=depth.__getitem__, reverse=True)
    # By tensor name, how many still need it; a y is always needed.
    waiting = {t.name: int(t.name in forward.ys) for op in trunk for t in op.outputs}
    for op in trunk:
        for t, reader in forward.read_by(op):
            waiting[t.name] += reader in depth and t.name in forward.tensors
    live: dict[str, tf.Tensor] = {}
    found, total = [], 0
    for op in _deepest_first(ends, depth):
        for t in forward.path_inputs(op):
            if t.name in waiting:
                waiting[t.name] -= 1
                if not waiting[t.name]:
                    live.pop(t.name, None)
        made = [t for t in op.outputs if waiting.get(t.name)]
        live.update({t.name: t for t in made})
        total += sum(map(_bytes, made))
        if len(live) == 1 and made and made[0].name not in forward.ys:
            found.append(_Bottleneck(made[0], _bytes(made[0]), total))
    if not found:
        raise ValueError(
            "checkpoints='memory', but no single tensor separates the ys from the xs: "
            "give a list of checkpoints, or use tf.gradients"
        )
    return found


def _deepest_first(
    ends: Sequence[tf.Operation], depth: Mapping[tf.Operation, int]
) -> Iterable[tf.Operation]:
    """`ends` and what they come from, each after its inputs, the longest chain of these first."""
    seen: set[tf.Operation] = set()
    stack = [(op, False) for op in reversed(ends)]
    while stack:
        op, inputs_done = stack.pop()
        if inputs_done:
            yield op
        elif op not in seen:
            seen.add(op)
            stack.append((op, True))
            inputs = {t.op for t in op.inputs if t.op in depth}
            stack.extend((before, False) for before in sorted(inputs, key=depth.__getitem__))


def _bytes(t: tf.Tensor) -> int:
    """Size of t; an unknown axis, which most tensors share, counts as 1."""
    if t.shape.rank is None:
        return t.dtype.size
    sizes = [1 if size is None else size for size in t.shape.as_list()]
    return tf.TensorShape(sizes).num_elements() * t.dtype.size


def _cheapest(bottlenecks: Sequence[_Bottleneck]) -> list[tf.Tensor]:
    """Evenly spaced ones, as many as make their bytes and the largest segment's the fewest."""
    total = bottlenecks[-1].before
    best: tuple[int, list[tf.Tensor]] | None = None
    for segments in range(2, len(bottlenecks) + 2):
        chosen: list[_Bottleneck] = []
        for candidate in bottlenecks:
            if candidate.before * segments >= total * (len(chosen) + 1):
                chosen.append(candidate)
        edges = [0, *(c.before for c in chosen), total]
        gaps = [end - start for start, end in zip(edges, edges[1:], strict=False)]
        cost = sum(c.size for c in chosen) + max(gaps)
        if best is None or cost < best[0]:
            best = cost, [c.tensor for c in chosen]
    return best[1]
