"""The name of a model that OpenAI published in, its sizes, files and address out."""

from __future__ import annotations

import dataclasses

from .hparams import HParams

N_VOCAB = 50257

PUBLISHED = {
    "124M": HParams(N_VOCAB, n_layer=12, n_head=12, n_embd=768),
    "355M": HParams(N_VOCAB, n_layer=24, n_head=16, n_embd=1024),
    "774M": HParams(N_VOCAB, n_layer=36, n_head=20, n_embd=1280),
    "1558M": HParams(N_VOCAB, n_layer=48, n_head=25, n_embd=1600),
}
OLDER_NAMES = {"117M": "124M", "345M": "355M"}
"""The names that OpenAI gave two of the models at first."""

MODEL_NAMES = (*PUBLISHED, *OLDER_NAMES)

DATA_FILE, INDEX_FILE, META_FILE = (
    f"model.ckpt.{suffix}" for suffix in ("data-00000-of-00001", "index", "meta")
)
# The data file comes last: the index says how long it must be.
MODEL_FILES = (
    "checkpoint",
    "hparams.json",
    "encoder.json",
    "vocab.bpe",
    META_FILE,
    INDEX_FILE,
    DATA_FILE,
)
"""The files of a model, in the order in which they are downloaded."""

# All four models have the same vocabulary.
VOCABULARY_SHA256 = {
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
}

DEFAULT_BASE_URL = "https://openaipublic.blob.core.windows.net/gpt-2"
BASE_URL_VARIABLE = "GPT2_BASE_URL"
"""The environment variable that names another server than DEFAULT_BASE_URL."""


def published_hparams(model_name: str) -> HParams:
    """The sizes of a published model; 117M and 345M are known too.

    Raises:
        ValueError: no published model has this name.
    """
    name = OLDER_NAMES.get(model_name, model_name)
    if name not in PUBLISHED:
        raise ValueError(f"model_name={model_name!r} must be one of {list(PUBLISHED)}, or HParams")
    return dataclasses.replace(PUBLISHED[name])


def hparams_of(model: str | HParams) -> HParams:
    """The sizes of a published model (see published_hparams), or those that are given.

    Raises:
        ValueError: those that are given are no complete model's.
    """
    if isinstance(model, str):
        return published_hparams(model)
    model.check_complete()
    return model


# After the name of a checkpoint: the file of its weights in 8 bits.
INT8_SUFFIX = ".int8-"
