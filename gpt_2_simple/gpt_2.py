"""Arguments in, trained runs and generated texts out: the public functions.

Each checks what it was given, composes the parts (`dataset`, `train`, `sample`, `checkpoint`) and
reports. Names, positions and defaults are gpt-2-simple 0.8.1's; what came after is keyword-only.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator, Sequence
from typing import Any

import tensorflow as tf

from . import checkpoint as checkpoints
from . import (
    encoder,
    history,
    memory,
    memory_saving_gradients,
    model,
    runs,
    sample,
    session,
    texts,
    train,
)
from .colab import (
    copy_checkpoint_from_gdrive,
    copy_checkpoint_to_gdrive,
    copy_file_from_gdrive,
    copy_file_to_gdrive,
    get_tarfile_name,
    is_mounted,
    mount_gdrive,
)
from .create import create_gpt2
from .dataset import encode_csv, load_dataset, save_npz, save_tokens
from .documents import find_files
from .download import download_gpt2, is_gpt2_downloaded
from .files import check_folder
from .memory import memory_plan
from .report import is_silent, say, verbosity
from .sampler import split_dataset
from .schedule import Schedule
from .session import get_available_gpus, reset_session, start_tf_sess
from .step import StepConfig, check_whole
from .texts import Score, as_strings, score_texts

__all__ = [
    "cmd",
    "copy_checkpoint_from_gdrive",
    "copy_checkpoint_to_gdrive",
    "copy_file_from_gdrive",
    "copy_file_to_gdrive",
    "create_gpt2",
    "download_gpt2",
    "encode_csv",
    "encode_dataset",
    "encoder",
    "finetune",
    "generate",
    "generate_stream",
    "generate_to_file",
    "get_available_gpus",
    "get_tarfile_name",
    "is_gpt2_downloaded",
    "is_mounted",
    "load_gpt2",
    "memory_plan",
    "memory_saving_gradients",
    "model",
    "mount_gdrive",
    "next_token_probs",
    "plot_history",
    "reset_session",
    "sample",
    "score",
    "start_tf_sess",
]


# The default of generate()'s run_name: "run1", as ever, but not the same as if the caller said so.
THE_LOADED = str(b"run1", "ascii")

# Attempts to load from a run that another process is training.
LOADS = 10


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
    source = checkpoints.model_folder(model_dir, model_name)
    # So is a mistyped name, which else would leave a run's folder behind.
    find_files([dataset] if val_dataset is None else [dataset, val_dataset])
    hparams = checkpoints.read_hparams(source)
    session.check_model(sess, hparams, "float32")
    run = os.path.join(checkpoint_dir, run_name)
    with verbosity(verbose), contextlib.ExitStack() as stack:
        step = dataclasses.replace(
            config.step, precision=session.fit_precision(sess, config.step.precision)
        )
        if use_memory_saving_gradients is None:
            step = memory.choose(sess, hparams, step, model_name)
        config = dataclasses.replace(config, step=step)
        stack.enter_context(runs.lock(run))
        runs.prepare(run, source)
        start = runs.starting_checkpoint(restore_from, run, source)
        state = _load(sess, run, start, "checkpoint", multi_gpu, "float32")
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


def plot_history(
    run_name: str = "run1", checkpoint_dir: str = "checkpoint", path: str | None = None
) -> str:
    """Draws a run's losses and learning rates into a PNG file, and shows it in a notebook.

    Args:
        run_name: the run, a folder in `checkpoint_dir`.
        checkpoint_dir: where runs are.
        path: the file to write; None means history.png in the run's folder.

    Returns:
        The file's path.

    Raises:
        FileNotFoundError: no such run, or it has no history.
        ImportError: matplotlib is not there: `pip install "gpt_2_simple[plot]"`.
        ValueError: the history is empty.
    """
    folder = checkpoints.run_folder(checkpoint_dir, run_name)
    entries = history.read_history(folder)
    if not entries:
        raise ValueError(f"the history in {folder} is empty: nothing was logged yet")
    path = os.path.join(folder, history.PLOT) if path is None else path
    history.plot(entries, path, run_name)
    history.show(path)
    return path


def load_gpt2(
    sess: tf.compat.v1.Session,
    checkpoint: str | int = "latest",
    run_name: str = "run1",
    checkpoint_dir: str = "checkpoint",
    model_name: str | None = None,
    model_dir: str = "models",
    multi_gpu: bool = False,
    reuse: bool = False,
    *,
    precision: str | None = None,
    verbose: int = 1,
) -> None:
    """Loads a run, or a model, into a session; generate(sess) then needs no names.

    Args:
        sess: a session, from start_tf_sess().
        checkpoint: 'latest', 'best', or a checkpoint's name such as 'model-500', or its step.
        run_name: the run to load, a folder in `checkpoint_dir`.
        checkpoint_dir: where runs are.
        model_name: load this model, not a run; a folder in `model_dir`.
        model_dir: where models are.
        multi_gpu: spread the blocks over all GPUs.
        reuse: accepted for old scripts; a session's model is always reused.
        precision: 'bfloat16' or 'float16' holds the blocks' matrices in 16 bits: about half the
            memory, for generating only. None is 'float32', or what the session has already.
        verbose: 0 prints nothing.

    Raises:
        FileNotFoundError: no such run, model or checkpoint; lists those there are.
        RuntimeError: the session is closed, or is training.
        ValueError: the session holds a model of other sizes or precision, or the files do not fit
            together.
    """
    if isinstance(checkpoint, int):
        checkpoint = f"{runs.MODEL}-{checkpoint}"
    with verbosity(verbose):
        if model_name:
            folder = checkpoints.model_folder(model_dir, model_name)
        else:
            folder = checkpoints.run_folder(checkpoint_dir, run_name)
            runs.recover(folder)
        kind = "pretrained model" if model_name else "checkpoint"
        for attempt in range(LOADS):
            try:
                prefix = checkpoints.restore_path(folder, checkpoint)
                _load(sess, folder, prefix, kind, multi_gpu, precision)
                return
            except FileNotFoundError:
                # It may be that another process, which trains this run, has just replaced it.
                if attempt == LOADS - 1 or not runs.is_being_trained(folder):
                    raise


def _load(
    sess: tf.compat.v1.Session,
    folder: str,
    prefix: str,
    kind: str,
    multi_gpu: bool,
    precision: str | None,
) -> session.Memory:
    """Gives the session the model of `folder`, with the weights of the checkpoint `prefix`."""
    hparams = checkpoints.read_hparams(folder)
    enc = encoder.get_encoder(folder)
    encoder.check_vocabulary(enc, hparams.n_vocab, folder)
    session.check_idle(sess)
    gpus = get_available_gpus() if multi_gpu else []
    precision = precision and session.fit_precision(sess, precision)
    state = session.build_model(sess, hparams, gpus, precision)
    variables = session.named_variables(state)
    checkpoints.check_shapes(prefix, variables, hparams)
    with state.lock, sess.graph.as_default():
        if "restore" not in state.built:
            state.built["restore"] = checkpoints.build_restore(variables)
    say(f"Loading {kind}", prefix)
    state.folder = state.base = None  # whatever happens now, these are no longer those weights
    checkpoints.restore(sess, state.built["restore"], prefix, variables)
    state.folder, state.base, state.encoder = os.path.abspath(folder), None, enc
    return state


def _loaded(
    sess: tf.compat.v1.Session,
    run_name: str,
    checkpoint_dir: str,
    model_name: str | None,
    model_dir: str,
) -> session.Memory:
    """The session's model, after loading what the caller names if that is something else."""
    state = session.memory(sess)
    named = model_name is not None or run_name is not THE_LOADED or checkpoint_dir != "checkpoint"
    if state.folder is None and not named:
        raise RuntimeError(
            "this session has no model yet: call gpt2.load_gpt2(sess) for a run of yours, "
            "gpt2.load_gpt2(sess, model_name='124M') for a downloaded model, or gpt2.finetune()"
        )
    if named:
        path = (model_dir, model_name) if model_name else (checkpoint_dir, run_name)
        if os.path.abspath(os.path.join(*path)) not in (state.folder, state.base):
            load_gpt2(
                sess, "latest", run_name, checkpoint_dir, model_name, model_dir,
                verbose=0 if is_silent() else 1,
            )  # fmt: skip
    return state


