"""A step's number in, its learning rate out; epochs in, the number of steps out."""

from __future__ import annotations

import math

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


def steps_of_epochs(epochs: float, windows_per_epoch: float, windows_per_step: int) -> int:
    """How many steps predict every token `epochs` times: on average, where windows are random.

    Args:
        epochs: how often to see the data.
        windows_per_epoch: from WindowSampler.windows_per_epoch().
        windows_per_step: windows in a batch, times the batches of a step.

    Returns:
        The number of steps, at least 1.
    """
    return max(1, math.ceil(epochs * windows_per_epoch / windows_per_step))
