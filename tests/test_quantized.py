"""Weights in 8 bits: their file, their products on each kind of device, and what refuses them."""

import glob
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from tensorflow.python.framework import kernels
from test_locks import somebody_else

import gpt_2_simple as gpt2
from gpt_2_simple import model, quantized, session
from gpt_2_simple.cli.main import main
from gpt_2_simple.generation import kv_cache
from gpt_2_simple.generation.decode import build_beam_step, build_decode, build_prefill
from gpt_2_simple.generation.operations import ON_GPU
from gpt_2_simple.generation.scoring import likeliest_next_tokens
from gpt_2_simple.quantized import Kernel
from gpt_2_simple.storage import checkpoint_ops, load, quantized_file

PROMPTS = ["green", "1", "bottles, hanging on the", "a wall and"]
TEXT = "7 green bottles, hanging on the wall.\n"


def int8_files(folder="."):
    return sorted(glob.glob(f"{folder}/**/*.int8-*", recursive=True))


def load_int8(sess, **names):
    gpt2.load_gpt2(sess, precision="int8", verbose=0, **(names or {"model_name": "tiny"}))


def generate(sess, prefix, **settings):
    settings = {"temperature": 0, "length": 8, "return_as_list": True, **settings}
    return gpt2.generate(sess, prefix=prefix, **settings)


def finetune(sess, steps=2, **settings):
    settings = {"model_name": "tiny", "sample_every": 0, "seed": 1, "verbose": 0, **settings}
    return gpt2.finetune(sess, "text.txt", steps, **{"learning_rate": 0.01, **settings})


def log_probabilities(sess, text=TEXT):
    return gpt2.score(sess, text)[0].log_probabilities


@pytest.fixture
def loaded(workplace, sess):
    load_int8(sess)
    return sess


# --- results --------------------------------------------------------------------------------------


def test_scores_in_int8_are_near_those_in_float32(workplace, loaded):
    with gpt2.start_tf_sess() as other:
        gpt2.load_gpt2(other, model_name="tiny", verbose=0)
        exact = log_probabilities(other)
        likeliest = gpt2.next_token_probs(other, TEXT, 3)
    found = log_probabilities(loaded)
    assert 0 < np.abs(found - exact).max() < 0.02
    assert [p for _, p in gpt2.next_token_probs(loaded, TEXT, 3)] == pytest.approx(
        [p for _, p in likeliest], rel=0.02
    )


def test_text_in_int8_is_that_of_full_forward_passes(loaded):
    """Decoding keeps a copy of the weights, scoring does not."""
    encoder = session.graph_state(loaded).encoder
    tokens = encoder.encode("green")
    for _ in range(8):
        best, _ = likeliest_next_tokens(loaded, tokens, 1)
        tokens.append(int(best[0]))
    assert generate(loaded, "green") == [encoder.decode(tokens)]


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.7, "seed": 3}])
def test_text_in_int8_does_not_depend_on_the_rest_of_its_batch(loaded, settings):
    together = generate(loaded, PROMPTS, batch_size=4, **settings)
    if settings:
        again = generate(loaded, PROMPTS, batch_size=2, **settings)
        assert together == again
    else:
        assert together == [generate(loaded, prompt)[0] for prompt in PROMPTS]


def test_beams_and_log_probabilities_work_in_int8(loaded):
    assert len(generate(loaded, "green", num_beams=2)) == 1
    (greedy,) = generate(loaded, "green")
    stream = "".join(gpt2.generate_stream(loaded, prefix="green", temperature=0, length=8))
    assert greedy.endswith(stream)


def plant_outliers(sess, columns=(3, 11), factor=30):
    """Makes some columns of the layer norms' outputs large, and undoes that in the next matrix."""
    weights = session.graph_state(sess).weights
    for block in weights.blocks:
        for norm, layer in [(block.ln_1, block.c_attn), (block.ln_2, block.mlp_c_fc)]:
            g, b, w = sess.run([norm.g, norm.b, layer.w])
            for i in columns:
                g[i] *= factor
                b[i] *= factor
                w[:, i] /= factor
            for variable, value in zip([norm.g, norm.b, layer.w], [g, b, w], strict=True):
                sess.run(variable.initializer, {variable.initializer.inputs[1]: value})


