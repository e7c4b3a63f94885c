"""Training an adapter: the step against peft, what stays frozen, resumes, samples, checkpoints."""

import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import oracle
import peft_reference
import pytest
import tensorflow as tf

import gpt_2_simple as gpt2
from gpt_2_simple import model, session
from gpt_2_simple.storage import adapter_files, checkpoint, runs
from gpt_2_simple.storage.adapter_state import AdapterState, read_matrices
from gpt_2_simple.training import lora, step, trainer
from gpt_2_simple.training.settings import step_settings

FIXTURES = Path(__file__).parent / "fixtures" / "peft"
HPARAMS = model.HParams(**vars(peft_reference.HPARAMS))
TOKENS = peft_reference.TOKENS
PROJECTIONS = {"lora_rank": 4, "lora_alpha": 8, "lora_targets": ("c_attn", "c_proj", "c_fc")}
PREFIX = "base_model.model.transformer."


def started(sess, settings, precision=None):
    """A session that holds the reference's base and its adapter for training."""
    weights = oracle.random_weights(HPARAMS, seed=1, scale=0.2)
    state = session.build_model(sess, HPARAMS, [], precision)
    for name, variable in session.named_variables(state).items():
        give(sess, variable, weights[name].astype(variable.dtype.as_numpy_dtype))
    state.adapter = state.build_once(lora._build, state, settings.lora)
    adapter = AdapterState(sess, state.adapter, {}, 0.0)
    source = str(FIXTURES / "training" / "start")
    adapter.assign(read_matrices(source, settings.lora, HPARAMS))
    return state


def give(sess, variable, value):
    sess.run(variable.initializer, {variable.initializer.inputs[1]: value})