def generate(
    sess: tf.compat.v1.Session,
    run_name: str = THE_LOADED,
    checkpoint_dir: str = "checkpoint",
    model_name: str | None = None,
    model_dir: str = "models",
    sample_dir: str = "samples",
    return_as_list: bool = False,
    truncate: str | None = None,
    destination_path: str | None = None,
    sample_delim: str = "=" * 20 + "\n",
    prefix: str | Sequence[str] | None = None,
    seed: int | None = None,
    nsamples: int = 1,
    batch_size: int | None = 1,
    length: int = 1023,
    temperature: float = 0.7,
    top_k: int = 0,
    top_p: float = 0.0,
    include_prefix: bool = True,
    *,
    max_new_tokens: int | None = None,
    stop: str | Sequence[str] | None = None,
    stop_token: str | int | None = None,
    include_stop: bool = False,
    min_length: int = 0,
    repetition_penalty: float = 1.0,
    no_repeat_ngram_size: int = 0,
    bad_words: Sequence[str] | None = None,
    num_beams: int = 1,
    length_penalty: float = 1.0,
    stream: bool = False,
    verbose: int = 1,
) -> list[str] | None:
    """Generates texts; prints them, returns them, or writes them to a file.

    Past the end of the context the window slides: the model then sees the last n_ctx / 2 tokens.

    Args:
        sess: a session with a model, from load_gpt2() or finetune().
        run_name: the run to generate from; needed only if it is not what the session holds.
        checkpoint_dir: where runs are.
        model_name: generate from this model, not from a run; after finetune() from that model, as
            in 0.8.1, from what the session holds.
        model_dir: where models are.
        sample_dir: accepted for old scripts; nothing is written there.
        return_as_list: return the texts, do not print them.
        truncate: end each text before the first occurrence of this after the prefix.
        destination_path: write the texts to this file, do not print them.
        sample_delim: written after each text, unless there is only one.
        prefix: what each text starts with; a list gives `nsamples` texts for each of its strings,
            in order.
        seed: a whole number; the same gives the same texts, whatever the batch size. None draws
            another each time.
        nsamples: texts to generate; for a single prefix a multiple of batch_size.
        batch_size: texts to generate at once; None for as many as is sensible.
        length: tokens to generate, prefix not counted.
        temperature: below 1 is bolder on likely tokens; 0 always takes the likeliest.
        top_k: sample from the k likeliest tokens only; 0 for all.
        top_p: sample from the likeliest tokens that make up this probability (Holtzman et al.
            2019), of those that top_k leaves; 0 for all.
        include_prefix: False leaves the prefix out of the texts.
        max_new_tokens: in place of `length`: the name that other libraries have for it.
        stop: a string, or several: each text ends before the first of them.
        stop_token: a token's id, or its text such as '<|endoftext|>' or a newline, that ends it.
        include_stop: keep the `stop` or `stop_token` at the end.
        min_length: tokens before `stop_token` may come.
        repetition_penalty: above 1 makes tokens of the text so far less likely (Keskar et al.
            2019).
        no_repeat_ngram_size: no run of this many tokens comes twice; 0 for no such rule.
        bad_words: words that must not be written, at the start of a text or after a space; a token
            that holds more, such as "cathedral" for "cat", is another word.
        num_beams: above 1: search the likeliest text, following this many at once (beam search);
            nothing is drawn, so temperature, top_k, top_p and seed do not count, and nsamples is
            how many of the texts found are wanted, the best first.
        length_penalty: of num_beams: the texts found are compared by log-probability / tokens **
            length_penalty.
        stream: print each text as it comes; generate_stream() gives the pieces instead.
        verbose: 0 prints nothing.

    Returns:
        The texts if return_as_list, else None. Ctrl-C returns what there is; without
        return_as_list that is printed or written, and KeyboardInterrupt raised.

    Raises:
        FileNotFoundError: no such run or model.
        RuntimeError: the session holds no model, or is closed; or its weights are not numbers.
        ValueError: an argument is out of range.
    """
    generated: list[str] = []
    with verbosity(verbose), contextlib.ExitStack() as stack:
        end = _end(truncate, stop, include_stop, include_prefix)
        settings = sample.Sampling(
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            repetition_penalty=repetition_penalty,
            no_repeat_ngram_size=no_repeat_ngram_size,
            min_length=min_length,
        )
        beams = sample.Beams(num_beams, length_penalty)
        if stream and num_beams > 1:
            raise ValueError(
                f"num_beams={num_beams} cannot stream: a search may yet change what it has found; "
                "leave stream or num_beams out"
            )
        length = _new_tokens(length, max_new_tokens)
        job = texts.make_job(prefix, nsamples, batch_size, length, settings, seed, end, beams)
        state = _loaded(sess, run_name, checkpoint_dir, model_name, model_dir)
        job = texts.with_tokens(job, state.encoder, stop_token, bad_words)
        write = None if return_as_list else texts.print_text
        if destination_path:
            write = stack.enter_context(texts.file_writer(destination_path))
        delimiter = "" if job.total == 1 else sample_delim
        if stream and write:
            for piece in texts.stream_text(sess, state, job):
                write(piece or f"\n{delimiter}")
            return None
        try:
            for text in texts.generate_texts(sess, state, job):
                generated.append(text)
                if write:
                    write(f"{text}\n{delimiter}")
        except KeyboardInterrupt:
            if not return_as_list:
                raise
    return generated if return_as_list else None


