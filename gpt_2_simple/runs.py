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
import errno
import json
import os
import re
import secrets
import socket
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import tensorflow as tf

from . import bundle, checkpoint, session
from .optimizer import LOSS_SCALE
from .report import say

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"
MODEL = "model"
OPTIMIZER = "optimizer"
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


@contextlib.contextmanager
def lock(folder: str) -> Iterator[None]:
    """Keeps a run's folder, made if need be, for this block alone.

    The kernel lets go of the lock when the process ends, however it ends. Where it has none to
    give (Windows, some network drives) nothing is kept.

    Raises:
        NotADirectoryError: `folder` is a file.
        OSError: nothing can be written there.
        RuntimeError: another process, or thread, is training this run; says which.
    """
    if os.path.lexists(folder) and not os.path.isdir(folder):
        raise NotADirectoryError(f"{folder} is a file; give another run_name or checkpoint_dir")
    try:
        os.makedirs(folder, exist_ok=True)
        file = open(os.path.join(folder, LOCK), "a+", encoding="utf-8")  # noqa: SIM115
    except OSError as error:
        raise type(error)(
            f"cannot write in {folder} ({error}); give another checkpoint_dir, or its rights back"
        ) from error
    with file:
        _take(file, folder)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield


def _take(file: Any, folder: str) -> None:
    if fcntl is None:
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
            return
        file.seek(0)
        holder = file.read().strip() or "another process"
        raise RuntimeError(
            f"{folder} is being trained by {holder}; wait for it, or give another run_name"
        ) from error


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
        of_run, of_model = checkpoint.read_hparams(folder), checkpoint.read_hparams(model_)
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
        sampler: the position in the data, from Sampler.state().
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
    path = _beside(prefix, "state") + ".json"
    try:
        with open(path, encoding="utf-8") as file:
            values = json.load(file)
        state = RunState(**values)
        state.losses = (float(state.losses[0]), float(state.losses[1]))
        return state
    except (OSError, ValueError, TypeError, IndexError):
        say(f"{prefix} has no {os.path.basename(path)} that can be read: the data starts anew")
        return None


def _beside(prefix: str, kind: str) -> str:
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


