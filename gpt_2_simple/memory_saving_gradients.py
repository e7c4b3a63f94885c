"""A graph's ys and xs in, gradients out that recompute activations instead of keeping them.

After Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost" (arXiv:1604.06174). Tensors
called checkpoints cut the forward graph into segments. Only the checkpoints are kept. Going
backwards, each segment but the last is run again from the checkpoints it starts at, and the copy is
differentiated instead of the original.

A copy reads its inputs through identities that depend, by a control edge, on all that the segment
after it has computed. So the copy runs when its gradient is known and not before. At most one
segment's activations exist at a time, and Grappler cannot merge the copy with the original, whose
operations have no such edge.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import tensorflow as tf
from toposort import toposort

Gradient: TypeAlias = tf.Tensor | tf.IndexedSlices
Hook = Callable[[Any, Gradient], tf.Operation]

COLLECTION = "checkpoints"

# Operations that share their input's buffer. On a variable's value they need no second run.
VIEWS = frozenset({"ExpandDims", "Identity", "ReadVariableOp", "Reshape", "Squeeze"})

# The operations of tf.while_loop and tf.cond after tf.compat.v1.disable_control_flow_v2().
CONTROL_FLOW_V1 = frozenset({"Enter", "Exit", "LoopCond", "Merge", "NextIteration", "Switch"})


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
    """Differentiates as tf.gradients does, but keeps only checkpoints and recomputes the rest.

    Each forward operation is run again at most once, and none after the last checkpoint. Stateful
    operations, such as tf.random.uniform, and calls of a tf.function are not run again: their
    values are kept. The values of tf.random.stateless_uniform and the like are recomputed, equal.

    Args:
        ys: a tensor or several, to be differentiated.
        xs: a tensor or variable or several, by which to differentiate.
        grad_ys: gradients by the ys, each shaped as its y or None for ones.
        checkpoints: the tensors to keep. 'collection' takes those of the graph collection
            'checkpoints'. 'memory' chooses among the tensors through which all of the forward graph
            passes: the sum of the checkpoints' bytes and the largest segment's becomes smallest.
        on_gradient: called as on_gradient(x, gradient) while the graph is built, once for each x
            that ys depend on; returns an operation. It runs when x's gradient is complete and all
            operations of the segment have read x, so it may update x in place. It runs before
            earlier segments are recomputed, so the gradients never exist all at once.
        on_part: called as on_part(x, part) for each summand of x's gradient; returns an operation.
            It runs as soon as the part is known, and before other segments are recomputed. It is
            for callers who add the parts up: a sum is then computed only where it is used.
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
        segments = _number_segments(forward, _checkpoint_names(checkpoints, forward))
        backward = _Backward(forward, segments, xs, kwargs, on_gradient, on_part)
        backward.run(ys, _as_list(grad_ys) or [None] * len(ys))
        if backward.random_ops:
            names = ", ".join(sorted(backward.random_ops)[:3])
            warnings.warn(
                f"random values are kept, not recomputed: {names}; tf.random.stateless_uniform "
                "and its like, or tf.nn.experimental.stateless_dropout, would save their memory",
                stacklevel=2,
            )
        found = [backward.sums.get(_source(x).name) for x in xs]
        if tf.UnconnectedGradients(unconnected_gradients) == tf.UnconnectedGradients.ZERO:
            found = [tf.zeros_like(x) if g is None else g for g, x in zip(found, xs, strict=True)]
    return found


