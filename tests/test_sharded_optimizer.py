"""shard_optimizer: each worker holds the optimizer's state of its share; the run is the same."""

import json
import os
import shutil

import pytest
import workers
from workers import distance, tensors, weights

import gpt_2_simple as gpt2
from gpt_2_simple.storage import checkpoint
from gpt_2_simple.training import sharded_optimizer
from gpt_2_simple.training.sharded_optimizer import assign_owners

RUN = {"model_name": "tiny", "learning_rate": 0.001, "batch_size": 2, "accumulate_gradients": 3,
       "seed": 1, "sample_every": 0, "print_every": 1, "verbose": 0}  # fmt: skip

# What is trained: by name.
SCENARIOS = {
    "adam": {},
    "float16": {
        "precision": "float16", "dropout": 0.1, "gradient_clip": 0.5, "weight_decay": 0.1,
        "use_memory_saving_gradients": True,
    },
    "lora": {"lora_rank": 2, "base_precision": "bfloat16"},
}  # fmt: skip

SCRIPT = f"""
import json, os
import tensorflow as tf
import gpt_2_simple as gpt2
from gpt_2_simple.distributed import collectives

collectives.PIECE_BYTES = 1000  # so that variables are cut
task = json.loads(os.environ["TF_CONFIG"])
index, count = task["task"]["index"], len(task["cluster"]["worker"])
place = "." if index == 0 else "elsewhere"  # a worker that is not to write has no run
places = {{"checkpoint_dir": f"{{place}}/checkpoint"}}

def train(name, run_name, steps, **changes):
    with gpt2.start_tf_sess(threads=1) as sess:
        settings = {{**{RUN!r}, **{SCENARIOS!r}[name], **places, **changes}}
        gpt2.finetune(sess, "text.txt", steps, run_name=run_name, shard_optimizer=True, **settings)
        held = [v for v in tf.compat.v1.global_variables() if "optimizer/adam/" in v.op.name]
        return {{v.op.name: v.shape.num_elements() for v in held}}

if count == 3:
    print("held " + json.dumps(train("adam", "adam-3", 6, save_every=4)))
    for name in ("float16", "lora"):
        train(name, name + "-3", 6)
else:
    for run in ("begun-by-1", "begun-by-3"):
        train("adam", run, 4)
"""


def optimizer_state(run):
    latest = checkpoint.latest_checkpoint(f"checkpoint/{run}")
    folder, base = os.path.split(latest)
    return tensors(os.path.join(folder, f"optimizer-{base.partition('-')[2]}"))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A current folder in which one process has trained, and then three and two workers."""
    folder = tmp_path_factory.mktemp("shards")
    with workers.training_place(folder):
        for name, changes in SCENARIOS.items():
            with gpt2.start_tf_sess(threads=1) as sess:
                gpt2.finetune(sess, "text.txt", 6, run_name=f"{name}-1", **{**RUN, **changes})
                if name == "adam":
                    shutil.copytree("checkpoint/adam-1", "checkpoint/begun-by-1")
                    shutil.copytree("checkpoint/adam-1", "checkpoint/adam-1-of-10")
                    gpt2.finetune(sess, "text.txt", 4, run_name="adam-1-of-10", **RUN)
        yield folder


@pytest.fixture(scope="module")
def by_three(place):
    """What each of three workers holds of Adam's state: its variables' sizes, by name."""
    held = []
    for printed in workers.run_workers(place, SCRIPT, 3):
        (line,) = [line for line in printed.splitlines() if line.startswith("held ")]
        held.append(json.loads(line.removeprefix("held ")))
    shutil.copytree("checkpoint/adam-3", "checkpoint/begun-by-3")
    shutil.copytree("checkpoint/adam-3", "checkpoint/ended-by-1")
    return held


@pytest.fixture(scope="module")
def by_two(by_three):
    """Two workers have gone on with what one process began, and three workers."""
    workers.run_workers(os.getcwd(), SCRIPT, 2)


@pytest.mark.parametrize("name", SCENARIOS)
def test_three_workers_end_with_the_weights_of_one(by_three, name):
    assert distance(weights(f"{name}-3"), weights(f"{name}-1")) < 1e-4


@pytest.mark.parametrize("name", SCENARIOS)
def test_checkpoint_holds_the_whole_state(by_three, name):
    assert distance(optimizer_state(f"{name}-3"), optimizer_state(f"{name}-1")) < 1e-3


def test_each_worker_holds_its_share_and_the_plan_knows_the_largest(by_three):
    whole = {name: value.size for name, value in optimizer_state("adam-1").items()}
    counter = "optimizer/adam/step"
    shares = [{name: n for name, n in held.items() if name != counter} for held in by_three]
    assert sorted(name for share in shares for name in share) == sorted(whole.keys() - {counter})
    assert all(whole[name] == size for share in shares for name, size in share.items())
    hparams = gpt2.model.HParams(n_vocab=257, n_ctx=16, n_embd=16, n_head=2, n_layer=1)
    planned = gpt2.memory_plan(hparams, workers=3, shard_optimizer=True).optimizer_state
    assert planned == 4 * max(sum(share.values()) for share in shares)


@pytest.mark.parametrize("run", ["begun-by-1", "begun-by-3"])
def test_two_workers_continue_a_run(by_two, run):
    assert distance(weights(run), weights("adam-1-of-10")) < 1e-4
    assert distance(optimizer_state(run), optimizer_state("adam-1-of-10")) < 1e-3


def test_one_process_continues_a_run_of_shares(by_three):
    with gpt2.start_tf_sess(threads=1) as sess:
        gpt2.finetune(sess, "text.txt", 4, run_name="ended-by-1", shard_optimizer=True, **RUN)
    assert distance(weights("ended-by-1"), weights("adam-1-of-10")) < 1e-4


FULL_DISK = f"""
import errno, json, os
import gpt_2_simple as gpt2
from gpt_2_simple.storage import checkpoint_tensors

