"""Ranges of the settings of generating, and of the parameters made from them."""

import pytest

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
        ({"no_repeat_ngram_size": -2}, "no_repeat_ngram_size=-2"),
        ({"stop_token": -5}, "stop_token=-5"),
        ({"bad_words": [[1], []]}, "empty word"),
    ],
)
def test_sampling_params_out_of_range(settings, message):
    with pytest.raises(ValueError, match=message):
        SamplingParams(**settings)


@pytest.mark.parametrize("change", [{"count": 0}, {"count": 1.5}, {"length_penalty": float("nan")}])
def test_beams_out_of_range(change):
    with pytest.raises(ValueError, match=str(next(iter(change.values())))):
        Beams(**change)
