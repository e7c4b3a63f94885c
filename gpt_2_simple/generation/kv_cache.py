"""A session in, operations that keep keys and values in it between runs out.

A cache is a list of tensors [rows, n_head, capacity, width]: each block's keys, then its values.
Between two runs it stays in the session under a number, its key, in a staging area of TensorFlow.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import tensorflow as tf

from .. import model, session

# Names the staging area, which all caches of a session share.
_STAGING_AREA = "gpt_2_simple"


class Allocate(NamedTuple):
    """Stores an empty cache.

    Attributes:
        rows: how many rows it has.
        capacity: how many columns it has.
        run: the operation.
    """

    rows: Any
    capacity: Any
    run: Any


class CacheOps(NamedTuple):
    """What is done to a cache as a whole.

    Attributes:
        key: the cache's key.
        allocate: stores an empty cache under `key`.
        free: removes the cache under `key`, if there is one.
        n_caches: how many caches the session holds.
    """

    key: Any
    allocate: Allocate
    free: Any
    n_caches: Any


class Merge(NamedTuple):
    """Replaces a cache by chosen rows of it and of a second cache.

    Attributes:
        key: the first cache's key.
        other_key: the second cache's key; that cache is removed.
        cache_lengths: columns in use of the first and of the second cache [2].
        kept_columns: how many of these columns are kept, the last ones [2].
        rows: numbers of the rows to keep; the second cache's rows count on from the first's.
        run: the operation.
    """

    key: Any
    other_key: Any
    cache_lengths: Any
    kept_columns: Any
    rows: Any
    run: Any


def cache_ops(sess: tf.compat.v1.Session) -> CacheOps:
    """The session's cache operations; the first call adds them to the graph.

    Raises:
        RuntimeError: the session is closed, or holds no model.
    """
    return build_once(sess, _build_cache_ops)


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
    """A placeholder; without a shape it is a scalar."""
    return tf.compat.v1.placeholder(dtype, shape)


def head_width(hparams: model.HParams) -> int:
    """Numbers in a key or a value of one attention head."""
    return hparams.n_embd // hparams.n_head


def store_cache(key: tf.Tensor, cache: list[tf.Tensor]) -> tf.Operation:
    """Keeps the cache in the session; does nothing if there already is one under this key."""
    indices = list(range(len(cache)))
    return tf.raw_ops.MapStage(
        key=key, indices=indices, values=cache, dtypes=_types(cache), shared_name=_STAGING_AREA
    )


def take_cache(key: tf.Tensor, hparams: model.HParams) -> list[tf.Tensor]:
    """Removes the cache from the session, so that its memory is freed after its last use."""
    indices = list(range(2 * hparams.n_layer))
    cache = tf.raw_ops.MapUnstage(
        key=key, indices=indices, dtypes=_types(indices), shared_name=_STAGING_AREA
    )
    return [tf.ensure_shape(x, [None, hparams.n_head, None, head_width(hparams)]) for x in cache]


def grow_cache(cache: list[tf.Tensor], added_columns: tf.Tensor) -> list[tf.Tensor]:
    """The cache with so many more empty columns; without a copy if there are none to add."""
    return [_grow(part, added_columns) for part in cache]


def _grow(part: tf.Tensor, added_columns: tf.Tensor) -> tf.Tensor:
    _, heads, _, width = part.shape
    added = tf.zeros([tf.shape(part)[0], heads, added_columns, width])
    return tf.cond(added_columns > 0, lambda: tf.concat([part, added], axis=2), lambda: part)


def build_merge(_weights: model.Weights, hparams: model.HParams) -> Merge:
    """Adds the operations of Merge to the graph."""
    key, other_key = placeholder(tf.int64), placeholder(tf.int64)
    rows = placeholder(tf.int32, None)
    cache_lengths, kept_columns = placeholder(tf.int32, 2), placeholder(tf.int32, 2)

    def last_columns(part: tf.Tensor, i: int) -> tf.Tensor:
        part = part[:, :, cache_lengths[i] - kept_columns[i] : cache_lengths[i]]
        left = tf.reduce_max(kept_columns) - kept_columns[i]
        return tf.pad(part, [[0, 0], [0, 0], [left, 0], [0, 0]])

    pairs = zip(take_cache(key, hparams), take_cache(other_key, hparams), strict=True)
    merged = [
        tf.gather(tf.concat([last_columns(first, 0), last_columns(second, 1)], axis=0), rows)
        for first, second in pairs
    ]
    return Merge(key, other_key, cache_lengths, kept_columns, rows, store_cache(key, merged))


def _build_cache_ops(_weights: model.Weights, hparams: model.HParams) -> CacheOps:
    key, rows, capacity = placeholder(tf.int64), placeholder(tf.int32), placeholder(tf.int32)

    def empty(rows: Any, capacity: Any) -> list[tf.Tensor]:
        # Parts of one tensor: TensorFlow would replace equal tensors by one, and all would write
        # to that.
        shape = [2 * hparams.n_layer, rows, hparams.n_head, capacity, head_width(hparams)]
        return tf.unstack(tf.zeros(shape), 2 * hparams.n_layer)

    # MapUnstage waits until there is something under the key, so something is put there first.
    with tf.control_dependencies([store_cache(key, empty(0, 0))]):
        taken = take_cache(key, hparams)
    return CacheOps(
        key=key,
        allocate=Allocate(rows, capacity, store_cache(key, empty(rows, capacity))),
        free=tf.group(*taken),
        n_caches=tf.raw_ops.MapSize(dtypes=_types(taken), shared_name=_STAGING_AREA),
    )


def _types(cache: Sequence[Any]) -> list[tf.DType]:
    return [tf.float32] * len(cache)
