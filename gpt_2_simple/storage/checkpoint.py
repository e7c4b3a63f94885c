"""Folders in, restored variables out, and back: find, check, restore and save checkpoints.

A model folder (`models/124M`) and a run folder (`checkpoint/run1`) hold the same things under
slightly different names: a TensorFlow checkpoint of the variables `model/...`, the vocabulary and
`hparams.json`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from .. import model
from ..common import files
from . import checkpoint_index

VOCABULARY_FILES = ("encoder.json", "vocab.bpe")
MODEL_CHECKPOINT = "model.ckpt"
RUN_CHECKPOINT = "model"
COUNTER = "counter"
BEST = "best"

# Folders inside a model's or run's: what is being written, what only has to be moved, and what is
# on its way out.
UNFINISHED = ".saving-"
FINISHED = ".saved-"
REMOVED = ".removing-"


# --- folders ------------------------------------------------------------------------------------


# --- checkpoints --------------------------------------------------------------------------------


def latest_checkpoint(folder: str) -> str | None:
    """The newest whole checkpoint of a folder.

    The one that the file `checkpoint` names, or, should that be missing or cut short, the one of
    the highest step that is whole.

    Returns:
        A prefix such as 'checkpoint/run1/model-100', None if there is none.
    """
    named = [os.path.join(folder, name) for name in reversed(named_checkpoints(folder))]
    by_step = [os.path.join(folder, name) for name in reversed(_checkpoints_on_disk(folder))]
    return next((prefix for prefix in named + by_step if is_whole(prefix)), None)


def has_any(folder: str) -> bool:
    """Whether there is any sign of a checkpoint in a folder, whole or not."""
    return bool(named_checkpoints(folder) or _checkpoints_on_disk(folder))


def named_checkpoints(folder: str) -> list[str]:
    """The base names that the file `checkpoint` lists, oldest first, its latest last.

    Paths are reduced to base names: a run that was copied from another machine keeps working.
    """
    try:
        with open(os.path.join(folder, "checkpoint"), encoding="utf-8", errors="replace") as file:
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
    try:
        files = os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return []
    steps = {}
    for file in files:
        match = re.fullmatch(r"(model(?:-(\d+)|\.ckpt))\.index", file)
        if match:
            steps[match[1]] = int(match[2]) if match[2] else -1
    return sorted(steps, key=steps.__getitem__)


def is_whole(prefix: str) -> bool:
    """Whether a checkpoint's index can be read and its data files are as long as the index says."""
    try:
        sizes = checkpoint_index.data_sizes(checkpoint_index.read_bundle_index(f"{prefix}.index"))
        shards = max(sizes, default=0) + 1
        return all(
            os.path.getsize(f"{prefix}.data-{shard:05d}-of-{shards:05d}") >= size
            for shard, size in sizes.items()
        )
    except (OSError, ValueError):
        return False


