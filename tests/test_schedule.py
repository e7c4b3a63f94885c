"""Learning rates by step, and epochs as steps."""

import numpy as np
import pytest

from gpt_2_simple.data.windows import WindowSampler
from gpt_2_simple.training.schedule import learning_rate_at, steps_of_epochs
from gpt_2_simple.training.settings import TrainingSettings


def rates(last, **settings):
    settings = TrainingSettings("", steps=last, learning_rate=1.0, **settings)
    return [learning_rate_at(settings, step, last) for step in range(1, last + 1)]


def test_a_constant_schedule_keeps_the_learning_rate():
    assert rates(5) == [1.0] * 5
    assert learning_rate_at(TrainingSettings("", learning_rate=0.3), 10**6, None) == 0.3


def test_warmup_rises_to_the_full_learning_rate():
    assert rates(6, warmup_steps=4) == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_linear_schedule_ends_at_min_learning_rate():
    assert rates(5, lr_schedule="linear") == [1.0, 0.75, 0.5, 0.25, 0.0]
    falling = rates(7, lr_schedule="linear", warmup_steps=2, min_learning_rate=0.5)
    assert falling == [0.5, 1.0, 1.0, 0.875, 0.75, 0.625, 0.5]


def test_cosine_schedule_is_half_a_wave():
    falling = rates(5, lr_schedule="cosine", min_learning_rate=0.2)
    assert falling == pytest.approx([1.0, 0.2 + 0.8 * (1 + 0.5**0.5) / 2, 0.6, 0.31716, 0.2], 1e-4)


def test_warmup_may_be_longer_than_training():
    assert rates(2, warmup_steps=4, lr_schedule="cosine") == [0.25, 0.5]


def test_single_step_takes_the_full_learning_rate():
    assert rates(1, lr_schedule="linear") == [1.0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"learning_rate": 0}, "learning_rate=0 must be a number above 0"),
        ({"learning_rate": float("nan")}, "learning_rate=nan"),
        ({"learning_rate": "fast"}, "learning_rate='fast'"),
        ({"min_learning_rate": 1.0}, "min_learning_rate=1.0 must be from 0 to learning_rate="),
        ({"min_learning_rate": -1e-9}, "min_learning_rate=-1e-09 must be"),
        ({"lr_schedule": "exponential"}, "lr_schedule='exponential' must be one of 'constant',"),
    ],
)
def test_wrong_schedule_settings_raise_value_error(settings, message):
    with pytest.raises(ValueError, match=message):
        TrainingSettings("", **settings)


def test_falling_schedule_needs_steps_or_epochs():
    with pytest.raises(ValueError, match="give steps or epochs"):
        TrainingSettings("", lr_schedule="cosine")
    TrainingSettings("", lr_schedule="cosine", steps=10)
    TrainingSettings("", lr_schedule="cosine", epochs=0.5)


@pytest.mark.parametrize(
    ("sampling", "pad_documents"), [("random", False), ("epoch", False), ("epoch", True)]
)
def test_steps_of_epochs_show_all_data_that_often(sampling, pad_documents):
    chunks = [np.arange(size, dtype=np.int32) for size in (100, 3, 1, 57, 220)]
    sampler = WindowSampler(chunks, 1, sampling, pad_documents)
    steps = steps_of_epochs(3, sampler.windows_per_epoch(8), 4)
    for _ in range(steps - 1):
        sampler.next_batch(4, 8)
    assert sampler.times_seen < 3
    sampler.next_batch(4, 8)
    assert 3 <= sampler.times_seen < 3.3


def test_epochs_take_at_least_one_step():
    assert steps_of_epochs(0.01, 9 / 7, 4) == 1
