"""The history file: what is written, what survives, what is drawn."""

import json
import math
import sys
import types
from pathlib import Path

import numpy as np
import pytest

import gpt_2_simple as gpt2
from gpt_2_simple.training import history
from gpt_2_simple.training.history import Entry, History, read_history

STEPS = [Entry(step, step / 2, 5.0 / step, 0.1, 100.0) for step in range(1, 6)]


def write(folder, start, entries):
    writer = History(str(folder), start)
    for entry in entries:
        writer.add(entry)
    writer.close()


def test_history_entries_are_read_back(tmp_path):
    entries = [*STEPS, Entry(6, 3.0, 1.0, 0.05, 90.0, 1.25)]
    write(tmp_path, 0, entries)
    assert read_history(str(tmp_path)) == entries
    lines = (tmp_path / "history.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(lines[1]) == {
        "step": 1, "seconds": 0.5, "loss": 5.0, "learning_rate": 0.1, "tokens_per_second": 100.0
    }  # fmt: skip
    assert json.loads(lines[6])["validation_loss"] == 1.25


def test_history_counts_repeated_steps_once(tmp_path):
    write(tmp_path, 0, STEPS)
    write(tmp_path, 3, [STEPS[3]._replace(loss=0.5)])
    found = read_history(str(tmp_path))
    assert [(entry.step, entry.loss) for entry in found][2:] == [(3, 5 / 3), (4, 0.5)]


def test_fresh_start_voids_earlier_history(tmp_path):
    write(tmp_path, 0, STEPS)
    write(tmp_path, 0, [])
    assert read_history(str(tmp_path)) == []


@pytest.mark.parametrize("broken", ['{"step": 6, "lo', '{"step": 6', "\x00\x00\x00", "[1]", "\n"])
def test_broken_last_line_of_history_is_skipped(tmp_path, broken):
    write(tmp_path, 0, STEPS)
    with open(tmp_path / "history.jsonl", "a", encoding="utf-8") as file:
        file.write(broken)
    assert read_history(str(tmp_path)) == STEPS
    write(tmp_path, 5, [STEPS[0]._replace(step=6)])
    assert [entry.step for entry in read_history(str(tmp_path))] == [1, 2, 3, 4, 5, 6]


def test_history_line_with_missing_values(tmp_path):
    (tmp_path / "history.jsonl").write_text('{"step": 4, "loss": 2.5}\n')
    (entry,) = read_history(str(tmp_path))
    assert (entry.step, entry.loss, entry.validation_loss) == (4, 2.5, None)
    assert math.isnan(entry.seconds)


def test_missing_history_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"history\.jsonl"):
        read_history(str(tmp_path))


def test_smoothed_loss():
    assert history.smoothed([4.0, 2.0]) == [4.0, 2.0]
    noisy = [2.0 + (-1) ** step for step in range(1000)]
    calm = history.smoothed(noisy)
    assert len(calm) == 1000
    assert np.ptp(calm[500:]) < 0.1
    assert np.mean(calm[500:]) == pytest.approx(2.0, abs=0.01)


@pytest.fixture
def run(tmp_path):
    """A run's folder with a history of five steps, the third of them validated."""
    folder = tmp_path / "runs" / "mine"
    folder.mkdir(parents=True)
    (folder / "hparams.json").write_text("{}")
    write(folder, 0, [entry._replace(validation_loss=4.0) if entry.step == 3 else entry
                      for entry in STEPS])  # fmt: skip
    return folder


def test_plot_is_a_png_and_keeps_the_matplotlib_backend(run):
    matplotlib = pytest.importorskip("matplotlib")
    backend = matplotlib.get_backend()
    path = gpt2.plot_history("mine", str(run.parent))
    assert path == str(run / "history.png")
    assert (run / "history.png").read_bytes().startswith(b"\x89PNG\r\n")
    assert matplotlib.get_backend() == backend
    elsewhere = str(run / "elsewhere")
    assert gpt2.plot_history("mine", str(run.parent), elsewhere) == elsewhere
    with open(elsewhere, "rb") as file:
        assert file.read(4) == b"\x89PNG"


def test_plot_shows_beginnings_of_samples(run, monkeypatch):
    """Letters that the font lacks are replaced, as matplotlib would warn of each."""
    figure = pytest.importorskip("matplotlib.figure")
    monkeypatch.chdir(run.parent)
    for step in (1, 2, 3, 999):
        Path("samples", "mine").mkdir(parents=True, exist_ok=True)
        text = f"======== SAMPLE 1 ========\n ${step} a\n\u6771 {'word ' * 50}\n\n======== SAMPLE 2"
        Path("samples", "mine", f"samples-{step + 1}").write_text(text, encoding="utf-8")
    Path("samples", "mine", "samples-x").write_text("no number")
    drawn = []
    save = figure.Figure.savefig
    monkeypatch.setattr(
        figure.Figure,
        "savefig",
        lambda self, *args, **kw: drawn.append(self) or save(self, *args, **kw),
    )
    gpt2.plot_history("mine", str(run.parent))
    lines = [text.get_text() for text in drawn[0].axes[2].texts]
    assert [line[:16] for line in lines] == [f"step {s}: ${s} a ? w" for s in (1, 2, 3)]
    assert all(len(line) < 120 and line.endswith("\u2026") for line in lines)


def test_plot_shows_at_most_five_samples_and_the_last():
    shown = history._spread({step: "" for step in range(100)})
    assert list(shown) == [0, 25, 50, 74, 99]


def test_plot_without_matplotlib_names_the_extra(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'gpt_2_simple\[plot\]'"):
        gpt2.plot_history("mine", str(run.parent))


def test_plot_of_an_empty_history_is_an_error(run):
    (run / "history.jsonl").write_text('{"start": 0}\n')
    with pytest.raises(ValueError, match="nothing was logged yet"):
        gpt2.plot_history("mine", str(run.parent))
    with pytest.raises(FileNotFoundError, match="runs there: mine"):
        gpt2.plot_history("other", str(run.parent))


def test_plot_is_shown_in_a_notebook(run, monkeypatch):
    pytest.importorskip("matplotlib")
    shown = []

    class Display:
        Image = staticmethod(lambda filename, format: (format, filename))
        display = staticmethod(shown.append)

    kernel = types.SimpleNamespace(kernel=object())
    ipython = types.SimpleNamespace(get_ipython=lambda: kernel, display=Display)
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    monkeypatch.setitem(sys.modules, "IPython.display", Display)
    path = gpt2.plot_history("mine", str(run.parent))
    assert shown == [("png", path)]
    monkeypatch.setattr(ipython, "get_ipython", lambda: None)  # imported, and not in a notebook
    gpt2.plot_history("mine", str(run.parent))
    assert len(shown) == 1


def test_plot_replaces_only_a_png(run, tmp_path):
    pytest.importorskip("matplotlib")
    text = tmp_path / "my.txt"
    text.write_text("mine")
    with pytest.raises(FileExistsError, match="my.txt exists and is no PNG file: give another"):
        gpt2.plot_history("mine", str(run.parent), path=str(text))
    assert text.read_text() == "mine"
    for _ in range(2):
        assert gpt2.plot_history("mine", str(run.parent), path=str(tmp_path / "a.png"))