def add(a: Gradient | None, b: Gradient) -> Gradient:
    """Adds two gradients, in a's buffer where nobody else holds it.

    To add tf.IndexedSlices to a dense gradient, tf.gradients makes a dense copy of them. For a
    token embedding that is also the output projection, that is one copy too many.
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
    """The tensor that stands for x in the graph: for a variable, its handle or reference."""
    if tf.is_tensor(x) and not isinstance(x, tf.Variable):
        return x
    return x.handle if hasattr(x, "handle") else x.op.outputs[0]


def _carries_gradient(t: tf.Tensor) -> bool:
    kind = t.dtype.base_dtype
    return kind.is_floating or kind.is_complex or kind in (tf.resource, tf.variant)


class _Forward:
    """The operations that compute the ys, and how these depend on the sources.

    Attributes:
        ys: names of the tensors that are differentiated.
        sources: names of the tensors that stand for the xs.
        stops: by name, the tensors not to differentiate through.
        ops: all operations that the ys need, each after its inputs.
        position: the index of each operation in ops.
        kept: operations that are never run again.
        dependent: by name, the tensors that depend on a source and pass gradients on.
        path: operations that read one of these tensors.
        variable_reads: those of kept and path that only read, or view, a source's value.
    """

    def __init__(
        self, ys: Sequence[tf.Tensor], sources: Sequence[tf.Tensor], stops: Sequence[tf.Tensor]
    ):
        self.ys = {y.name for y in ys}
        self.sources = {t.name for t in sources}
        self.stops = {t.name: t for t in stops}
        self.ops = list(_inputs_first([y.op for y in ys], lambda op: [t.op for t in op.inputs]))
        self.position = {op: i for i, op in enumerate(self.ops)}
        self.kept = _kept(self.ops)
        self.dependent: dict[str, tf.Tensor] = {t.name: t for t in sources}
        self.path: set[tf.Operation] = set()
        self.variable_reads: set[tf.Operation] = set()
        self._find_path()

    def _find_path(self) -> None:
        """Follows the sources to the ys."""
        for op in self.ops:
            inputs = self.path_inputs(op)
            if not inputs:
                continue
            self.path.add(op)
            for t in op.outputs:
                if _carries_gradient(t) and t.name not in self.stops:
                    self.dependent[t.name] = t
            of_source = inputs[0].name in self.sources or inputs[0].op in self.variable_reads
            if op in self.kept and len(inputs) == 1 and of_source:
                self.variable_reads.add(op)

    def path_inputs(self, op: tf.Operation) -> list[tf.Tensor]:
        """The inputs of `op` that depend on a source."""
        return [t for t in op.inputs if t.name in self.dependent]

    def read_from(self, t: tf.Tensor) -> tf.Tensor | None:
        """The tensor from which t was read, if t is a variable's value."""
        if t.op in self.variable_reads and t.name not in self.stops:
            return self.path_inputs(t.op)[0]
        return None


def _inputs_first(
    ends: Sequence[tf.Operation], inputs_of: Callable[[tf.Operation], list[tf.Operation]]
) -> Iterator[tf.Operation]:
    """`ends` and what they need, each after its inputs; `inputs_of` decides which come first."""
    seen: set[tf.Operation] = set()
    stack = [(op, False) for op in reversed(ends)]
    while stack:
        op, inputs_done = stack.pop()
        if inputs_done:
            yield op
        elif op not in seen:
            seen.add(op)
            stack.append((op, True))
            stack.extend((before, False) for before in reversed(inputs_of(op)))


def _kept(ops: Iterable[tf.Operation]) -> set[tf.Operation]:
    """Those of `ops` whose second run could give another value, or costs the memory it saves."""
    kept: set[tf.Operation] = set()
    for op in ops:
        is_read = any(t.dtype == tf.resource or t.dtype != t.dtype.base_dtype for t in op.inputs)
        is_view = op.type in VIEWS and all(t.op in kept for t in op.inputs)
        # A copied call of a tf.function has no gradient: the operation does not hold it.
        is_call = op.type == "PartitionedCall"
        if is_read or is_view or is_call or op.op_def.is_stateful or not len(op.inputs):
            kept.add(op)
    return kept


