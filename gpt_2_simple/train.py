"""Token chunks and settings in, a trained run with its checkpoints and samples out: the loop."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import signal
import threading
import time
from collections.abc import Sequence
from types import FrameType
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from . import checkpoint, sample, session, texts
from .report import say
from .sampler import Sampler, window_length
from .step import StepConfig, TrainOps, build, check_whole

SAMPLES = "samples"


@dataclasses.dataclass(frozen=True)
class Config:
    """What the loop does around its steps; see finetune() for the meanings."""

    step: StepConfig
    steps: int = -1
    learning_rate: float = 0.0001
    sample_every: int = 100
    sample_length: int = 1023
    sample_num: int = 1
    save_every: int = 1000
    print_every: int = 1
    max_checkpoints: int = 1
    seed: int | None = None

    def __post_init__(self) -> None:
        """Raises ValueError for a value out of its range."""
        for name in ("save_every", "print_every", "sample_length"):
            check_whole(name, getattr(self, name), 1)
        for name in ("sample_every", "sample_num", "max_checkpoints"):
            check_whole(name, getattr(self, name), 0)
        if self.steps != -1:
            check_whole("steps", self.steps, 1, " (or -1: until Ctrl-C)")
        rate = self.learning_rate
        if not isinstance(rate, (int, float, np.number)) or not 0 < rate < math.inf:
            raise ValueError(f"learning_rate={rate!r} must be a number above 0")


class Result(NamedTuple):
    """What finetune() reached.

    Attributes:
        step: the run's last step, counted from its first call.
        loss: the last step's loss, in nats a token.
        average_loss: the printed average.
        checkpoint: the prefix of the checkpoint with the final weights.
        interrupted: whether Ctrl-C, and not `steps`, ended the training.
        history: (step, loss) of this call's steps.
    """

    step: int
    loss: float
    average_loss: float
    checkpoint: str
    interrupted: bool
    history: list[tuple[int, float]]


class Progress:
    """The lines, events and average that a user watches."""

    def __init__(self, run: str, config: Config):
        self.config = config
        self.started = time.time()
        self.losses = (0.0, 0.0)
        self.history: list[tuple[int, float]] = []
        with tf.Graph().as_default():  # A FileWriter wants a graph, not eager mode.
            self.events = tf.compat.v1.summary.FileWriter(run)

    @property
    def average(self) -> float:
        """The loss, averaged with a decay of 0.99 a printed step."""
        return self.losses[0] / self.losses[1] if self.losses[1] else math.nan

    def record(self, step: int, loss: float) -> None:
        """Notes a step's loss, and says it every `print_every` steps."""
        self.history.append((step, loss))
        value = tf.compat.v1.Summary.Value(tag="loss", simple_value=loss)
        self.events.add_summary(tf.compat.v1.Summary(value=[value]), step)
        if step % self.config.print_every == 0:
            self.losses = (self.losses[0] * 0.99 + loss, self.losses[1] * 0.99 + 1.0)
            seconds = time.time() - self.started
            say(f"[{step} | {seconds:2.2f}] loss={loss:2.2f} avg={self.average:2.2f}")


class Interruption:
    """Ctrl-C and SIGTERM, while the block runs: the first is remembered, the second raises."""

    def __init__(self) -> None:
        self.requested = False

    def __enter__(self) -> Interruption:
        self._previous: dict[int, Any] = {}
        # Python lets only the main thread handle signals; elsewhere they go where they went.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True


def run(
    sess: tf.compat.v1.Session,
    state: session.Memory,
    chunks: Sequence[np.ndarray],
    config: Config,
    folder: str,
    start: str,
    resume: bool,
    overwrite: bool,
) -> Result:
    """Trains until `config.steps` are taken or Ctrl-C asks for an end, saving on the way.

    Args:
        sess: holds the model, with the weights to start from.
        state: what the session's graph remembers.
        chunks: the dataset's tokens.
        config: settings.
        folder: the run's folder.
        start: the checkpoint that the weights came from.
        resume: whether that is the run's own latest: its steps go on counting.
        overwrite: with `resume`, remove the run's older checkpoints and events.

    Returns:
        Result.
    """
    window = min(config.step.sequence_length or state.hparams.n_ctx, state.hparams.n_ctx)
    time_ = window_length(chunks, window)
    if time_ < window:
        say(f"the dataset is shorter than {window} tokens: training on windows of {time_}")
    ops = build(sess, state, config.step, time_)
    sess.run(ops.initialize)
    sampler = Sampler(chunks, config.seed)
    saves = Saves(sess, state, folder, config.max_checkpoints, start if resume else None)
    if overwrite and resume:
        saves.overwrite()
    step = saves.step
    last = None if config.steps == -1 else step + config.steps
    watch = Progress(folder, config)
    say("Training...")
    with Interruption() as interruption, contextlib.closing(watch.events):
        while step != last and not interruption.requested:
            loss = take_step(sess, ops, sampler, config, interruption)
            if loss is None:
                break
            step += 1
            watch.record(step, loss)
            if step == last:
                break
            if step % config.save_every == 0:
                saves.save(step)
            if config.sample_every and step % config.sample_every == 0:
                write_samples(sess, state, chunks, config, folder, step)
        if interruption.requested:
            say("interrupted")
        prefix = saves.save(step)
    final = watch.history[-1][1] if watch.history else math.nan
    return Result(step, final, watch.average, prefix, interruption.requested, watch.history)


