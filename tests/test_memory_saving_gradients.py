import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf

from gpt_2_simple import model
from gpt_2_simple.memory_saving_gradients import add, gradients

v1 = tf.compat.v1


@pytest.fixture(autouse=True)
def graph():
    with tf.Graph().as_default() as graph:
        yield graph


def variable(name, *shape, use_resource=True):
    value = np.random.default_rng(sum(map(ord, name))).normal(size=shape) / np.sqrt(shape[0])
    init = v1.constant_initializer(value.astype(np.float32))
    return v1.get_variable(name, shape, tf.float32, init, use_resource=use_resource)


def evaluate(*fetches, feed=None, **options):
    with v1.Session() as sess:
        sess.run(v1.global_variables_initializer())
        return sess.run(fetches, feed, **options)


def assert_same(ys, xs, checkpoints, recomputes=True, rtol=1e-6, **kwargs):
    """Our gradients are tf.gradients', Nones and IndexedSlices included."""
    feed, allow_zero = kwargs.pop("feed", None), kwargs.pop("allow_zero", False)
    wanted = tf.gradients(ys, xs, **kwargs)
    found = gradients(ys, xs, checkpoints=checkpoints, **kwargs)
    assert [type(g) for g in found] == [type(g) for g in wanted]
    assert bool(copies()) == recomputes
    pairs = [
        (tf.convert_to_tensor(f), tf.convert_to_tensor(w))
        for f, w in zip(found, wanted, strict=True)
        if w is not None
    ]
    assert pairs
    for f, w in evaluate(pairs, feed=feed)[0]:
        assert np.any(w) or allow_zero
        np.testing.assert_allclose(f, w, rtol=0, atol=rtol * np.abs(w).max())
    return found


def is_copy(name):
    return re.match(r"gradients(_\d+)?/recompute(_\d+)?/", name) is not None


def copies():
    return [op for op in v1.get_default_graph().get_operations() if is_copy(op.name)]


def mlp(layers=6, width=16, rows=4, use_resource=True, activation=tf.tanh):
    x = tf.constant(np.random.default_rng(3).normal(size=(rows, width)).astype(np.float32))
    weights, hidden = [], []
    for i in range(layers):
        weights.append(variable(f"w{i}", width, width, use_resource=use_resource))
        x = activation(tf.matmul(x, weights[-1]))
        hidden.append(x)
    return weights, hidden, tf.reduce_sum(tf.square(x))


# Gradients equal tf.gradients'


@pytest.mark.parametrize("use_resource", [True, False])
@pytest.mark.parametrize("every", [1, 2, 3])
def test_gradients_of_a_chain_equal_tf_gradients(use_resource, every):
    weights, hidden, loss = mlp(use_resource=use_resource)
    assert_same(loss, weights, hidden[every - 1 : -1 : every])


def test_default_checkpoints_are_the_collection(graph):
    weights, hidden, loss = mlp()
    with pytest.raises(ValueError, match="collection 'checkpoints' is empty"):
        gradients(loss, weights)
    for h in hidden[:-1]:
        graph.add_to_collection("checkpoints", h)
    found = gradients(loss, weights)
    assert copies()
    for f, w in zip(*evaluate(found, tf.gradients(loss, weights)), strict=True):
        np.testing.assert_allclose(f, w, rtol=1e-5)


def test_xs_may_be_one_variable_or_tensors():
    weights, hidden, loss = mlp()
    assert_same(loss, weights[0], hidden[:-1])
    assert_same(loss, [hidden[1], weights[4], hidden[3], weights[0], weights[0]], hidden[:-1:2])
    (value,) = (t for t in hidden[2].op.inputs[0].op.inputs if t.op.type == "ReadVariableOp")
    assert_same(loss, [value, weights[2]], hidden[:-1])


def test_nothing_is_recomputed_without_useful_checkpoints():
    weights, hidden, loss = mlp()
    unrelated = tf.constant(1.0) * 2
    assert_same(loss, weights, [], recomputes=False)
    assert_same(loss, weights, [unrelated, loss], recomputes=False)
    assert_same(loss, weights[3:], hidden[:3], recomputes=False)  # frozen: nothing goes back there


