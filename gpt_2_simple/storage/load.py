"""A run's or a model's folder in, its weights in a session out."""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Collection
from typing import Any, NamedTuple

import tensorflow as tf

from .. import encoder, session
from ..common.folders import model_folder, read_hparams, run_folder
from ..common.hparams import HParams
from ..common.report import is_silent, say, verbosity
from ..common.settings import session_function
from ..precision import fit_precision, has_gpu
from ..quantized import QuantizedFile, QuantizedWeights, choose_kernel, place_on_gpus
from . import adapter_base, checkpoint_ops, runs
from . import checkpoint as checkpoints
from .adapter_files import digest_of_adapter, is_adapter, read_config
from .adapter_merge import MergedAdapter
from .checkpoint_tensors import open_checkpoint
from .quantized_file import find_or_make
from .settings import LOADED_RUN, LoadSettings


@session_function(LoadSettings)
def load_gpt2(sess: tf.compat.v1.Session, settings: LoadSettings) -> None:
    """Loads a run, or a model, into a session; generate(sess) then needs no names.

    A run that trains an adapter is merged into the model that it was trained on. If the session
    holds that model already, only the matrices that an adapter changes are read again.

    Args:
        sess: a session, from start_tf_sess().
        settings: each of them is an argument.

    Raises:
        FileNotFoundError: there is no such run, model, checkpoint or adapter; lists those there
            are.
        ConnectionError, ImportError, PermissionError: the adapter's name is one on the hub, and
            that cannot be reached.
        RuntimeError: the session is closed, or is training.
        ValueError: a setting is out of range; or the session holds a model of other sizes or
            precision; or the files do not fit together.
    """
    with verbosity(settings.verbose):
        load_source(sess, settings)


class Source(NamedTuple):
    """Where weights come from.

    Attributes:
        folder: a model's or run's, with hparams.json and the vocabulary.
        prefix: the checkpoint of a whole model.
        adapter: the folder of an adapter that is merged into it, or None.
    """

    folder: str
    prefix: str
    adapter: str | None = None


def load_source(sess: tf.compat.v1.Session, settings: LoadSettings) -> Source:
    """Finds what settings name, and loads it; raises what load_gpt2() raises."""
    run = None
    if not settings.model_name and settings.adapter is None:
        run = run_folder(settings.checkpoint_dir, settings.run_name, or_model=True)
        runs.finish_saves_unless_trained(run)

    def find_and_load() -> Source:
        source = find_source(settings)
        with session.graph_state(sess).load_lock:
            session.check_idle(sess)
            _load(sess, source, settings)
        return source

    return runs.retry_while_trained(run, find_and_load)


def find_source(settings: LoadSettings) -> Source:
    """What settings name; raises FileNotFoundError or ValueError as load_gpt2() does."""
    if settings.adapter is not None:
        return _find_adapter(settings.adapter, settings)
    if settings.model_name:
        folder = model_folder(settings.model_dir, settings.model_name)
    else:
        folder = run_folder(settings.checkpoint_dir, settings.run_name, or_model=True)
    name = settings.checkpoint
    name = runs.name_of_step(folder, name) if isinstance(name, int) else name
    prefix = checkpoints.restore_path(folder, name)
    if not is_adapter(prefix):
        return Source(folder, prefix)
    return Source(folder, adapter_base.find_base(prefix, settings.model_dir), prefix)


def _find_adapter(name: str, settings: LoadSettings) -> Source:
    """An adapter, and the model that settings name or, without a name, that it was trained on."""
    adapter = adapter_base.adapter_folder(name)
    read_config(adapter)
    if settings.model_name:
        folder = model_folder(settings.model_dir, settings.model_name)
        prefix = checkpoints.restore_path(folder)
        adapter_base.check_base(adapter, prefix)
        return Source(folder, prefix, adapter)
    prefix = adapter_base.find_base(adapter, settings.model_dir)
    return Source(os.path.dirname(prefix), prefix, adapter)


