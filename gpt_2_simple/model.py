"""Hyper-parameters and int32 token ids [batch, time] in, GPT-2's float32 logits out.

The network of Radford et al. 2019, "Language Models are Unsupervised Multitask Learners": pre-norm
transformer blocks, learned positions, an output projection tied to the token embedding. Names and
shapes of the variables are those of OpenAI's published checkpoints.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import tensorflow as tf

from .common.hparams import HParams
from .common.hparams import default_hparams as default_hparams  # public here, as in OpenAI's code

# With a static sequence length, queries attend in chunks of this many rows, each to the keys it may
# see: less than the whole square of scores is then computed and stored.
QUERY_CHUNK = 256

# Added to a score that a query must not see: exp() of it is 0.
MASKED_SCORE = -30000.0

LAYER_NORM_EPSILON = 1e-5

CHECKPOINTS = "checkpoints"

# Of activations and matmuls in training, where weights and optimizer state are always float32; of
# the blocks' matrices in generating.
PRECISIONS = {"float32": tf.float32, "bfloat16": tf.bfloat16, "float16": tf.float16}


def check_precision(precision: str) -> None:
    """Raises ValueError for a name that is not in PRECISIONS."""
    if precision not in PRECISIONS:
        raise ValueError(f"precision={precision!r} must be one of {list(PRECISIONS)}")


class Affine(NamedTuple):
    """A projection: w [nx, nf] (its variable is [1, nx, nf]) and b [nf]."""

    w: Any
    b: Any


class Norm(NamedTuple):
    """A layer norm's gain g and bias b, each [n_embd]."""

    g: Any
    b: Any


class Block(NamedTuple):
    """One transformer block's parameters."""

    ln_1: Norm
    c_attn: Affine
    c_proj: Affine
    ln_2: Norm
    mlp_c_fc: Affine
    mlp_c_proj: Affine


class Weights(NamedTuple):
    """All parameters, as variables (`variables`) or as tensors read from them (`read`)."""

    wte: Any
    wpe: Any
    blocks: tuple[Block, ...]
    ln_f: Norm


def variables(
    hparams: HParams,
    scope: str = "model",
    gpus: Sequence[str] = (),
    reuse: Any = False,
    dtype: tf.DType = tf.float32,
) -> Weights:
    """Makes (or, with reuse=True or tf.compat.v1.AUTO_REUSE, finds) the model's variables.

    Args:
        hparams: sizes; n_vocab must be set.
        scope: prefix of the variables' names.
        gpus: devices over which the blocks are spread; empty leaves placement to TensorFlow.
        reuse: as in tf.compat.v1.variable_scope.
        dtype: of the blocks' matrices, which are nearly all of a large model; the others are
            float32.

    Returns:
        Weights of resource variables in the default graph.

    Raises:
        ValueError: hparams that no GPT-2 can have.
    """
    hparams.check()
    if hparams.n_vocab < 1:
        raise ValueError("n_vocab=0: set it to the size of the vocabulary")
    width = hparams.n_embd

    def variable(
        name: str,
        shape: list[int],
        init: tf.compat.v1.Initializer,
        dtype: tf.DType = tf.float32,
    ) -> tf.Variable:
        return tf.compat.v1.get_variable(name, shape, dtype, init, use_resource=True)

    def normal(stddev: float) -> tf.compat.v1.Initializer:
        return tf.compat.v1.random_normal_initializer(stddev=stddev)

    zeros = tf.compat.v1.zeros_initializer()

    def affine(name: str, nx: int, nf: int) -> Affine:
        with tf.compat.v1.variable_scope(name):
            w = variable("w", [1, nx, nf], normal(0.02), dtype)
            return Affine(w, variable("b", [nf], zeros))

    def norm(name: str) -> Norm:
        with tf.compat.v1.variable_scope(name):
            ones = tf.compat.v1.ones_initializer()
            return Norm(variable("g", [width], ones), variable("b", [width], zeros))

    def block() -> Block:
        ln_1 = norm("ln_1")
        with tf.compat.v1.variable_scope("attn"):
            c_attn, c_proj = affine("c_attn", width, 3 * width), affine("c_proj", width, width)
        ln_2 = norm("ln_2")
        with tf.compat.v1.variable_scope("mlp"):
            fc, proj = affine("c_fc", width, 4 * width), affine("c_proj", 4 * width, width)
        return Block(ln_1, c_attn, c_proj, ln_2, fc, proj)

    with tf.compat.v1.variable_scope(scope, reuse=reuse):
        wpe = variable("wpe", [hparams.n_ctx, width], normal(0.01))
        wte = variable("wte", [hparams.n_vocab, width], normal(0.02))
        blocks = []
        for layer in range(hparams.n_layer):
            with (
                tf.device(block_device(layer, hparams.n_layer, gpus)),
                tf.compat.v1.variable_scope(f"h{layer}"),
            ):
                blocks.append(block())
        return Weights(wte, wpe, tuple(blocks), norm("ln_f"))