def _number_segments(forward: _Forward, checkpoints: set[str]) -> dict[tf.Operation, int]:
    """Numbers the segment of each operation that may be run again; the first segment is 0.

    The number is how many checkpoints the data passes on its way to the operation. If it passes
    none, as for the cast of a weight, the operation belongs to the segment that first needs its
    result. If no gradient passes through the operation, as for a mask, several segments may need
    it: it then belongs to no segment, and its result is kept.
    """
    path = forward.path

    def crosses(t: tf.Tensor, reader: tf.Operation) -> bool:
        """Whether a new segment starts between t and `reader`."""
        return t.name in checkpoints or t.op in forward.kept or reader in forward.kept

    passed: dict[tf.Operation, int] = {}
    for op in forward.ops:
        if op in forward.variable_reads or (op in forward.kept and op not in path):
            continue
        inputs = forward.path_inputs(op) if op in path else op.inputs
        counts = [passed[t.op] + crosses(t, op) for t in inputs if t.op in passed]
        passed[op] = max(counts, default=0)
    last = max((n for op, n in passed.items() if op in path), default=0)
    segments = {op: n for op, n in passed.items() if n}
    for op in reversed([op for op, n in passed.items() if not n and op in path]):
        readers = ((t, r) for t in op.outputs for r in t.consumers() if r in path and r in segments)
        segments[op] = min((segments[r] - crosses(t, r) for t, r in readers), default=last)
    _number_side_ops([op for op in passed if op not in segments], segments)
    return segments


def _number_side_ops(ops: list[tf.Operation], segments: dict[tf.Operation, int]) -> None:
    """Adds to `segments` those of `ops` that one segment needs; no gradient passes through them."""
    for op in ops:
        before = [segments[t.op] for t in op.inputs if t.op in segments]
        if before:
            segments[op] = max(before)
    for op in reversed(ops):
        needed_by = {segments[r] for t in op.outputs for r in t.consumers() if r in segments}
        if op not in segments and len(needed_by) == 1:
            segments[op] = needed_by.pop()


class _Subgraph(NamedTuple):
    """A part of a segment that is differentiated at once.

    Attributes:
        ops: its operations, as far as its outputs need them.
        outputs: the tensors whose gradients are known.
        inputs: tensors that come from elsewhere and depend on a source.
    """

    ops: list[tf.Operation]
    outputs: list[tf.Tensor]
    inputs: list[tf.Tensor]