def restore_path(folder: str, checkpoint: str = "latest") -> str:
    """The checkpoint to load from a folder.

    Args:
        folder: a model or run folder.
        checkpoint: 'latest', or a base name such as 'model-100' or 'best'.

    Raises:
        FileNotFoundError: there is no such checkpoint, or it is not whole.
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


class RestoreOps(NamedTuple):
    """Reads variables from a checkpoint whose prefix is fed."""

    prefix: tf.Tensor
    done: tf.Operation


def build_restore(*variables: tf.Variable) -> RestoreOps:
    """Adds the operations that read variables; each has its own name in the checkpoint.

    They are read one after the other: when a model is loaded over another, at most one variable is
    in memory twice.
    """
    with tf.compat.v1.name_scope("restore"):
        prefix = tf.compat.v1.placeholder(tf.string, [], name="prefix")
        last: list[tf.Operation] = []
        for variable in variables:
            with tf.control_dependencies(last), tf.device("/cpu:0"):
                # Weights are float32 in every checkpoint, in whatever precision they are held.
                narrow = variable.dtype in (tf.bfloat16, tf.float16)
                (value,) = tf.raw_ops.RestoreV2(
                    prefix=prefix, tensor_names=[variable.op.name], shape_and_slices=[""],
                    dtypes=[tf.float32 if narrow else variable.dtype],
                )  # fmt: skip
                value.set_shape(variable.shape)
                value = tf.cast(value, variable.dtype)
            last = [variable.assign(value, read_value=False)]
        return RestoreOps(prefix, tf.group(*last))


def check_shapes(prefix: str, variables: Mapping[str, tf.Variable], hparams: Any) -> None:
    """Compares a checkpoint with the variables that it is to fill.

    Raises:
        ValueError: a variable is missing from it, or has another shape; names the first.
    """
    entries = checkpoint_index.read_bundle_index(f"{prefix}.index")
    for name, variable in variables.items():
        expected = tuple(variable.shape.as_list())
        found = entries[name].shape if name in entries else None
        if found != expected:
            has = "is missing" if found is None else f"has shape {list(found)}"
            raise ValueError(
                f"{prefix} does not fit its hparams.json ({hparams}): "
                f"{name} {has}, {list(expected)} was expected"
            )


def restore(sess: tf.compat.v1.Session, ops: RestoreOps, prefix: str) -> None:
    """Fills the variables of `ops` from a checkpoint.

    Raises:
        FileNotFoundError: it went away, or another took its place, while it was read.
        ValueError: the file's contents fail their checksums.
    """
    index = f"{prefix}.index"
    try:
        before = os.stat(index)
        with _without_brackets(prefix) as readable:
            sess.run(ops.done, {ops.prefix: readable})
        if not os.path.samestat(before, os.stat(index)):
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
    """A path to a checkpoint that TensorFlow, which would expand '[...]', reads as it is."""
    if "[" not in prefix:
        yield prefix
        return
    folder, base = os.path.split(os.path.abspath(prefix))
    with tempfile.TemporaryDirectory() as temporary:
        link = os.path.join(temporary, "folder")
        os.symlink(folder, link)
        yield os.path.join(link, base)


# --- save ---------------------------------------------------------------------------------------


class SaveOps(NamedTuple):
    """Writes variables to a checkpoint whose prefix is fed."""

    prefix: tf.Tensor
    done: tf.Operation


def build_save(*variables: tf.Variable) -> SaveOps:
    """Adds the operation that writes variables, each under its own name."""
    with tf.compat.v1.name_scope("save"), tf.device("/cpu:0"):
        prefix = tf.compat.v1.placeholder(tf.string, [], name="prefix")
        done = tf.raw_ops.SaveV2(
            prefix=prefix,
            tensor_names=[variable.op.name for variable in variables],
            shape_and_slices=[""] * len(variables),
            tensors=[variable.read_value() for variable in variables],
        )
    return SaveOps(prefix, done)


@functools.lru_cache(maxsize=4)
def _meta_graph(sizes: tuple[int, ...]) -> bytes:
    """The .meta file of a model of these sizes: its graph from token ids to logits, serialized."""
    hparams = model.HParams(*sizes)
    with tf.Graph().as_default() as graph:
        context = tf.compat.v1.placeholder(tf.int32, [None, None], name="context")
        model.model(hparams, context)
        graph.clear_collection(model.CHECKPOINTS)
        saver = tf.compat.v1.train.Saver()
        meta = tf.compat.v1.train.export_meta_graph(graph=graph, saver_def=saver.saver_def)
        return meta.SerializeToString()


def save_model(
    sess: tf.compat.v1.Session,
    folder: str,
    base: str,
    hparams: model.HParams,
    saves: Mapping[str, SaveOps],
    texts: Mapping[str, str] | None = None,
) -> str:
    """Writes a model's `<base>.data-..., .index and .meta` and more, all of it or nothing.

    All is written into a folder of its own, `.saving-...`, and flushed to disk. It counts from when
    that is renamed to `.saved-<base>`; then its files are moved to their places. What a killed
    process leaves of either folder is dealt with by recover().

    Args:
        sess: holds the variables.
        folder: a model or run folder.
        base: the model's checkpoint in it.
        hparams: the model's sizes.
        saves: operations by the checkpoint that they are to write: that of `base`, and maybe more.
        texts: files that belong to it, and what is in them.

    Returns:
        The checkpoint's prefix, `<folder>/<base>`.

    Raises:
        OSError: the disk is full, or the folder cannot be written.
    """
    prefix = os.path.join(folder, base)
    with _file_errors(prefix):
        recover(folder)
        unfinished = tempfile.mkdtemp(prefix=UNFINISHED, dir=folder)
        try:
            # Side by side: one's data are flushed while another's are still being written.
            with ThreadPoolExecutor(len(saves)) as pool:
                writes = [
                    pool.submit(_write, sess, save, os.path.join(unfinished, name))
                    for name, save in saves.items()
                ]
            for write in writes:
                write.result()
            contents = {name: text.encode("utf-8") for name, text in (texts or {}).items()}
            contents[f"{base}.meta"] = _meta_graph(dataclasses.astuple(hparams))
            for name, content in contents.items():
                path = os.path.join(unfinished, name)
                with open(path, "wb") as file:
                    file.write(content)
                sync(path)
            sync(unfinished)
            os.rename(unfinished, os.path.join(folder, FINISHED + base))
        except BaseException:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise
        sync(folder)
        _publish(folder, base)
    return prefix


def _write(sess: tf.compat.v1.Session, save: SaveOps, prefix: str) -> None:
    """Writes one checkpoint, and flushes it to disk."""
    sess.run(save.done, {save.prefix: prefix})
    folder, base = os.path.split(prefix)
    for name in os.listdir(folder):
        if name.startswith(f"{base}."):
            sync(os.path.join(folder, name))


def _publish(folder: str, base: str) -> None:
    """Moves the files of a finished save to their places.

    The model's index comes after all that belongs to it, since a checkpoint that has an index is
    whole; then the file that names it.
    """
    finished = os.path.join(folder, FINISHED + base)
    order = [f"{base}.index", COUNTER, "checkpoint"]
    names = sorted(os.listdir(finished), key=lambda name: name in order and order.index(name) + 1)
    if order[0] in names:
        with contextlib.suppress(FileNotFoundError):
            # A save over an older checkpoint of this name: never its index with our data.
            os.remove(os.path.join(folder, order[0]))
    for name in names:
        os.replace(os.path.join(finished, name), os.path.join(folder, name))
    sync(folder)
    os.rmdir(finished)


def recover(folder: str) -> None:
    """Completes the saves that a killed process had written whole, and removes unfinished ones.

    So it does with what take_away() took. Nobody else may be saving in this folder meanwhile.
    """
    for name in os.listdir(folder):
        path = os.path.join(folder, name)
        if name.startswith(FINISHED):
            _publish(folder, name.removeprefix(FINISHED))
        elif name.startswith((UNFINISHED, REMOVED)):
            if os.path.isdir(path):
                shutil.rmtree(path, ignore_errors=True)
            else:
                with contextlib.suppress(OSError):
                    os.remove(path)


def take_away(folder: str, names: Sequence[str]) -> str:
    """Moves files of a folder, in this order, into one that remove() or recover() removes.

    That takes no time, where the removal of large files does.

    Returns:
        The folder they are in now.
    """
    removed = tempfile.mkdtemp(prefix=REMOVED, dir=folder)
    for name in names:
        with contextlib.suppress(FileNotFoundError):
            os.replace(os.path.join(folder, name), os.path.join(removed, name))
    return removed


def remove(removed: str) -> None:
    """Removes a folder that take_away() made."""
    shutil.rmtree(removed, ignore_errors=True)


def _reason(error: Exception) -> str:
    """What an error says, without the graph that TensorFlow says it of."""
    if not isinstance(error, tf.errors.OpError):
        return str(error)
    noise = (" ", "\t", "Graph execution error", "Detected at", "Node:", "Hint:")
    lines = [line for line in error.message.splitlines() if line and not line.startswith(noise)]
    return lines[-1].rpartition("; ")[2] if lines else error.message


@contextlib.contextmanager
def _file_errors(prefix: str) -> Iterator[None]:
    """TensorFlow's and Python's errors about files, as one OSError that says what to do."""
    try:
        yield
    except (tf.errors.OpError, OSError) as error:
        raise OSError(
            f"could not save {prefix}: {_reason(error)}. Earlier checkpoints are untouched; "
            "free some space on the disk or give another checkpoint_dir"
        ) from error


def sync(path: str) -> None:
    """Flushes a file's, or a folder's entries', data to the disk."""
    if os.path.isdir(path) and os.name == "nt":
        return  # Windows cannot flush a folder.
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_file(path: str, text: str) -> None:
    """Writes a text file whole; recover() removes what a killed process leaves of it."""
    files.write_text(path, text, UNFINISHED)


