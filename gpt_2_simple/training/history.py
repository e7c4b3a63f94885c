"""Steps' losses in; the run's history.jsonl, with a JSON line a logged step, and its plot out.

The file only grows. When a run continues from a step before its last line (it was killed after its
last save, or started afresh), a line {"start": step} is added. The lines of later steps that stand
above it no longer count.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..common.folders import run_folder
from ..common.report import in_notebook
from ..common.settings import settings_function
from .settings import PlotSettings

HISTORY = "history.jsonl"
PLOT = "history.png"
SAMPLES_FOLDER = "samples"  # below the current folder, with a folder for each run
# Of the samples, so many are shown in the plot, with so many characters.
MAX_SAMPLES, SAMPLE_CHARS = 5, 100
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


class Entry(NamedTuple):
    """A training step.

    Attributes:
        step: counted over the run's whole life.
        seconds: how long the run has taken so far, over all calls.
        loss: the batch's before the update, in nats a token.
        learning_rate: the step's.
        tokens_per_second: predicted tokens in each second that training steps took.
        validation_loss: in nats a token, None if it was not measured after this step.
    """

    step: int
    seconds: float
    loss: float
    learning_rate: float
    tokens_per_second: float
    validation_loss: float | None = None


def ends_training(answer: Any) -> bool:
    """Whether what on_step returned ends the training: False does, Python's or NumPy's."""
    return isinstance(answer, (bool, np.bool_)) and not answer


class History:
    """Adds to a run's history file."""

    def __init__(self, folder: str, start: int):
        """Opens the file, and adds the line that says that the run continues from step `start`."""
        path = os.path.join(folder, HISTORY)
        # A killed process may have left half a line, which must stay a line of its own.
        broken = _lacks_newline(path)
        self._file = open(path, "a", encoding="utf-8", newline="\n")  # noqa: SIM115
        self._write(("\n" if broken else "") + json.dumps({"start": start}))

    def add(self, entry: Entry) -> None:
        """Adds a step's line."""
        values = {name: value for name, value in entry._asdict().items() if value is not None}
        self._write(json.dumps(values))

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def _write(self, line: str) -> None:
        self._file.write(f"{line}\n")
        self._file.flush()


def _lacks_newline(path: str) -> bool:
    try:
        with open(path, "rb") as file:
            file.seek(0, os.SEEK_END)
            if not file.tell():
                return False
            file.seek(-1, os.SEEK_END)
            return file.read(1) != b"\n"
    except FileNotFoundError:
        return False


def read_history(folder: str) -> list[Entry]:
    """Reads a run's history, without broken lines and lines that no longer count.

    Args:
        folder: the run's folder.

    Returns:
        An entry for each logged step, in order of the steps.

    Raises:
        FileNotFoundError: the run has no
    """
    path = os.path.join(folder, HISTORY)
    if not os.path.isfile(path):
        raise FileNotFoundError(f"no {path}: only runs that this release trained have a history")
    entries: list[Entry] = []
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            values = _parsed(line)
            if isinstance(values.get("start"), int):
                entries = [entry for entry in entries if entry.step <= values["start"]]
            elif isinstance(values.get("step"), int):
                entries.append(Entry(*(values.get(n, _MISSING[n]) for n in Entry._fields)))
    return entries


_MISSING: dict[str, Any] = {name: math.nan for name in Entry._fields} | {"validation_loss": None}


def _parsed(line: str) -> dict[str, Any]:
    try:
        values = json.loads(line)
    except ValueError:
        return {}
    return values if isinstance(values, dict) else {}


def smoothed(losses: Sequence[float]) -> list[float]:
    """Averages each loss with those before it; the more losses there are, the slower the decay."""
    decay = 1 - 1 / min(max(len(losses) / 25, 1), 100)
    averages = []
    total = weight = 0.0
    for loss in losses:
        total, weight = total * decay + loss, weight * decay + 1
        averages.append(total / weight)
    return averages


def read_samples(run_name: str) -> dict[int, str]:
    """The first text of each sample that a run wrote below the current folder, by its step."""
    found = {}
    for path in Path(SAMPLES_FOLDER, run_name).glob("samples-*"):
        with contextlib.suppress(OSError, ValueError):
            step = int(path.name.removeprefix("samples-")) - 1  # the name is gpt-2-simple 0.8.1's
            text = path.read_text("utf-8", errors="replace").partition("\n")[2]
            found[step] = text.partition("\n======== SAMPLE ")[0]
    return found


