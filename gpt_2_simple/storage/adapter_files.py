"""A folder with an adapter in peft's format in, its configuration and tensors out, and back.

The folder holds `adapter_config.json` and `adapter_model.safetensors`
(https://huggingface.co/docs/peft). Without the package safetensors, an adapter's folder is still
found and moved, but neither checked nor read.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

CONFIG_FILE = "adapter_config.json"
TENSORS_FILE = "adapter_model.safetensors"
PICKLE_FILE = "adapter_model.bin"

# safetensors' names of the types that a tensor may have here. NumPy has no bfloat16: its bits are
# the upper half of a float32's.
_TYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2"}


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


def import_safetensors() -> ModuleType:
    """The package safetensors. Raises ImportError with the remedy if it is missing."""
    try:
        import safetensors
        import safetensors.numpy
    except ImportError as error:
        raise ImportError(
            "adapters (LoRA) are saved in the format of the package safetensors, which is missing: "
            'pip install "gpt_2_simple[lora]"'
        ) from error
    return safetensors


def is_adapter(path: str) -> bool:
    """Whether a path is a folder that looks like an adapter's."""
    return os.path.isfile(os.path.join(path, CONFIG_FILE))


def is_whole(folder: str) -> bool:
    """Whether an adapter's two files can be read and are as long as they say.

    Raises:
        ImportError: safetensors is missing.
    """
    if not is_adapter(folder):
        return False
    try:
        read_config(folder)
        with _opened(folder):
            return True
    except (OSError, ValueError):
        return False


def read_adapter(folder: str) -> AdapterFiles:
    """Reads an adapter.

    Raises:
        FileNotFoundError: a file is missing.
        ImportError: safetensors is missing.
        ValueError: a file is damaged, or holds something else than numbers of a float type.
    """
    config = read_config(folder)
    metadata = read_metadata(folder)
    path = os.path.join(folder, TENSORS_FILE)
    found = import_safetensors().deserialize(Path(path).read_bytes())
    tensors = {name: _as_array(path, name, entry) for name, entry in found}
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
    with _opened(folder) as file:
        return file.metadata() or {}


def _opened(folder: str) -> Any:
    """The file of tensors, whose header is checked, to be used in a `with` block."""
    path = os.path.join(folder, TENSORS_FILE)
    safetensors = import_safetensors()
    if not os.path.isfile(path):
        if os.path.exists(os.path.join(folder, PICKLE_FILE)):
            raise FileNotFoundError(
                f"{folder} has no {TENSORS_FILE}, and a pickle, {PICKLE_FILE}, is never opened: "
                "make the other file from it where peft is installed, by "
                "PeftModel.from_pretrained(model, folder).save_pretrained(new_folder)"
            )
        raise FileNotFoundError(f"{folder} is no whole adapter: it has no {TENSORS_FILE}")
    try:
        return safetensors.safe_open(path, framework="np")
    except safetensors.SafetensorError as error:
        raise ValueError(
            f"{path} is damaged: {error}. Copy or download the adapter again"
        ) from error


def _as_array(path: str, name: str, entry: Mapping[str, Any]) -> np.ndarray:
    kind, data, shape = entry["dtype"], entry["data"], entry["shape"]
    if kind == "BF16":
        bits = np.frombuffer(data, "<u2").astype(np.uint32) << 16
        array = bits.view(np.float32).reshape(shape)
    elif kind in _TYPES:
        array = np.frombuffer(data, _TYPES[kind]).reshape(shape).astype(np.float32)
    else:
        raise ValueError(f"{path}: {name} is of type {kind}, which no adapter's weights have")
    if not np.isfinite(array).all():
        raise ValueError(f"{path}: {name} holds numbers that are infinite or no numbers")
    return array


def write_adapter(
    folder: str,
    config: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    metadata: Mapping[str, str],
) -> None:
    """Makes a folder with an adapter's two files. The caller lets it land whole.

    Args:
        folder: it must not exist.
        config: what adapter_config.json says.
        tensors: float32, by peft's names.
        metadata: what else to write in the file of tensors.

    Raises:
        ImportError: safetensors is missing.
        OSError: it cannot be written.
    """
    content = import_safetensors().numpy.save(
        {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()},
        {"format": "pt", **metadata},
    )
    os.mkdir(folder)
    Path(folder, CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    Path(folder, TENSORS_FILE).write_bytes(content)