def block_device(layer: int, n_layer: int, gpus: Sequence[str]) -> str | None:
    """The device of a block when the blocks are spread evenly over `gpus`; None without any."""
    return gpus[layer * len(gpus) // n_layer] if gpus else None


def read(weights: Weights) -> Weights:
    """Reads every variable once; projections lose their leading 1."""

    def matrix(variable: Any) -> tf.Tensor:
        return tf.reshape(variable.read_value(), variable.shape[-2:])

    def vector(variable: Any) -> tf.Tensor:
        return variable.read_value()

    def block(variables_: Block) -> Block:
        return Block(*[
            Norm(*map(vector, part)) if isinstance(part, Norm)
            else Affine(matrix(part.w), vector(part.b))
            for part in variables_
        ])  # fmt: skip

    return Weights(
        wte=matrix(weights.wte),
        wpe=matrix(weights.wpe),
        blocks=tuple(map(block, weights.blocks)),
        ln_f=Norm(*map(vector, weights.ln_f)),
    )


def flatten(weights: Weights) -> list[Any]:
    """All of them in one list: wte, wpe, the blocks' in order, ln_f's."""
    blocks = [leaf for block in weights.blocks for part in block for leaf in part]
    return [weights.wte, weights.wpe, *blocks, *weights.ln_f]


def dimensions(x: tf.Tensor) -> list[Any]:
    """Shape of x as a list: Python ints where they are known, scalar tensors elsewhere."""
    dynamic = tf.shape(x)
    return [dynamic[i] if size is None else size for i, size in enumerate(x.shape.as_list())]


class Dropout(NamedTuple):
    """Dropout (Srivastava et al. 2014) that a recomputation repeats exactly.

    Attributes:
        rate: the share of elements set to 0, above 0 and below 1.
        seed: int32 [2]; each place draws from a seed of its own beside it.
    """

    rate: float
    seed: tf.Tensor

    def __call__(self, x: tf.Tensor, place: int) -> tf.Tensor:
        """Drops elements of x; `place` tells the calls of one forward pass apart."""
        seed = self.seed + tf.constant([place, 0])
        return tf.nn.experimental.stateless_dropout(x, rate=self.rate, seed=seed)


def in_type_of(x: tf.Tensor, weight: tf.Tensor) -> tf.Tensor:
    """`weight`, cast to x's type if it has another.

    The cast waits for x: else all weights would be cast at once, when a step begins.
    """
    if weight.dtype == x.dtype:
        return weight
    with tf.control_dependencies([x]):
        return tf.cast(weight, x.dtype)


def layer_norm(x: tf.Tensor, norm: Norm) -> tf.Tensor:
    """Layer normalisation (Ba et al. 2016) over the last axis, with gain and bias, in float32."""
    wide = tf.cast(x, norm.g.dtype)
    mean = tf.reduce_mean(wide, axis=-1, keepdims=True)
    centred = wide - mean
    variance = tf.reduce_mean(tf.square(centred), axis=-1, keepdims=True)
    scaled = centred * tf.math.rsqrt(variance + LAYER_NORM_EPSILON) * norm.g + norm.b
    return tf.cast(scaled, x.dtype)


def gelu(x: tf.Tensor) -> tf.Tensor:
    """The tanh form of GELU (Hendrycks & Gimpel 2016); stores only x for its gradient."""
    # 0.5 * (1 + tanh(u)) is sigmoid(2u), one pass over memory less.
    return with_gradient("Gpt2SimpleGelu", x * tf.sigmoid(_gelu_slope(x)), x)


def _gelu_slope(x: tf.Tensor) -> tf.Tensor:
    scale = 2.0 * math.sqrt(2.0 / math.pi)
    return x * (scale + 0.044715 * scale * tf.square(x))


@tf.RegisterGradient("Gpt2SimpleGelu")
def _gelu_gradient(op: tf.Operation, dy: tf.Tensor, *_: Any) -> list[Any]:
    x = op.inputs[1]
    scale = 2.0 * math.sqrt(2.0 / math.pi)
    gate = tf.sigmoid(_gelu_slope(x))
    slope = x * (scale + 3 * 0.044715 * scale * tf.square(x))
    return [None, dy * gate * (1.0 + slope * (1.0 - gate))]


def with_gradient(name: str, value: tf.Tensor, *stored: tf.Tensor) -> tf.Tensor:
    """Gives `value`, differentiated by the gradient registered as `name`, a function of `stored`.

    The gradient finds `stored` through the operation's own inputs, not through a closure as with
    tf.custom_gradient: a copy of the operation (memory_saving_gradients) then uses its own.
    """
    graph = tf.compat.v1.get_default_graph()
    with graph.gradient_override_map({"IdentityN": name}):
        return tf.identity_n([value, *stored])[0]


def affine(x: tf.Tensor, layer: Affine) -> tf.Tensor:
    """Projects x [..., nx] to x @ w + b [..., nf], in x's type."""
    *start, nx = dimensions(x)
    nf = layer.w.shape[-1]
    y = tf.matmul(tf.reshape(x, [-1, nx]), in_type_of(x, layer.w)) + in_type_of(x, layer.b)
    return tf.reshape(y, [*start, nf])


def split_heads(x: tf.Tensor, n_head: int) -> tf.Tensor:
    """[batch, time, embd] -> [batch, head, time, embd / n_head]."""
    batch, time, width = dimensions(x)
    return tf.transpose(tf.reshape(x, [batch, time, n_head, width // n_head]), [0, 2, 1, 3])


def merge_heads(x: tf.Tensor) -> tf.Tensor:
    """[batch, head, time, head width] -> [batch, time, embd]."""
    batch, heads, time, width = dimensions(x)
    return tf.reshape(tf.transpose(x, [0, 2, 1, 3]), [batch, time, heads * width])


def causal_mask(queries: Any, keys: Any) -> tf.Tensor:
    """Float32 [queries, keys] of 0 where a query may look, MASKED_SCORE where not.

    The last query sees the last key, the one before it all but that one, and so on.
    """
    query = tf.range(queries)[:, tf.newaxis] + (keys - queries)
    hidden = tf.range(keys)[tf.newaxis, :] > query
    return tf.cast(hidden, tf.float32) * MASKED_SCORE


Mask = Callable[[Any, Any], tf.Tensor]


def attend(
    q: tf.Tensor, k: tf.Tensor, v: tf.Tensor, mask: Mask, drop: Callable[..., Any] | None = None
) -> tf.Tensor:
    """Causal attention: q [batch, head, queries, width], k and v [batch, head, keys, width].

    Args:
        q: queries, already scaled by 1 / sqrt(width).
        k: keys.
        v: values.
        mask: (queries, keys) -> what is added to the scores.
        drop: dropout of the attention weights, if any.

    Returns:
        [batch, head, queries, width]
    """
    queries, keys = q.shape[2], k.shape[2]
    if queries is None or queries != keys or queries <= QUERY_CHUNK:
        return attend_rows(q, k, v, mask(dimensions(q)[2], dimensions(k)[2]), drop)
    # Split and concat: the gradient of a slice would fill a whole tensor with zeros first.
    sizes = [min(QUERY_CHUNK, queries - start) for start in range(0, queries, QUERY_CHUNK)]
    q_parts, k_parts, v_parts = (tf.split(x, sizes, axis=2) for x in (q, k, v))
    rows = []
    for i, q_part in enumerate(q_parts):
        seen_k, seen_v = (tf.concat(x[: i + 1], axis=2) for x in (k_parts, v_parts))
        part = mask(sizes[i], sum(sizes[: i + 1]))
        rows.append(attend_rows(q_part, seen_k, seen_v, part, drop))
    return tf.concat(rows, axis=2)


def attend_rows(
    q: tf.Tensor,
    k: tf.Tensor,
    v: tf.Tensor,
    mask: tf.Tensor,
    drop: Callable[..., Any] | None = None,
) -> tf.Tensor:
    """softmax(q k^T + mask) v, the softmax in float32; stores it in q's type for its gradient."""
    scores = tf.cast(tf.matmul(q, k, transpose_b=True), mask.dtype) + mask
    weights = tf.cast(tf.nn.softmax(scores), q.dtype)  # [batch, head, query, key]
    if drop is not None:
        return tf.matmul(drop(weights), v)
    out = tf.matmul(weights, v)
    return with_gradient("Gpt2SimpleAttention", out, q, k, v, weights)


@tf.RegisterGradient("Gpt2SimpleAttention")
def _attention_gradient(op: tf.Operation, dy: tf.Tensor, *_: Any) -> list[Any]:
    """Sums dy * out over the width, not dweights * weights over the keys: the same, but small.

    As in Dao et al. 2022 (FlashAttention), appendix B.2.
    """
    out, q, k, v, weights = op.inputs
    dv = tf.matmul(weights, dy, transpose_a=True)
    row_sums = tf.reduce_sum(dy * out, axis=-1, keepdims=True)
    dscores = weights * (tf.matmul(dy, v, transpose_b=True) - row_sums)
    dq = tf.matmul(dscores, k)
    dk = tf.matmul(dscores, q, transpose_a=True)
    return [None, dq, dk, dv, None]


def transformer_block(
    x: tf.Tensor,
    block: Block,
    n_head: int,
    past: Any,
    mask: Mask,
    drop: Callable[[tf.Tensor], tf.Tensor] | None = None,
) -> tuple[tf.Tensor, tf.Tensor]:
    """One block.

    Args:
        x: [batch, time, embd].
        block: its parameters, as tensors.
        n_head: attention heads.
        past: keys and values of earlier positions [batch, 2, head, past time, width], or None.
        mask: (queries, keys) -> what is added to the scores.
        drop: dropout of attention weights and of what is added to x, if any.

    Returns:
        The block's output [batch, time, embd] and this call's own keys and values
        [batch, 2, head, time, width].
    """
    qkv = affine(layer_norm(x, block.ln_1), block.c_attn)  # [batch, time, 3 * embd]
    q, k, v = (split_heads(part, n_head) for part in tf.split(qkv, 3, axis=2))
    present = tf.stack([k, v], axis=1)
    if past is not None:
        past_k, past_v = tf.unstack(past, num=2, axis=1)
        k, v = tf.concat([past_k, k], axis=2), tf.concat([past_v, v], axis=2)
    attended = attend(q * (1.0 / math.sqrt(q.shape[-1])), k, v, mask, drop)
    added = affine(merge_heads(attended), block.c_proj)
    x = x + (drop(added) if drop else added)
    hidden = gelu(affine(layer_norm(x, block.ln_2), block.mlp_c_fc))  # [batch, time, 4 * embd]
    added = affine(hidden, block.mlp_c_proj)
    return x + (drop(added) if drop else added), present


class Hidden(NamedTuple):
    """What the blocks leave behind.

    Attributes:
        h: after the last layer norm, [batch, time, embd].
        presents: one a block, [batch, 2, head, time, width].
    """

    h: tf.Tensor
    presents: list[tf.Tensor]


def hidden_states(
    weights: Weights,
    hparams: HParams,
    X: tf.Tensor,
    past: Any = None,
    gpus: Sequence[str] = (),
    dtype: tf.DType = tf.float32,
    dropout: Dropout | None = None,
) -> Hidden:
    """Embeds the tokens and runs the blocks.

    Args:
        weights: tensors, from `read`.
        hparams: sizes.
        X: int32 token ids [batch, time]; either may be unknown.
        past: [batch, n_layer, 2, head, past time, width] of earlier positions, or None.
        gpus: as in `variables`.
        dtype: of the activations and of the matmuls.
        dropout: of embeddings, attention and residuals, for training.

    Returns:
        Hidden; each block's output is also added to the graph collection 'checkpoints'.
    """
    time = dimensions(X)[1]
    past_length = 0 if past is None else dimensions(past)[4]
    pasts = [None] * hparams.n_layer if past is None else tf.unstack(past, hparams.n_layer, axis=1)
    masks: dict[tuple[str, str], tf.Tensor] = {}
    places = itertools.count()

    def mask(queries: Any, keys: Any) -> tf.Tensor:
        key = (str(queries), str(keys)) if isinstance(queries, int) else ("", "")
        if key not in masks:
            masks[key] = causal_mask(queries, keys)
        return masks[key]

    drop = None if dropout is None else (lambda x: dropout(x, next(places)))
    x = tf.gather(weights.wte, X) + weights.wpe[past_length : past_length + time]
    x = tf.cast(x, dtype)
    x = drop(x) if drop else x
    presents = []
    for layer, block in enumerate(weights.blocks):
        device = block_device(layer, hparams.n_layer, gpus)
        with tf.device(device), tf.compat.v1.name_scope(f"h{layer}"):
            x, present = transformer_block(x, block, hparams.n_head, pasts[layer], mask, drop)
        tf.compat.v1.add_to_collection(CHECKPOINTS, x)
        presents.append(present)
    return Hidden(layer_norm(x, weights.ln_f), presents)


def project(weights: Weights, h: tf.Tensor) -> tf.Tensor:
    """Hidden states [..., embd] -> logits [..., n_vocab], by the token embedding."""
    *start, width = dimensions(h)
    logits = tf.matmul(tf.reshape(h, [-1, width]), weights.wte, transpose_b=True)
    return tf.reshape(logits, [*start, weights.wte.shape[0]])


def model(
    hparams: HParams,
    X: tf.Tensor,
    past: Any = None,
    scope: str = "model",
    gpus: Sequence[str] = (),
    reuse: Any = False,
) -> dict[str, tf.Tensor]:
    """GPT-2 as OpenAI's code calls it.

    Args:
        hparams: sizes.
        X: int32 token ids [batch, time]; either may be unknown.
        past: keys and values of earlier positions
            [batch, n_layer, 2, n_head, past time, n_embd / n_head], or None.
        scope: prefix of the variables' names.
        gpus: devices over which the blocks are spread.
        reuse: as in tf.compat.v1.variable_scope.

    Returns:
        {'logits': [batch, time, n_vocab], 'present': the keys and values of X's positions, shaped
        as `past`}.

    Raises:
        ValueError: hparams that no GPT-2 can have.
    """
    weights = read(variables(hparams, scope, gpus, reuse))
    with tf.compat.v1.name_scope(scope):
        hidden = hidden_states(weights, hparams, X, past, gpus)
        logits = project(weights, hidden.h)
        return {"logits": logits, "present": tf.stack(hidden.presents, axis=1)}


def past_shape(
    *, hparams: HParams, batch_size: int | None = None, sequence: int | None = None
) -> list[int | None]:
    """The shape of `past` and 'present'."""
    width = hparams.n_embd // hparams.n_head
    return [batch_size, hparams.n_layer, 2, hparams.n_head, sequence, width]
