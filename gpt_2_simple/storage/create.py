"""Sizes, and maybe a text, in; the folder of a small, randomly initialised model out."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from .. import encoder, model
from ..common.report import say
from ..data import vocabulary as vocabularies
from ..data.tables import RowFormat
from ..data.text_files import ReadReport, find_files, read_documents
from . import checkpoint


class Size(NamedTuple):
    """A named size: blocks, heads, width and context."""

    n_layer: int
    n_head: int
    n_embd: int
    n_ctx: int


# nano: after two minutes on two cores it writes words; mini: an evening's training.
SIZES = {
    "nano": Size(n_layer=4, n_head=4, n_embd=128, n_ctx=256),
    "micro": Size(n_layer=6, n_head=6, n_embd=192, n_ctx=512),
    "mini": Size(n_layer=8, n_head=8, n_embd=384, n_ctx=1024),
}


def create_gpt2(
    dataset: str | Sequence[str] | None = None,
    model_name: str = "nano",
    model_dir: str = "models",
    n_layer: int | None = None,
    n_head: int | None = None,
    n_embd: int | None = None,
    n_ctx: int | None = None,
    vocab_size: int | None = None,
    seed: int | None = None,
    overwrite: bool = False,
) -> str:
    """Makes a small, randomly initialised GPT-2, to be trained like a downloaded one.

    Args:
        dataset: the text that a vocabulary is trained on; needed only with `vocab_size`.
        model_name: the folder to make in `model_dir`; 'nano', 'micro' and 'mini' name sizes too,
            any other name has nano's, but for the sizes given below.
        model_dir: where models are.
        n_layer: transformer blocks.
        n_head: attention heads in a block.
        n_embd: width; a multiple of n_head.
        n_ctx: longest context, in tokens.
        vocab_size: None makes a vocabulary of the 256 bytes and `<|endoftext|>`, good for any
            language; a number trains a byte-level BPE of that many tokens on `dataset` (needs
            `pip install "gpt_2_simple[bpe]"`).
        seed: of the random weights.
        overwrite: replace a model of this name.

    Returns:
        The model's folder, with the seven files of a downloaded model.

    Raises:
        FileExistsError: there is a model of this name, and overwrite is False.
        ValueError: sizes that no GPT-2 can have, or a vocab_size without a dataset.
    """
    size = SIZES.get(model_name, SIZES["nano"])
    given = {"n_layer": n_layer, "n_head": n_head, "n_embd": n_embd, "n_ctx": n_ctx}
    chosen = {name: value for name, value in given.items() if value is not None}
    hparams = model.HParams(**{**size._asdict(), **chosen})
    hparams.check()
    if hparams.n_ctx < 2:
        raise ValueError(f"n_ctx={n_ctx} must be at least 2: a token, and the one after it")
    folder = os.path.join(model_dir, model_name)
    if os.path.lexists(folder) and not overwrite:
        raise FileExistsError(
            f"{folder} exists; give another model_name, or overwrite=True to replace it"
        )
    vocabulary = _vocabulary(dataset, vocab_size)
    hparams.n_vocab = vocabulary.n_vocab
    os.makedirs(model_dir, exist_ok=True)
    temporary = tempfile.mkdtemp(prefix=".creating-", dir=model_dir)
    try:
        vocabularies.save_vocabulary(vocabulary, temporary)
        checkpoint.write_model(temporary, hparams, seed)
        os.chmod(temporary, 0o755)
        _replace_folder(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    say(f"Created {folder}: {hparams}")
    return folder


def _vocabulary(dataset: str | Sequence[str] | None, vocab_size: int | None) -> encoder.Encoder:
    if vocab_size is None:
        return vocabularies.byte_vocabulary()
    if dataset is None:
        raise ValueError(f"vocab_size={vocab_size} needs a dataset to train the vocabulary on")
    if vocab_size < 257:
        raise ValueError(f"vocab_size={vocab_size} must be at least 257: each byte, <|endoftext|>")
    return vocabularies.train_vocabulary(_texts(dataset), vocab_size)


def _texts(dataset: str | Sequence[str]) -> Iterator[str]:
    report = ReadReport()
    for file in find_files(dataset):
        for text, _ in read_documents(file, RowFormat(), None, report):
            yield text
    report.tell()


def _replace_folder(new: str, folder: str) -> None:
    """Renames `new` to `folder`; what was there is removed only after that."""
    old = f"{new}.old"
    if os.path.lexists(folder):
        os.replace(folder, old)
    os.replace(new, folder)
    shutil.rmtree(old, ignore_errors=True)
