"""Tokens and a cache in, new tokens out: the graph's prefill, decode loop and beam step."""

from __future__ import annotations

import contextlib
import functools
import math
import os
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import tensorflow as tf

from .. import model
from .kv_cache import build_once, grow_cache, head_width, placeholder, store_cache, take_cache
from .sampling import (
    BROKEN,
    HEALTHY,
    SamplingPlaceholders,
    TextTokens,
    next_token,
    process_logits,
    sampling_placeholders,
)


class Prefill(NamedTuple):
    """Writes the keys and values of given tokens to a cache.

    Attributes:
        cache_key: the cache's key.
        tokens: the tokens [rows, time].
        left_pads: columns at the left that a row does not see [rows].
        cache_length: columns of the cache that are in use; the tokens come after them.
        run: the operation.
    """

    cache_key: Any
    tokens: Any
    left_pads: Any
    cache_length: Any
    run: Any


class StepInputs(NamedTuple):
    """What is fed to make new tokens.

    Attributes:
        cache_key: the cache's key.
        last_tokens: each text's last token [rows], which is not in the cache yet.
        left_pads: columns at the left that a row does not see [rows].
        cache_length: columns of the cache that are in use.
        added_columns: columns to add to the cache.
        text_tokens: the texts [rows, time], padded with -1 on the left; without columns if the
            penalties are off.
        n_generated: new tokens that each text has.
        sampling: how to choose.
    """

    cache_key: Any
    last_tokens: Any
    left_pads: Any
    cache_length: Any
    added_columns: Any
    text_tokens: Any
    n_generated: Any
    sampling: SamplingPlaceholders


class Decode(NamedTuple):
    """Generates some tokens for each text, one after the other.

    Attributes:
        inputs: what is fed; its text_tokens have a further -1 on the right for each step.
        uniform: a random number in [0, 1) for each new token [steps, rows].
        ended: rows that need no more tokens [rows].
        tokens: the new tokens [rows, steps], -1 after a row's end; fewer steps if all rows end.
        status: whether the logits made sense [rows]; see sampling.check_status.
        run: keeps the cache in the session.
    """

    inputs: StepInputs
    uniform: Any
    ended: Any
    tokens: Any
    status: Any
    run: Any


class BeamStep(NamedTuple):
    """Finds the likeliest next tokens of each text.

    Attributes:
        inputs: what is fed.
        parents: the row of the cache that each text continues from [rows].
        count: how many next tokens to find.
        tokens: the likeliest next tokens [rows, count], the likeliest first.
        log_probabilities: theirs [rows, count].
        status: whether the logits made sense [rows]; see sampling.check_status.
        run: keeps the cache in the session.
    """

    inputs: StepInputs
    parents: Any
    count: Any
    tokens: Any
    log_probabilities: Any
    status: Any
    run: Any


def decode_ops(sess: tf.compat.v1.Session, rows: int) -> Decode:
    """The operations of Decode for this many rows; the first call adds them to the graph."""
    return build_once(sess, _build_decode, ONE_ROW if rows == 1 else FEW_ROWS)


def build_prefill(weights: model.Weights, hparams: model.HParams) -> Prefill:
    """Adds the operations of Prefill to the graph."""
    key, cache_length = placeholder(tf.int64), placeholder(tf.int32)
    tokens, left_pads = placeholder(tf.int32, None, None), placeholder(tf.int32, None)
    cache = take_cache(key, hparams)
    shape, n_tokens = tf.shape(cache[0]), tf.shape(tokens)[1]
    forward = _CachedForward(weights, hparams, shape, left_pads, n_tokens, MANY_ROWS)
    _, cache = forward(cache, tokens, cache_length)
    return Prefill(key, tokens, left_pads, cache_length, store_cache(key, cache))


