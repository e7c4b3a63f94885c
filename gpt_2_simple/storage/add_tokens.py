"""A model and texts in, a model whose vocabulary has these texts as tokens out."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Sequence

import numpy as np

from ..common.files import write_folder_whole
from ..common.folders import model_folder, read_hparams
from ..common.report import say
from ..common.settings import settings_function
from ..data.vocabulary import save_vocabulary
from ..encoder import WHITE_SPACE, Encoder, check_vocabulary, get_encoder, token_of_text
from . import checkpoint, checkpoint_index
from .checkpoint_tensors import open_checkpoint, write_checkpoint, write_model_files
from .settings import AddTokensSettings

_EMBEDDING = "model/wte"


@settings_function(AddTokensSettings)
def add_tokens(settings: AddTokensSettings) -> str:
    """Makes a copy of a model whose vocabulary has more tokens, for finetune() to start from.

    In datasets and prefixes each of the texts is then one token, wherever it stands. Its row of the
    embedding starts as the mean of all others; training makes something of it. One tensor is in
    memory at a time.

    Args:
        settings: each of them is an argument.

    Returns:
        The new model's folder.

    Raises:
        FileExistsError: there is a model of the new name.
        FileNotFoundError: there is no such model.
        OSError: the disk is full, or the folder cannot be written. Nothing is left of it.
        ValueError: a text is empty, holds white space, is given twice, or is a token already.
    """
    source = model_folder(settings.model_dir, settings.model_name)
    name = settings.new_model_name or f"{settings.model_name}-extended"
    folder = os.path.join(settings.model_dir, name)
    if os.path.lexists(folder):
        raise FileExistsError(f"{folder} exists; give another new_model_name")
    vocabulary, hparams = get_encoder(source), read_hparams(source)
    check_vocabulary(vocabulary, hparams.n_vocab, source)
    extended = _extended(vocabulary, settings.tokens)
    with write_folder_whole(folder, overwrite=False) as new:
        save_vocabulary(extended, new)
        _write_model(source, new, extended.n_vocab)
    say(f"Created {folder} with {extended.n_vocab} tokens")
    return folder


def _extended(vocabulary: Encoder, tokens: Sequence[str]) -> Encoder:
    """The vocabulary with more tokens, whose ids follow the others."""
    ids = dict(vocabulary.encoder)
    for text in (tokens,) if isinstance(tokens, str) else tokens:
        if not isinstance(text, str) or not text or re.search(f"[{WHITE_SPACE}]", text):
            raise ValueError(f"tokens holds {text!r}: give texts without white space")
        try:
            token = token_of_text(text)
        except UnicodeEncodeError as error:
            raise ValueError(f"tokens holds {text!r}, which is not Unicode: {error}") from error
        if token in ids:
            raise ValueError(f"tokens holds {text!r}, which is a token already: leave it out")
        ids[token] = len(ids) + vocabulary.n_vocab - len(vocabulary.encoder)
    if len(ids) == len(vocabulary.encoder):
        raise ValueError("tokens is empty: give at least one text")
    return Encoder(ids, vocabulary.bpe_merges)


def _write_model(source: str, folder: str, n_vocab: int) -> None:
    """Writes a model's tensors and sizes into a folder, with more rows in its embedding."""
    prefix = checkpoint.restore_path(source)
    names = [
        name for name in checkpoint_index.read_index(f"{prefix}.index") if name.startswith("model/")
    ]
    with open_checkpoint(prefix) as read, write_checkpoint(folder) as write:
        for name in names:
            value = read(name)
            if name == _EMBEDDING:
                mean = value.mean(axis=0, dtype=np.float64).astype(np.float32)
                value = np.concatenate([value, np.tile(mean, (n_vocab - len(value), 1))])
            write(name, value)
    write_model_files(folder, dataclasses.replace(read_hparams(source), n_vocab=n_vocab))
