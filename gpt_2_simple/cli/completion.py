"""A command line that is being typed in; what its last word may become, out. Bash and zsh ask.

argcomplete (https://kislyuk.github.io/argcomplete/) speaks with the shell; here it learns which
words are names of runs, of models, or of checkpoints. No TensorFlow.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Mapping
from typing import Any

from ..common.folders import run_folder
from ..common.published import MODEL_NAMES
from ..storage.checkpoint import named_checkpoints
from ..storage.listing import list_models, list_runs
from .folder_commands import ACTIONS
from .parser import Command

# The shell sets it when it asks.
VARIABLE = "_ARGCOMPLETE"


def complete(parser: argparse.ArgumentParser, commands: Mapping[str, Command]) -> None:
    """Answers the shell and ends the process, if the shell asked.

    Raises:
        ImportError: argcomplete is not there, so that the half-typed command is not run.
    """
    if VARIABLE not in os.environ:
        return
    import argcomplete

    for name, subparser in _subparsers(parser).items():
        command = commands[name]
        for action in subparser._actions:
            flag = command.positional if action.dest == "words" else action.dest
            if flag in command.flags:
                completer = _completer(name, command, flag)
                if completer is not None:
                    action.completer = completer  # type: ignore[attr-defined]
    argcomplete.autocomplete(parser, always_complete_options="long")


def _subparsers(parser: argparse.ArgumentParser) -> Mapping[str, argparse.ArgumentParser]:
    (found,) = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    return found.choices


def _completer(command: str, spec: Command, flag: str) -> Callable[..., list[str]] | None:
    """What offers a flag's values; None leaves it to the shell, which offers files."""
    field = spec.flags[flag]
    if flag == "action":  # of `runs` and `models`
        return _actions_and_names(_runs if command == "runs" else _models)
    if flag == "run_name":
        return _runs
    if flag in ("model_name", "draft_model"):
        return _published_models if command == "download" else _models
    if flag in ("checkpoint", "restore_from"):
        return _checkpoints
    if field.setting.choices:
        return lambda **_: [str(choice) for choice in field.setting.choices or ()]
    if bool in field.kinds:
        return lambda **_: ["True", "False"]
    return None


def _runs(parsed_args: argparse.Namespace, **_: Any) -> list[str]:
    return [run.name for run in list_runs(getattr(parsed_args, "checkpoint_dir", "checkpoint"))]


def _models(parsed_args: argparse.Namespace, **_: Any) -> list[str]:
    there = [model.name for model in list_models(getattr(parsed_args, "model_dir", "models"))]
    return [*there, *(name for name in MODEL_NAMES if name not in there)]


def _published_models(**_: Any) -> list[str]:
    return list(MODEL_NAMES)


def _checkpoints(parsed_args: argparse.Namespace, **_: Any) -> list[str]:
    parent = getattr(parsed_args, "checkpoint_dir", "checkpoint")
    try:
        names = named_checkpoints(run_folder(parent, getattr(parsed_args, "run_name", "run1")))
    except OSError:
        names = []
    return ["latest", *names]


def _actions_and_names(names: Callable[..., list[str]]) -> Callable[..., list[str]]:
    def offered(parsed_args: argparse.Namespace, **more: Any) -> list[str]:
        typed = getattr(parsed_args, "words", None)
        return names(parsed_args, **more) if typed else list(ACTIONS)

    return offered
