"""Tokens and settings in, a trained run with its checkpoints and samples out: the training loop."""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from .. import session
from ..common import files
from ..common.errors import first_line
from ..common.report import say, verbosity, warn
from ..data.windows import WindowSampler, window_length, without_flags
from ..generation import generate
from ..generation.settings import GenerationSettings
from ..storage import checkpoint, runs
from ..storage.checkpoint_manager import CheckpointManager
from ..storage.load import restore_weights
from ..storage.optimizer_state import OptimizerState
from . import early_stopping, history, lora
from .interruption import Interruption
from .run_logger import RunLogger
from .schedule import learning_rate_at, steps_of_epochs
from .settings import TrainingSettings
from .step import build_train_ops
from .validation import Validation

# float16: so many skipped steps in a row at a loss scale of 1, the lowest, end a training.
MAX_UNSCALED_SKIPS = 5

# What is fed to a run of the graph, by placeholder.
Feeds = dict[tf.Tensor, Any]


class Data(NamedTuple):
    """Chunks of tokens: to train on, and to validate on if there is a validation set."""

    chunks: Sequence[np.ndarray]
    validation: Sequence[np.ndarray] | None = None


class Start(NamedTuple):
    """Where a training starts.

    Attributes:
        checkpoint: the prefix of the checkpoint to start from; an adapter's folder, if one is
            trained on.
        resumes: whether that is the run's own latest checkpoint: its steps go on counting.
        base: the prefix of the checkpoint that the session's weights came from. It is another one
            only if `checkpoint` is an adapter.
    """

    checkpoint: str
    resumes: bool
    base: str


class Result(NamedTuple):
    """What finetune() reached.

    Attributes:
        step: the run's last step, counted from its first call.
        loss: the last step's loss, in nats a token.
        average_loss: the printed average; the last loss if no step was printed.
        checkpoint: the prefix of the checkpoint with the final weights.
        interrupted: whether Ctrl-C ended the training, and not `steps`.
        history: an entry for each of this call's steps.
        validation_loss: the last one measured, None without validation.
        best_loss: the lowest validation loss of the run; its weights are checkpoint 'best'.
        best_step: the step that reached it.
    """

    step: int
    loss: float
    average_loss: float
    checkpoint: str | None
    interrupted: bool
    history: list[history.Entry]
    validation_loss: float | None = None
    best_loss: float | None = None
    best_step: int | None = None


class Diverged(RuntimeError):
    """The loss, or a weight, is infinite or not a number."""


