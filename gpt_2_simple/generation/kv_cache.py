"""The keys and values of a generation, kept in the session between runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import tensorflow as tf

from .. import model, session

_STORE = "gpt_2_simple"


class Allocate(NamedTuple):
    """Leaves an empty cache of so many rows and columns in the session."""

    rows: Any
    columns: Any
    run: Any


class Merge(NamedTuple):
    """Of each of two caches takes `columns` up to `used`, and leaves the named rows of both."""

    key: Any
    other: Any
    used: Any
    columns: Any
    rows: Any
    run: Any


class Engine(NamedTuple):
    """The parts of a session's graph that look after caches."""

    key: Any
    begin: Allocate
    free: Any
    held: Any


def engine(sess: tf.compat.v1.Session) -> Engine:
    """The session's engine, built by the first call.

    Raises:
        RuntimeError: the session is closed, or holds no model.
    """
    return build_once(sess, _build_engine)


def build_once(sess: tf.compat.v1.Session, build: Callable[..., Any], *args: Any) -> Any:
    """What `build(weights, hparams, *args)` added to the session's graph; see GraphState."""
    state = session.graph_state(sess)
    return state.build_once(_build_in_scope, state, build, *args)


def _build_in_scope(state: session.GraphState, build: Callable[..., Any], *args: Any) -> Any:
    with tf.compat.v1.name_scope("sample"), tf.device(None):
        return build(state.build_once(_read_weights, state), state.hparams, *args)


def _read_weights(state: session.GraphState) -> model.Weights:
    return model.read(state.weights)


def placeholder(dtype: tf.DType, *shape: int | None) -> tf.Tensor:
    return tf.compat.v1.placeholder(dtype, shape)


def _build_engine(_weights: model.Weights, hparams: model.HParams) -> Engine:
    key, rows, columns = placeholder(tf.int64), placeholder(tf.int32), placeholder(tf.int32)

    def empty(rows: Any, columns: Any) -> list[tf.Tensor]:
        # Parts of one tensor: of equal tensors TensorFlow makes one, to which all would write.
        shape = [2 * hparams.n_layer, rows, hparams.n_head, columns, head_width(hparams)]
        return tf.unstack(tf.zeros(shape), 2 * hparams.n_layer)

    with tf.control_dependencies([stage(key, empty(0, 0))]):  # taking nothing waits for ever
        free = take(key, hparams)
    return Engine(
        key=key,
        begin=Allocate(rows, columns, stage(key, empty(rows, columns))),
        free=tf.group(*free),
        held=tf.raw_ops.MapSize(dtypes=_types(free), shared_name=_STORE),
    )


def head_width(hparams: model.HParams) -> int:
    return hparams.n_embd // hparams.n_head


def _types(cache: Sequence[Any]) -> list[tf.DType]:
    return [tf.float32] * len(cache)


def stage(key: tf.Tensor, cache: list[tf.Tensor]) -> tf.Operation:
    """Leaves the cache in the session; under a key that is taken it does nothing."""
    indices = list(range(len(cache)))
    return tf.raw_ops.MapStage(
        key=key, indices=indices, values=cache, dtypes=_types(cache), shared_name=_STORE
    )


def take(key: tf.Tensor, hparams: model.HParams) -> list[tf.Tensor]:
    """Removes the cache from the session, so that its memory is freed after its last use."""
    indices = list(range(2 * hparams.n_layer))
    cache = tf.raw_ops.MapUnstage(
        key=key, indices=indices, dtypes=_types(indices), shared_name=_STORE
    )
    return [tf.ensure_shape(x, [None, hparams.n_head, None, head_width(hparams)]) for x in cache]


def build_merge(_weights: model.Weights, hparams: model.HParams) -> Merge:
    key, other, rows = placeholder(tf.int64), placeholder(tf.int64), placeholder(tf.int32, None)
    used, columns = placeholder(tf.int32, 2), placeholder(tf.int32, 2)

    def part(cache: tf.Tensor, i: int) -> tf.Tensor:
        cache = cache[:, :, used[i] - columns[i] : used[i]]
        left = tf.reduce_max(columns) - columns[i]
        return tf.pad(cache, [[0, 0], [0, 0], [left, 0], [0, 0]])

    pairs = zip(take(key, hparams), take(other, hparams), strict=True)
    merged = [
        tf.gather(tf.concat([part(one, 0), part(another, 1)], axis=0), rows)
        for one, another in pairs
    ]
    return Merge(key, other, used, columns, rows, stage(key, merged))


def grow_cache(cache: tf.Tensor, columns: tf.Tensor) -> tf.Tensor:
    _, heads, _, width = cache.shape
    added = tf.zeros([tf.shape(cache)[0], heads, columns, width])
    return tf.cond(columns > 0, lambda: tf.concat([cache, added], axis=2), lambda: cache)
