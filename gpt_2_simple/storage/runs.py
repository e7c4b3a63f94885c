"""A run's folder: who may write there, what it holds beside weights, and how each save lands.

- `checkpoint`: the names of the checkpoints, and which is the latest
- `model-N.*`: the weights after step N, as gpt-2-simple has always kept them
- `optimizer-N.*`: the optimizer's state then
- `state-N.json`: RunState, where data and validation had got to then
- `best.*`: the weights that validated best
- `history.jsonl`, `events*`: what each step reached
- `settings.json`: what finetune() was called with last
- `counter`, `hparams.json`, `encoder.json`, `vocab.bpe`: as gpt-2-simple has always kept them
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import secrets
from collections.abc import Mapping
from typing import Any

from ..common.folders import read_hparams
from ..common.locks import LOCK, lock
from ..common.report import say
from . import checkpoint

MODEL = "model"
OPTIMIZER = "optimizer"
# What the names of float16's own variables start with.
LOSS_SCALE = "optimizer/loss_scale"
SETTINGS = "settings.json"

# Settings that may differ from call to call without a word.
ANY_CALL = (
    "steps",
    "epochs",
    "sample_every",
    "sample_length",
    "sample_num",
    "save_every",
    "print_every",
    "max_checkpoints",
    "seed",
    "cache_dir",
)


# --- one process at a time ----------------------------------------------------------------------


def is_being_trained(folder: str) -> bool:
    """Whether some process holds the lock of a run's folder."""
    if not os.path.isfile(os.path.join(folder, LOCK)):
        return False
    try:
        with lock(folder):
            return False
    except RuntimeError:
        return True
    except OSError:
        return False


def recover(folder: str) -> None:
    """Completes a save that a killed process left in a run, unless somebody is training it now."""
    try:
        names = os.listdir(folder)
    except OSError:
        return
    if any(name.startswith(checkpoint.FINISHED) for name in names):
        with contextlib.suppress(OSError, RuntimeError), lock(folder):
            checkpoint.recover(folder)


# --- beginning ----------------------------------------------------------------------------------


def prepare(folder: str, model_: str) -> None:
    """Puts the model's vocabulary and hyper-parameters into a run's folder, which must be locked.

    Args:
        folder: the run's.
        model_: that of the model which the run starts from.

    Raises:
        ValueError: the run was made from a model of other sizes, or with another vocabulary.
    """
    checkpoint.recover(folder)
    ours = os.path.join(folder, "hparams.json")
    if os.path.isfile(ours) and checkpoint.latest_checkpoint(folder):
        of_run, of_model = read_hparams(folder), read_hparams(model_)
        if of_run != of_model:
            raise ValueError(
                f"{folder} was made from a model of other sizes ({of_run}) than {model_} "
                f"({of_model}); give another run_name, or the model_name it was made from"
            )
    # hparams.json last: a folder that has it is a run.
    for name in (*checkpoint.VOCABULARY_FILES, "hparams.json"):
        with open(os.path.join(model_, name), encoding="utf-8", newline="") as file:
            text = file.read()
        if name != "hparams.json":
            _check_same(folder, name, text, model_)
        checkpoint.write_file(os.path.join(folder, name), text)


def _check_same(folder: str, name: str, text: str, model_: str) -> None:
    """Raises ValueError if a run with checkpoints has a file of this name that says else."""
    path = os.path.join(folder, name)
    if not os.path.isfile(path) or not checkpoint.latest_checkpoint(folder):
        return
    with open(path, encoding="utf-8", newline="", errors="replace") as file:
        if file.read() != text:
            raise ValueError(
                f"{folder} was trained with another vocabulary than {model_} has ({name} differs); "
                "give another run_name, or the model_name it was made from"
            )


def starting_checkpoint(restore_from: str, folder: str, model_: str) -> str:
    """The checkpoint that training starts from.

    Args:
        restore_from: 'latest', 'fresh', a folder, or a checkpoint's prefix.
        folder: the run's folder.
        model_: the folder of the model to start from.

    Raises:
        FileNotFoundError: `restore_from` names nothing that can be loaded, or is 'latest' in a run
            none of whose checkpoints is whole: that is not to be trained over unasked.
    """
    restore_from = os.fspath(restore_from).removesuffix(".index")
    if restore_from == "latest":
        return checkpoint.restore_path(folder if checkpoint.has_any(folder) else model_)
    if restore_from == "fresh":
        return checkpoint.restore_path(model_)
    if os.path.isdir(restore_from):
        return checkpoint.restore_path(restore_from)
    if checkpoint.is_whole(restore_from):
        return restore_from
    raise FileNotFoundError(
        f"restore_from={restore_from!r} is neither 'latest' nor 'fresh', nor a folder with a "
        "checkpoint, nor a checkpoint such as 'checkpoint/run1/model-500'"
    )


def step_of(prefix: str) -> int:
    """The step in a checkpoint's name, 0 if it has none."""
    match = re.fullmatch(r"model-(\d+)", os.path.basename(prefix))
    return int(match[1]) if match else 0


# --- what is known of a run beside its weights ----------------------------------------------------


@dataclasses.dataclass
class RunState:
    """What goes on where it was when a run is resumed.

    Attributes:
        step: steps taken in the run's whole life.
        seconds: the time that took.
        seed: of all that is random but the data.
        losses: the printed average's sum and weight.
        sampler: the position in the data, from WindowSampler.state().
        validation_loss: the last one measured.
        best_loss: the lowest validation loss, None before the first.
        best_step: the step that reached it.
        worse: how many validations in a row have not been better since.
        validation: tells the set that these losses were measured on from others.
    """

    step: int = 0
    seconds: float = 0.0
    seed: int = dataclasses.field(default_factory=lambda: secrets.randbits(31))
    losses: tuple[float, float] = (0.0, 0.0)
    sampler: dict[str, Any] | None = None
    validation_loss: float | None = None
    best_loss: float | None = None
    best_step: int = 0
    worse: int = 0
    validation: str | None = None


def read_state(prefix: str) -> RunState | None:
    """What was saved along with a checkpoint; None, and a line, if there is nothing to be read."""
    path = path_beside(prefix, "state") + ".json"
    try:
        with open(path, encoding="utf-8") as file:
            values = json.load(file)
        state = RunState(**values)
        state.losses = (float(state.losses[0]), float(state.losses[1]))
        return state
    except (OSError, ValueError, TypeError, IndexError):
        say(f"{prefix} has no {os.path.basename(path)} that can be read: the data starts anew")
        return None


def path_beside(prefix: str, kind: str) -> str:
    """The prefix of what was saved along with checkpoint `model-N`, such as 'optimizer-N'."""
    folder, base = os.path.split(prefix)
    return os.path.join(folder, re.sub(rf"^{MODEL}", kind, base))


def note_settings(folder: str, settings: Mapping[str, Any], resume: bool) -> None:
    """Writes what a run is trained with, and says what of it is new to a run that goes on."""
    path = os.path.join(folder, SETTINGS)
    text = json.dumps(settings, indent=2, default=str) + "\n"
    before = {}
    if resume:
        with (
            contextlib.suppress(OSError, ValueError, TypeError),
            open(path, encoding="utf-8") as file,
        ):
            before = dict(json.load(file))
    changes = [
        f"{name} {before[name]} -> {value}"
        for name, value in json.loads(text).items()
        if name in before and before[name] != value and name not in ANY_CALL
    ]
    if changes:
        say("This run goes on with other settings:", ", ".join(changes))
    checkpoint.write_file(path, text)


# --- saving -------------------------------------------------------------------------------------
