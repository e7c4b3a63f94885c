"""Each way to compute a decoding step against the NumPy model, and which way is chosen."""

import itertools

import numpy as np
import pytest
import tensorflow as tf
from small_model import HPARAMS, PREFIXES, WEIGHTS, expected, started, write
from tensorflow.python.framework import kernels
from tensorflow.python.util import _pywrap_util_port
from test_beam_search import search
from test_speculative import Guesses

from gpt_2_simple.generation import beam_search, decode, kv_cache, operations, sequences
from gpt_2_simple.sample import Beams

ONE_ROW = operations._ONE_ROW
SEVERAL_ROWS = {
    "few rows": operations.FEW_ROWS,
    "gpu": operations.ON_GPU,
    "fused gpu": operations.FUSED_ON_GPU,
}


def needs_fused_products(name):
    """TensorFlow's CPU kernels for them are oneDNN's, which builds for some machines lack."""
    if name == "fused gpu" and not _pywrap_util_port.IsMklEnabled():
        pytest.skip("this TensorFlow is built, or runs, without oneDNN")


@pytest.fixture
def use(monkeypatch):
    """Lets every step compute by the given operations."""

    def use(chosen):
        for module in (sequences, beam_search):
            monkeypatch.setattr(module, "operations_for", lambda *_, **__: chosen)

    return use


@pytest.mark.parametrize("name", [*ONE_ROW, *SEVERAL_ROWS])
def test_each_way_writes_the_tokens_of_full_forward_passes(small_sess, use, name):
    needs_fused_products(name)
    use((ONE_ROW | SEVERAL_ROWS)[name])
    prefixes = [PREFIXES[2]] if name in ONE_ROW else PREFIXES
    found = write(small_sess, prefixes, 60)  # the window slides several times
    assert found.tolist() == [expected(prefix, 60) for prefix in prefixes]


@pytest.mark.parametrize("name", ["gpu", "fused gpu"])
def test_beams_and_guesses_on_a_gpu_are_those_of_a_cpu(small_sess, use, name):
    needs_fused_products(name)
    plain, found = [expected(prefix, 30) for prefix in PREFIXES], []
    for way in (SEVERAL_ROWS["few rows"], SEVERAL_ROWS[name]):
        use(way)
        beams = search(small_sess, PREFIXES, 15, Beams(3))
        guesses = Guesses(PREFIXES, plain, seed=0)
        assert write(small_sess, PREFIXES, 30, strategy=guesses).tolist() == plain
        found.append([[found_text.tokens for found_text in texts] for texts in beams])
    assert found[0] == found[1]


@pytest.mark.parametrize("chosen", [operations.ON_GPU, operations.FUSED_ON_GPU])
def test_each_operation_of_a_step_on_a_gpu_has_a_kernel_there(chosen):
    with started() as sess:
        for build in (decode.build_decode, decode.build_verify, decode.build_beam_step):
            kv_cache.build_once(sess, build, chosen)
        lacking = set()
        for op in sess.graph.get_operations():
            found = kernels.get_registered_kernels_for_op(op.type).kernel
            if not any(kernel.device_type in ("GPU", "DEFAULT") for kernel in found):
                lacking.add(op.type)
        types = {op.type for op in sess.graph.get_operations()}
    products = {"_FusedMatMul"} if chosen.linear_gelu else {"BiasAdd", "MatMul"}
    assert {"FusedBatchNormV3", "Softmax", "InplaceUpdate"} | products <= types
    assert lacking == set()


def test_gpus_get_their_own_operations_and_int8_those_for_several_rows(small_sess, monkeypatch):
    for_one_row = operations.operations_for(small_sess, one_row=True)
    assert for_one_row is operations.ONE_ROW
    assert operations.operations_for(small_sess) is operations.FEW_ROWS
    monkeypatch.setattr(operations, "model_precision", lambda sess: "int8")
    assert operations.operations_for(small_sess, one_row=True) is operations.FEW_ROWS
    monkeypatch.setattr(operations, "has_gpu", lambda sess: True)
    for one_row in (True, False):
        assert operations.operations_for(small_sess, one_row) is operations.ON_GPU  # int8's, too


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_gpus_get_fused_products_that_give_the_same_numbers(small_sess, monkeypatch, precision):
    needs_fused_products("fused gpu")
    monkeypatch.setattr(operations, "has_gpu", lambda sess: True)
    monkeypatch.setattr(operations, "model_precision", lambda sess: precision)
    assert operations.operations_for(small_sess) is operations.FUSED_ON_GPU
    ops = kv_cache.build_once(small_sess, operations._build_fused_probe, precision)
    numbers = np.random.default_rng(1)
    shapes = {ops.x: [3, 64], ops.w: [64, 16], ops.b: [16]}
    feeds = {name: numbers.normal(size=shape) for name, shape in shapes.items()}
    fused, expected = small_sess.run((ops.fused, ops.expected), feeds)
    tolerance = 1e-5 if precision == "float32" else 0.1
    np.testing.assert_allclose(fused, expected, rtol=tolerance, atol=tolerance)


