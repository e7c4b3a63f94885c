"""A lock that one process or thread holds: a second one fails at once, or waits."""

import contextlib
import errno
import os
import signal
import subprocess
import sys
import tempfile
import threading

import pytest

from gpt_2_simple.common import locks

HOLD = """
import fcntl, sys
file = open(sys.argv[1], "a+")
fcntl.flock(file, fcntl.LOCK_EX)
file.write("process 4711 on elsewhere")
file.flush()
print("locked", flush=True)
sys.stdin.read()
"""


def test_run_lock_names_its_holder_and_ends_with_its_process(tmp_path):
    path = str(tmp_path / ".lock")
    holder = subprocess.Popen(
        [sys.executable, "-I", "-c", HOLD, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with holder:
        assert holder.stdout.readline() == b"locked\n"
        with (
            pytest.raises(RuntimeError, match="is being trained by process 4711 on elsewhere"),
            locks.lock_run(str(tmp_path)),
        ):
            pass
        holder.send_signal(signal.SIGKILL)
    with locks.lock_run(str(tmp_path)), open(path) as file:
        assert file.read().startswith(f"process {os.getpid()} on ")


def test_run_lock_excludes_a_second_holder_in_one_process(tmp_path):
    with (
        locks.lock_run(str(tmp_path)),
        pytest.raises(RuntimeError, match=f"process {os.getpid()} on "),
        locks.lock_run(str(tmp_path)),
    ):
        pass
    with locks.lock_run(str(tmp_path)):
        pass


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_forked_child_does_not_keep_the_lock(tmp_path):
    reader, writer = os.pipe()
    lives, alive = os.pipe()
    with locks.lock_run(str(tmp_path)):
        child = os.fork()
        if child == 0:
            try:
                os.close(writer)
                os.write(alive, b"x")
                os.read(reader, 1)  # lives until the parent has looked
            finally:
                os._exit(0)
        assert os.read(lives, 1) == b"x"
        assert locks.run_lock_state(str(tmp_path)) is locks.LockState.HELD
    try:
        assert locks.run_lock_state(str(tmp_path)) is locks.LockState.FREE
        with locks.lock_run(str(tmp_path)):
            pass
    finally:
        os.close(writer)
        os.waitpid(child, 0)
        for end in (reader, lives, alive):
            os.close(end)


def test_run_lock_refuses_a_folder_that_is_a_file(tmp_path):
    (tmp_path / "run1").write_text("mine")
    with pytest.raises(NotADirectoryError, match="run1 is a file; give another run_name"):
        with locks.lock_run(str(tmp_path / "run1")):
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


def test_run_lock_of_a_read_only_folder_is_a_clear_error():
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o555)
        with (
            somebody_else(),
            pytest.raises(PermissionError, match="cannot write in .* give another checkpoint_dir"),
            locks.lock_run(folder),
        ):
            pass
        os.chmod(folder, 0o755)
        assert os.listdir(folder) == []


def test_wait_for_lock_waits_for_the_holder_and_says_so(tmp_path, capsys):
    path = tmp_path / "lock"
    held, release = threading.Event(), threading.Event()

    def hold():
        with locks.wait_for_lock(path, "never said"):
            held.set()
            release.wait(60)

    holder = threading.Thread(target=hold)
    holder.start()
    assert held.wait(60)
    threading.Timer(0.5, release.set).start()
    with locks.wait_for_lock(path, "waiting"):
        assert release.is_set()
        assert path.exists()
    holder.join()
    assert capsys.readouterr().out == "waiting\n"
    assert not path.exists()


def test_wait_for_lock_ignores_a_file_that_its_owner_has_just_removed(tmp_path, monkeypatch):
    path, tries, try_lock = tmp_path / "lock", [], locks._try_lock

    def lose_the_race(file):
        tries.append(file)
        if len(tries) == 1:  # between our opening of the file and our locking it
            path.unlink()
        return try_lock(file)

    monkeypatch.setattr(locks, "_try_lock", lose_the_race)
    with locks.wait_for_lock(path, "waiting"):
        assert len(tries) == 2
        assert os.path.samestat(os.fstat(tries[1].fileno()), path.stat())
    assert not path.exists()


def test_locks_are_skipped_where_the_file_system_has_none(tmp_path, monkeypatch):
    def flock(file, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(locks.fcntl, "flock", flock)
    with locks.lock_run(str(tmp_path)), locks.lock_run(str(tmp_path)):
        pass
    with locks.wait_for_lock(tmp_path / "lock", "waiting"):
        pass


def test_run_lock_state_takes_no_lock_and_writes_nothing(tmp_path):
    folder = str(tmp_path)
    assert locks.run_lock_state(folder) is locks.LockState.FREE
    assert os.listdir(folder) == []
    with locks.lock_run(folder):
        text = (tmp_path / ".lock").read_text()
        assert locks.run_lock_state(folder) is locks.LockState.HELD
        assert (tmp_path / ".lock").read_text() == text
    assert locks.run_lock_state(folder) is locks.LockState.FREE


def test_run_lock_waits_for_a_process_that_only_asks(tmp_path, monkeypatch):
    with locks.lock_run(str(tmp_path)):
        pass
    asking = open(tmp_path / ".lock", "rb")  # noqa: SIM115
    locks.fcntl.flock(asking, locks.fcntl.LOCK_SH)
    monkeypatch.setattr(locks.time, "sleep", lambda _: asking.close())
    with locks.lock_run(str(tmp_path)) as state:
        assert asking.closed
        assert state is locks.LockState.FREE


def test_wait_for_lock_where_inode_numbers_change(tmp_path, monkeypatch):
    monkeypatch.setattr(os.path, "samestat", lambda a, b: False)
    with locks.wait_for_lock(tmp_path / "lock", "waiting"):
        assert (tmp_path / "lock").exists()
    assert not (tmp_path / "lock").exists()
