"""Training on Ray's local cluster: the run comes back, and goes on after a worker is killed."""

import json
import os
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

import gpt_2_simple as gpt2
from gpt_2_simple.distributed import ray as on_ray
from gpt_2_simple.distributed import ray_job, ray_worker
from gpt_2_simple.storage import checkpoint
from gpt_2_simple.training.history import read_history

SETTINGS = {"model_name": "tiny", "batch_size": 2, "accumulate_gradients": 4, "sample_every": 0,
            "save_every": 4, "seed": 1, "learning_rate": 0.001}  # fmt: skip


@pytest.fixture
def cluster(workplace, monkeypatch):
    """A current folder; Ray is ended after the test."""
    ray = pytest.importorskip("ray", reason="needs ray[train]")
    pytest.importorskip("ray.train.tensorflow", reason="needs ray[train]")
    monkeypatch.setenv("GPT2_START_SECONDS", "200")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    yield workplace
    ray.shutdown()


def tensors(prefix):
    reader = tf.train.load_checkpoint(prefix)
    return {name: reader.get_tensor(name) for name in reader.get_variable_to_shape_map()}


def check_same(prefix, other):
    ours, theirs = tensors(prefix), tensors(other)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        np.testing.assert_allclose(theirs[name], value, rtol=0, atol=1e-5, err_msg=name)


@pytest.mark.ray
def test_run_comes_back_and_survives_a_killed_worker(cluster, sess, capsys):
    """The worker is killed after a save: the run ends with the weights of an undisturbed one."""
    killed, called = [], []

    def kill_once(entry):
        called.append(entry.step)
        if entry.step == 6 and not killed:
            killed.append(kill_a_worker())

    result = gpt2.distributed.finetune_on_ray(
        "text.txt", 10, run_name="two", workers=2, on_step=kill_once, **SETTINGS
    )
    out = capsys.readouterr().out
    assert killed
    one = gpt2.finetune(sess, "text.txt", 10, run_name="one", **{**SETTINGS, "verbose": 0})
    assert result.step == one.step == 10
    assert result.checkpoint == os.path.join("checkpoint", "two", "model-10")
    check_same(one.checkpoint, result.checkpoint)
    check_same(*(c.replace("model-", "optimizer-") for c in (one.checkpoint, result.checkpoint)))
    assert [entry.step for entry in result.history] == list(range(1, 11))
    assert [entry.step for entry in read_history("checkpoint/two")] == list(range(1, 11))
    assert "[10 | " in out
    known = json.loads(Path("checkpoint/two/settings.json").read_text())
    assert (known["dataset"], known["model_dir"]) == ("text.txt", "models")
    assert "Saving" in out
    gpt2.load_gpt2(sess, run_name="two", verbose=0)
    assert gpt2.generate(sess, length=3, return_as_list=True)


def kill_a_worker():
    """Kills one of Ray's processes that train; returns its id."""
    for name in sorted(os.listdir("/proc")):
        if name.isdigit():
            try:
                with open(f"/proc/{name}/cmdline", "rb") as file:
                    command = file.read()
            except OSError:
                continue
            if b"RayTrainWorker" in command or b"_RayTrainWorker__execute" in command:
                os.kill(int(name), signal.SIGKILL)
                return int(name)
    raise AssertionError("no worker found")


@pytest.mark.ray
def test_error_of_a_worker_is_raised_and_a_run_is_continued_by_one_worker(cluster, sess, capsys):
    with pytest.raises(ValueError, match="train_last_blocks=9, but the model has 2 blocks"):
        gpt2.distributed.finetune_on_ray("text.txt", 2, train_last_blocks=9, **SETTINGS)
    assert not os.path.exists("checkpoint/run1/hparams.json")
    gpt2.finetune(sess, "text.txt", 3, run_name="here", **{**SETTINGS, "verbose": 0})
    result = gpt2.distributed.finetune_on_ray(
        "text.txt", -1, run_name="here", on_step=lambda entry: entry.step < 6, **SETTINGS
    )
    assert "other settings" not in capsys.readouterr().out  # the workers' folders are none
    assert result.step >= 6  # the answer travels
    assert result.history[0].step == 4
    assert checkpoint.latest_checkpoint("checkpoint/here").endswith(f"model-{result.step}")


