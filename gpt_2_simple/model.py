"""Hyper-parameters and int32 token ids [batch, time] in, GPT-2's float32 logits out.

The network of Radford et al. 2019, "Language Models are Unsupervised Multitask Learners": pre-norm
transformer blocks, learned positions, an output projection tied to the token embedding. Names and
shapes of the variables are those of OpenAI's published checkpoints.
"""

from __future__ import annotations

import functools
import itertools
import math
import secrets
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import tensorflow as tf

from .common.hparams import HParams
from .common.hparams import default_hparams as default_hparams  # public here, as in OpenAI's code
from .common.interrupts import delayed_interrupt

# If the sequence length is static, attention is computed for this many queries at a time, and only
# over the keys that they may see. That computes and stores about half of the scores.
QUERY_CHUNK = 256

# Added to the score of a key that a query must not see: exp() of the sum is 0.
MASKED_SCORE = -30000.0

LAYER_NORM_EPSILON = 1e-5

CHECKPOINTS = "checkpoints"


class Linear(NamedTuple):
    """A linear layer's matrix w [nx, nf] (the variable is [1, nx, nf]) and bias b [nf]."""

    w: Any
    b: Any


class LowRank(NamedTuple):
    """What LoRA adds to a linear layer: dropout(x) a^T b^T * scale; a is [r, nx], b [nf, r]."""

    a: Any
    b: Any
    scale: float
    dropout: Dropout | None = None


class FrozenLinear(NamedTuple):
    """A linear layer as `Linear`, whose w and b are not trained; `update` is, if there is one."""

    w: Any
    b: Any
    update: LowRank | None = None


# x [rows, nx] -> x times a matrix [rows, nf]; keep_layout=True may keep a copy for later runs.
Multiply = Callable[..., tf.Tensor]


class QuantizedLinear(NamedTuple):
    """A linear layer as `Linear`, with the product by its matrix in the matrix's place."""

    multiply: Multiply
    b: Any


class LayerNorm(NamedTuple):
    """A layer norm's gain g and bias b, each [n_embd]."""

    g: Any
    b: Any


class Block(NamedTuple):
    """One transformer block's parameters."""

    ln_1: LayerNorm
    c_attn: Linear | FrozenLinear | QuantizedLinear
    c_proj: Linear | FrozenLinear | QuantizedLinear
    ln_2: LayerNorm
    mlp_c_fc: Linear | FrozenLinear | QuantizedLinear
    mlp_c_proj: Linear | FrozenLinear | QuantizedLinear

    @property
    def linear_layers(self) -> list[Any]:
        """Its linear layers, in the order of their use."""
        return [self.c_attn, self.c_proj, self.mlp_c_fc, self.mlp_c_proj]


class Weights(NamedTuple):
    """All parameters, as variables (`variables`) or as tensors read from them (`read`)."""

    wte: Any
    wpe: Any
    blocks: tuple[Block, ...]
    ln_f: LayerNorm
    unembedding: Multiply | None = None  # the product by wte's transpose, if not float's


def variables(
    hparams: HParams,
    scope: str = "model",
    gpus: Sequence[str] = (),
    reuse: Any = False,
    dtype: tf.DType | None = tf.float32,
) -> Weights:
    """Makes (or, with reuse=True or tf.compat.v1.AUTO_REUSE, finds) the model's variables.

    Args:
        hparams: sizes; n_vocab must be set.
        scope: prefix of the variables' names.
        gpus: devices over which the blocks are spread; empty leaves placement to TensorFlow.
        reuse: as in tf.compat.v1.variable_scope.
        dtype: of the blocks' matrices, which are nearly all of a large model; the other variables
            are float32. Without one (None) there are no matrices.

    Returns:
        Weights of resource variables in the default graph.

    Raises:
        ValueError: hparams that no GPT-2 can have.
    """
    hparams.check_complete()
    width = hparams.n_embd
    with tf.compat.v1.variable_scope(scope, reuse=reuse):
        wpe = _variable("wpe", [hparams.n_ctx, width], _normal(0.01))
        wte = _variable("wte", [hparams.n_vocab, width], _normal(0.02))
        blocks = []
        for layer in range(hparams.n_layer):
            with (
                tf.device(block_device(layer, hparams.n_layer, gpus)),
                tf.compat.v1.variable_scope(f"h{layer}"),
            ):
                blocks.append(_block_variables(width, dtype))
        return Weights(wte, wpe, tuple(blocks), _layer_norm_variables("ln_f", width))


