"""The optimizer's variables in; how they are saved beside a checkpoint's weights, and restored."""

from __future__ import annotations

from collections.abc import Sequence

import tensorflow as tf

from .. import session
from ..common.report import say
from . import checkpoint, checkpoint_index
from .runs import LOSS_SCALE, OPTIMIZER, path_beside


class OptimizerState:
    """The optimizer's variables on disk: `optimizer-N.*` beside `model-N.*`."""

    def __init__(
        self,
        sess: tf.compat.v1.Session,
        state: session.GraphState,
        variables: Sequence[tf.Variable],
    ):
        self.sess, self.state = sess, state
        self._variables = {variable.op.name: variable for variable in variables}
        self.save_ops = state.build_once(checkpoint.build_save, *variables)
        state.build_once(checkpoint.build_restore, *variables)

    def restore(self, prefix: str) -> bool:
        """Fills the variables from what was saved with the checkpoint `prefix`.

        The loss scale, which only float16 has, keeps its value if the checkpoint has none.

        Returns:
            Whether that succeeded. If not, prints why; the variables then hold anything.
        """
        path = path_beside(prefix, OPTIMIZER)
        if not checkpoint.is_whole(path):
            say(f"{prefix} has no optimizer state beside it: the optimizer starts anew")
            return False
        saved = checkpoint_index.read_index(f"{path}.index")
        shared = [variable for name, variable in self._variables.items() if name in saved]
        unshared = saved.keys() ^ self._variables.keys()
        if not all(name.startswith(LOSS_SCALE) for name in unshared) or not all(
            _fits(saved[variable.op.name], variable) for variable in shared
        ):
            say(f"{path} is of another optimizer, or other variables: the optimizer starts anew")
            return False
        try:
            ops = self.state.build_once(checkpoint.build_restore, *shared)
            checkpoint.restore(self.sess, ops, path)
        except ValueError as error:
            say(f"{error}; the optimizer starts anew")
            return False
        return True


def _fits(entry: checkpoint_index.Entry, variable: tf.Variable) -> bool:
    dtype = variable.dtype.base_dtype.as_datatype_enum
    return (entry.shape, entry.dtype) == (tuple(variable.shape.as_list()), dtype)