class Trainer:
    """A run that is being trained: its operations, its place in the data, its checkpoints.

    Attributes:
        run: what is saved beside the weights, kept up to date.
        last_step: the step after which training ends; None goes on until Ctrl-C.
    """

    def __init__(
        self,
        sess: tf.compat.v1.Session,
        state: session.GraphState,
        data: Data,
        settings: TrainingSettings,
        folder: str,
        start: Start,
    ):
        """Builds what the session's graph lacks, and continues where the run was.

        Args:
            sess: holds the model, with the weights to start from.
            state: what the session's graph remembers.
            data: the tokens.
            settings: how to train; whether to recompute activations is decided in them.
            folder: the run's folder; the caller holds its lock.
            start: the checkpoint that the weights came from.

        Raises:
            ValueError: the run trains another adapter than the settings say.
        """
        self.sess, self.state, self.data, self.settings = sess, state, data, settings
        self.folder, self.start = folder, start
        # The current folder may change meanwhile.
        self._start_path = os.path.abspath(start.checkpoint)
        self._samples_folder = os.path.abspath(
            os.path.join(history.SAMPLES_FOLDER, settings.run_name)
        )
        window = training_window(data.chunks, settings, state.hparams.n_ctx)
        self.adapter = lora.attach_adapter(sess, state, settings, folder, start.base)
        self.ops = build_train_ops(state, settings.step, window)
        self.sampler = WindowSampler(
            data.chunks, settings.seed, settings.sampling, settings.pad_documents
        )
        self.validation = None
        if data.validation is not None:
            self.validation = Validation(sess, state, data.validation, settings, window)
        self.checkpoints = self._manage_checkpoints()
        sess.run(self.ops.initialize_state)
        self.run = self._begin_run()
        steps = steps_to_take(self.sampler, settings, window)
        self.last_step = None if steps is None else self.run.step + steps
        if self.validation:
            early_stopping.begin(self.run, self.validation.identity, settings.patience)
        if settings.overwrite and start.resumes:
            self.checkpoints.overwrite()
        self.logger = self._open_logger(steps)
        self.interruption = Interruption(
            lambda: say("Stopping after this step, then saving; once more stops at once")
        )
        self.has_ended = False
        self._is_updating = False
        self._n_skipped_unscaled = 0

    def _manage_checkpoints(self) -> CheckpointManager:
        return CheckpointManager(
            self.sess,
            self.state,
            self.folder,
            self.settings.max_checkpoints,
            self._optimizer_state(),
            self.start.checkpoint if self.start.resumes else None,
            self.adapter,
        )

    def _optimizer_state(self) -> OptimizerState:
        return OptimizerState(self.sess, self.state, self.ops.state_variables)

    def _open_logger(self, steps: int | None) -> RunLogger:
        folder = os.path.abspath(self.folder)
        return RunLogger(folder, self.run, steps, self.settings.print_every)

    def _begin_run(self) -> runs.RunState:
        run = self._resumed_run() if self.start.resumes else self._new_run()
        if self.adapter:
            lora.restore_adapter(self.state, self.adapter, self._start_path, run.seed)
        return run

    def _new_run(self) -> runs.RunState:
        if checkpoint.is_whole(os.path.join(self.folder, checkpoint.BEST)):
            say(f"Checkpoint 'best' in {self.folder} is that of an earlier training")
        return self._fresh_state()

    def _fresh_state(self) -> runs.RunState:
        seed = self.settings.seed
        return runs.RunState() if seed is None else runs.RunState(seed=seed)

    def _resumed_run(self) -> runs.RunState:
        """The run as its latest checkpoint has it; what cannot be read starts anew."""
        if not self.checkpoints.optimizer_state.restore(self.start.checkpoint):
            self.sess.run(self.ops.initialize_state)
        run = runs.read_state(self.start.checkpoint) or self._fresh_state()
        run.step = runs.step_of(self.start.checkpoint)
        if run.sampler is not None:
            try:
                self.sampler.restore(run.sampler)
            except ValueError as error:
                say(f"{error}: the data starts anew")
        return run

    # --- the loop ---------------------------------------------------------------------------------

    def train(self) -> Result:
        """Trains to the end, and saves on the way and at the end.

        Raises:
            Diverged: the loss, or a weight, is infinite or not a number; the session then holds
                the last checkpoint's weights again.
            KeyboardInterrupt: a second Ctrl-C.
        """
        say("Training...")
        if self.last_step is None:
            until = "you interrupt it (Ctrl-C), which saves"
            if self.settings.patience:
                until = (
                    "the validation loss gets no better "
                    f"(patience={self.settings.patience}), or {until}"
                )
            say(f"No steps or epochs were given: the training goes on until {until}")
        with (
            self.interruption,
            contextlib.closing(self.logger),
            contextlib.closing(self.checkpoints),
        ):
            try:
                self.loop()
                if self.interruption.requested:
                    say("interrupted")
                say(f"data seen {self.sampler.times_seen:.1f} times so far")
                self.save_and_tell()
            except Diverged as error:
                raise Diverged(f"{error}; {self.restore_last_checkpoint()}") from None
            except BrokenPipeError:
                with verbosity(0):  # nobody reads what is printed any more
                    self.save_before_error()
                raise
            except BaseException as error:
                if self._is_worth_saving(error):
                    self.save_before_error()
                raise
        return self.result()

    def _is_worth_saving(self, error: BaseException) -> bool:
        """Whether the weights are whole, and the user did not ask twice to stop."""
        if isinstance(error, tf.errors.ResourceExhaustedError):
            return not self._is_updating
        return not (isinstance(error, KeyboardInterrupt) and self.interruption.requested_twice)

    def loop(self) -> None:
        """Takes steps until the last, or until something else ends the training."""
        settings, run = self.settings, self.run
        while not self.is_done:
            entry = self.take_step()
            if entry is None:
                break
            if self.validation and self._is_due(settings.val_every, at_end=True):
                entry = self.validate(self.validation, entry)
            self.logger.log(entry)
            self.call_on_step(entry)
            if self.is_done:
                break  # train() saves
            if self._is_due(settings.save_every):
                self.save_and_tell()
            if settings.samples and self._is_due(settings.sample_every):
                self.write_samples(run.step)

    def call_on_step(self, entry: history.Entry) -> None:
        """Tells the caller of a step; the answer may end the training."""
        if self.settings.on_step and history.ends_training(self.settings.on_step(entry)):
            self.has_ended = True

    def _is_due(self, every: int, at_end: bool = False) -> bool:
        """Whether the step just taken is one of every so many, or the last one."""
        return self.run.step % every == 0 or (at_end and self.run.step == self.last_step)

    @property
    def is_done(self) -> bool:
        """Whether steps, early stopping, the callback or Ctrl-C have ended the training."""
        return self.run.step == self.last_step or self.has_ended or self.interruption.requested

    # --- one step ---------------------------------------------------------------------------------

    def take_step(self) -> history.Entry | None:
        """Draws a step's micro-batches and takes the step.

        Returns:
            The step's entry; None if Ctrl-C came before the step was taken.
        """
        started, position, loss = time.perf_counter(), self.sampler.state(), None
        learning_rate = learning_rate_at(self.settings, self.run.step + 1, self.last_step)
        batches = self.next_batches()
        try:
            loss = self.run_step(batches, learning_rate)
        finally:
            if loss is None:
                self.sampler.restore(position)
        if loss is None:
            return None
        if not math.isfinite(loss):
            raise Diverged(f"the loss is {loss} in step {self.run.step + 1}")
        self.run.step += 1
        n_targets = sum(int(np.count_nonzero(batch[self.ops.loss_weights])) for batch in batches)
        seconds = time.perf_counter() - started
        return self.logger.step(loss, learning_rate, n_targets, seconds)

    def next_batches(self) -> list[Feeds]:
        """A step's micro-batches, as what is fed.

        Each token weighs as in one batch of them all: the weights sum up to the number of
        micro-batches, whose losses and gradients the step averages.
        """
        ops, count = self.ops, self.settings.accumulate_gradients
        batches = [self.sampler.next_batch(*ops.tokens.shape.as_list()) for _ in range(count)]
        n_targets = sum(float(batch.loss_mask.sum()) for batch in batches)
        scale = count / max(n_targets, 1)  # with train_on, a step may show nothing to learn
        step = self.run.step + 1
        return [
            {
                ops.tokens: batch.tokens,
                ops.loss_weights: batch.loss_mask * np.float32(scale),
                ops.dropout_seed: dropout_seed(self.run.seed, step, index),
            }
            for index, batch in enumerate(batches)
        ]

    def run_step(self, batches: Sequence[Feeds], learning_rate: float) -> float | None:
        """Runs a step; returns its loss, or None if Ctrl-C came before the weights changed."""
        ops = self.ops
        if ops.add_micro_batch is None:
            return self._update({**batches[0], ops.learning_rate: learning_rate})
        self.sess.run(ops.reset_gradients)
        if not self.accumulate(batches):
            return None
        if ops.gradients_finite is not None and not self.sess.run(ops.gradients_finite):
            return self._skip()
        self._n_skipped_unscaled = 0
        return self._update({ops.learning_rate: learning_rate})

    def accumulate(self, batches: Sequence[Feeds]) -> bool:
        """Sums the gradients of micro-batches; False if Ctrl-C came before all were summed."""
        for batch in batches:
            self.sess.run(self.ops.add_micro_batch, batch)
            if self.interruption.requested:
                return False
        return True

    def _update(self, feed: Feeds) -> float:
        """Changes the weights; an error in between may leave half of the change."""
        self._is_updating = True
        loss = float(self.apply_gradients(feed))
        self._is_updating = False
        return loss

    def apply_gradients(self, feed: Feeds) -> Any:
        """Takes the step's update; returns its loss."""
        return self.sess.run(self.ops.apply_gradients, feed)

    def _skip(self) -> float:
        """Halves the loss scale instead of changing the weights."""
        step = self.run.step + 1
        say(f"step {step} is skipped: float16 gradients overflowed")
        loss = float(self.sess.run(self.ops.skip_step))
        is_unscaled = self.sess.run(self.ops.loss_scale) <= 1
        self._n_skipped_unscaled = self._n_skipped_unscaled + 1 if is_unscaled else 0
        if self._n_skipped_unscaled >= MAX_UNSCALED_SKIPS:
            raise Diverged(
                f"float16 gradients overflow even at a loss scale of 1: {MAX_UNSCALED_SKIPS} steps "
                f"in a row were skipped, the last was step {step}; precision='bfloat16' has the "
                "range of float32"
            )
        return loss

    # --- between steps ----------------------------------------------------------------------------

    def validate(self, validation: Validation, entry: history.Entry) -> history.Entry:
        """Measures the validation loss; keeps the best weights, or ends the training.

        Returns:
            The step's entry, with the validation loss unless Ctrl-C came first.
        """
        loss = self.validation_loss(validation)
        if loss is None:
            return entry
        if not math.isfinite(loss):
            raise Diverged(f"the validation loss is {loss} after step {self.run.step}")
        entry = self.logger.validated(entry, loss, self.sampler.times_seen)
        best = (self.run.best_loss, self.run.best_step)
        verdict = early_stopping.judge(self.run, loss, self.settings.patience)
        if verdict.is_best:
            try:
                self.checkpoints.save_best()
            except OSError as error:  # It may pass: the next validation tries again.
                self.run.best_loss, self.run.best_step = best
                warn(f"the best weights so far are not kept: {error}")
        self.has_ended = self.has_ended or verdict.ends_training
        return entry

    def validation_loss(self, validation: Validation) -> float | None:
        """The validation loss now, in nats a token; None if Ctrl-C came first."""
        loss = None
        with self.interruption.ends_block():
            loss = validation.loss()
        return loss

    def save(self) -> None:
        """Saves the run, unless one of its weights is infinite or not a number."""
        if not self.checkpoints.are_weights_finite():
            raise Diverged(f"a weight is infinite or no number after step {self.run.step}")
        self.run.sampler = self.sampler.state()
        self.checkpoints.save(self.run)

    def save_and_tell(self) -> None:
        """Saves the run, and tells who wants to know it."""
        self.save()
        if self.state.on_save is not None:
            self.state.on_save(self)

    def save_before_error(self) -> None:
        """Saves what an error is about to end; the error of a save may have passed by now."""
        if self.run.step == 0:
            return
        is_save_error = self.checkpoints.failed
        try:
            self.save()
        except Exception as error:
            if not is_save_error:  # Else the user is told already.
                say(f"could not save step {self.run.step}: {error}")

    def restore_last_checkpoint(self) -> str:
        """Gives the session the last checkpoint's weights again; tells what to do now."""
        last = self.checkpoints.latest or self.start.checkpoint
        try:
            path = self.checkpoints.latest_path or self._start_path
            if self.adapter:
                lora.restore_adapter(self.state, self.adapter, path, self.run.seed)
            else:
                restore_weights(self.sess, self.state, path)
        except (OSError, ValueError, tf.errors.OpError) as error:
            return (
                "training stopped, and the session keeps these weights, as the last checkpoint "
                f"cannot be restored: {first_line(error)}. Load another one by load_gpt2()"
            )
        back = f"training stopped, and the session is back at {last}"
        if not self.checkpoints.are_weights_finite():
            return (
                f"{back}, whose weights are no better: restore_from='fresh' starts from the model, "
                "a path from an older checkpoint"
            )
        return (
            f"{back}. Try a lower learning_rate than {self.settings.learning_rate}, "
            "warmup_steps, or gradient_clip"
        )

    def write_samples(self, step: int) -> None:
        """Generates samples, each after a token drawn from the dataset; prints and writes them.

        They land in `samples/<run_name>/samples-<step + 1>`, the name that gpt-2-simple 0.8.1
        gave them. Each is written before it is printed.
        """
        settings = self.settings
        rng = np.random.default_rng([self.run.seed, step])
        chunk = self.data.chunks[int(rng.integers(len(self.data.chunks)))]
        ids, _ = without_flags(chunk)
        first = self.state.encoder.decode([int(ids[rng.integers(len(ids))])], surrogates=False)
        request = GenerationSettings(
            prefix=first,
            seed=int(rng.integers(1 << 31)),
            nsamples=settings.sample_num,
            length=settings.sample_length,
            temperature=1.0,
            top_k=40,
        )
        samples: list[str] = []
        with self.interruption.ends_block():
            for _, text in generate.iterate_texts(self.sess, request):
                samples.append(f"======== SAMPLE {len(samples) + 1} ========\n{text}\n")
                self._write_samples_file(step, "\n".join(samples))
                say(samples[-1])
        if samples:
            self.logger.samples(step, "\n".join(samples))

    def _write_samples_file(self, step: int, text: str) -> None:
        try:
            os.makedirs(self._samples_folder, exist_ok=True)
            files.write_text(os.path.join(self._samples_folder, f"samples-{step + 1}"), text)
        except OSError as error:
            warn(f"samples cannot be written in {self._samples_folder}: {error}")

    def result(self) -> Result:
        """What this call reached."""
        run, entries = self.run, self.logger.entries
        return Result(
            run.step,
            entries[-1].loss if entries else math.nan,
            self.logger.average,
            self.checkpoints.latest,
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


def training_window(chunks: Sequence[np.ndarray], settings: TrainingSettings, n_ctx: int) -> int:
    """Tokens in a window: as many as the settings say, or as the dataset has in a row."""
    wanted = min(settings.sequence_length or n_ctx, n_ctx)
    window = window_length(chunks, wanted, settings.sampling, settings.pad_documents)
    if window < wanted:
        say(f"no text of the dataset has {wanted} tokens: training on windows of {window}")
    return window


def steps_to_take(sampler: WindowSampler, settings: TrainingSettings, window: int) -> int | None:
    """How many steps the settings ask for; None goes on until Ctrl-C."""
    if settings.epochs is None:
        return None if settings.steps == -1 else settings.steps
    windows_per_step = settings.batch_size * settings.accumulate_gradients
    steps = steps_of_epochs(settings.epochs, sampler.windows_per_epoch(window), windows_per_step)
    say(f"epochs={settings.epochs:g} are {steps} steps")
    return steps