def _load(sess: tf.compat.v1.Session, source: Source, settings: LoadSettings) -> None:
    kind = "pretrained model" if settings.model_name else "checkpoint"
    state = load_checkpoint(
        sess, source.folder, source.prefix, kind, settings.multi_gpu, settings.precision,
        source.adapter,
    )  # fmt: skip
    if settings.adapter is not None:
        state.base_model_folder = state.loaded_folder
        state.loaded_folder = os.path.abspath(source.adapter or "")
    elif not settings.model_name:
        state.base_model_folder = runs.base_model_folder(source.folder)


def load_checkpoint(
    sess: tf.compat.v1.Session,
    folder: str,
    prefix: str,
    kind: str,
    multi_gpu: bool,
    precision: str | None,
    adapter: str | None = None,
) -> session.GraphState:
    """Gives the session the model of `folder`, with the weights of the checkpoint `prefix`.

    The caller has checked that nobody else trains in the session. `adapter` is the folder of one
    that is merged into these weights.
    """
    hparams = read_hparams(folder)
    vocabulary = encoder.get_encoder(folder)
    encoder.check_vocabulary(vocabulary, hparams.n_vocab, folder)
    changes = None if adapter is None else MergedAdapter(adapter, prefix, hparams)
    gpus = session.get_available_gpus() if multi_gpu else []
    precision = precision and fit_precision(sess, precision)
    state = session.build_model(sess, hparams, gpus, precision)
    checkpoint_ops.check_shapes(prefix, session.named_variables(state), hparams)
    with state.load_lock:
        digest = adapter_base.digest_of(prefix)
        if state.precision == "int8":
            file = quantized_weights(prefix, hparams, adapter, changes)
            _keep_quantized(sess, state, file)
        base = state.loaded_base
        session.forget_weights(state)  # they are about to go
        if changes is None:
            say(f"Loading {kind}", prefix)
            restore_weights(sess, state, prefix)
        elif base is not None and base.digest == digest:
            say("Loading adapter", adapter)
            changes.merge(sess, state, base.changed)
        else:
            say(f"Loading {kind}", prefix)
            restore_weights(sess, state, prefix, changes.names)
            say("Loading adapter", adapter)
            changes.merge(sess, state)
        state.loaded_base = session.LoadedBase(digest, changes.names if changes else frozenset())
        state.loaded_folder, state.encoder = os.path.abspath(folder), vocabulary
    return state


def quantized_weights(
    prefix: str, hparams: HParams, adapter: str | None, changes: MergedAdapter | None
) -> QuantizedFile:
    """The int8 matrices of a checkpoint, with an adapter's `changes`; made if they are missing."""
    digest = adapter_base.digest_of(prefix)
    if adapter is None or changes is None:
        opened = functools.partial(open_checkpoint, prefix)
        return find_or_make(prefix, digest, hparams, opened)
    merged = hashlib.sha256(f"{digest} {digest_of_adapter(adapter)}".encode()).hexdigest()
    # A folder of another program, such as the hub's cache, is left as it is.
    of_run = os.path.isfile(os.path.join(os.path.dirname(adapter), "hparams.json"))
    return find_or_make(adapter, merged, hparams, changes.open_merged, beside=of_run)


def _keep_quantized(
    sess: tf.compat.v1.Session,
    state: session.GraphState,
    file: QuantizedFile,
) -> None:
    """Gives the session its int8 matrices. Kernels may keep copies of them, so they never change.

    Raises:
        ValueError: the session has others.
    """
    if state.quantized is not None:
        if state.quantized.file.digest != file.digest:
            raise ValueError(
                "this session holds other weights in int8, which cannot be replaced; call "
                "sess = gpt2.reset_session(sess) first, or use a second session"
            )
        return
    if has_gpu(sess):
        state.quantized = place_on_gpus(sess, file, state.hparams, state.gpus)
    else:
        state.quantized = QuantizedWeights(file, choose_kernel(), {})


def restore_weights(
    sess: tf.compat.v1.Session,
    state: session.GraphState,
    prefix: str,
    without: Collection[str] = (),
) -> None:
    """Fills the session's model from the checkpoint `prefix`, see checkpoint_ops.restore().

    Variables whose names are in `without` keep their values.
    """
    named = session.named_variables(state)
    variables = [variable for name, variable in named.items() if name not in without]
    try:
        stored = checkpoint_ops.stored_types(prefix, variables)
    except (FileNotFoundError, LookupError) as error:
        raise FileNotFoundError(f"{prefix} went away while it was read; load it again") from error
    options = {"stored": stored} if stored else {}
    checkpoint_ops.restore(
        sess, state.build_once(checkpoint_ops.build_restore, *variables, **options), prefix
    )


