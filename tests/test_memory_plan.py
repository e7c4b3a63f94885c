"""The plan's terms against the graph, and what finetune makes of a limit."""

import dataclasses
import importlib.util
from pathlib import Path

import pytest
import tensorflow as tf

import gpt_2_simple as gpt2
from gpt_2_simple import adapter, model, session
from gpt_2_simple.common import published
from gpt_2_simple.training import memory_plan as memory
from gpt_2_simple.training import step
from gpt_2_simple.training.settings import step_settings

MB = memory.MEGABYTE
SMALL = model.HParams(n_vocab=101, n_ctx=64, n_embd=16, n_head=2, n_layer=3)


@pytest.mark.parametrize("optimizer", ["adam", "adafactor", "sgd"])
@pytest.mark.parametrize(
    "change", [{}, {"only_train_transformer_layers": True}, {"train_last_blocks": 2}]
)
def test_plan_of_weights_and_optimizer_state_equals_the_graph(sess, optimizer, change):
    state = session.build_model(sess, SMALL, [])
    config = step_settings(optimizer=optimizer, accumulate_gradients=2, **change)
    ops = step.build_train_ops(state, config, 64)
    planned = memory.plan(SMALL, config)

    def size(variables):
        return sum(4 * v.shape.num_elements() for v in variables if v.shape.rank)

    assert planned.weights == size(model.flatten(state.weights))
    assert planned.optimizer_state == size(ops.state_variables)
    assert planned.accumulators == size(step.trained_variables(state.weights, config))


@pytest.mark.parametrize("held", ["float32", "bfloat16"])
@pytest.mark.parametrize("optimizer", ["adam", "adafactor", "sgd"])
def test_plan_of_an_adapter_equals_the_graph(sess, optimizer, held):
    config = step_settings(
        optimizer=optimizer, accumulate_gradients=2, lora_rank=3,
        lora_targets=("c_attn", "mlp.c_proj"), base_precision=held,
    )  # fmt: skip
    state = session.build_model(sess, SMALL, [], held)
    with sess.graph.as_default():
        state.adapter = adapter.build_adapter(SMALL, [], config.lora)
    ops = step.build_train_ops(state, config, 64)
    planned = memory.plan(SMALL, config)

    def size(variables):
        return sum(v.dtype.size * v.shape.num_elements() for v in variables if v.shape.rank)

    trained = state.adapter.flatten()
    assert planned.weights == size([*model.flatten(state.weights), *trained])
    assert planned.optimizer_state == size(ops.state_variables)
    assert planned.accumulators == size(trained)


def test_adapters_need_less_and_come_last():
    full = memory.memory_plan("774M")
    lora = memory.memory_plan("774M", lora_rank=8)
    narrow = memory.memory_plan("774M", lora_rank=8, base_precision="bfloat16")
    assert narrow.total < 0.7 * lora.total < 0.7 * 0.4 * full.total
    assert memory.memory_plan("774M", lora_rank=8, lora_targets="all").total > lora.total
    found = memory.fitting_plans(published.published_hparams("774M"), 16 * 1024 * MB)
    kinds = [plan.settings.lora is not None for plan in found]
    assert kinds == sorted(kinds)
    assert kinds[-1]
    assert not kinds[0]
    call = memory.as_call(found[-1], "774M")
    assert "lora_rank=8, lora_targets='all', base_precision='bfloat16'" in call
    with pytest.raises(ValueError, match="lora_targets=.* is for an adapter: give lora_rank"):
        memory.memory_plan("774M", lora_targets="all")


def test_sizes_without_a_vocabulary_are_refused():
    with pytest.raises(ValueError, match="n_vocab=0"):
        memory.memory_plan(published.HParams())