def _build_decode(weights: model.Weights, hparams: model.HParams, matmul: Matmul) -> Decode:
    inputs, uniform = _step_inputs(), placeholder(tf.float64, None, None)
    ended = placeholder(tf.bool, None)
    n_steps = tf.shape(uniform)[0]
    cache = grow_cache(take_cache(inputs.cache_key, hparams), inputs.added_columns)
    shape = tf.shape(cache[0])
    forward = _CachedForward(weights, hparams, shape, inputs.left_pads, 1, matmul)

    def body(step: Any, cache: Any, last: Any, text: Any, ended: Any, status: Any, out: Any) -> Any:
        h, cache = forward(cache, last[:, tf.newaxis], inputs.cache_length + step)  # [rows, embd]
        logits = matmul.unembed(h, weights.wte)
        text_length = tf.shape(text)[1] - n_steps + step
        so_far = TextTokens(text, text_length, inputs.n_generated + step)
        token, fault = next_token(logits, uniform[step], so_far, inputs.sampling)
        is_here = tf.equal(tf.range(tf.shape(text)[1]), text_length)
        return (
            step + 1,
            cache,
            token,
            tf.where(is_here, token[:, tf.newaxis], text),
            ended | tf.equal(token, inputs.sampling.stop_token),
            tf.maximum(status, tf.where(ended, HEALTHY, fault)),
            out.write(step, tf.where(ended, -1, token)),
        )

    def has_more(step: Any, _cache: Any, _last: Any, _text: Any, ended: Any, *_: Any) -> tf.Tensor:
        return (step < n_steps) & ~tf.reduce_all(ended)

    start = [
        tf.constant(0),
        cache,
        inputs.last_tokens,
        inputs.text_tokens,
        ended,
        tf.fill(tf.shape(inputs.last_tokens), HEALTHY),
        tf.TensorArray(tf.int32, n_steps, element_shape=[None]),
    ]
    with _loops_of_single_operations():
        n_done, cache, _, _, _, status, out = tf.while_loop(
            has_more, body, start, parallel_iterations=1
        )
    tokens = tf.transpose(out.gather(tf.range(n_done)))  # [rows, steps]
    return Decode(inputs, uniform, ended, tokens, status, store_cache(inputs.cache_key, cache))


def build_beam_step(weights: model.Weights, hparams: model.HParams) -> BeamStep:
    """Adds the operations of BeamStep to the graph."""
    inputs, parents, count = _step_inputs(), placeholder(tf.int32, None), placeholder(tf.int32)
    taken = take_cache(inputs.cache_key, hparams)
    cache = grow_cache([tf.gather(part, parents) for part in taken], inputs.added_columns)
    shape = tf.shape(cache[0])
    forward = _CachedForward(weights, hparams, shape, inputs.left_pads, 1, FEW_ROWS)
    h, cache = forward(cache, inputs.last_tokens[:, tf.newaxis], inputs.cache_length)
    logits = FEW_ROWS.unembed(h, weights.wte)
    text_length = tf.shape(inputs.text_tokens)[1]
    text = TextTokens(inputs.text_tokens, text_length, inputs.n_generated)
    logits, is_broken = process_logits(logits, text, inputs.sampling)
    log_probabilities, tokens = tf.math.top_k(tf.nn.log_softmax(logits), count)
    status = tf.where(is_broken, BROKEN, HEALTHY)
    run = store_cache(inputs.cache_key, cache)
    return BeamStep(inputs, parents, count, tokens, log_probabilities, status, run)


def _step_inputs() -> StepInputs:
    return StepInputs(
        cache_key=placeholder(tf.int64),
        last_tokens=placeholder(tf.int32, None),
        left_pads=placeholder(tf.int32, None),
        cache_length=placeholder(tf.int32),
        added_columns=placeholder(tf.int32),
        text_tokens=placeholder(tf.int32, None, None),
        n_generated=placeholder(tf.int32),
        sampling=sampling_placeholders(),
    )


@contextlib.contextmanager
def _loops_of_single_operations() -> Iterator[None]:
    """Within this block a while loop consists of single operations, not of functions.

    Functions pass every weight on from step to step, and take half a second longer to optimize.
    """
    is_functional = tf.compat.v1.control_flow_v2_enabled()
    tf.compat.v1.disable_control_flow_v2()
    try:
        yield
    finally:
        if is_functional:
            tf.compat.v1.enable_control_flow_v2()


# --- products -------------------------------------------------------------------------------------


class Matmul(NamedTuple):
    """Matrix products for some number of rows: TensorFlow's quickest kernel depends on it.

    Attributes:
        linear: x [rows, nx], w [nx, nf], terms -> x w + terms, [rows, nf].
        unembed: h [rows, embd], wte [n_vocab, embd] -> logits [rows, n_vocab].
    """

    linear: Callable[..., tf.Tensor]
    unembed: Callable[..., tf.Tensor]


