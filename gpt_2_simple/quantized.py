"""Int8 matrices in a file in, products with them out.

A matrix w has a scale for each column, t, and x one for each row, s, which comes from that row
alone (vector-wise quantization, Dettmers et al. 2022, LLM.int8(), arXiv:2208.07339). Then x w is
about (round(x / s) round(w / t)) s t. The sums of the int8 products are exact, so a row's result
does not depend on the rows beside it.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import os
import tempfile
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from . import model
from .common.report import say

# Both halves of int8's range have so many steps; -128 is not used.
STEPS = 127

# A slice that starts and ends at multiples of this shares its tensor's memory.
ALIGNMENT = 64

_ROWS = 64  # that are quantized at a time


class Kernel(enum.Enum):
    """How products are computed."""

    # oneDNN's int8 products, by an internal operation. It can keep the layout that it wants.
    INTERNAL = "internal"
    # The same by a public operation, for versions of TensorFlow without the internal one.
    PUBLIC = "public"
    # The matrix becomes float before each product: on GPUs, and on CPUs that have no others.
    DEQUANTIZE = "dequantize"


class StoredMatrix(NamedTuple):
    """An int8 matrix in a file.

    Attributes:
        offset: of its first byte in the file.
        shape: (rows, columns).
        scales: of its columns, float32 [columns].
        sums: of its columns' int8 values, float32 [columns].
    """

    offset: int
    shape: tuple[int, int]
    scales: np.ndarray
    sums: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class QuantizedFile:
    """A file with all of a model's int8 matrices.

    Attributes:
        path: absolute.
        n_bytes: its size.
        digest: of the weights that it was made from.
        matrices: by the names of their variables in a checkpoint, such as 'model/h0/mlp/c_fc/w'.
            That of 'model/wte' is transposed.
    """

    path: str
    n_bytes: int
    digest: str
    matrices: Mapping[str, StoredMatrix]


@dataclasses.dataclass(frozen=True, eq=False)
class QuantizedWeights:
    """A session's int8 matrices: `variables`, by name, are those that a GPU holds."""

    file: QuantizedFile
    kernel: Kernel
    variables: Mapping[str, tf.Variable]


# --- the matrices of a model ----------------------------------------------------------------------

_LAYERS = {
    "c_attn": "attn/c_attn",
    "c_proj": "attn/c_proj",
    "mlp_c_fc": "mlp/c_fc",
    "mlp_c_proj": "mlp/c_proj",
}
"""The names of linear layers in a checkpoint, by the fields of model.Block."""

UNEMBEDDING = "model/wte"


def matrix_names(n_layer: int) -> list[str]:
    """The names of the variables that are quantized: the blocks' matrices, the output projection.

    The embedding stays float32 beside it.
    """
    blocks = [f"model/h{i}/{layer}/w" for i in range(n_layer) for layer in _LAYERS.values()]
    return [*blocks, UNEMBEDDING]


