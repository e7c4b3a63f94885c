"""Speculative decoding: the same tokens as plain decoding, whatever is proposed."""

import contextlib
import random

import numpy as np
import oracle
import pytest
from small_model import GREEDY, HPARAMS, PREFIXES, WEIGHTS, log_softmax, started, write
from test_sampling import nucleus, top

import gpt_2_simple as gpt2
from gpt_2_simple import model, session
from gpt_2_simple.generation import kv_cache, speculative
from gpt_2_simple.generation.speculative import (
    DraftSpeculation,
    LookupSpeculation,
    PromptLookup,
    Speculation,
    choose_length,
)
from gpt_2_simple.sample import SamplingParams, generate_tokens


class Guesses(Speculation):
    """Proposes the tokens of plain decoding, some of them changed, at random lengths.

    `plain` are whole texts by their prefixes.
    """

    def __init__(self, prefixes, plain, seed=0, error=0.2):
        super().__init__()
        self.random, self.error = random.Random(seed), error
        self.texts = [[*p, *new] for p, new in zip(prefixes, plain, strict=True)]
        self.prefixes = prefixes
        self.lengths = []

    def _begin(self, rows):
        pass

    def _observe(self, row, new, proposal):
        pass

    def _end(self):
        pass

    def _propose(self, generation, rows):
        proposals = {}
        for row in rows:
            text = next(t for t in self.texts if t[: len(row.tokens)] == row.tokens)
            most = min(row.n_missing, generation.room(row)) - 1
            count = self.random.randint(0, min(6, max(0, most)))
            guess = [
                (t + 1) % 61 if t < 0 or self.random.random() < self.error else t
                for t in text[len(row.tokens) :][:count]
            ]
            if guess:
                proposals[row] = guess
        self.lengths += map(len, proposals.values())
        return proposals if self.random.random() < 0.8 else {}


SETTINGS = {
    "greedy": {},
    "repetition": {"repetition_penalty": 1.7},
    "presence and frequency": {"presence_penalty": 1.5, "frequency_penalty": 0.7},
    "n-grams": {"no_repeat_ngram_size": 2},
    "bad words": {"bad_words": ((3,), (14, 5), (27, 40, 41))},
    "bias": {"logit_bias": ((4, 3.0), (9, -100.0))},
    "min_length": {"stop_token": 14, "min_length": 25},
    "drawn": {"temperature": 1.0},
    "cold": {"temperature": 0.4, "repetition_penalty": 1.2},
    "top_k": {"temperature": 1.0, "top_k": 5},
    "top_p": {"temperature": 1.0, "top_p": 0.6},
    "top_k and top_p": {"temperature": 1.3, "top_k": 9, "top_p": 0.7, "frequency_penalty": 0.5},
}


@pytest.mark.parametrize("rows", [slice(0, 1), slice(3, 4), slice(0, 4)])
@pytest.mark.parametrize("name", SETTINGS)
def test_tokens_are_those_of_plain_decoding(small_sess, name, rows):
    """The context has 24 tokens: 70 new ones slide the window several times."""
    sampling, prefixes = SamplingParams(**{"temperature": 0, **SETTINGS[name]}), PREFIXES[rows]
    plain = write(small_sess, prefixes, 70, sampling, seed=3)
    for seed, chunk in enumerate([None, 1, 5]):
        guesses = Guesses(prefixes, plain.tolist(), seed)
        found = write(small_sess, prefixes, 70, sampling, seed=3, chunk=chunk, strategy=guesses)
        found = np.pad(found, [[0, 0], [0, plain.shape[1]]], constant_values=-1)
        assert found[:, : plain.shape[1]].tolist() == plain.tolist()
        assert (found[:, plain.shape[1] :] == -1).all()
        assert guesses.n_passes > 3
        assert 0 < guesses.n_accepted < guesses.n_proposed


def test_rows_with_settings_of_their_own(small_sess):
    of_rows = [
        GREEDY,
        SamplingParams(temperature=1.0, top_k=7, bad_words=((5,),)),
        SamplingParams(temperature=0, repetition_penalty=1.5, logit_bias=((3, 2.0),)),
        SamplingParams(temperature=0.8, top_p=0.9, no_repeat_ngram_size=3),
    ]
    plain = write(small_sess, PREFIXES, 60, of_rows, seed=9)
    guesses = Guesses(PREFIXES, plain.tolist())
    found = write(small_sess, PREFIXES, 60, of_rows, seed=9, strategy=guesses)
    assert found.tolist() == plain.tolist()