def state_text(names: Sequence[str]) -> str:
    """What the file `checkpoint` says: the base names of a folder's checkpoints, oldest first."""
    lines = [f'model_checkpoint_path: "{names[-1]}"']
    lines += [f'all_model_checkpoint_paths: "{name}"' for name in names]
    return "\n".join(lines) + "\n"


def write_state(folder: str, names: Sequence[str]) -> None:
    """Writes the file `checkpoint`, see state_text()."""
    write_file(os.path.join(folder, "checkpoint"), state_text(names))


# --- new models ---------------------------------------------------------------------------------


def initial_value(name: str, shape: Sequence[int], n_layer: int, rng: np.random.Generator) -> Any:
    """GPT-2's initialisation: normal of 0.02 (positions 0.01), zero biases, unit gains.

    The projections that end in the residual stream are scaled by 1 / sqrt(2 * n_layer), as
    Radford et al. 2019 describe.
    """
    if name.endswith("/g"):
        return np.ones(shape, np.float32)
    if name.endswith("/b"):
        return np.zeros(shape, np.float32)
    stddev = np.float32(0.01 if name.endswith("wpe") else 0.02)
    if name.endswith("c_proj/w"):
        stddev /= np.sqrt(2 * n_layer, dtype=np.float32)
    return stddev * rng.standard_normal(shape, np.float32)


def write_model(folder: str, hparams: model.HParams, seed: int | None) -> None:
    """Writes a randomly initialised model's checkpoint and hparams.json into an existing folder."""
    rng = np.random.default_rng(seed)
    with tf.Graph().as_default() as graph, tf.compat.v1.Session(graph=graph) as sess:
        variables = model.flatten(model.variables(hparams))
        save = build_save(*variables)
        for variable in variables:
            shape = variable.shape.as_list()
            value = initial_value(variable.op.name, shape, hparams.n_layer, rng)
            sess.run(variable.initializer, {variable.initializer.inputs[1]: value})
        save_model(sess, folder, MODEL_CHECKPOINT, hparams, {MODEL_CHECKPOINT: save})
    sizes = json.dumps(dataclasses.asdict(hparams), indent=2)
    write_file(os.path.join(folder, "hparams.json"), sizes + "\n")
    write_state(folder, [MODEL_CHECKPOINT])
