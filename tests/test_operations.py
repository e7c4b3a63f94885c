"""Each way to compute a decoding step against the NumPy model, and which way is chosen."""

import itertools
import math

import pytest
import tensorflow as tf
from small_model import HPARAMS, PREFIXES, expected, started, write
from tensorflow.python.framework import kernels
from test_beam_search import search
from test_speculative import Guesses

from gpt_2_simple.generation import beam_search, decode, kv_cache, operations, sequences
from gpt_2_simple.sample import Beams

ONE_ROW = operations._ONE_ROW
SEVERAL_ROWS = {"few rows": operations.FEW_ROWS, "gpu": operations.ON_GPU}


@pytest.fixture
def use(monkeypatch):
    """Lets every step compute by the given operations."""

    def use(chosen):
        for module in (sequences, beam_search):
            monkeypatch.setattr(module, "operations_for", lambda *_, **__: chosen)

    return use


@pytest.mark.parametrize("name", [*ONE_ROW, *SEVERAL_ROWS])
def test_each_way_writes_the_tokens_of_full_forward_passes(small_sess, use, name):
    use((ONE_ROW | SEVERAL_ROWS)[name])
    prefixes = [PREFIXES[2]] if name in ONE_ROW else PREFIXES
    found = write(small_sess, prefixes, 60)  # the window slides several times
    assert found.tolist() == [expected(prefix, 60) for prefix in prefixes]


def test_beams_and_guesses_on_a_gpu_are_those_of_a_cpu(small_sess, use):
    plain, found = [expected(prefix, 30) for prefix in PREFIXES], []
    for way in SEVERAL_ROWS.values():
        use(way)
        beams = search(small_sess, PREFIXES, 15, Beams(3))
        guesses = Guesses(PREFIXES, plain, seed=0)
        assert write(small_sess, PREFIXES, 30, strategy=guesses).tolist() == plain
        found.append([[found_text.tokens for found_text in texts] for texts in beams])
    assert found[0] == found[1]


def test_each_operation_of_a_step_on_a_gpu_has_a_kernel_there():
    with started() as sess:
        for build in (decode.build_decode, decode.build_verify, decode.build_beam_step):
            kv_cache.build_once(sess, build, operations.ON_GPU)
        lacking = set()
        for op in sess.graph.get_operations():
            found = kernels.get_registered_kernels_for_op(op.type).kernel
            if not any(kernel.device_type in ("GPU", "DEFAULT") for kernel in found):
                lacking.add(op.type)
        types = {op.type for op in sess.graph.get_operations()}
    assert {"FusedBatchNormV3", "BiasAdd", "Softmax", "InplaceUpdate"} <= types
    assert lacking == set()


def test_gpus_get_their_own_operations_and_int8_those_for_several_rows(small_sess, monkeypatch):
    for_one_row = operations.operations_for(small_sess, one_row=True)
    assert for_one_row is operations.ONE_ROW
    assert operations.operations_for(small_sess) is operations.FEW_ROWS
    monkeypatch.setattr(operations, "model_precision", lambda sess: "int8")
    assert operations.operations_for(small_sess, one_row=True) is operations.FEW_ROWS
    monkeypatch.setattr(operations, "has_gpu", lambda sess: True)
    for one_row in (True, False):
        assert operations.operations_for(small_sess, one_row) is operations.ON_GPU


@pytest.mark.parametrize(
    ("seconds", "chosen"),
    [
        ({"in parts": 1.0, "whole": 0.95, "matmul": 1.2}, "in parts"),
        ({"in parts": 1.0, "whole": 0.85, "matmul": 0.8}, "matmul"),
        ({"in parts": 1.0, "whole": 0.5, "matmul": 0.8}, "whole"),
    ],
)
def test_one_row_gets_the_way_that_is_clearly_the_quickest(monkeypatch, seconds, chosen):
    monkeypatch.setattr(operations, "_time_one_row", lambda n_embd: seconds)
    choose = operations._quickest_for_one_row.__wrapped__
    assert choose(768) is ONE_ROW[chosen]


def test_small_models_and_machines_that_cannot_time_get_the_usual_way(monkeypatch):
    def fail(n_embd):
        raise tf.errors.ResourceExhaustedError(None, None, "no memory")

    monkeypatch.setattr(operations, "_time_one_row", fail)
    choose = operations._quickest_for_one_row.__wrapped__
    assert choose(768) is operations.ONE_ROW
    monkeypatch.setattr(operations, "_time_one_row", lambda n_embd: 1 / 0)
    assert choose(HPARAMS.n_embd) is operations.ONE_ROW


def test_timing_measures_each_way_and_leaves_the_graph_alone(monkeypatch):
    monkeypatch.setattr(operations, "_TIMED_BYTES", 2**20)
    ticks = itertools.count()
    monkeypatch.setattr(operations.time, "perf_counter", lambda: float(next(ticks)))
    with tf.Graph().as_default() as graph:
        seconds = operations._time_one_row(64)
    assert seconds == dict.fromkeys(ONE_ROW, 1.0)
    assert not any(math.isinf(value) for value in seconds.values())
    assert graph.get_operations() == []
