"""Token ids in, token ids out: the cached decode loop, and what the model thinks of given tokens.

A call keeps its cache in the session, under a key of its own, between one chunk of tokens and the
next: each block's keys and its values [rows, n_head, columns, width], to which the loop writes in
place. Rows of unequal length are padded on the left: a row sees the columns from its `pads` on.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import os
import random
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from . import model, session
from .report import warn

# Columns by which a full cache grows: each time costs a copy of it, each unused column some work.
GROWTH = 64

# Given tokens that go through the model at once, over all rows: bounds the memory, and the time for
# which a run cannot be interrupted.
TOKENS_AT_ONCE = 1024

# A chunk of new tokens should take about this long, so that Ctrl-C and streams wait no longer.
CHUNK_SECONDS = 0.4
LONGEST_CHUNK = 64

# Scoring makes so many rows of logits at a time.
LOGITS_ROWS = 256

# top_p alone first looks for its nucleus among this many of the likeliest tokens, then among all.
NUCLEUS = 1024

# Drawing from the whole vocabulary first draws a stretch of so many tokens.
STRETCH = 256

_STORE = "gpt_2_simple"

_HEALTHY, _BROKEN, _NOTHING_LEFT = 0, 1, 2


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is chosen from the logits.

    Attributes:
        temperature: divides the logits; 0 always takes the likeliest token.
        top_k: choose among this many of the likeliest tokens; 0, or more than there are, among all.
        top_p: choose among the likeliest tokens that together have this probability (Holtzman et
            al. 2019); 0 and 1 are off. With top_k, the probabilities are those after top_k.
        repetition_penalty: divides positive and multiplies negative logits of tokens that the text
            holds already (Keskar et al. 2019); 1 is off.
        no_repeat_ngram_size: no run of this many tokens appears twice; 0 is off.
        min_length: new tokens before stop_token may come.
        bad_words: sequences of token ids that must not appear.
        stop_token: a row ends with this token; None for no such token.
    """

    temperature: float = 0.7
    top_k: int = 0
    top_p: float = 0.0
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    min_length: int = 0
    bad_words: tuple[tuple[int, ...], ...] = ()
    stop_token: int | None = None

    def __post_init__(self) -> None:
        """Raises ValueError for a value out of its range."""
        _check_number("temperature", self.temperature, "0 (greedy) or above", 0)
        _check_number("top_p", self.top_p, "between 0 and 1; both are off", 0, 1)
        _check_number("repetition_penalty", self.repetition_penalty, "above 0; 1 is off", 0)
        if not self.repetition_penalty:
            raise ValueError("repetition_penalty=0 must be above 0; 1 is off")
        for name in ["top_k", "no_repeat_ngram_size", "min_length"]:
            _check_whole(name, getattr(self, name))
        if self.stop_token is not None:
            _check_whole("stop_token", self.stop_token)
        words = tuple(tuple(map(int, word)) for word in self.bad_words)
        if not all(words):
            raise ValueError(f"bad_words={self.bad_words!r} holds an empty word; leave it out")
        object.__setattr__(self, "bad_words", words)

    @property
    def controlled(self) -> bool:
        """Whether the logits must be changed before choosing."""
        return bool(
            self.repetition_penalty != 1
            or self.no_repeat_ngram_size
            or self.bad_words
            or self.min_length
        )


def _check_number(name: str, value: Any, remedy: str, least: float, most: float = math.inf) -> None:
    number = isinstance(value, (int, float, np.number)) and not isinstance(value, bool)
    if not number or not least <= value <= most or math.isinf(value):
        raise ValueError(f"{name}={value!r} must be {remedy}")


def _check_whole(name: str, value: Any, least: int = 0, most: float = 2**31 - 1) -> None:
    whole = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    if not whole or not least <= value <= most:
        limit = f" and at most {most}" if whole and value > most else ""
        raise ValueError(f"{name}={value!r} must be a whole number, {least} or above{limit}")


# --- The graph ---------------------------------------------------------------------------------


class Controls(NamedTuple):
    """Sampling, as placeholders: scalars, but for bad_words [words, longest], -1 on the left."""

    temperature: Any
    top_k: Any
    top_p: Any
    repetition_penalty: Any
    no_repeat_ngram_size: Any
    min_length: Any
    bad_words: Any
    stop_token: Any
    controlled: Any


class Begin(NamedTuple):
    """Leaves an empty cache of so many rows and columns in the session."""

    rows: Any
    columns: Any
    run: Any


class Extend(NamedTuple):
    """Writes the keys and values of `tokens` [rows, time] to the cache, from column `used` on."""

    key: Any
    tokens: Any
    pads: Any
    used: Any
    run: Any


class Merge(NamedTuple):
    """Of each of two caches takes `columns` up to `used`, and leaves the named rows of both."""

    key: Any
    other: Any
    used: Any
    columns: Any
    rows: Any
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
    controls: Controls
    tokens: Any
    status: Any
    run: Any


class Branch(NamedTuple):
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
    controls: Controls
    tokens: Any
    scores: Any
    status: Any
    run: Any


class Engine(NamedTuple):
    """The parts of a session's graph that look after caches."""

    key: Any
    begin: Begin
    free: Any
    held: Any


def engine(sess: tf.compat.v1.Session) -> Engine:
    """The session's engine, built by the first call.

    Raises:
        RuntimeError: the session is closed, or holds no model.
    """
    return _built(sess, "engine", _build_engine)


def decoder(sess: tf.compat.v1.Session, rows: int) -> Decode:
    """The loop for so many rows, built by the first call."""
    if rows == 1:
        return _built(sess, "decode one row", functools.partial(_build_decode, matmul=ONE_ROW))
    return _built(sess, "decode rows", functools.partial(_build_decode, matmul=FEW_ROWS))


