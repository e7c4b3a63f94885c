"""Tokens and a cache in, new tokens out: the graph's prefill, decode loop, checks, beam step."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import tensorflow as tf

from .. import model
from .kv_cache import fetched, head_width, placeholder, store_cache, take_cache
from .operations import MANY_ROWS, Operations, Project
from .sampling import (
    BROKEN,
    HEALTHY,
    SamplingPlaceholders,
    TextTokens,
    next_token,
    process_logits,
)


class Likeliest(NamedTuple):
    """Log-probabilities of tokens that came, and of the likeliest in their places."""

    log_probabilities: Any  # of the tokens that came [rows, time]
    top_log_probabilities: Any  # of the likeliest, the best first [rows, time, n]
    top_tokens: Any  # the likeliest [rows, time, n]


@dataclasses.dataclass
class Prefill:
    """Writes the keys and values of given tokens to rows of a cache."""

    cache_key: Any = placeholder(tf.int64)
    first_row: Any = placeholder(tf.int32)  # the cache's row that gets the first row of tokens
    first_column: Any = placeholder(tf.int32)  # the column that the first of the tokens gets
    tokens: Any = placeholder(tf.int32, None, None)  # [rows, time]
    next_tokens: Any = placeholder(tf.int32, None, None)  # the token after each [rows, time]
    n_likeliest: Any = placeholder(tf.int32)
    run: Any = fetched()
    likeliest: Any = fetched()  # Likeliest, for `next_tokens`; costs nothing unless fetched


@dataclasses.dataclass
class StepInputs:
    """What is fed to make new tokens.

    `text_tokens` [rows, time] are the texts, padded with -1 on the left; without columns if the
    penalties are off.
    """

    cache_key: Any = placeholder(tf.int64)
    last_tokens: Any = placeholder(tf.int32, None)  # each text's last [rows], not in the cache yet
    columns: Any = placeholder(tf.int32, None)  # the columns that these tokens get [rows]
    text_tokens: Any = placeholder(tf.int32, None, None)
    n_generated: Any = placeholder(tf.int32, None)  # new tokens that each text has [rows]
    sampling: SamplingPlaceholders = dataclasses.field(default_factory=SamplingPlaceholders)


@dataclasses.dataclass
class Decode(StepInputs):
    """Generates some tokens for each text, one after the other.

    The texts are in the cache's first rows; it may have more. `text_tokens` have a further -1 on
    the right for each step.
    """

    uniform: Any = placeholder(tf.float64, None, None)  # numbers in [0, 1) [steps, rows]
    ended: Any = placeholder(tf.bool, None)  # rows that need no more tokens [rows]
    n_likeliest: Any = placeholder(tf.int32)  # -1 for none
    tokens: Any = fetched()  # [rows, steps], -1 after a row's end; fewer steps if all rows end
    status: Any = fetched()  # [rows]; see sampling.check_status; a fault ends its row
    likeliest: Any = fetched()  # Likeliest, before penalties
    run: Any = fetched()  # keeps the cache in the session


@dataclasses.dataclass
class Verify(StepInputs):
    """Chooses the tokens after proposed ones, all in one pass: proposals + 1 a text.

    They are those of plain decoding up to the first that its proposal differs from, and that one.
    `text_tokens` have as many further -1 on the left as there are proposals; the settings of
    sampling stand for each place of a text, row after row.
    """

    proposals: Any = placeholder(tf.int32, None, None)  # [rows, proposals]
    uniform: Any = placeholder(tf.float64, None, None)  # numbers in [0, 1) [rows, proposals + 1]
    tokens: Any = fetched()  # [rows, proposals + 1]
    status: Any = fetched()  # [rows, proposals + 1]; see sampling.check_status
    run: Any = fetched()  # keeps the cache in the session


@dataclasses.dataclass
class BeamStep(StepInputs):
    """Finds the likeliest next tokens of each text."""

    parents: Any = placeholder(tf.int32, None)  # the cache's row that a text continues from [rows]
    count: Any = placeholder(tf.int32)  # how many next tokens to find
    tokens: Any = fetched()  # [rows, count], the likeliest first
    log_probabilities: Any = fetched()  # [rows, count]
    status: Any = fetched()  # [rows]; see sampling.check_status
    run: Any = fetched()  # keeps the cache in the session


def build_prefill(weights: model.Weights, hparams: model.HParams) -> Prefill:
    """Adds the operations of Prefill to the graph."""
    ops = Prefill()
    cache = take_cache(ops.cache_key, hparams)
    n_rows, n_tokens = tf.unstack(tf.shape(ops.tokens))
    forward = _CachedForward(
        weights, hparams, cache, ops.first_row, n_rows, n_tokens, MANY_ROWS, ops.first_column
    )
    columns = tf.broadcast_to(ops.first_column + tf.range(n_tokens), [n_rows, n_tokens])
    logits, flat = forward(forward.flat(cache), ops.tokens, columns)
    found = _likeliest(logits, tf.reshape(ops.next_tokens, [-1]), ops.n_likeliest)
    ops.likeliest = Likeliest(
        *(tf.reshape(x, tf.concat([[n_rows, n_tokens], tf.shape(x)[1:]], 0)) for x in found)
    )
    ops.run = store_cache(ops.cache_key, forward.unflat(flat))
    return ops


def build_decode(weights: model.Weights, hparams: model.HParams, operations: Operations) -> Decode:
    """Adds the operations of Decode, computed by `operations`, to the graph."""
    ops = Decode()
    if keeps_layouts(weights):
        operations = operations._replace(keeps_layout=True)
    n_steps = tf.shape(ops.uniform)[0]
    cache = take_cache(ops.cache_key, hparams)
    # Not the number 1 for one row: TensorFlow would order sums in another way then.
    n_rows = tf.size(ops.last_tokens)
    forward = _CachedForward(weights, hparams, cache, 0, n_rows, 1, operations)
    first_columns = ops.columns[:, tf.newaxis]
    # Each step writes its keys and values into these tensors' memory, so the loop need not pass
    # them on. A step begins when the one before has its tokens, which need all that it wrote.
    flat = forward.flat(cache)

    def body(
        step: Any, last: Any, text: Any, ended: Any, status: Any, out: Any, likely: Any
    ) -> Any:
        logits, _ = forward(flat, last[:, tf.newaxis], first_columns + step)
        text_length = tf.shape(text)[1] - n_steps + step
        so_far = TextTokens(text, text_length, ops.n_generated + step)
        token, fault = next_token(logits, ops.uniform[step], so_far, ops.sampling)
        is_faulty = tf.not_equal(fault, HEALTHY)
        is_here = tf.equal(tf.range(tf.shape(text)[1]), text_length)
        found = _likeliest_if_wanted(logits, token, ops.n_likeliest)
        return (
            step + 1,
            token,
            tf.where(is_here, token[:, tf.newaxis], text),
            ended | is_faulty | tf.equal(token, ops.sampling.stop_token),
            tf.where(ended, status, fault),
            out.write(step, tf.where(ended | is_faulty, -1, token)),
            [array.write(step, x) for array, x in zip(likely, found, strict=True)],
        )

    def has_more(step: Any, _last: Any, _text: Any, ended: Any, *_: Any) -> tf.Tensor:
        return (step < n_steps) & ~tf.reduce_all(ended)

    start = [
        tf.constant(0),
        ops.last_tokens,
        ops.text_tokens,
        ops.ended,
        tf.fill(tf.shape(ops.last_tokens), HEALTHY),
        tf.TensorArray(tf.int32, n_steps, element_shape=[None]),
        [
            tf.TensorArray(tf.float32, n_steps, element_shape=[None]),
            tf.TensorArray(tf.float32, n_steps, element_shape=[None, None]),
            tf.TensorArray(tf.int32, n_steps, element_shape=[None, None]),
        ],
    ]
    with _loops_of_single_operations():
        n_done, _, _, _, ops.status, out, likely = tf.while_loop(
            has_more, body, start, parallel_iterations=1
        )
    ops.tokens = tf.transpose(out.gather(tf.range(n_done)))
    found = [array.gather(tf.range(n_done)) for array in likely]  # [steps, rows, ...]
    ops.likeliest = Likeliest(tf.transpose(found[0]), *(_swapped(x) for x in found[1:]))
    with tf.control_dependencies([n_done]):
        ops.run = store_cache(ops.cache_key, forward.unflat(flat))
    return ops


def build_verify(weights: model.Weights, hparams: model.HParams, operations: Operations) -> Verify:
    """Adds the operations of Verify, computed by `operations`, to the graph."""
    ops = Verify()
    cache = take_cache(ops.cache_key, hparams)
    n_rows, n_proposals = tf.unstack(tf.shape(ops.proposals))
    places = tf.range(n_proposals + 1)
    forward = _CachedForward(weights, hparams, cache, 0, n_rows, n_proposals + 1, operations)
    tokens = tf.concat([ops.last_tokens[:, tf.newaxis], ops.proposals], axis=1)
    # Logits [rows * places, n_vocab].
    logits, flat = forward(forward.flat(cache), tokens, ops.columns[:, tf.newaxis] + places)
    text_length = tf.shape(ops.text_tokens)[1]
    texts = tf.gather(
        tf.concat([ops.text_tokens, ops.proposals], axis=1),
        places[:, tf.newaxis] + tf.range(text_length),
        axis=1,
    )  # [rows, places, time]: each place's text ends with the proposals before it
    n_generated = tf.reshape(ops.n_generated[:, tf.newaxis] + places, [-1])
    texts = tf.reshape(texts, tf.stack([tf.size(n_generated), text_length]))
    text = TextTokens(texts, text_length, n_generated)
    chosen, status = next_token(logits, tf.reshape(ops.uniform, [-1]), text, ops.sampling)
    ops.tokens, ops.status = (tf.reshape(x, tf.shape(tokens)) for x in (chosen, status))
    ops.run = store_cache(ops.cache_key, forward.unflat(flat))
    return ops


def _likeliest(logits: tf.Tensor, tokens: tf.Tensor, count: tf.Tensor) -> Likeliest:
    """For logits [rows, n_vocab] and the tokens [rows] that came; without the axis of time."""
    scores = tf.nn.log_softmax(logits)
    return Likeliest(tf.gather(scores, tokens, batch_dims=1), *tf.math.top_k(scores, count))


def _likeliest_if_wanted(logits: tf.Tensor, tokens: tf.Tensor, count: tf.Tensor) -> Likeliest:
    """As _likeliest; without columns and computed from nothing if count is below 0.

    A condition, and not another set of fetches: TensorFlow optimizes the graph for each set, which
    takes a second, and each has kernels, and with them copies of int8 weights, of its own.
    """

    def empty() -> Likeliest:
        none = tf.zeros([tf.size(tokens), 0])
        return Likeliest(tf.zeros(tf.shape(tokens)), none, tf.cast(none, tf.int32))

    return tf.cond(count < 0, empty, lambda: _likeliest(logits, tokens, count))


def _swapped(x: tf.Tensor) -> tf.Tensor:
    """[steps, rows, n] -> [rows, steps, n]."""
    return tf.transpose(x, [1, 0, 2])


def build_beam_step(
    weights: model.Weights, hparams: model.HParams, operations: Operations
) -> BeamStep:
    """Adds the operations of BeamStep, computed by `operations`, to the graph."""
    ops = BeamStep()
    cache = [tf.gather(part, ops.parents, axis=1) for part in take_cache(ops.cache_key, hparams)]
    n_rows = tf.size(ops.last_tokens)
    forward = _CachedForward(weights, hparams, cache, 0, n_rows, 1, operations)
    tokens, columns = ops.last_tokens[:, tf.newaxis], ops.columns[:, tf.newaxis]
    logits, flat = forward(forward.flat(cache), tokens, columns)
    text = TextTokens(ops.text_tokens, tf.shape(ops.text_tokens)[1], ops.n_generated)
    logits, is_broken = process_logits(logits, text, ops.sampling)
    ops.log_probabilities, ops.tokens = tf.math.top_k(tf.nn.log_softmax(logits), ops.count)
    ops.status = tf.where(is_broken, BROKEN, HEALTHY)
    ops.run = store_cache(ops.cache_key, forward.unflat(flat))
    return ops


@contextlib.contextmanager
def _loops_of_single_operations() -> Iterator[None]:
    """Within this block a while loop consists of single operations, not of functions.

    Functions pass every weight on from step to step, and take half a second longer to optimize. The
    switch is the process's: kv_cache.build_once builds one graph at a time.
    """
    is_functional = tf.compat.v1.control_flow_v2_enabled()
    tf.compat.v1.disable_control_flow_v2()
    try:
        yield
    finally:
        if is_functional:
            tf.compat.v1.enable_control_flow_v2()


def keeps_layouts(weights: model.Weights) -> bool:
    """Whether products that are run again and again do better with a copy of the weights."""
    return isinstance(weights.blocks[0].c_attn, model.QuantizedLinear)


# --- the model, with a cache ----------------------------------------------------------------------


class _CachedForward:
    """The model's forward pass for tokens that come after those in some rows of a cache.

    The rows follow each other. What is the same in each step of a loop is computed here, before
    the loop. Between steps the cache is flat: tensors [2 * rows * n_head * capacity, width].
    """

    def __init__(
        self,
        weights: model.Weights,
        hparams: model.HParams,
        cache: list[tf.Tensor],
        first_row: Any,  # of the cache
        n_rows: Any,
        n_tokens: Any,  # tokens a row; the number 1 saves transposes
        operations: Operations,
        first_column: Any = None,  # of the tokens, if it is the same in all rows
    ) -> None:
        self.weights, self.hparams, self.operations = weights, hparams, operations
        self.first_column = first_column
        self.cache_shape, self.n_rows, self.n_tokens = tf.shape(cache[0]), n_rows, n_tokens
        self.width, heads = head_width(hparams), hparams.n_head
        cache_rows, capacity = self.cache_shape[1], self.cache_shape[3]
        # Of the flat cache's rows: the first of the values, of the keys that are read, and of those
        # of each row and head [rows, n_head].
        first_value = cache_rows * heads * capacity
        first_read = first_row * heads * capacity
        row_numbers = first_row + tf.range(n_rows)
        first_keys = (row_numbers[:, tf.newaxis] * heads + tf.range(heads)) * capacity
        first_indices = tf.concat([first_keys, first_keys + first_value], axis=1)
        self.first_indices = first_indices[:, tf.newaxis]  # [rows, 1, 2 * heads]
        self.read_starts = [tf.stack([first_read + part, 0]) for part in (0, first_value)]
        self.read_size = tf.stack([n_rows * heads * capacity, self.width])
        self.keys_shape = tf.stack([n_rows * heads, capacity, self.width])
        self.written_shape = tf.stack([2 * n_rows * n_tokens * heads, self.width])
        self.key_columns = tf.range(capacity)
        self.layer_norm = operations.layer_norm(n_rows * n_tokens, hparams.n_embd)
        self.layers = [
            (
                _projection(block.c_attn, operations),
                _projection(block.c_proj, operations),
                _projection_gelu(block.mlp_c_fc, operations),
                _projection(block.mlp_c_proj, operations),
            )
            for block in weights.blocks
        ]
        if weights.unembedding is None:
            self.unembed = operations.unembed(weights.wte)
        else:
            self.unembed = functools.partial(
                weights.unembedding, keep_layout=operations.keeps_layout
            )

    def flat(self, cache: list[tf.Tensor]) -> list[tf.Tensor]:
        """The cache as the forward pass takes it."""
        return [tf.reshape(part, [-1, self.width]) for part in cache]

    def unflat(self, cache: list[tf.Tensor]) -> list[tf.Tensor]:
        """The cache in its own shape."""
        return [tf.reshape(part, self.cache_shape) for part in cache]

    def __call__(
        self, cache: list[tf.Tensor], tokens: tf.Tensor, columns: tf.Tensor
    ) -> tuple[tf.Tensor, list[tf.Tensor]]:
        """Logits [rows * n_tokens, n_vocab], and the flat cache with the tokens' keys and values.

        The tokens [rows, n_tokens] belong to these columns of the cache [rows, n_tokens].
        """
        cache = list(cache)
        is_visible = self.key_columns <= columns[:, :, tf.newaxis]
        mask = tf.where(is_visible, 0.0, model.MASKED_SCORE)  # [rows, query, key]
        attention = self._attention(tf.repeat(mask, self.hparams.n_head, axis=0))
        # In the order of the new ones: row, token, keys before values, head.
        indices = tf.reshape(self.first_indices + columns[:, :, tf.newaxis], [-1])
        embd = self.hparams.n_embd

        def attend(layer: int, qkv: tf.Tensor) -> tf.Tensor:
            q, new = tf.split(qkv, [embd, 2 * embd], axis=1)
            cache[layer], k, v = self._write(cache[layer], indices, new)
            q = self._split_heads(q * self.width**-0.5)
            return self._merge_heads(attention(q, k, v))

        # A row that has ended may run on past the last position; nobody reads what comes of it.
        last_position = self.hparams.n_ctx - 1
        position = tf.minimum(columns, last_position)
        x = tf.gather(self.weights.wte, tokens) + tf.gather(self.weights.wpe, position)
        x = tf.reshape(x, [-1, self.hparams.n_embd])
        for number, (block, layers) in enumerate(
            zip(self.weights.blocks, self.layers, strict=True)
        ):
            c_attn, c_proj, mlp_c_fc_gelu, mlp_c_proj = layers
            qkv = c_attn(self.layer_norm(x, block.ln_1))
            x = c_proj(attend(number, qkv), x)
            x = mlp_c_proj(mlp_c_fc_gelu(self.layer_norm(x, block.ln_2)), x)
        return self.unembed(self.layer_norm(x, self.weights.ln_f)), cache

    def _write(
        self, part: tf.Tensor, indices: tf.Tensor, new: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        """A part with new keys and values, and its rows' keys and values.

        These are [rows * n_head, capacity, width] each. Reading the first rows copies nothing.
        """
        new = tf.reshape(new, self.written_shape)
        part = tf.raw_ops.InplaceUpdate(x=part, i=indices, v=new)
        k, v = (
            tf.reshape(tf.slice(part, start, self.read_size), self.keys_shape)
            for start in self.read_starts
        )
        return part, k, v

    def _attention(self, mask: tf.Tensor) -> Callable[[tf.Tensor, tf.Tensor, tf.Tensor], tf.Tensor]:
        """Attention of q [rows * n_head, n_tokens, width] to all keys and values.

        In a prefill, each half of the tokens reads the keys up to its own end. That is three
        quarters of the work.
        """
        if self.first_column is None:
            attention = self.operations.attention if self.n_tokens == 1 else model.attention
            return lambda q, k, v: attention(q, k, v, mask)
        middle = (self.n_tokens + 1) // 2
        halves = [
            (begin, end, self.first_column + end, mask[:, begin:end, : self.first_column + end])
            for begin, end in [(0, middle), (middle, self.n_tokens)]
        ]

        def attend(q: tf.Tensor, k: tf.Tensor, v: tf.Tensor) -> tf.Tensor:
            found = [
                model.attention(q[:, begin:end], k[:, :n_keys], v[:, :n_keys], half)
                for begin, end, n_keys, half in halves
            ]
            return tf.concat(found, axis=1)

        return attend

    def _split_heads(self, q: tf.Tensor) -> tf.Tensor:
        """[rows * n_tokens, embd] -> [rows * n_head, n_tokens, width]."""
        heads = self.hparams.n_head
        if self.n_tokens == 1:
            return tf.reshape(q, tf.stack([self.n_rows * heads, 1, self.width]))
        q = tf.reshape(q, [self.n_rows, self.n_tokens, heads, self.width])
        return tf.reshape(tf.transpose(q, [0, 2, 1, 3]), [-1, self.n_tokens, self.width])

    def _merge_heads(self, x: tf.Tensor) -> tf.Tensor:
        """[rows * n_head, n_tokens, width] -> [rows * n_tokens, embd]."""
        if self.n_tokens != 1:
            shape = [self.n_rows, self.hparams.n_head, self.n_tokens, self.width]
            x = tf.transpose(tf.reshape(x, shape), [0, 2, 1, 3])
        return tf.reshape(x, [-1, self.hparams.n_embd])


def _projection(layer: Any, operations: Operations) -> Project:
    """A linear layer of the model: x [rows, nx], terms -> x w + b + terms."""
    if isinstance(layer, model.QuantizedLinear):

        def multiply(x: tf.Tensor, *terms: tf.Tensor) -> tf.Tensor:
            product = layer.multiply(x, keep_layout=operations.keeps_layout)
            return sum(terms, product + layer.b)

        return multiply
    project = operations.linear(layer.w, layer.b)
    update = getattr(layer, "update", None)
    if update is None:
        return project
    return lambda x, *terms: project(x, *terms, model.low_rank(x, update))


def _projection_gelu(layer: Any, operations: Operations) -> Project:
    """A linear layer of the model, and GELU: x [rows, nx] -> gelu(x w + b)."""
    is_plain = not isinstance(layer, model.QuantizedLinear) and not getattr(layer, "update", None)
    if operations.linear_gelu and is_plain:
        return operations.linear_gelu(layer.w, layer.b)
    project = _projection(layer, operations)
    return lambda x: model.gelu(project(x))
