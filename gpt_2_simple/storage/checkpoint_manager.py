"""A run's checkpoints: which there are, how a new one lands, which go."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import tensorflow as tf

from .. import session
from ..common.report import say
from . import checkpoint, checkpoint_index
from .runs import LOSS_SCALE, MODEL, OPTIMIZER, RunState, path_beside, step_of


class CheckpointManager:
    """A run's checkpoints: which there are, how a new one lands, which go.

    Only checkpoints that the file `checkpoint` lists are ever removed, and only those of the run
    that is being resumed: a fresh start in a folder leaves what is there.
    """

    def __init__(
        self,
        sess: tf.compat.v1.Session,
        state: session.GraphState,
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
        weights = session.named_variables(state).values()
        self._save_model = state.build_once(checkpoint.build_save, *weights)
        self._save_optimizer = state.build_once(checkpoint.build_save, *optimizer)
        state.build_once(checkpoint.build_restore, *optimizer)
        self._finite = state.build_once(_build_finite, *weights)

    def restore_optimizer(self) -> bool:
        """Fills the optimizer's state from what was saved along with the latest checkpoint.

        A loss scale that one of them lacks, since the precision changed, is left as it is.

        Returns:
            Whether it was there and fits. If not, says why; the state may then be anything.
        """
        path = path_beside(self.latest, OPTIMIZER)
        if not checkpoint.is_whole(path):
            say(f"{self.latest} has no optimizer state beside it: the optimizer starts anew")
            return False
        saved = checkpoint_index.read_bundle_index(f"{path}.index")
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
            ops = self.state.build_once(checkpoint.build_restore, *optimizer.values())
            checkpoint.restore(self.sess, ops, path)
        except ValueError as error:
            say(f"{error}; the optimizer starts anew")
            return False
        return True

    def are_weights_finite(self) -> bool:
        """Whether no weight is infinite or no number."""
        return bool(self.sess.run(self._finite))

    def save(self, run: RunState) -> str:
        """CheckpointManager a run, unless its latest checkpoint is of this step already.

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
        self.state.loaded_folder = os.path.abspath(self.folder)
        return self.latest

    def save_best(self) -> None:
        """CheckpointManager the weights alone, as the best so far."""
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


def _build_finite(*variables: tf.Variable) -> tf.Tensor:
    """Whether all variables are finite; they are read one after the other."""
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
