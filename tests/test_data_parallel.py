"""Training by several workers: the run is that of one worker; worker 0 alone writes."""

import glob
import json
import os
import re
import shutil

import numpy as np
import pytest
import workers

import gpt_2_simple as gpt2
from gpt_2_simple.storage import checkpoint
from gpt_2_simple.training.history import read_history

RUN = {"model_name": "tiny", "learning_rate": 0.001, "batch_size": 2, "accumulate_gradients": 5,
       "seed": 1, "sample_every": 0, "print_every": 1}  # fmt: skip

# What each of them trains, for 6 steps: by name.
SCENARIOS = {
    "adam": {},
    "regularized": {
        "precision": "float16", "dropout": 0.1, "gradient_clip": 0.5, "weight_decay": 0.1,
        "warmup_steps": 3, "use_memory_saving_gradients": True,
    },
    "epochs": {
        "optimizer": "adafactor", "sampling": "epoch",
        "val_split": 0.3, "val_every": 2, "patience": 5,
    },
}  # fmt: skip

# An adapter, in a session of its own: the base is held in 16 bits.
LORA = {"lora_rank": 2, "base_precision": "bfloat16"}

SCRIPT = f"""
import hashlib, json, os
import gpt_2_simple as gpt2
from gpt_2_simple import session

index = json.loads(os.environ["TF_CONFIG"])["task"]["index"]
count = len(json.loads(os.environ["TF_CONFIG"])["cluster"]["worker"])
scenarios = {SCENARIOS!r}
place = "." if index == 0 else "elsewhere"  # a worker that is not to write has no run
called = []
with gpt2.start_tf_sess(threads=1) as sess:
    for name, changes in scenarios.items():
        if count == 4 and name != "adam":
            break  # two workers do the rest
        settings = {{**{RUN!r}, **changes}}
        result = gpt2.finetune(
            sess, "text.txt", 6, run_name=f"{{name}}-{{count}}", save_every=4,
            checkpoint_dir=f"{{place}}/checkpoint", on_step=called.append, **settings,
        )
        print("reached", name, result.step, result.checkpoint)
    if count == 2:
        with gpt2.start_tf_sess(threads=1) as other:
            settings = {{**{RUN!r}, **{LORA!r}}}
            gpt2.finetune(other, "text.txt", 6, run_name="lora-2",
                          checkpoint_dir=f"{{place}}/checkpoint", **settings)
    variables = session.named_variables(session.graph_state(sess)).values()
    values = b"".join(value.tobytes() for value in sess.run(list(variables)))
    print("holds", hashlib.sha256(values).hexdigest())
    for changes in ({{}}, {{"on_step": lambda entry: entry.step < 10}}):
        result = gpt2.finetune(
            sess, "text.txt", 20 if changes else 3, run_name=f"resumed-{{count}}",
            checkpoint_dir=f"{{place}}/checkpoint", **{{**{RUN!r}, **changes}},
        )
        print("reached step", result.step)
    for name in json.loads(os.environ.get("CONTINUED", "[]")):
        gpt2.finetune(
            sess, "text.txt", 4, run_name=name, checkpoint_dir=f"{{place}}/checkpoint", **{RUN!r}
        )
print("called", len(called))
"""


def latest(run):
    return checkpoint.latest_checkpoint(f"checkpoint/{run}")


def distance(run, other):
    """How far the weights of two runs are from each other."""
    return workers.distance(workers.weights(run), workers.weights(other))


