"""Drawn tokens against their distribution; penalties against changed logits."""

import numpy as np
import oracle
import pytest
from small_model import HPARAMS, PREFIXES, WEIGHTS, expected, log_softmax, started, write

from gpt_2_simple.generation import sampling
from gpt_2_simple.sample import SamplingParams, generate_tokens

SETTINGS = {
    "all": ({"temperature": 1.0}, lambda p: p),
    "cold": ({"temperature": 0.5}, lambda p: p**2),
    "temperature below float32": ({"temperature": 1e-300}, lambda p: top(p, 1)),
    "temperature above float32": ({"temperature": 1e300}, lambda p: p**0),
    "top_k": ({"temperature": 1.0, "top_k": 5}, lambda p: top(p, 5)),
    "top_k 1": ({"temperature": 2.0, "top_k": 1}, lambda p: top(p, 1)),
    "top_k of more than there are": ({"temperature": 1.0, "top_k": 99}, lambda p: p),
    "top_p": ({"temperature": 1.0, "top_p": 0.6}, lambda p: nucleus(p, 0.6)),
    "top_p off": ({"temperature": 1.0, "top_p": 1.0}, lambda p: p),
    "tiny top_p": ({"temperature": 1.0, "top_p": 1e-9}, lambda p: top(p, 1)),
    "top_p below float32": ({"temperature": 1.0, "top_p": 1e-40}, lambda p: top(p, 1)),
    "top_p of 100": ({"temperature": 1.0, "top_p": 100}, lambda p: p),
    "both": ({"temperature": 1.0, "top_k": 9, "top_p": 0.5}, lambda p: nucleus(top(p, 9), 0.5)),
    "cold nucleus": ({"temperature": 0.7, "top_p": 0.8}, lambda p: nucleus(p ** (1 / 0.7), 0.8)),
}


def top(p, k):
    p = p * (p >= np.sort(p)[-k])
    return p / p.sum()


def nucleus(p, mass):
    order = np.argsort(-p)
    reached = np.cumsum(p[order] / p.sum())
    kept = order[: int((reached < mass).sum()) + 1]
    return np.where(np.isin(np.arange(len(p)), kept), p, 0)


@pytest.mark.parametrize("name", SETTINGS)
def test_frequencies_match_the_distribution(small_sess, name):
    check_frequencies(small_sess, name)


def test_top_p_nucleus_larger_than_the_candidates(monkeypatch):
    monkeypatch.setattr(sampling, "NUCLEUS_CANDIDATES", 2)
    with started() as sess:
        for name in ["top_p", "tiny top_p", "cold nucleus"]:
            check_frequencies(sess, name)


def test_drawing_from_buckets(monkeypatch):
    monkeypatch.setattr(sampling, "BUCKET_SIZE", 7)
    with started() as sess:
        for name in ["all", "cold"]:
            check_frequencies(sess, name)


def check_frequencies(sess, name):
    """Pearson's chi-square test, with a fixed seed, at about four standard deviations."""
    settings, change = SETTINGS[name]
    logits = oracle.logits(WEIGHTS, HPARAMS, [1, 2, 3])[-1]
    wanted = change(np.exp(log_softmax(logits)))
    wanted /= wanted.sum()
    n = 4000
    found = write(sess, [[1, 2, 3]] * n, 1, SamplingParams(**settings), seed=11)[:, 0]
    counts = np.bincount(found, minlength=HPARAMS.n_vocab)
    assert counts[wanted == 0].sum() == 0
    likely = wanted * n >= 5
    statistic = ((counts - wanted * n)[likely] ** 2 / (wanted * n)[likely]).sum()
    freedom = max(1, likely.sum() - 1)
    assert statistic < freedom + 4 * np.sqrt(2 * freedom)


def ngrams(n):
    def change(logits, text, _):
        for start in range(len(text) - n + 1):
            if n == 1 or (len(text) >= n - 1 and text[start : start + n - 1] == text[1 - n :]):
                logits[text[start + n - 1]] = -np.inf
        return logits

    return change


def penalized(by):
    def change(logits, text, _):
        seen = sorted(set(text))
        logits[seen] = np.where(logits[seen] < 0, logits[seen] * by, logits[seen] / by)
        return logits

    return change


def without(words):
    def change(logits, text, _):
        for *start, last in words:
            if not start or text[-len(start) :] == start:
                logits[last] = -np.inf
        return logits

    return change


@pytest.mark.parametrize(
    ("settings", "change"),
    [
        ({"repetition_penalty": 1.3}, penalized(1.3)),
        ({"repetition_penalty": 0.8}, penalized(0.8)),
        ({"repetition_penalty": 0.01}, penalized(0.01)),
        ({"repetition_penalty": 100}, penalized(100)),
        ({"no_repeat_ngram_size": 1}, ngrams(1)),
        ({"no_repeat_ngram_size": 2}, ngrams(2)),
        ({"no_repeat_ngram_size": 3}, ngrams(3)),
    ],
)
@pytest.mark.parametrize("prefixes", [PREFIXES, [[4, 4, 4]]])
def test_repetition_penalty_and_no_repeat_ngram_size(small_sess, settings, change, prefixes):
    found = write(small_sess, prefixes, 35, SamplingParams(temperature=0, **settings), chunk=8)
    assert found.tolist() == [expected(prefix, 35, change) for prefix in prefixes]