def _n_parts() -> int:
    # TensorFlow computes the products of a BatchMatMulV3 of one row in a thread each, and one
    # thread alone cannot read memory fast enough. Twice as many parts as cores leave less to do for
    # a thread that is late.
    return min(16, 2 ** (2 * (os.cpu_count() or 1) - 1).bit_length())


def _linear_one_row(x: tf.Tensor, w: tf.Tensor, *terms: tf.Tensor) -> tf.Tensor:
    n_parts = math.gcd(_n_parts(), w.shape[0])
    x = tf.reshape(x, [n_parts, 1, w.shape[0] // n_parts])
    w = tf.reshape(w, [n_parts, w.shape[0] // n_parts, w.shape[1]])
    # oneDNN has no kernel for V3, and the one that it has for MatMul is slower here.
    products = tf.unstack(tf.raw_ops.BatchMatMulV3(x=x, y=w, Tout=x.dtype))
    return tf.add_n([*products, *(tf.reshape(term, [1, -1]) for term in terms)])


def _unembed_one_row(h: tf.Tensor, wte: tf.Tensor) -> tf.Tensor:
    middle = wte.shape[0] // 2
    halves = [wte[:middle], wte[middle:]]
    return tf.concat(
        [tf.raw_ops.BatchMatMulV3(x=h, y=half, adj_y=True, Tout=h.dtype) for half in halves], axis=1
    )


def _linear_few_rows(x: tf.Tensor, w: tf.Tensor, *terms: tf.Tensor) -> tf.Tensor:
    return sum(terms, tf.einsum("bi,ij->bj", x, w))


def _unembed_few_rows(h: tf.Tensor, wte: tf.Tensor) -> tf.Tensor:
    # Twice as quick as oneDNN's MatMul with transpose_b=True, for a few rows and so long a wte.
    return tf.einsum("bi,ji->bj", h, wte)


def _linear_many_rows(x: tf.Tensor, w: tf.Tensor, *terms: tf.Tensor) -> tf.Tensor:
    return sum(terms, tf.matmul(x, w))


ONE_ROW = Matmul(_linear_one_row, _unembed_one_row)
FEW_ROWS = Matmul(_linear_few_rows, _unembed_few_rows)
MANY_ROWS = Matmul(_linear_many_rows, _unembed_few_rows)


# --- the model, with a cache ----------------------------------------------------------------------


class _CachedForward:
    """The model's forward pass for tokens that come after those in a cache.

    What is the same in each step of a loop is computed here, before the loop.
    """

    def __init__(
        self,
        weights: model.Weights,
        hparams: model.HParams,
        cache_shape: tf.Tensor,
        left_pads: tf.Tensor,
        n_tokens: Any,
        matmul: Matmul,
    ) -> None:
        """Adds what does not depend on the step.

        Args:
            weights: tensors.
            hparams: sizes.
            cache_shape: [rows, n_head, capacity, width].
            left_pads: columns at the left that a row does not see [rows].
            n_tokens: tokens a row; the number 1 saves transposes.
            matmul: how to multiply.
        """
        self.weights, self.hparams, self.matmul = weights, hparams, matmul
        self.cache_shape, self.left_pads, self.n_tokens = cache_shape, left_pads, n_tokens
        self.width, heads = head_width(hparams), hparams.n_head
        self.rows, capacity = cache_shape[0], cache_shape[2]
        axes = [tf.range(self.rows), tf.range(n_tokens), tf.range(heads)]  # the keys' order
        row, token, head = tf.meshgrid(*axes, indexing="ij")
        self.first_indices = tf.reshape((row * heads + head) * capacity + token, [-1])
        self.keys_shape = tf.stack([self.rows * heads, capacity, self.width])
        self.key_columns = tf.range(capacity)
        self.is_pad = self.key_columns < left_pads[:, tf.newaxis, tf.newaxis]

    def __call__(
        self, cache: list[tf.Tensor], tokens: tf.Tensor, column: tf.Tensor
    ) -> tuple[tf.Tensor, list[tf.Tensor]]:
        """Computes hidden states, and adds the tokens' keys and values to the cache.

        Args:
            cache: the cache.
            tokens: [rows, n_tokens].
            column: the cache's column for the first of them.

        Returns:
            Hidden states [rows * n_tokens, embd], and the cache with the tokens.
        """
        cache = list(cache)
        columns = column + tf.range(self.n_tokens)
        is_visible = ~self.is_pad & (self.key_columns <= columns[:, tf.newaxis])
        mask = tf.where(is_visible, 0.0, model.MASKED_SCORE)  # [rows, query, key]
        mask = tf.repeat(mask, self.hparams.n_head, axis=0)
        indices = self.first_indices + column

        def attend(layer: int, qkv: tf.Tensor) -> tf.Tensor:
            q, k, v = tf.split(qkv, 3, axis=1)
            cache[2 * layer], k = self._write(cache[2 * layer], indices, k)
            cache[2 * layer + 1], v = self._write(cache[2 * layer + 1], indices, v)
            attention = _attention_of_one_query if self.n_tokens == 1 else model.attention
            q = self._split_heads(q * self.width**-0.5)
            return self._merge_heads(attention(q, k, v, mask))

        # A row that has ended may run on past the last position; nobody reads what comes of it.
        last_position = self.hparams.n_ctx - 1
        position = tf.clip_by_value(columns - self.left_pads[:, tf.newaxis], 0, last_position)
        x = tf.gather(self.weights.wte, tokens) + tf.gather(self.weights.wpe, position)
        x = tf.reshape(x, [-1, self.hparams.n_embd])
        for layer, block in enumerate(self.weights.blocks):
            x = _transformer_block(x, block, functools.partial(attend, layer), self.matmul)
        return model.layer_norm(x, self.weights.ln_f), cache

    def _write(
        self, part: tf.Tensor, indices: tf.Tensor, new: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """Writes new keys, or values, into their part of the cache.

        Returns:
            The part, in the cache's shape and as [rows * n_head, capacity, width].
        """
        new = tf.reshape(new, [-1, self.width])
        flat = tf.reshape(part, [-1, self.width])
        flat = tf.raw_ops.InplaceUpdate(x=flat, i=indices, v=new)
        return tf.reshape(flat, self.cache_shape), tf.reshape(flat, self.keys_shape)

    def _split_heads(self, q: tf.Tensor) -> tf.Tensor:
        """[rows * n_tokens, embd] -> [rows * n_head, n_tokens, width]."""
        heads = self.hparams.n_head
        if self.n_tokens == 1:
            return tf.reshape(q, tf.stack([self.rows * heads, 1, self.width]))
        q = tf.transpose(tf.reshape(q, [self.rows, self.n_tokens, heads, self.width]), [0, 2, 1, 3])
        return tf.reshape(q, [self.rows * heads, self.n_tokens, self.width])

    def _merge_heads(self, x: tf.Tensor) -> tf.Tensor:
        """[rows * n_head, n_tokens, width] -> [rows * n_tokens, embd]."""
        if self.n_tokens != 1:
            shape = [self.rows, self.hparams.n_head, self.n_tokens, self.width]
            x = tf.transpose(tf.reshape(x, shape), [0, 2, 1, 3])
        return tf.reshape(x, [-1, self.hparams.n_embd])


def _transformer_block(
    x: tf.Tensor, block: model.Block, attend: Callable[..., tf.Tensor], matmul: Matmul
) -> tf.Tensor:
    """One transformer block; x [rows, embd], attend: q, k and v in [rows, 3 * embd] -> as x."""

    def linear(x: tf.Tensor, layer: model.Linear, *terms: tf.Tensor) -> tf.Tensor:
        if layer.w.dtype != x.dtype:
            product = tf.matmul(tf.cast(x, layer.w.dtype), layer.w)
            return sum(terms, tf.cast(product, x.dtype) + layer.b)
        return matmul.linear(x, layer.w, layer.b, *terms)

    qkv = linear(model.layer_norm(x, block.ln_1), block.c_attn)
    x = linear(attend(qkv), block.c_proj, x)
    hidden = model.gelu(linear(model.layer_norm(x, block.ln_2), block.mlp_c_fc))
    return linear(hidden, block.mlp_c_proj, x)


def _attention_of_one_query(q: tf.Tensor, k: tf.Tensor, v: tf.Tensor, mask: tf.Tensor) -> tf.Tensor:
    """As model.attention, for one query a row; oneDNN's kernels take longer to start."""
    scores = tf.raw_ops.BatchMatMulV3(x=q, y=k, adj_y=True, Tout=q.dtype) + mask
    weights = tf.exp(scores - tf.reduce_max(scores, axis=2, keepdims=True))
    total = tf.reduce_sum(weights, axis=2, keepdims=True)
    return tf.raw_ops.BatchMatMulV3(x=weights, y=v, Tout=q.dtype) / total
