"""A folder of models or of runs in, what each of them is out: list_models() and list_runs()."""

from __future__ import annotations

import os
from collections.abc import Iterator
from datetime import datetime, timezone
from typing import NamedTuple

from ..common.folders import read_hparams
from ..common.hparams import HParams
from ..common.report import verbosity, warn
from . import checkpoint, runs

# A name with slashes, such as 'poems/short', lies so deep at most.
MAX_DEPTH = 3


class ModelInfo(NamedTuple):
    """A model.

    Attributes:
        name: what `model_name` is to be.
        hparams: its sizes.
        n_bytes: what its folder takes on the disk.
    """

    name: str
    hparams: HParams
    n_bytes: int


class RunInfo(NamedTuple):
    """A run.

    What nobody knows is None: a run of gpt-2-simple 0.8.1 tells its step alone.

    Attributes:
        name: what `run_name` is to be.
        model_name: the model that it was made from.
        step: of its latest whole checkpoint; None if it has none.
        loss: the average of the latest steps, as it was printed, in nats a token.
        validation_loss: the last one, in nats a token.
        best_loss: the lowest validation loss; its weights are checkpoint 'best'.
        best_step: the step that reached it.
        saved: when the latest checkpoint was saved.
        n_bytes: what its folder takes on the disk.
    """

    name: str
    model_name: str | None
    step: int | None
    loss: float | None
    validation_loss: float | None
    best_loss: float | None
    best_step: int | None
    saved: datetime | None
    n_bytes: int


def list_models(model_dir: str = "models") -> list[ModelInfo]:
    """Lists the models in a folder, by name.

    Args:
        model_dir: the folder that holds the models. If there is none, there are no models.
    """
    return [
        ModelInfo(name, hparams, _n_bytes(os.path.join(model_dir, name)))
        for name, hparams in _folders_with_hparams(model_dir)
        if not _is_run(os.path.join(model_dir, name))
        and checkpoint.latest_checkpoint(os.path.join(model_dir, name))
    ]


def list_runs(checkpoint_dir: str = "checkpoint") -> list[RunInfo]:
    """Lists the runs in a folder, by name.

    Args:
        checkpoint_dir: the folder that holds the runs. If there is none, there are no runs.
    """
    return [
        _describe_run(checkpoint_dir, name)
        for name, _ in _folders_with_hparams(checkpoint_dir)
        if _is_run(os.path.join(checkpoint_dir, name)) or not _has_model(checkpoint_dir, name)
    ]


def _describe_run(checkpoint_dir: str, name: str) -> RunInfo:
    folder = os.path.join(checkpoint_dir, name)
    model = runs.base_model_folder(folder)
    model_name = None if model is None else os.path.basename(model)
    n_bytes = _n_bytes(folder)
    prefix = checkpoint.latest_checkpoint(folder)
    if prefix is None:
        return RunInfo(name, model_name, None, None, None, None, None, None, n_bytes)
    with verbosity(0):
        state = runs.read_state(prefix) or runs.RunState()
    weighted_loss, weight = state.losses
    return RunInfo(
        name,
        model_name,
        runs.step_of(prefix),
        weighted_loss / weight if weight else None,
        state.validation_loss,
        state.best_loss,
        state.best_step if state.best_loss is not None else None,
        _saved(prefix),
        n_bytes,
    )


def _folders_with_hparams(parent: str) -> Iterator[tuple[str, HParams]]:
    """Names, which may hold slashes, and sizes; a folder whose sizes cannot be read is told."""
    for name in sorted(_names(parent)):
        try:
            yield name, read_hparams(os.path.join(parent, name))
        except (OSError, ValueError) as error:
            warn(f"{os.path.join(parent, name)} was left out: {error}")


def _names(parent: str, above: str = "", depth: int = MAX_DEPTH) -> Iterator[str]:
    try:
        entries = os.listdir(os.path.join(parent, above))
    except OSError:  # no folder, or one that is not ours to read
        return
    for entry in entries:
        name = os.path.join(above, entry)
        if entry.startswith("."):
            continue  # a folder that is being made, or removed
        if os.path.isfile(os.path.join(parent, name, "hparams.json")):
            yield name
        elif depth > 1 and os.path.isdir(os.path.join(parent, name)):
            yield from _names(parent, name, depth - 1)


def _is_run(folder: str) -> bool:
    """Whether a run was trained there: gpt-2-simple 0.8.1 writes the counter, too."""
    return os.path.isfile(os.path.join(folder, checkpoint.COUNTER))


def _has_model(parent: str, name: str) -> bool:
    return os.path.isfile(os.path.join(parent, name, f"{checkpoint.MODEL_CHECKPOINT}.index"))


def _saved(prefix: str) -> datetime | None:
    """When a checkpoint was saved: the newest of its files tells it."""
    times = []
    for path in (prefix, f"{prefix}.index"):  # an adapter's folder, or a model's index
        try:
            times.append(os.path.getmtime(path))
        except OSError:
            continue
    return datetime.fromtimestamp(max(times), timezone.utc) if times else None


def _n_bytes(folder: str) -> int:
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.path.getsize(os.path.join(parent, name))
            except OSError:  # a training may have just removed it
                continue
    return total
