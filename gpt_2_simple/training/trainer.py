"""Token chunks and settings in, a trained run with its checkpoints and samples out: the loop."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from .. import session
from ..common.checks import check_whole
from ..common.report import say, verbosity
from ..data.token_file import hash_json
from ..data.windows import SAMPLING, WindowSampler, fixed_windows, window_length
from ..generation import request as requests
from ..generation import text_stream
from ..generation.settings import SamplingParams
from ..generation.stopping import StopCriteria
from ..storage import checkpoint, runs
from ..storage.checkpoint_manager import CheckpointManager
from . import history
from . import validation as validating
from .interruption import Interruption
from .run_logger import RunLogger
from .schedule import Schedule, steps_of_epochs
from .step import StepConfig, build

SAMPLES = "samples"

OnStep = Callable[[history.Entry], Any]


@dataclasses.dataclass(frozen=True)
class Config:
    """What the loop does around its steps; see finetune() for the meanings."""

    step: StepConfig
    schedule: Schedule = Schedule()
    steps: int = -1
    epochs: float | None = None
    sampling: str = "random"
    pad_documents: bool = False
    val_every: int = 100
    val_batch_count: int = 40
    patience: int = 0
    sample_every: int = 100
    sample_length: int = 1023
    sample_num: int = 1
    save_every: int = 1000
    print_every: int = 1
    max_checkpoints: int = 1
    seed: int | None = None

    def __post_init__(self) -> None:
        """Raises ValueError for a value out of its range."""
        for name in ("save_every", "print_every", "sample_length", "val_every", "val_batch_count"):
            check_whole(name, getattr(self, name), 1)
        for name in ("sample_every", "sample_num", "max_checkpoints", "patience"):
            check_whole(name, getattr(self, name), 0)
        check_whole("warmup_steps", self.schedule.warmup_steps, 0)
        if self.seed is not None:
            check_whole("seed", self.seed, 0)
        if self.sampling not in SAMPLING:
            raise ValueError(f"sampling={self.sampling!r} must be one of {', '.join(SAMPLING)}")
        if self.steps != -1:
            check_whole("steps", self.steps, 1, " (or -1: until Ctrl-C)")
        if self.epochs is not None:
            if self.steps != -1:
                raise ValueError(f"give steps={self.steps} or epochs={self.epochs}, not both")
            if not 0 < self.epochs < math.inf:
                raise ValueError(f"epochs={self.epochs} must be a number above 0")
        elif self.steps == -1:
            self.schedule.check_end(None)

    def named(self) -> dict[str, Any]:
        """All settings by the names that finetune() knows them by."""
        values = dataclasses.asdict(self)
        return {**values.pop("step"), **values.pop("schedule"), **values}


class Data(NamedTuple):
    """Chunks of tokens, to train on and to validate on, if at all."""

    chunks: Sequence[np.ndarray]
    validation: Sequence[np.ndarray] | None = None


class Result(NamedTuple):
    """What finetune() reached.

    Attributes:
        step: the run's last step, counted from its first call.
        loss: the last step's loss, in nats a token.
        average_loss: the printed average; the last loss where no step was printed.
        checkpoint: the prefix of the checkpoint with the final weights.
        interrupted: whether Ctrl-C, and not `steps`, ended the training.
        history: what each of this call's steps reached.
        validation_loss: the last one measured, None without validation.
        best_loss: the lowest validation loss of the run, whose weights are checkpoint 'best'.
        best_step: the step that reached it.
    """

    step: int
    loss: float
    average_loss: float
    checkpoint: str
    interrupted: bool
    history: list[history.Entry]
    validation_loss: float | None = None
    best_loss: float | None = None
    best_step: int | None = None


class Diverged(RuntimeError):
    """The loss, or a weight, is infinite or no number."""


class Validation:
    """A fixed set of windows, and the model's loss on them.

    Attributes:
        identity: a digest of the windows: losses on others do not compare.
    """

    def __init__(
        self,
        sess: tf.compat.v1.Session,
        state: session.GraphState,
        chunks: Sequence[np.ndarray],
        config: Config,
        window: int,
    ):
        """Chooses the windows, of `window` tokens if there are as many.

        Raises:
            ValueError: there are fewer than the 2 tokens that it takes to predict one.
        """
        size = sum(map(len, chunks))
        if size < 2:
            raise ValueError(f"the validation set has {size} tokens: at least 2 are needed")
        if size < window:
            say(f"the validation set is shorter than {window} tokens: one window of {size}")
        count = config.val_batch_count * config.step.batch_size
        self.windows = fixed_windows(chunks, min(window, size), count, config.pad_documents)
        rows, time = self.windows.tokens.shape
        batch_size = min(config.step.batch_size, rows)
        self.ops = validating.build_evaluation(sess, state, batch_size, time)
        self.sess = sess
        self.identity = hash_json([values.tolist() for values in self.windows])

    def loss(self) -> float:
        """The mean loss now, in nats a token."""
        return validating.mean_loss(self.sess, self.ops, self.windows)


class Trainer:
    """A run being trained: its operations, its place in the data, its saves.

    Attributes:
        run: what is saved along with the weights, kept up to date.
        last: the step after which to end, None for Ctrl-C.
    """

    def __init__(
        self,
        sess: tf.compat.v1.Session,
        state: session.GraphState,
        data: Data,
        config: Config,
        folder: str,
        samples: str,
        start: str,
        resume: bool,
        overwrite: bool = False,
        on_step: OnStep | None = None,
    ):
        """Builds what is missing in the session's graph, and goes to where the run was.

        Args:
            sess: holds the model, with the weights to start from.
            state: what the session's graph remembers.
            data: the tokens.
            config: settings.
            folder: the run's folder, locked.
            samples: the folder that samples are written to.
            start: the checkpoint that the weights came from.
            resume: whether that is the run's own latest: its steps go on counting.
            overwrite: with `resume`, remove the run's older checkpoints and events.
            on_step: called with each step's entry; training ends when it returns False.
        """
        self.sess, self.state, self.data, self.config = sess, state, data, config
        self.folder, self.samples, self.start, self.on_step = folder, samples, start, on_step
        window = training_window(data.chunks, config, state.hparams.n_ctx)
        self.ops = build(sess, state, config.step, window)
        self.sampler = WindowSampler(
            data.chunks, config.seed, config.sampling, config.pad_documents
        )
        self.validation = None
        if data.validation is not None:
            self.validation = Validation(sess, state, data.validation, config, window)
        self.saves = CheckpointManager(
            sess,
            state,
            folder,
            config.max_checkpoints,
            self.ops.state,
            start if resume else None,
        )
        self.sess.run(self.ops.initialize)
        self.run = self._resumed() if resume else self._new()
        if not resume and checkpoint.is_whole(os.path.join(folder, checkpoint.BEST)):
            say(f"Checkpoint 'best' in {folder} is that of an earlier training")
        steps = steps_to_take(data.chunks, config, window)
        self.last = None if steps is None else self.run.step + steps
        if self.validation:
            self._settle_best()
        if overwrite and resume:
            self.saves.overwrite()
        self.watch = RunLogger(folder, self.run, steps, config.print_every)
        self.interruption = Interruption(
            lambda: say("Stopping after this step, then saving; once more stops at once")
        )
        self.has_ended = False

    def _new(self) -> runs.RunState:
        seed = self.config.seed
        return runs.RunState() if seed is None else runs.RunState(seed=seed)

    def _resumed(self) -> runs.RunState:
        """The run as it was saved last, as far as it was."""
        if not self.saves.restore_optimizer():
            self.sess.run(self.ops.initialize)
        run = runs.read_state(self.start) or self._new()
        run.step = runs.step_of(self.start)
        if run.sampler is not None:
            try:
                self.sampler.restore(run.sampler)
            except ValueError as error:
                say(f"{error}: the data starts anew")
        return run

    def _settle_best(self) -> None:
        """Decides whether the best loss so far still counts, and how long patience lasts."""
        run, identity, patience = self.run, self.validation.identity, self.config.patience
        if run.best_loss is not None and run.validation != identity:
            say("The validation set is another than before: its best loss is yet to be found")
            run.best_loss, run.best_step, run.worse = None, 0, 0
        run.validation = identity
        if patience and run.worse >= patience:
            run.worse = 0  # that ended the last call; this one is wanted all the same

    def train(self) -> Result:
        """Trains to the end, saving on the way and at the end.

        Raises:
            Diverged: the loss, or a weight, is infinite or no number; the session then holds the
                last checkpoint's weights again.
            KeyboardInterrupt: a second Ctrl-C.
        """
        say("Training...")
        with (
            self.interruption,
            contextlib.closing(self.watch),
            contextlib.closing(self.saves),
        ):
            try:
                self.loop()
                if self.interruption.requested:
                    say("interrupted")
                say(f"data seen {self.sampler.times_seen:.1f} times so far")
                self.save()
            except Diverged as error:
                raise Diverged(f"{error}; {self.go_back()}") from None
            except tf.errors.ResourceExhaustedError:
                raise  # The weights may be those of half a step.
            except BrokenPipeError:
                with verbosity(0):  # nobody reads what is printed any more
                    self.rescue()
                raise
            except (Exception, SystemExit):
                self.rescue()
                raise
        return self.result()

    def loop(self) -> None:
        """Takes steps until the last, or whatever else ends the training."""
        config, run = self.config, self.run
        while not self.is_done:
            entry = self.take_step()
            if entry is None:
                break
            if self.validation and (run.step % config.val_every == 0 or run.step == self.last):
                entry = self.validate(entry)
            self.watch.log(entry)
            answer = self.on_step(entry) if self.on_step else None
            if isinstance(answer, (bool, np.bool_)) and not answer:
                self.has_ended = True
            if self.is_done:
                break  # train() saves
            if run.step % config.save_every == 0:
                self.save()
            if config.sample_every and run.step % config.sample_every == 0:
                self.write_samples()

    @property
    def is_done(self) -> bool:
        """Whether steps, early stopping, the callback or Ctrl-C have ended the training."""
        return self.run.step == self.last or self.has_ended or self.interruption.requested

    def take_step(self) -> history.Entry | None:
        """Draws a step's micro-batches and takes the step.

        Returns:
            The step's entry; None if Ctrl-C came before the step was taken.
        """
        started, before, loss = time.perf_counter(), self.sampler.state(), None
        rate = self.config.schedule.at(self.run.step + 1, self.last)
        batches = self.draw()
        try:
            loss = self.feed(batches, rate)
        finally:
            if loss is None:
                self.sampler.restore(before)
        if loss is None:
            return None
        if not math.isfinite(loss):
            raise Diverged(f"the loss is {loss} in step {self.run.step + 1}")
        self.run.step += 1
        tokens = sum(np.count_nonzero(batch[self.ops.weights]) for batch in batches)
        return self.watch.step(loss, rate, tokens, time.perf_counter() - started)

    def feed(self, batches: Sequence[dict[tf.Tensor, np.ndarray]], rate: float) -> float | None:
        """Runs a step; its loss, or None if Ctrl-C came before the weights changed."""
        ops = self.ops
        if ops.micro_step is None:
            return float(self.sess.run(ops.apply, {**batches[0], ops.learning_rate: rate}))
        self.sess.run(ops.reset)
        for batch in batches:
            self.sess.run(ops.micro_step, batch)
            if self.interruption.requested:
                return None
        if ops.finite is not None and not self.sess.run(ops.finite):
            say(f"step {self.run.step + 1} is skipped: float16 gradients overflowed")
            return float(self.sess.run(ops.skip))
        return float(self.sess.run(ops.apply, {ops.learning_rate: rate}))

    def draw(self) -> list[dict[tf.Tensor, np.ndarray]]:
        """A step's micro-batches, to be fed.

        Each token weighs as in one batch of them all: weights sum up to the number of batches,
        whose losses and gradients the step averages.
        """
        ops, count = self.ops, self.config.step.accumulate_gradients
        batches = [self.sampler.sample_weighted(*ops.tokens.shape) for _ in range(count)]
        scale = count / sum(float(batch.weights.sum()) for batch in batches)
        step = self.run.step + 1
        return [
            {
                ops.tokens: batch.tokens,
                ops.weights: batch.weights[:, 1:] * np.float32(scale),
                ops.dropout_seed: dropout_seed(self.run.seed, step, index),
            }
            for index, batch in enumerate(batches)
        ]

    def validate(self, entry: history.Entry) -> history.Entry:
        """Measures the validation loss, keeps the weights if it is the best, or ends the training.

        Returns:
            The step's entry, with the validation loss unless Ctrl-C came first.
        """
        loss = None
        with self.interruption.ends_block():
            loss = self.validation.loss()
        if loss is None:
            return entry
        if not math.isfinite(loss):
            raise Diverged(f"the validation loss is {loss} after step {self.run.step}")
        run, patience = self.run, self.config.patience
        entry = self.watch.validated(entry, loss, self.sampler.times_seen)
        run.validation_loss = loss
        if run.best_loss is None or loss < run.best_loss:
            run.best_loss, run.best_step, run.worse = loss, run.step, 0
            self.saves.save_best()
            return entry
        run.worse += 1
        if run.worse == min(2, patience or 2):
            say(
                f"Warning: the validation loss turns up, from {run.best_loss:.2f} in step "
                f"{run.best_step} to {loss:.2f}: the model begins to learn the dataset by heart. "
                f"Checkpoint 'best' keeps the weights of step {run.best_step}"
            )
        if patience and run.worse >= patience:
            say(f"Stopping: no better validation loss for {patience} validations")
            self.has_ended = True
        return entry

    def save(self) -> None:
        """Saves the run, unless its weights are not worth it."""
        if not self.saves.are_weights_finite():
            raise Diverged(f"a weight is infinite or no number after step {self.run.step}")
        self.run.sampler = self.sampler.state()
        self.saves.save(self.run)

    def rescue(self) -> None:
        """Saves what an error is about to end, unless saving is what failed."""
        if self.saves.failed or self.run.step == 0:
            return
        try:
            self.save()
        except Exception as error:
            say(f"could not save step {self.run.step}: {error}")

    def go_back(self) -> str:
        """Gives the session the last checkpoint's weights again; says so, and what to do now."""
        last = self.saves.latest or self.start
        variables = session.named_variables(self.state)
        checkpoint.restore(self.sess, self.state.built["restore"], last, variables)
        back = f"training stopped, and the session is back at {last}"
        if not self.saves.are_weights_finite():
            return (
                f"{back}, whose weights are no better: restore_from='fresh' starts from the model, "
                "a path from an older checkpoint"
            )
        return (
            f"{back}. Try a lower learning_rate than {self.config.schedule.learning_rate}, "
            "warmup_steps, or gradient_clip"
        )

    def write_samples(self) -> None:
        """Generates samples that each follow a token drawn from the dataset; says and writes them.

        They land in `samples/<run_name>/samples-<step + 1>`, as gpt-2-simple always named them.
        """
        config, step = self.config, self.run.step
        rng = np.random.default_rng([self.run.seed, step])
        chunk = self.data.chunks[rng.integers(len(self.data.chunks))]
        first = self.state.encoder.decode([chunk[rng.integers(len(chunk))]], surrogates=False)
        settings = SamplingParams(temperature=1.0, top_k=40)
        seed = int(rng.integers(1 << 31))
        end = StopCriteria()
        job = requests.GenerationRequest(
            (first,), config.sample_num, 1, config.sample_length, settings, seed, end
        )
        written: list[str] = []
        with self.interruption.ends_block():
            for text in text_stream.generate_texts(self.sess, self.state, job):
                written.append(f"======== SAMPLE {len(written) + 1} ========\n{text}\n")
                say(written[-1])
        if written:
            text = "\n".join(written)
            self.watch.samples(step, text)
            os.makedirs(self.samples, exist_ok=True)
            checkpoint.write_file(os.path.join(self.samples, f"samples-{step + 1}"), text)

    def result(self) -> Result:
        """What this call reached."""
        run, entries = self.run, self.watch.entries
        return Result(
            run.step,
            entries[-1].loss if entries else math.nan,
            self.watch.average,
            self.saves.latest,
            self.interruption.requested,
            entries,
            run.validation_loss,
            run.best_loss,
            run.best_step if run.best_loss is not None else None,
        )


