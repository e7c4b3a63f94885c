"""Adapters that peft trained, merged into a model; ours, read by peft; and what is refused."""

import functools
import json
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import huggingface_hub.errors
import numpy as np
import oracle
import peft_reference
import pytest
import tensorflow as tf

import gpt_2_simple as gpt2
from gpt_2_simple import model, session
from gpt_2_simple.storage import (
    adapter_base,
    adapter_files,
    adapter_merge,
    checkpoint,
    checkpoint_ops,
    create,
)

FIXTURES = Path(__file__).parent / "fixtures" / "peft"
HPARAMS = model.HParams(**vars(peft_reference.HPARAMS))
TOKENS = peft_reference.TOKENS
APPLIED = [
    "plain", "patterns", "rslora_projections", "bias", "all_biases", "lora_bias", "module",
    "positions", "bfloat16",
]  # fmt: skip

REFERENCE_PYTHON = os.environ.get("GPT2_REFERENCE_PYTHON")
needs_reference = [
    pytest.mark.transformers,
    pytest.mark.skipif(
        not REFERENCE_PYTHON,
        reason="GPT2_REFERENCE_PYTHON names no Python that has torch, transformers and peft",
    ),
]


def write_base(folder, weights):
    """A model's folder with these weights, as OpenAI's are."""
    create.create_gpt2(
        model_name=folder.name, model_dir=str(folder.parent), n_layer=2, n_head=2, n_embd=16,
        n_ctx=24, overwrite=True,
    )  # fmt: skip
    with tf.Graph().as_default() as graph, tf.compat.v1.Session(graph=graph) as sess:
        variables = model.flatten(model.variables(HPARAMS))
        save = checkpoint_ops.build_save(*variables)
        for variable in variables:
            initializer = variable.initializer
            sess.run(initializer, {initializer.inputs[1]: weights[variable.op.name]})
        base = checkpoint.MODEL_CHECKPOINT
        write = functools.partial(checkpoint_ops.write_checkpoint, sess, save)
        checkpoint_ops.save_model(str(folder), base, HPARAMS, {base: write}, {})


@pytest.fixture(scope="module")
def base_source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "base"
    write_base(folder, oracle.random_weights(HPARAMS, seed=1, scale=0.2))
    return folder


@pytest.fixture
def place(base_source, tmp_path, monkeypatch):
    """A current folder with models/base, the reference's base, and a text."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(base_source, tmp_path / "models" / "base")
    (tmp_path / "text.txt").write_text("".join(f"{n} green bottles\n" for n in range(40)))
    return tmp_path


@pytest.fixture(scope="module")
def sess():
    with gpt2.start_tf_sess(threads=1) as session:
        yield session


def build_logits(state, adapter):
    tokens = tf.compat.v1.placeholder(tf.int32, [2, 24])
    weights = session.read_weights(state, adapter)
    hidden = model.hidden_states(weights, HPARAMS, tokens)
    return tokens, model.unembed(weights, hidden.h)


def logits(sess):
    """The session's logits where the reference has some."""
    state = session.graph_state(sess)
    tokens, found = state.build_once(build_logits, state, state.adapter)
    return sess.run(found, {tokens: TOKENS})[:, peft_reference.PLACES]


def weights_of(sess):
    return sess.run(session.named_variables(session.graph_state(sess)))


def load(sess, adapter, **names):
    gpt2.load_gpt2(sess, **{"model_name": "base", "verbose": 0, **names}, adapter=str(adapter))


# --- peft's, loaded here --------------------------------------------------------------------------


@pytest.mark.parametrize("name", APPLIED)
def test_logits_equal_pefts(place, sess, name):
    load(sess, FIXTURES / name)
    np.testing.assert_allclose(logits(sess), np.load(FIXTURES / name / "logits.npy"), atol=2e-5)