def run_steps(sess, state, settings, steps, rate):
    """Losses of some steps on the reference's tokens."""
    ops = step.build_train_ops(state, settings, TOKENS.shape[1])
    sess.run(ops.initialize_state)
    size = ops.loss_weights.shape.as_list()
    share = np.full(size, 1 / np.prod(size), np.float32)
    losses = []
    for _ in range(steps):
        if ops.add_micro_batch is None:
            feed = {ops.tokens: TOKENS, ops.loss_weights: share, ops.learning_rate: rate}
            losses.append(sess.run(ops.apply_gradients, feed))
            continue
        sess.run(ops.reset_gradients)
        for part in np.split(TOKENS, len(TOKENS) // settings.batch_size):
            sess.run(ops.add_micro_batch, {ops.tokens: part, ops.loss_weights: share})
        losses.append(sess.run(ops.apply_gradients, {ops.learning_rate: rate}))
    return losses


def adapter_values(sess, state):
    """The adapter's matrices by peft's names."""
    return {
        f"{PREFIX}{layer}.lora_{kind}.weight": value
        for layer, pair in sess.run(state.adapter.variables).items()
        for kind, value in zip("AB", pair, strict=True)
    }


@pytest.fixture(scope="module")
def reference():
    return dict(np.load(FIXTURES / "training" / "training.npz"))


WAYS = [
    {},
    {"use_memory_saving_gradients": True},
    {"batch_size": 1, "accumulate_gradients": 2},
    {"batch_size": 1, "accumulate_gradients": 2, "use_memory_saving_gradients": True},
]


def settings_of(way):
    return step_settings(**{"batch_size": 2, "accumulate_gradients": 1, **PROJECTIONS, **way})


@pytest.mark.parametrize("way", WAYS)
def test_gradients_equal_pefts(sess, reference, way):
    """With SGD and a rate of 1 the change of a variable is its gradient."""
    settings = settings_of({**way, "optimizer": "sgd"})
    state = started(sess, settings)
    before = adapter_values(sess, state)
    run_steps(sess, state, settings, 1, 1.0)
    after = adapter_values(sess, state)
    assert len(after) == 2 * 4 * HPARAMS.n_layer
    for name, value in after.items():
        expected = reference[f"gradient/{name}"]
        np.testing.assert_allclose(before[name] - value, expected, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("way", WAYS)
def test_ten_steps_of_adam_equal_pefts(sess, reference, way):
    settings = settings_of(way)
    state = started(sess, settings)
    losses = run_steps(sess, state, settings, 10, 0.01)
    np.testing.assert_allclose(losses, reference["losses"], rtol=1e-5)
    for name, value in adapter_values(sess, state).items():
        np.testing.assert_allclose(value, reference[f"after/{name}"], rtol=1e-2, atol=5e-4)


@pytest.mark.parametrize("optimizer", ["adam", "adafactor", "sgd"])
def test_only_the_adapter_has_gradients_accumulators_and_state(sess, optimizer):
    settings = settings_of({"batch_size": 1, "accumulate_gradients": 2, "optimizer": optimizer})
    state = started(sess, settings)
    named = list(session.named_variables(state).values())
    before = sess.run(named)
    step.build_train_ops(state, settings, TOKENS.shape[1])
    base = {variable.op.name for variable in named}
    made = [v.op.name for v in sess.graph.get_collection("variables")]
    assert not [n for n in made if n.startswith("optimizer") and any(f"/{b}" in n for b in base)]
    run_steps(sess, state, settings, 2, 0.1)
    for x, y in zip(before, sess.run(named), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("save_memory", [False, True])
def test_step_computes_no_gradient_of_a_frozen_matrix(sess, save_memory):
    """Seen on the operations that ran: no product has a frozen matrix's shape."""
    settings = settings_of({"use_memory_saving_gradients": save_memory})
    state = started(sess, settings)
    ops = step.build_train_ops(state, settings, TOKENS.shape[1])
    sess.run(ops.initialize_state)
    share = np.full(ops.loss_weights.shape, 1 / TOKENS.size, np.float32)
    options = tf.compat.v1.RunOptions(trace_level=tf.compat.v1.RunOptions.FULL_TRACE)
    seen = tf.compat.v1.RunMetadata()
    feed = {ops.tokens: TOKENS, ops.loss_weights: share, ops.learning_rate: 0.1}
    sess.run(ops.apply_gradients, feed, options, seen)
    shapes = {
        tuple(int(d.size) for d in output.tensor_description.shape.dim)
        for device in seen.step_stats.dev_stats
        for stats in device.node_stats
        if "atMul" in stats.node_name or "einsum" in stats.node_name
        for output in stats.output
    }
    width = HPARAMS.n_embd
    assert (46, width) in shapes  # of rows: 2 x 23
    frozen = {(width, f * width) for f in (1, 3, 4)} | {(4 * width, width), (257, width)}
    assert not shapes & frozen


@pytest.mark.parametrize("held", ["bfloat16", "float16"])
@pytest.mark.parametrize("save_memory", [False, True])
def test_base_in_16_bits_trains_as_the_rounded_base(held, save_memory):
    """Held in 16 bits and computed in float32: equal to a float32 base with the rounded values."""
    losses = []
    rounded = {}
    for precision in (held, "float32"):
        settings = settings_of({
            "use_memory_saving_gradients": save_memory, "base_precision": precision,
        })  # fmt: skip
        with gpt2.start_tf_sess() as sess:
            state = started(sess, settings, precision)
            named = session.named_variables(state)
            if precision == held:
                rounded = {name: sess.run(v).astype(np.float32) for name, v in named.items()}
                matrices = [v for v in named.values() if v.dtype == tf.as_dtype(held)]
                assert len(matrices) == 4 * HPARAMS.n_layer
            else:
                for name, variable in named.items():
                    give(sess, variable, rounded[name])
            losses.append(run_steps(sess, state, settings, 5, 0.01))
    np.testing.assert_allclose(*losses, rtol=1e-5)
    assert losses[0][-1] < losses[0][0] - 0.1


def test_casts_of_a_16_bit_base_do_not_outlive_the_forward_pass(sess):
    """Without recomputing: the backward pass casts anew, and no cast has two readers far apart."""
    settings = settings_of({"base_precision": "bfloat16"})
    state = started(sess, settings, "bfloat16")
    step.build_train_ops(state, settings, TOKENS.shape[1])
    casts = [
        op
        for op in sess.graph.get_operations()
        if op.type == "Cast" and op.inputs[0].dtype == tf.bfloat16
    ]
    assert len(casts) >= 2 * 4 * HPARAMS.n_layer - 1  # the first block's c_attn needs none
    for cast in casts:
        readers = [r for r in cast.outputs[0].consumers() if "gradients" in r.name]
        assert not readers or "gradients" in cast.name


def test_adapter_dropout_has_its_rate_and_is_repeatable(sess):
    settings = settings_of({"lora_dropout": 0.5})
    plain, dropped = settings_of({}), []
    state = started(sess, settings)
    clean = run_steps(sess, state, plain, 1, 1e-9)[0]
    for _ in range(2):
        dropped.append(run_steps(sess, state, settings, 1, 1e-9)[0])
    assert dropped[0] == dropped[1]
    assert abs(dropped[0] - clean) > 1e-4


# --- finetune -----------------------------------------------------------------------------------

RUN = {"model_name": "tiny", "sample_every": 0, "learning_rate": 0.01, "batch_size": 2,
       "accumulate_gradients": 1, "seed": 1, "verbose": 0, "lora_rank": 2}  # fmt: skip


def finetune(sess, steps, run_name="run1", **changes):
    return gpt2.finetune(sess, "text.txt", steps, run_name=run_name, **{**RUN, **changes})


def load(run_name, **names):
    sess = gpt2.start_tf_sess(threads=1)
    gpt2.load_gpt2(sess, run_name=run_name, verbose=0, **names)
    return sess


def saved(run_name, kind=runs.ADAPTER):
    latest = checkpoint.latest_checkpoint(f"checkpoint/{run_name}")
    if kind == runs.ADAPTER:
        return adapter_files.read_adapter(latest).tensors
    reader = tf.train.load_checkpoint(runs.path_beside(latest, kind))
    return {name: reader.get_tensor(name) for name in reader.get_variable_to_shape_map()}


@pytest.fixture
def one_thread():
    with gpt2.start_tf_sess(threads=1) as session:
        yield session


def test_run_writes_an_adapter_that_peft_reads(workplace, one_thread):
    result = finetune(one_thread, 3, lora_alpha=4, lora_targets="all", lora_dropout=0.1)
    assert result.checkpoint == os.path.join("checkpoint/run1", "adapter-3")
    found = sorted(n for n in os.listdir("checkpoint/run1") if not n.startswith((".", "events")))
    assert found == [
        "adapter-3", "checkpoint", "counter", "encoder.json", "history.jsonl", "hparams.json",
        "optimizer-3.data-00000-of-00001", "optimizer-3.index", "settings.json", "state-3.json",
        "vocab.bpe",
    ]  # fmt: skip
    assert sorted(os.listdir(result.checkpoint)) == [
        "adapter_config.json", "adapter_model.safetensors",
    ]  # fmt: skip
    config = json.loads(Path(result.checkpoint, "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (2, 4, 0.1)
    assert config["fan_in_fan_out"] is True
    assert config["target_modules"] == ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]
    tensors = saved("run1")
    assert len(tensors) == 2 * 4 * 2
    assert tensors[f"{PREFIX}h.1.mlp.c_proj.lora_A.weight"].shape == (2, 64)
    assert tensors[f"{PREFIX}h.1.mlp.c_proj.lora_B.weight"].shape == (16, 2)
    assert checkpoint.named_checkpoints("checkpoint/run1") == ["adapter-3"]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"lora_targets": "all", "accumulate_gradients": 3, "lora_dropout": 0.3},
        {"use_memory_saving_gradients": True, "optimizer": "adafactor"},
        {"optimizer": "sgd", "dropout": 0.1},
        {"precision": "bfloat16", "base_precision": "bfloat16"},
    ],
)
def test_resumed_run_equals_an_uninterrupted_one(workplace, changes):
    for name, counts in (("whole", [6]), ("parts", [3, 3])):
        with gpt2.start_tf_sess(threads=1) as sess:
            for count in counts:
                result = finetune(sess, count, name, sampling="epoch", **changes)
        assert result.step == 6
    for kind in (runs.ADAPTER, runs.OPTIMIZER):
        whole, parts = saved("whole", kind), saved("parts", kind)
        assert whole.keys() == parts.keys()
        for name, value in whole.items():
            np.testing.assert_array_equal(value, parts[name])
    assert checkpoint.named_checkpoints("checkpoint/parts") == ["adapter-3", "adapter-6"]


def test_session_and_loaded_run_write_the_same_text(workplace, one_thread, capsys):
    """Unmerged after the training, merged by load_gpt2(), both greedily."""
    settings = {"return_as_list": True, "temperature": 0, "length": 40, "prefix": "1"}
    gpt2.load_gpt2(one_thread, model_name="tiny", verbose=0)
    untrained = gpt2.generate(one_thread, **settings)
    score = gpt2.score(one_thread, "7 green bottles")[0].perplexity
    finetune(
        one_thread, 10, lora_targets="all", learning_rate=0.1, sample_every=6, sample_length=9,
        verbose=1,
    )  # fmt: skip
    assert "======== SAMPLE 1 ========" in capsys.readouterr().out
    trained = gpt2.generate(one_thread, **settings)
    assert trained != untrained
    after = gpt2.score(one_thread, "7 green bottles")[0].perplexity
    assert abs(after - score) > 1
    with load("run1") as sess:
        assert gpt2.generate(sess, **settings) == trained
        assert gpt2.score(sess, "7 green bottles")[0].perplexity == pytest.approx(after, rel=1e-4)
    gpt2.load_gpt2(one_thread, model_name="tiny", verbose=0)
    assert gpt2.generate(one_thread, **settings) == untrained
    assert gpt2.score(one_thread, "7 green bottles")[0].perplexity == score


def test_validation_best_and_early_stopping(workplace, one_thread, monkeypatch):
    # Each CPU's arithmetic would give another course of losses.
    losses, measure = iter([5.0, 5.1, 5.2]), trainer.Trainer.validation_loss

    def given(self, validation):
        assert 0 < measure(self, validation) < 10
        return next(losses)

    monkeypatch.setattr(trainer.Trainer, "validation_loss", given)
    result = finetune(
        one_thread, 30, val_dataset="text.txt", val_every=5, patience=2, learning_rate=0.1,
        lora_targets="all", max_checkpoints=5, save_every=5,
    )  # fmt: skip
    assert (result.best_step, result.step) == (5, 15)
    best = adapter_files.read_adapter("checkpoint/run1/best").tensors
    at_best = adapter_files.read_adapter("checkpoint/run1/adapter-5").tensors
    assert all(np.array_equal(best[name], at_best[name]) for name in best)
    with load("run1", checkpoint="best") as sess:
        assert session.graph_state(sess).loaded_base.changed
    assert checkpoint.is_whole("checkpoint/run1/best")


def test_session_can_be_used_after_a_training_that_failed_to_start(
    workplace, one_thread, monkeypatch
):
    def fail(*_):
        raise ValueError("not today")

    gpt2.load_gpt2(one_thread, model_name="tiny", verbose=0)
    expected = gpt2.score(one_thread, "7 green bottles")[0].perplexity
    monkeypatch.setattr(trainer, "build_train_ops", fail)
    with pytest.raises(ValueError, match="not today"):
        finetune(one_thread, 1)
    assert gpt2.score(one_thread, "7 green bottles")[0].perplexity == pytest.approx(expected)


def test_diverged_run_goes_back_to_its_last_adapter(workplace, one_thread):
    from gpt_2_simple.training.trainer import Diverged

    finetune(one_thread, 2)
    before = saved("run1")
    with pytest.raises(Diverged, match="session is back at checkpoint/run1.adapter-2"):
        finetune(one_thread, 5, learning_rate=1e30)
    state = session.graph_state(one_thread)
    for name, value in adapter_values(one_thread, state).items():
        np.testing.assert_array_equal(value, before[name])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora_rank": None}, "is an adapter: to train it on, give lora_rank=2, lora_alpha=16"),
        ({"lora_rank": 4}, "is another adapter than the settings say: it has rank|shape"),
        ({"lora_alpha": 4}, "it scales updates by 8"),
        ({"lora_targets": ("c_attn", "c_fc")}, "it has no update of model/h0/mlp/c_fc/w"),
    ],
)
def test_run_of_another_adapter_is_refused(workplace, one_thread, changes, message):
    finetune(one_thread, 1)
    before = Path("checkpoint/run1/settings.json").read_text()
    with pytest.raises(ValueError, match=message):
        finetune(one_thread, 1, **changes)
    assert Path("checkpoint/run1/settings.json").read_text() == before
    assert finetune(one_thread, 1).step == 2