def _variable(
    name: str,
    shape: list[int],
    initializer: tf.compat.v1.Initializer,
    dtype: tf.DType = tf.float32,
) -> tf.Variable:
    return get_variable(name, shape, dtype, initializer, use_resource=True)


def get_variable(*args: Any, **kwargs: Any) -> tf.Variable:
    """tf.compat.v1.get_variable, whole or not at all: Ctrl-C takes effect after it.

    Else the graph could keep operations of a variable that nobody knows, and the next call, which
    makes it once more, would give it another name.
    """
    with delayed_interrupt():
        return tf.compat.v1.get_variable(*args, **kwargs)


def _normal(stddev: float) -> tf.compat.v1.Initializer:
    # tf.config.experimental.enable_op_determinism() refuses random operations without a seed, even
    # those that nobody runs. A seed drawn anew changes nothing else.
    has_seed = tf.compat.v1.get_default_graph().seed is not None
    seed = None if has_seed else secrets.randbits(31)
    return tf.compat.v1.random_normal_initializer(stddev=stddev, seed=seed)


def _block_variables(width: int, dtype: tf.DType | None) -> Block:
    ln_1 = _layer_norm_variables("ln_1", width)
    with tf.compat.v1.variable_scope("attn"):
        c_attn = _linear_variables("c_attn", width, 3 * width, dtype)
        c_proj = _linear_variables("c_proj", width, width, dtype)
    ln_2 = _layer_norm_variables("ln_2", width)
    with tf.compat.v1.variable_scope("mlp"):
        mlp_c_fc = _linear_variables("c_fc", width, 4 * width, dtype)
        mlp_c_proj = _linear_variables("c_proj", 4 * width, width, dtype)
    return Block(ln_1, c_attn, c_proj, ln_2, mlp_c_fc, mlp_c_proj)


def _linear_variables(name: str, nx: int, nf: int, dtype: tf.DType | None) -> Linear:
    with tf.compat.v1.variable_scope(name):
        w = None if dtype is None else _variable("w", [1, nx, nf], _normal(0.02), dtype)
        return Linear(w, _variable("b", [nf], tf.compat.v1.zeros_initializer()))


def _layer_norm_variables(name: str, width: int) -> LayerNorm:
    with tf.compat.v1.variable_scope(name):
        g = _variable("g", [width], tf.compat.v1.ones_initializer())
        return LayerNorm(g, _variable("b", [width], tf.compat.v1.zeros_initializer()))