def test_another_adapter_takes_the_place_of_one_without_a_load_of_the_base(
    place, sess, monkeypatch, capsys
):
    gpt2.load_gpt2(sess, model_name="base", verbose=0)
    base = weights_of(sess)
    read = []
    opened = adapter_merge.open_checkpoint

    def watched(prefix):
        class Reader:
            def __enter__(self):
                self.block = opened(prefix)
                get = self.block.__enter__()
                return lambda name: read.append(name) or get(name)

            def __exit__(self, *error):
                return self.block.__exit__(*error)

        return Reader()

    monkeypatch.setattr(adapter_merge, "open_checkpoint", watched)
    monkeypatch.setattr(checkpoint_ops, "restore", lambda *_: pytest.fail("the base is read again"))
    for name in ("patterns", "plain", "rslora_projections", "plain", "module", "patterns"):
        read.clear()
        load(sess, FIXTURES / name, verbose=1)
        assert capsys.readouterr().out == f"Loading adapter {FIXTURES / name}\n"
        np.testing.assert_allclose(logits(sess), np.load(FIXTURES / name / "logits.npy"), atol=2e-5)
        changed = session.graph_state(sess).loaded_base.changed
        for key, value in weights_of(sess).items():
            assert np.array_equal(value, base[key]) == (key not in changed), key
    load(sess, FIXTURES / "plain")
    read.clear()
    load(sess, FIXTURES / "plain")
    assert sorted(read) == ["model/h0/attn/c_attn/w", "model/h1/attn/c_attn/w"]


def test_switched_weights_are_those_of_a_first_load(place, sess):
    load(sess, FIXTURES / "patterns")
    load(sess, FIXTURES / "plain")
    switched = weights_of(sess)
    with gpt2.start_tf_sess() as other:
        load(other, FIXTURES / "plain")
        for name, value in weights_of(other).items():
            np.testing.assert_array_equal(value, switched[name])


def test_model_in_16_bits_gets_the_merged_weights_rounded_once(place, sess):
    load(sess, FIXTURES / "plain")
    merged = weights_of(sess)
    with gpt2.start_tf_sess() as narrow:
        gpt2.load_gpt2(narrow, model_name="base", precision="bfloat16", verbose=0)
        load(narrow, FIXTURES / "patterns")
        load(narrow, FIXTURES / "plain")
        for name, value in weights_of(narrow).items():
            np.testing.assert_array_equal(value, merged[name].astype(value.dtype))


def test_generate_keeps_the_adapter_when_its_model_is_named(place, sess):
    load(sess, FIXTURES / "plain")
    before = logits(sess)
    gpt2.generate(sess, model_name="base", length=3, return_as_list=True, seed=1)
    np.testing.assert_array_equal(logits(sess), before)
    gpt2.load_gpt2(sess, model_name="base", verbose=0)
    assert np.abs(logits(sess) - before).max() > 0.1


# --- what is refused ------------------------------------------------------------------------------


def changed_config(place, **changes):
    shutil.copytree(FIXTURES / "plain", place / "changed")
    path = place / "changed" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return place / "changed"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("dora", "use_dora=True, which is not applied here: merge it where peft is installed"),
        ("embedding", "has a tensor base_model.model.transformer.wte.lora_embedding_A"),
        ("trained_head", r"token embedding \(wte\) and an output projection \(lm_head\) that diff"),
    ],
)
def test_adapter_that_cannot_be_applied_is_refused_by_name(place, sess, name, message):
    load(sess, FIXTURES / "plain")
    before = logits(sess)
    with pytest.raises(ValueError, match=message):
        load(sess, FIXTURES / name)
    np.testing.assert_array_equal(logits(sess), before)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type 'IA3': only LORA is applied"),
        ({"init_lora_weights": "pissa_niter_4"}, "which changes the base, too"),
        ({"r": 8}, r"for another model, or of another rank: .* has shape \[4, 16\], and \[8, 16\]"),
        ({"r": "4"}, "r='4' and lora_alpha=8 for h.0.attn.c_attn must be numbers"),
        ({"rank_pattern": {"(": 2}}, "rank_pattern="),
        ({"layer_replication": [[0, 1]]}, r"layer_replication=\[\[0, 1\]\]"),
    ],
)
def test_config_that_cannot_be_applied_is_refused_by_name(place, sess, changes, message):
    with pytest.raises(ValueError, match=message):
        load(sess, changed_config(place, **changes))


