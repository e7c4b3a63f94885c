"""benchmarks/gpu.py with a small model on the CPU: what it measures, and when it fails."""

import importlib.util
import os
import re
import sys
import time
from pathlib import Path

import pytest

from gpt_2_simple.training import memory_plan

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "gpu.py"
# A busy machine is no reason to leave something out.
UNHURRIED = ["--minutes", "60"]
REFERENCE = os.environ.get("GPT2_REFERENCE_PYTHON")


@pytest.fixture
def bench():
    source = importlib.util.spec_from_file_location("gpu_benchmark", SCRIPT)
    module = importlib.util.module_from_spec(source)
    sys.modules["gpu_benchmark"] = module  # dataclasses look their module up
    try:
        source.loader.exec_module(module)
        yield module
    finally:
        del sys.modules["gpu_benchmark"]


def rows(text, start):
    """The cells of the table rows that begin with `start`."""
    lines = [line for line in text.splitlines() if line.startswith(f"| {start}")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def number(cell):
    return float(cell.replace(",", ""))


def test_gpu_benchmark_measures_and_every_promise_holds_on_the_cpu(bench, capsys):
    options = ["--precisions", "float32", "bfloat16", "--batches", "1", "3", *UNHURRIED]
    status = bench.main(["--cpu", *options])
    said = capsys.readouterr().out
    assert status == 0, said
    compared = rows(said, "float32") + rows(said, "bfloat16")
    assert [row[0] for row in compared] == ["float32 without TF32", "float32", "bfloat16"]
    for name, logits, losses, _ in compared:
        assert (1e-4 < number(logits) < 0.1) == name.endswith("16"), name
        assert (1e-6 < number(losses) < 0.01) == name.endswith("16"), name
    trained = [row for row in rows(said, "small, ") if len(row) == 8]
    assert [row[1] for row in trained] == ["float32", "bfloat16", "float32"]
    assert "recompute" in trained[2][0]
    for _, _, plan, peak, seconds, *theirs in trained:
        assert 0.4 * number(plan) < number(peak) <= number(plan)
        assert number(seconds) > 0
        assert theirs == ["", "", ""]
    generated = [row for row in rows(said, "small, ") if len(row) == 4]
    assert [row[0] for row in generated] == ["small, float32", "small, bfloat16"]
    assert all(number(cell) > 0 for row in generated for cell in row[1:])
    assert "6 promises, 0 did not hold" in said
    assert len(re.findall("^held ", said, re.MULTILINE)) == 6


def test_gpu_benchmark_fails_and_names_the_promises_that_did_not_hold(bench, monkeypatch, capsys):
    # 29 MB hold the variables (16 MB) and not a step (36 MB). A limit near the variables' size
    # would starve Grappler too: it waits 10 s for each constant, which takes minutes as a whole.
    monkeypatch.setattr(memory_plan, "FRAGMENTATION", -0.45)
    monkeypatch.setitem(bench.TOLERANCES, "bfloat16", bench.Tolerance(1e-5, 1.0))
    assert bench.main(["--cpu", "--batches", "1", "--precisions", "bfloat16", *UNHURRIED]) == 1
    said = capsys.readouterr().out
    assert "DID NOT HOLD  bfloat16: logits and ten training steps are the CPU's" in said
    assert re.search(r"DID NOT HOLD  train small.*: out of memory; without a limit: peak \d", said)
    assert "2 promises, 2 did not hold" in said


def test_gpu_benchmark_needs_a_gpu(bench, monkeypatch, capsys):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    with pytest.raises(SystemExit) as ended:
        bench.main([])
    assert ended.value.code == 2
    assert "TensorFlow sees no GPU" in capsys.readouterr().err


@pytest.fixture
def started(bench, tmp_path):
    return bench.Bench(bench.parse_options(["--cpu"]), str(tmp_path))


def test_gpu_benchmark_keeps_what_was_measured_when_time_runs_out(
    bench, started, monkeypatch, tmp_path
):
    slow = tmp_path / "slow.py"
    slow.write_text(
        "import sys, time\n"
        "with open(sys.argv[2], 'a') as file: file.write('{\"seconds\": 1}\\n')\n"
        "time.sleep(60)\n"
    )
    monkeypatch.setattr(bench, "WORKER", slow)
    monkeypatch.setattr(bench, "MIN_SECONDS", 1.0)
    started.deadline = time.monotonic() + 3
    assert started.run("first", {}) == ([{"seconds": 1}], bench.OUT_OF_TIME)
    assert started.run("second", {}) == ([], bench.OUT_OF_TIME)
    assert started.left_out == ["first", "second"]


def test_gpu_benchmark_reports_a_worker_that_fails(bench, started):
    started.sizes = bench.ON_CPU._replace(models={"small": bench.HParams(n_embd=7, n_vocab=9)})
    assert bench.generate(started, "small", ["float32"]) == []
    (promise,) = started.promises
    assert promise.held is False
    assert "n_embd=7 must be a multiple of n_head=12" in promise.measured


def test_gpu_benchmark_compares_speeds_with_those_of_transformers(bench, started):
    assert bench.compare_speed(started, "train", 2.0, 1.0) == "2.00"
    assert bench.compare_speed(started, "generate", 1.0, 2.0) == "0.50"
    assert bench.compare_speed(started, "generate more", 1.0, None) == ""
    assert [promise.held for promise in started.promises] == [False, True]


@pytest.mark.skipif(not REFERENCE, reason="GPT2_REFERENCE_PYTHON names no Python with torch")
def test_gpu_benchmark_measures_transformers_beside(bench, capsys):
    bench.main(["--cpu", "--batches", "1", "--reference-python", REFERENCE, *UNHURRIED])
    said = capsys.readouterr().out
    trained = [row for row in rows(said, "small, ") if len(row) == 8]
    assert [number(row[5]) > 0 and number(row[7]) > 0 for row in trained] == [True] * 4
    generated = [row for row in rows(said, "small, ") if len(row) == 3]
    assert [bool(re.fullmatch(r"[\d,]+ \([\d,]+\)", row[1])) for row in generated] == [True] * 3
    assert said.count("no slower than transformers: ") == 7
