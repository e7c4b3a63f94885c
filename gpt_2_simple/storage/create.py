"""Sizes, and maybe a text, in; the folder of a small, randomly initialised model out."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Iterator, Sequence

import numpy as np

from ..common.files import write_folder_whole
from ..common.folders import hparams_text
from ..common.hparams import HParams
from ..common.published import INT8_SUFFIX, MODEL_FILES
from ..common.report import say
from ..common.settings import settings_function
from ..data.dataset import read_documents
from ..data.tables import RowFormat
from ..data.text_files import ReadReport, find_files
from ..data.vocabulary import byte_vocabulary, save_vocabulary, train_vocabulary
from ..encoder import Encoder
from . import checkpoint
from .settings import CreateSettings

# nano: after two minutes on two cores it writes words; mini: an evening's training.
SIZES = {
    "nano": HParams(n_layer=4, n_head=4, n_embd=128, n_ctx=256),
    "micro": HParams(n_layer=6, n_head=6, n_embd=192, n_ctx=512),
    "mini": HParams(n_layer=8, n_head=8, n_embd=384, n_ctx=1024),
}


@settings_function(CreateSettings)
def create_gpt2(settings: CreateSettings) -> str:
    """Makes a small, randomly initialised GPT-2, to be trained like a downloaded one.

    Args:
        settings: each of them is an argument.

    Returns:
        The model's folder, with the seven files of a downloaded model.

    Raises:
        FileExistsError: there is a model of this name, and overwrite is False; or its folder holds
            other files than a model's.
        FileNotFoundError: there is no such dataset.
        ValueError: sizes that no GPT-2 can have, or a vocab_size without a dataset, or the name of
            a size in place of a dataset.
    """
    hparams = _hparams(settings)
    if settings.dataset is not None:
        _check_dataset(settings.dataset)
    folder = os.path.join(settings.model_dir, settings.model_name)
    if os.path.lexists(folder) and not settings.overwrite:
        raise FileExistsError(
            f"{folder} exists; give another model_name, or overwrite=True to replace it"
        )
    _check_replaceable(folder)
    vocabulary = _vocabulary(settings)
    hparams.n_vocab = vocabulary.n_vocab
    with write_folder_whole(folder, overwrite=settings.overwrite) as new:
        save_vocabulary(vocabulary, new)
        write_model(new, hparams, settings.seed)
    say(f"Created {folder}: {hparams}")
    return folder


def _check_dataset(dataset: str | Sequence[str]) -> None:
    """Raises an error if there is no such dataset, even if no vocabulary is trained on it."""
    if isinstance(dataset, str) and dataset in SIZES and not os.path.exists(dataset):
        raise ValueError(
            f"dataset={dataset!r} is no file, but the name of a size: give model_name={dataset!r}"
        )
    find_files(dataset)


def _check_replaceable(folder: str) -> None:
    """Raises FileExistsError if a folder holds anything that is not a file of a model."""
    if not os.path.isdir(folder):
        return
    foreign = sorted(
        name
        for name in os.listdir(folder)
        if name not in MODEL_FILES and not name.startswith((".", f"model.ckpt{INT8_SUFFIX}"))
    )
    if foreign:
        raise FileExistsError(
            f"{folder} holds {', '.join(foreign[:3])}, which is no file of a model, and is not "
            "replaced; give another model_name, or move it away"
        )


def _hparams(settings: CreateSettings) -> HParams:
    """The sizes: those of the model's name, replaced by those that are given."""
    hparams = dataclasses.replace(SIZES.get(settings.model_name, SIZES["nano"]))
    given = {name: getattr(settings, name) for name in ("n_layer", "n_head", "n_embd", "n_ctx")}
    hparams.override_from_dict({name: size for name, size in given.items() if size is not None})
    return hparams


def _vocabulary(settings: CreateSettings) -> Encoder:
    if settings.vocab_size is None:
        return byte_vocabulary()
    if settings.dataset is None:
        raise ValueError(
            f"vocab_size={settings.vocab_size} needs a dataset to train the vocabulary on"
        )
    return train_vocabulary(_texts(settings.dataset), settings.vocab_size)


def _texts(dataset: str | Sequence[str]) -> Iterator[str]:
    report = ReadReport()
    for file in find_files(dataset):
        for document in read_documents(file, RowFormat(), None, report):
            yield document.text
    report.tell()


def initial_value(
    name: str, shape: Sequence[int], n_layer: int, rng: np.random.Generator
) -> np.ndarray:
    """GPT-2's initial weights (Radford et al. 2019): normally distributed, biases 0, gains 1.

    The standard deviation is 0.02, or 0.01 for positions. Projections that end in the residual
    stream are divided by sqrt(2 * n_layer). `name` is the variable's name in a checkpoint, such as
    'model/h0/attn/c_proj/w'. The values are float32.
    """
    if name.endswith("/g"):
        return np.ones(shape, np.float32)
    if name.endswith("/b"):
        return np.zeros(shape, np.float32)
    stddev = np.float32(0.01 if name.endswith("wpe") else 0.02)
    if name.endswith("c_proj/w"):
        stddev /= np.sqrt(2 * n_layer, dtype=np.float32)
    return stddev * rng.standard_normal(shape, np.float32)


def write_model(folder: str, hparams: HParams, seed: int | None) -> None:
    """Writes a randomly initialised model's checkpoint and hparams.json into an existing folder.

    A `seed` makes the weights repeatable; None draws others each time.
    """
    import tensorflow as tf

    from .. import model
    from . import checkpoint_ops

    rng = np.random.default_rng(seed)
    with tf.Graph().as_default() as graph, tf.compat.v1.Session(graph=graph) as sess:
        variables = model.flatten(model.variables(hparams))
        save = checkpoint_ops.build_save(*variables)
        for variable in variables:
            shape = variable.shape.as_list()
            value = initial_value(variable.op.name, shape, hparams.n_layer, rng)
            sess.run(variable.initializer, {variable.initializer.inputs[1]: value})
        base = checkpoint.MODEL_CHECKPOINT
        texts = {
            "hparams.json": hparams_text(hparams),
            checkpoint.LIST_FILE: checkpoint.list_text([base]),
        }
        write = functools.partial(checkpoint_ops.write_checkpoint, sess, save)
        checkpoint_ops.save_model(folder, base, hparams, {base: write}, texts)
