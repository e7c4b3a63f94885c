"""Options in, calls of one public function each out: the commands that pass their options on."""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from types import ModuleType
from typing import Any

from ..common.folders import model_folder, run_folder
from ..common.published import MODEL_NAMES
from ..common.stderr_filter import LOG_LEVEL
from ..data.settings import EncodeCsvSettings, EncodeSettings
from ..exchange.adapter_settings import MergeSettings
from ..exchange.settings import ImportSettings, PushSettings
from ..storage.settings import AddTokensSettings, CreateSettings, DownloadSettings
from .json_output import JsonSettings, tells
from .parser import Command, Options

# Within its block load_module() imports; a program has a block of its own for that.
importing: Callable[[], AbstractContextManager[object]] = contextlib.nullcontext


def take_options(options: Options, names: Iterable[str]) -> Options:
    """Removes the options of these names, as far as they were given, and returns them."""
    return {name: options.pop(name) for name in names if name in options}


def load_module(name: str) -> ModuleType:
    """Imports a module of the package, and TensorFlow with it if the module needs it."""
    with importing():
        os.environ.setdefault(LOG_LEVEL, "2")  # its notes on CPU features help nobody here
        return importlib.import_module(f"gpt_2_simple.{name}")


def check_weights(settings: Any, may_download: bool = False) -> None:
    """Raises what loading would raise for a missing run or model, before TensorFlow is imported.

    Args:
        settings: they have run_name, model_name and their folders; a name may be several.
        may_download: whether a published model may be missing.
    """
    if getattr(settings, "adapter", None) is not None:
        return  # it names its model
    for name in _names(settings.model_name):
        if not (may_download and name in MODEL_NAMES):
            model_folder(settings.model_dir, name)
    if not settings.model_name or not isinstance(settings.run_name, str):
        for name in _names(settings.run_name):
            run_folder(settings.checkpoint_dir, name, or_model=True)


def _names(name: str | Sequence[str] | None) -> Sequence[str]:
    return [name] if isinstance(name, str) else name or ()


def pass_to(
    module: str,
    function: str,
    check: Callable[[Options], object] = lambda options: None,
    returns: str = "path",
) -> Callable[[Options], int]:
    """What runs a command: it calls a function of a module, and returns the exit status 0.

    Args:
        module: where the function is.
        function: its name.
        check: raises what the function would raise, before the module is imported.
        returns: what the function returns, for --json.
    """

    def call(options: Options) -> object:
        check(options)
        return getattr(load_module(module), function)(**options)

    return tells(returns, call)


def _check_merge(options: Options) -> None:
    settings = MergeSettings(**options)
    if settings.adapter is None:
        run_folder(settings.checkpoint_dir, settings.run_name)


def _check_add_tokens(options: Options) -> None:
    settings = AddTokensSettings(**options)
    model_folder(settings.model_dir, settings.model_name)


IMPORT = Command(
    run=pass_to("exchange.huggingface", "import_huggingface"),
    summary="Make a model of one that Hugging Face transformers wrote, in a folder or on the hub.",
    examples=(
        "gpt_2_simple import distilgpt2",
        "gpt_2_simple import path/to/folder --model_name mine",
    ),
    settings=[ImportSettings],
    own_settings=JsonSettings,
    positional="source",
)

PUSH = Command(
    run=pass_to(
        "exchange.push", "push_to_hub", lambda o: check_weights(PushSettings(**o)), returns="url"
    ),
    summary="Export a run or a model, and upload it to the Hugging Face hub.",
    examples=("gpt_2_simple push me/my-model --run_name run1",),
    settings=[PushSettings],
    own_settings=JsonSettings,
    positional="repo_id",
)

DOWNLOAD = Command(
    run=pass_to("storage.download", "download_gpt2"),
    summary="Download a model, or what is missing of it.",
    examples=(
        "gpt_2_simple download 355M",
        "gpt_2_simple download --model_name 124M --base_url https://example.org/gpt-2",
    ),
    settings=[DownloadSettings],
    positional="model_name",
)

CREATE = Command(
    run=pass_to("storage.create", "create_gpt2"),
    summary="Make a small model of your own that knows nothing yet, for finetune to start from.",
    examples=(
        "gpt_2_simple create --model_name nano",
        "gpt_2_simple create shakespeare.txt --model_name mine --n_layer 6 --vocab_size 2000",
    ),
    settings=[CreateSettings],
    own_settings=JsonSettings,
    positional="dataset",
)

ADD_TOKENS = Command(
    run=pass_to("storage.add_tokens", "add_tokens", _check_add_tokens),
    summary="Make a copy of a model whose vocabulary has more tokens, for finetune to start from.",
    examples=(
        "gpt_2_simple add_tokens '<speaker>' '<scene>' --model_name 124M --new_model_name plays",
    ),
    settings=[AddTokensSettings],
    own_settings=JsonSettings,
    positional="tokens",
)

MERGE = Command(
    run=pass_to("exchange.adapters", "merge_adapter", _check_merge, returns="checkpoint"),
    summary="Merge the adapter that a run trained (LoRA) into its model, as a new run.",
    examples=(
        "gpt_2_simple merge run1",
        "gpt_2_simple merge --adapter adapters/poems --model_name 124M --merged_name poems",
    ),
    settings=[MergeSettings],
    own_settings=JsonSettings,
    positional="run_name",
)

ENCODE = Command(
    run=pass_to("data.dataset", "encode_dataset"),
    summary="Turn text into tokens once, so that each finetune starts sooner.",
    examples=("gpt_2_simple encode shakespeare.txt --out_path shakespeare.npz",),
    settings=[EncodeSettings],
    positional="file_path",
)

ENCODE_CSV = Command(
    run=pass_to("data.dataset", "encode_csv", returns="rows"),
    summary="Turn a table into a text file in which tokens mark where each row starts and ends.",
    examples=("gpt_2_simple encode_csv tweets.csv --out_path tweets.txt --column text",),
    settings=[EncodeCsvSettings],
    own_settings=JsonSettings,
    positional="csv_path",
)
