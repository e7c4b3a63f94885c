import os
import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf

from gpt_2_simple import memory_saving_gradients
from gpt_2_simple.training import optimizer, settings
from gpt_2_simple.training.optimizer import AccumulatingOptimizer, make_optimizer

v1 = tf.compat.v1
STEPS = 10
SHAPES = {"w": (1, 6, 5), "wte": (7, 4), "b": (5,), "g": (1, 3)}


@pytest.fixture(autouse=True)
def graph():
    with tf.Graph().as_default() as graph:
        yield graph


def variable(name, value):
    value = np.asarray(value, np.float32)
    init = v1.constant_initializer(value)
    return v1.get_variable(name, value.shape, tf.float32, init, use_resource=True)


def session():
    sess = v1.Session()
    sess.run(v1.global_variables_initializer())
    return sess


def values(shapes, seed):
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def gradients_of_step(step):
    grads = values(SHAPES, 100 + step)
    grads["w"] *= 10.0 ** (step % 3 - 2)  # makes Adafactor clip now and then
    grads["wte"][2] = 0
    return grads


def train(name, learning_rate=0.03, **options):
    """Ten steps of the optimizer under test."""
    rate = v1.placeholder(tf.float32, [])
    start = values(SHAPES, 0)
    variables = {name: variable(f"model/{name}", value) for name, value in start.items()}
    grads = {name: v1.placeholder(tf.float32, shape) for name, shape in SHAPES.items()}
    opt = make_optimizer(name, rate, **options)
    step = opt.apply_gradients([(grads[name], variables[name]) for name in SHAPES])
    with session() as sess:
        for t in range(STEPS):
            feed = {grads[name]: value for name, value in gradients_of_step(t).items()}
            sess.run(step, {rate: learning_rate * (t + 1), **feed})
        return opt, sess.run(variables)


def expect(update, learning_rate=0.03, weight_decay=0.0):
    """Ten steps in float64: update(t, x, g, state of the variable, rate) -> what is subtracted."""
    result = {}
    for name, x in values(SHAPES, 0).items():
        x, state = x.astype(np.float64), {}
        for t in range(STEPS):
            rate = learning_rate * (t + 1)
            g = gradients_of_step(t)[name].astype(np.float64)
            change = update(t + 1, x, g, state, rate)
            decay = rate * weight_decay if name in ("w", "wte") else 0.0
            x = x * (1 - decay) - change
        result[name] = x
    return result


def adam(t, x, g, state, rate):
    beta1, beta2 = float(np.float32(0.9)), float(np.float32(0.999))  # as the kernel has them
    state["m"] = beta1 * state.get("m", 0) + (1 - beta1) * g
    state["v"] = beta2 * state.get("v", 0) + (1 - beta2) * g * g
    step_size = rate * np.sqrt(1 - beta2**t) / (1 - beta1**t)
    return step_size * state["m"] / (np.sqrt(state["v"]) + 1e-8)


def sgd(t, x, g, state, rate):
    return rate * g


def adafactor(t, x, g, state, rate):
    decay = 1 - t**-0.8
    squares = g * g + 1e-30
    if min(x.shape[-2:]) > 1 and x.ndim > 1:
        rows, columns = squares.sum(-1), squares.sum(-2)
        state["r"] = decay * state.get("r", 0) + (1 - decay) * rows
        state["c"] = decay * state.get("c", 0) + (1 - decay) * columns
        r, c = state["r"], state["c"]
        second = r[..., :, None] * c[..., None, :] / r.sum(-1)[..., None, None]
    else:
        second = state["v"] = decay * state.get("v", 0) + (1 - decay) * squares
    update = g / np.sqrt(second)
    return rate * update / max(1.0, np.sqrt(np.mean(update**2)))


CASES = [
    ("adam", {}, adam),
    ("adam", {"weight_decay": 0.1}, adam),
    ("sgd", {}, sgd),
    ("sgd", {"weight_decay": 0.1}, sgd),
    ("adafactor", {}, adafactor),
    ("adafactor", {"weight_decay": 0.1}, adafactor),
]


