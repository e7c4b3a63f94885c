"""The settings of this room's public functions, each stated once; no TensorFlow."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from typing import Annotated, ClassVar

from ..common.hparams import GENERATING_PRECISIONS
from ..common.published import BASE_URL_VARIABLE, MODEL_NAMES
from ..common.settings import Setting, Settings, fields_of

MODEL, SIZE, MODEL_OR_RUN = "model", "size", "model or run"

# The default of generate()'s run_name. It equals "run1", as in gpt-2-simple 0.8.1, but it is
# another object: a caller who names run1 gets run1, and a caller who names no run gets what the
# session holds.
LOADED_RUN = str(b"run1", "ascii")

_MODEL_DIR_HELP = "Folder that holds the models"
_NAMED_SIZE = "the named size's"


@dataclasses.dataclass(frozen=True)
class LoadSettings(Settings):
    """What load_gpt2() can be told."""

    GROUPS: ClassVar = (MODEL_OR_RUN,)

    # fmt: off
    checkpoint: Annotated[str | int, Setting(
        MODEL_OR_RUN, "Checkpoint of the run to load: 'latest', 'best', a name such as "
        "'model-1000' or 'adapter-1000', or its step")] = "latest"
    run_name: Annotated[str, Setting(
        MODEL_OR_RUN, "Run to load: a folder in `checkpoint_dir`")] = "run1"
    checkpoint_dir: Annotated[str, Setting(
        MODEL_OR_RUN, "Folder that holds the runs")] = "checkpoint"
    model_name: Annotated[str | None, Setting(
        MODEL_OR_RUN, "Load this model instead of a run: a folder in `model_dir`",
        default_help="none: the run is loaded")] = None
    model_dir: Annotated[str, Setting(MODEL_OR_RUN, _MODEL_DIR_HELP)] = "models"
    multi_gpu: Annotated[bool, Setting(
        MODEL_OR_RUN, "Spread the model's blocks over all GPUs, if there are several")] = False
    reuse: Annotated[bool, Setting(
        None, "Accepted for old scripts; a session's model is always reused")] = False
    _: dataclasses.KW_ONLY
    precision: Annotated[str | None, Setting(
        MODEL_OR_RUN, "Type that holds the blocks' matrices. 'bfloat16' and 'float16' take about "
        "half the memory, 'int8' a quarter, and is quicker on CPUs with VNNI; they are for "
        "generating only. None for the type that the session has already, or 'float32'",
        choices=GENERATING_PRECISIONS, default_help="float32")] = None
    adapter: Annotated[str | None, Setting(
        MODEL_OR_RUN, "Adapter (LoRA) to merge into the model `model_name`: a folder in peft's "
        "format, or a name on the Hugging Face hub. One of a run of ours finds its model itself",
        default_help="none")] = None
    verbose: Annotated[int | bool, Setting(None, "0 prints nothing but errors")] = 1
    # fmt: on


def _of_loading(name: str) -> Setting:
    """The setting of this name in LoadSettings."""
    return fields_of(LoadSettings)[name].setting


@dataclasses.dataclass(frozen=True)
class QuantizeSettings(Settings):
    """What quantize() can be told."""

    GROUPS: ClassVar = (MODEL_OR_RUN,)

    # fmt: off
    run_name: Annotated[str, _of_loading("run_name")] = LoadSettings.run_name
    _: dataclasses.KW_ONLY
    checkpoint: Annotated[str | int, _of_loading("checkpoint")] = LoadSettings.checkpoint
    checkpoint_dir: Annotated[str, _of_loading("checkpoint_dir")] = LoadSettings.checkpoint_dir
    model_name: Annotated[str | None, _of_loading("model_name")] = LoadSettings.model_name
    model_dir: Annotated[str, _of_loading("model_dir")] = LoadSettings.model_dir
    adapter: Annotated[str | None, _of_loading("adapter")] = LoadSettings.adapter
    # fmt: on


@dataclasses.dataclass(frozen=True)
class CreateSettings(Settings):
    """What create_gpt2() can be told."""

    GROUPS: ClassVar = (MODEL, SIZE)

    # fmt: off
    dataset: Annotated[str | Sequence[str] | None, Setting(
        MODEL, "Text to train a vocabulary on; needed only with `vocab_size`",
        default_help="none")] = None
    model_name: Annotated[str, Setting(
        MODEL, "Model to make: a new folder in `model_dir`. 'nano', 'micro' and 'mini' name a size "
        "too. Any other name gets the size of 'nano'")] = "nano"
    model_dir: Annotated[str, Setting(MODEL, _MODEL_DIR_HELP)] = "models"
    n_layer: Annotated[int | None, Setting(
        SIZE, "Transformer blocks", at_least=1, default_help=_NAMED_SIZE)] = None
    n_head: Annotated[int | None, Setting(
        SIZE, "Attention heads in a block", at_least=1, default_help=_NAMED_SIZE)] = None
    n_embd: Annotated[int | None, Setting(
        SIZE, "Width of the residual stream; a multiple of `n_head`", at_least=1,
        default_help=_NAMED_SIZE)] = None
    n_ctx: Annotated[int | None, Setting(
        SIZE, "Longest context, in tokens", at_least=2, default_help=_NAMED_SIZE)] = None
    vocab_size: Annotated[int | None, Setting(
        SIZE, "Tokens in the vocabulary. A number trains a byte-level BPE on `dataset`, and needs "
        'pip install "gpt_2_simple[bpe]". None takes the 256 bytes and <|endoftext|>, which fit '
        "any language", at_least=257, default_help="257: each byte, and <|endoftext|>")] = None
    seed: Annotated[int | None, Setting(
        SIZE, "Whole number that makes the random weights repeatable", at_least=0,
        default_help="random")] = None
    overwrite: Annotated[bool, Setting(SIZE, "Replace a model of this name")] = False
    # fmt: on


@dataclasses.dataclass(frozen=True)
class AddTokensSettings(Settings):
    """What add_tokens() can be told."""

    GROUPS: ClassVar = (MODEL,)

    # fmt: off
    tokens: Annotated[str | Sequence[str], Setting(
        MODEL, "Text that becomes a token, or several, such as '<speaker>'; no white space in it",
        repeatable=True)]
    model_name: Annotated[str, Setting(
        MODEL, "Model to add them to: a folder in `model_dir`")] = "124M"
    _: dataclasses.KW_ONLY
    new_model_name: Annotated[str | None, Setting(
        MODEL, "Model to make: a new folder in `model_dir`. None for the model's name with "
        "'-extended'", default_help="the model's name with '-extended'")] = None
    model_dir: Annotated[str, Setting(MODEL, _MODEL_DIR_HELP)] = "models"
    # fmt: on


@dataclasses.dataclass(frozen=True)
class DownloadSettings(Settings):
    """What download_gpt2() can be told."""

    GROUPS: ClassVar = (MODEL,)

    # fmt: off
    model_dir: Annotated[str | os.PathLike[str], Setting(MODEL, _MODEL_DIR_HELP)] = "models"
    model_name: Annotated[str, Setting(
        MODEL, "Model to download: '124M' (500 MB), '355M' (1.4 GB), '774M' (3.1 GB) or '1558M' "
        "(6.2 GB). '117M' and '345M' are older names of '124M' and '355M', and have folders of "
        "their own", choices=MODEL_NAMES)] = "124M"
    base_url: Annotated[str | None, Setting(
        MODEL,
        "Mirror that has the files at <base_url>/models/<model_name>/. None for the environment "
        f"variable {BASE_URL_VARIABLE}, or OpenAI's server if that is not set",
        default_help=f"${BASE_URL_VARIABLE}, or OpenAI's server")] = None
    # fmt: on