def test_right_proposals_are_accepted_whole(small_sess):
    plain = write(small_sess, PREFIXES, 60, GREEDY)
    guesses = Guesses(PREFIXES, plain.tolist(), error=0)
    assert write(small_sess, PREFIXES, 60, GREEDY, strategy=guesses).tolist() == plain.tolist()
    assert guesses.n_accepted == guesses.n_proposed > 60


def test_wrong_proposals_change_nothing(small_sess):
    plain = write(small_sess, PREFIXES, 60, GREEDY)
    guesses = Guesses(PREFIXES, plain.tolist(), error=1)
    assert write(small_sess, PREFIXES, 60, GREEDY, strategy=guesses).tolist() == plain.tolist()
    assert guesses.n_accepted == 0 < guesses.n_proposed


def test_stop_token_ends_rows_in_the_middle_of_a_proposal(small_sess):
    plain = write(small_sess, PREFIXES, 60)
    stop = int(plain[0][10])
    sampling = SamplingParams(temperature=0, stop_token=stop)
    wanted = write(small_sess, PREFIXES, 60, sampling)
    found = write(small_sess, PREFIXES, 60, sampling, strategy=Guesses(PREFIXES, plain.tolist()))
    for row, other in zip(found.tolist(), wanted.tolist(), strict=True):
        assert [t for t in row if t >= 0] == [t for t in other if t >= 0]
        end = row.index(stop) + 1 if stop in row else len(row)
        assert set(row[end:]) <= {-1}


@pytest.mark.parametrize("chunk", [None, 2])
def test_send_ends_rows_that_are_ahead(small_sess, chunk):
    plain = write(small_sess, PREFIXES, 60)
    tokens = generate_tokens(
        small_sess, PREFIXES, 60, GREEDY, chunk=chunk, strategy=Guesses(PREFIXES, plain.tolist())
    )
    pieces, ends = [next(tokens)], [60] * 4
    for ended in [[0, 1, 0, 0], [0, 1, 1, 0], None, [1, 0, 0, 0], [1, 1, 1, 0]]:
        n_given = sum(piece.shape[1] for piece in pieces)
        for row, now in enumerate(ended or []):
            ends[row] = min(ends[row], n_given) if now else ends[row]
        pieces.append(tokens.send(ended))
    with pytest.raises(StopIteration):
        tokens.send([1, 1, 1, 1])
    found = np.concatenate(pieces, 1)
    for row, end in enumerate(ends):
        assert found[row, :end].tolist() == plain[row][: min(end, found.shape[1])].tolist()
        assert (found[row, end:] == -1).all()


@pytest.mark.parametrize("chunk", [1, 7, None])
def test_fault_is_an_error_only_for_a_text_that_has_not_ended(small_sess, chunk):
    settings = SamplingParams(temperature=0, no_repeat_ngram_size=1)  # 61 tokens, each of them once

    def read(count, strategy, chunk=chunk):
        parts = generate_tokens(small_sess, [[7]], 100, settings, chunk=chunk, strategy=strategy)
        tokens, part = [], next(parts)
        try:
            while True:
                tokens += part[part >= 0].tolist()
                part = parts.send([len(tokens) >= count])
        except (StopIteration, ValueError) as error:
            return tokens, type(error)

    plain, error = read(100, None, chunk=1)
    assert error is ValueError
    guesses = Guesses([[7]], [[*plain, *[1] * 40]], error=0)
    assert read(100, guesses) == (plain, ValueError)
    tokens, error = read(55, guesses)
    assert tokens[:55] == plain[:55]
    assert error is StopIteration


def test_nan_weights_are_an_error():
    weights = {name: value.copy() for name, value in WEIGHTS.items()}
    weights["model/ln_f/b"][:] = np.nan
    assert np.isnan(oracle.logits(weights, HPARAMS, [1])).all()
    with started(weights) as sess, pytest.raises(RuntimeError, match="weights are broken"):
        write(sess, [[7]], 20, strategy=Guesses([[7]], [[1] * 20]))


# --- prompt lookup --------------------------------------------------------------------------------


def test_lookup_proposes_what_followed_before_the_longest_first():
    lookup = PromptLookup([1, 2, 3, 9, 8, 2, 3, 7, 6, 1, 2, 3])
    assert lookup.propose(3) == [9, 8, 2]  # after 1, 2, 3, and not after 2, 3
    lookup.observe([9])
    assert lookup.propose(2) == [8, 2]
    lookup.observe([5])
    assert lookup.propose(2) == []
    lookup.observe([2, 3])
    assert lookup.propose(2) == [9, 5]  # the last place where 2, 3 came


