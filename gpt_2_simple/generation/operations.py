"""A session and a number of rows in, the operations that are quickest for a decoding step out.

TensorFlow has several kernels for a product of few rows. Which one is the quickest depends on the
processor, so those for one row are timed once a process. On a GPU a step takes as long as starting
its kernels does, so there the operations are those that start few.
"""

from __future__ import annotations

import functools
import math
import os
import time
from collections.abc import Callable
from typing import NamedTuple

import tensorflow as tf

from .. import model, session
from ..precision import has_gpu
from .kv_cache import model_precision

# x [rows, nx], terms [rows, nf] -> x times a matrix, and the terms added [rows, nf].
Project = Callable[..., tf.Tensor]

# x [rows, embd] -> its layer norm.
Normalize = Callable[[tf.Tensor, model.LayerNorm], tf.Tensor]


class Operations(NamedTuple):
    """How a step computes. What does not change from step to step is made before the loop."""

    linear: Callable[[tf.Tensor, tf.Tensor], Project]  # of a matrix [nx, nf] and a bias [nf]
    unembed: Callable[[tf.Tensor], Project]  # of wte [n_vocab, embd]: x wte^T, no terms
    # Of one query a row: q [rows, 1, width], k and v [rows, keys, width], mask -> as q.
    attention: Callable[..., tf.Tensor]
    layer_norm: Callable[[tf.Tensor], Normalize]  # of the number of rows
    keeps_layout: bool = False  # of matrices that are int8; see model.Multiply


def operations_for(sess: tf.compat.v1.Session, one_row: bool = False) -> Operations:
    """The operations of a step for a few rows of tokens, or for one."""
    if has_gpu(sess):
        return ON_GPU
    if not one_row or model_precision(sess) == "int8":
        return FEW_ROWS
    return _quickest_for_one_row(session.graph_state(sess).hparams.n_embd)


# --- products -------------------------------------------------------------------------------------


def _in_parts(w: tf.Tensor, b: tf.Tensor) -> Project:
    """For one row.

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


def _by(multiply: Callable[[tf.Tensor, tf.Tensor], tf.Tensor]) -> Callable[..., Project]:
    """A layer whose product is computed by `multiply`."""

    def linear(w: tf.Tensor, b: tf.Tensor) -> Project:
        return lambda x, *terms: sum(terms, tf.nn.bias_add(multiply(x, w), b))

    return linear


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


def _layer_norm_in_steps(_n_rows: tf.Tensor) -> Normalize:
    """On a CPU its nine nodes take 5 us for one row.

    The operations that do it at once set themselves up in each run, which takes longer:
    FusedBatchNormV3 50 us, oneDNN's _MklLayerNorm 330 us.
    """
    return model.layer_norm


def _layer_norm_by_batch_norm(n_rows: tf.Tensor) -> Normalize:
    """Three kernels in the place of nine: a batch norm whose channels are the rows."""
    ones, zeros = tf.ones([n_rows]), tf.zeros([n_rows])

    def layer_norm(x: tf.Tensor, parameters: model.LayerNorm) -> tf.Tensor:
        width = x.shape.as_list()[-1]
        normalized = tf.raw_ops.FusedBatchNormV3(
            x=tf.reshape(x, [1, -1, width, 1]), scale=ones, offset=zeros, mean=[], variance=[],
            epsilon=model.LAYER_NORM_EPSILON, data_format="NCHW", is_training=True,
        )  # fmt: skip
        return tf.reshape(normalized.y, [-1, width]) * parameters.g + parameters.b

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
ON_GPU = Operations(_by(tf.matmul), _unembed_by_matmul, _attention, _layer_norm_by_batch_norm)


# --- the quickest for one row ---------------------------------------------------------------------

# Matrices of a smaller model stay in the processor's caches, and nobody waits for it.
_MIN_WIDTH = 512
# Another way must take less than this share of the usual one's time. Nearly equal ones would take
# turns from process to process, and with them the last digits of the logits.
_CLEARLY_QUICKER = 0.9
_TIMED_BYTES = 64 * 2**20  # more than caches hold
_ROUNDS = 4


@functools.cache
def _quickest_for_one_row(n_embd: int) -> Operations:
    if n_embd < _MIN_WIDTH:
        return ONE_ROW
    try:
        seconds = _time_one_row(n_embd)
    except (tf.errors.OpError, MemoryError):
        return ONE_ROW
    best = min(seconds, key=lambda name: seconds[name])
    return _ONE_ROW[best] if seconds[best] < _CLEARLY_QUICKER * seconds["in parts"] else ONE_ROW


def _time_one_row(n_embd: int) -> dict[str, float]:
    """The seconds that products of a row by some matrices [n_embd, 4 n_embd] take, by each way."""
    n_matrices = -(-_TIMED_BYTES // (16 * n_embd**2))
    config = session.session_config()
    config.device_count["GPU"] = 0
    with tf.Graph().as_default() as graph, tf.compat.v1.Session(graph=graph, config=config) as sess:
        shape = [n_matrices, n_embd, 4 * n_embd]
        variable = tf.compat.v1.get_variable(
            "w", shape, initializer=tf.compat.v1.zeros_initializer(), use_resource=True
        )
        sess.run(variable.initializer)
        matrices = tf.unstack(variable.read_value())
        x, bias = tf.compat.v1.placeholder(tf.float32, [1, n_embd]), tf.zeros([4 * n_embd])

        def chain(linear: Callable[[tf.Tensor, tf.Tensor], Project]) -> tf.Operation:
            y = x
            for w in matrices:
                with tf.control_dependencies([y]):  # one product after the other, as in a model
                    y = linear(w, bias)(tf.identity(x))
            return y.op

        runs = {name: chain(operations.linear) for name, operations in _ONE_ROW.items()}
        row = {x: [[1.0] * n_embd]}
        seconds = dict.fromkeys(runs, math.inf)
        for measured in [False] + [True] * _ROUNDS:
            for name, run in runs.items():
                began = time.perf_counter()
                sess.run(run, row)
                if measured:
                    seconds[name] = min(seconds[name], time.perf_counter() - began)
        return seconds
