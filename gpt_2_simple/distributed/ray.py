"""Settings and a Ray cluster in; a run that its machines trained, in the caller's folder, out.

The model, the dataset and the run so far travel to the workers as files. Worker 0's lines, steps
and saves come back through an actor, the mailbox, and each save is written into the caller's run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import math
import os
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

from ..common.errors import first_line
from ..common.files import remove_folder, replace, sync, temporary_folder, write_whole
from ..common.folders import model_folder, read_hparams
from ..common.locks import lock_run
from ..common.report import progress, say, verbosity
from ..common.settings import Setting, fields_of, settings_function
from ..data.text_files import find_files
from ..storage import checkpoint, runs
from ..training.history import Entry, ends_training
from ..training.interruption import Interruption
from ..training.settings import MEMORY, TrainingSettings
from ..training.trainer import Result
from . import ray_job
from .launcher import Failure
from .tf_config import VARIABLE

POLL_SECONDS = 0.3
# Files of a run that start so belong to one checkpoint, and go when that goes.
_OF_CHECKPOINT = tuple(
    f"{kind}-" for kind in (runs.MODEL, runs.ADAPTER, runs.OPTIMIZER, runs.STATE)
)
_INCOMING = ".receiving"


@dataclasses.dataclass(frozen=True)
class RaySettings(TrainingSettings):
    """All that finetune_on_ray() can be told: finetune()'s settings, and those of the cluster."""

    # fmt: off
    _: dataclasses.KW_ONLY
    workers: Annotated[int, Setting(
        MEMORY, "Processes of the cluster that train together", at_least=1)] = 1
    address: Annotated[str | None, Setting(
        MEMORY, "The cluster's address, such as 'auto' or '10.0.0.1:6379'. None for the cluster "
        "that is connected already, or else a local one",
        default_help="a local cluster")] = None
    cpus_per_worker: Annotated[int, Setting(
        MEMORY, "Cores of each worker", at_least=1)] = 1
    gpus_per_worker: Annotated[int | None, Setting(
        MEMORY, "GPUs of each worker. None for one if the cluster has enough, or else none",
        at_least=0, default_help="one if the cluster has enough")] = None
    max_failures: Annotated[int, Setting(
        MEMORY, "How often workers may be lost: the training goes on from the last save",
        at_least=0)] = 3
    storage_path: Annotated[str | None, Setting(
        MEMORY, "Where Ray keeps each save for a restart; of several machines, a place that all "
        "reach. None for a temporary folder",
        default_help="a temporary folder")] = None
    # fmt: on


@settings_function(RaySettings)
def finetune_on_ray(settings: RaySettings) -> Result:
    """Trains a model on a Ray cluster; each save lands in the caller's run, as by finetune().

    The cluster's machines need TensorFlow. The model, the dataset and the run so far are sent to
    them, and so is this package. `on_step` is called here; False ends the training a few steps
    later, and so does Ctrl-C, which saves.

    Args:
        settings: finetune()'s, and the cluster's.

    Returns:
        finetune()'s Result.

    Raises:
        ImportError: Ray is missing: `pip install "gpt_2_simple[ray]"`.
        RuntimeError: workers were lost more often than max_failures, or the cluster has too little.
        Exception: what finetune() raises.
    """
    if settings.restore_from not in ("latest", "fresh"):
        raise ValueError(
            f"restore_from={settings.restore_from!r}: on Ray it is 'latest' or 'fresh'"
        )
    if os.environ.get(VARIABLE):
        raise ValueError(f"{VARIABLE} says that this process is a worker itself: unset it")
    settings.check_workers(settings.workers)
    ray = import_ray()
    model = model_folder(settings.model_dir, settings.model_name)
    read_hparams(model)
    run = os.path.join(settings.checkpoint_dir, settings.run_name)
    with (
        verbosity(settings.verbose),
        lock_run(run),
        runs.prepared(run, model),
        _connected(ray, settings),
        _storage(settings.storage_path) as storage,
    ):
        return _Training(ray, settings, model, run, storage).result()