# --- what needs no Ray ----------------------------------------------------------------------------


def test_missing_ray_is_told(workplace, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.setitem(sys.modules, "ray.train", None)
    monkeypatch.setitem(sys.modules, "ray.train.tensorflow", None)
    with pytest.raises(ImportError, match=r"pip install 'gpt_2_simple\[ray\]'"):
        gpt2.distributed.finetune_on_ray("text.txt", model_name="tiny")
    assert not os.path.exists("checkpoint")


def test_checkpoint_elsewhere_is_refused_as_a_start(workplace):
    with pytest.raises(ValueError, match="restore_from='elsewhere': on Ray it is 'latest'"):
        gpt2.distributed.finetune_on_ray("text.txt", restore_from="elsewhere")


def test_mailbox_keeps_messages_until_they_are_taken():
    mailbox = ray_job.Mailbox()
    mailbox.put("line", "one")
    mailbox.put("failure", "two")
    assert mailbox.has_failed()
    assert mailbox.take() == [("line", "one"), ("failure", "two")]
    assert mailbox.take() == []
    assert not mailbox.is_stopped()
    mailbox.stop()
    assert mailbox.is_stopped()


def test_printed_lines_are_sent_whole():
    told = []
    lines = ray_worker._Lines(lambda *message: told.append(message))
    for text in ("a", "b\nc\n", "\n", "d"):
        lines.write(text)
    assert told == [("line", "ab"), ("line", "c"), ("line", "")]


@pytest.mark.parametrize("name", ["/etc/passwd", "../model-1.index", "a/../../b"])
def test_files_land_in_the_run_alone(tmp_path, name):
    training = on_ray._Training.__new__(on_ray._Training)
    training.run = str(tmp_path)
    with pytest.raises(ValueError, match="is no file of a run"):
        training._receive(name, b"")


def test_settings_that_came_back_name_the_callers_folders(tmp_path):
    """An adapter finds its model by them."""
    training = on_ray._Training.__new__(on_ray._Training)
    training.run = str(tmp_path)
    training.settings = on_ray.RaySettings(dataset=["a.txt", Path("b.txt")], model_dir="mine")
    theirs = {"dataset": "/tmp/x/data", "model_dir": "/tmp/x/models", "steps": 5, "cache_dir": None}
    training._receive("settings.json", json.dumps(theirs).encode())
    training._put_in_place({})
    ours = json.loads((tmp_path / "settings.json").read_text())
    assert ours == {
        "dataset": ["a.txt", "b.txt"],
        "model_dir": "mine",
        "steps": 5,
        "cache_dir": None,
    }


def test_save_that_came_back_replaces_older_checkpoints(tmp_path):
    """Files of the caller's own, and those that the workers have still, stay."""
    training = on_ray._Training.__new__(on_ray._Training)
    training.run = str(tmp_path)
    for name in ("model-1.index", "optimizer-1.index", "notes.txt", "model-2.index"):
        (tmp_path / name).write_text("old")
    (tmp_path / "adapter-1").mkdir()
    (tmp_path / "adapter-1" / "adapter_config.json").write_text("old")
    new = ("checkpoint", "model-3.index", "model-3.data-00000-of-00001", "adapter-3/a.json")
    for name in new:
        training._receive(name, b"new")
    assert not (tmp_path / "model-3.index").exists()
    training._put_in_place(dict.fromkeys((*new, "model-2.index"), 3))
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["adapter-3"]
    assert (tmp_path / "adapter-3" / "a.json").read_text() == "new"
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == [
        "checkpoint", "model-2.index", "model-3.data-00000-of-00001", "model-3.index", "notes.txt",
    ]  # fmt: skip
