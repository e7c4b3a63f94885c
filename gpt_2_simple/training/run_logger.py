"""Losses in; printed lines, a progress bar, TensorBoard events and the history file out."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import tensorflow as tf

from ..common.errors import first_line
from ..common.report import progress, say, warn
from ..storage.runs import RunState
from . import history

EVENTS = "TensorBoard's events file"


class RunLogger:
    """What a user sees of a training run, and what its folder keeps of it.

    Attributes:
        entries: what each step of this call reached.
    """

    def __init__(self, folder: str | None, run: RunState, steps: int | None, print_every: int):
        """Opens the files.

        Args:
            folder: the run's; None writes no files.
            run: its `losses` and `seconds` are kept up to date.
            steps: how many steps this call takes, None if nobody knows.
            print_every: steps between lines.
        """
        self.run, self.print_every = run, print_every
        self.entries: list[history.Entry] = []
        self._started = time.time()
        self._seconds_before = run.seconds
        # Seconds and predicted tokens of the steps since the last logged one.
        self._step_seconds, self._n_targets = 0.0, 0
        self._tokens_per_second, self._loss = 0.0, math.nan
        self._failed: set[str] = set()
        self._history: history.History | None = None
        self._events: Any = None
        if folder is not None:
            self._history = history.History(folder, run.step)
            self._write(EVENTS, lambda: self._open_events(folder, f".{run.step}"))
        self._bar = progress(total=steps, desc="Training", unit="step", leave=False)

    def close(self) -> None:
        """Closes the files."""
        self._bar.close()
        if self._history is not None:
            self._write(history.HISTORY, self._history.close)
        if self._events is not None:
            self._write(EVENTS, self._events.close)

    def _write(self, name: str, write: Callable[[], object]) -> None:
        """Writes to a file that the run can do without: a failure is a warning, the first time."""
        try:
            write()
        except (OSError, RuntimeError, ValueError, tf.errors.OpError) as error:
            if name not in self._failed:
                self._failed.add(name)
                warn(f"{name} cannot be written: {first_line(error)}. The training goes on")

    def _open_events(self, folder: str, suffix: str) -> None:
        # The file's name tells the second. Without the suffix, a second call in it writes over it.
        with tf.Graph().as_default():  # A FileWriter wants a graph, not eager mode.
            self._events = tf.compat.v1.summary.FileWriter(folder, filename_suffix=suffix)

    @property
    def seconds(self) -> float:
        """The time since this call began to train."""
        return time.time() - self._started

    @property
    def average(self) -> float:
        """The loss, averaged with a decay of 0.99 a printed step; before one, the last loss."""
        total, weight = self.run.losses
        return total / weight if weight else self._loss

    def is_logged(self, step: int) -> bool:
        """Whether a step has a line of its own."""
        return step % self.print_every == 0

    def step(
        self, loss: float, learning_rate: float, n_targets: int, seconds: float
    ) -> history.Entry:
        """Takes note of a step, and prints a line every `print_every` steps.

        Args:
            loss: the step's, in nats a token.
            learning_rate: the step's.
            n_targets: how many tokens it predicted.
            seconds: how long it took.

        Returns:
            The step's entry.
        """
        step = self.run.step
        self.run.seconds = self._seconds_before + self.seconds
        self._step_seconds += seconds
        self._n_targets += n_targets
        self._loss = loss
        if self.is_logged(step) or not self._tokens_per_second:
            self._tokens_per_second = self._n_targets / max(self._step_seconds, 1e-9)
            self._step_seconds, self._n_targets = 0.0, 0
        if self.is_logged(step):
            total, weight = self.run.losses
            self.run.losses = (total * 0.99 + loss, weight * 0.99 + 1.0)
            say(f"[{step} | {self.seconds:2.2f}] loss={loss:2.2f} avg={self.average:2.2f}")
        figures = {
            "loss": f"{loss:.2f}",
            "avg": f"{self.average:.2f}",
            "tok/s": self._tokens_per_second,
        }
        self._bar.set_postfix(figures, refresh=False)
        self._bar.update()
        return history.Entry(
            step,
            round(self.run.seconds, 3),
            loss,
            learning_rate,
            round(float(self._tokens_per_second), 1),
        )

    def validated(self, entry: history.Entry, loss: float, times_seen: float) -> history.Entry:
        """Prints a validation loss, and adds it to the step's entry."""
        say(
            f"[{entry.step} | {self.seconds:2.2f}] validation loss={loss:2.2f} "
            f"perplexity={perplexity(loss):2.2f}, data seen {times_seen:.1f} times"
        )
        return entry._replace(validation_loss=loss)

    def log(self, entry: history.Entry) -> None:
        """Adds a step to the history and the events."""
        self.entries.append(entry)
        scalars = {"loss": entry.loss}
        if self.is_logged(entry.step) or entry.validation_loss is not None:
            self._add_to_history(entry)
            scalars["learning_rate"] = entry.learning_rate
            scalars["tokens_per_second"] = entry.tokens_per_second
        if entry.validation_loss is not None:
            scalars["validation_loss"] = entry.validation_loss
            scalars["perplexity"] = perplexity(entry.validation_loss)
        self._add_scalars(entry.step, scalars)

    def _add_to_history(self, entry: history.Entry) -> None:
        if self._history is not None:
            add = self._history.add
            self._write(history.HISTORY, lambda: add(entry))

    def samples(self, step: int, text: str) -> None:
        """Adds samples to the events, as text."""
        plugin = tf.compat.v1.SummaryMetadata.PluginData(plugin_name="text")
        value = tf.compat.v1.Summary.Value(
            tag="samples",
            metadata=tf.compat.v1.SummaryMetadata(plugin_data=plugin),
            tensor=tf.make_tensor_proto([text.encode("utf-8", "replace")], tf.string),
        )
        self._add_summary([value], step)

    def _add_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        values = [
            tf.compat.v1.Summary.Value(tag=tag, simple_value=value)
            for tag, value in scalars.items()
        ]
        self._add_summary(values, step)

    def _add_summary(self, values: Sequence[Any], step: int) -> None:
        if self._events is not None:
            summary = tf.compat.v1.Summary(value=values)
            self._write(EVENTS, lambda: self._events.add_summary(summary, step))


def perplexity(loss: float) -> float:
    """The exponential of a loss in nats a token; infinite where that is no float."""
    return math.exp(loss) if loss < 700 else math.inf
