"""A session and a number of rows in, the operations that are quickest for a decoding step out.

TensorFlow has several kernels for a product of few rows. Which one is the quickest depends on the
processor, so those for one row are timed once a process. On a GPU a step takes as long as starting
its kernels does, so there the operations are those that start few.
"""

from __future__ import annotations

import dataclasses
import math
import os
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from .. import model, session
from ..precision import has_gpu
from .kv_cache import build_once, fetched, model_precision, placeholder, run

# x [rows, nx], terms [rows, nf] -> x times a matrix, and the terms added [rows, nf].
Project = Callable[..., tf.Tensor]

# w, b -> x w + b. The product is computed in w's precision; x and what comes out have x's.
Linear = Callable[[tf.Tensor, tf.Tensor], Project]

# x [rows, embd] -> its layer norm.
Normalize = Callable[[tf.Tensor, model.LayerNorm], tf.Tensor]


class Operations(NamedTuple):
    """How a step computes. What does not change from step to step is made before the loop."""

    linear: Linear  # of a matrix [nx, nf] and a bias [nf]
    unembed: Callable[[tf.Tensor], Project]  # of wte [n_vocab, embd]: x wte^T, no terms
    # Of one query a row: q [rows, 1, width], k and v [rows, keys, width], mask -> as q.
    attention: Callable[..., tf.Tensor]
    layer_norm: Callable[[tf.Tensor, int], Normalize]  # of the numbers of rows and columns
    linear_gelu: Linear | None = None  # as `linear`, then GELU, where one kernel does all
    keeps_layout: bool = False  # of matrices that are int8; see model.Multiply


def operations_for(sess: tf.compat.v1.Session, one_row: bool = False) -> Operations:
    """The operations of a step for a few rows of tokens, or for one."""
    if has_gpu(sess):
        return FUSED_ON_GPU if _fuses(sess) else ON_GPU
    precision = model_precision(sess)
    if one_row and precision == "float32":
        return _quickest_for_one_row(sess)
    if precision in ("bfloat16", "float16"):
        return ONE_ROW_16_BIT if one_row else FEW_ROWS_16_BIT
    return FEW_ROWS


# --- products -------------------------------------------------------------------------------------


