"""Validation losses in; which is the best, and whether they end the training, out."""

from __future__ import annotations

from typing import NamedTuple

from ..common.report import say
from ..storage.runs import RunState


class Verdict(NamedTuple):
    """What a validation loss means for the run.

    Attributes:
        is_best: it is the lowest so far: the weights are worth keeping.
        ends_training: `patience` validations in a row have not been better.
    """

    is_best: bool
    ends_training: bool = False


def begin(run: RunState, validation_set: str, patience: int) -> None:
    """Prepares a run's best loss and its patience for another call of finetune().

    Args:
        run: the run, changed in place.
        validation_set: identifies the windows that are validated on. A best loss that was measured
            on others does not count.
        patience: see TrainingSettings.
    """
    if run.best_loss is not None and run.validation_set != validation_set:
        say("The validation set is another than before: its best loss is yet to be found")
        run.best_loss, run.best_step, run.validations_without_improvement = None, 0, 0
    run.validation_set = validation_set
    if patience and run.validations_without_improvement >= patience:
        # That ended the last call; the user wants to train on all the same.
        run.validations_without_improvement = 0


def _no_improvement(run: RunState, loss: float) -> str:
    kept = f"Checkpoint 'best' keeps the weights of step {run.best_step}"
    if _is_best_again(run, loss):
        return (
            f"The validation loss stays at {run.best_loss:.2f} since step {run.best_step}. {kept}"
        )
    digits = 2 if f"{run.best_loss:.2f}" != f"{loss:.2f}" else 4
    return (
        f"Warning: the validation loss turns up, from {run.best_loss:.{digits}f} in step "
        f"{run.best_step} to {loss:.{digits}f}: the model begins to learn the dataset by heart. "
        f"{kept}"
    )


def _is_best_again(run: RunState, loss: float | None) -> bool:
    """Whether a loss is no lower than the best one and the same to four digits."""
    return loss is not None and f"{run.best_loss:.4f}" == f"{loss:.4f}"


def judge(run: RunState, loss: float, patience: int) -> Verdict:
    """Takes note of the validation loss after step `run.step`, and says what the user should know.

    Args:
        run: the run, changed in place.
        loss: nats a token.
        patience: see TrainingSettings.
    """
    last, run.validation_loss = run.validation_loss, loss
    if run.best_loss is None or loss < run.best_loss:
        run.best_loss, run.best_step, run.validations_without_improvement = loss, run.step, 0
        return Verdict(is_best=True)
    run.validations_without_improvement += 1
    first = min(2, patience or 2)
    # After a loss that stayed, a later one may turn up.
    turns_up = _is_best_again(run, last) and not _is_best_again(run, loss)
    if run.validations_without_improvement == first or (
        run.validations_without_improvement > first and turns_up
    ):
        say(_no_improvement(run, loss))
    ends = bool(patience) and run.validations_without_improvement >= patience
    if ends:
        say(f"Stopping: no better validation loss for {patience} validations")
    return Verdict(is_best=False, ends_training=ends)