@pytest.mark.parametrize("outliers", [False, True])
def test_trained_model_keeps_its_perplexity_and_its_choices(workplace, sess, outliers):
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 128, "n_ctx": 32}
    gpt2.create_gpt2(model_name="wide", seed=7, **sizes)
    finetune(sess, steps=60, batch_size=4, model_name="wide", learning_rate=0.002)
    if outliers:
        plant_outliers(sess)
        state = session.graph_state(sess)
        save = state.build_once(checkpoint_ops.build_save, *model.flatten(state.weights))
        checkpoint_ops.write_checkpoint(sess, save, "checkpoint/run1/model-60")
    exact = gpt2.score(sess, TEXT * 4)[0]
    tokens = exact.tokens[:31]
    choices = [likeliest_next_tokens(sess, tokens[:n], 1)[0][0] for n in range(1, 31)]
    with gpt2.start_tf_sess() as other:
        load_int8(other, run_name="run1")
        found = gpt2.score(other, TEXT * 4)[0]
        same = [likeliest_next_tokens(other, tokens[:n], 1)[0][0] for n in range(1, 31)]
    assert exact.perplexity < 60  # it has learned something: there are 257 tokens
    assert found.perplexity == pytest.approx(exact.perplexity, rel=0.005)
    assert np.mean(np.equal(choices, same)) > 0.97


def random_matrix(rows, columns, seed=0):
    return np.random.default_rng(seed).standard_normal([rows, columns]).astype(np.float32)


@pytest.mark.parametrize("kernel", Kernel)
@pytest.mark.parametrize("keep_layout", [False, True])
def test_product_is_right_and_each_row_is_computed_alone(tmp_path, kernel, keep_layout):
    if kernel is not Kernel.DEQUANTIZE and quantized._measure(kernel) is None:
        pytest.skip("this CPU or this TensorFlow has no such products")
    w, x = random_matrix(64, 33), random_matrix(9, 64, seed=1)
    x[:, 5] *= 40  # an outlier, as GPT-2's activations have
    x[3] *= 1e-3
    x[4] = 0
    values, scales = quantized.quantize(w)
    (tmp_path / "w").write_bytes(values.tobytes())
    stored = quantized.StoredMatrix(0, w.shape, scales, values.sum(0, dtype=np.float32))
    file = quantized.QuantizedFile(str(tmp_path / "w"), values.size, "", {"w": stored})
    with tf.Graph().as_default() as graph, tf.compat.v1.Session(graph=graph) as sess:
        given = tf.compat.v1.placeholder(tf.float32, [None, 64])
        weights = quantized.QuantizedWeights(file, kernel, {})
        read = quantized._read_mapped(weights, quantized._map(file), "w")
        product = read(given, keep_layout=keep_layout)
        found = sess.run(product, {given: x})
        alone = [sess.run(product, {given: x[i : i + 1]})[0] for i in range(len(x))]
        x[6, 2] = np.nan
        broken = sess.run(product, {given: x})
    used = x.copy()
    if kernel is not Kernel.DEQUANTIZE:
        np.testing.assert_array_equal(found, alone)
        steps = np.abs(x).max(1, keepdims=True) / 127 + 1e-30
        used = np.rint(x / steps) * steps
    keep = [0, 1, 2, 3, 4, 5, 7, 8]
    expected = used[keep] @ (values * scales)
    scale = np.abs(expected).max(axis=1, keepdims=True) + 1e-30
    np.testing.assert_allclose(found[keep] / scale, expected / scale, atol=2e-4)
    assert np.isnan(broken[6]).all()
    assert np.isfinite(broken[keep]).all()


