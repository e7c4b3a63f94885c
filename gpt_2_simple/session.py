"""Thread counts in, a TensorFlow session out, and what each session's graph remembers."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Iterator
from typing import Any

import tensorflow as tf
from tensorflow.core.protobuf import rewriter_config_pb2

from . import model
from .common.report import say

# A key that is no string is skipped when a graph is exported.
_COLLECTION = ("gpt_2_simple",)


@dataclasses.dataclass
class GraphState:
    """What a graph remembers between calls, so that a second call builds nothing.

    Attributes:
        lock: held while the graph grows.
        hparams: the model's sizes, None before there is a model.
        weights: the model's variables.
        precision: in which the blocks' matrices are held.
        gpus: devices that the blocks are spread over, if any.
        folder: where the weights in the session came from, None before anything was loaded.
        base: the model's folder that the run in `folder` was started from, if that is known.
        encoder: the vocabulary of `folder`.
        training: the run that is being trained right now, None if none is.
        built: parts of the graph by whatever key their builder chose.
    """

    lock: threading.RLock = dataclasses.field(default_factory=threading.RLock)
    hparams: model.HParams | None = None
    weights: model.Weights | None = None
    precision: str = "float32"
    gpus: list[str] = dataclasses.field(default_factory=list)
    folder: str | None = None
    base: str | None = None
    encoder: Any = None
    training: str | None = None
    built: dict[Any, Any] = dataclasses.field(default_factory=dict)


_new_state = threading.Lock()


def graph_state(sess: tf.compat.v1.Session) -> GraphState:
    """What the session's graph remembers; made on first use.

    Raises:
        RuntimeError: the session is closed.
        TypeError: it is no session.
    """
    if not (hasattr(sess, "graph") and hasattr(sess, "run")):
        raise TypeError(f"sess={sess!r} is no session; make one with gpt2.start_tf_sess()")
    if getattr(sess, "_closed", False):
        raise RuntimeError("this session is closed; make another with start_tf_sess()")
    with _new_state:
        found = sess.graph.get_collection_ref(_COLLECTION)
        if not found:
            found.append(GraphState())
        return found[0]


@contextlib.contextmanager
def training(state: GraphState, folder: str) -> Iterator[None]:
    """Within this block the session's weights are those of the run in `folder`, being trained."""
    state.training = folder
    try:
        yield
    finally:
        state.training = None


def check_idle(sess: tf.compat.v1.Session) -> None:
    """Raises RuntimeError if the session's weights are being trained, by the caller perhaps."""
    folder = graph_state(sess).training
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
    """Gives the session's graph the model's variables, unless it has them already.

    Args:
        sess: the session.
        hparams: the model's sizes.
        gpus: devices that the blocks are spread over, if any.
        precision: of the blocks' matrices; None takes those that there are, and else float32.

    Raises:
        ValueError: no such precision, or the graph holds a model of other sizes or precision.
    """
    if precision is not None:
        model.check_precision(precision)
    state = graph_state(sess)
    with state.lock, sess.graph.as_default():
        if state.weights is None:
            found = [v.op.name for v in tf.compat.v1.global_variables() if v.op.name == "model/wte"]
            state.precision = precision or "float32"
            state.weights = model.variables(
                hparams, gpus=gpus, reuse=bool(found), dtype=model.PRECISIONS[state.precision]
            )
            state.hparams, state.gpus = dataclasses.replace(hparams), gpus
        check_model(sess, hparams, precision)
        return state


def check_model(sess: tf.compat.v1.Session, hparams: model.HParams, precision: str | None) -> None:
    """Raises ValueError if the session holds a model of other sizes, or in another precision."""
    state = graph_state(sess)
    if state.weights is None:
        return
    if state.hparams != hparams:
        raise ValueError(
            f"this session holds a model of other sizes ({state.hparams}, not {hparams}); "
            "call sess = gpt2.reset_session(sess) first, or use a second session"
        )
    if precision not in (None, state.precision):
        raise ValueError(
            f"this session holds a model in {state.precision}, and {precision} is wanted; call "
            "sess = gpt2.reset_session(sess) first, or use a second session"
        )


def named_variables(state: GraphState) -> dict[str, tf.Variable]:
    """The model's variables by their names in a checkpoint, such as 'model/wte'."""
    return {variable.op.name: variable for variable in model.flatten(state.weights)}


def fitting_precision(precision: str, capability: tuple[int, int]) -> str:
    """The precision asked for, or the next best that a GPU of this compute capability has.

    float16 has hardware of its own, which makes up for the loss scale, from 7.0 on.
    """
    if precision == "bfloat16" and capability < (8, 0):
        return "float16" if capability >= (7, 0) else "float32"
    if precision == "float16" and capability < (5, 3):
        return "float32"
    return precision


def fit_precision(sess: tf.compat.v1.Session, precision: str) -> str:
    """The precision asked for, or the next best that the session's GPUs have, which is then said.

    CPUs, and GPUs that tell no compute capability, get what was asked for.
    """
    if not any(device.device_type == "GPU" for device in sess.list_devices()):
        return precision
    details = map(tf.config.experimental.get_device_details, tf.config.list_physical_devices("GPU"))
    capabilities = [d["compute_capability"] for d in details if "compute_capability" in d]
    if not capabilities:
        return precision
    least = min(capabilities)
    fitting = fitting_precision(precision, least)
    if fitting != precision:
        say(
            f"precision: this GPU (compute capability {least[0]}.{least[1]}) has no "
            f"{precision}; using {fitting}"
        )
    return fitting


def start_tf_sess(threads: int = -1, server: Any = None) -> tf.compat.v1.Session:
    """Starts a session with a graph of its own.

    Args:
        threads: CPU threads within and between operations; -1 leaves it to TensorFlow.
        server: a tf.distribute.Server to run on, None for this process.

    Returns:
        A tf.compat.v1.Session. Close it with `sess.close()`, or use it in a `with` block.
    """
    config = tf.compat.v1.ConfigProto(allow_soft_placement=True)
    config.gpu_options.allow_growth = True
    # The layout optimizer is for convolutions; on GPT-2 it only costs time.
    config.graph_options.rewrite_options.layout_optimizer = rewriter_config_pb2.RewriterConfig.OFF
    if threads > 0:
        config.intra_op_parallelism_threads = threads
        config.inter_op_parallelism_threads = threads
    target = "" if server is None else server.target
    return tf.compat.v1.Session(target=target, graph=tf.Graph(), config=config)


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
    sess.graph.get_collection_ref(_COLLECTION).clear()
    return start_tf_sess(threads, server)


def get_available_gpus() -> list[str]:
    """The names of this machine's GPUs, such as '/device:GPU:0'; empty without any."""
    gpus = tf.config.list_physical_devices("GPU")
    return [gpu.name.replace("/physical_device:", "/device:") for gpu in gpus]