def test_lookup_copies_its_own_proposal_in_a_short_loop():
    assert PromptLookup([5, 1, 2, 1, 2, 1]).propose(5) == [2, 1, 2, 1, 2]
    assert PromptLookup([4, 4, 4]).propose(3) == [4, 4, 4]
    assert PromptLookup([4]).propose(3) == []


def test_acceptance_follows_the_text():
    assert PromptLookup(range(100)).acceptance == 0
    lookup = PromptLookup([1, 2, 3, 4, 5] * 20)
    assert lookup.acceptance > 0.9
    lookup.observe(range(100, 110))
    assert lookup.acceptance < 0.3


def test_no_proposal_where_it_does_not_pay():
    assert choose_length([0.3], 1, 15) == 0
    assert choose_length([], 4, 15) == 0
    assert choose_length([1.0], 1, 15) == 15
    assert choose_length([0.8], 1, 3) == 3
    assert 0 < choose_length([0.75], 1, 15) < 15
    assert choose_length([1.0], 20, 15) == 0  # one row of 20 repeats


def test_text_that_repeats_takes_few_passes(small_sess):
    # A bias makes the model repeat a token; drawn at random, the same model repeats nothing.
    repeats = SamplingParams(temperature=0, logit_bias=((7, 100.0),))
    strategy = LookupSpeculation()
    assert write(small_sess, [[7]], 100, repeats, strategy=strategy).tolist() == [[7] * 100]
    assert strategy.n_passes < 25
    assert strategy.n_accepted == strategy.n_proposed > 50
    random_text = SamplingParams(temperature=3.0)
    strategy = LookupSpeculation()
    write(small_sess, [[7]], 100, random_text, seed=1, strategy=strategy)
    assert strategy.n_passes == 0


@pytest.mark.parametrize("rows", [slice(0, 1), slice(0, 4)])
def test_lookup_finds_the_tokens_of_plain_decoding(small_sess, monkeypatch, rows):
    monkeypatch.setattr(speculative, "MIN_GAIN", 0.0)
    monkeypatch.setattr(speculative, "NGRAM_SIZES", (2, 1))
    for sampling in (GREEDY, SamplingParams(temperature=0.5, top_k=4)):
        strategy = LookupSpeculation()
        plain = write(small_sess, PREFIXES[rows], 150, sampling, seed=2)
        found = write(small_sess, PREFIXES[rows], 150, sampling, seed=2, strategy=strategy)
        assert found.tolist() == plain.tolist()
        assert 0 < strategy.n_accepted < strategy.n_proposed


def test_later_calls_add_no_operations(small_sess):
    def calls(count):
        for i in range(count):
            sampling = SamplingParams(
                temperature=0, logit_bias=((7, 100.0),), repetition_penalty=1 + i % 2
            )
            write(small_sess, PREFIXES[: 1 + i % 4], 20 + i, sampling, strategy=LookupSpeculation())

    calls(2)
    before = len(small_sess.graph.get_operations())
    calls(9)
    assert len(small_sess.graph.get_operations()) == before


# --- a draft model --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def drafts():
    """Sessions: the same model, one that is nearly the same, one with other weights."""
    other = oracle.random_weights(HPARAMS, seed=2, scale=0.2)
    near = {name: 0.97 * WEIGHTS[name] + 0.03 * other[name] for name in WEIGHTS}
    sessions = {"same": started(), "near": started(near), "other": started(other)}
    yield sessions
    for sess in sessions.values():
        sess.close()


@pytest.mark.parametrize("rows", [slice(0, 1), slice(0, 4)])
@pytest.mark.parametrize("draft", ["same", "near", "other"])
@pytest.mark.parametrize("name", ["greedy", "drawn", "n-grams", "min_length", "cold"])
def test_tokens_with_a_draft_model_are_those_without(small_sess, drafts, name, draft, rows):
    sampling = SamplingParams(**{"temperature": 0, **SETTINGS[name]})
    prefixes = PREFIXES[rows]
    plain = write(small_sess, prefixes, 70, sampling, seed=3)
    for chunk in (None, 3):
        guesses = DraftSpeculation(drafts[draft], 0.1)
        found = write(small_sess, prefixes, 70, sampling, seed=3, chunk=chunk, strategy=guesses)
        assert found.shape[1] >= plain.shape[1]
        assert found[:, : plain.shape[1]].tolist() == plain.tolist()
        assert guesses.n_passes > 0
        if draft == "same":
            assert guesses.n_accepted > 0.9 * guesses.n_proposed > 20
        if draft == "other":
            assert guesses.n_accepted < 0.5 * guesses.n_proposed


