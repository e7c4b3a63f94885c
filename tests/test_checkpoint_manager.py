"""A run's checkpoints: what a save writes, which are kept, what is restored."""

import errno
import os
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import tensorflow as tf
from saved_run import OF_STEP_2, SavedRun, files

from gpt_2_simple.storage import checkpoint, runs


@pytest.fixture
def saved_run(sess, tmp_path):
    return SavedRun(sess, tmp_path)


def test_save_writes_all_files_and_removes_the_checkpoint_before(saved_run):
    manager = saved_run.manager()
    assert saved_run.save(1, manager) == os.path.join(saved_run.folder, "model-1")
    saved_run.save(2, manager)
    assert files(saved_run.folder) == OF_STEP_2
    assert saved_run.saved() == (2, 2.0)
    assert tf.train.latest_checkpoint(saved_run.folder) == os.path.join(saved_run.folder, "model-2")
    with open(os.path.join(saved_run.folder, "counter")) as file:
        assert file.read() == "2\n"


def test_max_checkpoints_keeps_the_newest_and_0_keeps_all(saved_run):
    manager = saved_run.manager(2)
    for step in (1, 2, 3):
        saved_run.save(step, manager)
    assert checkpoint.named_checkpoints(saved_run.folder) == ["model-2", "model-3"]
    assert not [name for name in files(saved_run.folder) if "-1." in name]
    manager = saved_run.manager(0)
    saved_run.save(4, manager)
    assert checkpoint.named_checkpoints(saved_run.folder) == ["model-2", "model-3", "model-4"]


def test_save_removes_only_files_of_the_run(saved_run):
    theirs = ["model-7.index", "model-1x.data", "optimizer-9.index", "state-1", "model-10.meta"]
    for name in theirs:
        with open(os.path.join(saved_run.folder, name), "w") as file:
            file.write(name)
    manager = saved_run.manager(resume=False)
    saved_run.save(1, manager)
    saved_run.save(2, manager)
    assert files(saved_run.folder) == sorted(OF_STEP_2 + theirs)


def test_fresh_start_keeps_checkpoints_of_an_earlier_training(saved_run):
    saved_run.save(5, saved_run.manager(resume=False))
    fresh = saved_run.manager(resume=False)
    saved_run.save(1, fresh)
    saved_run.save(2, fresh)
    assert saved_run.saved() == (2, 2.0)
    assert checkpoint.is_whole(os.path.join(saved_run.folder, "model-5"))


def test_old_checkpoints_are_removed_in_the_background(saved_run, monkeypatch):
    go_on = threading.Event()
    remove = checkpoint.remove_trash
    monkeypatch.setattr(
        checkpoint, "remove_trash", lambda folder: go_on.wait(60) and remove(folder)
    )
    saved_run.set(0)
    manager = saved_run.manager()
    manager.save(runs.RunState(step=1))
    manager.save(runs.RunState(step=2))
    kept = [name for name in files(saved_run.folder) if not name.startswith(checkpoint.TRASH)]
    assert kept == OF_STEP_2 != files(saved_run.folder)
    assert checkpoint.named_checkpoints(saved_run.folder) == ["model-2"]
    go_on.set()
    manager.close()
    assert files(saved_run.folder) == OF_STEP_2


def test_save_writes_a_step_once(saved_run, capsys):
    manager = saved_run.manager()
    saved_run.save(1, manager)
    capsys.readouterr()
    saved_run.save(1, manager)
    assert capsys.readouterr().out == ""


def test_are_weights_finite_finds_an_infinite_weight(saved_run):
    saved_run.set(1)
    assert saved_run.manager().are_weights_finite()
    variable = saved_run.variables["model/ln_f/b"]
    value = np.array([0, 0, 0, np.inf, 0, 0, 0, 0], np.float32)
    saved_run.sess.run(variable.initializer, {variable.initializer.inputs[1]: value})
    assert not saved_run.manager().are_weights_finite()


def test_old_checkpoint_that_cannot_be_moved_is_a_warning(saved_run, monkeypatch):
    def refuse(folder, names):
        raise PermissionError(errno.EACCES, "Permission denied")

    manager = saved_run.manager()
    saved_run.save(1, manager)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "move_to_trash", refuse)
        with pytest.warns(UserWarning, match="old files in .* cannot be removed: Permission deni"):
            saved_run.save(2, manager)
    assert saved_run.saved() == (2, 2.0)
    saved_run.save(3, manager)
    assert checkpoint.named_checkpoints(saved_run.folder) == ["model-3"]
    assert not [name for name in files(saved_run.folder) if "-1." in name or "-2." in name]


def test_save_works_when_no_thread_can_start(saved_run, monkeypatch):
    def refuse(*_):
        raise RuntimeError("cannot schedule new futures after interpreter shutdown")

    manager = saved_run.manager()
    saved_run.save(1, manager)
    monkeypatch.setattr(ThreadPoolExecutor, "submit", refuse)
    monkeypatch.setattr(threading.Thread, "start", refuse)
    saved_run.save(2, manager)
    assert files(saved_run.folder) == OF_STEP_2
    assert saved_run.saved() == (2, 2.0)


def test_save_after_the_current_folder_changed(sess, tmp_path, monkeypatch):
    for name in ("run", "elsewhere"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    saved_run = SavedRun(sess, "run")
    manager = saved_run.manager()
    saved_run.save(1, manager)
    monkeypatch.chdir("elsewhere")
    assert saved_run.save(2, manager) == "run/model-2"
    assert manager.latest_path == str(tmp_path / "run" / "model-2")
    assert files(tmp_path / "run") == OF_STEP_2
    assert not os.listdir(tmp_path / "elsewhere")


def test_removed_folder_is_made_again(sess, tmp_path, capsys):
    saved_run = SavedRun(sess, tmp_path / "run")
    (tmp_path / "run").mkdir()
    manager = saved_run.manager()
    saved_run.save(1, manager)
    shutil.rmtree(tmp_path / "run")
    saved_run.save(2, manager)
    assert files(tmp_path / "run") == OF_STEP_2
    assert f"{tmp_path / 'run'} was removed; it is made again\n" in capsys.readouterr().out
    shutil.rmtree(tmp_path / "run")
    saved_run.save(2, manager)  # the step is the same, and its files are not there
    assert saved_run.saved() == (2, 2.0)


def test_resume_keeps_the_checkpoint_that_it_began_from(saved_run):
    saved_run.save(1, saved_run.manager())
    resumed = saved_run.manager()
    saved_run.save(2, resumed)
    saved_run.save(3, resumed)
    assert checkpoint.named_checkpoints(saved_run.folder) == ["model-1", "model-3"]
    assert checkpoint.is_whole(os.path.join(saved_run.folder, "model-1"))
    assert not [name for name in files(saved_run.folder) if "-2." in name]
    overwriting = saved_run.manager()
    overwriting.overwrite()
    saved_run.save(4, overwriting)
    assert checkpoint.named_checkpoints(saved_run.folder) == ["model-4"]
