"""A run's or a model's folder in, its weights in a session out."""

from __future__ import annotations

import os

import tensorflow as tf

from .. import encoder, session
from ..common.folders import model_folder, read_hparams, run_folder
from ..common.report import is_silent, say, verbosity
from ..common.settings import session_function
from ..precision import fit_precision
from . import checkpoint as checkpoints
from . import runs
from .settings import LOADED_RUN, LoadSettings

# How often to try to load from a run that another process is training.
MAX_TRIES = 10


@session_function(LoadSettings)
def load_gpt2(sess: tf.compat.v1.Session, settings: LoadSettings) -> None:
    """Loads a run, or a model, into a session; generate(sess) then needs no names.

    Args:
        sess: a session, from start_tf_sess().
        settings: each of them is an argument.

    Raises:
        FileNotFoundError: there is no such run, model or checkpoint; lists those there are.
        RuntimeError: the session is closed, or is training.
        ValueError: a setting is out of range; or the session holds a model of other sizes or
            precision; or the files do not fit together.
    """
    checkpoint = settings.checkpoint
    if isinstance(checkpoint, int):
        checkpoint = f"{runs.MODEL}-{checkpoint}"
    with verbosity(settings.verbose):
        if settings.model_name:
            folder = model_folder(settings.model_dir, settings.model_name)
        else:
            folder = run_folder(settings.checkpoint_dir, settings.run_name)
            runs.finish_saves_unless_trained(folder)
        kind = "pretrained model" if settings.model_name else "checkpoint"
        for attempt in range(MAX_TRIES):
            try:
                prefix = checkpoints.restore_path(folder, checkpoint)
                load_checkpoint(sess, folder, prefix, kind, settings.multi_gpu, settings.precision)
                return
            except FileNotFoundError:
                # Another process that trains this run may have just replaced the checkpoint.
                if attempt == MAX_TRIES - 1 or not runs.is_being_trained(folder):
                    raise


def load_checkpoint(
    sess: tf.compat.v1.Session,
    folder: str,
    prefix: str,
    kind: str,
    multi_gpu: bool,
    precision: str | None,
) -> session.GraphState:
    """Gives the session the model of `folder`, with the weights of the checkpoint `prefix`."""
    hparams = read_hparams(folder)
    vocabulary = encoder.get_encoder(folder)
    encoder.check_vocabulary(vocabulary, hparams.n_vocab, folder)
    session.check_idle(sess)
    gpus = session.get_available_gpus() if multi_gpu else []
    precision = precision and fit_precision(sess, precision)
    state = session.build_model(sess, hparams, gpus, precision)
    checkpoints.check_shapes(prefix, session.named_variables(state), hparams)
    say(f"Loading {kind}", prefix)
    state.loaded_folder = state.base_model_folder = None  # these weights are about to be replaced
    restore_weights(sess, state, prefix)
    state.loaded_folder, state.encoder = os.path.abspath(folder), vocabulary
    return state


def restore_weights(sess: tf.compat.v1.Session, state: session.GraphState, prefix: str) -> None:
    """Fills the session's model from the checkpoint `prefix`, see checkpoint.restore()."""
    variables = session.named_variables(state).values()
    checkpoints.restore(sess, state.build_once(checkpoints.build_restore, *variables), prefix)


def ensure_loaded(
    sess: tf.compat.v1.Session,
    run_name: str = LOADED_RUN,
    checkpoint_dir: str = "checkpoint",
    model_name: str | None = None,
    model_dir: str = "models",
) -> session.GraphState:
    """The session's model. If the caller names another run or model, that is loaded first."""
    state = session.graph_state(sess)
    named = model_name is not None or run_name is not LOADED_RUN or checkpoint_dir != "checkpoint"
    if state.loaded_folder is None and not named:
        raise RuntimeError(
            "this session has no model yet: call gpt2.load_gpt2(sess) for a run of yours, "
            "gpt2.load_gpt2(sess, model_name='124M') for a downloaded model, or gpt2.finetune()"
        )
    if named:
        path = (model_dir, model_name) if model_name else (checkpoint_dir, run_name)
        folder = os.path.abspath(os.path.join(*path))
        if folder not in (state.loaded_folder, state.base_model_folder):
            load_gpt2(
                sess, "latest", run_name, checkpoint_dir, model_name, model_dir,
                verbose=0 if is_silent() else 1,
            )  # fmt: skip
    return state