def _in_parts(w: tf.Tensor, b: tf.Tensor) -> Project:
    """For one row, in float32.

    TensorFlow computes the products of a BatchMatMulV3 of one row in a thread each, and one thread
    alone cannot read memory fast enough. Twice as many parts as cores leave less to do for a thread
    that is late. oneDNN has no kernel for V3.
    """
    n_parts = min(16, 2 ** (2 * (os.cpu_count() or 1) - 1).bit_length())
    n_rows, n_columns = w.shape.as_list()
    n_parts = math.gcd(n_parts, n_rows)
    parts = tf.reshape(w, [n_parts, n_rows // n_parts, n_columns])
    bias = tf.reshape(b, [1, n_columns])

    def project(x: tf.Tensor, *terms: tf.Tensor) -> tf.Tensor:
        x_parts = tf.reshape(x, [n_parts, 1, n_rows // n_parts])
        products = tf.raw_ops.BatchMatMulV3(x=x_parts, y=parts, Tout=x.dtype)
        return tf.add_n([*tf.unstack(products), bias, *terms])

    return project


def _by(multiply: Callable[[tf.Tensor, tf.Tensor], tf.Tensor]) -> Linear:
    """A layer whose product is computed by `multiply`."""

    def linear(w: tf.Tensor, b: tf.Tensor) -> Project:
        def project(x: tf.Tensor, *terms: tf.Tensor) -> tf.Tensor:
            product = tf.cast(multiply(tf.cast(x, w.dtype), w), x.dtype)
            return sum(terms, tf.nn.bias_add(product, b))

        return project

    return linear


def _fused(*fused_ops: bytes) -> Linear:
    """A layer whose product, bias and what else is named are one kernel, _FusedMatMul.

    TensorFlow's optimizer makes these nodes, too, but of fewer patterns on a GPU. See _fuses.
    """

    def linear(w: tf.Tensor, b: tf.Tensor) -> Project:
        attr, bias = tf.compat.v1.AttrValue, tf.cast(b, w.dtype)
        attrs = {
            "T": attr(type=w.dtype.as_datatype_enum),
            "num_args": attr(i=1),
            "fused_ops": attr(list=attr.ListValue(s=fused_ops)),
        }

        def project(x: tf.Tensor, *terms: tf.Tensor) -> tf.Tensor:
            op = tf.compat.v1.get_default_graph().create_op(
                "_FusedMatMul", [tf.cast(x, w.dtype), w, bias], [w.dtype], name="fused", attrs=attrs
            )
            op.outputs[0].set_shape([x.shape[0], w.shape[1]])
            return sum(terms, tf.cast(op.outputs[0], x.dtype))

        return project

    return linear


_fused_linear = _fused(b"BiasAdd")
_fused_linear_gelu = _fused(b"BiasAdd", b"GeluApproximate")


def _whole(x: tf.Tensor, w: tf.Tensor) -> tf.Tensor:
    return tf.raw_ops.BatchMatMulV3(x=x, y=w, Tout=x.dtype)


def _einsum(x: tf.Tensor, w: tf.Tensor) -> tf.Tensor:
    return tf.einsum("bi,ij->bj", x, w)


def _unembed_in_halves(wte: tf.Tensor) -> Project:
    """For one row; see _in_parts."""
    middle = wte.shape.as_list()[0] // 2
    halves = [wte[:middle], wte[middle:]]
    return lambda h: tf.concat(
        [tf.raw_ops.BatchMatMulV3(x=h, y=half, adj_y=True, Tout=h.dtype) for half in halves], axis=1
    )


def _unembed_by_einsum(wte: tf.Tensor) -> Project:
    # Twice as quick as oneDNN's MatMul with transpose_b=True, for a few rows and so long a wte.
    return lambda h: tf.einsum("bi,ji->bj", h, wte)


def _unembed_by_matmul(wte: tf.Tensor) -> Project:
    return lambda h: tf.matmul(h, wte, transpose_b=True)


# --- the rest of a step ---------------------------------------------------------------------------


def _attention_in_steps(q: tf.Tensor, k: tf.Tensor, v: tf.Tensor, mask: tf.Tensor) -> tf.Tensor:
    """As model.attention; oneDNN's kernels for softmax and products take longer to start."""
    scores = tf.raw_ops.BatchMatMulV3(x=q, y=k, adj_y=True, Tout=q.dtype) + mask
    weights = tf.exp(scores - tf.reduce_max(scores, axis=2, keepdims=True))
    total = tf.reduce_sum(weights, axis=2, keepdims=True)
    return tf.raw_ops.BatchMatMulV3(x=weights, y=v, Tout=q.dtype) / total


def _attention(q: tf.Tensor, k: tf.Tensor, v: tf.Tensor, mask: tf.Tensor) -> tf.Tensor:
    return tf.matmul(tf.nn.softmax(tf.matmul(q, k, transpose_b=True) + mask), v)


def _layer_norm_in_steps(_n_rows: tf.Tensor, _width: int) -> Normalize:
    """On a CPU its nine nodes take 5 us for one row.

    The operations that do it at once set themselves up in each run, which takes longer:
    FusedBatchNormV3 50 us, oneDNN's _MklLayerNorm 330 us.
    """
    return model.layer_norm


def _layer_norm_by_batch_norm(n_rows: tf.Tensor, width: int) -> Normalize:
    """Three kernels in the place of nine: a batch norm whose channels are the rows."""
    ones, zeros = tf.ones([n_rows]), tf.zeros([n_rows])
    image_shape, shape = tf.stack([1, n_rows, width, 1]), tf.stack([n_rows, width])

    def layer_norm(x: tf.Tensor, parameters: model.LayerNorm) -> tf.Tensor:
        normalized = tf.raw_ops.FusedBatchNormV3(
            x=tf.reshape(x, image_shape), scale=ones, offset=zeros, mean=[], variance=[],
            epsilon=model.LAYER_NORM_EPSILON, data_format="NCHW", is_training=True,
        )  # fmt: skip
        return tf.reshape(normalized.y, shape) * parameters.g + parameters.b

    return layer_norm


_ONE_ROW = {
    name: Operations(linear, _unembed_in_halves, _attention_in_steps, _layer_norm_in_steps)
    for name, linear in {
        "in parts": _in_parts,
        "whole": _by(_whole),
        "matmul": _by(tf.matmul),
    }.items()
}
ONE_ROW = _ONE_ROW["in parts"]
FEW_ROWS = Operations(_by(_einsum), _unembed_by_einsum, _attention_in_steps, _layer_norm_in_steps)
MANY_ROWS = FEW_ROWS._replace(linear=_by(tf.matmul))
# The other products were measured in float32 alone.
ONE_ROW_16_BIT = ONE_ROW._replace(linear=_by(tf.matmul))
FEW_ROWS_16_BIT = FEW_ROWS._replace(linear=_by(tf.matmul))
ON_GPU = Operations(_by(tf.matmul), _unembed_by_matmul, _attention, _layer_norm_by_batch_norm)
FUSED_ON_GPU = ON_GPU._replace(linear=_fused_linear, linear_gelu=_fused_linear_gelu)


# --- fused products -------------------------------------------------------------------------------

_PROBED_ROWS = (1, 2, 20)
# Of the largest number. A GPU may round the inputs of float32's products to 10 bits, and bfloat16
# has 8.
_PROBE_TOLERANCE = 0.02


@dataclasses.dataclass
class _FusedProbe:
    """A layer, and a layer and its GELU, in one kernel and in several."""

    x: Any = placeholder(tf.float32, None, None)  # [rows, nx]
    w: Any = placeholder(tf.float32, None, None)  # [nx, nf]
    b: Any = placeholder(tf.float32, None)  # [nf]
    fused: list[tf.Tensor] = fetched()  # [rows, nf] each
    expected: list[tf.Tensor] = fetched()


def _build_fused_probe(
    _weights: model.Weights, _hparams: model.HParams, precision: str
) -> _FusedProbe:
    ops = _FusedProbe()
    w = tf.cast(ops.w, precision)
    plain = ON_GPU.linear(w, ops.b)(ops.x)
    ops.expected = [plain, model.gelu(plain)]
    ops.fused = [linear(w, ops.b)(ops.x) for linear in (_fused_linear, _fused_linear_gelu)]
    return ops


def _probe_fused(sess: tf.compat.v1.Session, precision: str) -> bool:
    """Whether FUSED_ON_GPU's products are right for a layer of the model's width."""
    width = session.graph_state(sess).hparams.n_embd
    ops = build_once(sess, _build_fused_probe, precision)
    numbers = np.random.default_rng(0)
    w, b = numbers.normal(0, width**-0.5, [width, width]), numbers.normal(size=width)
    for n_rows in _PROBED_ROWS:
        x = numbers.normal(size=[n_rows, width])
        feeds = {ops.x: x, ops.w: w, ops.b: b}
        for fused, expected in zip(*run(sess, (ops.fused, ops.expected), feeds), strict=True):
            if not np.abs(fused - expected).max() < _PROBE_TOLERANCE * np.abs(expected).max():
                return False
    return True


_fused_is_right: dict[tuple[int, str], bool] = {}  # by n_embd and precision


def _fuses(sess: tf.compat.v1.Session) -> bool:
    """Whether this TensorFlow and this device have FUSED_ON_GPU's products; tried once a process.

    Their operation is TensorFlow's own business: another version may change it, or take it away.
    """
    precision = model_precision(sess)
    if precision == "int8":  # whose products are others
        return False
    key = (session.graph_state(sess).hparams.n_embd, precision)
    with _choosing:
        if key not in _fused_is_right:
            try:
                _fused_is_right[key] = _probe_fused(sess, precision)
            except (tf.errors.OpError, RuntimeError, TypeError, ValueError):
                _fused_is_right[key] = False
        return _fused_is_right[key]


# --- the quickest for one row ---------------------------------------------------------------------

# Nobody waits for a smaller model.
_MIN_WIDTH = 512
# Another way must be quicker in each round, and take less than this share of the usual one's time
# in all. Nearly equal ones would take turns from process to process, and with them the last digits
# of the logits.
_CLEARLY_QUICKER = 0.85
_TIMED_BYTES = 128 * 2**20  # of weights, at most: more than caches hold
_ROUNDS = 7


@dataclasses.dataclass
class _OneRow:
    """Products of a row by the matrices of some blocks, by each way."""

    row: Any = placeholder(tf.float32, 1, None)  # [1, n_embd]
    results: dict[str, tf.Tensor] = fetched()  # [1, n_embd] each


def _build_one_row(weights: model.Weights, hparams: model.HParams) -> _OneRow:
    ops, width = _OneRow(), hparams.n_embd
    n_blocks = max(1, _TIMED_BYTES // (4 * 12 * width**2))

    def chain(make_linear: Callable[[tf.Tensor, tf.Tensor], Project]) -> tf.Tensor:
        """One product after the other, as in a model; the numbers stay near 1."""
        x = tf.ensure_shape(ops.row, [1, width])
        for block in weights.blocks[:n_blocks]:
            c_attn, c_proj, mlp_c_fc, mlp_c_proj = (
                make_linear(layer.w, layer.b) for layer in block.linear_layers
            )
            x = c_proj(tf.tanh(c_attn(x)[:, :width]), ops.row)
            x = mlp_c_proj(tf.tanh(mlp_c_fc(x)), ops.row)
        return x

    ops.results = {name: chain(operations.linear) for name, operations in _ONE_ROW.items()}
    return ops


def _time_one_row(sess: tf.compat.v1.Session) -> dict[str, list[float]]:
    """The seconds that products of a row by the session's weights take, by each way, by round."""
    ops = build_once(sess, _build_one_row)
    row = {ops.row: np.ones([1, session.graph_state(sess).hparams.n_embd], np.float32)}
    seconds: dict[str, list[float]] = {name: [] for name in ops.results}
    for _ in range(1 + _ROUNDS):  # in turns; the first run prepares
        for name, result in ops.results.items():
            began = time.perf_counter()
            run(sess, result, row)
            seconds[name].append(time.perf_counter() - began)
    return {name: times[1:] for name, times in seconds.items()}


def _clearly_quickest(seconds: dict[str, list[float]]) -> str:
    """The way that is much quicker than the usual one, or the usual one."""
    usual = seconds["in parts"]
    best = min(seconds, key=lambda name: sum(seconds[name]))
    wins = all(new < old for new, old in zip(seconds[best], usual, strict=True))
    return best if wins and sum(seconds[best]) < _CLEARLY_QUICKER * sum(usual) else "in parts"


_chosen: dict[int, Operations] = {}  # by n_embd
_choosing = threading.Lock()


def _quickest_for_one_row(sess: tf.compat.v1.Session) -> Operations:
    width = session.graph_state(sess).hparams.n_embd
    if width < _MIN_WIDTH:
        return ONE_ROW
    with _choosing:
        if width not in _chosen:
            try:
                _chosen[width] = _ONE_ROW[_clearly_quickest(_time_one_row(sess))]
            except tf.errors.OpError:  # such as no memory
                _chosen[width] = ONE_ROW
        return _chosen[width]
