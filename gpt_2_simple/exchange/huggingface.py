"""A run or a model in, a folder of Hugging Face transformers out, and back."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from ..common.files import sync_file
from ..common.hparams import HParams
from ..common.report import progress, say
from ..common.settings import settings_function
from ..data.vocabulary import save_vocabulary
from ..storage import safetensors_file
from ..storage.checkpoint_tensors import (
    aligned_empty,
    open_checkpoint,
    write_checkpoint,
    write_model_files,
)
from ..storage.safetensors_file import StoredTensor
from . import config_file, hub, model_card, tokenizer_files
from .settings import ExportSettings, ImportSettings, PushSettings
from .tensor_names import PREFIX, TensorName, tensors_of
from .weights import StoredWeights, check_new, name_of, new_folder, use_weights

_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}

# What transformers stores beside GPT-2's parameters: masks, which are no parameters.
_BUFFER = re.compile(r"h\.\d+\.attn\.(?:masked_)?bias")
_TRANSFORMER = re.compile(r"(?:h|wte|wpe|ln_f)\.")
_UNEMBEDDING = "lm_head.weight"


# --- export -------------------------------------------------------------------------------------


@settings_function(ExportSettings)
def export_huggingface(settings: ExportSettings) -> str:
    """Writes a run or a model as a folder that Hugging Face transformers loads.

    vLLM, Text Generation Inference and CTranslate2's converter read such folders too. It holds
    model.safetensors (or several files with an index), config.json, generation_config.json,
    tokenizer.json, vocab.json, merges.txt, tokenizer_config.json, special_tokens_map.json and
    README.md, a model card. One tensor is in memory at a time.

    Args:
        settings: each of them is an argument.

    Returns:
        The folder.

    Raises:
        FileExistsError: there is something at `path`.
        FileNotFoundError: there is no such run, model or checkpoint; lists those there are.
        OSError: the disk is full, or the folder cannot be written. Nothing is left of it.
        ValueError: a setting is out of range; or a weight is not finite, or too large for
            `precision`; or the checkpoint's files do not fit together.
    """
    path = os.path.normpath(settings.path or os.path.join("export", name_of(settings)))
    check_new(path, "path")
    max_bytes = parse_size("max_shard_size", settings.max_shard_size)
    write_export(path, settings, max_bytes)
    say(f"Exported to {path}")
    return path


def write_export(
    path: str, settings: ExportSettings | PushSettings, max_bytes: int, remedy: str = "path"
) -> None:
    """Writes the export of the settings' weights as the folder `path`; see export_huggingface().

    `remedy` is what an error on a full disk tells to give another of.
    """

    def write(weights: StoredWeights) -> None:
        with new_folder(path, remedy) as new:
            _write_files(new, weights, settings.precision, max_bytes)

    use_weights(settings, write)


def parse_size(name: str, size: str | int) -> int:
    """A number of bytes from a number, or from a text such as '5GB' or '200MiB'."""
    if isinstance(size, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG]i?B)?\s*", size, re.IGNORECASE)
        value = float(match[1]) * _UNITS.get((match[2] or "").upper(), 1) if match else 0
    else:
        value = size
    if not 1 <= value < math.inf:
        raise ValueError(f"{name}={size!r} must be a number of bytes, or a size such as '5GB'")
    return int(value)


def _write_files(folder: str, weights: StoredWeights, precision: str, max_bytes: int) -> None:
    """Writes all files of an export into an empty folder; `max_bytes` is that of a shard."""
    names = tensors_of(weights.hparams)
    tensors = [(name.theirs, name.shape) for name in names]
    by_theirs = {name.theirs: name for name in names}
    shards = safetensors_file.plan_shards(tensors, precision, max_bytes)
    for name, text in _texts(weights, precision).items():
        _write_new(os.path.join(folder, name), text)
    with open_checkpoint(weights.prefix) as read, _bar("Exporting", weights.hparams) as bar:

        def read_tensor(name: str) -> np.ndarray:
            value = read(by_theirs[name].ours).reshape(by_theirs[name].shape)
            bar.update(value.size)
            return value

        for file, shard in shards.items():
            path = os.path.join(folder, file)
            safetensors_file.write_tensors(path, shard, precision, read_tensor)
    if len(shards) > 1:
        index = safetensors_file.shard_index(shards, precision)
        _write_new(os.path.join(folder, safetensors_file.INDEX_FILE), _json(index))


def _texts(weights: StoredWeights, precision: str) -> dict[str, str]:
    """The contents of the files beside the weights, by their names."""
    hparams, vocabulary = weights.hparams, weights.vocabulary
    contents = {
        config_file.CONFIG_FILE: config_file.config_of(hparams, vocabulary, precision),
        "generation_config.json": config_file.generation_config_of(vocabulary),
        "tokenizer_config.json": config_file.tokenizer_config_of(hparams, vocabulary),
        "special_tokens_map.json": config_file.special_tokens_of(vocabulary),
    }
    return {
        **{name: _json(content) for name, content in contents.items()},
        **tokenizer_files.tokenizer_files(vocabulary),
        "README.md": model_card.model_card(weights, precision),
    }


def _json(content: Mapping[str, object]) -> str:
    return json.dumps(content, indent=2) + "\n"


def _write_new(path: str, text: str) -> None:
    with open(path, "xb") as file:
        file.write(text.encode("utf-8"))
        sync_file(file)


def _bar(desc: str, hparams: HParams) -> Any:
    total = sum(math.prod(name.shape) for name in tensors_of(hparams))
    return progress(total=total, desc=desc, unit="", unit_scale=True)


# --- import -------------------------------------------------------------------------------------


@settings_function(ImportSettings)
def import_huggingface(settings: ImportSettings) -> str:
    """Makes a model of one that Hugging Face transformers wrote, in a folder or on the hub.

    It has the files of a downloaded model: finetune(), load_gpt2() and gpt-2-simple 0.8.1 take it.
    A model of the hub is downloaded by the huggingface_hub library into its cache; the variables
    HF_TOKEN, HF_HOME, HF_ENDPOINT and HF_HUB_OFFLINE act. One tensor is in memory at a time.

    Args:
        settings: each of them is an argument.

    Returns:
        The model's folder.

    Raises:
        ConnectionError: the hub cannot be reached, and its cache lacks the model.
        FileExistsError: there is a model of this name.
        FileNotFoundError: there is no such folder, or no such model on the hub; or its weights,
            a shard or its tokenizer are missing.
        ImportError: huggingface_hub is missing: `pip install "gpt_2_simple[hub]"`.
        OSError: the disk is full, or the folder cannot be written. Nothing is left of it.
        ValueError: it is not GPT-2 as it is computed here, which the message says the field of; or
            a file is damaged; or a tensor has another shape or numbers that are not finite.
    """
    source = settings.source
    name = settings.model_name or os.path.basename(os.path.abspath(source))
    folder = os.path.join(settings.model_dir, name)
    check_new(folder, "model_name")
    if os.path.exists(source) and not os.path.isdir(source):
        raise NotADirectoryError(f"{source} is no folder: give the folder that holds the model")
    if not os.path.isdir(source):
        source = hub.download(source, settings.revision)
    elif settings.revision is not None:
        raise ValueError(
            f"revision={settings.revision!r} is for models on the hub, and {source} is a folder"
        )
    _import_folder(source, folder)
    say(f"Imported {settings.source} as {folder}")
    return folder


def _import_folder(source: str, folder: str) -> None:
    hparams = config_file.read_config(source)
    stored = _match_tensors(source, hparams)
    vocabulary = tokenizer_files.read_tokenizer(source, hparams.n_vocab)
    for note in vocabulary.notes:
        say(f"note: {note}")
    with new_folder(folder, "model_name") as new:
        save_vocabulary(vocabulary.encoder, new)
        with write_checkpoint(new) as write, _bar("Importing", hparams) as bar:
            for name, tensor in stored.items():
                values = aligned_empty(name.our_shape)
                safetensors_file.read_into(tensor, values)
                write(name.ours, values)
                bar.update(values.size)
        write_model_files(new, hparams)


def _match_tensors(source: str, hparams: HParams) -> dict[TensorName, StoredTensor]:
    """Where each of GPT-2's tensors lies in a folder.

    Raises:
        FileNotFoundError: there are no weights, or only pickles.
        ValueError: a tensor is missing, has another shape, or does not belong to GPT-2.
    """
    _check_has_weights(source)
    found = {
        name.removeprefix(PREFIX): tensor
        for name, tensor in safetensors_file.find_tensors(source).items()
    }
    names = tensors_of(hparams)
    matched: dict[TensorName, StoredTensor] = {}
    for name in names:
        tensor = found.pop(name.theirs.removeprefix(PREFIX), None)
        if tensor is None:
            raise ValueError(
                f"{source} lacks the tensor {name.theirs}, which its config.json needs"
            )
        if tensor.shape != name.shape:
            raise ValueError(
                f"{tensor.path}: {tensor.name} has shape {list(tensor.shape)}, and by config.json "
                f"it has {list(name.shape)}: the files belong to different models"
            )
        matched[name] = tensor
    unembedding = found.pop(_UNEMBEDDING, None)
    if unembedding is not None:
        _check_tied(unembedding, matched[names[0]])
    others = sorted(name for name in found if not _BUFFER.fullmatch(name))
    foreign = [name for name in others if _TRANSFORMER.match(name)]
    if foreign:
        raise ValueError(f"{source} has the tensor {foreign[0]}, which GPT-2 has not")
    if others:
        say(f"note: left out {', '.join(others)}, which is no part of the language model")
    return matched


def _check_has_weights(source: str) -> None:
    files = os.listdir(source)
    wanted = (safetensors_file.WEIGHTS_FILE, safetensors_file.INDEX_FILE)
    if any(name in files for name in wanted):
        return
    pickles = [name for name in files if re.fullmatch(r"pytorch_model.*\.bin", name)]
    if pickles:
        raise FileNotFoundError(hub.pickle_message(source, pickles[0]))
    shards = sorted(name for name in files if name.endswith(".safetensors"))
    there = f"; {', '.join(shards)} alone cannot be read" if shards else ""
    raise FileNotFoundError(
        f"{source} has no weights: {wanted[0]}, or {wanted[1]} with its shards, is missing{there}"
    )


def _check_tied(unembedding: StoredTensor, embedding: StoredTensor) -> None:
    """Raises ValueError if the output projection is not the token embedding."""
    if unembedding.shape == embedding.shape:
        pairs = zip(
            safetensors_file.read_chunks(unembedding),
            safetensors_file.read_chunks(embedding),
            strict=True,
        )
        if all(np.array_equal(one, other) for one, other in pairs):
            return
    raise ValueError(
        f"{unembedding.path}: {unembedding.name} differs from {embedding.name}, and GPT-2 has one "
        "matrix for both (tie_word_embeddings)"
    )