def _built(sess: tf.compat.v1.Session, name: str, build: Callable[..., Any]) -> Any:
    state = session.memory(sess)
    with state.lock:
        if state.weights is None:
            raise RuntimeError("this session holds no model; call load_gpt2() or finetune() first")
        with sess.graph.as_default(), tf.compat.v1.name_scope("sample"), tf.device(None):
            if "sample: weights" not in state.built:
                state.built["sample: weights"] = model.read(state.weights)
            weights, key = state.built["sample: weights"], f"sample: {name}"
            if key not in state.built:
                state.built[key] = build(weights, state.hparams)
        return state.built[key]


def _placeholder(dtype: tf.DType, *shape: int | None) -> tf.Tensor:
    return tf.compat.v1.placeholder(dtype, shape)


def _build_engine(_weights: model.Weights, hparams: model.HParams) -> Engine:
    key, rows, columns = _placeholder(tf.int64), _placeholder(tf.int32), _placeholder(tf.int32)

    def empty(rows: Any, columns: Any) -> list[tf.Tensor]:
        # Parts of one tensor: of equal tensors TensorFlow makes one, to which all would write.
        shape = [2 * hparams.n_layer, rows, hparams.n_head, columns, _width(hparams)]
        return tf.unstack(tf.zeros(shape), 2 * hparams.n_layer)

    with tf.control_dependencies([_stage(key, empty(0, 0))]):  # taking nothing waits for ever
        free = _take(key, hparams)
    return Engine(
        key=key,
        begin=Begin(rows, columns, _stage(key, empty(rows, columns))),
        free=tf.group(*free),
        held=tf.raw_ops.MapSize(dtypes=_types(free), shared_name=_STORE),
    )


def _width(hparams: model.HParams) -> int:
    return hparams.n_embd // hparams.n_head


def _types(cache: Sequence[Any]) -> list[tf.DType]:
    return [tf.float32] * len(cache)


def _stage(key: tf.Tensor, cache: list[tf.Tensor]) -> tf.Operation:
    """Leaves the cache in the session; under a key that is taken it does nothing."""
    indices = list(range(len(cache)))
    return tf.raw_ops.MapStage(
        key=key, indices=indices, values=cache, dtypes=_types(cache), shared_name=_STORE
    )


def _take(key: tf.Tensor, hparams: model.HParams) -> list[tf.Tensor]:
    """Removes the cache from the session, so that its memory is freed after its last use."""
    indices = list(range(2 * hparams.n_layer))
    cache = tf.raw_ops.MapUnstage(
        key=key, indices=indices, dtypes=_types(indices), shared_name=_STORE
    )
    return [tf.ensure_shape(x, [None, hparams.n_head, None, _width(hparams)]) for x in cache]


def _build_merge(_weights: model.Weights, hparams: model.HParams) -> Merge:
    key, other, rows = _placeholder(tf.int64), _placeholder(tf.int64), _placeholder(tf.int32, None)
    used, columns = _placeholder(tf.int32, 2), _placeholder(tf.int32, 2)

    def part(cache: tf.Tensor, i: int) -> tf.Tensor:
        cache = cache[:, :, used[i] - columns[i] : used[i]]
        left = tf.reduce_max(columns) - columns[i]
        return tf.pad(cache, [[0, 0], [0, 0], [left, 0], [0, 0]])

    pairs = zip(_take(key, hparams), _take(other, hparams), strict=True)
    merged = [
        tf.gather(tf.concat([part(one, 0), part(another, 1)], axis=0), rows)
        for one, another in pairs
    ]
    return Merge(key, other, used, columns, rows, _stage(key, merged))


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


def _build_extend(weights: model.Weights, hparams: model.HParams) -> Extend:
    key, used = _placeholder(tf.int64), _placeholder(tf.int32)
    tokens, pads = _placeholder(tf.int32, None, None), _placeholder(tf.int32, None)
    cache = _take(key, hparams)
    time_ = tf.shape(tokens)[1]
    forward = _build_forward(weights, hparams, tf.shape(cache[0]), pads, time_, MANY_ROWS)
    _, cache = forward(cache, tokens, used)
    return Extend(key, tokens, pads, used, _stage(key, cache))


def _controls() -> Controls:
    return Controls(
        temperature=_placeholder(tf.float32),
        top_k=_placeholder(tf.int32),
        top_p=_placeholder(tf.float32),
        repetition_penalty=_placeholder(tf.float32),
        no_repeat_ngram_size=_placeholder(tf.int32),
        min_length=_placeholder(tf.int32),
        bad_words=_placeholder(tf.int32, None, None),
        stop_token=_placeholder(tf.int32),
        controlled=_placeholder(tf.bool),
    )


def _build_decode(weights: model.Weights, hparams: model.HParams, matmul: Matmul) -> Decode:
    key, controls = _placeholder(tf.int64), _controls()
    last, pads = _placeholder(tf.int32, None), _placeholder(tf.int32, None)
    used, grow, written = (_placeholder(tf.int32) for _ in range(3))
    uniform, texts = _placeholder(tf.float64, None, None), _placeholder(tf.int32, None, None)
    ended = _placeholder(tf.bool, None)
    steps = tf.shape(uniform)[0]
    cache = [_grown(part, grow) for part in _take(key, hparams)]
    forward = _build_forward(weights, hparams, tf.shape(cache[0]), pads, 1, matmul)

    def body(step: Any, cache: Any, last: Any, history: Any, ended: Any, status: Any, out: Any):
        h, cache = forward(cache, last[:, tf.newaxis], used + step)  # [rows, embd]
        logits = matmul.embed(h, weights.wte)
        end = tf.shape(history)[1] - steps + step
        token, fault = _next_token(logits, uniform[step], history, end, written + step, controls)
        here = tf.equal(tf.range(tf.shape(history)[1]), end)
        return (
            step + 1,
            cache,
            token,
            tf.where(here, token[:, tf.newaxis], history),
            ended | tf.equal(token, controls.stop_token),
            tf.maximum(status, tf.where(ended, _HEALTHY, fault)),
            out.write(step, tf.where(ended, -1, token)),
        )

    def more(step: Any, _cache: Any, _last: Any, _texts: Any, ended: Any, *_: Any) -> tf.Tensor:
        return (step < steps) & ~tf.reduce_all(ended)

    start = [
        tf.constant(0), cache, last, texts, ended,
        tf.fill(tf.shape(last), _HEALTHY), tf.TensorArray(tf.int32, steps, element_shape=[None]),
    ]  # fmt: skip
    with _plain_loops():
        done = tf.while_loop(more, body, start, parallel_iterations=1)
    tokens = tf.transpose(done[-1].gather(tf.range(done[0])))  # [rows, steps]
    run = _stage(key, done[1])
    return Decode(
        key, last, pads, used, grow, uniform, texts, ended, written, controls, tokens, done[-2],
        run,
    )  # fmt: skip


