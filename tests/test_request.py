"""Requests made from settings: token ids, rows at the same time, and what is refused."""

import numpy as np
import pytest

from gpt_2_simple import model
from gpt_2_simple.data import vocabulary
from gpt_2_simple.generation import request
from gpt_2_simple.generation.settings import GenerationSettings

ENCODER = vocabulary.byte_vocabulary()
HPARAMS = model.HParams(257, 32, 16, 2, 2)


def build(**settings):
    return request.build_request(GenerationSettings(**settings), ENCODER, HPARAMS)


def test_max_rows_fit_in_the_cache_limit():
    assert build(nsamples=5, batch_size=None).max_rows == 5
    assert build(nsamples=5000, batch_size=None).max_rows == request.MAX_ROWS
    assert request.max_rows(model.HParams(50257, 1024, 1600, 25, 48), 5000) == 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prefix": []}, r"prefix=\[\]"),
        ({"prefix": [b"x"]}, "string"),
        ({"stop": ("",)}, "empty string"),
        ({"stop_token": "nothing such"}, "is no token"),
        ({"nsamples": 10, "batch_size": 3}, "multiple of batch_size=3"),
    ],
)
def test_impossible_requests_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        build(**settings)


def test_bad_words_are_forbidden_with_and_without_a_space_before():
    space = ENCODER.encode(" ")[0]
    expected = sorted([(110, 111), (space, 110, 111)])
    assert build(bad_words=["no"]).sampling.bad_words == tuple(expected)
    with pytest.raises(ValueError, match="empty string"):
        build(bad_words=[""])


def test_logit_bias_names_tokens_as_text_or_ids():
    n, end = ENCODER.encode("n")[0], ENCODER.end_of_text
    assert build(logit_bias={"n": 2, np.int64(5): -1.5}).sampling.logit_bias == (
        (n, 2.0),
        (5, -1.5),
    )
    assert build(logit_bias=["n=2", "<|endoftext|>=-100"]).sampling.logit_bias == (
        (n, 2.0),
        (end, -100.0),
    )
    equals = ENCODER.encode("=")[0]
    assert build(logit_bias=["==0.5"]).sampling.logit_bias == ((equals, 0.5),)
    assert build(logit_bias={"n": 1, n: 2}).sampling.logit_bias == ((n, 2.0),)


@pytest.mark.parametrize(
    ("biases", "message"),
    [
        ({"no": 1.0}, r"'no': it is no token; its tokens are \['n', 'o'\]"),
        ({"n": 101}, "from -100 to 100"),
        ({"n": float("nan")}, "from -100 to 100"),
        ({"": 1.0}, "logit_bias="),
        ({1.5: 1.0}, "logit_bias="),
        (["n"], "logit_bias="),
        (["n=much"], "logit_bias="),
        ("n", "logit_bias="),
        (5, "logit_bias=5"),
    ],
)
def test_impossible_biases_are_refused(biases, message):
    with pytest.raises(ValueError, match=message):
        build(logit_bias=biases)


def test_endoftext_is_one_token_everywhere():
    end = ENCODER.end_of_text
    made = build(
        prefix=["a<|endoftext|>", ""], stop_token="<|endoftext|>", bad_words="<|endoftext|>"
    )
    assert [prompt.tokens for prompt in made.prompts] == [[97, end], [end]]
    assert made.sampling.stop_token == made.stop.stop_token == end
    assert made.sampling.bad_words == tuple(sorted([(end,), (*ENCODER.encode(" "), end)]))


def test_seed_is_kept_or_drawn():
    assert build(seed=5).seed == 5
    assert build().seed != build().seed