def ensure_loaded(
    sess: tf.compat.v1.Session,
    run_name: str = LOADED_RUN,
    checkpoint_dir: str = "checkpoint",
    model_name: str | None = None,
    model_dir: str = "models",
) -> session.GraphState:
    """The session's model. If the caller names another run or model, that is loaded first.

    A run that was loaded stays if the caller names it, or the model that it was made from: scripts
    for gpt-2-simple 0.8.1 name that model beside the run. If another thread is loading, its end is
    waited for.
    """
    state = session.graph_state(sess)
    if state.loaded_folder is None:
        with state.load_lock:
            pass
    names_run = run_name is not LOADED_RUN or checkpoint_dir != "checkpoint"
    named = model_name is not None or names_run
    if state.loaded_folder is None and not named:
        raise RuntimeError(
            "this session has no model yet: call gpt2.load_gpt2(sess) for a run of yours, "
            "gpt2.load_gpt2(sess, model_name='124M') for a downloaded model, or gpt2.finetune()"
        )
    if named:
        run = os.path.abspath(os.path.join(checkpoint_dir, run_name))
        folder = os.path.abspath(os.path.join(model_dir, model_name)) if model_name else run
        is_kept = folder in (state.loaded_folder, state.base_model_folder) or (
            run == state.loaded_folder if names_run else _is_run_of_unknown_model(state)
        )
        if not is_kept:
            load_gpt2(
                sess, "latest", run_name, checkpoint_dir, model_name, model_dir,
                verbose=0 if is_silent() else 1,
            )  # fmt: skip
    return state


def ensure_draft(
    state: session.GraphState, draft_model: str, model_dir: str
) -> tf.compat.v1.Session:
    """A session that holds a draft model for the model of `state`; kept until another is named.

    Args:
        state: of a session that holds a model.
        draft_model: a model in `model_dir` or beside the model of `state`, or the path of a model's
            or a run's folder.
        model_dir: the folder that holds the models.

    Raises:
        FileNotFoundError: there is no such model.
        ValueError: it has another vocabulary.
    """
    folder = os.path.abspath(_draft_folder(state, draft_model, model_dir))
    with state.load_lock:
        draft = state.draft_session
        if draft is not None and session.graph_state(draft).loaded_folder == folder:
            return draft
        draft = tf.compat.v1.Session(graph=tf.Graph(), config=session.session_config())
        parent, name = os.path.split(folder)
        is_run = os.path.isfile(os.path.join(folder, checkpoints.COUNTER))
        names = ("run_name", "checkpoint_dir") if is_run else ("model_name", "model_dir")
        named: dict[str, Any] = dict(zip(names, (name, parent), strict=True))
        try:
            verbose = 0 if is_silent() else 1
            load_gpt2(draft, **named, precision=state.precision, verbose=verbose)
            if session.graph_state(draft).encoder.encoder != state.encoder.encoder:
                raise ValueError(
                    f"draft_model={draft_model!r} has another vocabulary than the session's model: "
                    "its tokens mean something else; give one with the same vocabulary"
                )
        except BaseException:
            draft.close()
            raise
        state.draft_session = draft  # another thread may still generate with the one before
        return draft


def _draft_folder(state: session.GraphState, draft_model: str, model_dir: str) -> str:
    if os.path.dirname(draft_model):
        return model_folder(*os.path.split(os.path.abspath(draft_model)))
    beside = os.path.dirname(state.base_model_folder or state.loaded_folder or "")
    if os.path.isfile(os.path.join(beside, draft_model, "hparams.json")):
        return os.path.join(beside, draft_model)
    return model_folder(model_dir, draft_model)


def _is_run_of_unknown_model(state: session.GraphState) -> bool:
    """Whether the session holds a run of gpt-2-simple 0.8.1, which does not name its model."""
    loaded = state.loaded_folder
    return (
        loaded is not None
        and state.base_model_folder is None
        and os.path.isfile(os.path.join(loaded, checkpoints.COUNTER))
    )