def quantize(w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A float32 matrix as int8 values, and the scales [columns] that they are multiplied by."""
    parts = [slice(start, start + _ROWS) for start in range(0, len(w), _ROWS)]
    largest = np.max([np.abs(w[part]).max(axis=0) for part in parts], axis=0)
    scales = np.maximum(largest, np.finfo(np.float32).tiny * STEPS) / np.float32(STEPS)
    values = np.empty(w.shape, np.int8)
    for part in parts:  # no second float matrix of this size exists
        values[part] = np.rint(w[part] / scales)
    return values, scales


def place_on_gpus(
    sess: tf.compat.v1.Session, file: QuantizedFile, hparams: model.HParams, gpus: list[str]
) -> QuantizedWeights:
    """Reads a file's matrices into variables; the output projection remains that of float32."""
    variables = {}
    stored = np.memmap(file.path, np.int8, "r")
    reuse = tf.compat.v1.AUTO_REUSE  # Ctrl-C may have ended an earlier call
    with sess.graph.as_default(), tf.compat.v1.variable_scope("int8", reuse=reuse):
        for index in range(hparams.n_layer):
            with tf.device(model.block_device(index, hparams.n_layer, gpus)):
                for layer in _LAYERS.values():
                    name = f"model/h{index}/{layer}/w"
                    variables[name] = tf.compat.v1.get_variable(
                        name, file.matrices[name].shape, tf.int8, use_resource=True
                    )
    for name, variable in variables.items():
        start, shape = file.matrices[name].offset, file.matrices[name].shape
        values = stored[start : start + shape[0] * shape[1]].reshape(shape)
        sess.run(variable.initializer, {variable.initializer.inputs[1]: values})
    return QuantizedWeights(file, Kernel.DEQUANTIZE, variables)


def with_int8_matrices(weights: model.Weights, quantized: QuantizedWeights) -> model.Weights:
    """Weights, as tensors, that lack the blocks' matrices: here with their int8 products."""
    if quantized.variables:
        read = functools.partial(_read_variable, quantized)
    else:
        read = functools.partial(_read_mapped, quantized, _map(quantized.file))
    blocks = []
    for index, block in enumerate(weights.blocks):
        layers: dict[str, Any] = {
            field: model.QuantizedLinear(read(f"model/h{index}/{name}/w"), getattr(block, field).b)
            for field, name in _LAYERS.items()
        }
        blocks.append(block._replace(**layers))
    unembedding = None if quantized.kernel is Kernel.DEQUANTIZE else read(UNEMBEDDING)
    return weights._replace(blocks=tuple(blocks), unembedding=unembedding)


def _read_variable(quantized: QuantizedWeights, name: str) -> model.Multiply:
    stored = quantized.file.matrices[name]
    value = quantized.variables[name].read_value()
    return functools.partial(_multiply_dequantized, value, tf.constant(stored.scales))


class _MappedFile(NamedTuple):
    values: tf.Tensor  # int8 [n_bytes]
    zero: tf.Tensor  # int64 [1]


def _map(file: QuantizedFile) -> _MappedFile:
    # TensorFlow makes constants of all small tensors that depend on nothing: copies in memory in
    # the place of the mapping. So the offsets depend on a random number, which is 0.
    zero = tf.random.uniform([1], maxval=1, dtype=tf.int64, seed=0)
    values = tf.raw_ops.ImmutableConst(
        dtype=tf.int8, shape=[file.n_bytes], memory_region_name=file.path
    )
    return _MappedFile(values, zero)


def _read_mapped(quantized: QuantizedWeights, file: _MappedFile, name: str) -> model.Multiply:
    stored = quantized.file.matrices[name]
    if quantized.kernel is Kernel.DEQUANTIZE:
        scales = tf.constant(stored.scales)
        return functools.partial(_multiply_dequantized, _values(stored, file), scales)
    values = _values(stored, file)
    # Made here once, for the steps of decode's loop. Loops that are functions cannot take a qint8.
    w = tf.bitcast(values, tf.qint8)
    multiply = _MULTIPLY[quantized.kernel]

    def multiply_mapped(x: tf.Tensor, keep_layout: bool = False) -> tf.Tensor:
        return multiply(w if keep_layout else tf.bitcast(values, tf.qint8), stored, x, keep_layout)

    return multiply_mapped


def _values(stored: StoredMatrix, file: _MappedFile) -> tf.Tensor:
    """A matrix of a file that is mapped."""
    n_values = stored.shape[0] * stored.shape[1]
    values = tf.slice(file.values, stored.offset + file.zero, [n_values])
    return tf.reshape(values, stored.shape)


# --- products -------------------------------------------------------------------------------------


def _multiply_dequantized(
    w: tf.Tensor, scales: tf.Tensor, x: tf.Tensor, keep_layout: bool = False
) -> tf.Tensor:
    with tf.control_dependencies([x]):  # else all matrices would become float at once
        return tf.matmul(x, tf.cast(w, x.dtype)) * tf.cast(scales, x.dtype)


def _quantize_rows(x: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Int8 values of x [rows, nx], and the scales [rows, 1] that they are multiplied by."""
    largest = tf.reduce_max(tf.abs(x), axis=1)
    q = tf.raw_ops.QuantizeV2(
        input=x, min_range=-largest, max_range=largest, T=tf.qint8, mode="SCALED", axis=0,
        round_mode="HALF_TO_EVEN", narrow_range=True, ensure_minimum_range=0.0,
    )  # fmt: skip
    return q.output, largest[:, tf.newaxis] * (1 / STEPS)


def _multiply_internal(
    w: tf.Tensor, stored: StoredMatrix, x: tf.Tensor, keep_layout: bool
) -> tf.Tensor:
    """The product x w by _QuantizedMatMul.

    The kernel brings w into an order of its own. With keep_layout the node does that once and keeps
    the copy, so it must always get the same w; otherwise it does so in each run.
    """
    attr, dtypes = tf.compat.v1.AttrValue, tf.compat.v1.AttrValue.ListValue
    q, row_scales = _quantize_rows(x)
    bias = tf.zeros([stored.shape[1]])  # no kernel lacks one
    largest = STEPS * stored.scales
    ranges = [tf.constant(float(-STEPS)), tf.constant(float(STEPS))]
    ranges += [tf.constant(-largest), tf.constant(largest)]
    float32, qint8 = tf.float32.as_datatype_enum, tf.qint8.as_datatype_enum
    op = tf.compat.v1.get_default_graph().create_op(
        "_QuantizedMatMul",
        [q, w, bias, *ranges],
        [tf.float32],
        name="quantized_matmul",
        attrs={
            **{name: attr(type=float32) for name in ("Tbias", "U", "Tout")},
            **{name: attr(type=qint8) for name in ("T1", "T2")},
            "Tdevice_inputs": attr(list=dtypes(type=[qint8, qint8, float32])),
            "Thost_inputs": attr(list=dtypes(type=[float32] * len(ranges))),
            "Tdevice_outputs": attr(list=dtypes(type=[float32])),
            "Thost_outputs": attr(list=dtypes()),
            "fused_ops": attr(list=dtypes(s=[b"BiasAdd", b"Dequantize"])),
            "is_weight_const": attr(b=keep_layout),
            "is_bias_const": attr(b=True),
            "input_quant_mode": attr(s=b"SCALED"),
            "output_quant_mode": attr(s=b"SCALED"),
            "transpose_a": attr(b=False),
            "transpose_b": attr(b=False),
            "leakyrelu_alpha": attr(f=0.2),
        },
    )
    product = op.outputs[0]
    product.set_shape([x.shape[0], stored.shape[1]])
    return product * row_scales


def _multiply_public(
    w: tf.Tensor, stored: StoredMatrix, x: tf.Tensor, keep_layout: bool
) -> tf.Tensor:
    """The product x w by a public operation, whose x is unsigned: 128 is added, and taken off."""
    q, row_scales = _quantize_rows(x)
    shifted = tf.cast(tf.cast(tf.bitcast(q, tf.int8), tf.int32) + 128, tf.uint8)
    product = tf.raw_ops.QuantizedMatMulWithBiasAndDequantize(
        a=tf.bitcast(shifted, tf.quint8), b=w, bias=tf.zeros([stored.shape[1]]),
        min_a=0.0, max_a=255.0, min_b=float(-STEPS), max_b=float(STEPS),
        min_freezed_output=0.0, max_freezed_output=0.0,
        Toutput=tf.float32, input_quant_mode="SCALED",
    )  # fmt: skip
    return (product - 128.0 * stored.sums) * stored.scales * row_scales


_MULTIPLY = {Kernel.INTERNAL: _multiply_internal, Kernel.PUBLIC: _multiply_public}


# --- which products there are ---------------------------------------------------------------------


def choose_kernel() -> Kernel:
    """The quickest right products that this CPU has; says so where they are slow."""
    for kernel in _MULTIPLY:
        speedup = _measure(kernel)
        if speedup is not None:
            if speedup < 1:
                _say_slow(f"at {speedup:.1f} times the speed of float32's")
            return kernel
    _say_slow("as TensorFlow has none for it: matrices become float32 before each product")
    return Kernel.DEQUANTIZE


def _say_slow(reason: str) -> None:
    say(f"precision: int8 products are slow on this CPU, {reason}. They save memory, not time")


@functools.cache
def _measure(kernel: Kernel) -> float | None:
    """How many times as quick as float32's a kernel's products are; None if they are wrong."""
    rng = np.random.default_rng(0)
    # The largest values show sums that overflow, as on CPUs that add pairs in 16 bits.
    values = rng.choice(np.array([-STEPS, -1, 1, STEPS], np.int8), [1024, 2048])
    values[:, 0] = STEPS
    x = rng.choice(np.array([-STEPS, 2, STEPS], np.float32), [3, len(values)])
    x[0] = STEPS
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        path = os.path.join(folder, "matrix")
        values.tofile(path)
        scales, sums = np.ones(values.shape[1], np.float32), values.sum(0, dtype=np.float32)
        stored = StoredMatrix(0, values.shape, scales, sums)
        file = QuantizedFile(path, values.nbytes, "", {UNEMBEDDING: stored})
        try:
            return _compare(QuantizedWeights(file, kernel, {}), values.astype(np.float32), x)
        except (tf.errors.OpError, LookupError, TypeError, ValueError):
            return None  # this TensorFlow lacks the operation, or its kernel


def _compare(quantized: QuantizedWeights, w: np.ndarray, x: np.ndarray) -> float | None:
    config = tf.compat.v1.ConfigProto(device_count={"GPU": 0})
    with tf.Graph().as_default() as graph, tf.compat.v1.Session(graph=graph, config=config) as sess:
        given = tf.compat.v1.placeholder(tf.float32, [None, x.shape[1]])
        read = _read_mapped(quantized, _map(quantized.file), UNEMBEDDING)
        variable = tf.compat.v1.get_variable("w", w.shape, use_resource=True)
        sess.run(variable.initializer, {variable.initializer.inputs[1]: w})
        products = [
            tf.matmul(given, variable.read_value()),
            read(given, keep_layout=True),
            read(given),
        ]
        exact, *found = sess.run(products, {given: x})
        if not all(np.allclose(y, exact, rtol=1e-4, atol=STEPS) for y in found):
            return None
        seconds = [_median_seconds(sess, y.op, {given: x[:1]}) for y in products[:2]]
        return seconds[0] / seconds[1]


def _median_seconds(sess: tf.compat.v1.Session, op: tf.Operation, feeds: dict[Any, Any]) -> float:
    found = []
    for _ in range(6):
        began = time.perf_counter()
        sess.run(op, feeds)
        found.append(time.perf_counter() - began)
    return float(np.median(found[1:]))