class _Backward:
    """Differentiates segment after segment, the last one first."""

    def __init__(
        self,
        forward: _Forward,
        segments: Mapping[tf.Operation, int],
        xs: Sequence[Any],
        options: Mapping[str, Any],
        on_gradient: Hook | None,
        on_part: Hook | None,
    ):
        self.forward = forward
        self.segments = segments
        self.xs: dict[str, Any] = {}
        for x in xs:
            self.xs.setdefault(_source(x).name, x)
        self.options = options
        self.on_gradient = on_gradient
        self.on_part = on_part
        self.last = max((segments[op] for op in forward.path if op in segments), default=0)
        # By a tensor's name, the sum of the parts of its gradient so far.
        self.sums: dict[str, Gradient] = {}
        # Names of the random operations whose values are kept for recomputations.
        self.random_ops: set[str] = set()
        # What must be done before another segment is recomputed.
        self.done: list[Any] = []

    def run(self, ys: Sequence[tf.Tensor], grad_ys: Sequence[tf.Tensor | None]) -> None:
        """Passes gradients from ys back to the xs."""
        completed_by = self._completed_by()
        for y, gradient in zip(ys, grad_ys, strict=True):
            if y.name in self.forward.dependent:
                self._receive(y, tf.ones_like(y) if gradient is None else gradient)
        for segment in range(self.last, -1, -1):
            for subgraph in self._subgraphs(segment):
                if segment == self.last or not self.forward.kept.isdisjoint(subgraph.ops):
                    parts = self._differentiate(subgraph, {})
                else:
                    parts = self._recompute(subgraph)
                for t, part in zip(subgraph.inputs, parts, strict=True):
                    if part is not None:
                        self._receive(t, part)
            if self.on_gradient is not None:
                complete = [name for name, last in completed_by.items() if last == segment]
                self._hand_out([name for name in complete if name in self.sums], self.on_gradient)

    def _completed_by(self) -> dict[str, int]:
        """By a source's name, the segment that gives the last part of its gradient."""
        forward = self.forward
        completed_by = dict.fromkeys(self.xs, self.last)
        for op in forward.path - forward.variable_reads:
            for t in forward.path_inputs(op):
                while t is not None:
                    if t.name in completed_by:
                        completed_by[t.name] = min(completed_by[t.name], self.segments[op])
                    t = forward.read_from(t)
        return completed_by

    def _subgraphs(self, segment: int) -> list[_Subgraph]:
        """The subgraphs of `segment` that pass gradients on; each kept operation is one alone."""
        forward = self.forward
        groups: dict[tf.Operation | None, list[tf.Tensor]] = {None: []}
        for name in self.sums:
            t = forward.dependent[name]
            here = t.op in forward.path and self.segments.get(t.op) == segment
            if here and name not in forward.stops:
                groups.setdefault(t.op if t.op in forward.kept else None, []).append(t)
        return [self._subgraph(segment, outputs) for outputs in groups.values() if outputs]

    def _subgraph(self, segment: int, outputs: list[tf.Tensor]) -> _Subgraph:
        """Walks back from `outputs` as far as operations belong to `segment`."""
        forward = self.forward
        ops = dict.fromkeys(t.op for t in outputs)
        inputs: dict[str, tf.Tensor] = {}
        stack = list(ops)
        while stack:
            for t in stack.pop().inputs:
                outside = self.segments.get(t.op) != segment or t.name in forward.sources
                if outside or t.op in forward.kept:
                    if t.name in forward.dependent:
                        inputs[t.name] = t
                elif t.op not in ops:
                    ops[t.op] = None
                    stack.append(t.op)
        return _Subgraph(list(ops), outputs, list(inputs.values()))

    def _recompute(self, subgraph: _Subgraph) -> list[Gradient | None]:
        """Runs the subgraph again when all gradients so far are known; differentiates the copy."""
        _refuse_control_flow_v1(subgraph.ops)
        before = {t.op for op in subgraph.ops for t in op.inputs}
        random = (op for op in before if op.op_def.is_stateful and "Random" in op.type)
        self.random_ops.update(op.name for op in random)
        with tf.control_dependencies([_tensor(g) for g in self.done]):
            gate = tf.no_op("gate")
        self.done = [gate]
        with tf.control_dependencies([gate]), tf.compat.v1.name_scope("recompute"):
            # Not tf.identity: Grappler moves the cast of a weight in front of that, and so in front
            # of the gate. All weights would be cast when the step begins, and kept.
            copies = {t.name: tf.identity_n([t, t])[0] for t in subgraph.inputs}
            _copy(_order(subgraph.ops, self.forward.position), copies)
        return self._differentiate(subgraph, copies)

    def _differentiate(
        self, subgraph: _Subgraph, copies: dict[str, tf.Tensor]
    ) -> list[Gradient | None]:
        """Gradients by the subgraph's inputs; `copies` replace the tensors of their names."""
        graph = tf.compat.v1.get_default_graph()
        before = len(graph.get_operations())
        inputs = [copies.get(t.name, t) for t in subgraph.inputs]
        stops = [copies.get(name, t) for name, t in self.forward.stops.items()]
        found = tf.compat.v1.gradients(
            [copies.get(t.name, t) for t in subgraph.outputs],
            inputs,
            [self.sums[t.name] for t in subgraph.outputs],
            stop_gradients=[*inputs, *stops],
            **self.options,
        )
        return _use_copies(found, graph.get_operations()[before:], copies)

    def _receive(self, t: tf.Tensor, part: Gradient) -> None:
        """Adds a part to the gradient of t. If t is the value of an x, the part is x's, too."""
        forward = self.forward
        while (before := forward.read_from(t)) is not None:
            if t.name in forward.sources:
                self._add(t, part)
            t, part = before, _gradient_of_read(before, t, part)
        self._add(t, part)

    def _add(self, t: tf.Tensor, part: Gradient) -> None:
        """Adds a part to the sum for t, and makes the next recomputation wait for it."""
        self.sums[t.name] = add(self.sums.get(t.name), part)
        if self.on_part is None or t.name not in self.xs:
            self.done.append(self.sums[t.name])
            return
        self.done.append(self.on_part(self.xs[t.name], part))
        if t.op in self.segments:  # the gradient passes on, so the sum is needed, too
            self.done.append(self.sums[t.name])

    def _hand_out(self, names: Iterable[str], on_gradient: Hook) -> None:
        """Hands complete gradients to on_gradient, one after the other."""
        with tf.control_dependencies([_tensor(g) for g in self.done]):
            last = tf.no_op("segment_done")
        for name in names:
            with tf.control_dependencies([last]):
                last = on_gradient(self.xs[name], self.sums[name])
        self.done = [last]


