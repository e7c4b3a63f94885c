"""Ranges of the settings of generating, and of the parameters made from them."""

import dataclasses

import numpy as np
import pytest

from gpt_2_simple.generation.settings import LOADED_RUN, GenerationSettings
from gpt_2_simple.sample import Beams, SamplingParams


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -0.1}, "temperature=-0.1"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"temperature": "hot"}, "temperature='hot'"),
        ({"top_p": 1.5}, "top_p=1.5"),
        ({"top_p": -1}, "top_p=-1"),
        ({"top_k": -1}, "top_k=-1"),
        ({"top_k": 2.5}, "top_k=2.5"),
        ({"top_k": True}, "top_k=True"),
        ({"repetition_penalty": 0}, "repetition_penalty=0"),
        (
            {"repetition_penalty": 1e-40},
            "repetition_penalty=1e-40 must be a number from 0.01 to 100",
        ),
        (
            {"repetition_penalty": 1e300},
            "repetition_penalty=1e.300 must be a number from 0.01 to 100",
        ),
        ({"temperature": 10**400}, "temperature=10"),
        ({"no_repeat_ngram_size": -2}, "no_repeat_ngram_size=-2"),
        ({"stop_token": -5}, "stop_token=-5"),
        ({"bad_words": [[1], []]}, "empty word"),
        ({"presence_penalty": 2.5}, "presence_penalty=2.5"),
        ({"frequency_penalty": float("nan")}, "frequency_penalty=nan"),
        ({"logit_bias": [(1, 1e9)]}, "logit_bias="),
        ({"logit_bias": [(1, 10**400)]}, "logit_bias="),
    ],
)
def test_sampling_params_out_of_range(settings, message):
    with pytest.raises(ValueError, match=message):
        SamplingParams(**settings)


@pytest.mark.parametrize("change", [{"count": 0}, {"count": 1.5}, {"length_penalty": float("nan")}])
def test_beams_out_of_range(change):
    with pytest.raises(ValueError, match=str(next(iter(change.values())))):
        Beams(**change)


def test_sampling_params_and_beams_have_the_defaults_of_generate():
    settings = GenerationSettings()
    shared = {
        field.name: getattr(settings, field.name)
        for field in dataclasses.fields(SamplingParams)
        if field.name not in ("bad_words", "stop_token", "logit_bias")
    }
    assert SamplingParams(**shared) == SamplingParams()
    assert Beams(settings.num_beams, settings.length_penalty) == Beams()


def test_numpy_values_become_pythons():
    settings = GenerationSettings(
        nsamples=np.int64(4),
        batch_size=np.int32(2),
        temperature=np.float32(0.5),
        stop_token=np.int16(7),
        prefix=np.array("a b".split()),
        verbose=False,
    )
    assert settings.prefixes == ("a", "b")
    assert settings.n_texts == 8
    values = [settings.nsamples, settings.batch_size, settings.temperature, settings.stop_token]
    assert [type(value) for value in [*values, settings.verbose]] == [int, int, float, int, int]


def test_run1_by_name_differs_from_the_default_run_name():
    assert GenerationSettings().run_name is LOADED_RUN
    assert GenerationSettings(run_name="run1").run_name is not LOADED_RUN