def dropout_seed(seed: int, step: int, index: int) -> list[int]:
    """The seed of a micro-batch's dropout, int32 [2]: the same again when a run is resumed."""
    # The first number is shared with the places in the network, which are fewer than 2 ** 16.
    return np.random.default_rng([seed, step, index]).integers(2**31 - 2**16, size=2).tolist()


def training_window(chunks: Sequence[np.ndarray], config: Config, n_ctx: int) -> int:
    """Tokens in a window: as many as the settings say, or as the dataset has in a row."""
    wanted = min(config.step.sequence_length or n_ctx, n_ctx)
    joined = config.sampling == "epoch" and not config.pad_documents
    window = window_length(chunks, wanted, "epoch" if joined else "random")
    if window < wanted:
        say(f"no text of the dataset has {wanted} tokens: training on windows of {window}")
    return window


def steps_to_take(chunks: Sequence[np.ndarray], config: Config, window: int) -> int | None:
    """How many steps the settings ask for; None for as many as there is time."""
    if config.epochs is None:
        return None if config.steps == -1 else config.steps
    windows = config.step.batch_size * config.step.accumulate_gradients
    lengths = [len(chunk) for chunk in chunks]
    steps = steps_of_epochs(
        config.epochs, lengths, window, windows, config.sampling, config.pad_documents
    )
    say(f"epochs={config.epochs} are {steps} steps")
    return steps