def test_adapter_of_a_larger_model_is_refused(place, sess):
    small = {"n_layer": 1, "n_head": 2, "n_embd": 16, "n_ctx": 24}
    gpt2.create_gpt2(model_name="small", **small)
    with gpt2.start_tf_sess() as other:
        with pytest.raises(ValueError, match=r"it has .*h\.1\..* and this one has no model/h1"):
            load(other, FIXTURES / "plain", model_name="small")
        gpt2.create_gpt2(model_name="wide", **{**small, "n_layer": 2, "n_embd": 32})
        with pytest.raises(ValueError, match="is for another model, or of another rank"):
            load(other, FIXTURES / "plain", model_name="wide")


def truncated(path):
    path.write_bytes(path.read_bytes()[:-10])


def empty(path):
    path.write_bytes(b"")


def with_nan(path):
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    start = 8 + length
    path.write_bytes(data[:start] + struct.pack("<f", float("nan")) + data[start + 4 :])


def with_integers(path):
    data = path.read_bytes()
    path.write_bytes(data.replace(b'"F32"', b'"I32"'))


def a_folder(path):
    path.unlink()
    path.mkdir()


def a_pipe(path):
    path.unlink()
    os.mkfifo(path)


def a_pickle(path):
    path.rename(path.with_name("adapter_model.bin"))


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (truncated, ValueError, "is not a whole safetensors file .*; copy or download it again"),
        (empty, ValueError, "is not a whole safetensors file"),
        (with_nan, ValueError, "holds numbers that are infinite or not a number"),
        (with_integers, ValueError, "has the type I32; float32, float16 and"),
        (a_folder, FileNotFoundError, "is no whole adapter: it has no adapter_model.safetensors"),
        pytest.param(
            a_pipe, FileNotFoundError, "is no whole adapter",
            marks=pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here"),
        ),
        (a_pickle, FileNotFoundError, "a pickle, adapter_model.bin, is never opened"),
    ],
)  # fmt: skip
def test_damaged_tensors_are_refused(place, sess, damage, error, message):
    load(sess, FIXTURES / "plain")
    before = logits(sess)
    damage(changed_config(place) / "adapter_model.safetensors")
    with pytest.raises(error, match=message):
        load(sess, "changed")
    np.testing.assert_array_equal(logits(sess), before)


@pytest.mark.parametrize("content", ["", "[1]", "{", "null"])
def test_damaged_config_is_refused(place, sess, content):
    (changed_config(place) / "adapter_config.json").write_text(content)
    with pytest.raises(ValueError, match=r"adapter_config.json (is not JSON|holds)"):
        load(sess, "changed")


def test_missing_adapters_are_told(place, sess, monkeypatch):
    with pytest.raises(FileNotFoundError, match="adapter='nowhere': there is no such folder"):
        load(sess, "nowhere")
    (place / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="empty is no adapter: it has no adapter_config"):
        load(sess, "empty")
    with pytest.raises(ValueError, match="does not say which model it was trained on: give model"):
        load(sess, FIXTURES / "plain", model_name=None)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=r'pip install "gpt_2_simple\[hub\]"'):
        load(sess, "somebody/adapter")


