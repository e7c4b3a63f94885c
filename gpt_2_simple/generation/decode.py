"""Tokens and a cache in, new tokens out: the graph's prefill and its decode loop."""

from __future__ import annotations

import contextlib
import functools
import math
import os
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import tensorflow as tf

from .. import model
from .kv_cache import build_once, grow_cache, head_width, placeholder, stage, take
from .sampling import (
    BROKEN,
    HEALTHY,
    SamplingPlaceholders,
    next_token,
    process_logits,
    sampling_placeholders,
)


class Prefill(NamedTuple):
    """Writes the keys and values of `tokens` [rows, time] to the cache, from column `used` on."""

    key: Any
    tokens: Any
    pads: Any
    used: Any
    run: Any


class Decode(NamedTuple):
    """Writes new tokens, one column each; what goes in, then what comes out.

    Attributes:
        key: the cache's.
        last: the texts' last tokens [rows], not in the cache yet.
        pads: columns that a row does not see [rows].
        used: columns of the cache that hold something.
        grow: columns to add to the cache.
        uniform: a number in [0, 1) for each new token [steps, rows].
        history: the texts [rows, time], padded with -1 on the left, and on the right by `steps`;
            without columns where nothing asks for it.
        ended: rows that need no more tokens [rows].
        written: new tokens before this chunk.
        controls: how to choose.
        tokens: the new tokens [rows, steps], -1 after a row's end; fewer steps if all rows end.
        status: whether the logits made sense [rows].
        run: keeps the cache for the next chunk.
    """

    key: Any
    last: Any
    pads: Any
    used: Any
    grow: Any
    uniform: Any
    history: Any
    ended: Any
    written: Any
    controls: SamplingPlaceholders
    tokens: Any
    status: Any
    run: Any


class BeamStep(NamedTuple):
    """One token further, and what could come next; names as in Decode.

    Attributes:
        parents: the rows of the cache that the texts go on from [rows].
        count: how many next tokens to name.
        tokens: the likeliest next tokens [rows, count], the likeliest first.
        scores: their log-probabilities [rows, count].
        status: whether the logits made sense [rows].
    """

    key: Any
    parents: Any
    last: Any
    pads: Any
    used: Any
    grow: Any
    history: Any
    written: Any
    count: Any
    controls: SamplingPlaceholders
    tokens: Any
    scores: Any
    status: Any
    run: Any


def decoder(sess: tf.compat.v1.Session, rows: int) -> Decode:
    """The loop for so many rows, built by the first call."""
    if rows == 1:
        return build_once(sess, _build_decode, ONE_ROW)
    return build_once(sess, _build_decode, FEW_ROWS)


def _attend_one(q: tf.Tensor, k: tf.Tensor, v: tf.Tensor, mask: tf.Tensor) -> tf.Tensor:
    """As model.attend_rows for one query a row; oneDNN's kernels cost more to start."""
    scores = tf.raw_ops.BatchMatMulV3(x=q, y=k, adj_y=True, Tout=q.dtype) + mask
    likelihood = tf.exp(scores - tf.reduce_max(scores, axis=2, keepdims=True))
    total = tf.reduce_sum(likelihood, axis=2, keepdims=True)
    return tf.raw_ops.BatchMatMulV3(x=likelihood, y=v, Tout=q.dtype) / total


class Matmul(NamedTuple):
    """How to multiply so many rows: which of TensorFlow's kernels is quickest depends on it.

    Attributes:
        project: x [rows, nx], w [nx, nf], terms -> x w + terms, [rows, nf].
        embed: h [rows, embd], wte [n_vocab, embd] -> logits [rows, n_vocab].
    """

    project: Callable[..., tf.Tensor]
    embed: Callable[..., tf.Tensor]


def _side_by_side() -> int:
    # Twice the cores, so that one that is late has less to do. TensorFlow runs the products of a
    # BatchMatMulV3 with one row on a thread each; one thread alone cannot read memory fast enough.
    return min(16, 2 ** (2 * (os.cpu_count() or 1) - 1).bit_length())


