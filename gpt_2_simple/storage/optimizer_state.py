"""The optimizer's variables in; how they are saved beside a checkpoint's weights, and restored."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import tensorflow as tf

from .. import session
from ..common.report import say
from . import checkpoint, checkpoint_index, checkpoint_ops
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
        self.variables = {variable.op.name: variable for variable in variables}
        self._save_ops = state.build_once(checkpoint_ops.build_save, *variables)
        state.build_once(checkpoint_ops.build_restore, *variables)

    def write(self, prefix: str) -> None:
        """Writes the variables to the files of a checkpoint, and flushes these to disk."""
        checkpoint_ops.write_checkpoint(self.sess, self._save_ops, prefix)

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
        expected = self._expected()
        unshared = saved.keys() ^ expected.keys()
        if not all(name.startswith(LOSS_SCALE) for name in unshared) or not all(
            (saved[name].shape, saved[name].dtype) == expected[name]
            for name in saved.keys() & expected.keys()
        ):
            say(f"{path} is of another optimizer, or other variables: the optimizer starts anew")
            return False
        try:
            self._fill(path, saved.keys())
        except ValueError as error:
            say(f"{error}; the optimizer starts anew")
            return False
        return True

    def _expected(self) -> dict[str, tuple[tuple[int, ...], int]]:
        """The shapes and types of what is saved, by name."""
        return {
            name: (tuple(v.shape.as_list()), v.dtype.base_dtype.as_datatype_enum)
            for name, v in self.variables.items()
        }

    def _fill(self, path: str, saved: Collection[str]) -> None:
        """Reads the variables that were saved. Raises ValueError if they are damaged."""
        found = [variable for name, variable in self.variables.items() if name in saved]
        ops = self.state.build_once(checkpoint_ops.build_restore, *found)
        checkpoint_ops.restore(self.sess, ops, path)