def test_quantized_columns_have_errors_of_half_a_step_at_most():
    w = random_matrix(200, 7)
    w[:, 3] *= 1000
    w[:, 4] = 0
    values, scales = quantized.quantize(w)
    assert values.dtype == np.int8
    assert np.abs(values).max(0).tolist() == [127] * 4 + [0] + [127] * 2
    assert (np.abs(values * scales - w) <= scales * 0.5001).all()


# --- the file -------------------------------------------------------------------------------------


def test_int8_weights_are_made_once_beside_the_checkpoint(workplace, sess, monkeypatch, capsys):
    load_int8(sess)
    (path,) = int8_files()
    assert os.path.dirname(path) == "./models/tiny"
    expected = log_probabilities(sess)
    monkeypatch.setattr(quantized_file, "_make", None)
    with gpt2.start_tf_sess() as other:
        load_int8(other)
        np.testing.assert_array_equal(log_probabilities(other), expected)


def test_quantize_makes_what_load_gpt2_reads(workplace, sess, capsys):
    path = gpt2.quantize(model_name="tiny")
    assert os.path.isabs(path)
    assert f"The int8 weights are in {path}" in capsys.readouterr().out
    before = os.stat(path).st_mtime_ns
    load_int8(sess)
    assert [os.path.abspath(p) for p in int8_files()] == [path]
    assert os.stat(path).st_mtime_ns == before
    with pytest.raises(FileNotFoundError, match="no run in"):
        gpt2.quantize("nothing")


def test_commands_quantize_and_generate_in_int8(workplace, capsys):
    assert main(["quantize", "--model_name", "tiny"]) == 0
    (path,) = int8_files()
    options = ["--model_name", "tiny", "--precision", "int8", "--length", "5", "--nfiles", "1"]
    assert main(["generate", *options, "--destination_path", "out.txt"]) == 0
    assert os.path.getsize("out.txt")
    assert int8_files() == [path]


def test_run_that_is_trained_further_gets_new_int8_weights(workplace, sess):
    finetune(sess)
    with gpt2.start_tf_sess() as first:
        load_int8(first, run_name="run1")
        old, before = int8_files("checkpoint"), log_probabilities(first)
    finetune(sess, restore_from="latest")
    with gpt2.start_tf_sess() as second:
        load_int8(second, run_name="run1")
        new, after = int8_files("checkpoint"), log_probabilities(second)
    exact = log_probabilities(sess)
    assert [len(old), len(new)] == [1, 2]
    assert old[0] in new  # beside the checkpoint of each
    assert np.abs(after - exact).max() < 0.05 < np.abs(before - exact).max()


def test_other_weights_under_the_same_name_get_new_int8_weights(workplace, sess):
    load_int8(sess)
    old = int8_files()
    gpt2.create_gpt2(
        model_name="tiny", seed=8, n_layer=2, n_head=2, n_embd=16, n_ctx=32, overwrite=True
    )
    with gpt2.start_tf_sess() as other:
        load_int8(other)
        assert len(int8_files()) == 1
        assert int8_files() != old


def test_failed_quantization_leaves_nothing_and_is_made_good(workplace, sess, monkeypatch):
    calls = []

    def quantize(w):
        calls.append(w)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")
        return quantize_matrix(w)

    quantize_matrix = quantized.quantize
    monkeypatch.setattr(quantized, "quantize", quantize)
    monkeypatch.setattr(quantized_file, "cache_folder", lambda: str(workplace / "text.txt"))
    before = sorted(os.listdir("models/tiny"))
    with pytest.raises(OSError, match="int8 weights of .* can be written nowhere .*No space left"):
        load_int8(sess)
    assert sorted(os.listdir("models/tiny")) == before
    load_int8(sess)
    assert len(int8_files()) == 1


def test_file_that_is_cut_short_is_made_again(workplace, sess):
    path = gpt2.quantize(model_name="tiny")
    size = os.path.getsize(path)
    os.truncate(path, size - 1)
    load_int8(sess)
    assert os.path.getsize(path) == size


