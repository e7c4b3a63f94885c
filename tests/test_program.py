"""The command line as a process of its own: what reaches standard error, and Ctrl-C."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gpt_2_simple.common import stderr_filter

PROGRAM = [sys.executable, "-m", "gpt_2_simple"]
NOTES = """\
WARNING: All log messages before absl::InitializeLog() is called are written to STDERR
I0000 00:00:1795721342.253539   27505 port.cc:153] oneDNN custom operations are on. You may see
W0000 00:00:1795721342.253539   27505 gpu_device.cc:2341] Cannot dlopen some GPU libraries.
To enable the following instructions: AVX2 FMA, in other operations, rebuild TensorFlow
2026-01-31 00:00:00.000000: I tensorflow/core/util/port.cc:113] oneDNN custom operations are on.
E0000 00:00:1731000000.000000    100 cuda_dnn.cc:8310] Unable to register cuDNN factory: already
E0000 00:00:1795721681.837199   28966 util.cc:131] oneDNN supports DT_INT32 only on platforms with
""".splitlines()
REAL = """\
F0000 00:00:1795721681.837199   28966 tensor.cc:100] Check failed: dtype() == expected_dtype
E0000 00:00:1795721681.837199   28966 gpu.cc:1] CUDA_ERROR_OUT_OF_MEMORY: out of memory
Segmentation fault (core dumped)
I think this is a line of a user's own
Traceback (most recent call last):

""".splitlines()
CUINIT = "E0000 00:00:1.0 1 cuda_platform.cc:52] failed call to cuInit: UNKNOWN ERROR (303)"


def environment(**more):
    kept = {k: v for k, v in os.environ.items() if k not in ("TF_CPP_MIN_LOG_LEVEL", "GPT2_DEBUG")}
    return {**kept, **more}


def test_notes_are_told_from_other_lines():
    assert [line for line in NOTES if not stderr_filter.is_note(line)] == []
    assert [line for line in REAL if stderr_filter.is_note(line)] == []


def test_a_driver_that_fails_is_told_where_there_is_a_card(tmp_path, monkeypatch):
    monkeypatch.setattr(stderr_filter, "_NVIDIA_DEVICES", (str(tmp_path / "none"),))
    assert stderr_filter.is_note(CUINIT)
    monkeypatch.setattr(stderr_filter, "_NVIDIA_DEVICES", (str(tmp_path),))
    assert not stderr_filter.is_note(CUINIT)


def test_lines_that_are_no_notes_pass_unchanged():
    """Bytes that are no UTF-8, lines of megabytes, a last line without an end."""
    kept = [b"\xff\x00 latin \xe9", b"", b"a\rb\r", b"x" * 5_000_000, *(r.encode() for r in REAL)]
    given = [line for one in kept for line in (one, NOTES[0].encode(), NOTES[1].encode())]
    done = subprocess.run(
        [sys.executable, "-I", "-S", stderr_filter.__file__],
        input=b"\n".join([*given, b"the end"]),
        stdout=subprocess.PIPE,
        check=True,
    )
    assert done.stdout == b"\n".join([*kept, b"the end"])


@pytest.mark.skipif(sys.platform == "win32", reason="standard error is not filtered there")
def test_last_words_of_a_killed_process_come_through():
    """C code writes to descriptor 2; the process dies before it could read its own pipe."""
    code = (
        "import os, sys; from gpt_2_simple.common.stderr_filter import filter_stderr\n"
        "filter_stderr(); sys.stderr.write('from Python\\n')\n"
        f"os.write(2, {(NOTES[1] + chr(10)).encode()!r} + b'from C\\n'); os.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-c", code], stderr=subprocess.PIPE, check=False)
    assert done.returncode == -9
    assert sorted(done.stderr.splitlines()) == [b"from C", b"from Python"]


@pytest.mark.skipif(sys.platform == "win32", reason="standard error is not filtered there")
@pytest.mark.parametrize("text", [b"\0", b" 10%\r", b"x" * 70_000])
def test_what_can_be_no_note_does_not_wait_for_the_end_of_its_line(text):
    command = [sys.executable, "-I", "-S", stderr_filter.__file__]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        process.stdin.write(text)
        process.stdin.flush()
        assert process.stdout.read(len(text)) == text
        process.stdin.close()


@pytest.fixture
def run(workplace):
    """A current folder with a run in it."""
    words = ["finetune", "text.txt", "--model_name", "tiny", "--steps", "1", "--sample_every", "0"]
    done = subprocess.run([*PROGRAM, *words], env=environment(), capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    return workplace


@pytest.mark.skipif(sys.platform == "win32", reason="standard error is not filtered there")
def test_standard_error_holds_only_our_own_lines(run):
    words = ["generate", "--length", "3", "--destination_path", "out.txt"]
    done = subprocess.run([*PROGRAM, *words], env=environment(), capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    again = subprocess.run([*PROGRAM, *words], env=environment(), capture_output=True, text=True)
    assert again.returncode == 1
    assert re.fullmatch(r"gpt_2_simple: error: .*out\.txt.*\n", again.stderr)


@pytest.mark.parametrize("how", [{"TF_CPP_MIN_LOG_LEVEL": "0"}, {"GPT2_DEBUG": "1"}])
def test_who_asks_gets_the_notes(run, how):
    words = ["generate", "--length", "3"]
    done = subprocess.run(
        [*PROGRAM, *words], env=environment(**how), capture_output=True, text=True
    )
    assert done.returncode == 0
    assert any(stderr_filter.is_note(line) for line in done.stderr.splitlines())


@pytest.mark.skipif(sys.platform == "win32", reason="Ctrl-C is sent in another way there")
@pytest.mark.parametrize("seconds", [0.2, 0.7, 1.2, 1.9, 2.6, 3.5, 4.5])
def test_ctrl_c_leaves_a_line_and_130(run, seconds):
    """Wherever it comes: while modules, TensorFlow or the run are loaded, or in generating."""
    Path("start.py").write_text(
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from gpt_2_simple.__main__ import run; print(flush=True); sys.exit(run())\n"
    )
    process = subprocess.Popen(
        [sys.executable, "start.py", "generate", "--length", "30", "--nsamples", "100000"],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "\n"  # Python is up
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=100)
    assert (process.returncode, error) == (130, "gpt_2_simple: interrupted\n")