def test_several_ys_and_grad_ys():
    weights, hidden, loss = mlp()
    middle, unused = hidden[2] * 3, variable("unused", 2)
    assert_same([loss, middle], [*weights, unused], hidden[:-1])
    grad = tf.reshape(tf.range(64.0), [4, 16])
    assert_same([middle, loss, hidden[3]], weights, hidden[:-1], grad_ys=[grad, None, grad])
    assert_same([middle], weights, hidden[:-1], grad_ys=grad)


def test_unconnected_x_gives_none_or_zeros():
    weights, hidden, loss = mlp()
    unused = variable("unused", 2, 3)
    assert gradients(loss, [unused, weights[0]], checkpoints=hidden[:-1])[0] is None
    zero = gradients(
        loss, [unused, weights[0]], checkpoints=hidden[:-1], unconnected_gradients="zero"
    )
    np.testing.assert_array_equal(evaluate(zero[0])[0], np.zeros((2, 3)))


def test_stop_gradients_in_the_last_segment_equal_tf_gradients():
    w, v = variable("w", 3), variable("v", 3)
    u, frozen = tf.tanh(w), tf.tanh(v)
    y = tf.reduce_sum((u - 2 * frozen) ** 2)
    assert_same(y, [v, w], [u], stop_gradients=[frozen])


@pytest.mark.parametrize("shape", [None, [None, None]])
def test_gradient_of_a_fed_tensor_has_its_shape(shape):
    x, target = v1.placeholder(tf.float32, shape), v1.placeholder(tf.int32, [2])
    reshaped = tf.reshape(x, target)
    u = tf.tanh(reshaped)
    feed = {x: np.arange(6.0).reshape(2, 3), target: [3, 2]}
    wanted = tf.gradients(tf.reduce_sum(tf.sin(u)), x)
    found = gradients(tf.reduce_sum(tf.sin(u)), x, checkpoints=[u])
    for f, w in evaluate(list(zip(found, wanted, strict=True)), feed=feed)[0]:
        np.testing.assert_allclose(f, w, rtol=1e-6)


def test_stop_gradients_equal_tf_gradients():
    weights, hidden, loss = mlp()
    stopped = tf.tanh(hidden[2] * 2)
    loss = loss + tf.reduce_sum(stopped * hidden[3])
    assert_same(loss, weights, hidden[:-1:2], stop_gradients=[stopped])
    assert_same(loss, [stopped, weights[3], weights[0]], hidden[:-1:2], stop_gradients=stopped)
    assert_same(loss, [hidden[3], weights[4]], hidden[:-1:2], stop_gradients=hidden[3])
    through = tf.stop_gradient(hidden[2]) * hidden[3]
    assert_same(loss + tf.reduce_sum(through), weights, hidden[:-1:2])


def tied(layers=4, reshape=False):
    wte = variable("wte", 7, 8)
    ids = tf.constant([[1, 3, 3], [6, 1, 0]])
    read = tf.reshape(wte.read_value(), [7, 8]) if reshape else wte
    x = tf.reshape(tf.gather(read, ids), [6, 8])
    weights, hidden = [wte], []
    for i in range(layers):
        weights.append(variable(f"w{i}", 1, 8, 8))
        x += tf.tanh(tf.matmul(x, tf.reshape(weights[-1], [8, 8])))
        hidden.append(x)
    return weights, hidden, tf.matmul(x, read, transpose_b=True)


@pytest.mark.parametrize("reshape", [True, False])
def test_tied_embedding_sums_dense_and_sparse_gradients(reshape, graph):
    weights, hidden, logits = tied(reshape=reshape)
    loss = tf.reduce_mean(tf.nn.log_softmax(logits)[:, 2])
    before = len(graph.get_operations())
    gradients(loss, weights, checkpoints=hidden)
    types = [op.type for op in graph.get_operations()[before:]]
    assert "TensorScatterAdd" in types
    assert "UnsortedSegmentSum" not in types  # would be a second dense gradient
    assert_same(loss, weights, hidden)


