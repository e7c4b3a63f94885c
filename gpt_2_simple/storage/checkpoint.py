"""Folders in, their checkpoints out: find, check and save them whole; no TensorFlow.

A model folder (`models/124M`) and a run folder (`checkpoint/run1`) hold the same things under
slightly different names: a TensorFlow checkpoint of the variables `model/...`, the vocabulary and
`hparams.json`. A run that trains an adapter has a folder in peft's format in the place of each
checkpoint's files: `adapter-N/`, or `best/`; its path is then the checkpoint's prefix.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from ..common import files
from ..common.errors import file_reason
from ..common.files import sync
from . import adapter_files, checkpoint_index

VOCABULARY_FILES = ("encoder.json", "vocab.bpe")
# Base names: a model's checkpoint, and a run's best weights. The weights of step N are model-N.
MODEL_CHECKPOINT = "model.ckpt"
BEST = "best"
COUNTER = "counter"
LIST_FILE = "checkpoint"

# Folders inside a model's or run's: a save that is being written, one whose files only have to be
# moved to their places, and files to remove.
UNFINISHED = ".saving-"
FINISHED = ".saved-"
TRASH = ".removing-"


# --- find and check -----------------------------------------------------------------------------


def latest_checkpoint(folder: str) -> str | None:
    """The newest whole checkpoint of a folder.

    The file `checkpoint` names it. If that checkpoint is missing or cut short, the newest one of
    the others that is whole is taken. A prefix such as 'checkpoint/run1/model-100' is returned, or
    None.
    """
    named = [os.path.join(folder, name) for name in reversed(named_checkpoints(folder))]
    by_step = [os.path.join(folder, name) for name in reversed(_checkpoints_on_disk(folder))]
    return next((prefix for prefix in named + by_step if is_whole(prefix)), None)


def has_any(folder: str) -> bool:
    """Whether a folder has checkpoints, whole or damaged, or had some."""
    return bool(named_checkpoints(folder) or _checkpoints_on_disk(folder))


def named_checkpoints(folder: str) -> list[str]:
    """The base names that the file `checkpoint` lists, oldest first, the latest last.

    Folders in it are left out: a run that was copied from another machine keeps working.
    """
    try:
        with open(os.path.join(folder, LIST_FILE), encoding="utf-8", errors="replace") as file:
            text = file.read()
    except (FileNotFoundError, IsADirectoryError):
        return []

    def values(key: str) -> list[str]:
        found = re.findall(rf'^\s*{key}:\s*"((?:[^"\\]|\\.)*)"', text, re.MULTILINE)
        return [os.path.basename(path.replace("\\\\", "/")) for path in found]

    latest = values("model_checkpoint_path")[:1]
    return [name for name in values("all_model_checkpoint_paths") if name not in latest] + latest


def _checkpoints_on_disk(folder: str) -> list[str]:
    """Base names of the checkpoints in a folder by rising step; model.ckpt counts as step -1."""
    names = os.listdir(folder) if os.path.isdir(folder) else []
    pattern = r"(model(?:-(\d+)|\.ckpt))\.index|(adapter-(\d+))"
    found = [re.fullmatch(pattern, name) for name in names]
    steps = {m[1] or m[3]: int(m[2] or m[4] or -1) for m in found if m}
    return sorted(steps, key=steps.__getitem__)


def is_whole(prefix: str) -> bool:
    """Whether a checkpoint's index can be read and its data files are as long as the index says.

    An adapter's files are looked at in the same way.
    """
    if adapter_files.is_adapter(prefix):
        return adapter_files.is_whole(prefix)
    try:
        sizes = checkpoint_index.data_sizes(checkpoint_index.read_index(f"{prefix}.index"))
        shards = max(sizes, default=0) + 1
        return all(
            os.path.getsize(f"{prefix}.data-{shard:05d}-of-{shards:05d}") >= size
            for shard, size in sizes.items()
        )
    except (OSError, ValueError):
        return False


def restore_path(folder: str, checkpoint: str = "latest") -> str:
    """The checkpoint to load: 'latest', or a base name such as 'model-100' or 'best'.

    Raises:
        FileNotFoundError: there is no such checkpoint in the folder, or it is not whole.
    """
    if checkpoint == "latest":
        prefix = latest_checkpoint(folder)
        if prefix is None:
            raise FileNotFoundError(
                f"{folder} holds no whole checkpoint: copy or download it again, or start a run "
                "over by restore_from='fresh'"
            )
        return prefix
    prefix = os.path.join(folder, checkpoint)
    if not is_whole(prefix):
        best = [BEST] if is_whole(os.path.join(folder, BEST)) else []
        there = ", ".join(_checkpoints_on_disk(folder) + best) or "none"
        raise FileNotFoundError(f"no whole checkpoint {prefix}; checkpoints there: {there}")
    return prefix


# --- save ---------------------------------------------------------------------------------------


# Writes a checkpoint's files, which begin with the path that it is given, and flushes them to disk.
Write = Callable[[str], object]


def save_whole(
    folder: str,
    base: str,
    writes: Mapping[str, Write],
    contents: Mapping[str, bytes],
) -> None:
    """Writes a checkpoint and what belongs to it: all or nothing.

    All files are written into a folder of their own, `.saving-...`, and flushed to disk. The save
    counts from the moment when that folder is renamed to `.saved-<base>`. Then the files are moved
    to their places. If a process is killed meanwhile, finish_saves() completes or undoes its save.

    Args:
        folder: a model or run folder; nobody else may save there now.
        base: the base name of the checkpoint.
        writes: functions by the base name of what they write.
        contents: contents of other files, by their names.

    Raises:
        OSError: the disk is full, or the folder cannot be written.
    """
    try:
        finish_saves(folder)
        unfinished = tempfile.mkdtemp(prefix=UNFINISHED, dir=folder)
        try:
            _write_all(unfinished, writes, contents)
            os.rename(unfinished, os.path.join(folder, FINISHED + base))
        except BaseException:
            files.remove_folder(unfinished)
            raise
        sync(folder)
        _move_into_place(folder, base)
    except OSError as error:
        raise could_not_save(os.path.join(folder, base), error) from error


def could_not_save(prefix: str, error: Exception) -> OSError:
    """The error for a checkpoint that a file's error kept from being saved."""
    return OSError(
        f"could not save {prefix}: {file_reason(error)}. Earlier checkpoints are untouched; free "
        "some space on the disk or give another checkpoint_dir"
    )


