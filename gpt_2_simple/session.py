"""Thread counts in, a TensorFlow session out, and what each session's graph remembers."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import threading
from collections.abc import Callable, Hashable, Iterator
from typing import Any, NamedTuple, ParamSpec, TypeVar

import tensorflow as tf
from tensorflow.core.protobuf import rewriter_config_pb2

from . import model
from .adapter import Adapter, read_adapted
from .distributed import cluster as clusters
from .encoder import Encoder
from .quantized import QuantizedWeights, with_int8_matrices

# A key that is no string is skipped when a graph is exported.
_COLLECTION = ("gpt_2_simple",)

P = ParamSpec("P")
Ops = TypeVar("Ops")


class LoadedBase(NamedTuple):
    """The whole model that a session's weights came from, to load another adapter onto it.

    Attributes:
        digest: of its checkpoint; see storage.adapter_base.digest_of().
        changed: names of the variables that an adapter was merged into.
    """

    digest: str
    changed: frozenset[str]


class BuiltModel(NamedTuple):
    """The model in a graph."""

    hparams: model.HParams
    weights: model.Weights
    precision: str  # the type that holds the blocks' matrices, such as 'float32' or 'int8'
    gpus: list[str]  # the devices that hold the blocks, such as '/device:GPU:0'; may be empty


@dataclasses.dataclass(eq=False)
class GraphState:
    """What a graph remembers between calls, so that a second call builds nothing.

    Folders are absolute paths.
    """

    graph: tf.Graph
    # Held while the graph grows.
    lock: threading.RLock = dataclasses.field(default_factory=threading.RLock)
    # Held while weights are loaded, and while a training claims the session. Taken before `lock`.
    load_lock: threading.RLock = dataclasses.field(default_factory=threading.RLock)
    built_model: BuiltModel | None = None
    loaded_folder: str | None = None  # the run or model whose weights the session holds
    base_model_folder: str | None = None  # the model that the run started from, if that is known
    loaded_base: LoadedBase | None = None  # None if the weights may have been trained since
    quantized: QuantizedWeights | None = None  # the matrices of a model in int8; they stay
    adapter: Adapter | None = None  # what is added to the weights, if it is not merged into them
    draft_session: tf.compat.v1.Session | None = None  # of a model that proposes tokens to this one
    encoder: Encoder = dataclasses.field(init=False)  # not set before anything was loaded
    training_folder: str | None = None  # the run that is being trained now
    on_save: Callable[[Any], object] | None = None  # called with the Trainer after each save
    cluster: clusters.Cluster | None = None  # the workers that train together, if TF_CONFIG says so
    process: int = dataclasses.field(default_factory=os.getpid)
    _built: dict[Hashable, Any] = dataclasses.field(default_factory=dict)

    def build_once(self, build: Callable[P, Ops], *args: P.args, **kwargs: P.kwargs) -> Ops:
        """What `build(*args, **kwargs)` added to the graph; the first such call adds it.

        Arguments are variables and hashable values. A function that each call makes anew, such as a
        lambda, is built anew each time.
        """
        values = [*args, *kwargs.values()]
        key = (build, *kwargs, *(v.ref() if isinstance(v, tf.Variable) else v for v in values))
        with self.lock, self.graph.as_default():
            if key not in self._built:
                self._built[key] = build(*args, **kwargs)
            return self._built[key]

    def _model(self) -> BuiltModel:
        if self.built_model is None:
            raise RuntimeError("this session holds no model; call load_gpt2() or finetune() first")
        return self.built_model

    @property
    def hparams(self) -> model.HParams:
        """The model's sizes. Raises RuntimeError if there is no model."""
        return self._model().hparams

    @property
    def weights(self) -> model.Weights:
        """The model's variables. Raises RuntimeError if there is no model."""
        return self._model().weights

    @property
    def precision(self) -> str:
        """The type that holds the blocks' matrices. Raises RuntimeError if there is no model."""
        return self._model().precision

    @property
    def gpus(self) -> list[str]:
        """The devices that the model is spread over. Raises RuntimeError if there is no model."""
        return self._model().gpus


_new_state = threading.Lock()


def graph_state(sess: tf.compat.v1.Session) -> GraphState:
    """What the session's graph remembers; made on first use.

    Raises:
        RuntimeError: the session is closed, or was forked from another process.
        TypeError: it is no session.
    """
    if not (hasattr(sess, "graph") and hasattr(sess, "run")):
        raise TypeError(f"sess={sess!r} is no session; make one with gpt2.start_tf_sess()")
    if getattr(sess, "_closed", False):
        raise RuntimeError("this session is closed; make another with start_tf_sess()")
    with _new_state:
        found = sess.graph.get_collection_ref(_COLLECTION)
        if not found:
            found.append(GraphState(sess.graph))
        state: GraphState = found[0]
    if state.process != os.getpid():
        raise RuntimeError(
            f"this session is that of process {state.process}, from which this one was forked "
            "without TensorFlow's threads: start processes by multiprocessing's 'spawn', and a "
            "session in each"
        )
    return state


@contextlib.contextmanager
def training(sess: tf.compat.v1.Session, folder: str) -> Iterator[None]:
    """Within this block the session is claimed for the run in `folder`, which is being trained.

    Raises:
        RuntimeError: the session is training already; of several threads one gets it.
    """
    state = graph_state(sess)
    with state.load_lock:
        check_idle(sess)
        state.training_folder = folder
    try:
        yield
    finally:
        state.training_folder = None


