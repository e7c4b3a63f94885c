"""A run's variables in, its checkpoints out: how one is saved, and which are removed."""

from __future__ import annotations

import contextlib
import functools
import os
import re
import threading
from collections.abc import Iterator, Mapping, Sequence

import tensorflow as tf

from .. import session
from ..common.files import write_text
from ..common.report import say, warn
from . import checkpoint, checkpoint_ops
from .adapter_state import AdapterState
from .optimizer_state import OptimizerState
from .runs import ADAPTER, MODEL, OPTIMIZER, STATE, RunState, prepare, step_of


class CheckpointManager:
    """The checkpoints of a run that is being trained.

    It removes only checkpoints that the file `checkpoint` lists, and only if the run is continued:
    a fresh start in a folder keeps what is there. The checkpoint from which a run is continued is
    kept beside the newest, as in gpt-2-simple 0.8.1, unless overwrite() is called.

    Attributes:
        folder: the run's folder as the caller wrote it, for lines and results.
        latest: the prefix of the latest checkpoint in `folder`, None before the first.
        failed: whether the last save failed.
    """

    def __init__(
        self,
        sess: tf.compat.v1.Session,
        state: session.GraphState,
        folder: str,
        max_checkpoints: int,
        optimizer_state: OptimizerState,
        latest: str | None,
        adapter: AdapterState | None = None,
    ):
        """Builds the operations.

        `max_checkpoints` is 0 to keep all. `latest` is the checkpoint from which the run is
        continued, None for a new run. `adapter` is what is saved in place of the model's weights if
        only that is trained.
        """
        self.sess, self.state, self.folder = sess, state, folder
        self._path = os.path.abspath(folder)  # The current folder may change meanwhile.
        self.max_checkpoints, self.latest, self.failed = max_checkpoints, latest, False
        self._removal: threading.Thread | None = None
        self._resumed_from = latest and os.path.basename(latest)
        self._names = checkpoint.named_checkpoints(folder) if latest else []
        self._kind, self._adapter = (MODEL if adapter is None else ADAPTER), adapter
        if adapter is None:
            trained = list(session.named_variables(state).values())
            self._save_ops = state.build_once(checkpoint_ops.build_save, *trained)
        else:
            trained = adapter.adapter.flatten()
        self.optimizer_state = optimizer_state
        self._finite = state.build_once(_build_finite, *trained)

    def are_weights_finite(self) -> bool:
        """Whether no weight is infinite or not a number."""
        return bool(self.sess.run(self._finite))

    def save(self, run: RunState) -> str:
        """Saves a run, unless its latest checkpoint is of this step already; returns the prefix.

        Raises:
            OSError: it cannot be written; earlier checkpoints are as they were.
        """
        self._make_folder_again()
        base = f"{self._kind}-{run.step}"
        if self.latest and step_of(self.latest) == run.step:
            return self.latest
        say("Saving", os.path.join(self.folder, base))
        names = [name for name in self._names if name != base] + [base]
        texts = {
            f"{STATE}-{run.step}.json": run.to_json(),
            checkpoint.COUNTER: f"{run.step}\n",
            checkpoint.LIST_FILE: checkpoint.list_text(names),
        }
        self._write(base, {f"{OPTIMIZER}-{run.step}": self.optimizer_state.write}, texts)
        self.latest, self._names = os.path.join(self.folder, base), names
        if self.max_checkpoints:
            newest = names[-self.max_checkpoints :]
            self._keep([name for name in names if name in newest or name == self._resumed_from])
        self.state.loaded_folder = self._path
        return self.latest

    def save_best(self) -> None:
        """Saves the weights alone, as the best so far."""
        self._make_folder_again()
        self._write(checkpoint.BEST, {}, {})

    @property
    def latest_path(self) -> str | None:
        """The absolute path of `latest`."""
        return self.latest and os.path.join(self._path, os.path.basename(self.latest))

    def _make_folder_again(self) -> None:
        """Makes the run's folder again if somebody removed it while the run was trained."""
        if os.path.isdir(self._path):
            return
        say(f"{self.folder} was removed; it is made again")
        os.makedirs(self._path)
        self.latest, self._names = None, []
        if self.state.base_model_folder is not None:
            with contextlib.suppress(OSError):  # The weights are worth saving without it.
                prepare(self._path, self.state.base_model_folder)

    def _write(
        self, base: str, writes: Mapping[str, checkpoint.Write], texts: Mapping[str, str]
    ) -> None:
        """Saves what is trained under the name `base`, and what belongs to it."""
        self.failed = True
        if self._adapter is None:
            write = functools.partial(checkpoint_ops.write_checkpoint, self.sess, self._save_ops)
            hparams = self.state.hparams
            checkpoint_ops.save_model(self._path, base, hparams, {base: write, **writes}, texts)
        else:
            contents = {name: text.encode("utf-8") for name, text in texts.items()}
            writes = {base: self._adapter.write, **writes}
            checkpoint_ops.save_with_ops(self._path, base, writes, contents)
        self.failed = False

    def overwrite(self) -> None:
        """Removes the run's checkpoints but the latest, and its events; the next replaces it."""
        self._resumed_from = None
        if self.latest:
            self._keep([os.path.basename(self.latest)])
        with self._tidying():
            for name in os.listdir(self._path):
                if name.startswith("events.out.tfevents."):
                    os.remove(os.path.join(self._path, name))

    @contextlib.contextmanager
    def _tidying(self) -> Iterator[None]:
        """Warns where an old file cannot be removed: that must not end a training."""
        try:
            yield
        except OSError as error:
            warn(
                f"old files in {self.folder} cannot be removed: {error.strerror or error}. The "
                "training goes on; make the folder writable, or remove them by hand"
            )

    def _keep(self, names: Sequence[str]) -> None:
        """Removes the run's checkpoints but those named.

        Their files are moved out of the way first, and then the list of checkpoints is written: a
        kill in between leaves only names too many. A thread removes the files during training.
        """
        if list(names) == self._names:
            return
        self.close()
        with self._tidying():
            old = _files_of(self._path, [name for name in self._names if name not in names])
            trash = checkpoint.move_to_trash(self._path, old)
            list_file = os.path.join(self._path, checkpoint.LIST_FILE)
            write_text(list_file, checkpoint.list_text(names))
            self._names = list(names)
            self._remove_trash(trash)

    def _remove_trash(self, trash: str) -> None:
        removal = threading.Thread(target=checkpoint.remove_trash, args=[trash])
        try:
            removal.start()
        except RuntimeError:  # No thread starts any more when the main thread has ended.
            checkpoint.remove_trash(trash)
        else:
            self._removal = removal

    def close(self) -> None:
        """Waits until the files of old checkpoints are removed."""
        if self._removal is not None:
            self._removal.join()
            self._removal = None


def _build_finite(*variables: tf.Variable) -> tf.Tensor:
    """Whether all variables are finite; they are read one after the other."""
    finite: list[tf.Tensor] = []
    for variable in variables:
        with tf.control_dependencies(finite[-1:]), tf.device(variable.device):
            finite.append(tf.reduce_all(tf.math.is_finite(variable.read_value())))
    return tf.reduce_all(tf.stack(finite))


def _files_of(folder: str, bases: Sequence[str]) -> list[str]:
    """What a folder holds of checkpoints `model-N` or `adapter-N`, and was saved with them.

    The models' indexes and the adapters' folders come first: without them there is no checkpoint.
    """
    stems = {
        re.sub(rf"^(?:{MODEL}|{ADAPTER})-", f"{kind}-", base)
        for base in bases
        for kind in (OPTIMIZER, STATE)
    }
    stems.update(bases)
    found = [n for n in os.listdir(folder) if n in bases or n.rpartition(".")[0] in stems]
    return sorted(found, key=lambda name: (name.removesuffix(".index") not in bases, name))