def _refuse_control_flow_v1(ops: Iterable[tf.Operation]) -> None:
    for op in ops:
        if op.type in CONTROL_FLOW_V1:
            raise ValueError(
                f"{op.name} is part of a loop or condition of TensorFlow 1's kind and cannot be "
                "recomputed: call tf.compat.v1.enable_control_flow_v2() before building it, or "
                "make its result and what it starts from the last checkpoints"
            )


def _tensor(gradient: Any) -> Any:
    """A tensor of the gradient, for a control edge to start from."""
    return gradient.values if isinstance(gradient, tf.IndexedSlices) else gradient


def _gradient_of_read(before: tf.Tensor, t: tf.Tensor, gradient: Gradient) -> Gradient:
    """The gradient by `before`, given that by the value t that was read from it."""
    if t.op.type not in VIEWS:
        return tf.gradients([t], before, [gradient], stop_gradients=before)[0]
    # Without tf.gradients, which would walk through the whole graph for each of these.
    has_same_shape = t.shape.is_fully_defined() and t.shape == before.shape
    if t.op.type in ("Identity", "ReadVariableOp") or has_same_shape:
        return gradient
    return tf.reshape(gradient, tf.shape(before))


def _order(ops: Iterable[tf.Operation], position: Mapping[tf.Operation, int]) -> list[tf.Operation]:
    """Sorts `ops` so that each comes after its inputs; the same order at each call."""
    needs = {op: {t.op for t in op.inputs} for op in ops}
    needs = {op: before.intersection(needs) for op, before in needs.items()}
    return [op for batch in toposort(needs) for op in sorted(batch, key=position.__getitem__)]


def _copy(ops: Iterable[tf.Operation], copies: dict[str, tf.Tensor]) -> None:
    """Copies operations. A copy reads copies of the original's inputs, as far as there are any.

    `ops` come after their inputs. `copies` are by the name of the original tensor; those of the
    outputs are added.
    """
    for op in ops:
        attrs = dict(op.node_def.attr)
        # The device is copied, so the copy needs no colocation with the original.
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
    """Replaces gradient operations that read an original tensor although there is a copy of it.

    The gradient function of tf.custom_gradient holds the forward pass's tensors by a closure: it
    would keep the originals in memory. `made` are the operations that compute `found`, each after
    its inputs; `copies` are by the name of the original.
    """
    stale: set[tf.Operation] = set()
    for op in made:
        if any(t.name in copies or t.op in stale for t in op.inputs):
            stale.add(op)
    renewed = dict(copies)
    _copy([op for op in made if op in stale], renewed)

    def renew(gradient: Gradient | None) -> Gradient | None:
        if isinstance(gradient, tf.IndexedSlices):
            parts = (gradient.values, gradient.indices, gradient.dense_shape)
            return tf.IndexedSlices(*map(renew, parts))
        return None if gradient is None else renewed.get(gradient.name, gradient)

    return [renew(gradient) for gradient in found]