def test_run_of_a_whole_model_gets_no_adapter(workplace, one_thread):
    finetune(one_thread, 1, lora_rank=None)
    with pytest.raises(ValueError, match="is a whole model that this run has trained: give anoth"):
        finetune(one_thread, 1)
    # On top of it, under another name.
    restored = {"restore_from": "checkpoint/run1/model-1", "run_name": "run2"}
    finetune(one_thread, 2, **restored)
    with load("run2") as sess:
        state = session.graph_state(sess)
        assert "model/h0/attn/c_attn/w" in state.loaded_base.changed
        bias = sess.run(session.named_variables(state)["model/h0/mlp/c_fc/b"])
    reader = tf.train.load_checkpoint("checkpoint/run1/model-1")
    np.testing.assert_array_equal(bias, reader.get_tensor("model/h0/mlp/c_fc/b"))


def test_fresh_start_in_a_folder_of_the_other_kind(workplace, one_thread):
    for rank, name in ((None, "model-1"), (2, "adapter-1"), (None, "model-1"), (2, "adapter-1")):
        result = finetune(
            one_thread, 1, lora_rank=rank, restore_from="fresh", val_split=0.3, val_every=1
        )
        assert os.path.basename(result.checkpoint) == name
        assert checkpoint.named_checkpoints("checkpoint/run1") == [name]
        is_adapter = rank is not None
        assert os.path.isdir("checkpoint/run1/best") == is_adapter
        assert os.path.exists("checkpoint/run1/best.index") != is_adapter
        load("run1", checkpoint="best").close()
        load("run1").close()