def block_device(layer: int, n_layer: int, gpus: Sequence[str]) -> str | None:
    """The device of a block when all are spread evenly over `gpus`; None if `gpus` is empty."""
    return gpus[layer * len(gpus) // n_layer] if gpus else None


def read(weights: Weights) -> Weights:
    """Reads every variable once, as a tensor; matrices lose their leading axis of 1."""

    def tensor(variable: Any) -> tf.Tensor:
        value = variable.read_value()
        return value if variable.shape.rank == 1 else tf.reshape(value, variable.shape[-2:])

    def layer(variables_of_layer: Any) -> Any:
        values = (v if v is None else tensor(v) for v in variables_of_layer)
        return type(variables_of_layer)(*values)

    return Weights(
        wte=tensor(weights.wte),
        wpe=tensor(weights.wpe),
        blocks=tuple(Block(*map(layer, block)) for block in weights.blocks),
        ln_f=layer(weights.ln_f),
    )


def flatten(weights: Weights) -> list[Any]:
    """Lists the parameters: wte, wpe, those of the blocks from the first to the last, ln_f's."""
    return [weights.wte, weights.wpe, *flatten_blocks(weights.blocks), *weights.ln_f]


def flatten_blocks(blocks: Sequence[Block]) -> list[Any]:
    """Lists the parameters of `blocks` that there are."""
    parameters = [parameter for block in blocks for layer in block for parameter in layer]
    return [parameter for parameter in parameters if parameter is not None]


def dimensions(x: tf.Tensor) -> list[Any]:
    """The shape of x as a list: an int for each known size, a scalar tensor for each other."""
    dynamic = tf.shape(x)
    return [dynamic[i] if size is None else size for i, size in enumerate(x.shape.as_list())]


class Dropout:
    """Dropout (Srivastava et al. 2014) that a recomputation repeats exactly.

    One instance serves one forward pass: each call has a mask of its own.
    """

    def __init__(self, rate: float, seed: tf.Tensor, first_call: int = 0):
        """Draws masks from a seed.

        Args:
            rate: the share of elements set to 0, above 0 and below 1.
            seed: int32 [2]; the number of the call is added to its first element.
            first_call: the number of the first call; two instances of one seed need others.
        """
        self.rate, self.seed = rate, seed
        self._call_numbers = itertools.count(first_call)

    def __call__(self, x: tf.Tensor) -> tf.Tensor:
        """Sets elements of x to 0, and scales the others by 1 / (1 - rate)."""
        seed = self.seed + tf.constant([next(self._call_numbers), 0])
        # As tf.nn.experimental.stateless_dropout, but that draws in x's type: bfloat16 has only 128
        # numbers between 0.5 and 1, and a rate of 0.01 becomes 0.015.
        is_kept = tf.random.stateless_uniform(tf.shape(x), seed) >= self.rate
        return tf.where(is_kept, x * (1 / (1 - self.rate)), tf.zeros([], x.dtype))


def cast_like(x: tf.Tensor, weight: tf.Tensor) -> tf.Tensor:
    """Casts `weight` to x's type.

    The cast waits for x. Without that, all weights would be cast at once when a step begins.
    """
    if weight.dtype == x.dtype:
        return weight
    with tf.control_dependencies([x]):
        return tf.cast(weight, x.dtype)


def layer_norm(x: tf.Tensor, parameters: LayerNorm) -> tf.Tensor:
    """Layer normalisation (Ba et al. 2016) over the last axis, computed in float32."""
    g, b = parameters
    x32 = tf.cast(x, g.dtype)
    centred = x32 - tf.reduce_mean(x32, axis=-1, keepdims=True)
    variance = tf.reduce_mean(tf.square(centred), axis=-1, keepdims=True)
    return tf.cast(centred * tf.math.rsqrt(variance + LAYER_NORM_EPSILON) * g + b, x.dtype)


# The tanh form of GELU is 0.5 x (1 + tanh(GELU_SCALE (x + GELU_CUBIC x^3))).
GELU_SCALE = math.sqrt(2.0 / math.pi)
GELU_CUBIC = 0.044715


def gelu(x: tf.Tensor) -> tf.Tensor:
    """The tanh form of GELU (Hendrycks & Gimpel 2016); stores only x for its gradient."""
    # 0.5 * (1 + tanh(u)) is sigmoid(2u), which passes over memory once less.
    return with_gradient("Gpt2SimpleGelu", x * tf.sigmoid(_twice_tanh_argument(x)), x)


def _twice_tanh_argument(x: tf.Tensor) -> tf.Tensor:
    scale = 2.0 * GELU_SCALE
    return x * (scale + GELU_CUBIC * scale * tf.square(x))


@tf.RegisterGradient("Gpt2SimpleGelu")
def _gelu_gradient(op: tf.Operation, dy: tf.Tensor, *_: Any) -> list[Any]:
    """d/dx (x sigmoid(z)) = sigmoid(z) (1 + x dz/dx (1 - sigmoid(z)))."""
    x = op.inputs[1]
    if x.dtype == tf.float16:
        # x^3 overflows, and infinity * (1 - gate) is not a number. Here the gate is 0 or 1.
        x = tf.clip_by_value(x, -10, 10)
    gate = tf.sigmoid(_twice_tanh_argument(x))
    scale = 2.0 * GELU_SCALE
    x_dz_dx = x * (scale + 3 * GELU_CUBIC * scale * tf.square(x))
    return [None, dy * gate * (1.0 + x_dz_dx * (1.0 - gate))]


def with_gradient(name: str, value: tf.Tensor, *stored: tf.Tensor) -> tf.Tensor:
    """Returns `value`, whose gradient the function registered as `name` computes from `stored`.

    The gradient function takes `stored` from the operation's inputs. That of tf.custom_gradient
    holds them by a closure instead: a copy of the operation (see memory_saving_gradients) would
    use the original's tensors.
    """
    graph = tf.compat.v1.get_default_graph()
    with graph.gradient_override_map({"IdentityN": name}):
        return tf.identity_n([value, *stored])[0]


def linear(x: tf.Tensor, layer: Linear | FrozenLinear | QuantizedLinear) -> tf.Tensor:
    """Projects x [..., nx] to x @ w + b [..., nf], in x's type."""
    *start, nx = dimensions(x)
    nf = layer.b.shape.as_list()[-1]
    rows = tf.reshape(x, [-1, nx])
    if isinstance(layer, QuantizedLinear):
        return tf.reshape(layer.multiply(rows) + cast_like(x, layer.b), [*start, nf])
    product = tf.matmul(rows, cast_like(x, layer.w))
    if isinstance(layer, FrozenLinear):
        product = with_gradient("Gpt2SimpleFrozenProduct", product, rows, layer.w)
    y = product + cast_like(x, layer.b)
    if isinstance(layer, FrozenLinear) and layer.update is not None:
        y += low_rank(rows, layer.update)
    return tf.reshape(y, [*start, nf])


@tf.RegisterGradient("Gpt2SimpleFrozenProduct")
def _frozen_product_gradient(op: tf.Operation, dy: tf.Tensor, *_: Any) -> list[Any]:
    """By x alone. w is cast again: its first cast is not kept from the forward pass until here."""
    w = op.inputs[2]
    return [None, tf.matmul(dy, cast_like(dy, w), transpose_b=True), None]


def low_rank(x: tf.Tensor, update: LowRank) -> tf.Tensor:
    """What LoRA adds to a linear layer's output for x [rows, nx]: [rows, nf], in x's type."""
    x = update.dropout(x) if update.dropout else x
    inner = tf.matmul(x, cast_like(x, update.a), transpose_b=True) * update.scale  # [rows, r]
    return tf.matmul(inner, cast_like(inner, update.b), transpose_b=True)


def split_heads(x: tf.Tensor, n_head: int) -> tf.Tensor:
    """[batch, time, embd] -> [batch, head, time, embd / n_head]."""
    batch, time, width = dimensions(x)
    return tf.transpose(tf.reshape(x, [batch, time, n_head, width // n_head]), [0, 2, 1, 3])


def merge_heads(x: tf.Tensor) -> tf.Tensor:
    """[batch, head, time, head width] -> [batch, time, embd]."""
    batch, heads, time, width = dimensions(x)
    return tf.reshape(tf.transpose(x, [0, 2, 1, 3]), [batch, time, heads * width])


def causal_mask(n_queries: Any, n_keys: Any) -> tf.Tensor:
    """Float32 [n_queries, n_keys]: 0 where a query sees a key, MASKED_SCORE where it does not.

    The last query sees all keys, the one before it all but the last key, and so on.
    """
    last_seen = tf.range(n_queries)[:, tf.newaxis] + (n_keys - n_queries)
    hidden = tf.range(n_keys)[tf.newaxis, :] > last_seen
    return tf.cast(hidden, tf.float32) * MASKED_SCORE


# (n_queries, n_keys) -> what is added to the scores [n_queries, n_keys].
MakeMask = Callable[[Any, Any], tf.Tensor]


def causal_attention(
    q: tf.Tensor, k: tf.Tensor, v: tf.Tensor, make_mask: MakeMask, dropout: Dropout | None = None
) -> tf.Tensor:
    """Attention in which no query sees a later key.

    Args:
        q: queries [batch, head, queries, width], already scaled by 1 / sqrt(width).
        k: keys [batch, head, keys, width].
        v: values, shaped as the keys.
        make_mask: gives the mask of some queries and keys.
        dropout: of the attention weights.

    Returns:
        [batch, head, queries, width]
    """
    n_queries, n_keys = q.shape.as_list()[2], k.shape.as_list()[2]
    if n_queries is None or n_queries != n_keys or n_queries <= QUERY_CHUNK:
        mask = make_mask(dimensions(q)[2], dimensions(k)[2])
        return attention(q, k, v, mask, dropout)
    # Split and concat: the gradient of a slice would fill a whole tensor with zeros first.
    sizes = [min(QUERY_CHUNK, n_queries - start) for start in range(0, n_queries, QUERY_CHUNK)]
    q_chunks, k_chunks, v_chunks = (tf.split(x, sizes, axis=2) for x in (q, k, v))
    outputs = []
    for i, q_chunk in enumerate(q_chunks):
        seen_k, seen_v = (tf.concat(x[: i + 1], axis=2) for x in (k_chunks, v_chunks))
        mask = make_mask(sizes[i], sum(sizes[: i + 1]))
        outputs.append(attention(q_chunk, seen_k, seen_v, mask, dropout))
    return tf.concat(outputs, axis=2)


def attention(
    q: tf.Tensor,
    k: tf.Tensor,
    v: tf.Tensor,
    mask: tf.Tensor,
    dropout: Dropout | None = None,
) -> tf.Tensor:
    """Computes softmax(q k^T + mask) v.

    The softmax is computed in float32, and stored in q's type for the gradient.
    """
    scores = tf.cast(tf.matmul(q, k, transpose_b=True), mask.dtype) + mask
    weights = tf.cast(tf.nn.softmax(scores), q.dtype)  # [batch, head, query, key]
    if dropout is not None:
        return tf.matmul(dropout(weights), v)
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
    make_mask: MakeMask,
    dropout: Dropout | None = None,
) -> tuple[tf.Tensor, tf.Tensor]:
    """One block: attention, then a two-layer perceptron, each added to x.

    Args:
        x: [batch, time, embd].
        block: its parameters, as tensors.
        n_head: attention heads.
        past: keys and values of earlier positions [batch, 2, head, past time, width], or None.
        make_mask: gives the attention's mask.
        dropout: of the attention weights and of what is added to x.

    Returns:
        The block's output [batch, time, embd], and the keys and values of x's positions
        [batch, 2, head, time, width].
    """
    qkv = linear(layer_norm(x, block.ln_1), block.c_attn)  # [batch, time, 3 * embd]
    q, k, v = (split_heads(part, n_head) for part in tf.split(qkv, 3, axis=2))
    present = tf.stack([k, v], axis=1)
    if past is not None:
        past_k, past_v = tf.unstack(past, num=2, axis=1)
        k, v = tf.concat([past_k, k], axis=2), tf.concat([past_v, v], axis=2)
    width = q.shape.as_list()[-1]
    attended = causal_attention(q * (1.0 / math.sqrt(width)), k, v, make_mask, dropout)
    added = linear(merge_heads(attended), block.c_proj)
    x = x + (dropout(added) if dropout else added)
    hidden = gelu(linear(layer_norm(x, block.ln_2), block.mlp_c_fc))  # [batch, time, 4 * embd]
    added = linear(hidden, block.mlp_c_proj)
    return x + (dropout(added) if dropout else added), present


class HiddenStates(NamedTuple):
    """The result of the blocks.

    Attributes:
        h: after the last layer norm, [batch, time, embd].
        presents: each block's keys and values, [batch, 2, head, time, width].
        outputs: each block's output, [batch, time, embd].
    """

    h: tf.Tensor
    presents: list[tf.Tensor]
    outputs: list[tf.Tensor]


def hidden_states(
    weights: Weights,
    hparams: HParams,
    X: tf.Tensor,
    past: Any = None,
    gpus: Sequence[str] = (),
    dtype: tf.DType = tf.float32,
    dropout: Dropout | None = None,
) -> HiddenStates:
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
        HiddenStates.
    """
    time = dimensions(X)[1]
    past_length = 0 if past is None else dimensions(past)[4]
    pasts = [None] * hparams.n_layer if past is None else tf.unstack(past, hparams.n_layer, axis=1)
    make_mask = _each_mask_once()
    x = tf.gather(weights.wte, X) + weights.wpe[past_length : past_length + time]
    x = tf.cast(x, dtype)  # [batch, time, embd]
    x = dropout(x) if dropout else x
    presents, outputs = [], []
    for layer, block in enumerate(weights.blocks):
        device = block_device(layer, hparams.n_layer, gpus)
        with tf.device(device), tf.compat.v1.name_scope(f"h{layer}"):
            x, present = transformer_block(
                x, block, hparams.n_head, pasts[layer], make_mask, dropout
            )
        presents.append(present)
        outputs.append(x)
    return HiddenStates(layer_norm(x, weights.ln_f), presents, outputs)


def _each_mask_once() -> MakeMask:
    """Returns causal_mask for one forward pass: each mask is made once, for all blocks.

    If the number of queries is not static, there is only one mask, since causal_attention makes no
    chunks then.
    """
    masks: dict[tuple[str, str] | None, tf.Tensor] = {}

    def make_mask(n_queries: Any, n_keys: Any) -> tf.Tensor:
        key = (str(n_queries), str(n_keys)) if isinstance(n_queries, int) else None
        if key not in masks:
            masks[key] = causal_mask(n_queries, n_keys)
        return masks[key]

    return make_mask


def unembed(weights: Weights, h: tf.Tensor) -> tf.Tensor:
    """Hidden states [..., embd] -> logits [..., n_vocab], by the token embedding."""
    *start, width = dimensions(h)
    rows = tf.reshape(h, [-1, width])
    by_float = functools.partial(tf.matmul, b=weights.wte, transpose_b=True)
    logits = (weights.unembedding or by_float)(rows)
    return tf.reshape(logits, [*start, weights.wte.shape.as_list()[0]])


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
        as `past`}. Each block's output is added to the graph collection 'checkpoints', where
        memory_saving_gradients.gradients() finds it.

    Raises:
        ValueError: hparams that no GPT-2 can have.
    """
    weights = read(variables(hparams, scope, gpus, reuse))
    with tf.compat.v1.name_scope(scope):
        hidden = hidden_states(weights, hparams, X, past, gpus)
        tf.compat.v1.get_default_graph().get_collection_ref(CHECKPOINTS).extend(hidden.outputs)
        logits = unembed(weights, hidden.h)
        return {"logits": logits, "present": tf.stack(hidden.presents, axis=1)}


def past_shape(
    *, hparams: HParams, batch_size: int | None = None, sequence: int | None = None
) -> list[int | None]:
    """The shape of `past` and 'present'."""
    width = hparams.n_embd // hparams.n_head
    return [batch_size, hparams.n_layer, 2, hparams.n_head, sequence, width]