def take_step(
    sess: tf.compat.v1.Session,
    ops: TrainOps,
    sampler: Sampler,
    config: Config,
    interruption: Interruption,
) -> float | None:
    """Draws a step's micro-batches and takes the step.

    Returns:
        The mean loss of the micro-batches, in nats a token; None if Ctrl-C came before the step
        was taken.
    """
    batch_size, time_ = ops.tokens.shape
    weights = np.full(ops.weights.shape, 1.0 / (batch_size * (time_ - 1)), np.float32)

    def feed() -> dict[tf.Tensor, Any]:
        return {ops.tokens: sampler.sample_batch(batch_size, time_), ops.weights: weights}

    rate = {ops.learning_rate: config.learning_rate}
    if ops.micro_step is None:
        return float(sess.run(ops.apply, {**feed(), **rate}))
    sess.run(ops.reset)
    for _ in range(config.step.accumulate_gradients):
        sess.run(ops.micro_step, feed())
        if interruption.requested:
            return None
    return float(sess.run(ops.apply, rate))


class Saves:
    """A run's checkpoints: which there are, when one is due, which go."""

    def __init__(
        self,
        sess: tf.compat.v1.Session,
        state: session.Memory,
        folder: str,
        max_checkpoints: int,
        latest: str | None,
    ):
        self.sess, self.state, self.folder = sess, state, folder
        self.max_checkpoints = max_checkpoints
        self.latest = latest
        self.names = checkpoint.named_checkpoints(folder) if latest else []
        with state.lock, sess.graph.as_default():
            if "save" not in state.built:
                state.built["save"] = checkpoint.build_save(session.named_variables(state))

    @property
    def step(self) -> int:
        """The step of the latest checkpoint, 0 for a new run."""
        return (checkpoint.step_of(self.latest) if self.latest else None) or 0

    def save(self, step: int) -> str:
        """Saves, unless the latest checkpoint is of this step already; returns its prefix."""
        if self.latest and self.step == step:
            return self.latest
        say("Saving", os.path.join(self.folder, f"{checkpoint.RUN_CHECKPOINT}-{step}"))
        prefix, self.names = checkpoint.save_run(
            self.sess,
            self.state.built["save"],
            self.folder,
            step,
            self.state.hparams,
            self.names,
            self.max_checkpoints,
        )
        self.latest = prefix
        self.state.folder = os.path.abspath(self.folder)
        return prefix

    def overwrite(self) -> None:
        """Removes the run's checkpoints but the latest, and its events."""
        latest = os.path.basename(self.latest)
        for name in self.names:
            if name != latest:
                checkpoint.remove_checkpoint(os.path.join(self.folder, name))
        self.names = [latest]
        checkpoint.write_state(self.folder, self.names)
        for name in os.listdir(self.folder):
            if name.startswith("events.out.tfevents."):
                os.remove(os.path.join(self.folder, name))


def write_samples(
    sess: tf.compat.v1.Session,
    state: session.Memory,
    chunks: Sequence[np.ndarray],
    config: Config,
    folder: str,
    step: int,
) -> None:
    """Generates samples that each follow a token drawn from the dataset; says and writes them.

    They land in `samples/<run>/samples-<step + 1>`, as gpt-2-simple always named them.
    """
    rng = np.random.default_rng([config.seed or 0, step])
    chunk = chunks[rng.integers(len(chunks))]
    first = state.encoder.decode([chunk[rng.integers(len(chunk))]])
    settings = sample.Sampling(temperature=1.0, top_k=40)
    job = texts.Job(first, config.sample_num, 1, config.sample_length, settings, config.seed)
    cut = texts.Cut(first, None, True)
    written = []
    for text in texts.generate_texts(sess, state.encoder, job, cut):
        written.append(f"======== SAMPLE {len(written) + 1} ========\n{text}\n")
        say(written[-1])
    if written:
        target = os.path.join(SAMPLES, os.path.basename(folder))
        os.makedirs(target, exist_ok=True)
        checkpoint.write_file(os.path.join(target, f"samples-{step + 1}"), "\n".join(written))
