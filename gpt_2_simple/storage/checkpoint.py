"""Folders in, restored variables out, and back: find, check, restore and save checkpoints.

A model folder (`models/124M`) and a run folder (`checkpoint/run1`) hold the same things under
slightly different names: a TensorFlow checkpoint of the variables `model/...`, the vocabulary and
`hparams.json`. A run that trains an adapter has a folder in peft's format in the place of each
checkpoint's files: `adapter-N/`, or `best/`; its path is then the checkpoint's prefix.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import tensorflow as tf

from .. import model
from ..common import files
from ..common.errors import first_line
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


# --- restore ------------------------------------------------------------------------------------


class CheckpointOps(NamedTuple):
    """Reads variables from a checkpoint, or writes them to one, whose prefix is fed."""

    prefix: tf.Tensor
    done: tf.Operation


def build_restore(*variables: tf.Variable, stored: tuple[int, ...] = ()) -> CheckpointOps:
    """Adds the operations that read variables; each has its own name in the checkpoint.

    They are read one after the other: when a model is loaded over another, at most one variable is
    in memory twice. `stored` has each variable's DataType number in the checkpoint, see
    stored_types(); without it, weights are float32 there.
    """
    with tf.compat.v1.name_scope("restore"):
        prefix = tf.compat.v1.placeholder(tf.string, [], name="prefix")
        last: list[tf.Operation] = []
        # All that is narrower than what is read gets its memory before that: else it would lie in
        # the holes which the wider tensors leave, each larger than what then lies in it. The BFC
        # allocator lost 550 MB so with 1558M's matrices in bfloat16.
        narrow = {v.ref() for v in variables if v.dtype in (tf.bfloat16, tf.float16)}
        for variable in variables:
            if variable.ref() in narrow:
                with tf.control_dependencies(last), tf.device(variable.device):
                    zeros = tf.raw_ops.Empty(shape=variable.shape, dtype=variable.dtype, init=True)
                    last = [variable.assign(zeros, read_value=False)]
        for index, variable in enumerate(variables):
            with tf.control_dependencies(last), tf.device("/cpu:0"):
                # In whatever precision they are held, weights are saved as float32.
                dtype = tf.float32 if variable.ref() in narrow else variable.dtype
                (value,) = tf.raw_ops.RestoreV2(
                    prefix=prefix, tensor_names=[variable.op.name], shape_and_slices=[""],
                    dtypes=[tf.as_dtype(stored[index]) if stored else dtype],
                )  # fmt: skip
                value.set_shape(variable.shape)
                value = tf.cast(value, variable.dtype)
            set_value = variable.assign_add if variable.ref() in narrow else variable.assign
            last = [set_value(value, read_value=False)]
        return CheckpointOps(prefix, tf.group(*last))


def stored_types(prefix: str, variables: Sequence[tf.Variable]) -> tuple[int, ...]:
    """Each variable's DataType number in a checkpoint; () if all are float32, as we save them."""
    entries = checkpoint_index.read_index(f"{prefix}.index")
    types = tuple(entries[variable.op.name].dtype for variable in variables)
    return () if set(types) == {tf.float32.as_datatype_enum} else types


def check_shapes(prefix: str, variables: Mapping[str, tf.Variable], hparams: Any) -> None:
    """Raises ValueError if a checkpoint lacks one of the variables, or has it in another shape."""
    entries = checkpoint_index.read_index(f"{prefix}.index")
    for name, variable in variables.items():
        expected = tuple(variable.shape.as_list())
        found = entries[name].shape if name in entries else None
        if found != expected:
            has = "is missing" if found is None else f"has shape {list(found)}"
            raise ValueError(
                f"{prefix} does not fit its hparams.json ({hparams}): "
                f"{name} {has}, {list(expected)} was expected"
            )


def restore(sess: tf.compat.v1.Session, ops: CheckpointOps, prefix: str) -> None:
    """Fills the variables of `ops` from a checkpoint; see reading() for what is raised."""
    with reading(prefix) as readable:
        sess.run(ops.done, {ops.prefix: readable})