def _new_tokens(length: int, max_new_tokens: int | None) -> int:
    if max_new_tokens is None:
        return length
    check_whole("max_new_tokens", max_new_tokens, 1)
    return max_new_tokens


def _end(
    truncate: str | None, stop: str | Sequence[str] | None, include_stop: bool, include_prefix: bool
) -> texts.End:
    if truncate is not None and not isinstance(truncate, str):
        raise ValueError(f"truncate={truncate!r} must be a string; stop= takes several")
    stops = () if stop is None else as_strings("stop", stop)
    return texts.End(truncate, stops, include_stop, None, include_prefix)


def generate_stream(
    sess: tf.compat.v1.Session,
    prefix: str | None = None,
    *,
    length: int = 1023,
    temperature: float = 0.7,
    top_k: int = 0,
    top_p: float = 0.0,
    seed: int | None = None,
    include_prefix: bool = True,
    max_new_tokens: int | None = None,
    truncate: str | None = None,
    stop: str | Sequence[str] | None = None,
    stop_token: str | int | None = None,
    include_stop: bool = False,
    min_length: int = 0,
    repetition_penalty: float = 1.0,
    no_repeat_ngram_size: int = 0,
    bad_words: Sequence[str] | None = None,
) -> Iterator[str]:
    """Generates one text and gives it in pieces, as it comes; the arguments are generate()'s.

    Returns:
        An iterator of pieces of text, never half a character. Joined, they are what generate()
        returns, but for newlines at the start of a text without its prefix.
    """
    if prefix is not None and not isinstance(prefix, str):
        raise ValueError(f"prefix={prefix!r} must be a string: a stream is of one text")
    settings = sample.Sampling(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        repetition_penalty=repetition_penalty,
        no_repeat_ngram_size=no_repeat_ngram_size,
        min_length=min_length,
    )
    end = _end(truncate, stop, include_stop, include_prefix)
    length = _new_tokens(length, max_new_tokens)
    job = texts.make_job(prefix, 1, 1, length, settings, seed, end)
    state = _loaded(sess, THE_LOADED, "checkpoint", None, "models")
    job = texts.with_tokens(job, state.encoder, stop_token, bad_words)
    return (piece for piece in texts.stream_text(sess, state, job) if piece)


