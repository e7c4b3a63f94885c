"""Workers on this machine: started, watched, stopped; what is told of them."""

import os
import signal
import subprocess
import sys
import time

import pytest

import gpt_2_simple as gpt2
from gpt_2_simple.distributed import launcher
from gpt_2_simple.distributed.launcher import Failure, LaunchSettings
from gpt_2_simple.storage import checkpoint
from gpt_2_simple.training.history import read_history

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs signals, ps and sh")

SETTINGS = {"model_name": "tiny", "batch_size": 2, "accumulate_gradients": 2, "sample_every": 0,
            "seed": 1}  # fmt: skip


@pytest.fixture(autouse=True)
def patience(monkeypatch):
    """Busy machines start processes slowly."""
    monkeypatch.setenv("GPT2_START_SECONDS", "200")


def children_of(pid):
    """The workers that a process has started and that have not ended."""
    found = subprocess.run(
        ["ps", "-A", "-ww", "-o", "pid=,ppid=,stat=,args="], capture_output=True, text=True
    )
    rows = [line.split(None, 3) for line in found.stdout.splitlines()]
    return [
        int(child)
        for child, parent, state, command in rows
        if int(parent) == pid and not state.startswith("Z") and ".worker" in command
    ]


def is_running(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def wait_until_gone(pids):
    for _ in range(1200):
        if not any(map(is_running, pids)):
            return
        time.sleep(0.1)
    raise AssertionError(f"still running: {pids}")


def test_launched_workers_train_as_one_process_does(workplace, sess, capsys):
    called = []
    result = gpt2.distributed.launch(
        "text.txt", workers=2, steps=4, run_name="two", on_step=called.append, **SETTINGS
    )
    one = gpt2.finetune(sess, "text.txt", 4, run_name="one", **SETTINGS)
    assert result.step == one.step == 4
    assert result.loss == pytest.approx(one.loss, rel=1e-5)
    assert result.checkpoint == os.path.join("checkpoint", "two", "model-4")
    assert type(result) is type(one)
    assert called == result.history == read_history("checkpoint/two")
    out = capsys.readouterr().out
    assert out.count("[4 | ") == 2  # worker 0's lines, and those of finetune()
    assert "Saving checkpoint/two/model-4\n" in out


def test_error_of_the_workers_is_raised_once_and_callers_end_them(workplace):
    def fail(entry):
        raise LookupError("mine")

    with pytest.raises(LookupError, match="mine"):
        gpt2.distributed.launch("text.txt", workers=2, on_step=fail, verbose=0, **SETTINGS)
    assert checkpoint.latest_checkpoint("checkpoint/run1") == "checkpoint/run1/model-1"
    assert children_of(os.getpid()) == []


@pytest.mark.parametrize("of_parent", [True, False])
def test_command_line_trains_with_workers_and_ends_them(workplace, of_parent):
    """Ctrl-C saves once and ends all; a worker that is killed ends all, and is named."""
    flags = [f"--{name}={value}" for name, value in SETTINGS.items()]
    command = [sys.executable, "-m", "gpt_2_simple", "finetune", "text.txt", "--workers", "2"]
    with subprocess.Popen(
        [*command, "--print_every=1", *flags],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        try:
            for line in process.stdout:
                if line.startswith("[3 | "):
                    break
            workers = children_of(process.pid)
            assert len(workers) == 2
            if of_parent:
                process.send_signal(signal.SIGINT)
            else:
                os.kill(workers[1], signal.SIGKILL)
            out, err = process.communicate(timeout=250)
        finally:
            process.kill()
    wait_until_gone(workers)
    latest = checkpoint.latest_checkpoint("checkpoint/run1")
    assert out.count("Saving") == 1
    assert f"Saving {latest}\n" in out
    if of_parent:
        assert process.returncode == 130, err
        assert "Stopping after this step, then saving" in out
        assert "Traceback" not in err
    else:
        assert process.returncode == 1
        assert "gpt_2_simple: error: worker 1 was killed by signal 9" in err
        assert f"The last checkpoint is {latest}: start all workers again" in err


def test_workers_save_and_end_when_their_launcher_is_killed(workplace):
    code = (
        "import gpt_2_simple as gpt2\n"
        f"gpt2.distributed.launch('text.txt', workers=2, on_step=print, **{SETTINGS!r})"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        for line in process.stdout:
            if line.startswith("Entry(step=3"):
                break
        workers = children_of(process.pid)
        process.kill()
    assert len(workers) == 2
    wait_until_gone(workers)
    assert int(checkpoint.latest_checkpoint("checkpoint/run1").rpartition("-")[2]) >= 3


# --- what needs no processes ----------------------------------------------------------------------


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A machine with so many GPUs; `machine(2)` puts an nvidia-smi on its path that says so."""

    def with_gpus(count, visible=None):
        monkeypatch.delenv("TF_CONFIG", raising=False)
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if visible is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        lines = "".join(f"echo 'GPU {n}: NVIDIA X (UUID: GPU-{n})'\n" for n in range(count))
        program = tmp_path / "nvidia-smi"
        program.write_text(f"#!/bin/sh\n{lines}echo '  MIG 1g.5gb Device 0'\n")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path))

    return with_gpus


def test_auto_is_one_worker_a_gpu(machine):
    machine(3)
    assert launcher.count_workers("auto") == 3
    assert launcher.count_workers(2) == 2
    with pytest.raises(ValueError, match=r"workers=4, but this machine has 3 GPUs: .*workers=3"):
        launcher.count_workers(4)
    machine(0)
    assert launcher.count_workers("auto") == 1
    assert launcher.count_workers(4) == 4


@pytest.mark.parametrize(
    ("visible", "found"),
    [("", []), ("-1", []), ("2,5", ["2", "5"]), (" GPU-a ,GPU-b", ["GPU-a", "GPU-b"])],
)
def test_only_gpus_that_the_user_lets_see_are_given_out(machine, visible, found):
    machine(3, visible)
    assert launcher._visible_gpus() == found
    assert launcher.count_workers("auto") == max(1, len(found))


def test_each_worker_gets_its_gpu_or_its_share_of_the_cores(machine, monkeypatch):
    monkeypatch.setattr(launcher, "_n_cores", lambda: 8)

    def jobs(count):
        workers = launcher._Workers(LaunchSettings("text.txt", on_step=print), count)
        workers._listener = launcher.socket.create_server(("127.0.0.1", 0))
        with workers._listener:
            return list(workers._jobs())

    machine(4, "4,6")
    found = jobs(2)
    assert [environment["CUDA_VISIBLE_DEVICES"] for _, environment in found] == ["4", "6"]
    assert [job.threads for job, _ in found] == [-1, -1]
    assert [job.calls_back for job, _ in found] == [True, False]
    machine(0)
    found = jobs(3)
    assert [job.threads for job, _ in found] == [2, 2, 2]
    assert len({environment["TF_CONFIG"] for _, environment in found}) == 3
    assert "on_step" not in found[0][0].settings
    assert "TF_CONFIG" not in jobs(1)[0][1]


def test_worker_does_not_launch_workers(machine, monkeypatch):
    machine(0)
    monkeypatch.setenv("TF_CONFIG", "{}")
    with pytest.raises(ValueError, match="workers=2 starts workers .*unset TF_CONFIG"):
        launcher.count_workers(2)


def test_fewer_micro_batches_than_workers_are_told_before_a_process_starts(monkeypatch):
    monkeypatch.setattr(launcher, "_Workers", None)
    with pytest.raises(ValueError, match="accumulate_gradients=2 .* fewer than the 3 workers"):
        launcher.train_in_processes(LaunchSettings("text.txt", accumulate_gradients=2), 3)


@pytest.mark.parametrize("wrong", [0, -1, "two", 1.5, None])
def test_wrong_number_of_workers_is_told(wrong):
    with pytest.raises(ValueError, match="must be a whole number, 1 or above, or 'auto'"):
        LaunchSettings("text.txt", workers=wrong)


def test_errors_keep_their_kinds_and_numbers():
    error = Failure("FileNotFoundError", "no model", 2).error()
    assert type(error) is FileNotFoundError
    assert (str(error), error.errno) == ("no model", 2)
    assert type(Failure("KeyboardInterrupt", "stopped").error()) is KeyboardInterrupt
    assert type(Failure("Exception", "of TensorFlow").error()) is RuntimeError
    assert type(Failure("print", "no error").error()) is RuntimeError