def test_embedding_gradient_stays_indexed_slices():
    weights, hidden, _ = tied()
    loss = tf.reduce_sum(tf.square(hidden[-1]))
    found = assert_same(loss, weights, hidden[:-1])
    assert isinstance(found[0], tf.IndexedSlices)
    twice = loss + tf.reduce_sum(tf.square(tf.gather(weights[0], [5, 6]) * hidden[2][:2]))
    assert isinstance(assert_same(twice, weights, hidden[:-1])[0], tf.IndexedSlices)


def test_skip_connections_around_checkpoints():
    weights, hidden, loss = mlp()
    mask = tf.cast(tf.range(16) > 5, tf.float32)  # used by several segments
    side = tf.sin(tf.matmul(hidden[1], weights[0])) * mask
    loss += tf.reduce_sum(side * hidden[4]) + tf.reduce_sum(hidden[0] * hidden[5] * mask)
    assert_same(loss, weights, hidden[:-1])
    assert_same(loss, weights, [hidden[2], side])


def test_shared_weight_and_its_cast_in_many_segments():
    shared, x = variable("shared", 8, 8), tf.ones([3, 8])
    cast = tf.cast(tf.cast(shared, tf.float64), tf.float32)
    hidden = []
    for _ in range(5):
        x = tf.tanh(tf.matmul(x, cast) + tf.matmul(x, shared))
        hidden.append(x)
    assert_same(tf.reduce_sum(x), [shared], hidden[:-1])


def test_cast_of_a_weight_is_recomputed_in_its_segment(graph):
    """A cast of each weight would else be kept from the forward pass on, a copy of the model."""
    x, weights, hidden = tf.ones([3, 8], tf.float16), [], []
    for i in range(4):
        weights.append(variable(f"w{i}", 8, 8))
        x = tf.tanh(tf.matmul(x, tf.cast(weights[-1], tf.float16)))
        hidden.append(x)
    gradients(tf.reduce_sum(x), weights, checkpoints=hidden[:-1])
    assert [op.type for op in copies()].count("Cast") == 3


def test_cast_of_a_weight_still_waits_for_its_segment_after_grappler():
    """Grappler moves a cast in front of tf.identity, and drops what that waited for."""
    x, weights, hidden = tf.ones([3, 8], tf.float16), [], []
    for i in range(4):
        weights.append(variable(f"w{i}", 8, 8))
        cast = tf.cast(tf.reshape(weights[-1].read_value(), [8, 8]), tf.float16)
        x = tf.tanh(tf.matmul(x, cast))
        hidden.append(x)
    found = gradients(tf.reduce_sum(x), weights, checkpoints=hidden[:-1])
    metadata = v1.RunMetadata()
    evaluate(found, options=v1.RunOptions(output_partition_graphs=True), run_metadata=metadata)
    nodes = {n.name: n for graph in metadata.partition_graphs for n in graph.node}

    def waits(node):
        """Whether a node, or what it reads down to a variable, waits for something."""
        before = [nodes[name.split(":")[0]] for name in node.input if not name.startswith("^")]
        return len(before) < len(node.input) or any(map(waits, before))

    recomputed = [n for n in nodes.values() if n.op == "Cast" and is_copy(n.name)]
    assert len(recomputed) == 3
    assert all(map(waits, recomputed))


def test_unknown_batch_size():
    x = v1.placeholder(tf.float32, [None, None])
    w, hidden = variable("w", 4, 4), []
    h = x
    for _ in range(4):
        h = tf.reshape(tf.tanh(tf.matmul(tf.reshape(h, [-1, 4]), w)), tf.shape(h)) + h
        hidden.append(h)
    feed = {x: np.ones((3, 4), np.float32)}
    assert_same(tf.reduce_sum(h), [w, x], hidden[:-1], feed=feed)


def test_recomputed_tensors_keep_set_shapes():
    shape, w = v1.placeholder_with_default([2, 2], [None]), variable("w", 2, 2)
    hidden = tf.tanh(tf.reshape(tf.matmul(w, w), shape))
    hidden.set_shape([2, 2])
    checkpoint = tf.sin(hidden)
    assert_same(tf.reduce_sum(tf.square(checkpoint)), [w], [checkpoint])
    assert [op.outputs[0].shape for op in copies() if op.type == "Tanh"] == [[2, 2]]


