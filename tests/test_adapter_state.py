"""A run's adapter on disk: saved whole or not at all, restored, removed when it is old."""

import os

import numpy as np
import pytest
import tensorflow as tf
from saved_run import HPARAMS, files
from test_checkpoint import Power, PowerCut

from gpt_2_simple import session
from gpt_2_simple.adapter import build_adapter
from gpt_2_simple.common.lora import LoraConfig
from gpt_2_simple.storage import adapter_files, checkpoint, checkpoint_manager, runs
from gpt_2_simple.storage.adapter_state import AdapterState
from gpt_2_simple.storage.optimizer_state import OptimizerState
from gpt_2_simple.training.optimizer import make_optimizer

CONFIG = LoraConfig(2, 4.0, ("attn.c_attn",))
BASE = {"base_model": "tiny", "base_checkpoint": "../model", "base_digest": "0" * 64}


class SavedAdapter:
    """An adapter with an optimizer, all of whose variables have one value: a step's number."""

    def __init__(self, sess, folder):
        self.sess, self.folder = sess, str(folder)
        self.state = session.build_model(sess, HPARAMS, [])
        with sess.graph.as_default():
            self.adapter = build_adapter(HPARAMS, [], CONFIG)
            optimizer = make_optimizer("adam", 0.1)
            for variable in self.adapter.flatten():
                optimizer.apply(tf.zeros(variable.shape), variable)
        self.optimizer = optimizer.variables()
        self.on_disk = AdapterState(sess, self.adapter, BASE, 0.0)

    def manager(self, max_checkpoints=1, resume=True):
        latest = checkpoint.latest_checkpoint(self.folder) if resume else None
        return checkpoint_manager.CheckpointManager(
            self.sess,
            self.state,
            self.folder,
            max_checkpoints,
            OptimizerState(self.sess, self.state, self.optimizer),
            latest,
            self.on_disk,
        )

    def set(self, value):
        for variable in [*self.adapter.flatten(), *self.optimizer]:
            array = np.full(variable.shape, value, variable.dtype.as_numpy_dtype)
            self.sess.run(variable.initializer, {variable.initializer.inputs[1]: array})

    def save(self, step, manager, value=None):
        self.set(step if value is None else value)
        manager.save(runs.RunState(step=step))
        manager.close()

    def value(self, prefix):
        """The one value that a checkpoint has."""
        values = {float(v) for t in adapter_files.read_adapter(prefix).tensors.values()
                  for v in np.unique(t)}  # fmt: skip
        assert len(values) == 1
        return values.pop()


@pytest.fixture
def saved(sess, tmp_path):
    return SavedAdapter(sess, tmp_path)


OF_STEP_2 = [
    "adapter-2", "checkpoint", "counter", "optimizer-2.data-00000-of-00001", "optimizer-2.index",
    "state-2.json",
]  # fmt: skip


def test_save_writes_a_folder_and_removes_the_one_before(saved):
    manager = saved.manager()
    saved.save(1, manager)
    assert manager.latest == os.path.join(saved.folder, "adapter-1")
    saved.save(2, manager)
    assert files(saved.folder) == OF_STEP_2
    assert checkpoint.latest_checkpoint(saved.folder) == os.path.join(saved.folder, "adapter-2")
    assert runs.step_of(manager.latest) == 2
    assert runs.path_beside(manager.latest, runs.STATE).endswith("state-2")
    assert runs.read_state(manager.latest).step == 2


@pytest.mark.parametrize("name", ["adapter-1", "best"])
def test_power_cut_at_any_moment_leaves_a_whole_adapter(saved, name):
    """The next step's, and the best one, which replaces another of its name."""
    prefix = os.path.join(saved.folder, name)
    seen = set()
    for moment in range(100):
        manager = saved.manager(resume=False)
        saved.save(1, manager, value=1)
        manager.save_best()
        saved.set(2)
        with pytest.MonkeyPatch.context() as patch:
            Power(patch, moment)
            try:
                if name == "best":
                    saved.manager().save_best()
                else:
                    saved.manager(resume=False).save(runs.RunState(step=1))
                cut = False
            except PowerCut:
                cut = True
        checkpoint.finish_saves(saved.folder)
        assert checkpoint.is_whole(prefix)
        seen.add(saved.value(prefix))
        assert not [n for n in files(saved.folder) if n.startswith(".")]
        if not cut:
            break
    assert not cut
    assert moment > 5
    assert seen == {1.0, 2.0}


def test_full_disk_leaves_the_adapter_before(saved, monkeypatch):
    saved.save(1, saved.manager())

    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(adapter_files.safetensors_file, "write_tensors", fail)
        with pytest.raises(OSError, match="could not save .*adapter-2: .*No space left on device"):
            saved.save(2, saved.manager())
    assert files(saved.folder) == [n.replace("-2", "-1") for n in OF_STEP_2]
    assert saved.value(os.path.join(saved.folder, "adapter-1")) == 1


@pytest.mark.parametrize("name", [adapter_files.CONFIG_FILE, adapter_files.TENSORS_FILE])
@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_damaged_adapter_is_passed_over_for_the_newest_whole_one(saved, name, damage):
    for step in (1, 2, 3):
        saved.save(step, saved.manager(0))
    path = os.path.join(saved.folder, "adapter-3", name)
    if damage == "gone":
        os.remove(path)
    else:
        os.truncate(path, os.path.getsize(path) - 3)
    assert checkpoint.latest_checkpoint(saved.folder).endswith("adapter-2")
    with pytest.raises(FileNotFoundError, match="no whole checkpoint .*adapter-3; checkpoints the"):
        checkpoint.restore_path(saved.folder, "adapter-3")
    assert checkpoint.restore_path(saved.folder, "adapter-1").endswith("adapter-1")
    assert checkpoint.named_checkpoints(saved.folder) == ["adapter-1", "adapter-2", "adapter-3"]


def test_checkpoints_of_both_kinds_are_found_by_their_step(saved):
    saved.save(7, saved.manager())
    os.remove(os.path.join(saved.folder, "checkpoint"))
    assert checkpoint.latest_checkpoint(saved.folder).endswith("adapter-7")
    assert runs.name_of_step(saved.folder, 7) == "adapter-7"
    assert runs.name_of_step(saved.folder, 8) == "model-8"
    assert checkpoint.has_any(saved.folder)


def test_infinite_adapter_is_never_written(saved):
    saved.set(1)
    assert saved.manager().are_weights_finite()
    variable = saved.adapter.flatten()[0]
    array = np.full(variable.shape, np.inf, np.float32)
    saved.sess.run(variable.initializer, {variable.initializer.inputs[1]: array})
    assert not saved.manager().are_weights_finite()


def test_restore_gives_back_what_was_saved(saved):
    saved.set(3)
    saved.on_disk.write(os.path.join(saved.folder, "adapter-3"))
    saved.set(4)
    saved.on_disk.restore(os.path.join(saved.folder, "adapter-3"), HPARAMS)
    values = saved.sess.run(saved.adapter.flatten())
    assert all((value == 3).all() for value in values)
