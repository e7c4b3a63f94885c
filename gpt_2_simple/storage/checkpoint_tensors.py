"""A checkpoint's tensors in and out, one after the other: a model never is in memory as a whole.

TensorFlow's own operations read and write a whole list of tensors at once. Here each tensor has a
run of its own, and what it writes is appended to the one data file that OpenAI's checkpoints have.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator
from typing import BinaryIO

import numpy as np
import tensorflow as tf

from ..common.errors import first_line
from ..common.files import sync, sync_file, temporary_folder
from ..common.folders import hparams_text
from ..common.hparams import HParams
from ..common.published import META_FILE
from . import checkpoint, checkpoint_index, checkpoint_ops

# TensorFlow takes an array for a tensor without a copy if it starts at a multiple of this.
_ALIGNMENT = 64

# Gives a tensor by its name: 'model/wte'.
ReadTensor = Callable[[str], np.ndarray]
# Takes the next tensor: its name and its values, float32 or int64.
WriteTensor = Callable[[str, np.ndarray], None]


def aligned_empty(shape: tuple[int, ...]) -> np.ndarray:
    """A float32 array that TensorFlow can read without a copy; its values are not set."""
    size = int(np.prod(shape, dtype=np.int64)) * 4
    memory = np.empty(size + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + size].view(np.float32).reshape(shape)


@contextlib.contextmanager
def open_checkpoint(prefix: str) -> Iterator[ReadTensor]:
    """Opens a checkpoint to read its tensors by name, as float32.

    Raises:
        FileNotFoundError: the checkpoint was removed or replaced while it was read.
        ValueError: its checksums do not match.
    """
    entries = checkpoint_index.read_index(f"{prefix}.index")
    with checkpoint_ops.reading(prefix) as readable, _cpu_session() as sess:
        with sess.graph.as_default():
            name = tf.compat.v1.placeholder(tf.string, [])
            values = {
                dtype: tf.raw_ops.RestoreV2(
                    prefix=readable,
                    tensor_names=[name],
                    shape_and_slices=[""],
                    dtypes=[tf.as_dtype(dtype)],
                )[0]
                for dtype in {entry.dtype for entry in entries.values()}
            }

        def read(wanted: str) -> np.ndarray:
            value: np.ndarray = sess.run(values[entries[wanted].dtype], {name: wanted})
            return value.astype(np.float32, copy=False)

        yield read


@contextlib.contextmanager
def write_checkpoint(folder: str, base: str = checkpoint.MODEL_CHECKPOINT) -> Iterator[WriteTensor]:
    """Writes `<base>.data-00000-of-00001` and its index into a folder, tensor by tensor.

    The index is written if the block ends well. The caller removes what a block that fails leaves.

    Raises:
        OSError: the disk is full, or the folder cannot be written.
    """
    entries: dict[str, checkpoint_index.Entry] = {}
    try:
        with (
            open(os.path.join(folder, f"{base}.data-00000-of-00001"), "xb") as file,
            _checksums(folder) as checksum,
        ):
            yield lambda name, value: _append(file, entries, name, value, checksum(value))
            sync_file(file)
        index = os.path.join(folder, f"{base}.index")
        with open(index, "xb") as file:
            file.write(checkpoint_index.index_bytes(entries))
            sync_file(file)
    except tf.errors.OpError as error:
        raise OSError(first_line(error)) from error


def _append(
    file: BinaryIO,
    entries: dict[str, checkpoint_index.Entry],
    name: str,
    value: np.ndarray,
    crc32c: int,
) -> None:
    dtype = tf.as_dtype(value.dtype).as_datatype_enum
    entries[name] = checkpoint_index.Entry(dtype, value.shape, 0, file.tell(), value.nbytes, crc32c)
    file.write(value.reshape(-1).view(np.uint8).data)


@contextlib.contextmanager
def _checksums(folder: str) -> Iterator[Callable[[np.ndarray], int]]:
    """Gives a function that computes an array's masked CRC-32C at TensorFlow's speed.

    TensorFlow computes it only where it saves, so the array is saved into a folder beside.
    """
    with _cpu_session() as sess, temporary_folder(folder, ".crc-") as beside:
        prefix = os.path.join(beside, "tensor")
        with sess.graph.as_default():
            values = [tf.compat.v1.placeholder(dtype) for dtype in (tf.float32, tf.int64)]
            saves = {
                value.dtype.as_numpy_dtype: (
                    value,
                    tf.raw_ops.SaveV2(
                        prefix=prefix, tensor_names=["value"], shape_and_slices=[""],
                        tensors=[value],
                    ),
                )
                for value in values
            }  # fmt: skip

        def checksum(array: np.ndarray) -> int:
            value, save = saves[array.dtype.type]
            sess.run(save, {value: array})
            return checkpoint_index.read_index(f"{prefix}.index")["value"].crc32c

        yield checksum


@contextlib.contextmanager
def _cpu_session() -> Iterator[tf.compat.v1.Session]:
    """A session with an empty graph that leaves the GPUs alone."""
    config = tf.compat.v1.ConfigProto(device_count={"GPU": 0})
    with contextlib.closing(tf.compat.v1.Session(graph=tf.Graph(), config=config)) as sess:
        yield sess


def write_model_files(folder: str, hparams: HParams) -> None:
    """Writes what a model's folder holds beside its tensors and its vocabulary."""
    texts = {
        META_FILE: checkpoint_ops.meta_graph(dataclasses.astuple(hparams)),
        "hparams.json": hparams_text(hparams).encode(),
        checkpoint.LIST_FILE: checkpoint.list_text([checkpoint.MODEL_CHECKPOINT]).encode(),
    }
    for name, content in texts.items():
        with open(os.path.join(folder, name), "xb") as file:
            file.write(content)
            sync_file(file)
    sync(folder)