append = checkpoint_tensors._append
def full(file, entries, name, *rest):
    if "-4" in file.name and name.startswith("optimizer/adam/v"):
        raise OSError(errno.ENOSPC, "No space left on device")
    append(file, entries, name, *rest)
checkpoint_tensors._append = full
index = json.loads(os.environ["TF_CONFIG"])["task"]["index"]
with gpt2.start_tf_sess(threads=1) as sess:
    gpt2.finetune(
        sess, "text.txt", 6, save_every=2, run_name="full", shard_optimizer=True,
        checkpoint_dir="checkpoint" if index == 0 else "elsewhere", **{ ({**RUN, "verbose": 1})!r},
    )
"""


def test_disk_that_is_full_in_the_middle_of_a_share_ends_all_and_keeps_the_last_checkpoint(place):
    with workers.Workers(place, FULL_DISK, 2) as cluster:
        ours, theirs = cluster.wait()
    assert ours.status
    assert theirs.status
    saved = os.path.join(place, "checkpoint/full/model-4")
    assert f"could not save {saved}: [Errno 28] No space left" in ours.err
    assert "The steps since the last checkpoint cannot be saved" in ours.out
    assert "worker 0" in theirs.err
    assert "is checkpoint/full/model-2: start all" in theirs.err
    assert checkpoint.latest_checkpoint("checkpoint/full") == "checkpoint/full/model-2"
    assert not [name for name in os.listdir("checkpoint/full") if name.startswith(".sav")]
    assert int(optimizer_state("full")["optimizer/adam/step"]) == 2


def test_assign_owners_gives_all_about_as_much():
    assert assign_owners([5, 4, 3, 3, 3], 2) == [0, 1, 1, 0, 1]
    assert assign_owners([7], 3) == [0]
    assert assign_owners([1, 1, 1, 1], 4) == [0, 1, 2, 3]
    assert assign_owners([3, 9, 2], 1) == [0, 0, 0]


def test_slots_of_one_owner_travel_in_groups_of_bounded_size(monkeypatch):
    monkeypatch.setattr(sharded_optimizer, "GROUP_BYTES", 40)
    sizes = [(1, 0), (4, 1), (6, 0), (5, 1), (3, 0), (100, 1), (1, 1), (1, 0)]
    slots = [sharded_optimizer.Slot(f"s{i}", (n,), owner) for i, (n, owner) in enumerate(sizes)]
    groups = sharded_optimizer._groups(slots)
    assert [[slot.name for slot in group] for group in groups] == [
        ["s0", "s2", "s4"], ["s1", "s3"], ["s5"], ["s6"], ["s7"],
    ]  # fmt: skip
