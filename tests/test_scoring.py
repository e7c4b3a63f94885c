"""Scores of token rows against a NumPy GPT-2."""

import numpy as np
import oracle
import pytest
from small_model import HPARAMS, WEIGHTS, log_softmax, started

from gpt_2_simple.generation import scoring
from gpt_2_simple.sample import next_token_probs, score_tokens


def test_scores_of_rows_within_the_context(small_sess):
    rows = [[1, 2, 3, 4], [5], list(range(25)), [60, 0]]
    found = score_tokens(small_sess, rows)
    for row, scores in zip(rows, found, strict=True):
        assert scores.shape == (len(row) - 1,)
        if len(row) > 1:
            wanted = log_softmax(oracle.logits(WEIGHTS, HPARAMS, row[:-1]))
            np.testing.assert_allclose(scores, wanted[range(len(row) - 1), row[1:]], atol=1e-5)


@pytest.mark.parametrize("stride", [None, 1, 5, 24])
def test_scores_of_rows_longer_than_the_context(small_sess, stride, monkeypatch):
    monkeypatch.setattr(scoring, "MAX_TOKENS_PER_RUN", 60)
    rows = [[(3 * i) % 61 for i in range(length)] for length in [26, 90, 24]]
    found = score_tokens(small_sess, rows, stride)
    step = stride or 12
    for row, scores in zip(rows, found, strict=True):
        for i, score in enumerate(scores):
            start = max(0, -(-(i - 23) // step) * step)  # the first window that ends after it
            logits = oracle.logits(WEIGHTS, HPARAMS, row[start : i + 1])[-1]
            assert abs(score - log_softmax(logits)[row[i + 1]]) < 1e-5


def test_scores_with_chunked_logits(monkeypatch):
    monkeypatch.setattr(scoring, "MAX_LOGITS_ROWS", 7)
    rows = [[1, 2, 3, 4], list(range(20))]
    with started() as sess:
        for row, scores in zip(rows, score_tokens(sess, rows), strict=True):
            wanted = log_softmax(oracle.logits(WEIGHTS, HPARAMS, row[:-1]))
            np.testing.assert_allclose(scores, wanted[range(len(row) - 1), row[1:]], atol=1e-5)


def test_scoring_no_rows_and_stride_out_of_range(small_sess):
    assert score_tokens(small_sess, []) == []
    for stride in [0, 25, 1.5]:
        with pytest.raises(ValueError, match=f"stride={stride}"):
            score_tokens(small_sess, [[1, 2]], stride)


def test_next_token_probabilities(small_sess):
    text = [i % 61 for i in range(70)]
    wanted = np.exp(log_softmax(oracle.logits(WEIGHTS, HPARAMS, text[-24:])[-1]))
    tokens, probabilities = next_token_probs(small_sess, text, 4)
    assert tokens.tolist() == np.argsort(-wanted)[:4].tolist()
    np.testing.assert_allclose(probabilities, wanted[tokens], atol=1e-6)
    tokens, probabilities = next_token_probs(small_sess, text, 1000)
    assert sorted(tokens) == list(range(61))
    assert abs(probabilities.sum() - 1) < 1e-5
    with pytest.raises(ValueError, match="k=0"):
        next_token_probs(small_sess, text, 0)
