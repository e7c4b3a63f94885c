"""A run's folder in, what it holds beside weights out: its model, its RunState, its settings.

- `checkpoint`: the names of the checkpoints, and which is the latest
- `model-N.*`: the weights after step N, as in gpt-2-simple 0.8.1
- `optimizer-N.*`: the optimizer's variables after step N
- `state-N.json`: the RunState after step N
- `best.*`: the weights with the lowest validation loss
- `adapter-N/`, `best/`: the same of a run that trains an adapter (LoRA), in peft's format
- `history.jsonl`, `events*`: what each step reached
- `settings.json`: the settings of the latest finetune()
- `counter`, `hparams.json`, `encoder.json`, `vocab.bpe`: as in gpt-2-simple 0.8.1
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import secrets
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from ..common.files import write_text, write_whole
from ..common.folders import read_hparams
from ..common.locks import LockState, lock_run, run_lock_state
from ..common.report import say
from . import checkpoint

# What the names of a step's files start with.
MODEL = "model"
ADAPTER = "adapter"
OPTIMIZER = "optimizer"
STATE = "state"

# What the names of float16's own variables start with.
LOSS_SCALE = "optimizer/loss_scale"
SETTINGS = "settings.json"

# How often to try to read a run that another process is training.
MAX_TRIES = 10

Result = TypeVar("Result")


# --- locks --------------------------------------------------------------------------------------


def is_being_trained(folder: str) -> bool:
    """Whether some process trains a run; True where the file system has no locks to tell it."""
    return run_lock_state(folder) is not LockState.FREE


def finish_saves_unless_trained(folder: str) -> None:
    """Completes a save that a killed process left in a run, unless the run is being trained.

    It takes the run's lock itself; checkpoint.finish_saves() is for those who hold it. Without
    locks nobody knows whether the run is being trained, and its saves are left to the training.
    """
    with contextlib.suppress(OSError, RuntimeError):
        if any(name.startswith(checkpoint.FINISHED) for name in os.listdir(folder)):
            with lock_run(folder) as lock:
                if lock is not LockState.UNSUPPORTED:
                    checkpoint.finish_saves(folder)


def retry_while_trained(folder: str | None, action: Callable[[], Result]) -> Result:
    """Calls `action`, which reads a run, and calls it again if a training has replaced its files.

    `folder` is the run's; None if what is read is no run.
    """
    for _ in range(MAX_TRIES - 1):
        try:
            return action()
        except FileNotFoundError:
            if folder is None or not is_being_trained(folder):
                raise
    return action()


# --- a run's model ------------------------------------------------------------------------------


def prepare(folder: str, base_model_folder: str) -> None:
    """Makes a folder, whose lock the caller holds, ready to train a model in it.

    Raises:
        ValueError: the folder is the model's own, or holds a run of another model; see
            check_same_model().
    """
    if os.path.realpath(folder) == os.path.realpath(base_model_folder):
        raise ValueError(
            f"{folder} holds the model itself, which a run there would replace; give another "
            "run_name or checkpoint_dir"
        )
    checkpoint.finish_saves(folder)
    if checkpoint.latest_checkpoint(folder):
        check_same_model(folder, base_model_folder)
    # hparams.json last: a folder that has it is a run.
    for name in (*checkpoint.VOCABULARY_FILES, "hparams.json"):
        with write_whole(os.path.join(folder, name)) as file:
            file.write(Path(base_model_folder, name).read_bytes())


def base_model_folder(folder: str, model_dir: str | None = None) -> str | None:
    """The absolute path of the model that a run was made from, as its settings.json names it.

    A relative `model_dir` counts from the current folder, as it does in every call; one that is
    given counts instead. None if nothing tells it, as in runs of gpt-2-simple 0.8.1.
    """
    try:
        settings = json.loads(Path(folder, SETTINGS).read_text(encoding="utf-8"))
        parent = settings["model_dir"] if model_dir is None else model_dir
        return os.path.abspath(os.path.join(parent, settings["model_name"]))
    except (OSError, ValueError, LookupError, TypeError):
        return None


@contextlib.contextmanager
def prepared(folder: str, base_model_folder: str) -> Iterator[None]:
    """Within this block a folder is ready to train a model in it, see prepare().

    If the block fails before the run has a checkpoint, what prepare() made is removed again: a
    folder without weights is no run. The caller holds the folder's lock.
    """
    was_run = os.path.isfile(os.path.join(folder, "hparams.json"))
    prepare(folder, base_model_folder)
    try:
        yield
    except BaseException:
        if not was_run and not checkpoint.has_any(folder):
            for name in ("hparams.json", *checkpoint.VOCABULARY_FILES, SETTINGS):
                with contextlib.suppress(OSError):
                    os.remove(os.path.join(folder, name))
        raise


def check_same_model(folder: str, base_model_folder: str) -> None:
    """Raises ValueError if a run's sizes or vocabulary are not those of the model in a folder."""
    if os.path.isfile(os.path.join(folder, "hparams.json")):
        of_run, of_model = read_hparams(folder), read_hparams(base_model_folder)
        if of_run != of_model:
            raise ValueError(
                f"{folder} was made from a model of other sizes ({of_run}) than "
                f"{base_model_folder} ({of_model}); give another run_name, or the model_name it "
                "was made from"
            )
    for name in checkpoint.VOCABULARY_FILES:
        path = Path(folder, name)
        if path.is_file() and path.read_bytes() != Path(base_model_folder, name).read_bytes():
            raise ValueError(
                f"{folder} was trained with another vocabulary than {base_model_folder} has "
                f"({name} differs); give another run_name, or the model_name it was made from"
            )


