"""A step's number in, its learning rate out; epochs in, the number of steps out."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from .settings import TrainingSettings


def learning_rate_at(settings: TrainingSettings, step: int, last_step: int | None) -> float:
    """The learning rate of a step, after `warmup_steps` and `lr_schedule`.

    A linear warm-up, then a constant rate or one that falls in a line or in half a cosine wave
    (Loshchilov & Hutter 2017, SGDR, arXiv:1608.03983).

    Args:
        settings: learning_rate, warmup_steps, lr_schedule and min_learning_rate.
        step: the step, counted from 1 over the run's whole life.
        last_step: the step after which training ends; None if nobody knows, which only a constant
            schedule allows.

    Returns:
        The rate. It rises over steps 1 to `warmup_steps`, is `learning_rate` in the step after
        them, and `min_learning_rate` in the last step unless the schedule is constant.
    """
    highest, lowest, warmup = (
        settings.learning_rate,
        settings.min_learning_rate,
        settings.warmup_steps,
    )
    if step <= warmup:
        return highest * step / warmup
    if settings.lr_schedule == "constant" or last_step is None:
        return highest
    done = (step - warmup - 1) / max(last_step - warmup - 1, 1)
    left = 1 - done if settings.lr_schedule == "linear" else (1 + math.cos(math.pi * done)) / 2
    return lowest + left * (highest - lowest)


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
