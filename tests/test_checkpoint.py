"""A checkpoint is saved whole or not at all, whatever happens meanwhile."""

import contextlib
import errno
import fcntl
import os
import resource
import shutil
import subprocess
import tempfile

import numpy as np
import pytest
import tensorflow as tf
from saved_run import OF_STEP_2, SavedRun, files

from gpt_2_simple.storage import checkpoint, checkpoint_ops, runs


@pytest.fixture
def saved_run(sess, tmp_path):
    return SavedRun(sess, tmp_path)


class PowerCut(BaseException):
    pass


class Power:
    """Cuts the power at a given file operation: from then on none has any effect."""

    def __init__(self, monkeypatch, last):
        self.left = last
        for module, name in [
            (os, "replace"), (os, "rename"), (os, "remove"), (os, "rmdir"), (os, "chmod"),
            (tempfile, "mkdtemp"), (tempfile, "mkstemp"), (checkpoint, "sync"),
        ]:  # fmt: skip
            monkeypatch.setattr(module, name, self.guard(getattr(module, name)))
        monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)
        monkeypatch.setattr(os, "fsync", lambda _: None)

    def guard(self, function):
        def guarded(*args, **options):
            self.left -= 1
            if self.left < 0:
                raise PowerCut
            return None if function.__name__ == "sync" else function(*args, **options)

        return guarded


def first_save(saved_run):
    saved_run.save(1, saved_run.manager(resume=False))


def next_step(saved_run):
    saved_run.save(2, saved_run.manager())


def same_step(saved_run):
    saved_run.save(1, saved_run.manager(resume=False), value=2)


def best(saved_run):
    saved_run.set(2)
    saved_run.manager().save_best()


@pytest.mark.parametrize("save", [next_step, same_step])
def test_power_cut_at_any_moment_leaves_a_whole_checkpoint(saved_run, save):
    seen = set()
    for moment in range(100):
        for name in os.listdir(saved_run.folder):
            path = os.path.join(saved_run.folder, name)
            shutil.rmtree(path) if os.path.isdir(path) else os.remove(path)
        first_save(saved_run)
        with pytest.MonkeyPatch.context() as patch:
            Power(patch, moment)
            try:
                save(saved_run)
                cut = False
            except PowerCut:
                cut = True
        if save is next_step:  # even before anybody repairs it
            assert saved_run.saved()[1] in (1.0, 2.0)
            named = checkpoint.named_checkpoints(saved_run.folder)[-1]
            assert checkpoint.is_whole(os.path.join(saved_run.folder, named))
        checkpoint.finish_saves(saved_run.folder)
        _, value = saved_run.saved()
        seen.add(value)
        assert not [name for name in files(saved_run.folder) if name.startswith(".")]
        manager = saved_run.manager()
        manager.overwrite()  # else the checkpoint that it resumes from is kept
        saved_run.save(3, manager)
        assert files(saved_run.folder) == [name.replace("-2.", "-3.") for name in OF_STEP_2]
        if not cut:
            break
    assert not cut
    assert moment > 15
    assert seen == {1.0, 2.0}


def test_power_cut_leaves_the_old_or_the_new_best_checkpoint(saved_run):
    first_save(saved_run)
    prefix = os.path.join(saved_run.folder, "best")
    seen = set()
    for moment in range(100):
        saved_run.set(1)
        saved_run.manager().save_best()
        with pytest.MonkeyPatch.context() as patch:
            Power(patch, moment)
            try:
                best(saved_run)
                cut = False
            except PowerCut:
                cut = True
        runs.finish_saves_unless_trained(saved_run.folder)
        value = tf.train.load_checkpoint(prefix).get_tensor("model/wte")
        seen.add(np.unique(value).item())
        checkpoint.finish_saves(saved_run.folder)
        if not cut:
            break
    assert not cut
    assert seen == {1.0, 2.0}


@contextlib.contextmanager
def file_size_limit(size):
    """No file may grow beyond `size` bytes: what a full disk or a quota does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(
    "full", ["model-1.data-00000-of-00001", "optimizer-1.data-00000-of-00001", "model-1.meta"]
)
def test_full_disk_leaves_the_checkpoint_before(saved_run, full):
    saved_run.save(1, saved_run.manager(resume=False))
    before = files(saved_run.folder)
    size = os.path.getsize(os.path.join(saved_run.folder, full))
    manager = saved_run.manager()
    with (
        file_size_limit(size - 1),
        pytest.raises(
            OSError, match="model-2: .*File too large.{0,9} Earlier checkpoints are untouched"
        ),
    ):
        saved_run.save(2, manager)
    assert manager.failed
    assert files(saved_run.folder) == before
    assert saved_run.saved() == (1, 1.0)
    saved_run.save(2, saved_run.manager())
    assert saved_run.saved() == (2, 2.0)


def test_full_file_system_leaves_the_checkpoint_before(saved_run):
    disk = os.path.join(saved_run.folder, "disk")
    os.mkdir(disk)
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=400k", "none", disk], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("only root can make a small file system")
    try:
        saved_run.folder = disk
        with open(os.path.join(disk, "other"), "wb") as file:
            saved_run.save(1, saved_run.manager(resume=False))
            file.write(bytes(shutil.disk_usage(disk).free - 4096))
        with pytest.raises(OSError, match="model-2: No space left on device. Earlier .*free some"):
            saved_run.save(2, saved_run.manager())
        assert saved_run.saved() == (1, 1.0)
        os.remove(os.path.join(disk, "other"))
        saved_run.save(2, saved_run.manager())
        assert saved_run.saved() == (2, 2.0)
    finally:
        subprocess.run(["umount", disk], check=True)


def test_save_where_files_are_flushed_only_if_open_for_writing(saved_run, monkeypatch):
    def fsync(descriptor):
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, "Bad file descriptor")  # as on Windows

    monkeypatch.setattr(os, "fsync", fsync)
    saved_run.save(1, saved_run.manager(resume=False))
    assert saved_run.saved() == (1, 1.0)


def test_save_where_rename_refuses_an_existing_target(saved_run, monkeypatch):
    rename = os.replace

    def refuse(source, target):
        if os.path.exists(target):
            raise FileExistsError(errno.EEXIST, "File exists")
        rename(source, target)

    monkeypatch.setattr(os, "replace", refuse)
    first_save(saved_run)
    next_step(saved_run)
    assert saved_run.saved() == (2, 2.0)


def test_restore_where_inode_numbers_change(saved_run, monkeypatch):
    first_save(saved_run)
    monkeypatch.setattr(os.path, "samestat", lambda a, b: False)
    ops = saved_run.state.build_once(checkpoint_ops.build_restore, *saved_run.variables.values())
    checkpoint_ops.restore(saved_run.sess, ops, os.path.join(saved_run.folder, "model-1"))


def test_save_without_locks_is_left_to_the_process_that_trains(saved_run, monkeypatch):
    def flock(file, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    first_save(saved_run)
    half = os.path.join(saved_run.folder, f"{checkpoint.FINISHED}model-2")
    os.makedirs(half)
    os.makedirs(os.path.join(saved_run.folder, f"{checkpoint.UNFINISHED}x"))
    monkeypatch.setattr(fcntl, "flock", flock)
    before = sorted(os.listdir(saved_run.folder))
    runs.finish_saves_unless_trained(saved_run.folder)
    assert sorted({*os.listdir(saved_run.folder), ".lock"}) == sorted({*before, ".lock"})