def plot(
    entries: Sequence[Entry], path: str, title: str, samples: Mapping[int, str] | None = None
) -> None:
    """Draws losses and learning rate over the steps into a PNG file.

    Args:
        entries: from read_history(), at least one.
        path: the file to write.
        title: over the plot.
        samples: texts by their steps; the beginnings of some stand below the plot.

    Raises:
        ImportError: matplotlib is not there; says how to install it.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plotting needs matplotlib: pip install 'gpt_2_simple[plot]'") from error
    # A Figure of its own, not pyplot's: no window, and the caller's backend stays as it is.
    steps = [entry.step for entry in entries]
    shown = _spread({step: text for step, text in (samples or {}).items() if step in steps})
    height = 0.25 * len(shown)  # inches
    figure = Figure(figsize=(8, 6 + height), layout="constrained")
    rows = figure.subplots(3, 1, height_ratios=(4.5, 1.5, max(height, 0.01)))
    upper, lower, texts = rows
    lower.sharex(upper)
    upper.tick_params(labelbottom=False)
    texts.axis("off")
    for number, (step, text) in enumerate(shown.items()):
        upper.axvline(step, color="gray", linestyle=":", linewidth=1)
        line = f"step {step}: {_beginning(text)}"
        y = 1 - (number + 0.5) / len(shown)
        texts.text(
            0, y, line, fontsize=9, verticalalignment="center", parse_math=False,
            transform=texts.transAxes, in_layout=False,
        )  # fmt: skip
    losses = [entry.loss for entry in entries]
    upper.plot(steps, losses, color="tab:blue", alpha=0.3, linewidth=1, label="loss")
    upper.plot(steps, smoothed(losses), color="tab:blue", label="loss, averaged")
    validated = {e.step: e.validation_loss for e in entries if e.validation_loss is not None}
    if validated:
        best = min(validated, key=lambda step: validated[step])
        values = list(validated.values())
        upper.plot(list(validated), values, color="tab:orange", marker=".", label="validation loss")
        upper.plot(
            best, validated[best], "o", color="tab:red", fillstyle="none", markersize=9,
            label=f"best: {validated[best]:.3f} in step {best}",
        )  # fmt: skip
    upper.set(title=title, ylabel="nats a token")
    upper.grid(alpha=0.3)
    upper.legend()
    lower.plot(steps, [entry.learning_rate for entry in entries], color="tab:green")
    lower.set(ylabel="learning rate", xlabel="step")
    lower.set_ylim(bottom=0)
    lower.grid(alpha=0.3)
    figure.savefig(path, format="png", dpi=120)


def _spread(samples: dict[int, str]) -> dict[int, str]:
    """At most MAX_SAMPLES of them, spread evenly, the last one among them."""
    steps = sorted(samples)
    if len(steps) > MAX_SAMPLES:
        last = len(steps) - 1
        steps = [steps[round(i * last / (MAX_SAMPLES - 1))] for i in range(MAX_SAMPLES)]
    return {step: samples[step] for step in steps}


def _beginning(text: str) -> str:
    """A text's first words on one line, in letters that matplotlib's own font has."""
    line = " ".join(text.split())
    if len(line) > SAMPLE_CHARS:
        line = line[: SAMPLE_CHARS - 1] + "\u2026"
    return "".join(
        c if c.isprintable() and (c < "\u0590" or "\u2010" <= c <= "\u203a") else "?" for c in line
    )


def _check_replaceable(path: str) -> None:
    """Raises FileExistsError if `path` is a file that is no PNG."""
    if not os.path.isfile(path):
        return
    with open(path, "rb") as file:
        start = file.read(len(_PNG_SIGNATURE))
    if start and start != _PNG_SIGNATURE:
        raise FileExistsError(f"{path} exists and is no PNG file: give another path for the plot")


def show(path: str) -> None:
    """Shows a PNG file where this runs in a notebook."""
    if in_notebook():
        from IPython.display import Image, display

        display(Image(filename=path, format="png"))


@settings_function(PlotSettings)
def plot_history(settings: PlotSettings) -> str:
    """Draws a run's losses and learning rates into a PNG file, and shows it in a notebook.

    Args:
        settings: see PlotSettings; each of them is an argument.

    Returns:
        The file's path.

    Raises:
        FileNotFoundError: there is no such run, or it has no history.
        ImportError: matplotlib is missing: `pip install "gpt_2_simple[plot]"`.
        ValueError: the history is empty.
    """
    folder = run_folder(settings.checkpoint_dir, settings.run_name)
    entries = read_history(folder)
    if not entries:
        raise ValueError(f"the history in {folder} is empty: nothing was logged yet")
    path = os.path.join(folder, PLOT) if settings.path is None else settings.path
    _check_replaceable(path)
    plot(entries, path, settings.run_name, read_samples(settings.run_name))
    show(path)
    return path