@contextlib.contextmanager
def reading(prefix: str) -> Iterator[str]:
    """Within this block TensorFlow may read a checkpoint, by the path that the block gets.

    Raises:
        FileNotFoundError: the checkpoint was removed or replaced while it was read.
        ValueError: its checksums do not match.
    """
    index = f"{prefix}.index"
    try:
        before = os.stat(index)
        with _without_brackets(prefix) as readable:
            yield readable
        after = os.stat(index)
        # Not the inode's number: on some network drives each look at a file gives another one.
        if (before.st_mtime_ns, before.st_size) != (after.st_mtime_ns, after.st_size):
            raise FileNotFoundError(f"{prefix} was replaced while it was read; load it again")
    except tf.errors.NotFoundError as error:
        raise FileNotFoundError(f"{prefix} went away while it was read; load it again") from error
    except (tf.errors.DataLossError, tf.errors.OutOfRangeError) as error:
        raise ValueError(
            f"{prefix} is damaged: {_reason(error)}. Download it again, or restore an older "
            "checkpoint"
        ) from error


@contextlib.contextmanager
def _without_brackets(prefix: str) -> Iterator[str]:
    """A path to the checkpoint without '[': TensorFlow takes '[...]' for a pattern."""
    if "[" not in prefix:
        yield prefix
        return
    folder, base = os.path.split(os.path.abspath(prefix))
    with files.temporary_folder() as temporary:
        link = os.path.join(temporary, "folder")
        os.symlink(folder, link)
        yield os.path.join(link, base)


# --- save ---------------------------------------------------------------------------------------


def build_save(*variables: tf.Variable) -> CheckpointOps:
    """Adds the operation that writes variables, each under its own name."""
    with tf.compat.v1.name_scope("save"), tf.device("/cpu:0"):
        prefix = tf.compat.v1.placeholder(tf.string, [], name="prefix")
        done = tf.raw_ops.SaveV2(
            prefix=prefix,
            tensor_names=[variable.op.name for variable in variables],
            shape_and_slices=[""] * len(variables),
            tensors=[variable.read_value() for variable in variables],
        )
    return CheckpointOps(prefix, done)


@functools.lru_cache(maxsize=4)
def meta_graph(sizes: tuple[int, ...]) -> bytes:
    """The .meta file of a model: its graph from token ids to logits, serialized.

    `sizes` are those of its HParams, in their order.
    """
    hparams = model.HParams(*sizes)
    with tf.Graph().as_default() as graph:
        context = tf.compat.v1.placeholder(tf.int32, [None, None], name="context")
        model.model(hparams, context)
        graph.clear_collection(model.CHECKPOINTS)
        saver = tf.compat.v1.train.Saver()
        meta = tf.compat.v1.train.export_meta_graph(graph=graph, saver_def=saver.saver_def)
        return meta.SerializeToString()


# Writes a checkpoint's files, which begin with the path that it is given, and flushes them to disk.
Write = Callable[[str], object]


def save_model(
    folder: str,
    base: str,
    hparams: model.HParams,
    writes: Mapping[str, Write],
    texts: Mapping[str, str],
) -> None:
    """Writes a model's `<base>.data-...`, `.index` and `.meta`, and other files: all or nothing.

    Args:
        folder: a model or run folder; nobody else may save there now.
        base: the base name of the model's checkpoint.
        hparams: the model's sizes.
        writes: functions by the base name of the checkpoint that they write.
        texts: contents of other files, by their names.

    Raises:
        OSError: the disk is full, or the folder cannot be written.
    """
    contents = {name: text.encode("utf-8") for name, text in texts.items()}
    contents[f"{base}.meta"] = meta_graph(dataclasses.astuple(hparams))
    save_whole(folder, base, writes, contents)


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
    except (tf.errors.OpError, OSError) as error:
        raise OSError(
            f"could not save {os.path.join(folder, base)}: {_reason(error)}. "
            "Earlier checkpoints are untouched; free some space on the disk or give another "
            "checkpoint_dir"
        ) from error


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


def write_checkpoint(sess: tf.compat.v1.Session, ops: CheckpointOps, prefix: str) -> None:
    """Writes the variables of `ops` to a checkpoint's files, and flushes these to disk."""
    sess.run(ops.done, {ops.prefix: prefix})
    folder, base = os.path.split(prefix)
    for name in os.listdir(folder):
        if name.startswith(f"{base}."):
            sync(os.path.join(folder, name))


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


def _reason(error: Exception) -> str:
    """What a file's error says; TensorFlow's messages name a temporary file before the reason."""
    return first_line(error).rpartition("; ")[2]


def list_text(names: Sequence[str]) -> str:
    """The text of the file `checkpoint`: base names of a folder's checkpoints, oldest first."""
    lines = [f'model_checkpoint_path: "{names[-1]}"']
    lines += [f'all_model_checkpoint_paths: "{name}"' for name in names]
    return "\n".join(lines) + "\n"
