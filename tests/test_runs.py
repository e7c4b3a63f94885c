"""A run's folder: locks, saves that are whole or not there, and what resumes from them."""

import contextlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading

import numpy as np
import pytest
import tensorflow as tf

import gpt_2_simple as gpt2
from gpt_2_simple import model, session
from gpt_2_simple.common import locks
from gpt_2_simple.storage import checkpoint, checkpoint_manager, runs
from gpt_2_simple.training.optimizer import make_optimizer

# --- the lock -----------------------------------------------------------------------------------

HOLD = """
import fcntl, sys
file = open(sys.argv[1], "a+")
fcntl.flock(file, fcntl.LOCK_EX)
file.write("process 4711 on elsewhere")
file.flush()
print("locked", flush=True)
sys.stdin.read()
"""


def test_the_second_process_is_told_and_a_dead_ones_lock_is_taken_over(tmp_path):
    path = str(tmp_path / ".lock")
    holder = subprocess.Popen(
        [sys.executable, "-I", "-c", HOLD, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with holder:
        assert holder.stdout.readline() == b"locked\n"
        with (
            pytest.raises(RuntimeError, match="is being trained by process 4711 on elsewhere"),
            locks.lock(str(tmp_path)),
        ):
            pass
        holder.send_signal(signal.SIGKILL)
    with locks.lock(str(tmp_path)), open(path) as file:
        assert file.read().startswith(f"process {os.getpid()} on ")


def test_two_sessions_of_one_process_are_told_apart_too(tmp_path):
    with (
        locks.lock(str(tmp_path)),
        pytest.raises(RuntimeError, match=f"process {os.getpid()} on "),
        locks.lock(str(tmp_path)),
    ):
        pass
    with locks.lock(str(tmp_path)):
        pass


def test_a_run_folder_that_is_a_file_is_an_error(tmp_path):
    (tmp_path / "run1").write_text("mine")
    with pytest.raises(NotADirectoryError, match="run1 is a file; give another run_name"):
        with locks.lock(str(tmp_path / "run1")):
            pass
    assert (tmp_path / "run1").read_text() == "mine"


@contextlib.contextmanager
def somebody_else():
    """Runs as a user who owns nothing: root may write in read-only folders."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_a_read_only_folder_is_a_clear_error():
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o555)
        with (
            somebody_else(),
            pytest.raises(PermissionError, match="cannot write in .* give another checkpoint_dir"),
            locks.lock(folder),
        ):
            pass
        os.chmod(folder, 0o755)
        assert os.listdir(folder) == []


# --- saves --------------------------------------------------------------------------------------

HPARAMS = model.HParams(n_vocab=50, n_ctx=8, n_embd=8, n_head=2, n_layer=1)


class Setup:
    """A small model with an optimizer, whose values tell which step they are of."""

    def __init__(self, sess, folder):
        self.sess, self.folder = sess, str(folder)
        self.state = session.build_model(sess, HPARAMS, [])
        self.variables = session.named_variables(self.state)
        with sess.graph.as_default():
            optimizer = make_optimizer("adam", 0.1)
            for variable in self.variables.values():
                optimizer.apply(tf.zeros(variable.shape), variable)
        self.optimizer = {v.op.name: v for v in optimizer.variables()}

    def saves(self, max_checkpoints=1, resume=True):
        latest = checkpoint.latest_checkpoint(self.folder) if resume else None
        variables = list(self.optimizer.values())
        return checkpoint_manager.CheckpointManager(
            self.sess, self.state, self.folder, max_checkpoints, variables, latest
        )

    def set(self, value):
        for variable in [*self.variables.values(), *self.optimizer.values()]:
            array = np.full(variable.shape, value, variable.dtype.as_numpy_dtype)
            self.sess.run(variable.initializer, {variable.initializer.inputs[1]: array})

    def save(self, step, saves, value=None):
        self.set(step if value is None else value)
        run = runs.RunState(step=step, seconds=step if value is None else value)
        with contextlib.closing(saves):
            return saves.save(run)

    def saved(self):
        """What the latest checkpoint holds: its step, and the one value all of it has."""
        latest = checkpoint.latest_checkpoint(self.folder)
        step = runs.step_of(latest)
        reader = tf.train.load_checkpoint(latest)
        values = {float(v) for name in self.variables for v in np.unique(reader.get_tensor(name))}
        assert set(reader.get_variable_to_shape_map()) == set(self.variables)
        reader = tf.train.load_checkpoint(latest.replace("model-", "optimizer-"))
        for name in self.optimizer:
            values |= {float(v) for v in np.unique(reader.get_tensor(name))}
        values.add(float(runs.read_state(latest).seconds))
        assert len(values) == 1
        return step, values.pop()


@pytest.fixture
def setup(sess, tmp_path):
    return Setup(sess, tmp_path)


def files(folder):
    return sorted(name for name in os.listdir(folder) if not name.startswith(".lock"))


OF_STEP_2 = [
    "checkpoint", "counter", "model-2.data-00000-of-00001", "model-2.index", "model-2.meta",
    "optimizer-2.data-00000-of-00001", "optimizer-2.index", "state-2.json",
]  # fmt: skip


def test_a_save_holds_all_and_lets_go_of_the_one_before(setup):
    saves = setup.saves()
    assert setup.save(1, saves) == os.path.join(setup.folder, "model-1")
    setup.save(2, saves)
    assert files(setup.folder) == OF_STEP_2
    assert setup.saved() == (2, 2.0)
    assert tf.train.latest_checkpoint(setup.folder) == os.path.join(setup.folder, "model-2")
    with open(os.path.join(setup.folder, "counter")) as file:
        assert file.read() == "2\n"


def test_max_checkpoints_keeps_the_newest_and_0_keeps_all(setup):
    saves = setup.saves(2)
    for step in (1, 2, 3):
        setup.save(step, saves)
    assert checkpoint.named_checkpoints(setup.folder) == ["model-2", "model-3"]
    assert not [name for name in files(setup.folder) if "-1." in name]
    saves = setup.saves(0)
    setup.save(4, saves)
    assert checkpoint.named_checkpoints(setup.folder) == ["model-2", "model-3", "model-4"]


def test_nothing_is_removed_that_the_run_did_not_write(setup):
    theirs = ["model-7.index", "model-1x.data", "optimizer-9.index", "state-1", "model-10.meta"]
    for name in theirs:
        with open(os.path.join(setup.folder, name), "w") as file:
            file.write(name)
    saves = setup.saves(resume=False)
    setup.save(1, saves)
    setup.save(2, saves)
    assert files(setup.folder) == sorted(OF_STEP_2 + theirs)


def test_a_fresh_start_keeps_what_an_earlier_one_saved(setup):
    setup.save(5, setup.saves(resume=False))
    fresh = setup.saves(resume=False)
    setup.save(1, fresh)
    setup.save(2, fresh)
    assert setup.saved() == (2, 2.0)
    assert checkpoint.is_whole(os.path.join(setup.folder, "model-5"))


def test_the_removal_of_the_one_before_holds_nothing_up(setup, monkeypatch):
    go_on = threading.Event()
    remove = checkpoint.remove
    monkeypatch.setattr(checkpoint, "remove", lambda folder: go_on.wait(60) and remove(folder))
    setup.set(0)
    saves = setup.saves()
    saves.save(runs.RunState(step=1))
    saves.save(runs.RunState(step=2))
    kept = [name for name in files(setup.folder) if not name.startswith(checkpoint.REMOVED)]
    assert kept == OF_STEP_2 != files(setup.folder)
    assert checkpoint.named_checkpoints(setup.folder) == ["model-2"]
    go_on.set()
    saves.close()
    assert files(setup.folder) == OF_STEP_2


def test_a_step_is_saved_once(setup, capsys):
    saves = setup.saves()
    setup.save(1, saves)
    capsys.readouterr()
    setup.save(1, saves)
    assert capsys.readouterr().out == ""


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


def first_save(setup):
    setup.save(1, setup.saves(resume=False))


def next_step(setup):
    setup.save(2, setup.saves())


def same_step(setup):
    setup.save(1, setup.saves(resume=False), value=2)


def best(setup):
    setup.set(2)
    setup.saves().save_best()


@pytest.mark.parametrize("save", [next_step, same_step])
def test_a_power_cut_at_any_moment_leaves_a_whole_checkpoint(setup, save):
    seen = set()
    for moment in range(100):
        for name in os.listdir(setup.folder):
            path = os.path.join(setup.folder, name)
            shutil.rmtree(path) if os.path.isdir(path) else os.remove(path)
        first_save(setup)
        with pytest.MonkeyPatch.context() as patch:
            Power(patch, moment)
            try:
                save(setup)
                cut = False
            except PowerCut:
                cut = True
        if save is next_step:  # even before anybody repairs it
            assert setup.saved()[1] in (1.0, 2.0)
            named = checkpoint.named_checkpoints(setup.folder)[-1]
            assert checkpoint.is_whole(os.path.join(setup.folder, named))
        checkpoint.recover(setup.folder)
        _, value = setup.saved()
        seen.add(value)
        assert not [name for name in files(setup.folder) if name.startswith(".")]
        setup.save(3, setup.saves())
        assert files(setup.folder) == [name.replace("-2.", "-3.") for name in OF_STEP_2]
        if not cut:
            break
    assert not cut
    assert moment > 15
    assert seen == {1.0, 2.0}


def test_a_power_cut_leaves_the_old_best_or_the_new(setup):
    first_save(setup)
    prefix = os.path.join(setup.folder, "best")
    seen = set()
    for moment in range(100):
        setup.set(1)
        setup.saves().save_best()
        with pytest.MonkeyPatch.context() as patch:
            Power(patch, moment)
            try:
                best(setup)
                cut = False
            except PowerCut:
                cut = True
        runs.recover(setup.folder)
        value = tf.train.load_checkpoint(prefix).get_tensor("model/wte")
        seen.add(np.unique(value).item())
        checkpoint.recover(setup.folder)
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
def test_a_full_disk_leaves_the_checkpoint_before(setup, full):
    setup.save(1, setup.saves(resume=False))
    before = files(setup.folder)
    size = os.path.getsize(os.path.join(setup.folder, full))
    saves = setup.saves()
    with (
        file_size_limit(size - 1),
        pytest.raises(
            OSError, match="model-2: .*File too large.{0,9} Earlier checkpoints are untouched"
        ),
    ):
        setup.save(2, saves)
    assert saves.failed
    assert files(setup.folder) == before
    assert setup.saved() == (1, 1.0)
    setup.save(2, setup.saves())
    assert setup.saved() == (2, 2.0)


def test_a_full_file_system_leaves_the_checkpoint_before(setup):
    disk = os.path.join(setup.folder, "disk")
    os.mkdir(disk)
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=400k", "none", disk], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("only root can make a small file system")
    try:
        setup.folder = disk
        with open(os.path.join(disk, "other"), "wb") as file:
            setup.save(1, setup.saves(resume=False))
            file.write(bytes(shutil.disk_usage(disk).free - 4096))
        with pytest.raises(OSError, match="model-2: No space left on device. Earlier .*free some"):
            setup.save(2, setup.saves())
        assert setup.saved() == (1, 1.0)
        os.remove(os.path.join(disk, "other"))
        setup.save(2, setup.saves())
        assert setup.saved() == (2, 2.0)
    finally:
        subprocess.run(["umount", disk], check=True)


# --- what is beside the weights -------------------------------------------------------------------


def test_the_optimizers_state_is_restored_if_it_fits(setup, capsys):
    setup.save(3, setup.saves(resume=False))
    setup.set(0)
    assert setup.saves().restore_optimizer()
    assert setup.sess.run(setup.optimizer["optimizer/adam/step"]) == 3
    assert np.all(setup.sess.run(setup.optimizer["optimizer/adam/m/model/wpe"]) == 3)
    assert capsys.readouterr().out.count("anew") == 0


def test_an_optimizer_without_state_or_with_anothers_starts_anew(setup, capsys):
    setup.save(3, setup.saves(resume=False))
    left_out = setup.optimizer.pop("optimizer/adam/m/model/wpe")
    assert not setup.saves().restore_optimizer()
    assert "is of another optimizer, or other variables: the optimizer starts anew" in (
        capsys.readouterr().out
    )
    setup.optimizer["optimizer/adam/m/model/wpe"] = left_out
    path = os.path.join(setup.folder, "optimizer-3.data-00000-of-00001")
    with open(path, "r+b") as file:
        file.write(b"\xff\xff\xff\xff")
    assert not setup.saves().restore_optimizer()
    assert "is damaged" in capsys.readouterr().out
    os.remove(path)
    assert not setup.saves().restore_optimizer()
    assert "model-3 has no optimizer state beside it" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["", "[1]", '{"steps": 3}', '{"losses": [1]}', '{"step": 3'])
def test_a_state_that_cannot_be_read_is_said(tmp_path, text, capsys):
    (tmp_path / "state-3.json").write_text(text)
    assert runs.read_state(str(tmp_path / "model-3")) is None
    assert "has no state-3.json that can be read" in capsys.readouterr().out


def test_weights_that_are_not_finite_are_noticed(setup):
    setup.set(1)
    assert setup.saves().are_weights_finite()
    variable = setup.variables["model/ln_f/b"]
    value = np.array([0, 0, 0, np.inf, 0, 0, 0, 0], np.float32)
    setup.sess.run(variable.initializer, {variable.initializer.inputs[1]: value})
    assert not setup.saves().are_weights_finite()


def test_other_settings_are_said_in_one_line(tmp_path, capsys):
    folder = str(tmp_path)
    runs.note_settings(folder, {"batch_size": 1, "steps": 5, "dataset": ("a", "b")}, False)
    runs.note_settings(folder, {"batch_size": 1, "steps": 6, "dataset": ("a", "b")}, True)
    assert capsys.readouterr().out == ""
    runs.note_settings(folder, {"batch_size": 2, "dataset": "a"}, True)
    said = "This run goes on with other settings: batch_size 1 -> 2, dataset ['a', 'b'] -> a\n"
    assert capsys.readouterr().out == said
    (tmp_path / "settings.json").write_text("{")
    runs.note_settings(folder, {"batch_size": 2}, True)
    assert capsys.readouterr().out == ""
    assert json.loads((tmp_path / "settings.json").read_text()) == {"batch_size": 2}


# --- a run's folder and its model's -------------------------------------------------------------


def test_what_cannot_go_on_is_refused_before_anything_is_written(workplace, sess):
    gpt2.create_gpt2(model_name="wider", n_layer=2, n_head=2, n_embd=32, n_ctx=32)
    tiny = {"dataset": "text.txt", "steps": 1, "model_name": "tiny", "sample_every": 0}
    wider = {**tiny, "model_name": "wider"}
    gpt2.finetune(sess, **tiny)
    names = [name for name in os.listdir("checkpoint/run1") if name != ".lock"]
    before = [os.stat(f"checkpoint/run1/{name}").st_mtime_ns for name in names]

    with gpt2.start_tf_sess() as other:
        with pytest.raises(ValueError, match="run1 was made from a model of other sizes"):
            gpt2.finetune(other, **wider)
        with pytest.raises(ValueError, match="checkpoint/run1/model-1 does not fit its hparams"):
            gpt2.finetune(other, **wider, restore_from="checkpoint/run1", run_name="new")

    path = workplace / "models" / "tiny" / "encoder.json"
    kept = path.read_bytes()
    vocabulary = json.loads(kept)
    first, second = list(vocabulary)[:2]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    path.write_text(json.dumps(vocabulary), encoding="utf-8")
    with pytest.raises(ValueError, match=r"another vocabulary .* \(encoder\.json differs\)"):
        gpt2.finetune(sess, **tiny)
    assert before == [os.stat(f"checkpoint/run1/{name}").st_mtime_ns for name in names]

    path.write_bytes(kept)
    os.remove("checkpoint/run1/hparams.json")
    with pytest.raises(FileNotFoundError, match=r"run1: it has no hparams\.json"):
        gpt2.load_gpt2(sess)
    assert gpt2.finetune(sess, **tiny).step == 2
    gpt2.load_gpt2(sess)