def test_hub_name_is_downloaded_or_the_error_says_so(place, sess, monkeypatch):
    class Hub:
        errors = huggingface_hub.errors

        @staticmethod
        def snapshot_download(name, allow_patterns):
            if name != "somebody/adapter":
                raise ConnectionError("no network")
            assert sorted(allow_patterns) == ["adapter_config.json", "adapter_model.safetensors"]
            return str(FIXTURES / "plain")

    monkeypatch.setattr(adapter_base, "load_library", lambda: Hub)
    load(sess, "somebody/adapter")
    expected = np.load(FIXTURES / "plain" / "logits.npy")
    np.testing.assert_allclose(logits(sess), expected, atol=2e-5)
    with pytest.raises(ConnectionError, match="the hub failed for somebody/else: .*no network"):
        load(sess, "somebody/else")


# --- ours -----------------------------------------------------------------------------------------


def train(sess, steps=3, **changes):
    settings = {
        "model_name": "base", "sample_every": 0, "learning_rate": 0.05, "accumulate_gradients": 1,
        "seed": 1, "verbose": 0, "lora_rank": 3, "lora_alpha": 5, **changes,
    }  # fmt: skip
    return gpt2.finetune(sess, "text.txt", steps, **settings)


def test_merged_equals_unmerged(place, sess):
    train(sess, lora_targets="all")
    unmerged = logits(sess)
    assert session.graph_state(sess).adapter is not None
    gpt2.load_gpt2(sess, verbose=0)
    assert session.graph_state(sess).adapter is None
    np.testing.assert_allclose(logits(sess), unmerged, atol=2e-5)
    gpt2.load_gpt2(sess, model_name="base", verbose=0)
    assert np.abs(logits(sess) - unmerged).max() > 0.01


def test_merge_adapter_writes_a_run_that_every_release_reads(place, sess, capsys):
    train(sess, lora_targets="all")
    gpt2.load_gpt2(sess, verbose=0)
    expected, weights = logits(sess), weights_of(sess)
    capsys.readouterr()
    prefix = gpt2.merge_adapter("run1")
    assert prefix == os.path.join("checkpoint", "run1-merged", "model-3")
    assert capsys.readouterr().out.endswith(f"Merged into {prefix}\n")
    folder = Path("checkpoint/run1-merged")
    assert sorted(p.name for p in folder.iterdir()) == [
        "checkpoint", "counter", "encoder.json", "hparams.json", "model-3.data-00000-of-00001",
        "model-3.index", "model-3.meta", "settings.json", "vocab.bpe",
    ]  # fmt: skip
    assert tf.train.latest_checkpoint(str(folder)) == prefix
    reader = tf.train.load_checkpoint(prefix)
    assert set(reader.get_variable_to_shape_map()) == set(weights)
    for name, value in weights.items():
        np.testing.assert_array_equal(reader.get_tensor(name), value)
    gpt2.load_gpt2(sess, run_name="run1-merged", verbose=0)
    np.testing.assert_array_equal(logits(sess), expected)
    with pytest.raises(FileExistsError, match="run1-merged exists, and nothing is replaced: give"):
        gpt2.merge_adapter("run1")
    with pytest.raises(ValueError, match="run 'run1-merged' holds a whole model: there is no adap"):
        gpt2.merge_adapter("run1-merged")
    # It is trained on as any run of a whole model.
    assert train(sess, 1, run_name="run1-merged", lora_rank=None, lora_alpha=16).step == 4


def test_run_with_an_adapter_is_exported_once_it_is_merged(place, sess):
    train(sess)
    with pytest.raises(ValueError, match=r"is an adapter \(LoRA\): merge it into its model, by"):
        gpt2.export_huggingface(run_name="run1", path="exported")
    gpt2.merge_adapter("run1")
    gpt2.export_huggingface(run_name="run1-merged", path="exported")
    assert os.path.isfile("exported/model.safetensors")


