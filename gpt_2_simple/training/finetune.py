"""Arguments in, a trained run out: finetune()."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from .. import encoder, session
from ..common.folders import model_folder, read_hparams
from ..common.locks import lock
from ..common.report import say, verbosity
from ..data.dataset import load_dataset
from ..data.text_files import find_files
from ..data.windows import split_dataset
from ..storage import runs
from ..storage.load import load_checkpoint
from . import memory_plan as memory
from . import trainer as train
from .schedule import Schedule
from .step import StepConfig


def finetune(
    sess: tf.compat.v1.Session,
    dataset: str | Sequence[str],
    steps: int = -1,
    model_name: str = "124M",
    model_dir: str = "models",
    combine: int = 50000,
    batch_size: int = 1,
    learning_rate: float = 0.0001,
    accumulate_gradients: int = 5,
    restore_from: str = "latest",
    run_name: str = "run1",
    checkpoint_dir: str = "checkpoint",
    sample_every: int = 100,
    sample_length: int = 1023,
    sample_num: int = 1,
    multi_gpu: bool = False,
    save_every: int = 1000,
    print_every: int = 1,
    max_checkpoints: int = 1,
    use_memory_saving_gradients: bool | None = None,
    only_train_transformer_layers: bool = False,
    optimizer: str = "adam",
    overwrite: bool = False,
    reuse: bool = False,
    *,
    sequence_length: int | None = None,
    train_last_blocks: int | None = None,
    precision: str = "float32",
    dropout: float = 0.0,
    weight_decay: float = 0.0,
    gradient_clip: float = 0.0,
    seed: int | None = None,
    epochs: float | None = None,
    sampling: str = "random",
    pad_documents: bool = False,
    encoding: str | None = None,
    column: str | int | None = None,
    template: str | None = None,
    header: bool | None = None,
    cache_dir: str | None = None,
    val_dataset: str | Sequence[str] | None = None,
    val_split: float = 0.0,
    val_every: int = 100,
    val_batch_count: int = 40,
    patience: int = 0,
    warmup_steps: int = 0,
    lr_schedule: str = "constant",
    min_learning_rate: float = 0.0,
    on_step: train.OnStep | None = None,
    verbose: int = 1,
) -> train.Result:
    """Trains a model on a text.

    Args:
        sess: a session, from start_tf_sess().
        dataset: a text file, a folder, a glob, a .csv, an .npz from encode_dataset(), or a list.
        steps: steps to take in this call; -1 goes on until Ctrl-C, which saves.
        model_name: the model to start from, a folder in `model_dir`.
        model_dir: where models are.
        combine: small files are joined until this many characters are gathered.
        batch_size: windows in a micro-batch.
        learning_rate: the optimizer's step size.
        accumulate_gradients: micro-batches in a step. k of n windows give the step of one batch
            of k * n.
        restore_from: 'latest' continues the run, or starts it from the model; 'fresh' starts from
            the model; anything else is a folder, or a checkpoint's prefix, to start from.
        run_name: the run to write, a folder in `checkpoint_dir`.
        checkpoint_dir: where runs are.
        sample_every: steps between samples; 0 for none.
        sample_length: tokens in a sample.
        sample_num: samples each time.
        multi_gpu: spread the blocks over all GPUs.
        save_every: steps between checkpoints.
        print_every: steps between lines.
        max_checkpoints: checkpoints to keep; 0 keeps all.
        use_memory_saving_gradients: recompute activations in the backward pass, not store them;
            None does so where the device's memory (see memory_plan) is too small otherwise.
        only_train_transformer_layers: leave the embeddings and the last layer norm as they are.
        optimizer: 'adam', 'adafactor' or 'sgd'.
        overwrite: with restore_from='latest', remove the run's older checkpoints and events.
        reuse: accepted for old scripts; a session's model is always reused.
        sequence_length: tokens in a window; None means n_ctx.
        train_last_blocks: train only so many blocks, the last ones; None for all of the model.
        precision: of activations and matmuls: 'float32', or 'bfloat16' or 'float16' with weights
            and optimizer state in float32; float16 scales the loss, and skips steps that overflow.
            A GPU that lacks it gets the next best, and a line says so.
        dropout: share of embeddings, attention weights and residuals that is dropped.
        weight_decay: decoupled from the gradient; biases and gains are left out.
        gradient_clip: limit of the gradients' global norm; 0 for none. Costs one copy of the
            gradients if there is no accumulation.
        seed: draws the windows and the samples; None draws another each time. A run that is
            resumed goes on with its own.
        epochs: how often this call goes through the dataset, instead of `steps`.
        sampling: 'random' windows, or 'epoch', in which each token comes once an epoch.
        pad_documents: windows never reach from one document (a file, a row) into the next.
        encoding: of text files; None means UTF-8.
        column: of a table, by name or by number from 0; None for the first.
        template: several columns of a table, as in '{title}: {body}', in place of `column`.
        header: whether a table's first row names its columns; None looks at it to find out.
        cache_dir: where the tokens of more than 20 MB of text are kept for the next call; None for
            $GPT_2_SIMPLE_CACHE, or gpt_2_simple in the user's cache folder.
        val_dataset: like `dataset`, to measure the validation loss on.
        val_split: the share of the dataset's end to do that on, such as 0.05, if there is none.
        val_every: steps between validations; there is one after the last step, too.
        val_batch_count: batches in the fixed set of windows that is validated on, at most.
        patience: validations in a row without a better loss that end the training; 0 for never.
            The best weights are kept: load_gpt2(sess, 'best').
        warmup_steps: the run's first steps, over which the learning rate rises to its full size.
        lr_schedule: 'constant', or 'linear' or 'cosine', which fall until the last step.
        min_learning_rate: where they fall to.
        on_step: called after each step with a history.Entry (step, seconds, loss, learning_rate,
            tokens_per_second, validation_loss); returning False ends the training.
        verbose: 0 prints nothing.

    Returns:
        What was reached: steps, losses, the checkpoint's path, whether Ctrl-C ended it.

    Raises:
        FileNotFoundError: no such model, run or dataset.
        OSError: the run's folder cannot be written, or the disk is full; earlier checkpoints are
            as they were.
        RuntimeError: the session is closed, or is training already; another process trains this
            run; or, a train.Diverged, the loss is infinite or no number.
        ValueError: an argument is out of range, or the dataset holds no text.
        MemoryError: the device has too little memory; says which setting to change.
    """
    if val_dataset is not None and val_split:
        raise ValueError(f"give val_dataset={val_dataset!r} or val_split={val_split}, not both")
    config = train.Config(
        step=StepConfig(
            batch_size=batch_size,
            accumulate_gradients=accumulate_gradients,
            use_memory_saving_gradients=bool(use_memory_saving_gradients),
            only_train_transformer_layers=only_train_transformer_layers,
            optimizer=optimizer,
            sequence_length=sequence_length,
            train_last_blocks=train_last_blocks,
            precision=precision,
            dropout=dropout,
            weight_decay=weight_decay,
            gradient_clip=gradient_clip,
        ),
        schedule=Schedule(learning_rate, warmup_steps, lr_schedule, min_learning_rate),
        steps=steps,
        epochs=epochs,
        sampling=sampling,
        pad_documents=pad_documents,
        val_every=val_every,
        val_batch_count=val_batch_count,
        patience=patience,
        sample_every=sample_every,
        sample_length=sample_length,
        sample_num=sample_num,
        save_every=save_every,
        print_every=print_every,
        max_checkpoints=max_checkpoints,
        seed=seed,
    )
    if patience and val_dataset is None and not val_split:
        raise ValueError(
            f"patience={patience} needs a validation set: give val_dataset or val_split"
        )
    sources = {
        "dataset": dataset,
        "val_dataset": val_dataset,
        "val_split": val_split,
        "combine": combine,
        "encoding": encoding,
        "column": column,
        "template": template,
        "header": header,
        "cache_dir": cache_dir,
    }
    session.check_idle(sess)  # one that is closed, or busy, is told before all work
    source = model_folder(model_dir, model_name)
    # So is a mistyped name, which else would leave a run's folder behind.
    find_files([dataset] if val_dataset is None else [dataset, val_dataset])
    hparams = read_hparams(source)
    session.check_model(sess, hparams, "float32")
    run = os.path.join(checkpoint_dir, run_name)
    with verbosity(verbose), contextlib.ExitStack() as stack:
        step = dataclasses.replace(
            config.step, precision=session.fit_precision(sess, config.step.precision)
        )
        if use_memory_saving_gradients is None:
            step = memory.choose(sess, hparams, step, model_name)
        config = dataclasses.replace(config, step=step)
        stack.enter_context(lock(run))
        runs.prepare(run, source)
        start = runs.starting_checkpoint(restore_from, run, source)
        state = load_checkpoint(sess, run, start, "checkpoint", multi_gpu, "float32")
        state.base = os.path.abspath(source)
        data = _load_data(state.encoder, pad_documents, **sources)
        resume = restore_from == "latest" and os.path.samefile(os.path.dirname(start), run)
        settings = {"model_name": model_name, **sources, **config.named()}
        runs.note_settings(run, settings, resume)
        stack.enter_context(memory.explained(state.hparams, config.step))
        samples = os.path.join(train.SAMPLES, run_name)
        trainer = train.Trainer(
            sess, state, data, config, run, samples, start, resume, overwrite, on_step
        )
        stack.enter_context(session.training(state, run))
        return trainer.train()


def _load_data(
    enc: encoder.Encoder,
    pad_documents: bool,
    dataset: str | Sequence[str],
    val_dataset: str | Sequence[str] | None,
    val_split: float,
    combine: int,
    **options: Any,
) -> train.Data:
    """What to train on, and to validate on."""
    say("Loading dataset...")
    options = {**options, "pad_documents": pad_documents}
    chunks = load_dataset(enc, dataset, combine, **options)
    say("dataset has", sum(map(len, chunks)), "tokens")
    if val_dataset is not None:
        return train.Data(chunks, load_dataset(enc, val_dataset, combine, **options))
    if val_split:
        return train.Data(*split_dataset(chunks, val_split, whole_chunks=pad_documents))
    return train.Data(chunks)
