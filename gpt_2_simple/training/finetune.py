"""Settings in, a trained run out: finetune()."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator

import tensorflow as tf

from .. import session
from ..common.folders import model_folder, read_hparams
from ..common.hparams import HParams
from ..common.locks import lock_run
from ..common.report import say, verbosity
from ..common.settings import fields_of, session_function
from ..data.dataset import Dataset, ReadOptions, find_dataset, tokenize
from ..data.windows import split_dataset
from ..distributed.cluster import Cluster
from ..encoder import Encoder
from ..precision import fit_precision
from ..storage import runs
from ..storage.checkpoint import restore_path
from ..storage.load import load_checkpoint
from . import data_parallel, lora, memory_plan
from .settings import TrainingSettings
from .trainer import Data, Result, Start, Trainer


@session_function(TrainingSettings)
def finetune(sess: tf.compat.v1.Session, settings: TrainingSettings) -> Result:
    """Trains a model on a text.

    Args:
        sess: a session, from start_tf_sess().
        settings: see TrainingSettings; each of them is an argument.

    Returns:
        What was reached: the step, losses, the checkpoint's path, whether Ctrl-C ended it.

    Raises:
        FileNotFoundError: there is no such model, run or dataset.
        OSError: the run's folder cannot be written, or the disk is full; earlier checkpoints are
            as they were.
        RuntimeError: the session is closed, or is training already; or another process trains this
            run. A trainer.Diverged: the loss is infinite or not a number. A WorkerLost: another
            worker of the cluster failed.
        ValueError: a setting is out of range, or the dataset holds no text; or the run trains
            another adapter, or was made from another model.
        MemoryError: the device has too little memory; says which setting to change.
    """
    cluster = session.graph_state(sess).cluster
    if cluster is None:
        return _finetune(sess, settings, None)
    with data_parallel.telling_failures(cluster):
        if not cluster.is_writer:
            settings = dataclasses.replace(settings, verbose=0)
        return _finetune(sess, settings, cluster)


def _finetune(
    sess: tf.compat.v1.Session, settings: TrainingSettings, cluster: Cluster | None
) -> Result:
    # What can be wrong is found out before any work, and before a folder is made.
    session.check_idle(sess)
    model = model_folder(settings.model_dir, settings.model_name)
    dataset, val_dataset = _find_datasets(settings)
    hparams = read_hparams(model)
    session.check_model(sess, hparams, None)
    run = os.path.join(settings.checkpoint_dir, settings.run_name)
    with verbosity(settings.verbose), contextlib.ExitStack() as stack:
        if cluster is not None:
            data_parallel.check_settings(cluster, settings)
        stack.enter_context(session.training(sess, run))
        workers = 1 if cluster is None else cluster.spec.count
        settings = _fit_to_device(sess, hparams, settings, workers)
        is_writer = cluster is None or cluster.is_writer
        if is_writer:
            state, start = stack.enter_context(_opened_run(sess, settings, run, model, hparams))
        else:
            state = data_parallel.build_model(sess, model, run, settings)
            start = Start(model, resumes=False, base=restore_path(model))
        state.base_model_folder = os.path.abspath(model)
        if settings.lora is None:
            state.loaded_base = None  # its weights are about to change
        data = _load_data(state.encoder, settings, dataset, val_dataset)
        if is_writer:
            per_call = [f.name for f in fields_of(TrainingSettings).values() if f.setting.per_call]
            runs.note_settings(run, settings.recorded(), start.resumes, per_call)
        stack.enter_context(memory_plan.explain_out_of_memory(hparams, settings.step, workers))
        trainer = Trainer if cluster is None else data_parallel.DataParallelTrainer
        return trainer(sess, state, data, settings, run, start).train()


def _fit_to_device(
    sess: tf.compat.v1.Session, hparams: HParams, settings: TrainingSettings, workers: int
) -> TrainingSettings:
    """The settings, with the precision that the device has, and recomputing decided."""
    settings = dataclasses.replace(
        settings,
        precision=fit_precision(sess, settings.precision),
        base_precision=fit_precision(sess, settings.base_precision),
    )
    session.check_model(sess, hparams, settings.base_precision)
    if settings.use_memory_saving_gradients is None:
        recompute = memory_plan.choose_recomputing(
            sess, hparams, settings.step, settings.model_name, workers
        )
        settings = dataclasses.replace(settings, use_memory_saving_gradients=recompute)
    return settings


@contextlib.contextmanager
def _opened_run(
    sess: tf.compat.v1.Session,
    settings: TrainingSettings,
    run: str,
    model: str,
    hparams: HParams,
) -> Iterator[tuple[session.GraphState, Start]]:
    """Within this block this process alone writes the run; its weights are in the session."""
    with lock_run(run), runs.prepared(run, model):
        start = _start(settings, run, model, hparams)
        state = load_checkpoint(
            sess, run, start.base, "checkpoint", settings.multi_gpu, settings.base_precision
        )
        yield state, start


def _start(settings: TrainingSettings, run: str, model: str, hparams: HParams) -> Start:
    """The checkpoint to start from; `run` and `model` are folders."""
    checkpoint = runs.starting_checkpoint(settings.restore_from, run, model)
    # Not os.path.samefile(): some network drives change their inode numbers.
    of_run = os.path.realpath(os.path.dirname(checkpoint)) == os.path.realpath(run)
    resumes = settings.restore_from == "latest" and of_run
    lora.check_start(settings, checkpoint, resumes, hparams)
    return Start(checkpoint, resumes, lora.find_base(settings, checkpoint, model))


def _find_datasets(settings: TrainingSettings) -> tuple[Dataset, Dataset | None]:
    """The dataset to train on, and the one to validate on if the user names one."""
    options = ReadOptions.of(settings)
    dataset = find_dataset(settings.dataset, options)
    if settings.val_dataset is None:
        return dataset, None
    return dataset, find_dataset(settings.val_dataset, options)


def _load_data(
    encoder: Encoder, settings: TrainingSettings, dataset: Dataset, val_dataset: Dataset | None
) -> Data:
    """The tokens to train on, and to validate on."""
    say("Loading dataset...")
    chunks = tokenize(dataset, encoder, settings.cache_dir)
    say("dataset has", sum(map(len, chunks)), "tokens")
    if val_dataset is not None:
        return Data(chunks, tokenize(val_dataset, encoder, settings.cache_dir))
    if settings.val_split:
        return Data(*split_dataset(chunks, settings.val_split, settings.pad_documents))
    return Data(chunks)
