"""A folder with an adapter in peft's format in, its configuration and tensors out, and back.

The folder holds `adapter_config.json` and `adapter_model.safetensors`
(https://huggingface.co/docs/peft).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..common.files import sync
from . import safetensors_file

CONFIG_FILE = "adapter_config.json"
TENSORS_FILE = "adapter_model.safetensors"
PICKLE_FILE = "adapter_model.bin"


class AdapterFiles(NamedTuple):
    """What an adapter's folder holds.

    Attributes:
        folder: its path, for errors.
        config: adapter_config.json.
        tensors: float32, by peft's names.
        metadata: what else is written in the file of tensors; ours name the base there.
    """

    folder: str
    config: dict[str, Any]
    tensors: dict[str, np.ndarray]
    metadata: dict[str, str]


def digest_of_adapter(folder: str) -> str:
    """A digest of an adapter's files, in hexadecimal; FileNotFoundError if one is missing."""
    digest = hashlib.sha256()
    for name in (CONFIG_FILE, TENSORS_FILE):
        with open(os.path.join(folder, name), "rb") as file:
            digest.update(hashlib.sha256(file.read()).digest())
    return digest.hexdigest()


def is_adapter(path: str) -> bool:
    """Whether a path is a folder that looks like an adapter's."""
    return os.path.isfile(os.path.join(path, CONFIG_FILE))


def is_whole(folder: str) -> bool:
    """Whether an adapter's two files can be read and are as long as they say."""
    try:
        read_config(folder)
        safetensors_file.read_header(_tensors_file(folder))
        return True
    except (OSError, ValueError):
        return False


def read_adapter(folder: str) -> AdapterFiles:
    """Reads an adapter.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged, or holds something else than finite numbers of a float type.
    """
    config, metadata = read_config(folder), read_metadata(folder)
    tensors = {}
    for name, stored in safetensors_file.read_header(_tensors_file(folder)).items():
        tensors[name] = np.empty(stored.shape, np.float32)
        safetensors_file.read_into(stored, tensors[name])
    return AdapterFiles(folder, config, tensors, metadata)


def read_config(folder: str) -> dict[str, Any]:
    """An adapter's adapter_config.json.

    Raises:
        FileNotFoundError: it is missing.
        ValueError: it is no object in JSON.
    """
    path = os.path.join(folder, CONFIG_FILE)
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{folder} is no adapter: it has no {CONFIG_FILE}")
    try:
        config = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); copy the adapter again") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} holds {config!r} where an object should be")
    return config


def read_metadata(folder: str) -> dict[str, str]:
    """What an adapter's file of tensors says beside the tensors; raises as read_adapter() does."""
    return safetensors_file.read_metadata(_tensors_file(folder))


def _tensors_file(folder: str) -> str:
    """The path of an adapter's file of tensors. Raises FileNotFoundError if there is none."""
    path = os.path.join(folder, TENSORS_FILE)
    if os.path.isfile(path):
        return path
    if os.path.exists(os.path.join(folder, PICKLE_FILE)):
        raise FileNotFoundError(
            f"{folder} has no {TENSORS_FILE}, and a pickle, {PICKLE_FILE}, is never opened: "
            "make the other file from it where peft is installed, by "
            "PeftModel.from_pretrained(model, folder).save_pretrained(new_folder)"
        )
    raise FileNotFoundError(f"{folder} is no whole adapter: it has no {TENSORS_FILE}")


def write_adapter(
    folder: str,
    config: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    metadata: Mapping[str, str],
) -> None:
    """Makes a folder with an adapter's two files, and flushes it. The caller lets it land whole.

    Args:
        folder: it must not exist.
        config: what adapter_config.json says.
        tensors: float32, by peft's names.
        metadata: what else to write in the file of tensors.

    Raises:
        OSError: it cannot be written.
        ValueError: a number is infinite or no number.
    """
    os.mkdir(folder)
    path = os.path.join(folder, CONFIG_FILE)
    Path(path).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    sync(path)
    shapes = [(name, tensor.shape) for name, tensor in tensors.items()]
    path = os.path.join(folder, TENSORS_FILE)
    safetensors_file.write_tensors(path, shapes, "float32", tensors.__getitem__, metadata)
    sync(folder)
