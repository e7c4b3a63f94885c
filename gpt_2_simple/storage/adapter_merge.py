"""An adapter's folder and its base's checkpoint in, merged weights in a session out."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator

import numpy as np
import tensorflow as tf

from .. import session
from ..common.hparams import HParams
from . import adapter_files
from .adapter_updates import Update, check_tied, read_updates
from .checkpoint_tensors import ReadTensor, open_checkpoint

_EMBEDDING = "model/wte"


class MergedAdapter:
    """An adapter that was read, and the base that it is merged into.

    Each merged matrix comes from the base's checkpoint, in float32. So an adapter can take the
    place of another one exactly, and in a model that is held in 16 bits the update is not lost
    below the last bit of what it is added to.
    """

    def __init__(self, adapter: str, prefix: str, hparams: HParams):
        """Reads the adapter.

        Args:
            adapter: its folder.
            prefix: the base's checkpoint.
            hparams: the base's sizes.

        Raises:
            FileNotFoundError, ValueError: see adapter_files.read_adapter() and
                adapter_updates.read_updates().
        """
        updates = read_updates(adapter_files.read_adapter(adapter), hparams)
        self.prefix, self._updates = prefix, updates.of_variables
        if updates.embedding is not None or updates.projection is not None:
            with open_checkpoint(prefix) as read:
                embedding = check_tied(adapter, updates, read(_EMBEDDING))
            self._updates[_EMBEDDING] = Update(value=embedding)

    @property
    def names(self) -> frozenset[str]:
        """The names of the variables that it changes."""
        return frozenset(self._updates)

    @contextlib.contextmanager
    def open_merged(self) -> Iterator[ReadTensor]:
        """Opens the base to read its tensors by name, as float32, with what the adapter changes."""
        with open_checkpoint(self.prefix) as read:

            def read_merged(name: str) -> np.ndarray:
                value = read(name)
                return self._updates[name].apply(value) if name in self._updates else value

            yield read_merged

    def merge(
        self, sess: tf.compat.v1.Session, state: session.GraphState, restored: Collection[str] = ()
    ) -> None:
        """Fills the variables that the adapter changes, one after the other.

        Variables whose names are in `restored` get the base's values, if the adapter has none. What
        is no variable, as the matrices of a model in int8, is left out.
        """
        variables = session.named_variables(state)
        with self.open_merged() as read:
            for name in sorted({*restored, *self._updates} & set(variables)):
                variable = variables[name]
                value = read(name).astype(variable.dtype.as_numpy_dtype)
                initializer = variable.initializer
                sess.run(initializer, {initializer.inputs[1]: value})