def state(run):
    """What was saved beside the weights, without times."""
    with open(
        latest(run).replace("model-", "state-").replace("adapter-", "state-") + ".json"
    ) as file:
        values = json.load(file)
    del values["seconds"]
    losses = {key: values.pop(key) for key in ("losses", "validation_loss", "best_loss")}
    return values, losses


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A current folder in which one, two and four workers have trained the same."""
    folder = tmp_path_factory.mktemp("cluster")
    with workers.training_place(folder):
        with gpt2.start_tf_sess(threads=1) as sess:
            for name, changes in SCENARIOS.items():
                gpt2.finetune(
                    sess, "text.txt", 6, run_name=f"{name}-1", verbose=0, **{**RUN, **changes}
                )
            gpt2.finetune(sess, "text.txt", 10, run_name="resumed-1", verbose=0, **RUN)
        with gpt2.start_tf_sess(threads=1) as sess:
            gpt2.finetune(sess, "text.txt", 6, run_name="lora-1", verbose=0, **{**RUN, **LORA})
        yield folder


# Runs that two workers have begun, or gpt-2-simple 0.8.1, and one or four go on with.
CONTINUED = ["begun-by-2", "of-0.8.1"]


@pytest.fixture(scope="module")
def by_two(place):
    """What two workers have printed."""
    printed = workers.run_workers(place, SCRIPT, 2)
    for name in CONTINUED:
        shutil.copytree("checkpoint/adam-2", f"checkpoint/{name}")
    for path in glob.glob("checkpoint/of-0.8.1/*"):
        if os.path.basename(path).startswith(("optimizer-", "state-", "settings", "history")):
            os.remove(path)
    for name in CONTINUED:
        shutil.copytree(f"checkpoint/{name}", f"checkpoint/{name}-1")
    return printed


@pytest.fixture(scope="module")
def by_four(place, by_two):
    """What four workers have printed."""
    return workers.run_workers(place, SCRIPT, 4, CONTINUED=json.dumps(CONTINUED))


def check_same_run(name, other):
    assert distance(name, other) < 1e-4
    ours, losses = state(name)
    theirs, their_losses = state(other)
    assert ours == theirs
    for key, value in losses.items():
        np.testing.assert_allclose(their_losses[key] or 0, value or 0, rtol=1e-5, err_msg=key)
    entries = [read_history(f"checkpoint/{run}") for run in (name, other)]
    assert [e.step for e in entries[0]] == [e.step for e in entries[1]]
    np.testing.assert_allclose(*([e.loss for e in part] for part in entries), rtol=1e-4)


def check_printed(printed, count, n_steps):
    """Worker 0 prints, calls back and names its checkpoint; all hold the same weights."""
    writer, *others = printed
    assert f"reached adam 6 ./checkpoint/adam-{count}/model-6\n" in writer
    assert "loss=" in writer
    assert f"called {n_steps}\n" in writer
    for out in others:
        assert "reached adam 6 None\n" in out
        assert "loss=" not in out
        assert "called 0\n" in out
    assert not os.path.exists("elsewhere")
    assert len({re.search("^holds (.*)$", out, re.MULTILINE)[1] for out in printed}) == 1


@pytest.mark.parametrize("name", [*SCENARIOS, "lora"])
def test_two_workers_end_with_the_weights_of_one(place, by_two, name):
    check_same_run(f"{name}-1", f"{name}-2")


def test_four_workers_end_with_the_weights_of_one(place, by_four):
    check_same_run("adam-1", "adam-4")


def test_only_worker_0_writes_and_all_hold_the_weights(place, by_two):
    check_printed(by_two, 2, 6 * len(SCENARIOS))


def test_only_one_of_four_workers_writes(place, by_four):
    check_printed(by_four, 4, 6)


def test_resumed_run_of_two_workers_is_that_of_one(place, by_two):
    assert distance("resumed-1", "resumed-2") < 1e-4
    assert state("resumed-1")[0] == state("resumed-2")[0]


@pytest.mark.parametrize("name", CONTINUED)
def test_run_begun_by_two_workers_is_continued_by_one_and_by_four(place, by_four, name):
    with gpt2.start_tf_sess(threads=1) as sess:
        result = gpt2.finetune(sess, "text.txt", 4, run_name=f"{name}-1", verbose=0, **RUN)
    assert result.step == 10
    assert distance(f"{name}-1", name) < 1e-4
    assert state(f"{name}-1")[0] == state(name)[0]
    if name == "begun-by-2":
        assert distance("resumed-1", name) < 1e-4


def test_callback_of_worker_0_ends_all(place, by_two):
    for out in by_two:
        assert re.findall(r"^reached step (\d+)$", out, re.MULTILINE) == ["3", "10"]


def test_micro_batches_that_do_not_divide_evenly_are_told(place, by_two):
    line = (
        "accumulate_gradients=5 gives 1 of the 2 workers 3 micro-batches, and the others 2, which "
        "then wait: accumulate_gradients=6 would use all of them"
    )
    assert line in by_two[0]