def _build_branch(weights: model.Weights, hparams: model.HParams) -> Branch:
    key, controls, parents = _placeholder(tf.int64), _controls(), _placeholder(tf.int32, None)
    last, pads = _placeholder(tf.int32, None), _placeholder(tf.int32, None)
    used, grow, written, count = (_placeholder(tf.int32) for _ in range(4))
    history = _placeholder(tf.int32, None, None)
    cache = [_grown(tf.gather(part, parents), grow) for part in _take(key, hparams)]
    forward = _build_forward(weights, hparams, tf.shape(cache[0]), pads, 1, FEW_ROWS)
    h, cache = forward(cache, last[:, tf.newaxis], used)
    logits, broken = _controlled(
        FEW_ROWS.embed(h, weights.wte), history, tf.shape(history)[1], written, controls
    )
    scores, tokens = tf.math.top_k(tf.nn.log_softmax(logits), count)
    status = tf.where(broken, _BROKEN, _HEALTHY)
    return Branch(
        key, parents, last, pads, used, grow, history, written, count, controls, tokens, scores,
        status, _stage(key, cache),
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


def _grown(cache: tf.Tensor, columns: tf.Tensor) -> tf.Tensor:
    _, heads, _, width = cache.shape
    added = tf.zeros([tf.shape(cache)[0], heads, columns, width])
    return tf.cond(columns > 0, lambda: tf.concat([cache, added], axis=2), lambda: cache)


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
    heads, width = hparams.n_head, _width(hparams)
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


def _next_token(
    logits: tf.Tensor,
    uniform: tf.Tensor,
    history: tf.Tensor,
    end: tf.Tensor,
    count: tf.Tensor,
    controls: Controls,
) -> tuple[tf.Tensor, tf.Tensor]:
    """Logits [rows, n_vocab] -> tokens [rows] and what is wrong with the logits [rows]."""
    logits, broken = _controlled(logits, history, end, count, controls)
    token = _choose(logits, uniform, controls)
    chosen = tf.math.is_finite(tf.gather(logits, token, batch_dims=1))
    fault = tf.where(broken, _BROKEN, tf.where(chosen, _HEALTHY, _NOTHING_LEFT))
    return token, fault


def _controlled(
    logits: tf.Tensor, history: tf.Tensor, end: tf.Tensor, count: tf.Tensor, controls: Controls
) -> tuple[tf.Tensor, tf.Tensor]:
    """Logits [rows, n_vocab] after the penalties, if any, and which made no sense [rows]."""
    broken = ~tf.math.is_finite(tf.reduce_sum(logits, axis=1))
    logits = tf.cond(
        controls.controlled,
        lambda: _control(logits, history, end, count, controls),
        lambda: logits,
    )
    return logits, broken


def _control(
    logits: tf.Tensor, history: tf.Tensor, end: tf.Tensor, count: tf.Tensor, controls: Controls
) -> tf.Tensor:
    """Logits after the penalties.

    Args:
        logits: [rows, n_vocab].
        history: the text's tokens [rows, time], -1 where there is none.
        end: the column where the text ends.
        count: new tokens so far.
        controls: what to do.
    """
    rows, size = tf.unstack(tf.shape(logits))

    def count_tokens(tokens: tf.Tensor, counts: tf.Tensor) -> tf.Tensor:
        row = tf.broadcast_to(tf.range(rows)[:, tf.newaxis], tf.shape(tokens))
        where = tf.stack([row, tf.maximum(tokens, 0)], axis=2)
        return tf.scatter_nd(where, tf.cast(counts & (tokens >= 0), tf.int32), [rows, size])

    history = history[:, :end]
    penalty = controls.repetition_penalty
    penalised = tf.where(logits < 0, logits * penalty, logits / penalty)
    logits = tf.where(count_tokens(history, history >= 0) > 0, penalised, logits)
    banned = count_tokens(*_repeats(history, controls.no_repeat_ngram_size))
    banned += count_tokens(*_completions(history, controls.bad_words))
    stop = tf.equal(tf.range(size), controls.stop_token) & (count < controls.min_length)
    return tf.where((banned > 0) | stop, -math.inf, logits)


def _repeats(history: tf.Tensor, n: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Tokens [rows, windows] that followed an n-gram's start before, and where the text ends so."""
    end = tf.shape(history)[1]
    before = tf.maximum(n - 1, 0)
    windows = tf.where(n > 0, tf.maximum(end - before, 0), 0)
    tail = history[:, end - tf.minimum(before, end) :]
    seen = tf.gather(history, tf.range(windows)[:, tf.newaxis] + tf.range(before), axis=1)
    same = tf.equal(seen, tail[:, tf.newaxis]) & (seen >= 0)
    return history[:, before : before + windows], tf.reduce_all(same, axis=2)


def _completions(history: tf.Tensor, words: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Last tokens of the words [rows, words], and where the text ends with the others."""
    rows, end = tf.unstack(tf.shape(history))
    start, last = words[:, :-1], words[:, -1]
    tail = history[:, end - tf.shape(start)[1] :][:, tf.newaxis]
    same = tf.reduce_all(tf.equal(tail, start) | (start < 0), axis=2)
    return tf.tile(last[tf.newaxis], [rows, 1]), same


def _choose(logits: tf.Tensor, uniform: tf.Tensor, controls: Controls) -> tf.Tensor:
    """Next tokens [rows], from logits [rows, n_vocab] and one number in [0, 1) a row."""
    size = tf.shape(logits)[1]
    nucleus = (controls.top_p > 0) & (controls.top_p < 1)
    top_p = tf.cast(controls.top_p, tf.float64)

    def masses(logits: tf.Tensor, best: tf.Tensor) -> tf.Tensor:
        return tf.exp((logits - best) / controls.temperature)

    def best() -> tf.Tensor:
        return tf.reduce_max(logits, axis=1, keepdims=True)

    def likeliest(k: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        values, tokens = tf.math.top_k(logits, k)
        return tokens, _cumulate(masses(values, values[:, :1]))

    def top_k() -> tf.Tensor:
        tokens, reached = likeliest(controls.top_k)
        within = reached[:, -1] * tf.where(nucleus, top_p, 1.0)
        return tf.gather(tokens, _draw(reached, uniform, within)[0], batch_dims=1)

    def top_p_alone() -> tf.Tensor:
        within = top_p * tf.cast(tf.reduce_sum(masses(logits, best()), axis=1), tf.float64)
        few = likeliest(tf.minimum(NUCLEUS, size))
        enough = tf.reduce_all(few[1][:, -1] >= within)
        tokens, reached = tf.cond(enough, lambda: few, lambda: likeliest(size))
        return tf.gather(tokens, _draw(reached, uniform, within)[0], batch_dims=1)

    def everything() -> tf.Tensor:
        return _draw_among_many(masses(logits, best()), uniform)

    def sample() -> tf.Tensor:
        truncated = (controls.top_k > 0) & (controls.top_k < size)
        return tf.cond(truncated, top_k, lambda: tf.cond(nucleus, top_p_alone, everything))

    def greedy() -> tf.Tensor:
        return tf.argmax(logits, axis=1, output_type=tf.int32)

    return tf.cond(controls.temperature > 0, sample, greedy)


def _cumulate(masses: tf.Tensor) -> tf.Tensor:
    return tf.cumsum(tf.cast(masses, tf.float64), axis=1)


def _draw(
    reached: tf.Tensor, uniform: tf.Tensor, within: tf.Tensor | None = None
) -> tuple[tf.Tensor, tf.Tensor]:
    """Draws an index by the inverse of a distribution function.

    Args:
        reached: cumulative masses [rows, n].
        uniform: [rows] of numbers in [0, 1).
        within: [rows]; the first index to reach it is the last that may come. None for all.

    Returns:
        Indices [rows], and what is left of `uniform`: again uniform in [0, 1), and independent.
    """

    def count(below: tf.Tensor) -> tf.Tensor:
        indices = tf.reduce_sum(tf.cast(below, tf.int32), axis=1)
        return tf.minimum(indices, tf.shape(reached)[1] - 1)

    total = reached[:, -1]
    if within is not None:
        total = tf.gather(reached, count(reached < within[:, tf.newaxis]), batch_dims=1)
    wanted = uniform * total
    index = count(reached <= wanted[:, tf.newaxis])
    start = tf.gather(tf.pad(reached, [[0, 0], [1, 0]]), index, batch_dims=1)
    end = tf.gather(reached, index, batch_dims=1)
    return index, tf.minimum((wanted - start) / (end - start), 1.0 - 2.0**-53)


def _draw_among_many(masses: tf.Tensor, uniform: tf.Tensor) -> tf.Tensor:
    """Draws an index [rows] with probabilities like masses [rows, n]: first a stretch, then one."""
    size = tf.shape(masses)[1]
    masses = tf.pad(masses, [[0, 0], [0, -size % STRETCH]])
    masses = tf.reshape(masses, [tf.shape(masses)[0], -1, STRETCH])
    stretch, uniform = _draw(_cumulate(tf.reduce_sum(masses, axis=2)), uniform)
    index, _ = _draw(_cumulate(tf.gather(masses, stretch, batch_dims=1)), uniform)
    return tf.minimum(stretch * STRETCH + index, size - 1)


# --- Writing -----------------------------------------------------------------------------------


def generate_tokens(
    sess: tf.compat.v1.Session,
    prefixes: Sequence[Sequence[int]],
    length: int,
    sampling: Sampling | None = None,
    seed: int | None = None,
    row_ids: Sequence[int] | None = None,
    chunk: int | None = None,
) -> Generator[np.ndarray, Any, None]:
    """Continues token sequences.

    A row whose context is full goes on from its last n_ctx // 2 tokens. A row's tokens depend on
    its own prefix, the seed and its id, not on its neighbours (but for rounding, where two tokens
    are equally likely to seven digits).

    Args:
        sess: a session that holds a model.
        prefixes: token ids, at least one a row; the rows may differ in length.
        length: new tokens a row.
        sampling: how to choose; None for the defaults.
        seed: a whole number; None draws one.
        row_ids: whole numbers that tell rows with the same seed apart; None counts from 0.
        chunk: most tokens in one piece; None for pieces of about half a second.

    Returns:
        A generator of int32 [rows, time] pieces, `length` columns in all, or fewer when all rows
        end. After a row's end its tokens are -1. `send` a bool [rows] to end rows. Closing the
        generator frees what it holds in the session.

    Raises:
        ValueError: an argument out of range.
        RuntimeError: the session is closed or holds no model; while writing, weights that are not
            numbers, or nothing left to choose from.
    """
    sampling = sampling or Sampling()
    texts = _checked(sess, prefixes, length, sampling)
    if chunk is not None:
        _check_whole("chunk", chunk, 1)
    if seed is not None:
        _check_whole("seed", seed, -(2**63), math.inf)
    ids = range(len(texts)) if row_ids is None else row_ids
    if len(ids) != len(texts):
        raise ValueError(f"{len(ids)} row_ids for {len(texts)} prefixes; give one each")
    rows = [_Row(text, stream) for text, stream in zip(texts, _noise(seed, ids), strict=True)]
    return _Call(sess, rows, sampling).write(length, chunk)


def _checked(
    sess: tf.compat.v1.Session, prefixes: Sequence[Sequence[int]], length: int, sampling: Sampling
) -> list[list[int]]:
    """The prefixes, as much of them as is read; raises as generate_tokens does."""
    engine(sess)
    hparams = session.memory(sess).hparams
    _check_whole("length", length, 1)
    texts = [_checked_tokens(prefix, hparams.n_vocab) for prefix in prefixes]
    if not texts:
        raise ValueError("prefixes=[] must hold at least one prefix")
    if sampling.stop_token is not None and sampling.stop_token >= hparams.n_vocab:
        raise ValueError(f"stop_token={sampling.stop_token} must be below {hparams.n_vocab}")
    for word in sampling.bad_words:
        _checked_tokens(word, hparams.n_vocab)
    return _cut(texts, hparams.n_ctx, length)


def _checked_tokens(tokens: Sequence[int], n_vocab: int) -> list[int]:
    tokens = [int(token) for token in tokens]
    if not tokens:
        raise ValueError("an empty prefix has nothing to continue; begin with <|endoftext|>")
    for token in tokens:
        if not 0 <= token < n_vocab:
            raise ValueError(f"token {token} is not in the vocabulary of {n_vocab} tokens")
    return tokens


def _cut(texts: list[list[int]], n_ctx: int, length: int) -> list[list[int]]:
    """Takes from texts that are too long their start, leaving room for at most half a context."""
    kept = n_ctx - min(length, n_ctx // 2)
    cut = max((len(text) - kept for text in texts if len(text) > n_ctx), default=0)
    if cut:
        warn(
            f"a prefix is longer than the context of {n_ctx} tokens: its first {cut} tokens are "
            "not read"
        )
    return [text[-kept:] if len(text) > n_ctx else text for text in texts]


def _noise(seed: int | None, ids: Sequence[int]) -> list[np.random.Philox]:
    """One stream of random numbers a row; the n-th number belongs to the n-th new token."""
    seed = random.SystemRandom().getrandbits(64) if seed is None else int(seed)
    keys = [np.array([seed % 2**64, int(row) % 2**64], np.uint64) for row in ids]
    return [np.random.Philox(key=key) for key in keys]


@dataclasses.dataclass(eq=False)
class _Row:
    """A text on its way: all its tokens, of which the model sees those from `start` on."""

    text: list[int]
    noise: np.random.Philox | None = None
    start: int = 0
    ended: bool = False

    @property
    def context(self) -> tuple[int, ...]:
        """What the cache holds: all that the model sees but the last token."""
        return tuple(self.text[self.start : -1])

    @property
    def cached(self) -> int:
        """Length of the context."""
        return len(self.text) - 1 - self.start


class _Call:
    """One call's rows, and its cache in the session under a key of its own."""

    def __init__(self, sess: tf.compat.v1.Session, rows: list[_Row], sampling: Sampling) -> None:
        self.sess = sess
        self.engine = engine(sess)
        self.n_ctx = session.memory(sess).hparams.n_ctx
        self.sampling = sampling
        self.rows = rows
        self.live: list[_Row] = []  # those in the cache, in its order
        self.keys: list[int] = []
        self.key = self.new_key()
        self.used = self.columns = 0

    def write(self, length: int, chunk: int | None) -> Generator[np.ndarray, Any, None]:
        """Yields the new tokens; see generate_tokens."""
        written, steps = 0, 4
        try:
            self.fill(self.key, [])
            self.prime(self.rows)
            while written < length and not all(row.ended for row in self.rows):
                self.make_room()
                began = time.monotonic()
                limit = min(length - written, *map(self.room, self.live))
                tokens = self.decode(min(chunk or steps, limit), written, length)
                written += tokens.shape[1]
                pace = (time.monotonic() - began) / tokens.shape[1]
                steps = max(1, min(LONGEST_CHUNK, 2 * steps, int(CHUNK_SECONDS / pace)))
                ended = yield tokens
                if ended is not None:
                    for row, end in zip(self.rows, ended, strict=True):
                        row.ended = row.ended or bool(end)
        finally:
            self.free()

    def room(self, row: _Row) -> int:
        """New tokens before the row's context is full."""
        return self.n_ctx if row.ended else self.n_ctx - row.cached

    def make_room(self) -> None:
        """Shortens contexts that are full; drops ended rows once they are many."""
        full = [row for row in self.live if self.room(row) < 1]
        for row in full:
            row.start = len(row.text) - max(1, self.n_ctx // 2)
        if full or 4 * sum(row.ended for row in self.live) > len(self.live):
            self.prime(full)

    def prime(self, rows: list[_Row]) -> None:
        """Puts the contexts of `rows` in the cache, beside those of the other unended rows."""
        contexts = list(dict.fromkeys(row.context for row in rows))
        key = self.new_key()
        longest = self.fill(key, contexts)
        kept = [row for row in self.live if not row.ended and row not in rows]
        columns = max((row.cached for row in kept), default=0)
        if kept or len(contexts) < len(rows):
            merge = _built(self.sess, "merge", _build_merge)
            places = [self.live.index(row) for row in kept]
            places += [len(self.live) + contexts.index(row.context) for row in rows]
            feeds = {
                merge.key: self.key,
                merge.other: key,
                merge.used: [self.used, longest],
                merge.columns: [columns, longest],
                merge.rows: places,
            }
            self.sess.run(merge.run, feeds)
        else:
            self.run(self.engine.free, {})
            self.key = key
        self.live = [*kept, *rows]
        self.used = self.columns = max(columns, longest)

    def fill(self, key: int, contexts: list[tuple[int, ...]]) -> int:
        """Makes a cache of these contexts, as wide as the longest; returns its width."""
        begin = self.engine.begin
        longest = max(map(len, contexts), default=0)
        self.run(begin.run, {begin.rows: len(contexts), begin.columns: longest}, key)
        if not longest:
            return 0
        extend = _built(self.sess, "extend", _build_extend)
        pads = [longest - len(context) for context in contexts]
        tokens = np.array([[0] * pad + [*c] for pad, c in zip(pads, contexts, strict=True)])
        block = max(1, TOKENS_AT_ONCE // len(contexts))
        for at in range(0, longest, block):
            part = tokens[:, at : at + block]
            feeds = {extend.key: key, extend.tokens: part, extend.pads: pads, extend.used: at}
            self.sess.run(extend.run, feeds)
        return longest

    def decode(self, steps: int, written: int, length: int) -> np.ndarray:
        """Writes up to `steps` tokens, int32 [rows, time]."""
        decode = decoder(self.sess, len(self.live))
        raw = np.array([row.noise.random_raw(steps) for row in self.live]).T
        feeds = {
            **self.feeds(decode, steps, written, length),
            decode.uniform: (raw >> np.uint64(11)) * 2.0**-53,
            decode.history: self.history(steps),
            decode.ended: [row.ended for row in self.live],
        }
        new, status, _ = self.sess.run([decode.tokens, decode.status, decode.run], feeds)
        _check_status(status)
        self.used += new.shape[1]
        tokens = np.full([len(self.rows), new.shape[1]], -1, np.int32)
        for row, more in zip(self.live, new, strict=True):
            tokens[self.rows.index(row)] = more
            row.text.extend(more[more >= 0].tolist())
            row.ended = row.ended or row.text[-1] == self.sampling.stop_token
        return tokens

    def feeds(self, ops: Decode | Branch, steps: int, written: int, length: int) -> dict[Any, Any]:
        """What both ways to go on are told; counts on the cache to grow as they are told."""
        missing = max(0, self.used + steps - self.columns)
        grow = min(max(missing, GROWTH), length - written) if missing else 0
        self.columns += grow
        return {
            ops.key: self.key,
            ops.last: [row.text[-1] for row in self.live],
            ops.pads: [self.used - row.cached for row in self.live],
            ops.used: self.used,
            ops.grow: grow,
            ops.written: written,
            **self.controls(ops.controls),
        }

    def history(self, steps: int) -> np.ndarray:
        """The texts [rows, time] as Decode.history wants them."""
        if not self.sampling.controlled:
            return np.zeros([len(self.live), 0], np.int32)
        words = [len(word) for word in self.sampling.bad_words]
        width = max(self.sampling.no_repeat_ngram_size, *words, *(len(r.text) for r in self.live))
        history = np.full([len(self.live), width + steps], -1, np.int32)
        for row, line in zip(self.live, history, strict=True):
            line[width - len(row.text) : width] = row.text
        return history

    def controls(self, controls: Controls) -> dict[Any, Any]:
        """What to feed for the sampling."""
        words = self.sampling.bad_words
        longest = max(map(len, words), default=1)
        values = {
            **dataclasses.asdict(self.sampling),
            "bad_words": np.reshape([(-1,) * (longest - len(w)) + w for w in words], [-1, longest]),
            "stop_token": -1 if self.sampling.stop_token is None else self.sampling.stop_token,
            "controlled": self.sampling.controlled,
        }
        return {getattr(controls, name): value for name, value in values.items()}

    def run(self, fetches: Any, feeds: dict[Any, Any], key: int | None = None) -> Any:
        return self.sess.run(fetches, {self.engine.key: self.key if key is None else key, **feeds})

    def new_key(self) -> int:
        """A key that no other call uses; what is under it goes in the end."""
        self.keys.append(random.SystemRandom().getrandbits(62))
        return self.keys[-1]

    def free(self) -> None:
        """Removes from the session what this call left there."""
        if not getattr(self.sess, "_closed", False):
            for key in self.keys:
                self.run(self.engine.free, {}, key)


def _check_status(status: np.ndarray) -> None:
    if _BROKEN in status:
        raise RuntimeError(
            "the model's weights are broken: they give logits that are not finite numbers; "
            "load another checkpoint"
        )
    if _NOTHING_LEFT in status:
        raise ValueError(
            "bad_words, no_repeat_ngram_size and min_length leave no token to choose; allow more"
        )


# --- Searching ---------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Beams:
    """Beam search: of all texts the likeliest are followed, none is drawn.

    Attributes:
        count: texts that are followed at once.
        length_penalty: texts are compared by log-probability / length ** length_penalty; above 0 is
            kind to long ones, below 0 to short ones (as in Hugging Face's generate).
    """

    count: int = 1
    length_penalty: float = 1.0

    def __post_init__(self) -> None:
        """Raises ValueError for a value out of its range."""
        _check_whole("num_beams", self.count, 1)
        _check_number("length_penalty", self.length_penalty, "between -50 and 50", -50, 50)

    def score(self, log_probability: float, length: int) -> float:
        """What texts are compared by."""
        return log_probability / length**self.length_penalty


class Found(NamedTuple):
    """A text that a search came upon.

    Attributes:
        score: see Beams.
        tokens: what was added to the prefix, the stop token included.
    """

    score: float
    tokens: list[int]


class _Beam(_Row):
    """A text that is followed. Its cache is still that of the text that it was made from, `parent`.

    Attributes:
        total: its log-probability after the prefix.
    """

    def __init__(self, text: list[int], total: float) -> None:
        super().__init__(list(text))
        self.parent: _Beam = self
        self.total = total

    def become(self, text: list[int], total: float, parent: _Beam) -> None:
        """Takes over another text of the same length."""
        self.text, self.total, self.parent, self.start = text, total, parent, parent.start


@dataclasses.dataclass(eq=False)
class _Tree:
    """The search from one prefix."""

    prefix: int
    beams: list[_Beam]
    found: list[Found] = dataclasses.field(default_factory=list)
    done: bool = False


class Search(_Call):
    """Beam search from several prefixes at once, token by token.

    Each prefix is followed until as many texts have ended as there are beams and no other looks
    better, or to `length` tokens.
    """

    def __init__(
        self,
        sess: tf.compat.v1.Session,
        prefixes: Sequence[Sequence[int]],
        length: int,
        beams: Beams,
        sampling: Sampling | None = None,
        ends: Callable[[list[int]], bool] | None = None,
    ) -> None:
        """Begins.

        Args:
            sess: a session that holds a model.
            prefixes: token ids, at least one each.
            length: new tokens at most.
            beams: how many, and how they are compared.
            sampling: its stop_token, min_length and penalties count here, before the softmax; how
                to draw does not.
            ends: whether a text with these new tokens ends here; None for no other ends than
                stop_token.

        Raises:
            ValueError: an argument out of range.
            RuntimeError: the session is closed or holds no model.
        """
        sampling = sampling or Sampling()
        texts = _checked(sess, prefixes, length, sampling)
        self.beams, self.length, self.ends, self.written = beams, length, ends, 0
        # Only one of a prefix's equal beams may branch at first.
        totals = [0.0, *[-math.inf] * (beams.count - 1)]
        self.trees = [_Tree(len(text), [_Beam(text, t) for t in totals]) for text in texts]
        super().__init__(sess, [beam for tree in self.trees for beam in tree.beams], sampling)

    def __enter__(self) -> Search:
        try:
            self.fill(self.key, [])
            self.prime(self.rows)
        except BaseException:
            self.free()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.free()

    @property
    def done(self) -> bool:
        """Whether all is found."""
        return all(tree.done for tree in self.trees)

    def best(self) -> list[list[Found]]:
        """For each prefix what was found, the best first; before the end, what is followed too."""
        return [
            sorted(tree.found + (self.followed(tree) if not tree.done else []), reverse=True)
            for tree in self.trees
        ]

    def followed(self, tree: _Tree) -> list[Found]:
        """The texts that are followed, as if they ended here."""
        beams = [beam for beam in tree.beams if self.written and beam.total > -math.inf]
        return [self.judge(tree, beam.text, beam.total) for beam in beams]

    def judge(self, tree: _Tree, text: list[int], total: float) -> Found:
        """What is there of a text."""
        new = text[tree.prefix :]
        return Found(self.beams.score(total, len(new)), new)

    def prime(self, rows: list[_Row]) -> None:
        """As for any call; afterwards these beams have caches of their own."""
        super().prime(rows)
        for beam in rows:
            beam.parent = beam

    def step(self) -> int:
        """Goes a token further; returns for how many prefixes.

        Raises:
            RuntimeError: the weights are not numbers.
            ValueError: the penalties leave nothing to choose from.
        """
        self.make_room()
        branch = _built(self.sess, "branch", _build_branch)
        hparams = session.memory(self.sess).hparams
        feeds = {
            **self.feeds(branch, 1, self.written, self.length),
            branch.parents: [self.live.index(row.parent) for row in self.live],
            branch.count: min(2 * self.beams.count, hparams.n_vocab),
            branch.history: self.history(0),
        }
        fetches = [branch.tokens, branch.scores, branch.status, branch.run]
        tokens, scores, status, _ = self.sess.run(fetches, feeds)
        _check_status(np.where([row.ended for row in self.live], _HEALTHY, status))
        self.used += 1
        self.written += 1
        going = [tree for tree in self.trees if not tree.done]
        for tree in going:
            places = [self.live.index(beam) for beam in tree.beams]
            self.branch(tree, tokens[places], scores[places])
        return len(going)

    def branch(self, tree: _Tree, tokens: np.ndarray, scores: np.ndarray) -> None:
        """Follows the likeliest of all ways to go on, tokens and scores [beams, ways]."""
        totals = scores + np.array([[beam.total] for beam in tree.beams])
        totals[np.isnan(totals)] = -math.inf  # nothing was left to go on with
        if totals.max() == -math.inf:
            _check_status(np.array([_NOTHING_LEFT]))
        kept = []
        best = np.argsort(-totals, axis=None, kind="stable")[: 2 * self.beams.count]
        for rank, place in enumerate(best):
            beam, way = np.unravel_index(place, totals.shape)
            total, token = float(totals[beam, way]), int(tokens[beam, way])
            if total == -math.inf:
                break
            text = [*tree.beams[beam].text, token]
            if self.ended(tree, text):
                if rank < self.beams.count:
                    tree.found.append(self.judge(tree, text, total))
            elif len(kept) < self.beams.count:
                kept.append((text, total, tree.beams[beam]))
        missing = self.beams.count - len(kept)
        kept += [(beam.text + [0], -math.inf, beam) for beam in tree.beams[:missing]]
        for beam, way in zip(tree.beams, kept, strict=True):
            beam.become(*way)
        self.conclude(tree)

    def ended(self, tree: _Tree, text: list[int]) -> bool:
        """Whether nothing comes after this text."""
        stopped = text[-1] == self.sampling.stop_token
        return stopped or (self.ends is not None and self.ends(text[tree.prefix :]))

    def conclude(self, tree: _Tree) -> None:
        """Keeps the best of what was found; ends the search where no better can be hoped for."""
        followed = self.followed(tree)
        if self.written >= self.length:
            tree.found += followed
        tree.found = sorted(tree.found, reverse=True)[: self.beams.count]
        full = len(tree.found) == self.beams.count
        hope = max(followed, default=None)
        tree.done = (
            self.written >= self.length
            or hope is None
            or (full and tree.found[-1].score >= hope.score)
        )
        for beam in tree.beams:
            beam.ended = tree.done


# --- What the model thinks of given tokens -----------------------------------------------------


class Score(NamedTuple):
    """What the model says of `tokens` [rows, time].

    Attributes:
        tokens: what it reads.
        targets: [rows, time], what comes after each of them.
        scores: log-probabilities of the targets [rows, time].
        next: log-probabilities of what comes after the last column [rows, n_vocab].
    """

    tokens: Any
    targets: Any
    scores: Any
    next: Any


def score_tokens(
    sess: tf.compat.v1.Session, rows: Sequence[Sequence[int]], stride: int | None = None
) -> list[np.ndarray]:
    """Log-probabilities (natural) of each row's tokens, given those before.

    Args:
        sess: a session that holds a model.
        rows: token ids; the rows may differ in length and be longer than the context.
        stride: how far the window moves along rows longer than n_ctx; None for n_ctx // 2. Tokens
            then have at least n_ctx - stride tokens before them. Smaller is slower and better.

    Returns:
        A float32 array for each row, shorter than it by one: nothing comes before the first token.

    Raises:
        ValueError: an argument out of range.
        RuntimeError: the session is closed or holds no model; weights that are not numbers.
    """
    score = _built(sess, "score", _build_score)
    hparams = session.memory(sess).hparams
    stride = max(1, hparams.n_ctx // 2) if stride is None else stride
    _check_whole("stride", stride, 1)
    if stride > hparams.n_ctx:
        raise ValueError(f"stride={stride} must not be above n_ctx={hparams.n_ctx}")
    texts = [_checked_tokens(row, hparams.n_vocab) for row in rows]
    scores = [np.zeros(len(text) - 1, np.float32) for text in texts]
    windows = _windows([len(text) - 1 for text in texts], hparams.n_ctx, stride)
    while windows:
        count = max(1, TOKENS_AT_ONCE // windows[0].length)
        group, windows = windows[:count], windows[count:]
        pairs = np.zeros([2, len(group), group[0].length], np.int32)
        for i, (length, row, start, _) in enumerate(group):
            text = texts[row][start : start + length + 1]
            pairs[:, i, :length] = text[:-1], text[1:]
        found = sess.run(score.scores, {score.tokens: pairs[0], score.targets: pairs[1]})
        for (length, row, start, known), values in zip(group, found, strict=True):
            scores[row][start + known : start + length] = values[known:length]
    _check_status(np.where([np.isfinite(values).all() for values in scores], _HEALTHY, _BROKEN))
    return scores


class _Window(NamedTuple):
    """A part of a row, of which another window tells the first `known` tokens better."""

    length: int
    row: int
    start: int
    known: int


def _windows(lengths: list[int], n_ctx: int, stride: int) -> list[_Window]:
    """Covers rows of these lengths; the longest windows first, as likes pad each other least."""
    found = []
    for row, length in enumerate(lengths):
        starts = range(0, max(1, length - n_ctx + stride), stride) if length else ()
        for start in starts:
            known = n_ctx - stride if start else 0
            found.append(_Window(min(n_ctx, length - start), row, start, known))
    return sorted(found, reverse=True)


def next_token_probs(
    sess: tf.compat.v1.Session, tokens: Sequence[int], k: int = 10
) -> tuple[np.ndarray, np.ndarray]:
    """The likeliest next tokens.

    Args:
        sess: a session that holds a model.
        tokens: the text so far, of which the last n_ctx are read.
        k: how many; at most the whole vocabulary.

    Returns:
        Token ids int32 [k], the likeliest first, and their probabilities float32 [k].

    Raises:
        ValueError: an argument out of range.
        RuntimeError: the session is closed or holds no model; weights that are not numbers.
    """
    score = _built(sess, "score", _build_score)
    hparams = session.memory(sess).hparams
    _check_whole("k", k, 1)
    text = _checked_tokens(tokens, hparams.n_vocab)[-hparams.n_ctx :]
    (found,) = sess.run(score.next, {score.tokens: [text]})
    _check_status(np.where(np.isfinite(found).all(), _HEALTHY, _BROKEN))
    best = np.argsort(-found, kind="stable")[:k].astype(np.int32)
    return best, np.exp(found[best])


def _build_score(weights: model.Weights, hparams: model.HParams) -> Score:
    tokens, targets = (_placeholder(tf.int32, None, None) for _ in range(2))
    time_ = tf.shape(tokens)[1]
    mask = model.causal_mask(time_, time_)
    x = tf.gather(weights.wte, tokens) + weights.wpe[:time_]
    for block in weights.blocks:
        x, _ = model.transformer_block(x, block, hparams.n_head, None, lambda *_: mask)
    h = model.layer_norm(x, weights.ln_f)  # [rows, time, embd]
    flat, wanted = tf.reshape(h, [-1, hparams.n_embd]), tf.reshape(targets, [-1])

    def body(start: tf.Tensor, out: tf.TensorArray) -> tuple[tf.Tensor, tf.TensorArray]:
        end = start + LOGITS_ROWS
        scores = tf.nn.log_softmax(model.project(weights, flat[start:end]))
        found = tf.gather(scores, wanted[start:end], batch_dims=1)
        return end, out.write(start // LOGITS_ROWS, found)

    out = tf.TensorArray(tf.float32, 0, True, infer_shape=False, element_shape=[None])
    _, out = tf.while_loop(
        lambda start, _: start < tf.shape(flat)[0], body, [tf.constant(0), out],
        parallel_iterations=1,
    )  # fmt: skip
    scores = tf.reshape(out.concat(), tf.shape(targets))
    return Score(tokens, targets, scores, tf.nn.log_softmax(model.project(weights, h[:, -1])))