def _checkpoint_names(checkpoints: str | Sequence[tf.Tensor], forward: _Forward) -> set[str]:
    """Names of the checkpoints. The xs are checkpoints, too: one may be computed from another."""
    if not isinstance(checkpoints, str):
        tensors = list(checkpoints)
    elif checkpoints == "collection":
        tensors = tf.compat.v1.get_collection(COLLECTION)
        if not tensors:
            raise ValueError(
                "checkpoints='collection', but the graph collection 'checkpoints' is empty: "
                "fill it with tf.compat.v1.add_to_collection, or give a list or 'memory'"
            )
    elif checkpoints == "memory":
        tensors = _cheapest(_bottlenecks(forward))
    else:
        raise ValueError(
            f"checkpoints={checkpoints!r} must be 'collection', 'memory' or a list of tensors"
        )
    return {t.name for t in tensors} | forward.sources


class _Bottleneck(NamedTuple):
    """A tensor through which all of the forward graph passes, and the bytes made up to it."""

    tensor: tf.Tensor
    size_so_far: int


def _bottlenecks(forward: _Forward) -> list[_Bottleneck]:
    """Finds the tensors that separate the ys from all that comes before them, the first one first.

    Operations are visited along the longest chain first, so that a side branch, such as the cast of
    a weight, comes after the chain that it joins. A tensor is a bottleneck if, when it has been
    made, no other tensor is still needed.
    """
    depth: dict[tf.Operation, int] = {}
    for op in forward.ops:
        if op in forward.path and op not in forward.variable_reads:
            depth[op] = 1 + max((depth.get(t.op, 0) for t in forward.path_inputs(op)), default=0)

    def deepest_first(ops: Iterable[tf.Operation]) -> list[tf.Operation]:
        return sorted({op: None for op in ops if op in depth}, key=depth.__getitem__, reverse=True)

    ends = deepest_first(op for op in depth if any(t.name in forward.ys for t in op.outputs))
    ops = list(_inputs_first(ends, lambda op: deepest_first(t.op for t in op.inputs)))
    last_use = {t.name: i for i, op in enumerate(ops) for t in forward.path_inputs(op)}
    last_use.update(dict.fromkeys(forward.ys, len(ops)))
    needed: set[str] = set()
    found: list[_Bottleneck] = []
    size = 0
    for i, op in enumerate(ops):
        made = [t for t in op.outputs if last_use.get(t.name, 0) > i]
        needed = {name for name in needed if last_use[name] > i}.union(t.name for t in made)
        size += sum(map(_bytes, made))
        if len(needed) == 1 and made and made[0].name not in forward.ys:
            found.append(_Bottleneck(made[0], size))
    if not found:
        raise ValueError(
            "checkpoints='memory', but no single tensor separates the ys from the xs: "
            "give a list of checkpoints, or use tf.gradients"
        )
    return found


def _bytes(t: tf.Tensor) -> int:
    """The size of t. An unknown axis counts as 1, since most tensors share it."""
    sizes = [] if t.shape.rank is None else t.shape.as_list()
    return math.prod(1 if size is None else size for size in sizes) * t.dtype.size


def _cheapest(bottlenecks: Sequence[_Bottleneck]) -> list[tf.Tensor]:
    """Chooses evenly spaced bottlenecks as checkpoints.

    Tries each number of segments, and takes the one with the fewest bytes: those of the checkpoints
    plus those of the largest segment.
    """
    total = bottlenecks[-1].size_so_far

    def evenly_spaced(n_segments: int) -> list[_Bottleneck]:
        chosen: list[_Bottleneck] = []
        for bottleneck in bottlenecks:
            if bottleneck.size_so_far * n_segments >= total * (len(chosen) + 1):
                chosen.append(bottleneck)
        return chosen

    def cost(chosen: list[_Bottleneck]) -> int:
        edges = [0, *(b.size_so_far for b in chosen), total]
        largest = max(end - start for start, end in zip(edges, edges[1:], strict=False))
        return sum(_bytes(b.tensor) for b in chosen) + largest

    choices = map(evenly_spaced, range(2, len(bottlenecks) + 2))
    return [b.tensor for b in min(choices, key=cost)]
