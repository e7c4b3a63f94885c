"""Settings in, a trained run out: finetune()."""

from __future__ import annotations

import contextlib
import dataclasses
import os

import tensorflow as tf

from .. import session
from ..common.folders import model_folder, read_hparams
from ..common.locks import lock
from ..common.report import say, verbosity
from ..common.settings import session_function
from ..data.dataset import load_dataset
from ..data.text_files import find_files
from ..data.windows import split_dataset
from ..encoder import Encoder
from ..storage import runs
from ..storage.load import load_checkpoint
from . import memory_plan
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
            run. A trainer.Diverged: the loss is infinite or not a number.
        ValueError: a setting is out of range, or the dataset holds no text.
        MemoryError: the device has too little memory; says which setting to change.
    """
    # What can be wrong is found out before any work, and before a folder is made.
    session.check_idle(sess)
    model = model_folder(settings.model_dir, settings.model_name)
    find_files([s for s in (settings.dataset, settings.val_dataset) if s is not None])
    hparams = read_hparams(model)
    session.check_model(sess, hparams, "float32")
    run = os.path.join(settings.checkpoint_dir, settings.run_name)
    with verbosity(settings.verbose), contextlib.ExitStack() as stack:
        settings = dataclasses.replace(
            settings, precision=session.fit_precision(sess, settings.precision)
        )
        if settings.use_memory_saving_gradients is None:
            recompute = memory_plan.choose(sess, hparams, settings.step, settings.model_name)
            settings = dataclasses.replace(settings, use_memory_saving_gradients=recompute)
        stack.enter_context(lock(run))
        runs.prepare(run, model)
        start = _start(settings, run, model)
        state = load_checkpoint(
            sess, run, start.checkpoint, "checkpoint", settings.multi_gpu, "float32"
        )
        state.base_model_folder = os.path.abspath(model)
        data = _load_data(state.encoder, settings)
        runs.note_settings(run, settings.recorded(), start.resumes)
        stack.enter_context(memory_plan.explained(hparams, settings.step))
        trainer = Trainer(sess, state, data, settings, run, start)
        stack.enter_context(session.training(state, run))
        return trainer.train()


def _start(settings: TrainingSettings, run: str, model: str) -> Start:
    """The checkpoint to start from; `run` and `model` are folders."""
    checkpoint = runs.starting_checkpoint(settings.restore_from, run, model)
    of_run = os.path.samefile(os.path.dirname(checkpoint), run)
    return Start(checkpoint, resumes=settings.restore_from == "latest" and of_run)


def _load_data(encoder: Encoder, settings: TrainingSettings) -> Data:
    """The tokens to train on, and to validate on."""
    say("Loading dataset...")

    def load(dataset: object) -> object:
        return load_dataset(
            encoder,
            dataset,
            settings.combine,
            settings.encoding,
            column=settings.column,
            template=settings.template,
            header=settings.header,
            cache_dir=settings.cache_dir,
            pad_documents=settings.pad_documents,
        )

    chunks = load(settings.dataset)
    say("dataset has", sum(map(len, chunks)), "tokens")
    if settings.val_dataset is not None:
        return Data(chunks, load(settings.val_dataset))
    if settings.val_split:
        return Data(*split_dataset(chunks, settings.val_split, settings.pad_documents))
    return Data(chunks)