def test_base_that_was_replaced_is_refused(workplace, one_thread):
    finetune(one_thread, 1)
    gpt2.create_gpt2(
        model_name="tiny", n_layer=2, n_head=2, n_embd=16, n_ctx=32, seed=8, overwrite=True
    )
    with pytest.raises(ValueError, match="was trained on other weights than those of"):
        load("run1")
    with pytest.raises(ValueError, match="was trained on other weights than those of"):
        finetune(one_thread, 1)
    shutil.rmtree("models/tiny")
    with pytest.raises(FileNotFoundError, match="the model that it was trained on, tiny, is neit"):
        load("run1")


def test_base_is_found_where_the_models_have_moved(workplace, one_thread):
    finetune(one_thread, 1)
    shutil.move("models", "elsewhere")
    with pytest.raises(FileNotFoundError, match="give model_dir"):
        load("run1")
    load("run1", model_dir="elsewhere").close()
    shutil.move("checkpoint", "elsewhere/runs")
    load("run1", model_dir="elsewhere", checkpoint_dir="elsewhere/runs").close()


def test_adapter_needs_no_other_package(workplace, one_thread, monkeypatch):
    for name in ("safetensors", "huggingface_hub", "peft", "torch", "transformers"):
        monkeypatch.setitem(sys.modules, name, None)
    finetune(one_thread, 1)
    assert finetune(one_thread, 1).step == 2
    load("run1").close()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora_rank": None, "lora_alpha": 4}, "lora_alpha=4.0 is for an adapter: give lora_rank"),
        ({"lora_rank": None, "base_precision": "bfloat16"}, "base_precision='bfloat16' is for an"),
        ({"lora_targets": "c_head"}, "lora_targets='c_head': 'c_head' is none of 'c_attn', 'attn"),
        ({"lora_targets": ()}, "names no layer"),
        ({"lora_targets": 5}, "lora_targets=5: 5 is none of"),
        ({"lora_rank": 0}, "lora_rank=0 must be a whole number, 1 or above"),
        ({"lora_rank": 1.5}, "lora_rank=1.5 must be a whole number"),
        ({"train_last_blocks": 1}, "give lora_rank=2 or train_last_blocks=1, not both"),
        ({"base_precision": "int8"}, "base_precision='int8' must be one of"),
    ],
)
def test_contradicting_settings_are_refused(workplace, one_thread, changes, message):
    with pytest.raises(ValueError, match=message):
        finetune(one_thread, 1, **changes)
    assert not os.path.exists("checkpoint")