def _project_one(x: tf.Tensor, w: tf.Tensor, *terms: tf.Tensor) -> tf.Tensor:
    parts = math.gcd(_side_by_side(), w.shape[0])
    x = tf.reshape(x, [parts, 1, w.shape[0] // parts])
    w = tf.reshape(w, [parts, w.shape[0] // parts, w.shape[1]])
    # oneDNN has no kernel for V3, and the one that it has for MatMul is slower here.
    products = tf.unstack(tf.raw_ops.BatchMatMulV3(x=x, y=w, Tout=x.dtype))
    return tf.add_n([*products, *(tf.reshape(term, [1, -1]) for term in terms)])


def _embed_one(h: tf.Tensor, wte: tf.Tensor) -> tf.Tensor:
    middle = wte.shape[0] // 2
    halves = [wte[:middle], wte[middle:]]
    return tf.concat(
        [tf.raw_ops.BatchMatMulV3(x=h, y=half, adj_y=True, Tout=h.dtype) for half in halves], axis=1
    )


def _project_few(x: tf.Tensor, w: tf.Tensor, *terms: tf.Tensor) -> tf.Tensor:
    return sum(terms, tf.einsum("bi,ij->bj", x, w))


def _embed_few(h: tf.Tensor, wte: tf.Tensor) -> tf.Tensor:
    # Twice as quick as oneDNN's MatMul with transpose_b=True, for a few rows and so long a wte.
    return tf.einsum("bi,ji->bj", h, wte)


def _project_many(x: tf.Tensor, w: tf.Tensor, *terms: tf.Tensor) -> tf.Tensor:
    return sum(terms, tf.matmul(x, w))


ONE_ROW = Matmul(_project_one, _embed_one)

FEW_ROWS = Matmul(_project_few, _embed_few)

MANY_ROWS = Matmul(_project_many, _embed_few)


def _block(
    x: tf.Tensor, block: model.Block, attend: Callable[..., tf.Tensor], matmul: Matmul
) -> tf.Tensor:
    """One transformer block; x [rows, embd], attend: q, k and v in [rows, 3 * embd] -> as x."""

    def affine(x: tf.Tensor, layer: model.Affine, *terms: tf.Tensor) -> tf.Tensor:
        if layer.w.dtype != x.dtype:
            product = tf.matmul(tf.cast(x, layer.w.dtype), layer.w)
            return sum(terms, tf.cast(product, x.dtype) + layer.b)
        return matmul.project(x, layer.w, layer.b, *terms)

    qkv = affine(model.layer_norm(x, block.ln_1), block.c_attn)
    x = affine(attend(qkv), block.c_proj, x)
    hidden = model.gelu(affine(model.layer_norm(x, block.ln_2), block.mlp_c_fc))
    return affine(hidden, block.mlp_c_proj, x)


def _masked(visible: tf.Tensor) -> tf.Tensor:
    return tf.where(visible, 0.0, model.MASKED_SCORE)


def build_prefill(weights: model.Weights, hparams: model.HParams) -> Prefill:
    key, used = placeholder(tf.int64), placeholder(tf.int32)
    tokens, pads = placeholder(tf.int32, None, None), placeholder(tf.int32, None)
    cache = take(key, hparams)
    time_ = tf.shape(tokens)[1]
    forward = _build_forward(weights, hparams, tf.shape(cache[0]), pads, time_, MANY_ROWS)
    _, cache = forward(cache, tokens, used)
    return Prefill(key, tokens, pads, used, stage(key, cache))


def _build_decode(weights: model.Weights, hparams: model.HParams, matmul: Matmul) -> Decode:
    key, controls = placeholder(tf.int64), sampling_placeholders()
    last, pads = placeholder(tf.int32, None), placeholder(tf.int32, None)
    used, grow, written = (placeholder(tf.int32) for _ in range(3))
    uniform, texts = placeholder(tf.float64, None, None), placeholder(tf.int32, None, None)
    ended = placeholder(tf.bool, None)
    steps = tf.shape(uniform)[0]
    cache = [grow_cache(part, grow) for part in take(key, hparams)]
    forward = _build_forward(weights, hparams, tf.shape(cache[0]), pads, 1, matmul)

    def body(step: Any, cache: Any, last: Any, history: Any, ended: Any, status: Any, out: Any):
        h, cache = forward(cache, last[:, tf.newaxis], used + step)  # [rows, embd]
        logits = matmul.embed(h, weights.wte)
        end = tf.shape(history)[1] - steps + step
        token, fault = next_token(logits, uniform[step], history, end, written + step, controls)
        here = tf.equal(tf.range(tf.shape(history)[1]), end)
        return (
            step + 1,
            cache,
            token,
            tf.where(here, token[:, tf.newaxis], history),
            ended | tf.equal(token, controls.stop_token),
            tf.maximum(status, tf.where(ended, HEALTHY, fault)),
            out.write(step, tf.where(ended, -1, token)),
        )

    def more(step: Any, _cache: Any, _last: Any, _texts: Any, ended: Any, *_: Any) -> tf.Tensor:
        return (step < steps) & ~tf.reduce_all(ended)

    start = [
        tf.constant(0), cache, last, texts, ended,
        tf.fill(tf.shape(last), HEALTHY), tf.TensorArray(tf.int32, steps, element_shape=[None]),
    ]  # fmt: skip
    with _plain_loops():
        done = tf.while_loop(more, body, start, parallel_iterations=1)
    tokens = tf.transpose(done[-1].gather(tf.range(done[0])))  # [rows, steps]
    run = stage(key, done[1])
    return Decode(
        key, last, pads, used, grow, uniform, texts, ended, written, controls, tokens, done[-2],
        run,
    )  # fmt: skip


def build_beam_step(weights: model.Weights, hparams: model.HParams) -> BeamStep:
    key, controls, parents = (
        placeholder(tf.int64),
        sampling_placeholders(),
        placeholder(tf.int32, None),
    )
    last, pads = placeholder(tf.int32, None), placeholder(tf.int32, None)
    used, grow, written, count = (placeholder(tf.int32) for _ in range(4))
    history = placeholder(tf.int32, None, None)
    cache = [grow_cache(tf.gather(part, parents), grow) for part in take(key, hparams)]
    forward = _build_forward(weights, hparams, tf.shape(cache[0]), pads, 1, FEW_ROWS)
    h, cache = forward(cache, last[:, tf.newaxis], used)
    logits, broken = process_logits(
        FEW_ROWS.embed(h, weights.wte), history, tf.shape(history)[1], written, controls
    )
    scores, tokens = tf.math.top_k(tf.nn.log_softmax(logits), count)
    status = tf.where(broken, BROKEN, HEALTHY)
    return BeamStep(
        key, parents, last, pads, used, grow, history, written, count, controls, tokens, scores,
        status, stage(key, cache),
    )  # fmt: skip


@contextlib.contextmanager
def _plain_loops() -> Iterator[None]:
    """Loops made within consist of single operations, not of functions.

    Those hand on every weight from step to step and take half a second longer to optimize.
    """
    functional = tf.compat.v1.control_flow_v2_enabled()
    tf.compat.v1.disable_control_flow_v2()
    try:
        yield
    finally:
        if functional:
            tf.compat.v1.enable_control_flow_v2()


def _build_forward(
    weights: model.Weights,
    hparams: model.HParams,
    cache_shape: tf.Tensor,
    pads: tf.Tensor,
    time_: Any,
    matmul: Matmul,
) -> Callable[..., tuple[tf.Tensor, tf.Tensor]]:
    """What is the same for each step of a loop, computed before it.

    Args:
        weights: tensors.
        hparams: sizes.
        cache_shape: [rows, n_head, columns, width].
        pads: [rows].
        time_: tokens in a step; 1 saves transposes.
        matmul: how to multiply.

    Returns:
        A function (cache, tokens [rows, time], column of the first of them) -> (hidden states
        [rows * time, embd], the cache with the tokens' keys and values).
    """
    heads, width = hparams.n_head, head_width(hparams)
    rows, columns = cache_shape[0], cache_shape[2]
    axes = [tf.range(rows), tf.range(time_), tf.range(heads)]  # as the keys come
    row, time_of, head = tf.meshgrid(*axes, indexing="ij")
    places = tf.reshape((row * heads + head) * columns + time_of, [-1])
    keys_shape = tf.stack([rows * heads, columns, width])
    key_column = tf.range(columns)
    left = key_column < pads[:, tf.newaxis, tf.newaxis]

    def heads_first(q: tf.Tensor) -> tf.Tensor:
        if time_ == 1:
            return tf.reshape(q, tf.stack([rows * heads, 1, width]))
        q = tf.transpose(tf.reshape(q, [rows, time_, heads, width]), [0, 2, 1, 3])
        return tf.reshape(q, [rows * heads, time_, width])

    def heads_last(x: tf.Tensor) -> tf.Tensor:
        if time_ != 1:
            x = tf.transpose(tf.reshape(x, [rows, heads, time_, width]), [0, 2, 1, 3])
        return tf.reshape(x, [-1, hparams.n_embd])

    def forward(
        cache: list[tf.Tensor], tokens: tf.Tensor, at: tf.Tensor
    ) -> tuple[tf.Tensor, list[tf.Tensor]]:
        cache = list(cache)
        column = at + tf.range(time_)
        mask = _masked(~left & (key_column <= column[:, tf.newaxis]))  # [rows, query, key]
        mask = tf.repeat(mask, heads, axis=0)
        here = places + at

        def remember(part: int, new: tf.Tensor) -> tf.Tensor:
            new = tf.reshape(new, [-1, width])
            flat = tf.reshape(cache[part], [-1, width])
            flat = tf.raw_ops.InplaceUpdate(x=flat, i=here, v=new)
            cache[part] = tf.reshape(flat, cache_shape)
            return tf.reshape(flat, keys_shape)

        def attend(layer: int, qkv: tf.Tensor) -> tf.Tensor:
            q, k, v = tf.split(qkv, 3, axis=1)
            k, v = remember(2 * layer, k), remember(2 * layer + 1, v)
            attend_rows = _attend_one if time_ == 1 else model.attend_rows
            return heads_last(attend_rows(heads_first(q * width**-0.5), k, v, mask))

        # A row that has ended may run on past the last position; nobody looks at it.
        position = tf.clip_by_value(column - pads[:, tf.newaxis], 0, hparams.n_ctx - 1)
        x = tf.gather(weights.wte, tokens) + tf.gather(weights.wpe, position)
        x = tf.reshape(x, [-1, hparams.n_embd])
        for layer, block in enumerate(weights.blocks):
            x = _block(x, block, functools.partial(attend, layer), matmul)
        return model.layer_norm(x, weights.ln_f), cache

    return forward
