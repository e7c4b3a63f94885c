"""What travels through Ray: a worker's job, and the messages between worker 0 and the caller.

No TensorFlow: Ray loads this in processes that do not train.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

# finetune()'s arguments that are other files and folders on a worker than in the caller's process.
PLACES = ("dataset", "val_dataset", "model_dir", "cache_dir")


class RayJob(NamedTuple):
    """What the workers are told.

    Attributes:
        settings: finetune()'s arguments but for folders, datasets and on_step.
        files: references to files' bytes, by their paths below the worker's folder.
        threads: as in start_tf_sess().
    """

    settings: dict[str, Any]
    files: dict[str, Any]
    threads: int


class Mailbox:
    """An actor between worker 0 and the caller: messages one way, the wish to stop the other."""

    def __init__(self) -> None:
        self._messages: list[tuple[str, Any]] = []
        self._is_stopped = self._has_failed = False

    def put(self, kind: str, content: Any) -> None:
        """Takes a message of worker 0."""
        self._messages.append((kind, content))
        self._has_failed = self._has_failed or kind == "failure"

    def take(self) -> list[tuple[str, Any]]:
        """All messages since the last call."""
        taken, self._messages = self._messages, []
        return taken

    def stop(self) -> None:
        """The caller wants the training to end."""
        self._is_stopped = True

    def has_failed(self) -> bool:
        """Whether worker 0 has told of an error."""
        return self._has_failed

    def is_stopped(self) -> bool:
        """Whether the caller wants that."""
        return self._is_stopped


def files_of_run(folder: str) -> list[str]:
    """A run's files, also those in the folders of adapters, with '/'; without hidden ones."""
    found = (path.relative_to(folder) for path in sorted(Path(folder).rglob("*")) if path.is_file())
    return [path.as_posix() for path in found if not any(p.startswith(".") for p in path.parts)]


def with_places(content: bytes, places: Mapping[str, Any]) -> bytes:
    """A run's settings.json with a side's own files and folders, by the names in PLACES."""
    known = json.loads(content)
    known |= {name: value for name, value in places.items() if name in known}
    return (json.dumps(known, indent=2, default=str) + "\n").encode()


def work(config: dict[str, Any]) -> None:
    """What each worker does: Ray Train's train_loop_per_worker."""
    importlib.import_module(f"{__package__}.ray_worker").run_job(config)