@pytest.mark.parametrize("seed", range(12))
def test_gradients_of_random_graphs_equal_tf_gradients(seed):
    rng = np.random.default_rng(seed)
    tensors = [variable(f"v{i}", 3, 3).read_value() for i in range(3)]
    xs = list(tensors[:2])
    tensors.append(tf.constant(rng.normal(size=(3, 3)).astype(np.float32)))
    for _ in range(25):
        a, b = (tensors[i] for i in rng.choice(len(tensors), 2))
        recent = tensors[-1]
        make = [
            lambda a, b, c: tf.matmul(tf.tanh(a), c) / 2,
            lambda a, b, c: tf.sin(a + b * c),
            lambda a, b, c: tf.split(tf.concat([a, c], axis=0), 2, axis=0)[0] * 0.5 + b,
            lambda a, b, c: tf.nn.softmax(c - a),
            lambda a, b, c: tf.stop_gradient(a) * tf.cos(c),
        ][rng.integers(5)]
        tensors.append(make(a, b, recent))
    picked = [tensors[i] for i in rng.choice(np.arange(4, 28), 4, replace=False)]
    ys = [tf.reduce_sum(t) for t in (tensors[-1], tensors[rng.integers(10, 28)])]
    xs += picked[:1]
    assert_same(ys, xs, picked, rtol=3e-6, allow_zero=True)


def gpt2(n_layer=3):
    hparams = model.HParams(n_vocab=61, n_ctx=16, n_embd=12, n_head=3, n_layer=n_layer)
    tokens = tf.constant(np.random.default_rng(0).integers(0, 61, (2, 17)), tf.int32)
    logits = model.model(hparams, tokens[:, :-1])["logits"]
    losses = tf.nn.sparse_softmax_cross_entropy_with_logits(labels=tokens[:, 1:], logits=logits)
    return tf.reduce_mean(losses)


@pytest.mark.parametrize("checkpoints", ["collection", "memory"])
def test_gpt2_gradients_equal_tf_gradients(checkpoints):
    loss = gpt2()
    wanted = tf.gradients(loss, v1.trainable_variables())
    found = gradients(loss, v1.trainable_variables(), checkpoints=checkpoints)
    pairs = [list(map(tf.convert_to_tensor, pair)) for pair in zip(found, wanted, strict=True)]
    for f, w in evaluate(pairs)[0]:
        np.testing.assert_allclose(f, w, rtol=0, atol=3e-6 * np.abs(w).max())


# Operations that are more than a function of their inputs


def test_custom_gradient_reads_recomputed_tensors(graph):
    @tf.custom_gradient
    def cube(x):
        return x * x * x, lambda dy: dy * 3 * x * x

    weights, hidden, loss = mlp(activation=lambda x: cube(tf.sin(x)))
    found = assert_same(loss, weights, hidden[:-1])
    assert not reads_originals(found, hidden[:-1])


def reads_originals(found, checkpoints):
    """The forward operations before the last checkpoint that gradients take values from."""
    names = {t.name for t in checkpoints}

    def walk(stack):
        seen = set()
        while stack:
            op = stack.pop()
            if op not in seen and op.type not in ("Const", "ReadVariableOp"):
                seen.add(op)
                stack.extend(t.op for t in op.inputs if t.name not in names)
        return seen

    return walk([g.op for g in found]) & walk([t.op for t in checkpoints])


def test_activations_are_not_kept_for_the_backward_pass():
    weights, hidden, loss = mlp(activation=lambda x: tf.square(tf.sin(x)))
    kept = hidden[:-1]
    assert len(reads_originals(tf.gradients(loss, weights), kept)) >= 10
    assert not reads_originals(gradients(loss, weights, checkpoints=kept), kept)