def test_bad_words(small_sess):
    plain = [expected(prefix, 30) for prefix in PREFIXES]
    words = [plain[0][3:4], plain[1][5:7], plain[2][0:3], [60] * 9]
    found = write(small_sess, PREFIXES, 30, SamplingParams(temperature=0, bad_words=words), chunk=8)
    assert found.tolist() == [expected(prefix, 30, without(words)) for prefix in PREFIXES]
    assert found.tolist() != plain


@pytest.mark.parametrize("temperature", [1e-300, 1e-40, 1e300])
def test_a_temperature_outside_of_float32_draws_no_forbidden_token(small_sess, temperature):
    words = tuple((token,) for token in range(1, HPARAMS.n_vocab))
    params = SamplingParams(temperature=temperature, bad_words=words)
    assert write(small_sess, PREFIXES, 8, params, seed=1).tolist() == [[0] * 8] * len(PREFIXES)


def test_min_length_holds_the_stop_token_back(small_sess):
    def held_back(prefix, stop):
        def change(logits, _, written):
            logits[stop] = logits[stop] if written >= 4 else -np.inf
            return logits

        return expected(prefix, 5, change)

    # A token that would come before the fourth, and that comes as soon as it may.
    cases = (([start], stop) for start in range(61) for stop in set(expected([start], 4)))
    prefix, stop = next(case for case in cases if held_back(*case)[4] == case[1])
    settings = SamplingParams(temperature=0, stop_token=stop, min_length=4)
    assert write(small_sess, [prefix], 40, settings, chunk=3)[0].tolist() == held_back(prefix, stop)


def biased(biases):
    def change(logits, *_):
        for token, bias in biases.items():
            logits[token] += bias
        return logits

    return change


def added(prefix, presence=0.0, frequency=0.0):
    def change(logits, text, _):
        counts = np.bincount(text[len(prefix) :], minlength=len(logits))
        return logits - presence * (counts > 0) - frequency * counts

    return change


def test_logit_bias(small_sess):
    plain = [expected(prefix, 30) for prefix in PREFIXES]
    biases = {plain[0][2]: -100.0, plain[1][4]: -0.5, 17: 1.5, 60: 0.0}
    settings = SamplingParams(temperature=0, logit_bias=tuple(biases.items()))
    found = write(small_sess, PREFIXES, 30, settings, chunk=8)
    assert found.tolist() == [expected(prefix, 30, biased(biases)) for prefix in PREFIXES]
    assert plain[0][2] not in found


@pytest.mark.parametrize("by", [{"presence": 1.5}, {"frequency": 0.4}, {"frequency": -0.3}])
def test_presence_and_frequency_penalty_count_new_tokens(small_sess, by):
    settings = SamplingParams(temperature=0, **{f"{name}_penalty": by[name] for name in by})
    found = write(small_sess, PREFIXES, 40, settings, chunk=8)
    assert found.tolist() == [expected(prefix, 40, added(prefix, **by)) for prefix in PREFIXES]
    assert found.tolist() != [expected(prefix, 40) for prefix in PREFIXES]


# Settings that differ in each way that rows of a batch may differ.
MIXED = [
    SamplingParams(temperature=0),
    SamplingParams(temperature=1.0, top_k=5),
    SamplingParams(temperature=0.7, top_k=20, top_p=0.8, presence_penalty=1.0),
    SamplingParams(temperature=1.3, top_p=0.6, frequency_penalty=0.5),
    SamplingParams(temperature=0.9),
    SamplingParams(temperature=0, repetition_penalty=1.4, logit_bias=((17, 2.0),)),
    SamplingParams(temperature=1.0, no_repeat_ngram_size=2, top_k=30),
    SamplingParams(temperature=0, no_repeat_ngram_size=3, bad_words=((5,), (1, 2))),
    SamplingParams(temperature=2.0, bad_words=((9, 9, 9), (3,)), logit_bias=((4, -50), (5, 3))),
    SamplingParams(temperature=0, stop_token=44, min_length=12),
    SamplingParams(temperature=1.0, top_k=61, top_p=0.5),
    SamplingParams(temperature=0, stop_token=44),
]


@pytest.mark.parametrize("chunk", [1, 9, None])
def test_rows_with_settings_of_their_own_equal_rows_alone(small_sess, chunk):
    prefixes = [PREFIXES[i % 4] for i in range(len(MIXED))]
    alone = [
        write(small_sess, [prefix], 40, settings, seed=3, row_ids=[i])[0].tolist()
        for i, (prefix, settings) in enumerate(zip(prefixes, MIXED, strict=True))
    ]
    found = write(small_sess, prefixes, 40, MIXED, seed=3, chunk=chunk).tolist()
    for row, tokens in zip(found, alone, strict=True):
        assert row[: len(tokens)] == tokens
        assert set(row[len(tokens) :]) <= {-1}
    assert len(alone[-1]) < 40  # a row ends beside the others


def test_a_row_without_an_allowed_token_leaves_the_others_whole(small_sess):
    everything = tuple((token,) for token in range(HPARAMS.n_vocab))
    settings = [SamplingParams(temperature=0), SamplingParams(bad_words=everything)]
    tokens = generate_tokens(small_sess, [[7], [7]], 10, settings, chunk=10)
    first = next(tokens)
    assert first[0].tolist() == expected([7], 10)
    assert first[1].tolist() == [-1] * 10
    with pytest.raises(ValueError, match="leave no token"):
        next(tokens)


def test_no_allowed_token_is_an_error(small_sess):
    with pytest.raises(ValueError, match="leave no token"):
        write(small_sess, PREFIXES, 100, SamplingParams(no_repeat_ngram_size=1))
