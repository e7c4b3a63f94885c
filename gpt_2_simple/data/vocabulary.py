"""Text in; a byte-level BPE vocabulary, and its two files, out."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path

from ..common.files import write_text
from ..encoder import (
    END_OF_TEXT,
    MERGES_HEADER,
    Encoder,
    bytes_to_unicode,
    read_merges,
    read_vocabulary,
)


def byte_vocabulary() -> Encoder:
    """Makes a vocabulary of 257 tokens without merges: the 256 bytes and `<|endoftext|>`."""
    tokens = [*bytes_to_unicode().values(), END_OF_TEXT]
    return Encoder({token: token_id for token_id, token in enumerate(tokens)}, [])


def train_vocabulary(texts: Iterable[str], vocab_size: int) -> Encoder:
    """Learns a byte-level BPE vocabulary from text with the `tokenizers` library.

    Its tokens are the 256 bytes, those of the merges, and `<|endoftext|>` last.

    Args:
        texts: the text, in parts of any size.
        vocab_size: how many tokens, 257 or more. A short text yields fewer than asked.

    Raises:
        ImportError: `tokenizers` is not installed.
        ValueError: vocab_size is below 257.
    """
    min_size = len(bytes_to_unicode()) + 1
    if vocab_size < min_size:
        raise ValueError(
            f"vocab_size={vocab_size} must be at least {min_size}: 256 bytes and {END_OF_TEXT}"
        )
    try:
        from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    except ImportError as error:
        raise ImportError(
            'training a vocabulary needs the tokenizers library: pip install "gpt_2_simple[bpe]"'
        ) from error
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1,
        initial_alphabet=sorted(bytes_to_unicode().values()),
        show_progress=False,
    )
    # The library takes no lone surrogates.
    tokenizer.train_from_iterator(
        (text.encode("utf-8", "replace").decode() for text in texts), trainer
    )
    with tempfile.TemporaryDirectory() as folder:
        vocabulary, merges = tokenizer.model.save(folder)
        encoder, bpe_merges = read_vocabulary(Path(vocabulary)), read_merges(Path(merges))
    encoder[END_OF_TEXT] = len(encoder)
    return Encoder(encoder, bpe_merges)


def save_vocabulary(encoder: Encoder, folder: str | os.PathLike[str]) -> None:
    """Writes encoder.json and vocab.bpe in GPT-2's format; makes the folder if there is none."""
    merges = "".join(f"{left} {right}\n" for left, right in encoder.bpe_merges)
    os.makedirs(folder, exist_ok=True)
    write_text(Path(folder, "encoder.json"), json.dumps(encoder.encoder))
    write_text(Path(folder, "vocab.bpe"), f"{MERGES_HEADER}: 0.2\n{merges}")