def test_loops_conditions_and_function_calls_are_differentiated():
    @tf.function
    def called(x):
        return tf.sin(x) * x

    scale = variable("scale", 1)

    @tf.function
    def with_variable(x):
        return tf.tanh(x * scale)

    @tf.function
    def of_variables_alone(a, b):
        return a * tf.sin(b)

    def repeat(x):
        return tf.while_loop(lambda i, x: i < 3, lambda i, x: (i + 1, tf.tanh(x) * 1.1), (0, x))[1]

    def choose(x):
        return tf.cond(tf.reduce_sum(x) > 0, lambda: tf.sin(x), lambda: x * x)

    weights, hidden, _ = mlp()
    weights[1] = of_variables_alone(weights[1], weights[5])
    kinds = [called, repeat, choose, with_variable, tf.nn.relu]
    x, hidden = hidden[0], []
    for kind, w in zip(kinds, weights, strict=False):
        x = kind(tf.matmul(x, w)) + x
        hidden.append(x)
    assert_same(tf.reduce_sum(x), [*v1.trainable_variables()], hidden[:-1], rtol=3e-6)


def test_tensorflow_1_loop_raises_if_it_must_be_recomputed():
    enabled = v1.control_flow_v2_enabled()
    v1.disable_control_flow_v2()
    try:
        w = variable("w", 4, 4)
        x = tf.matmul(tf.ones([2, 4]), w)
        y = tf.while_loop(lambda i, x: i < 3, lambda i, x: (i + 1, tf.tanh(x)), (0, x))[1]
        z = tf.tanh(tf.matmul(y, w))
    finally:
        if enabled:
            v1.enable_control_flow_v2()
    with pytest.raises(ValueError, match="is part of a loop.*enable_control_flow_v2"):
        gradients(tf.reduce_sum(z), [w], checkpoints=[y])
    assert_same(tf.reduce_sum(z), [w], [x])


def dropped(random, layers=5):
    weights = [variable(f"w{i}", 16, 16) for i in range(layers)]
    x, hidden = tf.ones([32, 16]), []
    for i, w in enumerate(weights):
        x = tf.tanh(tf.matmul(x, w)) * tf.cast(random([32, 16], i) > 0.3, tf.float32)
        hidden.append(x)
    return weights, hidden, tf.reduce_sum(x)


def test_stateless_random_values_are_recomputed_equal(graph):
    weights, hidden, loss = dropped(lambda shape, i: tf.random.stateless_uniform(shape, [1, i]))
    assert_same(loss, weights, hidden[:-1])
    assert any("StatelessRandom" in op.type for op in copies())


def test_stateful_random_values_are_kept_with_a_warning(graph):
    weights, hidden, loss = dropped(lambda shape, i: tf.random.uniform(shape))
    with pytest.warns(UserWarning, match=r"random values are kept.*random_uniform.*stateless"):
        found = gradients(loss, weights, checkpoints=hidden[:-1])
    assert not any("Random" in op.type for op in copies())
    pairs = list(zip(found, tf.gradients(loss, weights), strict=True))
    for f, w in evaluate(pairs)[0]:  # in one run, so of the same masks
        np.testing.assert_allclose(f, w, rtol=1e-4, atol=1e-6)


# Choice of checkpoints


def test_memory_chooses_about_root_n_checkpoints():
    weights, hidden, loss = mlp(layers=16)
    assert_same(loss, weights, "memory")
    identities = [op.inputs[0] for op in copies() if op.type == "IdentityN"]
    kept = {t.name for t in identities if not t.op.type.endswith("VariableOp")}
    assert 2 <= len(kept) <= 8  # about the root of 32 tensors


def test_memory_without_a_bottleneck_raises():
    a, b = variable("a", 3, 3), variable("b", 3, 3)
    for _ in range(4):
        a, b = tf.matmul(a, b), tf.sin(a) + b
    with pytest.raises(ValueError, match="no single tensor separates"):
        gradients([tf.reduce_sum(a), tf.reduce_sum(b)], [a, b], checkpoints="memory")


def test_unknown_checkpoints_name_raises():
    weights, _, loss = mlp()
    with pytest.raises(ValueError, match="'speed' must be 'collection', 'memory' or a list"):
        gradients(loss, weights, checkpoints="speed")


# The executed graph


