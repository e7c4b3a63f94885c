"""A session in, operations that keep keys and values in it between runs out.

A cache is a list of tensors [2, rows, n_head, capacity, width]: each block's keys and values.
Between two runs it stays in the session under a number, its key, in a staging area of TensorFlow.
"""

from __future__ import annotations

import collections
import dataclasses
import threading
import weakref
from collections.abc import Callable, Generator
from typing import Any, TypeVar

import tensorflow as tf

from .. import model, session
from ..adapter import Adapter

# Names the staging area, which all caches of a session share.
_STAGING_AREA = "gpt_2_simple"

T = TypeVar("T")


def placeholder(dtype: tf.DType, *shape: int | None) -> Any:
    """A field of a dataclass: each instance makes a placeholder; without a shape, of a scalar."""
    return dataclasses.field(default_factory=lambda: tf.compat.v1.placeholder(dtype, shape))


def fetched() -> Any:
    """A field of a dataclass that is set once its operation is built."""
    return dataclasses.field(init=False)


@dataclasses.dataclass
class CacheOps:
    """What is done to a cache as a whole."""

    key: Any = placeholder(tf.int64)
    rows: Any = placeholder(tf.int32)
    capacity: Any = placeholder(tf.int32)  # columns
    allocate: Any = fetched()  # stores an empty cache of these rows and columns under `key`
    free: Any = fetched()  # removes the cache under `key`, if there is one
    n_caches: Any = fetched()  # caches that the session holds


@dataclasses.dataclass
class Grow:
    """Replaces a cache by a copy with more empty columns; Rearrange would copy it twice."""

    key: Any = placeholder(tf.int64)
    added_columns: Any = placeholder(tf.int32)
    run: Any = fetched()


@dataclasses.dataclass
class Rearrange:
    """Replaces a cache by a copy of chosen rows, with room for more rows and columns."""

    key: Any = placeholder(tf.int64)
    rows: Any = placeholder(tf.int32, None)  # the rows to keep, in their new order
    kept_columns: Any = placeholder(tf.int32)  # how many columns to keep, the first ones
    added: Any = placeholder(tf.int32, 2)  # empty rows and empty columns to add
    run: Any = fetched()


@dataclasses.dataclass
class CopyRows:
    """Copies rows of a cache onto other rows of it; all are read before one is written."""

    key: Any = placeholder(tf.int64)
    sources: Any = placeholder(tf.int32, None)
    targets: Any = placeholder(tf.int32, None)
    run: Any = fetched()


def cache_ops(sess: tf.compat.v1.Session) -> CacheOps:
    """The session's cache operations; RuntimeError if it is closed or holds no model.

    It also frees the caches that the garbage collector's generators have left; see unused_keys.
    """
    ops: CacheOps = build_once(sess, _build_cache_ops)
    free_unused(sess)
    return ops


_unused_keys: weakref.WeakKeyDictionary[Any, collections.deque[int]] = weakref.WeakKeyDictionary()


def unused_keys(sess: tf.compat.v1.Session) -> collections.deque[int]:
    """Keys of the session's caches that nobody uses any more: add to it, and call free_unused().

    A generator only adds to it. The garbage collector may end the generator at any moment, also
    while this thread builds the graph. A run of the session would then wait for ever.
    """
    return _unused_keys.setdefault(sess, collections.deque())


def free_unused(sess: tf.compat.v1.Session) -> None:
    """Removes the caches under unused_keys(); does nothing if the session is closed."""
    keys = unused_keys(sess)
    while keys and not getattr(sess, "_closed", False):
        try:
            key = keys.popleft()
        except IndexError:  # another thread was quicker
            return
        ops = build_once(sess, _build_cache_ops)
        run(sess, ops.free, {ops.key: key})


class SessionGenerator(Generator[T, Any, None]):
    """A generator whose caches are freed when it ends or is closed.

    When the garbage collector ends it, the session's next generation frees them.
    """

    def __init__(self, sess: tf.compat.v1.Session, values: Generator[T, Any, None]) -> None:
        self._sess, self._values = sess, values

    def __next__(self) -> T:
        """As a generator's; the base class's would stand between a warning and the user's line."""
        return self.send(None)

    def send(self, value: Any) -> T:
        """As a generator's send."""
        try:
            return self._values.send(value)
        except BaseException:
            free_unused(self._sess)
            raise

    def throw(self, *error: Any) -> T:
        """As a generator's throw."""
        try:
            return self._values.throw(*error)
        except BaseException:
            free_unused(self._sess)
            raise

    def close(self) -> None:
        """As a generator's close."""
        try:
            self._values.close()
        finally:
            free_unused(self._sess)


def build_once(sess: tf.compat.v1.Session, build: Callable[..., Any], *args: Any) -> Any:
    """What `build(weights, hparams, *args)` added to the session's graph; see GraphState."""
    state = session.graph_state(sess)
    return state.build_once(_build_in_scope, state, state.adapter, build, *args)