@pytest.mark.parametrize(("name", "options", "reference"), CASES)
@pytest.mark.parametrize("chunk_bytes", [32 * 2**20, 40])
def test_ten_steps_equal_numpy_reference(name, options, reference, chunk_bytes, monkeypatch):
    monkeypatch.setattr(optimizer, "CHUNK_BYTES", chunk_bytes)
    _, found = train(name, **options)
    wanted = expect(reference, weight_decay=options.get("weight_decay", 0.0))
    for key in SHAPES:
        np.testing.assert_allclose(found[key], wanted[key], rtol=2e-5, atol=2e-6, err_msg=key)


def test_adam_equals_tensorflow_adam():
    _, ours = train("adam")
    with tf.Graph().as_default():
        start = values(SHAPES, 0)
        variables = {name: variable(name, value) for name, value in start.items()}
        grads = {name: v1.placeholder(tf.float32, shape) for name, shape in SHAPES.items()}
        rate = v1.placeholder(tf.float32, [])
        opt = v1.train.AdamOptimizer(rate)
        step = opt.apply_gradients([(grads[name], variables[name]) for name in SHAPES])
        with session() as sess:
            for t in range(STEPS):
                feed = {grads[name]: value for name, value in gradients_of_step(t).items()}
                sess.run(step, {rate: 0.03 * (t + 1), **feed})
            theirs = sess.run(variables)
    for key in SHAPES:
        np.testing.assert_allclose(ours[key], theirs[key], rtol=1e-4, atol=1e-5)


def test_adafactor_state_names_and_shapes():
    opt, _ = train("adafactor")
    shapes = {v.name: v.shape.as_list() for v in opt.variables()}
    assert shapes == {
        "optimizer/adafactor/step:0": [],
        "optimizer/adafactor/rows/model/w:0": [6],
        "optimizer/adafactor/columns/model/w:0": [5],
        "optimizer/adafactor/rows/model/wte:0": [7],
        "optimizer/adafactor/columns/model/wte:0": [4],
        "optimizer/adafactor/v/model/b:0": [5],
        "optimizer/adafactor/v/model/g:0": [1, 3],
    }


def test_state_names_are_independent_of_scopes():
    with v1.variable_scope("model"), tf.name_scope("train"):
        x = variable("x", [1.0])
        opt = make_optimizer("adam", 0.1)
        with tf.control_dependencies([v1.placeholder(tf.float32, [], name="never_fed")]):
            opt.apply(tf.constant([1.0]), x)
    assert [v.name for v in opt.variables()] == [
        "optimizer/adam/step:0",
        "optimizer/adam/m/model/x:0",
        "optimizer/adam/v/model/x:0",
    ]
    assert not [v for v in opt.variables() if v in v1.trainable_variables()]
    session().close()  # initialises without feeding the placeholder


def test_sgd_state_is_only_the_step_counter():
    opt, _ = train("sgd")
    assert [v.name for v in opt.variables()] == ["optimizer/sgd/step:0"]


