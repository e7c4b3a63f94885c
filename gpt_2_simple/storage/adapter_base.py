"""An adapter in, the checkpoint of the model that it was trained on out."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Mapping

from . import adapter_files, checkpoint, checkpoint_index, runs
from .hub_library import load_library, plain_errors

# Keys in the metadata of an adapter's tensors. The path is relative to the adapter's parent folder.
BASE_PATH = "base_checkpoint"
BASE_MODEL = "base_model"
BASE_DIGEST = "base_digest"


def digest_of(prefix: str) -> str:
    """A digest of a checkpoint's tensors: their names, types, shapes and checksums.

    It comes from the checkpoint's index alone, which has a CRC-32C of each tensor, so it takes no
    time; the checksums are compared with the tensors when these are read.
    """
    entries = checkpoint_index.read_index(f"{prefix}.index")
    lines = sorted(
        f"{name} {entry.dtype} {list(entry.shape)} {entry.crc32c:08x}"
        for name, entry in entries.items()
        if name.startswith("model/")
    )
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def describe_base(prefix: str, run: str, model_name: str) -> dict[str, str]:
    """What an adapter's file says of its base.

    Args:
        prefix: the base's checkpoint.
        run: the folder of the adapter's run, in which the adapter will lie.
        model_name: the model that the run was made from.
    """
    path = os.path.abspath(prefix)
    try:
        path = os.path.relpath(path, os.path.abspath(run))
    except ValueError:  # On Windows, of another drive.
        pass
    path = path.replace(os.sep, "/")
    return {BASE_PATH: path, BASE_MODEL: model_name, BASE_DIGEST: digest_of(prefix)}


def find_base(adapter: str, model_dir: str) -> str:
    """The prefix of the checkpoint that an adapter of ours was trained on.

    It is looked for where it was, then among the models. The digest tells whether it is the one.

    Raises:
        FileNotFoundError: it is not there.
        ValueError: there are only others, or the adapter does not name its base.
    """
    metadata = adapter_files.read_metadata(adapter)
    if BASE_DIGEST not in metadata:
        raise ValueError(
            f"{adapter} does not say which model it was trained on: give model_name, such as '124M'"
        )
    others = []
    for prefix in _candidates(adapter, metadata, model_dir):
        if not checkpoint.is_whole(prefix):
            continue
        if digest_of(prefix) == metadata[BASE_DIGEST]:
            return prefix
        others.append(prefix)
    if others:
        raise ValueError(_is_of_another_base(adapter, metadata, others[0]))
    name = metadata.get(BASE_MODEL)
    raise FileNotFoundError(
        f"{adapter} is an adapter, and the model that it was trained on, {name}, is neither at "
        f"{metadata.get(BASE_PATH)} nor in {model_dir}: copy or download it there, or give "
        "model_dir"
    )


def check_base(adapter: str, prefix: str) -> None:
    """Raises ValueError if an adapter names another base than the checkpoint `prefix`."""
    metadata = adapter_files.read_metadata(adapter)
    if metadata.get(BASE_DIGEST) not in (None, digest_of(prefix)):
        raise ValueError(_is_of_another_base(adapter, metadata, prefix))


def _is_of_another_base(adapter: str, metadata: Mapping[str, str], prefix: str) -> str:
    return (
        f"{adapter} was trained on other weights than those of {prefix}: on "
        f"{metadata.get(BASE_MODEL)}, {metadata.get(BASE_PATH)}, whose digest is "
        f"{metadata[BASE_DIGEST][:12]}. Put that model back, or train another adapter"
    )


def _candidates(adapter: str, metadata: Mapping[str, str], model_dir: str) -> Iterator[str]:
    run = os.path.dirname(os.path.abspath(adapter))
    if BASE_PATH in metadata:
        yield os.path.normpath(os.path.join(run, metadata[BASE_PATH]))
    folders = [runs.base_model_folder(run), runs.base_model_folder(run, model_dir)]
    if BASE_MODEL in metadata:
        folders.append(os.path.join(model_dir, metadata[BASE_MODEL]))
    for folder in folders:
        prefix = folder and checkpoint.latest_checkpoint(folder)
        if prefix:
            yield prefix


def adapter_folder(adapter: str) -> str:
    """The folder of an adapter, which is downloaded if its name is one on the Hugging Face hub.

    Raises:
        ConnectionError: the hub cannot be reached, and the cache lacks the adapter.
        FileNotFoundError: there is neither such a folder nor such a name.
        ImportError: it may be a name on the hub, and huggingface_hub is missing.
        PermissionError: the hub asks for a token that may read it.
    """
    if os.path.lexists(adapter):
        return adapter
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", adapter):
        raise FileNotFoundError(f"adapter={adapter!r}: there is no such folder")
    library = load_library()
    with plain_errors(library, adapter):
        folder: str = library.snapshot_download(
            adapter, allow_patterns=[adapter_files.CONFIG_FILE, adapter_files.TENSORS_FILE]
        )
    return folder