# Held while any graph grows: what a loop or a condition becomes depends on a switch of the whole
# process, which build_decode turns for a while.
_building = threading.RLock()


def run(sess: tf.compat.v1.Session, fetches: Any, feeds: dict[Any, Any]) -> Any:
    """As sess.run; RuntimeError with the remedy if another thread has closed the session."""
    try:
        return sess.run(fetches, feeds)
    except (RuntimeError, tf.errors.OpError):
        session.graph_state(sess)  # raises if the session is closed
        raise


def model_precision(sess: tf.compat.v1.Session) -> str:
    """The precision of the session's model; see BuiltModel."""
    built = session.graph_state(sess).built_model
    return built.precision if built else "float32"


def _build_in_scope(
    state: session.GraphState, adapter: Adapter | None, build: Callable[..., Any], *args: Any
) -> Any:
    with _building, tf.compat.v1.name_scope("sample"), tf.device(None):
        return build(state.build_once(session.read_weights, state, adapter), state.hparams, *args)


def head_width(hparams: model.HParams) -> int:
    """Numbers in a key or a value of one attention head."""
    return hparams.n_embd // hparams.n_head


def store_cache(key: tf.Tensor, cache: list[tf.Tensor]) -> tf.Operation:
    """Keeps the cache in the session; does nothing if there already is one under this key."""
    indices, dtypes = list(range(len(cache))), [tf.float32] * len(cache)
    return tf.raw_ops.MapStage(
        key=key, indices=indices, values=cache, dtypes=dtypes, shared_name=_STAGING_AREA
    )


def take_cache(key: tf.Tensor, hparams: model.HParams) -> list[tf.Tensor]:
    """Removes the cache from the session, so that its memory is freed after its last use."""
    indices = list(range(hparams.n_layer))
    dtypes = [tf.float32] * len(indices)
    cache = tf.raw_ops.MapUnstage(
        key=key, indices=indices, dtypes=dtypes, shared_name=_STAGING_AREA
    )
    shape = [2, None, hparams.n_head, None, head_width(hparams)]
    return [tf.ensure_shape(part, shape) for part in cache]


def build_grow(_weights: model.Weights, hparams: model.HParams) -> Grow:
    """Adds the operations of Grow to the graph."""
    ops = Grow()
    paddings = [[0, 0], [0, 0], [0, 0], [0, ops.added_columns], [0, 0]]
    parts = [tf.pad(part, paddings) for part in take_cache(ops.key, hparams)]
    ops.run = store_cache(ops.key, parts)
    return ops


def build_rearrange(_weights: model.Weights, hparams: model.HParams) -> Rearrange:
    """Adds the operations of Rearrange to the graph."""
    ops = Rearrange()

    def rearranged(part: tf.Tensor) -> tf.Tensor:
        kept = tf.gather(part[..., : ops.kept_columns, :], ops.rows, axis=1)
        return tf.pad(kept, [[0, 0], [0, ops.added[0]], [0, 0], [0, ops.added[1]], [0, 0]])

    parts = [rearranged(part) for part in take_cache(ops.key, hparams)]
    ops.run = store_cache(ops.key, parts)
    return ops


def build_copy_rows(_weights: model.Weights, hparams: model.HParams) -> CopyRows:
    """Adds the operations of CopyRows to the graph."""
    ops = CopyRows()
    cache = take_cache(ops.key, hparams)
    shape = tf.shape(cache[0])
    sources, targets = ([rows, rows + shape[1]] for rows in (ops.sources, ops.targets))
    sources, targets = tf.concat(sources, 0), tf.concat(targets, 0)  # keys, values

    def copied(part: tf.Tensor) -> tf.Tensor:
        rows = tf.reshape(part, tf.concat([[-1], shape[2:]], 0))
        new = tf.raw_ops.InplaceUpdate(x=rows, i=targets, v=tf.gather(rows, sources))
        return tf.reshape(new, shape)

    ops.run = store_cache(ops.key, [copied(part) for part in cache])
    return ops


def _build_cache_ops(_weights: model.Weights, hparams: model.HParams) -> CacheOps:
    ops, n_parts = CacheOps(), hparams.n_layer

    def empty(rows: Any, capacity: Any) -> list[tf.Tensor]:
        # Parts of one tensor: TensorFlow would replace equal tensors by one, and all would write
        # to that.
        shape = [n_parts, 2, rows, hparams.n_head, capacity, head_width(hparams)]
        return tf.unstack(tf.zeros(shape), n_parts)

    # MapUnstage waits until there is something under the key, so something is put there first.
    with tf.control_dependencies([store_cache(ops.key, empty(0, 0))]):
        ops.free = tf.group(*take_cache(ops.key, hparams))
    ops.allocate = store_cache(ops.key, empty(ops.rows, ops.capacity))
    ops.n_caches = tf.raw_ops.MapSize(dtypes=[tf.float32] * n_parts, shared_name=_STAGING_AREA)
    return ops