def executed(*fetches):
    """The nodes Grappler left, and when each ran: {name: (start, end)} in nanoseconds."""
    options = v1.RunOptions(trace_level=v1.RunOptions.FULL_TRACE, output_partition_graphs=True)
    metadata = v1.RunMetadata()
    evaluate(*fetches, options=options, run_metadata=metadata)
    nodes = {node.name: node for part in metadata.partition_graphs for node in part.node}
    runs = {}
    for device in metadata.step_stats.dev_stats:
        for stats in device.node_stats:
            start = stats.all_start_nanos
            runs.setdefault(stats.node_name, []).append((start, start + stats.all_end_rel_nanos))
    return nodes, runs


def test_each_segment_is_recomputed_once_after_its_gradient():
    layers = 6
    weights, hidden, loss = mlp(layers, activation=lambda x: tf.square(tf.sin(x)))
    found = gradients(loss, weights, checkpoints=hidden[:-1])
    nodes, runs = executed([loss, *found])
    gates = sorted(name for name in nodes if "/gate" in name)
    again = {name: times for name, times in runs.items() if is_copy(name)}
    for kind, times in {"Sin": layers - 1, "MatMul": layers - 1}.items():
        ran = [name for name in again if f"/{kind}" in name]
        assert len(ran) == times, (kind, sorted(again))
    assert all(len(times) == 1 for times in again.values())
    # A segment's copy starts when all before is done: its weight's gradient and its own.
    gradients_done = [runs[g.op.name][0][1] for g in reversed(found)]
    starts = sorted(
        min(start for name, ((start, _),) in again.items() if f"/recompute{suffix}/" in name)
        for suffix in ["", *(f"_{i}" for i in range(1, layers - 1))]
    )
    assert len(gates) <= layers - 1
    for start, done in zip(starts, gradients_done, strict=False):
        assert start >= done


def test_on_gradient_runs_before_earlier_segments_are_recomputed():
    weights, hidden, loss = mlp(activation=lambda x: tf.square(tf.sin(x)))
    updates = []

    def update(x, gradient):
        updates.append(
            tf.raw_ops.ResourceApplyGradientDescent(var=x.handle, alpha=0.1, delta=gradient)
        )
        return updates[-1]

    expected = [w - 0.1 * g for w, g in zip(weights, tf.gradients(loss, weights), strict=True)]
    wanted = evaluate(expected)[0]
    gradients(loss, weights, checkpoints=hidden[:-1], on_gradient=update)
    _, runs = executed(updates)
    ends = [runs[op.name][0][1] for op in updates]
    assert ends == sorted(ends)
    starts = sorted(t[0][0] for name, t in runs.items() if is_copy(name) and "Sin" in name)
    for end, start in zip(ends, starts, strict=False):
        assert end <= start
    with v1.Session() as sess:
        sess.run(v1.global_variables_initializer())
        sess.run(updates)
        for f, w in zip(sess.run(weights), wanted, strict=True):
            np.testing.assert_allclose(f, w, rtol=1e-5, atol=1e-6)


def test_order_of_on_gradient_and_on_part_calls():
    weights, hidden, logits = tied()
    loss = tf.reduce_mean(tf.nn.log_softmax(logits)[:, 2])
    whole, parts = [], []

    def tell(into):
        def hook(x, gradient):
            into.append((x.name, type(gradient)))
            return tf.identity(tf.convert_to_tensor(gradient)).op

        return hook

    gradients(loss, weights, checkpoints=hidden, on_gradient=tell(whole), on_part=tell(parts))
    assert [name for name, _ in whole] == ["w3:0", "w2:0", "w1:0", "wte:0", "w0:0"]
    assert [name for name, _ in parts] == ["wte:0", "w3:0", "w2:0", "w1:0", "wte:0", "w0:0"]
    sparse = [issubclass(kind, tf.IndexedSlices) for name, kind in parts if name == "wte:0"]
    assert sparse == [False, True]