@pytest.mark.parametrize("name", ["adam", "adafactor", "sgd"])
def test_sparse_gradient_updates_as_dense_gradient(name):
    start = values({"x": (5, 3)}, 0)["x"]
    x, y = variable("x", start), variable("y", start)
    part = values({"g": (3, 3)}, 1)["g"]
    sparse = tf.IndexedSlices(tf.constant(part), tf.constant([4, 1, 4]), tf.constant([5, 3]))
    whole = np.zeros((5, 3), np.float32)
    np.add.at(whole, [4, 1, 4], part)
    step = make_optimizer(name, 0.1).apply_gradients([(sparse, x), (tf.constant(whole), y)])
    with session() as sess:
        sess.run(step)
        found_x, found_y = sess.run([x, y])
    np.testing.assert_allclose(found_x, found_y, rtol=1e-6)
    assert not np.allclose(found_x, start)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: make_optimizer("adamw", 0.1), r"'adamw'.*\['adafactor', 'adam', 'sgd'\]"),
        (lambda: make_optimizer("sgd", -1.0), "learning_rate=-1.0"),
        (lambda: make_optimizer("sgd", float("nan")), "learning_rate=nan"),
        (lambda: make_optimizer("sgd", 0.1, weight_decay=-2), "weight_decay=-2"),
        (lambda: make_optimizer("sgd", 0.1, weight_decay=float("nan")), "weight_decay=nan"),
    ],
)
def test_make_optimizer_rejects_wrong_values(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_optimizers_are_those_that_the_settings_allow():
    assert tuple(optimizer.OPTIMIZERS) == settings.OPTIMIZERS


def test_reference_variable_raises():
    x = v1.get_variable("x", [2], use_resource=False)
    with pytest.raises(ValueError, match="x:0 is a reference variable.*use_resource"):
        make_optimizer("adam", 0.1).apply(tf.ones([2]), x)


# Accumulation


def regression(features=6, outputs=3):
    """A small tied model: embedding rows are both looked up and multiplied with."""
    start = values({"wte": (features, outputs), "b": (outputs,), "unused": (2,)}, 5)
    wte, b, unused = (variable(f"model/{name}", start[name]) for name in ("wte", "b", "unused"))
    ids = v1.placeholder(tf.int32, [None])
    x = tf.gather(wte, ids)
    hidden = tf.tanh(x + b)
    v1.add_to_collection("checkpoints", hidden)
    logits = tf.matmul(tf.sin(hidden), wte, transpose_b=True)
    losses = tf.nn.sparse_softmax_cross_entropy_with_logits(labels=ids, logits=logits)
    return ids, tf.reduce_mean(losses), [wte, b, unused]


BATCHES = np.random.default_rng(7).integers(0, 6, size=(4, 3, 8))  # step, micro-batch, example
MAKERS = {
    "adam": lambda: make_optimizer("adam", 0.02),
    "adafactor": lambda: make_optimizer("adafactor", 0.02),
    "sgd": lambda: make_optimizer("sgd", 0.2),
    "tf adam": lambda: v1.train.AdamOptimizer(0.02),
    "tf momentum": lambda: v1.train.MomentumOptimizer(0.2, 0.9),
}


def accumulate_recomputed(opt, loss):
    """As opt.compute_gradients(loss), by memory_saving_gradients."""
    additions = []

    def add(variable, part):
        additions.append(opt.add(variable, part))
        return additions[-1]

    memory_saving_gradients.gradients(loss, opt.var_list, on_part=add)
    return opt.end_micro_batch(loss, additions)


@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize("recompute", [False, True])
def test_micro_batches_give_the_update_of_one_batch(maker, recompute):
    results = []
    for split in (True, False):
        with tf.Graph().as_default():
            ids, loss, variables = regression()
            opt = AccumulatingOptimizer(MAKERS[maker](), variables)
            reset, compute = opt.reset(), opt.compute_gradients(loss)
            if recompute and split:
                compute = accumulate_recomputed(opt, loss)
            apply = opt.apply_gradients()
            with session() as sess:
                losses = []
                for step in BATCHES:
                    sess.run(reset)
                    for batch in step if split else [step.reshape(-1)]:
                        sess.run(compute, {ids: batch})
                    losses.append(sess.run(apply))
                results.append((losses, sess.run(variables)))
    (split_losses, split_values), (whole_losses, whole_values) = results
    np.testing.assert_allclose(split_losses, whole_losses, rtol=1e-5)
    assert whole_losses[-1] < whole_losses[0]
    for found, wanted in zip(split_values, whole_values, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-6)
    unused = values({"wte": (6, 3), "b": (3,), "unused": (2,)}, 5)["unused"]
    np.testing.assert_array_equal(split_values[2], unused)


def test_reset_clears_and_scale_multiplies_gradients():
    x = variable("x", [1.0, 2.0])
    factor = v1.placeholder(tf.float32, [])
    opt = AccumulatingOptimizer(make_optimizer("sgd", 1.0), [x])
    compute = opt.compute_gradients(tf.reduce_sum(x) * factor)
    reset, finite, apply = opt.reset(), opt.all_finite(), opt.apply_gradients(scale=0.5)
    with session() as sess:
        sess.run(compute, {factor: np.inf})
        assert not sess.run(finite)
        sess.run(reset)
        sess.run(compute, {factor: 1.0})
        sess.run(compute, {factor: 3.0})
        assert sess.run(finite)
        assert sess.run(apply) == pytest.approx(6.0)
        np.testing.assert_allclose(sess.run(x), [0.0, 1.0])


def test_scale_by_global_norm_clips_gradients():
    x, y = variable("x", [0.0, 0.0]), variable("y", [0.0])
    opt = AccumulatingOptimizer(make_optimizer("sgd", 1.0), [x, y])
    compute = opt.compute_gradients(3.0 * x[0] + 4.0 * y[0])
    norm = opt.global_norm()
    apply = opt.apply_gradients(scale=tf.minimum(1.0, 2.0 / norm))
    with session() as sess:
        sess.run(compute)
        sess.run(compute)
        assert sess.run(norm) == pytest.approx(5.0)
        sess.run(apply)
        np.testing.assert_allclose([*sess.run(x), *sess.run(y)], [-1.2, 0, -1.6], rtol=1e-6)


def test_given_gradients_are_added_to_their_variables():
    x, y = variable("x", [1.0]), variable("y", [1.0])
    opt = AccumulatingOptimizer(opt=make_optimizer("sgd", 1.0), var_list=[x, y])
    compute = opt.end_micro_batch(tf.constant(5.0), [opt.add(x, tf.constant([3.0]))])
    apply = opt.apply_gradients()
    with session() as sess:
        sess.run(compute)
        assert sess.run(apply) == 5.0
        assert [*sess.run(x), *sess.run(y)] == [-2.0, 1.0]


def test_dense_and_sparse_parts_of_a_gradient_are_summed():
    x = variable("x", [1.0, 1.0])
    opt = AccumulatingOptimizer(make_optimizer("sgd", 1.0), [x])
    sparse = tf.IndexedSlices(tf.constant([1.0]), tf.constant([1]), tf.constant([2]))
    additions = [opt.add(x, tf.constant([3.0, 0.0])), opt.add(x, sparse)]
    compute = opt.end_micro_batch(tf.constant(0.0), additions)
    apply = opt.apply_gradients()
    with session() as sess:
        sess.run(compute)
        sess.run(apply)
        np.testing.assert_allclose(sess.run(x), [-2.0, 0.0])


def test_accumulating_without_gradients_raises():
    x = variable("x", [1.0])
    opt = AccumulatingOptimizer(make_optimizer("sgd", 1.0), [x])
    with pytest.raises(ValueError, match="compute_gradients"):
        opt.apply_gradients()
    with pytest.raises(ValueError, match="none of the 1 variables"):
        opt.compute_gradients(tf.constant(1.0))


# Memory: peaks of TensorFlow's BFC allocator, whose statistics a CPU has too if asked for.

MEMORY_SCRIPT = """
import tensorflow as tf
from gpt_2_simple.training.optimizer import AccumulatingOptimizer, make_optimizer, zeros

v1 = tf.compat.v1


def peak(name, accumulate):
    with tf.Graph().as_default(), v1.Session() as sess:
        x = v1.get_variable("x", [16384, 2048], initializer=zeros, use_resource=True)
        opt = make_optimizer(name, 0.1)
        gradient = zeros(x.shape) + 1.0
        if accumulate:
            opt = AccumulatingOptimizer(opt, [x])
            add = opt.add(x, gradient)
            ops = [opt.reset(), opt.end_micro_batch(tf.constant(1.0), [add])]
            ops.append(opt.apply_gradients())
        else:
            ops = [opt.apply_gradients([(gradient, x)])]
        read = x.read_value()[-1, -1]
        tf.config.experimental.reset_memory_stats("CPU:0")
        sess.run(v1.global_variables_initializer())
        for _ in range(2):
            for op in ops:
                sess.run(op)
        bytes_ = tf.config.experimental.get_memory_info("CPU:0")["peak"]
        print(name, int(accumulate), bytes_ / 2**27, sess.run(read))


for accumulate in False, True:
    for name in "sgd", "adam", "adafactor":
        peak(name, accumulate)
"""


def test_peak_memory_of_updates_is_without_copies():
    limit = {"TF_CPU_ALLOCATOR_USE_BFC": "true", "TF_CPU_BFC_MEM_LIMIT_IN_MB": "2000"}
    done = subprocess.run(
        [sys.executable, "-c", MEMORY_SCRIPT],
        env={**os.environ, **limit, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line.split() for line in done.stdout.splitlines()]
    copies = {(name, bool(int(accumulate))): float(peak) for name, accumulate, peak, _ in lines}
    expected = {
        ("sgd", False): 2,  # the variable and its gradient
        ("adam", False): 4,  # and two moments
        ("adafactor", False): 2,
        ("sgd", True): 3,  # and the accumulator
        ("adam", True): 5,
        ("adafactor", True): 3,
    }
    slack = 0.5  # Adafactor's chunks of rows
    assert copies == {
        key: pytest.approx(n + slack / 2, abs=slack / 2) for key, n in expected.items()
    }
    assert [float(value) for *_, value in lines] == pytest.approx([-0.2] * 6, rel=1e-3)
