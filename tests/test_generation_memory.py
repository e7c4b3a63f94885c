"""generation_memory_plan against real sessions, and `memory --generate`."""

import json
import os
import subprocess
import sys

import pytest

from gpt_2_simple import gpt_2, model, session
from gpt_2_simple.cli.main import main
from gpt_2_simple.generation import memory_plan, sequences

SIZES = model.HParams(n_vocab=300, n_ctx=64, n_embd=48, n_head=4, n_layer=3)


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_weights_are_those_of_the_variables(precision):
    with session.start_tf_sess() as sess:
        state = session.build_model(sess, SIZES, [], precision=precision)
        sizes = [v.shape.num_elements() * v.dtype.size for v in model.flatten(state.weights)]
    assert memory_plan.weights_bytes(SIZES, precision) == sum(sizes)


def test_int8_has_the_output_projection_beside_the_embedding():
    matrices = 3 * 12 * 48**2
    float32 = memory_plan.weights_bytes(SIZES, "float32")
    assert float32 - memory_plan.weights_bytes(SIZES, "int8") == 3 * matrices - 300 * 48


def test_cache_is_that_of_a_generation():
    with session.start_tf_sess() as sess:
        session.build_model(sess, SIZES, [])
        generation = sequences.Generation(sess)
        assert generation.n_bytes(5, 40) == memory_plan.cache_bytes(SIZES, 5, 40)
    plan = gpt_2.generation_memory_plan(SIZES, batch_size=5, length=30, prefix_length=10)
    assert plan.cache == 4 * 2 * 3 * 48 * 5 * 40
    assert plan.columns == 40
    longest = gpt_2.generation_memory_plan(SIZES, batch_size=5)  # 1,023 tokens
    assert (longest.columns, longest.cache) == (64, 4 * 2 * 3 * 48 * 5 * 64)


def test_plan_is_printed_as_a_table_that_adds_up():
    plan = gpt_2.generation_memory_plan("1558M", precision="bfloat16", batch_size=8, length=100)
    assert plan.total == int((plan.weights + plan.cache + plan.step) * 1.06)
    lines = str(plan).splitlines()
    assert lines[0].split() == ["weights,", "bfloat16", "3,129", "MB"]
    assert "8 x 101 tokens" in lines[1]
    assert lines[-1].endswith(f"{plan.total / 2**20:,.0f} MB")


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"precision": "int4"}, "precision='int4'"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"length": 0}, "length=0"),
        ({"prefix_length": 0}, "prefix_length=0"),
        ({"model_name": "9M"}, "9M"),
        ({"model_name": model.HParams()}, "n_vocab=0"),
        ({"model_name": model.HParams(n_vocab=9, n_embd=7)}, "n_embd=7 must be a multiple"),
    ],
)
def test_wrong_settings_are_refused(wrong, said):
    with pytest.raises(ValueError, match=said):
        gpt_2.generation_memory_plan(**wrong)


TRIAL = """
import sys
from gpt_2_simple import model, session, sample
sess = session.start_tf_sess()
hparams = model.HParams(n_vocab=1000, n_ctx=512, n_embd=256, n_head=4, n_layer=8)
state = session.build_model(sess, hparams, [])
with sess.graph.as_default():
    for variable in model.flatten(state.weights):
        sess.run(variable.initializer)
prefixes = [[row] * 100 for row in range(1, 33)]
list(sample.generate_tokens(sess, prefixes, 300, sample.SamplingParams(top_k=5), seed=0))
print("GENERATED")
"""


@pytest.mark.parametrize(("share", "fits"), [(1.0, True), (0.6, False)])
def test_texts_are_generated_under_the_planned_limit_and_not_far_below(share, fits):
    sizes = model.HParams(n_vocab=1000, n_ctx=512, n_embd=256, n_head=4, n_layer=8)
    plan = gpt_2.generation_memory_plan(sizes, batch_size=32, length=300, prefix_length=100)
    assert plan.cache > 5 * plan.weights
    environment = os.environ | {
        "TF_CPU_ALLOCATOR_USE_BFC": "true",
        "TF_CPU_BFC_MEM_LIMIT_IN_MB": str(int(share * plan.total / 2**20)),
    }
    done = subprocess.run(
        [sys.executable, "-c", TRIAL], env=environment, capture_output=True, text=True,
        errors="replace", check=False,
    )  # fmt: skip
    assert ("GENERATED" in done.stdout) == fits, done.stderr
    assert fits or "OOM" in done.stderr or "ResourceExhausted" in done.stderr


def test_command_prints_each_precision_by_batch_and_length(capsys):
    assert main(["memory", "1558M", "--generate"]) == 0
    head, weights, *rows = capsys.readouterr().out.splitlines()
    assert head.split()[-4:] == ["float32", "bfloat16", "float16", "int8"]
    assert weights.split() == ["weights", "5,942", "3,129", "3,129", "1,800"]
    assert [row.split()[1::2][:2] for row in rows] == [
        [f"{batch},", length] for batch in (1, 8, 20) for length in ("100", "1,023")
    ]
    plan = gpt_2.generation_memory_plan("1558M", batch_size=8, length=100)
    assert rows[2].split()[4] == f"{plan.total / 2**20:,.0f}"
    assert main("memory 1558M --generate --json --length 100".split()) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found) == 3 * 4
    assert found[4] == {
        "model_name": "1558M", "precision": "float32", "batch_size": 8, "length": 100,
        "total": plan.total, "weights": plan.weights, "cache": plan.cache, "step": plan.step,
    }  # fmt: skip
    assert main("memory 124M --generate --batch_size 3 --length 50 --prefix_length 9".split()) == 0
    assert capsys.readouterr().out.splitlines()[2].startswith("batch 3, length 50 ")


def test_command_names_the_largest_batch_for_a_card(capsys):
    assert main("memory 774M --generate --gpu_gb 8 --length 1000".split()) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    for line in lines:
        call, comment = line.split("  # ")
        precision = call.split("precision='")[1].split("'")[0]
        batch = int(comment.split("batch_size=")[1].split(",")[0])
        totals = [
            gpt_2.generation_memory_plan(
                "774M", precision=precision, batch_size=size, length=1000
            ).total
            for size in (batch, batch + 1)
        ]
        assert totals[0] <= 0.93 * 8 * 2**30 < totals[1]
    assert main("memory 1558M --generate --gpu_gb 1".split()) == 1
    assert "nothing fits" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--generate --optimizer adam", "--optimizer 'adam' has no meaning with --generate"),
        ("--length 9", "--length 9 has no meaning without --generate"),
        ("--prefix_length 9", "--prefix_length 9 has no meaning without --generate"),
        ("--generate --length 0", "--length"),
        ("--generate --batch_size 0", "--batch_size 0"),
        ("--generate --batch_size -4 --gpu_gb 16", "--batch_size -4"),
    ],
)
def test_command_refuses_what_has_no_meaning(capsys, words, said):
    assert main(["memory", "124M", *words.split()]) in (1, 2)
    assert said in capsys.readouterr().err