def test_int8_weights_of_a_read_only_folder_are_in_the_cache_folder(monkeypatch, tiny_source):
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        cache, models = os.path.join(folder, "cache"), os.path.join(folder, "models")
        subprocess.run(["cp", "-r", tiny_source, models], check=True)
        os.mkdir(cache)
        os.chmod(cache, 0o777)
        for path, _, _ in os.walk(models):
            os.chmod(path, 0o555)
        monkeypatch.setenv("XDG_CACHE_HOME", cache)
        if sys.platform in ("win32", "darwin"):
            monkeypatch.setattr(quantized_file, "cache_folder", lambda: cache)
        with somebody_else():
            path = gpt2.quantize(model_name="tiny", model_dir=models)
            assert path == gpt2.quantize(model_name="tiny", model_dir=models)
        assert path.startswith(cache)
        assert int8_files(models) == []
        for path, _, _ in os.walk(models):
            os.chmod(path, 0o755)


def test_weights_that_are_not_finite_are_refused(workplace, sess):
    gpt2.load_gpt2(sess, model_name="tiny", verbose=0)
    state = session.graph_state(sess)
    variable = state.weights.blocks[1].c_attn.w
    sess.run(variable.initializer, {variable.initializer.inputs[1]: np.full([1, 16, 48], np.nan)})
    save = state.build_once(checkpoint_ops.build_save, *model.flatten(state.weights))
    checkpoint_ops.write_checkpoint(sess, save, "models/tiny/model.ckpt")
    with pytest.raises(ValueError, match="h1/attn/c_attn/w holds a number that is not finite"):
        gpt2.quantize(model_name="tiny")
    assert int8_files() == []


def test_adapter_is_merged_into_int8_weights(workplace, sess):
    finetune(sess, lora_rank=2, lora_targets="all", steps=5)
    exact = log_probabilities(sess)
    with gpt2.start_tf_sess() as other:
        load_int8(other, run_name="run1")
        assert np.abs(log_probabilities(other) - exact).max() < 0.05
        base = "models/tiny"
    assert len(int8_files("checkpoint")) == 1
    assert int8_files(base) == []
    with gpt2.start_tf_sess() as other:
        load_int8(other)
        assert np.abs(log_probabilities(other) - exact).max() > 0.05


# --- what a session in int8 refuses ---------------------------------------------------------------


def test_session_in_int8_refuses_to_train_and_to_load_others(workplace, loaded):
    with pytest.raises(ValueError, match="holds a model in int8, and float32 is wanted"):
        finetune(loaded)
    with pytest.raises(ValueError, match="base_precision='int8' must be one of"):
        finetune(loaded, lora_rank=2, base_precision="int8")
    assert not os.path.exists("checkpoint")
    with pytest.raises(ValueError, match="holds a model in int8, and bfloat16 is wanted"):
        gpt2.load_gpt2(loaded, model_name="tiny", precision="bfloat16")
    expected = log_probabilities(loaded)
    gpt2.load_gpt2(loaded, model_name="tiny", verbose=0)  # the same again
    gpt2.create_gpt2(model_name="other", seed=8, n_layer=2, n_head=2, n_embd=16, n_ctx=32)
    with pytest.raises(ValueError, match="holds other weights in int8, which cannot be replaced"):
        gpt2.load_gpt2(loaded, model_name="other", verbose=0)
    np.testing.assert_array_equal(log_probabilities(loaded), expected)
    assert session.graph_state(loaded).loaded_folder == os.path.abspath("models/tiny")


def test_session_in_float32_refuses_int8(workplace, sess):
    gpt2.load_gpt2(sess, model_name="tiny", verbose=0)
    with pytest.raises(ValueError, match="holds a model in float32, and int8 is wanted"):
        load_int8(sess)


# --- devices --------------------------------------------------------------------------------------

LIMITED = """
import gpt_2_simple as gpt2
with gpt2.start_tf_sess() as sess:
    gpt2.load_gpt2(sess, model_name="tiny", precision="int8")
    print(*gpt2.score(sess, "7 green bottles")[0].log_probabilities)
"""