def starting_checkpoint(restore_from: str, folder: str, base_model_folder: str) -> str:
    """The checkpoint that training starts from.

    `restore_from` is 'latest', 'fresh', a folder, or a checkpoint's prefix. `folder` is the run's.

    Raises:
        FileNotFoundError: there is no whole checkpoint where `restore_from` says. If 'latest' finds
            only damaged checkpoints in the run, they must not be replaced without being asked.
    """
    restore_from = os.fspath(restore_from).removesuffix(".index")
    restore_from = restore_from.rstrip("/" + os.sep) or restore_from
    if restore_from == "latest" and checkpoint.has_any(folder):
        return checkpoint.restore_path(folder)
    if restore_from in ("latest", "fresh"):
        return checkpoint.restore_path(base_model_folder)
    if checkpoint.is_whole(restore_from):
        return restore_from
    if os.path.isdir(restore_from):
        return checkpoint.restore_path(restore_from)
    raise FileNotFoundError(
        f"restore_from={restore_from!r} is neither 'latest' nor 'fresh', nor a folder with a "
        "checkpoint, nor a checkpoint such as 'checkpoint/run1/model-500'"
    )


# --- what is saved beside the weights -----------------------------------------------------------


@dataclasses.dataclass
class RunState:
    """What a run needs beside its weights, to go on where it stopped.

    The losses are None before the first validation.
    """

    step: int = 0  # steps of all calls of finetune() so far
    seconds: float = 0.0  # the time that they took
    # Seeds all random choices but those of the data.
    seed: int = dataclasses.field(default_factory=lambda: secrets.randbits(31))
    # The printed average's weighted sum of losses, and the sum of the weights.
    losses: tuple[float, float] = (0.0, 0.0)
    sampler: dict[str, Any] | None = None  # the position in the data, WindowSampler.state()
    validation_loss: float | None = None  # the last one
    best_loss: float | None = None  # the lowest validation loss
    best_step: int = 0  # the step that reached it
    validations_without_improvement: int = 0  # how many in a row since then
    validation_set: str | None = None  # identifies the windows that the losses were measured on

    def to_json(self) -> str:
        """The text of state-N.json."""
        values = dataclasses.asdict(self)
        return json.dumps({_FILE_KEYS.get(name, name): values[name] for name in values}) + "\n"

    @classmethod
    def from_json(cls, text: str) -> RunState:
        """The reverse of to_json(). Raises ValueError, TypeError or IndexError for another text."""
        names = {key: name for name, key in _FILE_KEYS.items()}
        run = cls(**{names.get(key, key): value for key, value in json.loads(text).items()})
        run.losses = (float(run.losses[0]), float(run.losses[1]))
        return run


# Keys in state-N.json that are not the names of their fields: runs of older releases have them.
_FILE_KEYS = {"validations_without_improvement": "worse", "validation_set": "validation"}


def read_state(prefix: str) -> RunState | None:
    """The RunState that was saved with a checkpoint; prints a line and returns None without one."""
    path = path_beside(prefix, STATE) + ".json"
    try:
        return RunState.from_json(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError, IndexError, AttributeError):
        say(f"{prefix} has no {os.path.basename(path)} that can be read: the data starts anew")
        return None


def step_of(prefix: str) -> int:
    """The step in a checkpoint's name, 0 if it has none."""
    match = re.fullmatch(rf"(?:{MODEL}|{ADAPTER})-(\d+)", os.path.basename(prefix))
    return int(match[1]) if match else 0


def name_of_step(folder: str, step: int) -> str:
    """The base name of a run's checkpoint of a step: that of an adapter if there is one."""
    name = f"{ADAPTER}-{step}"
    return name if os.path.isdir(os.path.join(folder, name)) else f"{MODEL}-{step}"


def path_beside(prefix: str, kind: str) -> str:
    """The prefix of what was saved with `model-N` or `adapter-N`, such as 'optimizer-N'."""
    folder, base = os.path.split(prefix)
    return os.path.join(folder, re.sub(rf"^(?:{MODEL}|{ADAPTER})", kind, base))


def note_settings(
    folder: str, settings: Mapping[str, Any], resume: bool, may_change: Collection[str] = ()
) -> None:
    """Writes a run's settings.json, and prints which settings differ from the last call's.

    Nothing is printed if the run is not continued, or for the settings in `may_change`.
    """
    path = Path(folder, SETTINGS)
    text = json.dumps(settings, indent=2, default=str) + "\n"
    before: dict[str, Any] = {}
    if resume:
        with contextlib.suppress(OSError, ValueError, TypeError):
            before = dict(json.loads(path.read_text(encoding="utf-8")))
    changes = [
        f"{name} {before[name]} -> {value}"
        for name, value in json.loads(text).items()
        if name in before and before[name] != value and name not in may_change
    ]
    if changes:
        say("This run goes on with other settings:", ", ".join(changes))
    write_text(path, text)
