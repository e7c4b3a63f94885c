"""A step's number in, its learning rate out; epochs in, the number of steps out."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

SCHEDULES = ("constant", "linear", "cosine")


@dataclasses.dataclass(frozen=True)
class Schedule:
    """How the learning rate goes over the steps of a run.

    Attributes:
        learning_rate: the highest rate, at which a constant schedule stays.
        warmup_steps: the run's first steps, over which the rate rises to that.
        lr_schedule: 'constant', or how it falls after them: 'linear', or 'cosine' (half a wave, as
            Loshchilov & Hutter 2017 have it).
        min_learning_rate: where it arrives in the last step.
    """

    learning_rate: float = 0.0001
    warmup_steps: int = 0
    lr_schedule: str = "constant"
    min_learning_rate: float = 0.0

    def __post_init__(self) -> None:
        """Raises ValueError for a value out of its range."""
        if not _is_number(self.learning_rate) or not 0 < self.learning_rate < math.inf:
            raise ValueError(f"learning_rate={self.learning_rate!r} must be a number above 0")
        least = self.min_learning_rate
        if not _is_number(least) or not 0 <= least <= self.learning_rate:
            raise ValueError(
                f"min_learning_rate={least!r} must be from 0 to learning_rate={self.learning_rate}"
            )
        if self.lr_schedule not in SCHEDULES:
            raise ValueError(
                f"lr_schedule={self.lr_schedule!r} must be one of {', '.join(SCHEDULES)}"
            )

    def check_end(self, last: int | None) -> None:
        """Raises ValueError if the rate is to fall, but nobody knows until when."""
        if self.lr_schedule != "constant" and last is None:
            raise ValueError(
                f"lr_schedule={self.lr_schedule!r} falls until the last step: give steps or epochs"
            )

    def at(self, step: int, last: int | None) -> float:
        """The learning rate of a step.

        Args:
            step: the run's steps are counted from 1.
            last: the last step; None if there is none, for a constant schedule.

        Returns:
            The rate: rising over steps 1 to `warmup_steps`, highest in the one after, and
            min_learning_rate in the last unless the schedule is constant.
        """
        if step <= self.warmup_steps:
            return float(self.learning_rate * step / self.warmup_steps)
        if self.lr_schedule == "constant" or last is None:
            return float(self.learning_rate)
        done = (step - self.warmup_steps - 1) / max(last - self.warmup_steps - 1, 1)
        left = 1 - done if self.lr_schedule == "linear" else (1 + math.cos(math.pi * done)) / 2
        return float(self.min_learning_rate + left * (self.learning_rate - self.min_learning_rate))


def steps_of_epochs(
    epochs: float,
    lengths: Sequence[int],
    window: int,
    windows_in_step: int,
    sampling: str = "random",
    pad_documents: bool = False,
) -> int:
    """How many steps predict every token `epochs` times: on average, where windows are random.

    Args:
        epochs: how often to see the data.
        lengths: tokens in each chunk of the dataset.
        window: tokens in a window, of which all but the first are predicted.
        windows_in_step: windows in a batch, times the batches of a step.
        sampling: as in WindowSampler, whose windows are counted here.
        pad_documents: as in WindowSampler.

    Returns:
        The number of steps, at least 1.
    """
    sizes = np.asarray(lengths, np.int64)
    predicted = window - 1
    if pad_documents:
        windows = float((-(-np.maximum(sizes - 1, 0) // predicted)).sum())
    elif sampling == "epoch":
        windows = math.ceil((int(sizes.sum()) - 1) / predicted)
    else:
        windows = float(np.maximum(sizes - 1, 0).sum()) / predicted
    return max(1, math.ceil(epochs * windows / windows_in_step))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float, np.number)) and not isinstance(value, bool)
