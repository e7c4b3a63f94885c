"""A run with a small model, saved by a CheckpointManager; for the tests of storage."""

import contextlib
import os

import numpy as np
import tensorflow as tf

from gpt_2_simple import model, session
from gpt_2_simple.storage import checkpoint, checkpoint_manager, runs
from gpt_2_simple.storage.optimizer_state import OptimizerState
from gpt_2_simple.training.optimizer import make_optimizer

HPARAMS = model.HParams(n_vocab=50, n_ctx=8, n_embd=8, n_head=2, n_layer=1)


class SavedRun:
    """A small model with an optimizer, all of whose variables have one value: a step's number."""

    def __init__(self, sess, folder):
        self.sess, self.folder = sess, str(folder)
        self.state = session.build_model(sess, HPARAMS, [])
        self.variables = session.named_variables(self.state)
        with sess.graph.as_default():
            optimizer = make_optimizer("adam", 0.1)
            for variable in self.variables.values():
                optimizer.apply(tf.zeros(variable.shape), variable)
        self.optimizer = {v.op.name: v for v in optimizer.variables()}

    def manager(self, max_checkpoints=1, resume=True):
        latest = checkpoint.latest_checkpoint(self.folder) if resume else None
        state = OptimizerState(self.sess, self.state, list(self.optimizer.values()))
        return checkpoint_manager.CheckpointManager(
            self.sess, self.state, self.folder, max_checkpoints, state, latest
        )

    def set(self, value):
        for variable in [*self.variables.values(), *self.optimizer.values()]:
            array = np.full(variable.shape, value, variable.dtype.as_numpy_dtype)
            self.sess.run(variable.initializer, {variable.initializer.inputs[1]: array})

    def save(self, step, manager, value=None):
        self.set(step if value is None else value)
        run = runs.RunState(step=step, seconds=step if value is None else value)
        with contextlib.closing(manager):
            return manager.save(run)

    def saved(self):
        """What the latest checkpoint holds: its step, and the one value all of it has."""
        latest = checkpoint.latest_checkpoint(self.folder)
        step = runs.step_of(latest)
        reader = tf.train.load_checkpoint(latest)
        values = {float(v) for name in self.variables for v in np.unique(reader.get_tensor(name))}
        assert set(reader.get_variable_to_shape_map()) == set(self.variables)
        reader = tf.train.load_checkpoint(latest.replace("model-", "optimizer-"))
        for name in self.optimizer:
            values |= {float(v) for v in np.unique(reader.get_tensor(name))}
        values.add(float(runs.read_state(latest).seconds))
        assert len(values) == 1
        return step, values.pop()


def files(folder):
    return sorted(name for name in os.listdir(folder) if not name.startswith(".lock"))


OF_STEP_2 = [
    "checkpoint", "counter", "model-2.data-00000-of-00001", "model-2.index", "model-2.meta",
    "optimizer-2.data-00000-of-00001", "optimizer-2.index", "state-2.json",
]  # fmt: skip