def test_merge_adapter_of_peft(place, sess):
    source = str(FIXTURES / "patterns")
    prefix = gpt2.merge_adapter(adapter=source, model_name="base", merged_name="poems")
    assert prefix == os.path.join("checkpoint", "poems", "model-0")
    gpt2.load_gpt2(sess, run_name="poems", verbose=0)
    np.testing.assert_allclose(
        logits(sess), np.load(FIXTURES / "patterns" / "logits.npy"), atol=2e-5
    )
    with pytest.raises(ValueError, match="model_name='base' is for an adapter: give adapter, too"):
        gpt2.merge_adapter(model_name="base")


def test_failed_merge_leaves_nothing(place, sess, monkeypatch):
    train(sess)

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint_ops, "save_model", fail)
    with pytest.raises(OSError, match="run1-merged: No space left on device. Nothing was written"):
        gpt2.merge_adapter("run1")
    assert sorted(os.listdir("checkpoint")) == ["run1"]


def test_adapter_of_a_run_finds_its_base(place, sess):
    train(sess)
    expected = logits(sess)
    gpt2.load_gpt2(sess, adapter="checkpoint/run1/adapter-3", verbose=0)
    np.testing.assert_allclose(logits(sess), expected, atol=2e-5)
    gpt2.load_gpt2(sess, 3, verbose=0)
    np.testing.assert_allclose(logits(sess), expected, atol=2e-5)
    # A copy of the adapter alone is told its base, or finds it among the models by its name.
    shutil.copytree("checkpoint/run1/adapter-3", "copied/adapter")
    gpt2.load_gpt2(sess, adapter="copied/adapter", verbose=0)
    np.testing.assert_allclose(logits(sess), expected, atol=2e-5)
    gpt2.create_gpt2(model_name="other", n_layer=2, n_head=2, n_embd=16, n_ctx=24, seed=9)
    with pytest.raises(ValueError, match="was trained on other weights than those of models"):
        load(sess, "copied/adapter", model_name="other")


def test_peft_adapter_is_trained_on(place, sess):
    """restore_from names it: its base is the model."""
    source = str(FIXTURES / "plain")
    train(sess, 1, lora_rank=4, lora_alpha=8, restore_from=source, learning_rate=1e-9)
    expected = np.load(FIXTURES / "plain" / "logits.npy")
    np.testing.assert_allclose(logits(sess), expected, atol=2e-5)
    with pytest.raises(ValueError, match="it changes model/h./.*/b, too"):
        train(
            sess, 1, run_name="other", lora_rank=2, lora_alpha=4, lora_targets=("c_attn", "c_fc"),
            restore_from=str(FIXTURES / "bias"),
        )  # fmt: skip
    assert not os.path.exists("checkpoint/other/hparams.json")


def test_saved_adapter_has_the_shapes_and_keys_of_pefts(place, sess):
    result = train(sess, lora_rank=4, lora_alpha=8)
    ours = adapter_files.read_adapter(result.checkpoint)
    theirs = adapter_files.read_adapter(str(FIXTURES / "plain"))
    assert {k: v.shape for k, v in ours.tensors.items()} == {
        k: v.shape for k, v in theirs.tensors.items()
    }
    assert ours.config.keys() <= theirs.config.keys()
    same = ("peft_type", "r", "lora_alpha", "fan_in_fan_out", "task_type", "bias", "use_dora")
    assert {k: ours.config[k] for k in same} == {k: theirs.config[k] for k in same}


@pytest.mark.parametrize("targets", ["c_attn", "all", ("attn.c_proj", "c_fc")])
def test_peft_computes_the_same_logits_with_ours(place, sess, targets):
    train(sess, lora_targets=targets)
    expected = logits(sess)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    subprocess.run(
        [REFERENCE_PYTHON, "-W", "error::UserWarning:peft", peft_reference.__file__, "logits",
         "checkpoint/run1/adapter-3", "logits.npy"],
        env=environment, check=True, timeout=300,
    )  # fmt: skip
    np.testing.assert_allclose(np.load("logits.npy"), expected, atol=2e-5)


test_peft_computes_the_same_logits_with_ours.pytestmark += needs_reference
