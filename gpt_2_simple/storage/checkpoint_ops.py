"""A checkpoint's files in or out, by operations of a graph; see checkpoint for where they lie."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import tensorflow as tf

from .. import model
from ..common import files
from ..common.errors import file_reason
from ..common.files import sync
from . import checkpoint_index
from .checkpoint import Write, could_not_save, save_whole

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
            f"{prefix} is damaged: {file_reason(error)}. Download it again, or restore an older "
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
    save_with_ops(folder, base, writes, contents)


def save_with_ops(
    folder: str, base: str, writes: Mapping[str, Write], contents: Mapping[str, bytes]
) -> None:
    """As checkpoint.save_whole, where TensorFlow's operations write the files."""
    try:
        save_whole(folder, base, writes, contents)
    except tf.errors.OpError as error:
        raise could_not_save(os.path.join(folder, base), error) from error


def write_checkpoint(sess: tf.compat.v1.Session, ops: CheckpointOps, prefix: str) -> None:
    """Writes the variables of `ops` to a checkpoint's files, and flushes these to disk."""
    sess.run(ops.done, {ops.prefix: prefix})
    folder, base = os.path.split(prefix)
    for name in os.listdir(folder):
        if name.startswith(f"{base}."):
            sync(os.path.join(folder, name))
