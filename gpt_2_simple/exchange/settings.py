"""The settings of export, import, push and GGUF, each stated once; no TensorFlow."""

from __future__ import annotations

import dataclasses
from typing import Annotated, ClassVar

from ..common.hparams import PRECISIONS
from ..common.settings import Setting, Settings, fields_of
from ..storage.settings import MODEL_OR_RUN, LoadSettings

WEIGHTS, FILES, HUB = MODEL_OR_RUN, "files", "hub"

_LOAD = fields_of(LoadSettings)

QUANTIZATIONS = ("f32", "f16", "q8_0", "q4_0")

RUN_NAME = Setting(WEIGHTS, "Run to take the weights from: a folder in `checkpoint_dir`")
CHECKPOINT_DIR = _LOAD["checkpoint_dir"].setting
CHECKPOINT = Setting(
    WEIGHTS,
    "Checkpoint of the run: 'latest', 'best', a name such as 'model-1000', or its step",
)
MODEL_NAME = Setting(
    WEIGHTS,
    "Take this model instead of a run: a folder in `model_dir`",
    default_help="none: the run is taken",
)
MODEL_DIR = _LOAD["model_dir"].setting
PRECISION = Setting(
    FILES,
    "Type of the numbers in the files. 'bfloat16' and 'float16' take half the space; 'float16' "
    "does not hold numbers above 65,504",
    choices=PRECISIONS,
)
MAX_SHARD_SIZE = Setting(
    FILES,
    "Most bytes in one file of weights, as a number or as '5GB', '200MB', '1GiB'; larger models "
    "get several files and an index",
)


@dataclasses.dataclass(frozen=True)
class ExportSettings(Settings):
    """What export_huggingface() can be told."""

    GROUPS: ClassVar = (WEIGHTS, FILES)

    # fmt: off
    run_name: Annotated[str, RUN_NAME] = "run1"
    checkpoint_dir: Annotated[str, CHECKPOINT_DIR] = "checkpoint"
    checkpoint: Annotated[str | int, CHECKPOINT] = "latest"
    path: Annotated[str | None, Setting(
        FILES, "Folder to make. None for export/<run>, or export/<model>",
        default_help="export/<run or model>")] = None
    precision: Annotated[str, PRECISION] = "float32"
    _: dataclasses.KW_ONLY
    model_name: Annotated[str | None, MODEL_NAME] = None
    model_dir: Annotated[str, MODEL_DIR] = "models"
    max_shard_size: Annotated[str | int, MAX_SHARD_SIZE] = "5GB"
    # fmt: on


@dataclasses.dataclass(frozen=True)
class ImportSettings(Settings):
    """What import_huggingface() can be told."""

    GROUPS: ClassVar = (WEIGHTS, HUB)

    # fmt: off
    source: Annotated[str, Setting(
        WEIGHTS, "Folder that transformers wrote, or the name of a model on the Hugging Face hub, "
        "such as 'distilgpt2' or 'microsoft/DialoGPT-small'")]
    model_name: Annotated[str | None, Setting(
        WEIGHTS, "Model to make: a new folder in `model_dir`. None for the last part of `source`",
        default_help="the last part of the source")] = None
    model_dir: Annotated[str, MODEL_DIR] = "models"
    revision: Annotated[str | None, Setting(
        HUB, "Branch, tag or commit of a model on the hub", default_help="its main branch")] = None
    # fmt: on


@dataclasses.dataclass(frozen=True)
class PushSettings(Settings):
    """What push_to_hub() can be told."""

    GROUPS: ClassVar = (HUB, WEIGHTS, FILES)

    # fmt: off
    repo_id: Annotated[str, Setting(
        HUB, "Repository on the Hugging Face hub, '<user>/<name>'; it is made if there is none")]
    run_name: Annotated[str, RUN_NAME] = "run1"
    checkpoint_dir: Annotated[str, CHECKPOINT_DIR] = "checkpoint"
    checkpoint: Annotated[str | int, CHECKPOINT] = "latest"
    private: Annotated[bool, Setting(
        HUB, "Make the repository private if it is new; one that is there stays as it is")] = True
    # No flag: a shell keeps its lines in a history.
    token: Annotated[str | None, Setting(
        None, "Token of the hub with the right to write. None for the variable HF_TOKEN, or what "
        "`hf auth login` stored")] = None
    precision: Annotated[str, PRECISION] = "float32"
    _: dataclasses.KW_ONLY
    model_name: Annotated[str | None, MODEL_NAME] = None
    model_dir: Annotated[str, MODEL_DIR] = "models"
    max_shard_size: Annotated[str | int, MAX_SHARD_SIZE] = "5GB"
    # fmt: on


@dataclasses.dataclass(frozen=True)
class GgufSettings(Settings):
    """What export_gguf() can be told."""

    GROUPS: ClassVar = (WEIGHTS, FILES)

    # fmt: off
    run_name: Annotated[str, RUN_NAME] = "run1"
    checkpoint_dir: Annotated[str, CHECKPOINT_DIR] = "checkpoint"
    checkpoint: Annotated[str | int, CHECKPOINT] = "latest"
    path: Annotated[str | None, Setting(
        FILES, "Folder to make. None for export/<run>-<quantization>, or the same with the model",
        default_help="export/<run or model>-<quantization>")] = None
    quantization: Annotated[str, Setting(
        FILES, "Type of the matrices in a GGUF file: 'f32', 'f16', or blocks of 32 numbers in 8 or "
        "4 bits with a scale, 'q8_0' and 'q4_0', which n_embd must be a multiple of 32 for",
        choices=QUANTIZATIONS)] = "f16"
    _: dataclasses.KW_ONLY
    model_name: Annotated[str | None, MODEL_NAME] = None
    model_dir: Annotated[str, MODEL_DIR] = "models"
    # fmt: on