def test_draft_model_with_a_shorter_context(small_sess):
    short = model.HParams(n_vocab=61, n_ctx=11, n_embd=16, n_head=2, n_layer=1)
    plain = write(small_sess, PREFIXES, 70)
    with started(oracle.random_weights(short, seed=3, scale=0.2), short) as draft:
        guesses = DraftSpeculation(draft, 0.0)
        assert write(small_sess, PREFIXES, 70, strategy=guesses).tolist() == plain.tolist()
        assert guesses.n_passes > 0


def test_draft_model_with_broken_weights_changes_nothing(small_sess):
    weights = {name: value * np.nan for name, value in WEIGHTS.items()}
    with started(weights) as draft:
        found = write(small_sess, PREFIXES, 40, strategy=DraftSpeculation(draft, 0.1))
    assert found.tolist() == write(small_sess, PREFIXES, 40).tolist()


def test_draft_model_that_is_wrong_is_seldom_asked(small_sess, drafts):
    guesses = DraftSpeculation(drafts["other"], 0.1)
    write(small_sess, [[7]], 300, SamplingParams(temperature=1.0), seed=1, strategy=guesses)
    assert 0 < guesses.n_passes < 12


def test_caches_of_both_models_are_freed(small_sess, drafts):
    def n_caches(sess):
        return sess.run(kv_cache.build_once(sess, kv_cache._build_cache_ops).n_caches)

    write(small_sess, PREFIXES, 30, strategy=DraftSpeculation(drafts["same"], 0.1))
    tokens = generate_tokens(
        small_sess, PREFIXES, 30, GREEDY, strategy=DraftSpeculation(drafts["same"], 0.1)
    )
    next(tokens)
    tokens.close()
    assert n_caches(small_sess) == n_caches(drafts["same"]) == 0


# --- the distribution -----------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{"top_k": 5}, {"top_p": 0.6}, {"temperature": 0.6}])
def test_first_and_second_tokens_follow_the_distribution(small_sess, settings):
    """Pearson's chi-square test on 20,000 pairs, at about four standard deviations.

    The pairs are drawn in one pass each, from proposals that are the likeliest tokens.
    """
    sampling = SamplingParams(**{"temperature": 1.0, **settings})
    prefix, n_texts, n_rows = [1, 2, 3], 20000, 2000

    def distribution(tokens):
        p = np.exp(log_softmax(oracle.logits(WEIGHTS, HPARAMS, tokens)[-1] / sampling.temperature))
        p = top(p, sampling.top_k) if sampling.top_k else p
        p = nucleus(p, sampling.top_p) if sampling.top_p else p
        return p / p.sum()

    first = distribution(prefix)
    proposed = int(first.argmax())

    class Likeliest(LookupSpeculation):
        def _propose(self, _generation, rows):
            is_new = all(row.n_generated == 0 for row in rows)
            return {row: [proposed] for row in rows} if is_new else {}

    found = np.concatenate(
        [
            write(
                small_sess, [prefix] * n_rows, 2, sampling, seed=5, strategy=Likeliest(),
                row_ids=range(start, start + n_rows),
            )
            for start in range(0, n_texts, n_rows)
        ]
    )  # fmt: skip
    pairs = np.bincount(found[:, 0] * 61 + found[:, 1], minlength=61 * 61).reshape(61, 61)
    wanted = np.array([p * distribution([*prefix, t]) if p else np.zeros(61)
                       for t, p in enumerate(first)])  # fmt: skip
    for counts, shares in ((pairs.sum(1), first), (pairs.ravel(), wanted.ravel())):
        assert counts[shares == 0].sum() == 0
        likely = shares * n_texts >= 5
        expected = shares[likely] * n_texts
        statistic = ((counts[likely] - expected) ** 2 / expected).sum()
        freedom = max(1, likely.sum() - 1)
        assert statistic < freedom + 4 * np.sqrt(2 * freedom)


# --- what a user calls ----------------------------------------------------------------------------