def _write_all(folder: str, writes: Mapping[str, Write], contents: Mapping[str, bytes]) -> None:
    """Writes checkpoints and other files into an empty folder, and flushes all to disk."""
    _run_in_parallel(
        [functools.partial(write, os.path.join(folder, base)) for base, write in writes.items()]
    )
    for name, content in contents.items():
        path = os.path.join(folder, name)
        with open(path, "wb") as file:
            file.write(content)
        sync(path)
    sync(folder)


def _run_in_parallel(writes: Sequence[Callable[[], object]]) -> None:
    """The data of one checkpoint are flushed while those of another are still being written."""
    try:
        with ThreadPoolExecutor(len(writes)) as pool:
            results = [pool.submit(write) for write in writes]
    except RuntimeError:  # No thread starts any more when the main thread has ended.
        for write in writes:
            write()
        return
    for result in results:
        result.result()


def _move_into_place(folder: str, base: str) -> None:
    """Moves the files of a finished save to their places.

    A checkpoint that has an index, or a folder, is whole, so that is moved after all that belongs
    to it. The file `checkpoint`, which lists it, comes last.
    """
    finished = os.path.join(folder, FINISHED + base)
    index = f"{base}.index"
    last = [base, index, COUNTER, LIST_FILE]
    names = sorted(os.listdir(finished), key=lambda name: name in last and last.index(name) + 1)
    # If this replaces an older checkpoint, its old index must never stand beside new data.
    if index in names:
        with contextlib.suppress(FileNotFoundError):
            os.remove(os.path.join(folder, index))
    if base in names or index in names:  # and what replaces an adapter may be a model, or not
        _remove_other_kind(folder, base, is_adapter=base in names)
    for name in names:
        files.replace(os.path.join(finished, name), os.path.join(folder, name))
    sync(folder)
    os.rmdir(finished)


def _remove_other_kind(folder: str, base: str, is_adapter: bool) -> None:
    """Removes what stands in the way of a checkpoint: an adapter's folder, or a model's files."""
    old = [base]
    if is_adapter:  # The files of a model may be new already: then its index is still to be moved.
        old += [f"{base}.index", *(n for n in os.listdir(folder) if n.startswith(f"{base}."))]
    if any(os.path.lexists(os.path.join(folder, name)) for name in old):
        remove_trash(move_to_trash(folder, old))


def finish_saves(folder: str) -> None:
    """Completes each save that a killed process had written whole, and removes other leftovers.

    The caller must hold the folder's lock, if it is a run's: nobody else may be saving there.
    """
    for name in os.listdir(folder):
        path = os.path.join(folder, name)
        if name.startswith(FINISHED):
            _move_into_place(folder, name.removeprefix(FINISHED))
        elif name.startswith((UNFINISHED, TRASH)) or files.is_temporary(name):
            if os.path.isdir(path):
                files.remove_folder(path)
            else:
                with contextlib.suppress(OSError):
                    os.remove(path)


def move_to_trash(folder: str, names: Sequence[str]) -> str:
    """Moves files of a folder, in this order, into a trash folder.

    Moving them is instant; removing large files is not. remove_trash() does that later, or
    finish_saves() if this process is killed.
    """
    trash = tempfile.mkdtemp(prefix=TRASH, dir=folder)
    for name in names:
        with contextlib.suppress(FileNotFoundError):
            os.replace(os.path.join(folder, name), os.path.join(trash, name))
    return trash


def remove_trash(trash: str) -> None:
    """Removes a folder from move_to_trash()."""
    files.remove_folder(trash)


def list_text(names: Sequence[str]) -> str:
    """The text of the file `checkpoint`: base names of a folder's checkpoints, oldest first."""
    lines = [f'model_checkpoint_path: "{names[-1]}"']
    lines += [f'all_model_checkpoint_paths: "{name}"' for name in names]
    return "\n".join(lines) + "\n"