def unknown_activation(w, b):
    return operations._fused(b"BiasAdd", b"NoSuchActivation")(w, b)


def unknown_operation(w, b):
    graph = tf.compat.v1.get_default_graph()
    return lambda x: graph.create_op("_NoSuchMatMul", [x, w, b], [w.dtype]).outputs[0]


def wrong_numbers(w, b):
    return lambda x: operations.ON_GPU.linear(w, b)(x) * 1.05


def not_a_number(w, b):
    return lambda x: operations.ON_GPU.linear(w, b)(x) / 0.0 * 0.0


BROKEN_PRODUCTS = [unknown_activation, unknown_operation, wrong_numbers, not_a_number]


@pytest.mark.parametrize("broken", BROKEN_PRODUCTS)
def test_fused_products_that_fail_or_are_wrong_are_not_used(small_sess, monkeypatch, broken):
    monkeypatch.setattr(operations, "has_gpu", lambda sess: True)
    monkeypatch.setattr(operations, "_fused_is_right", {})
    monkeypatch.setattr(operations, "_fused_linear", broken)
    # A function of its own, so that the graph of another test's is not taken.
    monkeypatch.setattr(
        operations,
        "_build_fused_probe",
        lambda *args, build=operations._build_fused_probe: build(*args),
    )
    assert operations.operations_for(small_sess) is operations.ON_GPU


@pytest.fixture
def choose(monkeypatch, small_sess):
    """Chooses for the small session as if its model were large; nothing is remembered."""
    monkeypatch.setattr(operations, "_chosen", {})
    monkeypatch.setattr(operations, "_MIN_WIDTH", HPARAMS.n_embd)
    return lambda: operations.operations_for(small_sess, one_row=True)


USUAL = [1.0, 1.1, 1.2]


@pytest.mark.parametrize(
    ("whole", "matmul", "chosen"),
    [
        ([0.9, 1.0, 1.1], [1.2, 1.2, 1.2], "in parts"),  # quicker, but hardly
        ([0.8, 0.9, 0.9], [0.7, 0.7, 0.8], "matmul"),
        ([0.5, 0.5, 0.5], [0.7, 0.7, 0.8], "whole"),
        ([0.5, 0.5, 1.3], [1.2, 1.2, 1.2], "in parts"),  # not in each round
    ],
)
def test_one_row_gets_the_way_that_is_clearly_the_quickest(
    monkeypatch, choose, whole, matmul, chosen
):
    timed, seconds = [], {"in parts": USUAL, "whole": whole, "matmul": matmul}
    monkeypatch.setattr(operations, "_time_one_row", lambda sess: timed.append(sess) or seconds)
    assert choose() is ONE_ROW[chosen]
    assert choose() is ONE_ROW[chosen]
    assert len(timed) == 1


def test_small_models_16_bits_and_sessions_without_memory_get_the_usual_way(
    small_sess, monkeypatch, choose
):
    def fail(sess):
        raise tf.errors.ResourceExhaustedError(None, None, "no memory")

    monkeypatch.setattr(operations, "_time_one_row", fail)
    assert choose() is operations.ONE_ROW
    monkeypatch.setattr(operations, "_chosen", {})
    monkeypatch.setattr(operations, "_time_one_row", lambda sess: 1 / 0)
    monkeypatch.setattr(operations, "model_precision", lambda sess: "bfloat16")
    assert choose() is operations.ONE_ROW_16_BIT
    assert operations.operations_for(small_sess) is operations.FEW_ROWS_16_BIT
    monkeypatch.undo()
    assert operations._MIN_WIDTH > HPARAMS.n_embd
    assert choose() is operations.ONE_ROW


def test_timing_takes_each_way_through_the_weights_and_changes_no_text(monkeypatch, choose):
    ticks = itertools.count()
    monkeypatch.setattr(operations.time, "perf_counter", lambda: float(next(ticks)))
    rounds = dict.fromkeys(ONE_ROW, [1.0] * operations._ROUNDS)
    with started() as sess:
        assert operations._time_one_row(sess) == rounds
        ops = kv_cache.build_once(sess, operations._build_one_row)
        n_operations = len(sess.graph.get_operations())
        assert operations._time_one_row(sess) == rounds
        assert len(sess.graph.get_operations()) == n_operations
        row = np.linspace(-1, 1, HPARAMS.n_embd, dtype=np.float32)[np.newaxis]
        x = row
        for layer in ("model/h0/", "model/h1/"):

            def linear(x, name, prefix=layer):
                return x @ WEIGHTS[f"{prefix}{name}/w"][0] + WEIGHTS[f"{prefix}{name}/b"]

            attended = np.tanh(linear(x, "attn/c_attn")[:, : HPARAMS.n_embd])
            x = linear(attended, "attn/c_proj") + row
            x = linear(np.tanh(linear(x, "mlp/c_fc")), "mlp/c_proj") + row
        for found in sess.run(list(ops.results.values()), {ops.row: row}):
            np.testing.assert_allclose(found, x, rtol=1e-4, atol=1e-5)
        assert write(sess, [PREFIXES[1]], 20).tolist() == [expected(PREFIXES[1], 20)]
