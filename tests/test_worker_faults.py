"""Workers that are killed, frozen, wrong or out of disk: what all sides are told, and what is left.

What needs no training is tested in test_channel.py.
"""

import re
import signal
import sys
import types

import numpy as np
import pytest
import test_channel
import workers

from gpt_2_simple.storage import checkpoint
from gpt_2_simple.training import data_parallel
from gpt_2_simple.training.settings import TrainingSettings

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX's signals")

KILL = getattr(signal, "SIGKILL", None)

SCRIPT = """
import os, sys, time
import gpt_2_simple as gpt2
from gpt_2_simple.distributed import channel

channel.SILENCE_SECONDS = 4.0
FAULT
def tell(entry):
    print("step", entry.step)
settings = dict(model_name="tiny", batch_size=2, accumulate_gradients=3, sample_every=0,
                save_every=2, seed=1, on_step=tell, verbose=0)
try:
    with gpt2.start_tf_sess(threads=1) as sess:
        result = gpt2.finetune(sess, "text.txt", CHANGES)
        print("done", result.step)
except Exception as error:
    print(f"{type(error).__name__}: {error}")
    sys.exit(1)
"""


def script(fault="", changes="-1, **settings"):
    return SCRIPT.replace("FAULT", fault).replace("CHANGES", changes)


@pytest.fixture
def place(workplace):
    """A current folder with a model and a text."""
    return workplace


def errors_of(ended):
    """The last printed line of each worker."""
    assert all(worker.out for worker in ended), ended
    return [worker.out.strip().splitlines()[-1] for worker in ended]


@pytest.mark.parametrize(
    ("number", "fault", "reason"),
    [
        (1, KILL, "is gone: it was killed, or its network is"),
        (0, KILL, "is gone: it was killed, or its network is"),
        (1, getattr(signal, "SIGSTOP", None), "has not answered for"),
    ],
)
def test_others_end_when_a_worker_is_killed_or_frozen(place, number, fault, reason):
    with workers.Workers(place, script(), 2) as cluster:
        cluster.line(0, "step 5")
        cluster.processes[number].send_signal(fault)
        other = cluster.processes[1 - number]
        out, err = other.communicate(timeout=workers.LIMIT_SECONDS)
        assert other.returncode == 1, err
    message = out.strip().splitlines()[-1]
    assert message.startswith("WorkerLost: worker ")
    assert f"worker {number} (" in message
    assert reason in message
    latest = checkpoint.latest_checkpoint("checkpoint/run1")
    assert "he last checkpoint" in message
    if number == 1:  # worker 0 saved the step that it had reached
        assert f"{latest}: start all workers again" in message
    assert checkpoint.is_whole(latest)
    assert int(latest.rpartition("-")[2]) >= 4


POISON = """
from gpt_2_simple.training import data_parallel
accumulate = data_parallel.DataParallelTrainer.accumulate
def poisoned(self, batches):
    if self.run.step == 2 and self.cluster.spec.index == 1:
        for batch in batches:
            batch[self.ops.loss_weights] = batch[self.ops.loss_weights] * float("nan")
    return accumulate(self, batches)
data_parallel.DataParallelTrainer.accumulate = poisoned
"""


def test_worker_whose_loss_is_not_a_number_is_named_on_all_sides(place):
    with workers.Workers(place, script(POISON), 2) as cluster:
        ended = cluster.wait()
    name = f"worker 1 ({cluster.addresses[1]})"
    ours, theirs = errors_of(ended)
    told = f"Diverged: the loss is nan in step 3, on {name}; training stopped"
    assert ours.startswith(f"{told}, and the session is back at checkpoint/run1/model-2")
    assert theirs.startswith(told)
    assert checkpoint.latest_checkpoint("checkpoint/run1") == "checkpoint/run1/model-2"


FULL_DISK = """
import errno
from gpt_2_simple.storage import checkpoint_ops
write = checkpoint_ops.write_checkpoint
def full(sess, ops, prefix):
    if "model-4" in prefix:
        raise OSError(errno.ENOSPC, "No space left on device")
    write(sess, ops, prefix)
checkpoint_ops.write_checkpoint = full
"""


def test_full_disk_of_worker_0_is_told_on_all_sides(place):
    with workers.Workers(place, script(FULL_DISK), 2) as cluster:
        ended = cluster.wait()
    ours, theirs = errors_of(ended)
    reason = r"could not save \S*checkpoint/run1/model-4: \[Errno 28\] No space left on device"
    assert re.match(f"OSError: {reason}", ours)
    name = re.escape(f"worker 0 ({cluster.addresses[0]})")
    assert re.match(f"WorkerLost: {name} failed: {reason}", theirs)
    assert "The last checkpoint of worker 0 is checkpoint/run1/model-2: start all" in theirs
    assert checkpoint.latest_checkpoint("checkpoint/run1") == "checkpoint/run1/model-2"


# --- what is compared before the training, in threads ---------------------------------------------


def told(count, check):
    """What check(cluster) tells each of so many workers, '' where nothing is wrong."""
    with test_channel.opened(count) as channels:
        clusters = [types.SimpleNamespace(spec=c.spec, channel=c) for c in channels]
        found = test_channel.all_at_once([(check, cluster) for cluster in clusters])
    return ["" if message is None else message for message in found]


def settings(**changes):
    return TrainingSettings("text.txt", 5, **changes)


def test_other_settings_of_a_worker_are_told_on_all_sides():
    def check(cluster):
        learning_rate = 0.01 if cluster.spec.index == 2 else 0.001
        data_parallel.check_settings(cluster, settings(learning_rate=learning_rate))

    for message in told(3, check):
        assert message.startswith("ValueError: worker 2 (127.0.0.1:")
        assert "has learning_rate=0.01, and worker 0 has learning_rate=0.001" in message


def test_places_may_differ_between_workers():
    def check(cluster):
        folder = f"models-{cluster.spec.index}"
        own = {"on_step": print} if cluster.spec.index == 0 else {}
        data_parallel.check_settings(cluster, settings(model_dir=folder, **own))

    assert told(2, check) == ["", ""]


def test_fewer_micro_batches_than_workers_are_told_on_all_sides():
    def check(cluster):
        data_parallel.check_settings(cluster, settings(accumulate_gradients=2))

    for message in told(3, check):
        assert message == (
            "ValueError: accumulate_gradients=2 micro-batches in a step are fewer than the 3 "
            "workers: give accumulate_gradients=3 or more, or fewer workers"
        )


def test_failure_is_told_to_the_others():
    def check(cluster):
        with data_parallel.telling_failures(cluster):
            if cluster.spec.index == 1:
                raise FileNotFoundError("no model in models/124M")
            cluster.channel.gather("ready")

    ours, theirs = told(2, check)
    assert ours.startswith("WorkerLost: worker 1 (127.0.0.1:")
    assert ours.endswith("failed: no model in models/124M")
    assert theirs == "FileNotFoundError: no model in models/124M"


def test_data_digest_tells_tokens_and_chunks_apart():
    chunks = [np.arange(5), np.arange(3)]
    digests = {
        data_parallel.data_digest(found)
        for found in (chunks, chunks[::-1], [np.arange(5), np.arange(4)], [np.arange(8)], [])
    }
    assert len(digests) == 5
    same = [np.arange(5, dtype=np.uint16), np.arange(3, dtype=np.int64)]
    assert data_parallel.data_digest(same) == data_parallel.data_digest(chunks)