def import_ray() -> ModuleType:
    """Ray, or an error that says how to install it."""
    try:
        importlib.import_module("ray.train.tensorflow")
        return importlib.import_module("ray")
    except ImportError as error:
        raise ImportError(
            f"training on Ray needs ray[train] ({error}): pip install 'gpt_2_simple[ray]'"
        ) from error


@contextlib.contextmanager
def _connected(ray: ModuleType, settings: RaySettings) -> Iterator[None]:
    """Within this block there is a cluster; one that is connected already stays."""
    if ray.is_initialized():
        yield
        return
    options: dict[str, Any] = {"address": settings.address}
    if settings.address is None:
        cores = os.cpu_count() or 1
        wanted = settings.workers * settings.cpus_per_worker
        options = {"num_cpus": max(cores, wanted + 1), "include_dashboard": False}
    package = str(Path(__file__).parents[1])
    ray.init(**options, log_to_driver=False, runtime_env={"py_modules": [package]})
    try:
        yield
    finally:
        ray.shutdown()


@contextlib.contextmanager
def _storage(path: str | None) -> Iterator[str]:
    if path is not None:
        yield path if "://" in path else os.path.abspath(path)
        return
    with temporary_folder(prefix="gpt2-ray-") as folder:
        yield folder


class _Training:
    """A training on the cluster, seen from the process that asked for it."""

    def __init__(self, ray: ModuleType, settings: RaySettings, model: str, run: str, storage: str):
        self.ray, self.settings, self.run = ray, settings, os.path.abspath(run)
        self._shown_run = run
        self._mailbox = ray.remote(num_cpus=0)(ray_job.Mailbox).remote()
        self._trainer = self._make_trainer(model, storage)
        self._error: BaseException | None = None
        self._own_error: BaseException | None = None
        self._failure: Failure | None = None
        self._result: dict[str, Any] | None = None
        self._entries: dict[int, Entry] = {}  # by step: after a failure some are taken again

    def _make_trainer(self, model: str, storage: str) -> Any:
        train = importlib.import_module("ray.train")
        tensorflow = importlib.import_module("ray.train.tensorflow")
        settings = self.settings
        gpus = settings.gpus_per_worker
        if gpus is None:
            gpus = int(self.ray.cluster_resources().get("GPU", 0) >= settings.workers)
        job = ray_job.RayJob(self._arguments(), self._files(model), settings.cpus_per_worker)
        return tensorflow.TensorflowTrainer(
            ray_job.work,
            train_loop_config={"job": job, "mailbox": self._mailbox},
            scaling_config=train.ScalingConfig(
                num_workers=settings.workers,
                use_gpu=gpus > 0,
                resources_per_worker={"CPU": settings.cpus_per_worker, "GPU": gpus},
            ),
            run_config=train.RunConfig(
                name=f"{settings.run_name}-{os.getpid()}-{time.time_ns()}",
                storage_path=storage,
                failure_config=train.FailureConfig(max_failures=settings.max_failures),
                checkpoint_config=train.CheckpointConfig(num_to_keep=1),
            ),
        )

    # --- what is sent -----------------------------------------------------------------------------

    def _arguments(self) -> dict[str, Any]:
        """finetune()'s arguments for the workers, whose folders are their own."""
        here = {"on_step", "checkpoint_dir", *ray_job.PLACES}
        return {n: getattr(self.settings, n) for n in fields_of(TrainingSettings) if n not in here}

    def _files(self, model: str) -> dict[str, Any]:
        """The files that the workers need: references to their bytes, by their places there."""
        settings, found = self.settings, {}
        for name in sorted(os.listdir(model)):
            if os.path.isfile(os.path.join(model, name)):
                found[f"models/{settings.model_name}/{name}"] = os.path.join(model, name)
        for kind, dataset in (("data", settings.dataset), ("validation", settings.val_dataset)):
            for number, file in enumerate(find_files(dataset) if dataset is not None else []):
                name = os.path.basename(file.path)
                found[f"{kind}/{number:06d}/{name}"] = file.path
        for name in ray_job.files_of_run(self.run):
            if not name.startswith("events."):
                found[f"checkpoint/{settings.run_name}/{name}"] = os.path.join(self.run, name)
        return {place: self.ray.put(Path(path).read_bytes()) for place, path in found.items()}

    # --- what comes back --------------------------------------------------------------------------

    def result(self) -> Result:
        """Waits for the end; returns what was reached, or raises what went wrong."""
        fitting = threading.Thread(target=self._fit, daemon=True)
        is_told = False
        with Interruption(lambda: say("Stopping, then saving")) as interruption:
            with progress(total=None, desc="Training", unit="step", leave=False) as bar:
                fitting.start()
                while fitting.is_alive():
                    self._take_messages(bar)
                    if (interruption.requested or self._own_error) and not is_told:
                        self.ray.get(self._mailbox.stop.remote())
                        is_told = True
                    fitting.join(POLL_SECONDS)
                self._take_messages(bar)
            if self._own_error is not None:
                raise self._own_error
            if self._failure is not None:
                raise self._failure.error()
            if self._error is not None:
                raise RuntimeError(self._why()) from self._error
            return self._reached()._replace(interrupted=interruption.requested)

    def _reached(self) -> Result:
        """The Result; of a worker that was lost after its last save, there is none but the run."""
        latest = checkpoint.latest_checkpoint(self._shown_run)
        entries = [self._entries[step] for step in sorted(self._entries)]
        if self._result is not None:
            return Result(**{**self._result, "history": entries, "checkpoint": latest})
        loss = entries[-1].loss if entries else math.nan
        return Result(runs.step_of(latest or ""), loss, loss, latest, False, entries)

    def _fit(self) -> None:
        try:
            self._trainer.fit()
        except BaseException as error:
            self._error = error

    def _why(self) -> str:
        latest = checkpoint.latest_checkpoint(self._shown_run)
        cause: BaseException | None = self._error
        while cause is not None and cause.__cause__ is not None:
            cause = cause.__cause__
        reason = first_line(cause) if cause is not None else "no reason is known"
        return f"training on Ray failed: {reason}. The last checkpoint is {latest}"

    def _take_messages(self, bar: Any) -> None:
        for kind, content in self.ray.get(self._mailbox.take.remote()):
            if kind == "line":
                say(content)
            elif kind == "step":
                bar.update()
                entry = Entry(*content)
                self._entries[entry.step] = entry
                self._call_on_step(entry)
            elif kind == "file":
                self._receive(*content)
            elif kind == "saved":
                self._put_in_place(content)
            elif kind == "failure":
                self._failure = content
            elif kind == "result":
                self._result = content

    def _call_on_step(self, entry: Entry) -> None:
        if self.settings.on_step is None or self._own_error is not None:
            return
        try:
            answer = self.settings.on_step(entry)
        except BaseException as error:
            self._own_error = error
            return
        if ends_training(answer):
            self.ray.get(self._mailbox.stop.remote())

    def _receive(self, name: str, content: bytes) -> None:
        """Writes a file of a save that is not complete yet."""
        if os.path.isabs(name) or ".." in name.split("/"):
            raise ValueError(f"{name!r} is no file of a run")
        if name == runs.SETTINGS:
            places = {place: getattr(self.settings, place) for place in ray_job.PLACES}
            content = ray_job.with_places(content, places)
        path = os.path.join(self.run, _INCOMING, name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with write_whole(path) as file:
            file.write(content)

    def _put_in_place(self, listing: Mapping[str, int]) -> None:
        """Completes a save: an index comes after its data, the list of checkpoints last."""
        folder = os.path.join(self.run, _INCOMING)

        def order(name: str) -> tuple[bool, bool, str]:
            return name == checkpoint.LIST_FILE, name.endswith(".index"), name

        for name in sorted(ray_job.files_of_run(folder), key=order):
            path = os.path.join(self.run, name)
            os.makedirs(os.path.dirname(path), exist_ok=True)
            replace(os.path.join(folder, name), path)
        remove_folder(folder)
        sync(self.run)
        kept = {name.partition("/")[0] for name in listing}
        for name in os.listdir(self.run):
            path = os.path.join(self.run, name)
            if not name.startswith(_OF_CHECKPOINT) or name in kept:
                continue
            if os.path.isdir(path):
                remove_folder(path)
            else:
                with contextlib.suppress(OSError):
                    os.remove(path)
