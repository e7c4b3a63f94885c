"""Files and settings in; finetune() on a worker of a Ray cluster, its saves and lines out."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import shutil
import threading
import time
from pathlib import Path
from typing import Any

from ..common.files import remove_folder, temporary_folder, write_text
from ..session import graph_state, start_tf_sess
from ..storage import checkpoint
from ..storage.runs import SETTINGS, step_of
from ..training.finetune import finetune
from ..training.history import Entry
from ..training.trainer import Diverged, Trainer
from .channel import WorkerLost
from .ray_job import PLACES, RayJob, files_of_run, with_places
from .worker import as_failure

# Beside a run's files in Ray's storage: the step after which the training ends.
TARGET = "last_step.json"
ASK_SECONDS = 1.0
FAILURE_SECONDS = 5
# Another try would fail in the same way.
_FINAL = (ValueError, FileNotFoundError, NotADirectoryError, MemoryError, Diverged)


def run_job(config: dict[str, Any]) -> None:
    """Trains as a job says; `config` holds it and the mailbox."""
    with temporary_folder(prefix="gpt2-") as folder:
        _Worker(config["job"], config["mailbox"], folder).run()


class _Worker:
    def __init__(self, job: RayJob, mailbox: Any, folder: str):
        self.ray = importlib.import_module("ray")
        self.train = importlib.import_module("ray.train")
        self.job, self.mailbox, self.folder = job, mailbox, folder
        self.is_writer = self.train.get_context().get_world_rank() == 0
        self.run_folder = os.path.join(folder, "checkpoint", job.settings["run_name"])
        self._sent: dict[str, tuple[int, int]] = {}
        self._asked, self._is_stopped = 0.0, False

    def run(self) -> None:
        for place, reference in self.job.files.items():
            path = Path(self.folder, place)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(self.ray.get(reference))
        settings = self._go_on()
        if settings is None:
            return
        try:
            with contextlib.ExitStack() as stack:
                if self.is_writer:
                    stack.enter_context(contextlib.redirect_stdout(_Lines(self.tell)))
                sess = stack.enter_context(start_tf_sess(self.job.threads))
                graph_state(sess).on_save = self.report
                on_step = self.on_step if self.is_writer else None
                result = finetune(sess, **settings, on_step=on_step)
        except _FINAL as error:
            if self.is_writer:
                self.tell("failure", as_failure(error))
            return
        except WorkerLost:
            if self._has_failed_for_good():
                return
            raise
        if self.is_writer:
            self.tell("result", {**result._asdict(), "history": []})

    def _has_failed_for_good(self) -> bool:
        """Whether worker 0 has told the caller of an error that another try would repeat."""
        for _ in range(FAILURE_SECONDS):
            if self.ray.get(self.mailbox.has_failed.remote()):
                return True
            time.sleep(1)
        return False

    def _go_on(self) -> dict[str, Any] | None:
        """finetune()'s arguments: after a failure, for what is left to do from the last save."""
        root = self.folder
        settings = {
            **self.job.settings,
            "dataset": self._dataset("data"),
            "val_dataset": self._dataset("validation"),
            "model_dir": os.path.join(root, "models"),
            "cache_dir": None,
            "checkpoint_dir": os.path.join(root, "checkpoint"),
        }
        saved = self.train.get_checkpoint()
        if saved is None:
            self._take_over(settings)
            return settings
        with saved.as_directory() as folder:
            remove_folder(self.run_folder)
            shutil.copytree(folder, self.run_folder)
        target = json.loads(Path(self.run_folder, TARGET).read_text(encoding="utf-8"))
        settings |= {"restore_from": "latest", "overwrite": False}
        if target is not None:
            latest = checkpoint.latest_checkpoint(self.run_folder)
            left = target - step_of(latest or "")
            if left <= 0:
                return None
            settings |= {"steps": left, "epochs": None}
        return settings

    def _take_over(self, settings: dict[str, Any]) -> None:
        """The caller's run has the caller's folders: they are no change of settings."""
        path = Path(self.run_folder, SETTINGS)
        if path.is_file():
            places = {place: settings[place] for place in PLACES}
            path.write_bytes(with_places(path.read_bytes(), places))

    def _dataset(self, kind: str) -> str | list[str] | None:
        files = sorted(map(str, Path(self.folder, kind).glob("*/*")))
        return files[0] if len(files) == 1 else files or None

    def tell(self, kind: str, content: Any) -> None:
        """Sends a message to the caller, and waits until the mailbox has it."""
        self.ray.get(self.mailbox.put.remote(kind, content))

    def on_step(self, entry: Entry) -> bool:
        self.tell("step", tuple(entry))
        if time.monotonic() > self._asked + ASK_SECONDS:
            self._asked = time.monotonic()
            self._is_stopped = self.ray.get(self.mailbox.is_stopped.remote())
        return not self._is_stopped

    def report(self, trainer: Trainer) -> None:
        """After each save, on all workers: sends the run to the caller, and gives it to Ray."""
        metrics = {"step": trainer.run.step}
        if not self.is_writer:
            self.train.report(metrics)
            return
        write_text(os.path.join(self.run_folder, TARGET), json.dumps(trainer.last_step))
        self._send_run()
        self.train.report(metrics, checkpoint=self.train.Checkpoint.from_directory(self.run_folder))

    def _send_run(self) -> None:
        listing: dict[str, int] = {}
        for name in files_of_run(self.run_folder):
            path = os.path.join(self.run_folder, name)
            if name == TARGET:
                continue
            state = os.stat(path)
            listing[name] = state.st_size
            if self._sent.get(name) != (state.st_mtime_ns, state.st_size):
                self.tell("file", (name, Path(path).read_bytes()))
                self._sent[name] = (state.st_mtime_ns, state.st_size)
        self.tell("saved", listing)


class _Lines(io.TextIOBase):
    """A standard output whose lines are sent to the caller."""

    def __init__(self, tell: Any):
        self._tell, self._text, self._lock = tell, "", threading.Lock()

    def write(self, text: str) -> int:
        with self._lock:
            *lines, self._text = (self._text + text).split("\n")
        for line in lines:
            self._tell("line", line)
        return len(text)