def test_add_of_dense_and_sparse_gradients():
    dense = tf.ones([4, 2])
    rows = tf.IndexedSlices(tf.ones([3, 2]), tf.constant([1, 3, 1]), tf.constant([4, 2]))
    for total in (add(dense, rows), add(rows, dense)):
        np.testing.assert_array_equal(evaluate(total)[0], [[1, 1], [3, 3], [1, 1], [2, 2]])
    both = add(rows, rows)
    assert isinstance(both, tf.IndexedSlices)
    whole = evaluate(tf.convert_to_tensor(both))[0]
    np.testing.assert_array_equal(whole, [[0, 0], [4, 4], [0, 0], [2, 2]])


# Memory under a hard limit of TensorFlow's allocator

MEMORY_SCRIPT = """
import json
import numpy as np
import tensorflow as tf
from gpt_2_simple.memory_saving_gradients import gradients
from gpt_2_simple.training.optimizer import AccumulatingOptimizer, make_optimizer, zeros

v1 = tf.compat.v1


def run(kind, layers, rows, width):
    with tf.Graph().as_default(), v1.Session() as sess:
        x = v1.placeholder_with_default(np.ones([1, 1], np.float32), [1, 1])
        x, weights, hidden = x + tf.random.stateless_uniform([rows, width], [1, 2]), [], []
        for i in range(layers):
            weights.append(v1.get_variable(f"w{i}", [width, width], initializer=zeros,
                                           use_resource=True))
            x = tf.tanh(tf.sin(tf.matmul(x, weights[-1]) + x) * 0.9)
            hidden.append(x)
        loss = tf.reduce_sum(x)
        opt = make_optimizer("sgd", 0.01)
        steps = []
        if kind == "plain":
            step = opt.apply_gradients(zip(tf.gradients(loss, weights), weights))
        elif kind == "recompute":
            found = gradients(loss, weights, checkpoints=hidden[3:-1:4])
            step = opt.apply_gradients(zip(found, weights))
        elif kind == "at once":
            updates = []

            def update(x, gradient):
                updates.append(opt.apply(gradient, x))
                return updates[-1]

            gradients(loss, weights, checkpoints=hidden[3:-1:4], on_gradient=update)
            step = opt.finish(updates)
        else:
            opt = AccumulatingOptimizer(opt, weights)
            added = []

            def add(x, part):
                added.append(opt.add(x, part))
                return added[-1]

            gradients(loss, weights, checkpoints=hidden[3:-1:4], on_part=add)
            steps = [opt.reset(), opt.end_micro_batch(loss, added)]
            step = opt.apply_gradients()
        sess.run(v1.global_variables_initializer())
        tf.config.experimental.reset_memory_stats("CPU:0")
        try:
            for op in [*steps, step] * 2:
                sess.run(op)
        except tf.errors.ResourceExhaustedError:
            return "exhausted"
        return tf.config.experimental.get_memory_info("CPU:0")["peak"] / 2**20


wide, deep = dict(layers=16, rows=4, width=1024), dict(layers=32, rows=8192, width=128)
print(json.dumps({
    "deep": {kind: run(kind, **deep) for kind in ("recompute", "plain")},
    "wide": {kind: run(kind, **wide) for kind in ("plain", "at once", "accumulate")},
}))
"""


@pytest.fixture(scope="module")
def peaks():
    """Peaks in MiB, where 1 is a weight of 'wide' and 4 MiB an activation of 'deep'."""
    limit = {"TF_CPU_ALLOCATOR_USE_BFC": "true", "TF_CPU_BFC_MEM_LIMIT_IN_MB": "200"}
    done = subprocess.run(
        [sys.executable, "-c", MEMORY_SCRIPT],
        env={**os.environ, **limit, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_deep_network_trains_where_tf_gradients_runs_out_of_memory(peaks):
    assert peaks["deep"]["plain"] == "exhausted"
    assert peaks["deep"]["recompute"] < 100


def test_peak_memory_without_all_gradients_at_once(peaks):
    weights = 16 * 4  # MiB, and as much again in gradients
    assert peaks["wide"]["plain"] > 1.8 * weights
    assert peaks["wide"]["at once"] < 1.45 * weights  # a segment is a quarter
    assert 2 * weights < peaks["wide"]["accumulate"] < 2.3 * weights