def score(
    sess: tf.compat.v1.Session, texts: str | Sequence[str], stride: int | None = None
) -> list[Score]:
    """Tells how likely a model finds texts.

    Args:
        sess: a session with a model.
        texts: a text, or several.
        stride: tokens by which the window moves along a text longer than the context; None means
            half of it. Smaller is slower, and gives each token more to go by.

    Returns:
        For each text its tokens, their log-probabilities and its perplexity.

    Raises:
        RuntimeError: the session holds no model, or is closed.
        ValueError: an empty text, or a stride out of range.
    """
    state = _loaded(sess, THE_LOADED, "checkpoint", None, "models")
    return score_texts(sess, state.encoder, as_strings("texts", texts), stride)


def next_token_probs(
    sess: tf.compat.v1.Session, prefix: str = "", k: int = 10
) -> list[tuple[str, float]]:
    """Tells what a model would go on with.

    Args:
        sess: a session with a model.
        prefix: the text so far, of which the last n_ctx tokens are read.
        k: how many tokens to tell.

    Returns:
        The likeliest next tokens, as text, and their probabilities, the likeliest first.

    Raises:
        RuntimeError: the session holds no model, or is closed.
        ValueError: k is out of range, or the prefix is no string.
    """
    enc = _loaded(sess, THE_LOADED, "checkpoint", None, "models").encoder
    if not isinstance(prefix, str):
        raise ValueError(f"prefix={prefix!r} must be a string")
    found, shares = sample.next_token_probs(sess, texts.start_ids(enc, prefix), k)
    pairs = zip(found, shares, strict=True)
    return [(enc.decode([token], surrogates=False), float(share)) for token, share in pairs]


