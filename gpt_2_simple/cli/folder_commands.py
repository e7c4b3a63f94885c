"""The commands `runs` and `models`: what there is; shown, renamed, removed. No TensorFlow."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, ClassVar

from ..common.folders import model_folder, run_folder
from ..common.report import say
from ..common.settings import Setting, Settings
from ..storage import rename_remove, runs
from ..storage.checkpoint import named_checkpoints
from ..storage.listing import ModelInfo, RunInfo, list_models, list_runs
from .json_output import print_json
from .parser import Command, Options

LIST, SHOW, REMOVE, RENAME = "list", "show", "rm", "rename"
ACTIONS = {LIST: 0, SHOW: 1, REMOVE: None, RENAME: 2}  # and how many names follow
_USAGE = "'list', 'show NAME', 'rm NAME ...' or 'rename OLD NEW'"

WHAT, FOLDERS = "what to do", "folders"


@dataclasses.dataclass(frozen=True)
class RunsSettings(Settings):
    """What `runs` and `models` can be told."""

    GROUPS: ClassVar = (WHAT, FOLDERS)

    # fmt: off
    action: Annotated[str | Sequence[str], Setting(WHAT, _USAGE, repeatable=True)] = LIST
    json: Annotated[bool, Setting(WHAT, "Print JSON, for programs")] = False
    yes: Annotated[bool, Setting(WHAT, "Do not ask before something is removed")] = False
    checkpoint_dir: Annotated[str, Setting(FOLDERS, "Folder that holds the runs")] = "checkpoint"
    # fmt: on

    def __post_init__(self) -> None:
        """Raises ValueError for a wrong action."""
        super().__post_init__()
        action, *names = self.words
        n_names = ACTIONS.get(action, 0)
        is_known = action in ACTIONS and all(names)
        if not is_known or (len(names) != n_names if n_names is not None else not names):
            raise ValueError(f"{' '.join(self.words)!r} must be {_USAGE}")

    @property
    def words(self) -> list[str]:
        """The action, and the names after it."""
        return [self.action] if isinstance(self.action, str) else list(self.action)


@dataclasses.dataclass(frozen=True)
class ModelsSettings(RunsSettings):
    """As RunsSettings, with the folder of the models."""

    # fmt: off
    model_dir: Annotated[str, Setting(FOLDERS, "Folder that holds the models")] = "models"
    # fmt: on


# --- runs -----------------------------------------------------------------------------------------


def _runs(options: Options) -> int:
    settings = RunsSettings(**options)
    parent, (action, *names) = settings.checkpoint_dir, settings.words
    if action == LIST:
        columns = ["run", "model", "step", "loss", "validation", "saved", "size"]
        _print_all(list_runs(parent), settings.json, columns, _run_cells, f"no runs in {parent}")
    elif action == SHOW:
        _print_one(_details_of_run(parent, names[0]), settings.json)
    elif action == RENAME:
        rename_remove.rename_run(parent, *names)
        say(f"Renamed {names[0]} to {names[1]}")
    else:
        folders = [run_folder(parent, name) for name in names]
        if not _is_wanted(folders, settings.yes):
            return 1
        for name in names:
            rename_remove.remove_run(parent, name)
            say(f"Removed {name}")
    return 0


def _run_cells(run: RunInfo) -> list[str]:
    saved = _local_time(run.saved) if run.saved else ""
    losses = ["" if loss is None else f"{loss:.2f}" for loss in (run.loss, run.validation_loss)]
    step = "" if run.step is None else str(run.step)
    return [run.name, run.model_name or "", step, *losses, saved, _size(run.n_bytes)]


def _details_of_run(parent: str, name: str) -> dict[str, Any]:
    folder = run_folder(parent, name)
    run = _named(name, list_runs(parent), folder)
    details = {"folder": os.path.abspath(folder), **_as_json(run)}
    details["checkpoints"] = named_checkpoints(folder)
    details["being_trained"] = runs.is_being_trained(folder)
    try:
        details["settings"] = json.loads(Path(folder, runs.SETTINGS).read_text("utf-8"))
    except (OSError, ValueError):
        details["settings"] = None  # as in runs of gpt-2-simple 0.8.1
    return details


# --- models ---------------------------------------------------------------------------------------


def _models(options: Options) -> int:
    settings = ModelsSettings(**options)
    parent, (action, *names) = settings.model_dir, settings.words
    if action == LIST:
        columns = ["model", "layers", "heads", "width", "context", "vocabulary", "size"]
        _print_all(
            list_models(parent), settings.json, columns, _model_cells, f"no models in {parent}"
        )
        return 0
    folders = [model_folder(parent, name) for name in names[: 1 if action == RENAME else None]]
    users = {
        name: rename_remove.runs_of_model(parent, name, settings.checkpoint_dir)
        for name in names[: len(folders)]
    }
    if action == SHOW:
        model = _named(names[0], list_models(parent), folders[0])
        folder = {"folder": os.path.abspath(folders[0])}
        _print_one({**folder, **_as_json(model), "runs": users[names[0]]}, settings.json)
        return 0
    for name, its_runs in users.items():
        if its_runs:
            say(f"{name} is the model of {', '.join(its_runs)}, which need it by this name")
    if action == RENAME:
        if any(users.values()) and not _is_wanted(folders, settings.yes, "Rename"):
            return 1
        rename_remove.rename_model(parent, *names)
        say(f"Renamed {names[0]} to {names[1]}")
        return 0
    if not _is_wanted(folders, settings.yes):
        return 1
    for name in names:
        rename_remove.remove_model(parent, name)
        say(f"Removed {name}")
    return 0


def _model_cells(model: ModelInfo) -> list[str]:
    h = model.hparams
    sizes = (h.n_layer, h.n_head, h.n_embd, h.n_ctx, h.n_vocab)
    return [model.name, *map(str, sizes), _size(model.n_bytes)]


# --- what both print ------------------------------------------------------------------------------


def _print_all(
    found: Sequence[Any], as_json: bool, columns: list[str], cells: Any, none: str
) -> None:
    if as_json:
        print_json([_as_json(each) for each in found])
        return
    if not found:
        say(none)
        return
    rows = [columns, *map(cells, found)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(columns))]
    for row in rows:
        say("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _print_one(details: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(details)
        return
    for name, value in details.items():
        if isinstance(value, dict):
            say(f"{name}:")
            for key, setting in value.items():
                say(f"  {key}: {setting}")
        elif value is not None:
            say(f"{name}: {_as_text(name, value)}")


def _as_text(name: str, value: Any) -> str:
    """A value as the list of runs shows it."""
    if name == "saved":
        return _local_time(datetime.fromisoformat(value))
    if name == "n_bytes":
        return _size(value)
    if isinstance(value, float):
        return f"{value:.4g}"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _local_time(time: datetime) -> str:
    return time.astimezone().strftime("%Y-%m-%d %H:%M")


def _named(name: str, found: Sequence[Any], folder: str) -> Any:
    for each in found:
        if each.name == os.path.normpath(name):
            return each
    raise FileNotFoundError(f"{folder} is not listed: it holds no whole checkpoint")


def _as_json(found: Any) -> dict[str, Any]:
    values = found._asdict()
    if values.get("saved"):
        values["saved"] = values["saved"].isoformat()
    if "hparams" in values:
        values["hparams"] = dataclasses.asdict(values["hparams"])
    # JSON has no word for a loss that is not a number.
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in values.items()
    }


def _size(n_bytes: int) -> str:
    return f"{n_bytes / 1e9:.1f} GB" if n_bytes >= 1e9 else f"{n_bytes / 1e6:.1f} MB"


def _is_wanted(folders: Sequence[str], yes: bool, what: str = "Remove") -> bool:
    """Whether the user wants it. Raises ValueError where nobody can be asked."""
    if yes:
        return True
    if sys.stdin is None or not sys.stdin.isatty():
        raise ValueError("nobody can be asked here; give yes=True to go ahead")
    return input(f"{what} {', '.join(folders)}? [y/N] ").strip().lower() in ("y", "yes")


def _command(run: Any, name: str, settings: type[Settings]) -> Command:
    return Command(
        run=run,
        summary=f"List the {name}; show, remove or rename one.",
        examples=(
            f"gpt_2_simple {name}",
            f"gpt_2_simple {name} show NAME --json",
            f"gpt_2_simple {name} rm NAME",
            f"gpt_2_simple {name} rename OLD NEW",
        ),
        settings=[],
        own_settings=settings,
        positional="action",
    )


RUNS = _command(_runs, "runs", RunsSettings)
MODELS = _command(_models, "models", ModelsSettings)
