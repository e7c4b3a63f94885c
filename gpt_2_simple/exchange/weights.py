"""The name of a run or a model in, its checkpoint, sizes and vocabulary out."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import NamedTuple, TypeVar

import tensorflow as tf

from ..common.files import sync, write_folder_whole
from ..common.folders import model_folder, read_hparams, run_folder
from ..common.hparams import HParams
from ..encoder import Encoder, check_vocabulary, get_encoder
from ..storage import checkpoint, checkpoint_ops, runs
from ..storage.adapter_files import is_adapter
from .settings import ExportSettings, GgufSettings, PushSettings
from .tensor_names import tensors_of

R = TypeVar("R")


class StoredWeights(NamedTuple):
    """A checkpoint that is to leave.

    Attributes:
        name: that of the run or the model.
        folder: the run's or the model's.
        is_run: whether it is a run's.
        prefix: the checkpoint's.
        hparams: its sizes.
        vocabulary: its tokens.
    """

    name: str
    folder: str
    is_run: bool
    prefix: str
    hparams: HParams
    vocabulary: Encoder


def name_of(settings: ExportSettings | PushSettings | GgufSettings) -> str:
    """The last part of the name of the run, or of the model if one is given."""
    return os.path.basename(os.path.normpath(settings.model_name or settings.run_name))


def use_weights(
    settings: ExportSettings | PushSettings | GgufSettings, use: Callable[[StoredWeights], R]
) -> R:
    """Calls `use` with the checkpoint that the settings name.

    It is called again if a process that trains the run has meanwhile replaced the checkpoint.

    Raises:
        FileNotFoundError: there is no such run, model or checkpoint; lists those there are.
        ValueError: its files do not fit together.
    """
    run = None
    if not settings.model_name:
        run = os.path.join(settings.checkpoint_dir, settings.run_name)
    return runs.retry_while_trained(run, lambda: use(_find(settings)))


def _find(settings: ExportSettings | PushSettings | GgufSettings) -> StoredWeights:
    if settings.model_name:
        folder = model_folder(settings.model_dir, settings.model_name)
    else:
        folder = run_folder(settings.checkpoint_dir, settings.run_name, or_model=True)
        runs.finish_saves_unless_trained(folder)
    base = settings.checkpoint
    prefix = checkpoint.restore_path(
        folder, runs.name_of_step(folder, base) if isinstance(base, int) else base
    )
    if is_adapter(prefix):
        raise ValueError(
            f"{prefix} is an adapter (LoRA): merge it into its model, by "
            f"gpt2.merge_adapter({settings.run_name!r}), and take that run"
        )
    hparams, vocabulary = read_hparams(folder), get_encoder(folder)
    check_vocabulary(vocabulary, hparams.n_vocab, folder)
    expected = {t.ours: tf.TensorSpec(t.our_shape) for t in tensors_of(hparams)}
    checkpoint_ops.check_shapes(prefix, expected, hparams)
    is_run = not settings.model_name
    return StoredWeights(name_of(settings), folder, is_run, prefix, hparams, vocabulary)


def check_new(path: str, argument: str) -> None:
    """Raises FileExistsError if there is something at a path; names the argument that chose it."""
    if os.path.lexists(path):
        raise FileExistsError(
            f"{path} exists, and nothing is replaced: give another {argument}, or move it away"
        )


@contextlib.contextmanager
def new_folder(path: str, argument: str) -> Iterator[str]:
    """Makes an empty folder, which gets the name `path` if the block ends well.

    Raises:
        FileExistsError: there is something at `path`.
        OSError: the disk is full, or the folder cannot be written.
    """
    check_new(path, argument)
    try:
        with write_folder_whole(path, overwrite=False) as new:
            yield new
            sync(new)
    except OSError as error:
        if isinstance(error, (FileNotFoundError, FileExistsError)):
            raise
        raise type(error)(
            f"could not write {path}: {error.strerror or error}. Nothing was written; free some "
            f"space on the disk, or give another {argument}"
        ) from error