@pytest.mark.parametrize("instructions", ["AVX2", "AVX512_CORE"])
def test_cpu_without_int8_instructions_is_right_and_says_that_it_is_slow(loaded, instructions):
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": instructions}
    lines = subprocess.run(
        [sys.executable, "-c", LIMITED], env=environment, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    found = np.array(lines[-1].split(), np.float32)
    np.testing.assert_allclose(found, log_probabilities(loaded, "7 green bottles"), atol=0.02)
    is_slow = any("int8 products are slow on this CPU" in line for line in lines)
    cpu = Path("/proc/cpuinfo")
    assert is_slow or not (cpu.exists() and "avx512_vnni" in cpu.read_text())


def test_wrong_products_are_not_used(monkeypatch, capsys):
    monkeypatch.setattr(quantized, "_measure", lambda kernel: None)
    assert quantized.choose_kernel() is Kernel.DEQUANTIZE
    assert "int8 products are slow on this CPU, as TensorFlow has none" in capsys.readouterr().out
    monkeypatch.setattr(quantized, "_measure", {Kernel.INTERNAL: None, Kernel.PUBLIC: 0.5}.get)
    assert quantized.choose_kernel() is Kernel.PUBLIC
    assert "at 0.5 times the speed of float32" in capsys.readouterr().out
    monkeypatch.setattr(quantized, "_measure", {Kernel.INTERNAL: 1.5}.get)
    assert quantized.choose_kernel() is Kernel.INTERNAL
    assert capsys.readouterr().out == ""


def test_gpu_holds_int8_weights_and_has_a_kernel_for_each_operation(loaded, monkeypatch):
    exact = log_probabilities(loaded)
    monkeypatch.setattr(load, "has_gpu", lambda sess: True)
    with gpt2.start_tf_sess() as sess:
        load_int8(sess)
        assert np.abs(log_probabilities(sess) - exact).max() < 0.02
        assert generate(sess, "green")[0].startswith("green")
        state = session.graph_state(sess)
        held = {v.dtype for v in state.quantized.variables.values()}
        assert held == {tf.int8}
        assert len(state.quantized.variables) == 8
        kv_cache.build_once(sess, build_prefill)
        for build in (build_beam_step, build_decode):
            kv_cache.build_once(sess, build, ON_GPU)
        lacking = set()
        for op in sess.graph.get_operations():
            types = [t.dtype.base_dtype for t in (*op.inputs, *op.outputs)]
            if tf.int8 in types or op.type in ("MatMul", "VarHandleOp"):
                found = kernels.get_registered_kernels_for_op(op.type).kernel
                if not any(kernel.device_type in ("GPU", "DEFAULT") for kernel in found):
                    lacking.add(op.type)
        assert lacking == set()
        assert not any("Quantized" in op.type for op in sess.graph.get_operations())


def test_mapped_weights_do_not_become_constants(loaded):
    """TensorFlow folds constants once more after Grappler: each would be a copy of a matrix."""
    with gpt2.start_tf_sess() as sess:
        load_int8(sess)
        if session.graph_state(sess).quantized.kernel is Kernel.DEQUANTIZE:
            pytest.skip("this CPU has no int8 products")
        options = tf.compat.v1.RunOptions(output_partition_graphs=True)
        metadata = tf.compat.v1.RunMetadata()
        plain_run, matrices, copies = sess.run, [], []

        def run(fetches, feeds=None):
            result = plain_run(fetches, feeds, options, metadata)
            for node in (node for graph in metadata.partition_graphs for node in graph.node):
                kind = tf.as_dtype(node.attr["dtype"].type or tf.float32)
                if node.op == "_QuantizedMatMul":
                    matrices.append(node.name)
                elif node.op == "Const" and kind in (tf.int8, tf.qint8):
                    copies.append(tf.make_ndarray(node.attr["value"].tensor).shape)
            return result

        sess.run = run
        generate(sess, "green")
    assert len(matrices) >= 2 * 9  # prefill and decoding
    # A file as a whole becomes one only where it is small, as here.
    assert all(len(shape) == 1 for shape in copies), copies