@pytest.fixture
def loaded(workplace, sess):
    """A session with the tiny model, trained a little on a text that repeats."""
    gpt2.finetune(
        sess, "text.txt", model_name="tiny", steps=40, learning_rate=0.01, accumulate_gradients=1,
        sample_every=0, seed=1, verbose=0,
    )  # fmt: skip
    return sess


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0},
        {"temperature": 0, "prefix": ["9 green", "1"], "nsamples": 2, "batch_size": 4},
        {"temperature": 0.5, "top_k": 3, "nsamples": 3, "batch_size": 3},
        {"temperature": 0, "stop": ["wall.\n1", "ttt"], "include_stop": True},
        {"temperature": 0, "truncate": "hang", "include_prefix": False},
    ],
)
def test_generate_gives_the_same_texts(loaded, monkeypatch, settings):
    passes = []
    verify = speculative.sequences.Generation.verify
    monkeypatch.setattr(
        speculative.sequences.Generation, "verify", lambda *a: (passes.append(1), verify(*a))
    )
    settings = {"prefix": "10 green", "length": 120, "seed": 4, "return_as_list": True, **settings}
    plain = gpt2.generate(loaded, **settings)
    assert not passes
    assert gpt2.generate(loaded, speculative="prompt_lookup", **settings) == plain
    if settings["temperature"] == 0:
        assert passes


def test_stream_gives_the_same_text(loaded):
    settings = {"length": 120, "temperature": 0, "prefix": "10 green"}
    plain = gpt2.generate(loaded, return_as_list=True, **settings)[0]
    pieces = list(gpt2.generate_stream(loaded, speculative="prompt_lookup", **settings))
    assert "".join(pieces) == plain
    assert len(pieces) > 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"speculative": "magic"}, "speculative='magic'"),
        ({"speculative": "prompt_lookup", "num_beams": 2}, "num_beams=2 cannot be combined"),
        ({"draft_model": "tiny", "num_beams": 2}, "num_beams=2 cannot be combined"),
        ({"draft_model": "tiny", "speculative": "prompt_lookup"}, "are two ways"),
    ],
)
def test_settings_out_of_range(loaded, settings, message):
    with pytest.raises(ValueError, match=message):
        gpt2.generate(loaded, length=3, **settings)


def test_generate_with_a_draft_model_by_name_and_by_path(loaded):
    settings = {"prefix": "10 green", "length": 60, "seed": 4, "return_as_list": True, "top_k": 3}
    plain = gpt2.generate(loaded, **settings)
    state = session.graph_state(loaded)
    assert gpt2.generate(loaded, draft_model="tiny", **settings) == plain
    first = state.draft_session
    assert gpt2.generate(loaded, draft_model="tiny", **settings) == plain
    assert state.draft_session is first
    assert gpt2.generate(loaded, draft_model="checkpoint/run1", **settings) == plain
    second = state.draft_session
    assert second is not first
    assert session.graph_state(second).loaded_folder.endswith("run1")
    stream = gpt2.generate_stream(
        loaded, "10 green", length=60, seed=4, top_k=3, draft_model="checkpoint/run1"
    )
    assert "".join(stream) == plain[0]
    assert state.draft_session is second
    gpt2.reset_session(loaded).close()
    with pytest.raises(RuntimeError, match="closed"):
        session.graph_state(second)


def test_draft_model_that_is_missing_or_has_another_vocabulary(loaded):
    with pytest.raises(FileNotFoundError, match="no model in models/none"):
        gpt2.generate(loaded, length=3, draft_model="none")
    gpt2.create_gpt2("text.txt", model_name="words", vocab_size=270, n_layer=1, n_embd=16, n_head=2)
    with pytest.raises(ValueError, match="draft_model='words' has another vocabulary"):
        gpt2.generate(loaded, length=3, draft_model="words")
    assert session.graph_state(loaded).draft_session is None


@pytest.mark.parametrize("precision", ["int8", "bfloat16"])
def test_guesses_with_smaller_weights_give_the_same_texts(loaded, precision):
    settings = {"prefix": "10 green", "length": 60, "temperature": 0, "return_as_list": True}
    sess = gpt2.reset_session(loaded)
    with contextlib.closing(sess):
        gpt2.load_gpt2(sess, precision=precision)
        plain = gpt2.generate(sess, **settings)
        assert gpt2.generate(sess, speculative="prompt_lookup", **settings) == plain
        assert gpt2.generate(sess, draft_model="checkpoint/run1", **settings) == plain
        draft = session.graph_state(sess).draft_session
        assert session.graph_state(draft).precision == precision
        gpt2.reset_session(sess).close()