def test_published_models_have_their_parameter_counts():
    counts = {name: memory.memory_plan(name).weights // 4 for name in published.PUBLISHED}
    assert counts == {
        "124M": 124439808, "355M": 354823168, "774M": 774030080, "1558M": 1557611200,
    }  # fmt: skip
    assert memory.memory_plan("117M").weights == memory.memory_plan("124M").weights
    with pytest.raises(ValueError, match="124M"):
        memory.memory_plan("3B")


def total(**settings):
    return memory.memory_plan("124M", **settings).total


def test_each_memory_saving_setting_lowers_the_plan():
    assert total() < total(use_memory_saving_gradients=False)
    assert total(optimizer="adafactor") < total() - 900 * MB
    assert total(accumulate_gradients=1) < total() - 300 * MB
    assert total(sequence_length=256) < total()
    assert total(batch_size=4) > total()
    assert total(precision="bfloat16", use_memory_saving_gradients=False) < total(
        use_memory_saving_gradients=False
    )
    assert total(accumulate_gradients=1, gradient_clip=1.0) == total()
    assert total(train_last_blocks=2) < total() / 2


def test_printed_plan_names_each_term():
    plan = memory.memory_plan("774M")
    table = str(plan)
    for term in ("weights", "optimizer state", "accumulators", "stored activations", "loss"):
        assert term in table
    assert f"{plan.total / MB:,.0f} MB" in table
    assert plan.floor < plan.total


def test_fitting_plans_are_within_the_limit_best_first():
    hparams = published.published_hparams("774M")
    found = memory.fitting_plans(hparams, 15 * 1024 * MB)
    assert found
    assert all(plan.total <= 15 * 1024 * MB for plan in found)
    assert found[0].settings.optimizer == "adam"
    assert found[0].settings.use_memory_saving_gradients
    call = memory.as_call(found[0], "774M")
    assert call.startswith("gpt2.finetune(sess, \"your.txt\", model_name='774M'")
    assert "use_memory_saving_gradients=True" in call
    assert "sequence_length" not in call
    assert not memory.fitting_plans(hparams, 1024 * MB)


@pytest.fixture
def limit(monkeypatch):
    def set_to(size):
        monkeypatch.setattr(memory, "device_limit", lambda sess: size)

    return set_to


def choose(sess):
    return memory.choose_recomputing(sess, SMALL, step_settings(), "small")


def test_recomputing_is_chosen_only_where_needed(sess, limit, capsys):
    plans = {
        save: memory.plan(SMALL, step_settings(use_memory_saving_gradients=save)).total
        for save in (False, True)
    }
    limit(None)
    assert choose(sess) is False
    assert capsys.readouterr().out == ""
    limit(plans[False])
    assert choose(sess) is False
    assert "use_memory_saving_gradients=False" in capsys.readouterr().out
    limit(plans[False] - 1)
    assert choose(sess) is True
    assert "use_memory_saving_gradients=True" in capsys.readouterr().out
    limit(plans[True] - 1)
    with pytest.raises(MemoryError, match=r"This fits: gpt2\.finetune"):
        choose(sess)
    limit(1000)
    with pytest.raises(MemoryError, match="Nothing fits: the least"):
        choose(sess)


def test_finetune_that_cannot_fit_is_refused_at_once(workplace, sess, limit):
    limit(1000)
    with pytest.raises(MemoryError, match="training needs about"):
        gpt2.finetune(sess, "text.txt", model_name="tiny", steps=1)
    assert not (workplace / "checkpoint").exists()


def test_device_limit_reads_the_bfc_limit(sess, monkeypatch):
    monkeypatch.delenv("TF_CPU_ALLOCATOR_USE_BFC", raising=False)
    assert memory.device_limit(sess) is None
    monkeypatch.setenv("TF_CPU_ALLOCATOR_USE_BFC", "true")
    monkeypatch.setenv("TF_CPU_BFC_MEM_LIMIT_IN_MB", "3000")
    assert memory.device_limit(sess) == 3000 * MB


def test_out_of_memory_error_names_a_setting_and_keeps_the_run(workplace, sess, monkeypatch):
    settings = {"model_name": "tiny", "sample_every": 0, "seed": 1, "verbose": 0}
    first = gpt2.finetune(sess, "text.txt", steps=2, **settings)
    run = sess.run

    def fail(fetches, *args, **kwargs):
        if isinstance(fetches, tf.Operation) and "train" in fetches.name:
            raise tf.errors.ResourceExhaustedError(None, None, "OOM when allocating")
        return run(fetches, *args, **kwargs)

    says = pytest.raises(MemoryError, match="try use_memory_saving_gradients=True, which saves")
    with monkeypatch.context() as patch, says:
        patch.setattr(sess, "run", fail)
        gpt2.finetune(sess, "text.txt", steps=2, **settings)
    assert gpt2.finetune(sess, "text.txt", steps=1, **settings).step == first.step + 1


def test_advice_after_out_of_memory():
    config = step_settings()
    seen = []
    for change in (
        {"use_memory_saving_gradients": True},
        {"optimizer": "adafactor"},
        {"accumulate_gradients": 1},
    ):
        seen.append(memory.advice(memory.plan(SMALL, config)))
        config = dataclasses.replace(config, **change)
    seen.append(memory.advice(memory.plan(SMALL, config)))
    expected = ["saving_gradients=True", "'adafactor'", "gradients=1", "sequence_length=32"]
    assert all(part in said for part, said in zip(expected, seen, strict=True)), seen


def test_workers_need_room_for_their_sums_and_less_with_a_share_of_the_optimizer():
    settings = {"accumulate_gradients": 2, "use_memory_saving_gradients": True}
    alone = gpt2.memory_plan("124M", **settings)
    two = gpt2.memory_plan("124M", workers=2, **settings)
    assert alone.exchange == 0
    assert two.exchange == 4 * 32 * 2**20
    assert two.total > alone.total
    assert "sum with other workers" in str(two)
    assert "sum with other workers" not in str(alone)
    shared = gpt2.memory_plan("124M", workers=2, shard_optimizer=True, **settings)
    assert two.optimizer_state / 2 < shared.optimizer_state < 0.55 * two.optimizer_state
    assert memory.advice(two).startswith("try shard_optimizer=True, which saves")
    assert "shard_optimizer" not in memory.advice(shared)


def test_readme_table_equals_the_plan():
    root = Path(__file__).parent.parent
    source = importlib.util.spec_from_file_location("bench", root / "benchmarks" / "memory.py")
    bench = importlib.util.module_from_spec(source)
    source.loader.exec_module(bench)
    readme = (root / "README.md").read_text(encoding="utf-8")
    told = readme.partition("<!-- fits -->\n")[2].partition("<!-- /fits -->")[0]
    assert told.strip() == bench.fits_table()
