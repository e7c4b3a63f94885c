"""A run's or a model's folder and what is to become of it in, the folder renamed or removed."""

from __future__ import annotations

import contextlib
import os
import secrets
import sys
from collections.abc import Iterator
from pathlib import PurePath

from ..common.files import remove_folder
from ..common.folders import model_folder, run_folder
from ..common.locks import lock_run
from . import runs
from .checkpoint import TRASH
from .listing import list_runs


def remove_run(checkpoint_dir: str, run_name: str) -> None:
    """Removes a run.

    Raises:
        FileNotFoundError: there is no such run.
        OSError: it cannot be removed.
        RuntimeError: it is being trained.
    """
    with _untrained(run_folder(checkpoint_dir, run_name)) as folder:
        parent = _set_aside(folder)
    _empty_trash(parent)


def rename_run(checkpoint_dir: str, run_name: str, new_name: str) -> None:
    """Renames a run.

    Raises:
        FileExistsError: the new name is taken.
        FileNotFoundError: there is no such run.
        OSError: it cannot be renamed.
        RuntimeError: it is being trained.
        ValueError: the new name leads out of `checkpoint_dir`.
    """
    folder = run_folder(checkpoint_dir, run_name)
    target = _new_folder(checkpoint_dir, new_name)
    with _untrained(folder):
        os.rename(folder, target)


def remove_model(model_dir: str, model_name: str) -> None:
    """Removes a model. Raises FileNotFoundError if there is none, OSError if it must stay."""
    _empty_trash(_set_aside(model_folder(model_dir, model_name)))


def rename_model(model_dir: str, model_name: str, new_name: str) -> None:
    """Renames a model; for what is raised see rename_run()."""
    folder = model_folder(model_dir, model_name)
    os.rename(folder, _new_folder(model_dir, new_name))


def runs_of_model(model_dir: str, model_name: str, checkpoint_dir: str) -> list[str]:
    """The names of the runs in a folder that were made from a model."""
    folder = os.path.abspath(os.path.join(model_dir, model_name))
    return [
        run.name
        for run in list_runs(checkpoint_dir)
        if runs.base_model_folder(os.path.join(checkpoint_dir, run.name)) == folder
    ]


@contextlib.contextmanager
def _untrained(folder: str) -> Iterator[str]:
    """Holds a run's lock; on Windows only until then, as it renames no folder with open files."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(lock_run(folder))
        if sys.platform == "win32":
            stack.close()
        yield folder


def _set_aside(folder: str) -> str:
    """Gives a folder a hidden name, so that it is gone at once for others; returns its parent."""
    parent, name = os.path.split(os.path.abspath(folder))
    os.rename(folder, os.path.join(parent, f"{TRASH}{name}-{secrets.token_hex(4)}"))
    return parent


def _empty_trash(parent: str) -> None:
    """Removes what was set aside, also by a process that was killed before it came to this."""
    for name in os.listdir(parent):
        if name.startswith(TRASH):
            remove_folder(os.path.join(parent, name))


def _new_folder(parent: str, name: str) -> str:
    """Where a folder of this name is to be; the folders above it are made."""
    path = PurePath(name)
    if not name or path.is_absolute() or any(part.startswith(".") for part in path.parts):
        raise ValueError(
            f"{name!r} cannot be a name: it must lie in {parent}, and not begin with a dot"
        )
    target = os.path.join(parent, name)
    if os.path.lexists(target):
        raise FileExistsError(f"{target} exists already; give another name")
    os.makedirs(os.path.dirname(target) or ".", exist_ok=True)
    return target