def generate_to_file(
    sess: tf.compat.v1.Session,
    run_name: str = THE_LOADED,
    checkpoint_dir: str = "checkpoint",
    model_name: str | None = None,
    model_dir: str = "models",
    truncate: str | None = None,
    destination_path: str = "gpt_2_gen_texts.txt",
    sample_delim: str = "=" * 20 + "\n",
    prefix: str | Sequence[str] | None = None,
    seed: int | None = None,
    nsamples: int = 1,
    batch_size: int | None = 1,
    length: int = 1023,
    temperature: float = 0.7,
    top_k: int = 0,
    top_p: float = 0.0,
    include_prefix: bool = True,
    **options: Any,
) -> None:
    """Generates texts into a file; the arguments, `options` too, are generate()'s.

    The file appears whole when all texts are there, or when something ends the work early.
    """
    generate(
        sess,
        run_name=run_name,
        checkpoint_dir=checkpoint_dir,
        model_name=model_name,
        model_dir=model_dir,
        truncate=truncate,
        destination_path=destination_path,
        sample_delim=sample_delim,
        prefix=prefix,
        seed=seed,
        nsamples=nsamples,
        batch_size=batch_size,
        length=length,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        include_prefix=include_prefix,
        **options,
    )


def encode_dataset(
    file_path: str | Sequence[str],
    model_dir: str = "models",
    out_path: str | os.PathLike[str] = "text_encoded.npz",
    model_name: str = "124M",
    combine: int = 50000,
    *,
    encoding: str | None = None,
    column: str | int | None = None,
    template: str | None = None,
    header: bool | None = None,
    pad_documents: bool = False,
    cache_dir: str | None = None,
    verbose: int = 1,
) -> None:
    """Encodes a dataset once, so that finetune() need not do it each time.

    Args:
        file_path: as finetune's `dataset`.
        model_dir: where models are.
        out_path: an .npz, which gpt-2-simple 0.8.1 reads too, or a .tokens file, which is read
            without being loaded into memory.
        model_name: the model whose vocabulary is used.
        combine: small files are joined until this many characters are gathered.
        encoding: of text files; None means UTF-8.
        column: of a table, by name or by number from 0; None for the first.
        template: several columns of a table, as in '{title}: {body}', in place of `column`.
        header: as finetune's.
        pad_documents: make each row and file a chunk of its own, for finetune(pad_documents=True).
        cache_dir: as finetune's.
        verbose: 0 prints nothing.
    """
    with verbosity(verbose):
        folder = checkpoints.model_folder(model_dir, model_name)
        enc = encoder.get_encoder(folder)
        encoder.check_vocabulary(enc, checkpoints.read_hparams(folder).n_vocab, folder)
        out_path = os.fspath(out_path)
        check_folder("out_path", out_path)
        say("Reading files")
        chunks = load_dataset(
            enc,
            file_path,
            combine,
            encoding,
            column=column,
            template=template,
            header=header,
            pad_documents=pad_documents,
            cache_dir=cache_dir,
        )
        say("Writing", out_path)
        if out_path.lower().endswith(".tokens"):
            save_tokens(out_path, chunks, enc)
        else:
            save_npz(out_path, chunks)


def cmd() -> None:
    """Runs the command line, as the console script `gpt_2_simple` does."""
    # The one import that points up: scripts know this name here.
    from .cli import main

    raise SystemExit(main())