class Saves:
    """A run's checkpoints: which there are, how a new one lands, which go.

    Only checkpoints that the file `checkpoint` lists are ever removed, and only those of the run
    that is being resumed: a fresh start in a folder leaves what is there.
    """

    def __init__(
        self,
        sess: tf.compat.v1.Session,
        state: session.Memory,
        folder: str,
        max_checkpoints: int,
        optimizer: Sequence[tf.Variable],
        latest: str | None,
    ):
        """Builds the operations.

        Args:
            sess: holds the variables.
            state: what its graph remembers.
            folder: the run's.
            max_checkpoints: how many to keep, 0 for all.
            optimizer: the variables of its state.
            latest: the checkpoint that the run goes on from, None for a new run.
        """
        self.sess, self.state, self.folder = sess, state, folder
        self.max_checkpoints = max_checkpoints
        self.latest = latest
        self.failed = False
        self._removal: threading.Thread | None = None
        self.names = checkpoint.named_checkpoints(folder) if latest else []
        self.optimizer = {variable.op.name: variable for variable in optimizer}
        variables = session.named_variables(state)
        self._save_model = self._built("save", lambda: checkpoint.build_save(variables))
        self._save_optimizer = self._built(
            ("save", *self.optimizer), lambda: checkpoint.build_save(self.optimizer)
        )
        self._restore_of(self.optimizer)
        self._finite = self._built("finite", lambda: _build_finite(variables.values()))

    def _built(self, key: Any, build: Any) -> Any:
        with self.state.lock, self.sess.graph.as_default():
            if key not in self.state.built:
                self.state.built[key] = build()
            return self.state.built[key]

    def _restore_of(self, variables: Mapping[str, tf.Variable]) -> checkpoint.RestoreOps:
        return self._built(("restore", *variables), lambda: checkpoint.build_restore(variables))

    def restore_optimizer(self) -> bool:
        """Fills the optimizer's state from what was saved along with the latest checkpoint.

        A loss scale that one of them lacks, since the precision changed, is left as it is.

        Returns:
            Whether it was there and fits. If not, says why; the state may then be anything.
        """
        path = _beside(self.latest, OPTIMIZER)
        if not checkpoint.is_whole(path):
            say(f"{self.latest} has no optimizer state beside it: the optimizer starts anew")
            return False
        saved = bundle.read_bundle_index(f"{path}.index")
        there = {
            name: (entry.shape, entry.dtype)
            for name, entry in _comparable(saved, self.optimizer).items()
        }
        optimizer = _comparable(self.optimizer, saved)
        wanted = {
            name: (tuple(variable.shape.as_list()), variable.dtype.base_dtype.as_datatype_enum)
            for name, variable in optimizer.items()
        }
        if there != wanted:
            say(f"{path} is of another optimizer, or other variables: the optimizer starts anew")
            return False
        try:
            checkpoint.restore(self.sess, self._restore_of(optimizer), path, optimizer)
        except ValueError as error:
            say(f"{error}; the optimizer starts anew")
            return False
        return True

    def are_weights_finite(self) -> bool:
        """Whether no weight is infinite or no number."""
        return bool(self.sess.run(self._finite))

    def save(self, run: RunState) -> str:
        """Saves a run, unless its latest checkpoint is of this step already.

        Returns:
            The checkpoint's prefix.

        Raises:
            OSError: it cannot be written; earlier checkpoints are as they were.
        """
        base = f"{MODEL}-{run.step}"
        if self.latest and step_of(self.latest) == run.step:
            return self.latest
        say("Saving", os.path.join(self.folder, base))
        names = [name for name in self.names if name != base] + [base]
        saves = {base: self._save_model, f"{OPTIMIZER}-{run.step}": self._save_optimizer}
        texts = {
            f"state-{run.step}.json": json.dumps(dataclasses.asdict(run)) + "\n",
            checkpoint.COUNTER: f"{run.step}\n",
            "checkpoint": checkpoint.state_text(names),
        }
        self.latest = self._write(base, saves, texts)
        self.names = names
        if self.max_checkpoints:
            self.prune(self.names[-self.max_checkpoints :])
        self.state.folder = os.path.abspath(self.folder)
        return self.latest

    def save_best(self) -> None:
        """Saves the weights alone, as the best so far."""
        self._write(checkpoint.BEST, {checkpoint.BEST: self._save_model})

    def _write(self, base: str, saves: Any, texts: Any = None) -> str:
        self.failed = True
        prefix = checkpoint.save_model(
            self.sess, self.folder, base, self.state.hparams, saves, texts
        )
        self.failed = False
        return prefix

    def prune(self, keep: Sequence[str]) -> None:
        """Removes the run's checkpoints but those named; a kill leaves the rest listed.

        Their files are out of the way at once; a thread removes them while training goes on.
        """
        if list(keep) == self.names:
            return
        self.close()
        files = files_of(self.folder, [name for name in self.names if name not in keep])
        removed = checkpoint.take_away(self.folder, files)
        self.names = list(keep)
        checkpoint.write_state(self.folder, self.names)
        self._removal = threading.Thread(target=checkpoint.remove, args=[removed])
        self._removal.start()

    def close(self) -> None:
        """Waits until what prune() took away is removed."""
        if self._removal is not None:
            self._removal.join()
            self._removal = None

    def overwrite(self) -> None:
        """Removes the run's checkpoints but the latest, and its events."""
        if self.latest:
            self.prune([os.path.basename(self.latest)])
        for name in os.listdir(self.folder):
            if name.startswith("events.out.tfevents."):
                os.remove(os.path.join(self.folder, name))


def _comparable(values: Mapping[str, Any], others: Mapping[str, Any]) -> dict[str, Any]:
    """The values by name, without a loss scale that `others` lacks."""
    return {
        name: value
        for name, value in values.items()
        if name in others or not name.startswith(LOSS_SCALE)
    }


def _build_finite(variables: Any) -> tf.Tensor:
    """Whether all variables are finite, looked at one after the other."""
    finite: list[tf.Tensor] = []
    for variable in variables:
        with tf.control_dependencies(finite[-1:]), tf.device(variable.device):
            finite.append(tf.reduce_all(tf.math.is_finite(variable.read_value())))
    return tf.reduce_all(tf.stack(finite))


def files_of(folder: str, bases: Sequence[str]) -> list[str]:
    """The files in a folder of checkpoints `model-N`, and what was saved along with them.

    The models' indexes come first: once they are gone, what is left is no checkpoint.
    """
    kinds = (MODEL, OPTIMIZER, "state")
    parts = {re.sub(rf"^{MODEL}-", f"{kind}-", base) for base in bases for kind in kinds}
    found = [name for name in os.listdir(folder) if name.rpartition(".")[0] in parts]
    return sorted(found, key=lambda name: (name.removesuffix(".index") not in bases, name))