def check_idle(sess: tf.compat.v1.Session) -> None:
    """Raises RuntimeError if the session's weights are being trained."""
    folder = graph_state(sess).training_folder
    if folder is not None:
        raise RuntimeError(
            f"this session is training {folder}: load and train others in a session of their own, "
            "from start_tf_sess()"
        )


def build_model(
    sess: tf.compat.v1.Session,
    hparams: model.HParams,
    gpus: list[str],
    precision: str | None = None,
) -> GraphState:
    """Adds the model's variables to the session's graph, unless it has them already.

    See BuiltModel for the arguments. Without a `precision`, that of the model which the graph has
    is taken, or else float32.

    Raises:
        ValueError: the graph holds a model of other sizes or precision.
    """
    state = graph_state(sess)
    with state.lock, state.graph.as_default():
        if state.built_model is None:
            held = precision or "float32"
            # Ctrl-C may have ended an earlier call, which made some of them.
            reuse = tf.compat.v1.AUTO_REUSE
            # Int8 matrices are no variables of the model: state.quantized has them.
            dtype = None if held == "int8" else tf.as_dtype(held)
            weights = model.variables(hparams, gpus=gpus, reuse=reuse, dtype=dtype)
            state.built_model = BuiltModel(dataclasses.replace(hparams), weights, held, gpus)
        check_model(sess, hparams, precision)
        return state


def check_model(sess: tf.compat.v1.Session, hparams: model.HParams, precision: str | None) -> None:
    """Raises ValueError if the session holds a model of other sizes, or in another precision."""
    built = graph_state(sess).built_model
    if built is None:
        return
    if built.hparams != hparams:
        raise ValueError(
            f"this session holds a model of other sizes ({built.hparams}, not {hparams}); "
            "call sess = gpt2.reset_session(sess) first, or use a second session"
        )
    if precision not in (None, built.precision):
        raise ValueError(
            f"this session holds a model in {built.precision}, and {precision} is wanted; call "
            "sess = gpt2.reset_session(sess) first, or use a second session"
        )


def read_weights(
    state: GraphState, adapter: Adapter | None, dropout: model.Dropout | None = None
) -> model.Weights:
    """The model's weights as tensors, with an adapter's updates; `dropout` is the adapter's."""
    weights = model.read(state.weights)
    if state.quantized is not None:
        weights = with_int8_matrices(weights, state.quantized)
    return weights if adapter is None else read_adapted(weights, adapter, dropout)


def forget_weights(state: GraphState) -> None:
    """Notes that the weights are about to be replaced: the session holds no model until then."""
    state.loaded_folder = state.base_model_folder = None
    state.loaded_base = state.adapter = None


def named_variables(state: GraphState) -> dict[str, tf.Variable]:
    """The model's variables by their names in a checkpoint, such as 'model/wte'."""
    return {variable.op.name: variable for variable in model.flatten(state.weights)}


def start_tf_sess(threads: int = -1, server: Any = None) -> tf.compat.v1.Session:
    """Starts a session with a graph of its own.

    If the environment variable TF_CONFIG names a cluster of several workers, this process joins it
    in its first call, which waits for the others. finetune() then trains with all of them.

    Args:
        threads: CPU threads within and between operations; -1 lets TensorFlow choose. Of a worker
            of a cluster, its first session's count.
        server: a tf.distribute.Server to run on, None for this process, or for the cluster.

    Returns:
        A tf.compat.v1.Session. Close it with `sess.close()`, or use it in a `with` block.

    Raises:
        OSError: this worker's port is taken.
        RuntimeError: another worker of the cluster did not come, or has failed.
        ValueError: TF_CONFIG cannot be read.
    """
    config = session_config(threads)
    cluster = clusters.join(config) if server is None else None
    target = "" if server is None else server.target
    if cluster is not None:
        cluster.configure(config)
        target = cluster.target
    sess = tf.compat.v1.Session(target=target, graph=tf.Graph(), config=config)
    graph_state(sess).cluster = cluster
    return sess


def session_config(threads: int = -1) -> tf.compat.v1.ConfigProto:
    """The options of every session; `threads` as in start_tf_sess."""
    config = tf.compat.v1.ConfigProto(allow_soft_placement=True)
    config.gpu_options.allow_growth = True
    # The layout optimizer is for convolutions; on GPT-2 it only costs time.
    config.graph_options.rewrite_options.layout_optimizer = rewriter_config_pb2.RewriterConfig.OFF
    if threads > 0:
        config.intra_op_parallelism_threads = threads
        config.inter_op_parallelism_threads = threads
    return config


def reset_session(
    sess: tf.compat.v1.Session, threads: int = -1, server: Any = None
) -> tf.compat.v1.Session:
    """Closes a session, frees what it holds, and starts another.

    Args:
        sess: the session to close; one that is closed already is no error.
        threads: as in start_tf_sess.
        server: as in start_tf_sess.

    Returns:
        A new session, ready for another model.
    """
    sess.close()
    states = sess.graph.get_collection_ref(_COLLECTION)
    for state in states:
        if state.draft_session is not None:
            state.draft_session.close()
    states.clear()
    return start_tf_sess(threads, server)


def get_available_gpus() -> list[str]:
    """The names of this machine's GPUs, such as '/device:GPU:0'; empty without any."""
    gpus = tf.config.list_physical_devices("GPU")
    return [gpu.name.replace("/physical_device:", "/device:") for gpu in gpus]
