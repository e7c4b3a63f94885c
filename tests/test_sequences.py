"""The decode engine against a NumPy GPT-2 that computes every position afresh."""

import threading

import numpy as np
import oracle
import pytest
import tensorflow as tf

from gpt_2_simple import model, session
from gpt_2_simple.generation import kv_cache, sampling, scoring, sequences
from gpt_2_simple.sample import (
    Beams,
    BeamSearch,
    SamplingParams,
    generate_tokens,
    next_token_probs,
    score_tokens,
)

HPARAMS = model.HParams(n_vocab=61, n_ctx=24, n_embd=32, n_head=4, n_layer=2)
WEIGHTS = oracle.random_weights(HPARAMS, seed=1, scale=0.2)
for _name in WEIGHTS:  # so that places and distant tokens matter, and greedy text is not one word
    WEIGHTS[_name] *= 4 if _name.endswith("wpe") else 3 if _name.endswith("c_attn/w") else 1
GREEDY = SamplingParams(temperature=0)
MANY = [[7], [1, 2, 3], [4, 5, 6, 7, 8, 9, 10, 11, 12], list(range(20))]


def started(weights=WEIGHTS, hparams=HPARAMS):
    """A session with a model of these weights."""
    sess = session.start_tf_sess()
    session.build_model(sess, hparams, [])
    loader(sess)(weights)
    return sess


def loader(sess):
    """A function that puts weights in the session's model."""
    variables = model.flatten(session.graph_state(sess).weights)
    with sess.graph.as_default():
        values = {v.op.name: tf.compat.v1.placeholder(v.dtype, v.shape) for v in variables}
        assign = [v.assign(values[v.op.name]) for v in variables]
    return lambda weights: sess.run(assign, {values[name]: weights[name] for name in values})


@pytest.fixture(scope="module")
def sess():
    with started() as sess:
        yield sess


@pytest.fixture(autouse=True)
def nothing_left(request):
    """After each test no cache is left in the session."""
    yield
    if "sess" in request.fixturenames:
        sess = request.getfixturevalue("sess")
        assert sess.run(kv_cache.engine(sess).held) == 0


def write(sess, prefixes, length, sampling=GREEDY, **options):
    """All tokens, [rows, time]."""
    return np.concatenate(list(generate_tokens(sess, prefixes, length, sampling, **options)), 1)


def expected(prefix, length, change=lambda logits, text, written: logits):
    """Greedy tokens by full forward passes; `change` does to the logits what a setting should."""
    text, start = list(prefix), 0
    for written in range(length):
        if len(text) - start > HPARAMS.n_ctx:
            start = len(text) - HPARAMS.n_ctx // 2
        logits = oracle.logits(WEIGHTS, HPARAMS, text[start:])[-1]
        text.append(int(change(logits.copy(), text, written).argmax()))
    return text[len(prefix) :]


def log_softmax(x):
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


@pytest.mark.parametrize("chunk", [1, 7, None])
@pytest.mark.parametrize("prefixes", [[[7]], [[1, 2, 3, 4, 5]], MANY, [[9], [9], [3, 3], [9]]])
def test_greedy_equals_the_full_forward_pass(sess, prefixes, chunk):
    length = 60  # the window slides several times, at another moment for each row
    found = write(sess, prefixes, length, chunk=chunk)
    assert found.dtype == np.int32
    assert found.tolist() == [expected(prefix, length) for prefix in prefixes]


@pytest.mark.parametrize(
    "hparams",
    [
        model.HParams(n_vocab=50, n_ctx=8, n_embd=6, n_head=1, n_layer=1),
        model.HParams(n_vocab=259, n_ctx=100, n_embd=24, n_head=3, n_layer=3),
        model.HParams(n_vocab=5, n_ctx=1, n_embd=10, n_head=5, n_layer=1),
    ],
)
def test_other_sizes(hparams, monkeypatch):
    monkeypatch.setattr(sequences, "GROWTH", 3)
    monkeypatch.setattr(sequences, "TOKENS_AT_ONCE", 5)
    weights = oracle.random_weights(hparams, seed=1)
    with started(weights, hparams) as sess:
        for prefixes in [[[3]], [[1, 2, 3, 4, 0, 1, 2][: hparams.n_ctx], [2]]]:
            found = write(sess, prefixes, 30)
            for prefix, tokens in zip(prefixes, found, strict=True):
                text, start = list(prefix), 0
                for token in tokens:
                    if len(text) - start > hparams.n_ctx:
                        start = len(text) - max(1, hparams.n_ctx // 2)
                    logits = oracle.logits(weights, hparams, text[start:])[-1]
                    assert logits[token] > logits.max() - 1e-4
                    text.append(int(token))


def test_a_long_run_slides_on_and_on(sess):
    tokens = write(sess, [[5, 6]], 500)
    assert tokens[0].tolist() == expected([5, 6], 500)


def test_a_long_prefix_is_cut_with_one_warning(sess):
    prefix = [i % 61 for i in range(100)]
    with pytest.warns(UserWarning, match="first 81 tokens") as caught:
        found = write(sess, [prefix], 5)
    assert len(caught) == 1
    assert found[0].tolist() == expected(prefix[81:], 5)
    with pytest.warns(UserWarning, match="first 88 tokens"):  # half the context stays
        found = write(sess, [prefix], 50)
    assert found[0].tolist() == expected(prefix[88:], 50)


SETTINGS = {
    "all": ({"temperature": 1.0}, lambda p: p),
    "cold": ({"temperature": 0.5}, lambda p: p**2),
    "top_k": ({"temperature": 1.0, "top_k": 5}, lambda p: top(p, 5)),
    "top_k 1": ({"temperature": 2.0, "top_k": 1}, lambda p: top(p, 1)),
    "top_k of more than there are": ({"temperature": 1.0, "top_k": 99}, lambda p: p),
    "top_p": ({"temperature": 1.0, "top_p": 0.6}, lambda p: nucleus(p, 0.6)),
    "top_p off": ({"temperature": 1.0, "top_p": 1.0}, lambda p: p),
    "tiny top_p": ({"temperature": 1.0, "top_p": 1e-9}, lambda p: top(p, 1)),
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
def test_frequencies_match_the_distribution(sess, name):
    check_frequencies(sess, name)


def test_a_nucleus_of_more_than_the_few(monkeypatch):
    monkeypatch.setattr(sampling, "NUCLEUS", 2)
    with started() as sess:
        for name in ["top_p", "tiny top_p", "cold nucleus"]:
            check_frequencies(sess, name)


def test_drawing_in_two_stages(monkeypatch):
    monkeypatch.setattr(sampling, "STRETCH", 7)
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


def test_a_seed_makes_the_text(sess):
    settings = SamplingParams(temperature=1.0, top_k=20)
    alone = [write(sess, [p], 50, settings, seed=5, row_ids=[i])[0] for i, p in enumerate(MANY)]
    together = write(sess, MANY, 50, settings, seed=5)
    assert together.tolist() == [tokens.tolist() for tokens in alone]
    assert write(sess, MANY, 50, settings, seed=5, chunk=3).tolist() == together.tolist()
    backwards = write(sess, MANY[::-1], 50, settings, seed=5, row_ids=[3, 2, 1, 0])
    assert backwards[::-1].tolist() == together.tolist()
    with started() as other:
        assert write(other, MANY, 50, settings, seed=5).tolist() == together.tolist()
    assert write(sess, MANY, 50, settings, seed=6).tolist() != together.tolist()
    assert write(sess, MANY, 50, settings, seed=-1).shape == together.shape


def test_rows_of_one_prefix_differ_and_no_seed_is_a_new_one(sess):
    settings = SamplingParams(temperature=1.0)
    first, second = (write(sess, [[1]] * 5, 30, settings) for _ in range(2))
    assert len({tuple(row) for row in [*first, *second]}) == 10


def test_threads_share_a_session(sess):
    settings = SamplingParams(temperature=1.0, top_p=0.9)
    jobs = [(MANY[i % 4 :], seed) for i, seed in enumerate(range(8))]
    alone = [write(sess, prefixes, 40, settings, seed=seed).tolist() for prefixes, seed in jobs]
    found = [None] * len(jobs)

    def work(i):
        prefixes, seed = jobs[i]
        found[i] = write(sess, prefixes, 40, settings, seed=seed).tolist()

    threads = [threading.Thread(target=work, args=[i]) for i in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == alone


def test_threads_may_be_the_first_to_call():
    with started() as sess:
        found = {}

        def work(seed):
            found[seed] = write(sess, MANY, 10, SamplingParams(), seed=seed).tolist()

        threads = [threading.Thread(target=work, args=[seed]) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert found == {
            s: write(sess, MANY, 10, SamplingParams(), seed=s).tolist() for s in range(4)
        }


def test_later_calls_add_nothing_to_the_graph(sess):
    def calls(count):
        for i in range(count):
            settings = SamplingParams(
                temperature=i % 3, top_k=i % 5, top_p=(i % 4) / 4, stop_token=i % 2 or None,
                repetition_penalty=1 + i % 2, no_repeat_ngram_size=i % 4,
                bad_words=((1,), (2, 3))[: i % 3],
            )  # fmt: skip
            write(sess, MANY[: 1 + i % 4], 1 + i % 30, settings, seed=i)
        score_tokens(sess, MANY)
        next_token_probs(sess, [1])

    calls(5)
    before = len(sess.graph.get_operations())
    calls(100)
    assert len(sess.graph.get_operations()) == before


@pytest.mark.parametrize("stop", ["close", "throw", "interrupt", "forget"])
def test_an_end_halfway_frees_the_cache(sess, stop):
    tokens = generate_tokens(sess, MANY, 50, GREEDY, chunk=5)
    assert next(tokens).shape == (4, 5)
    assert sess.run(kv_cache.engine(sess).held) == 1
    if stop == "close":
        tokens.close()
    elif stop == "throw":
        with pytest.raises(KeyError):
            tokens.throw(KeyError())
    elif stop == "interrupt":
        with pytest.raises(KeyboardInterrupt):
            tokens.throw(KeyboardInterrupt())
    else:
        del tokens


def test_a_failing_run_frees_the_cache(sess, monkeypatch):
    run = sess.run
    calls = []

    def fail(fetches, feeds=None, **options):
        result = run(fetches, feeds, **options)
        if isinstance(fetches, list):
            calls.append(result)
            if len(calls) == 2:
                raise KeyboardInterrupt  # as after a run, whose result is then lost
        return result

    monkeypatch.setattr(sess, "run", fail)
    with pytest.raises(KeyboardInterrupt):
        write(sess, MANY, 50, chunk=5)


def test_a_generator_that_was_never_begun_holds_nothing(sess):
    generate_tokens(sess, MANY, 50, GREEDY)


def test_closing_the_session_first_is_no_error():
    with started() as sess:
        tokens = generate_tokens(sess, [[1]], 50, GREEDY, chunk=5)
        next(tokens)
    tokens.close()


def test_stop_token_ends_a_row(sess):
    plain = [expected(prefix, 60) for prefix in MANY]
    stop = plain[0][10]
    found = write(sess, MANY, 60, SamplingParams(temperature=0, stop_token=stop), chunk=4)
    for tokens, whole in zip(found.tolist(), plain, strict=True):
        end = whole.index(stop) + 1 if stop in whole else 60
        end = min(end, found.shape[1])
        assert tokens[:end] == whole[:end]
        assert set(tokens[end:]) <= {-1}
    assert write(sess, MANY[:1], 60, SamplingParams(temperature=0, stop_token=stop)).shape[1] < 60


def test_rows_can_be_ended_from_outside(sess):
    plain = [expected(prefix, 60) for prefix in MANY]
    tokens = generate_tokens(sess, MANY, 60, GREEDY, chunk=6)
    pieces = [next(tokens)]
    ends = [60, pieces[0].shape[1], 60, 60]
    for ended in [[0, 1, 0, 0], [0, 1, 1, 0], None, [1, 0, 0, 0], [1, 1, 1, 0]]:
        written = sum(piece.shape[1] for piece in pieces)
        for row, now in enumerate(ended or []):
            ends[row] = min(ends[row], written) if now else ends[row]
        pieces.append(tokens.send(ended))
    with pytest.raises(StopIteration):
        tokens.send([1, 1, 1, 1])
    found = np.concatenate(pieces, 1)
    for row, end in enumerate(ends):
        assert found[row, :end].tolist() == plain[row][: min(end, found.shape[1])]
        assert (found[row, end:] == -1).all()


def ngrams(n):
    def change(logits, text, _):
        for start in range(len(text) - n + 1):
            if n == 1 or (len(text) >= n - 1 and text[start : start + n - 1] == text[1 - n :]):
                logits[text[start + n - 1]] = -np.inf
        return logits

    return change


def penalised(by):
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
        ({"repetition_penalty": 1.3}, penalised(1.3)),
        ({"repetition_penalty": 0.8}, penalised(0.8)),
        ({"no_repeat_ngram_size": 1}, ngrams(1)),
        ({"no_repeat_ngram_size": 2}, ngrams(2)),
        ({"no_repeat_ngram_size": 3}, ngrams(3)),
    ],
)
@pytest.mark.parametrize("prefixes", [MANY, [[4, 4, 4]]])
def test_repetition_is_held_back(sess, settings, change, prefixes):
    found = write(sess, prefixes, 35, SamplingParams(temperature=0, **settings), chunk=8)
    assert found.tolist() == [expected(prefix, 35, change) for prefix in prefixes]


def test_bad_words(sess):
    plain = [expected(prefix, 30) for prefix in MANY]
    words = [plain[0][3:4], plain[1][5:7], plain[2][0:3], [60] * 9]
    found = write(sess, MANY, 30, SamplingParams(temperature=0, bad_words=words), chunk=8)
    assert found.tolist() == [expected(prefix, 30, without(words)) for prefix in MANY]
    assert found.tolist() != plain


def test_min_length_holds_the_stop_token_back(sess):
    def held_back(prefix, stop):
        def change(logits, _, written):
            logits[stop] = logits[stop] if written >= 4 else -np.inf
            return logits

        return expected(prefix, 5, change)

    # A token that would come before the fourth, and that comes as soon as it may.
    cases = (([start], stop) for start in range(61) for stop in set(expected([start], 4)))
    prefix, stop = next(case for case in cases if held_back(*case)[4] == case[1])
    settings = SamplingParams(temperature=0, stop_token=stop, min_length=4)
    assert write(sess, [prefix], 40, settings, chunk=3)[0].tolist() == held_back(prefix, stop)


def test_nothing_left_to_choose_is_an_error(sess):
    with pytest.raises(ValueError, match="leave no token"):
        write(sess, MANY, 100, SamplingParams(no_repeat_ngram_size=1))


@pytest.mark.parametrize("name", ["model/wte", "model/h1/mlp/c_fc/w", "model/ln_f/b"])
@pytest.mark.parametrize("settings", [{"temperature": 0}, {"top_k": 3}, {"top_p": 0.5}, {}])
def test_broken_weights_are_an_error(broken, name, settings):
    sess, spoil = broken
    spoil(name)
    for prefixes in [[[1]], MANY]:
        with pytest.raises(RuntimeError, match="weights are broken"):
            write(sess, prefixes, 5, SamplingParams(**settings))
    assert sess.run(kv_cache.engine(sess).held) == 0
    with pytest.raises(RuntimeError, match="weights are broken"):
        next_token_probs(sess, [1, 2])
    with pytest.raises(RuntimeError, match="weights are broken"):
        score_tokens(sess, [[1, 2]])


@pytest.fixture(scope="module")
def broken():
    """A session, and what puts one NaN into one of its variables."""
    with started() as sess:
        load = loader(sess)

        def spoil(name):
            spoilt = WEIGHTS[name].copy()
            spoilt.flat[-1] = np.nan
            load({**WEIGHTS, name: spoilt})

        yield sess, spoil


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
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        SamplingParams(**settings)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prefixes": []}, "at least one prefix"),
        ({"prefixes": [[1], []]}, "empty prefix"),
        ({"prefixes": [[61]]}, "token 61 is not in the vocabulary of 61"),
        ({"prefixes": [[-1]]}, "token -1"),
        ({"length": 0}, "length=0"),
        ({"length": 2.0}, "length=2.0"),
        ({"seed": "x"}, "seed='x'"),
        ({"seed": 1.5}, "seed=1.5"),
        ({"row_ids": [1, 2]}, "2 row_ids for 1 prefixes"),
        ({"chunk": 0}, "chunk=0"),
        ({"sampling": SamplingParams(stop_token=61)}, "stop_token=61"),
        ({"sampling": SamplingParams(bad_words=[[1, 61]])}, "token 61"),
    ],
)
def test_bad_arguments_are_told_at_once(sess, arguments, message):
    with pytest.raises(ValueError, match=message):
        generate_tokens(**{"sess": sess, "prefixes": [[1]], "length": 5, **arguments})


def test_no_model_and_a_closed_session():
    with session.start_tf_sess() as sess:
        with pytest.raises(RuntimeError, match="load_gpt2"):
            generate_tokens(sess, [[1]], 5)
        with pytest.raises(RuntimeError, match="load_gpt2"):
            score_tokens(sess, [[1, 2]])
    with pytest.raises(RuntimeError, match="closed"):
        generate_tokens(sess, [[1]], 5)


def test_scores_of_rows_that_fit(sess):
    rows = [[1, 2, 3, 4], [5], list(range(25)), [60, 0]]
    found = score_tokens(sess, rows)
    for row, scores in zip(rows, found, strict=True):
        assert scores.shape == (len(row) - 1,)
        if len(row) > 1:
            wanted = log_softmax(oracle.logits(WEIGHTS, HPARAMS, row[:-1]))
            np.testing.assert_allclose(scores, wanted[range(len(row) - 1), row[1:]], atol=1e-5)


@pytest.mark.parametrize("stride", [None, 1, 5, 24])
def test_scores_of_long_rows(sess, stride, monkeypatch):
    monkeypatch.setattr(sequences, "TOKENS_AT_ONCE", 60)
    rows = [[(3 * i) % 61 for i in range(length)] for length in [26, 90, 24]]
    found = score_tokens(sess, rows, stride)
    step = stride or 12
    for row, scores in zip(rows, found, strict=True):
        for i, score in enumerate(scores):
            start = max(0, -(-(i - 23) // step) * step)  # the first window that ends after it
            logits = oracle.logits(WEIGHTS, HPARAMS, row[start : i + 1])[-1]
            assert abs(score - log_softmax(logits)[row[i + 1]]) < 1e-5


def test_scores_in_pieces_of_logits(monkeypatch):
    monkeypatch.setattr(scoring, "LOGITS_ROWS", 7)
    rows = [[1, 2, 3, 4], list(range(20))]
    with started() as sess:
        for row, scores in zip(rows, score_tokens(sess, rows), strict=True):
            wanted = log_softmax(oracle.logits(WEIGHTS, HPARAMS, row[:-1]))
            np.testing.assert_allclose(scores, wanted[range(len(row) - 1), row[1:]], atol=1e-5)


def test_no_rows_no_scores_and_a_bad_stride(sess):
    assert score_tokens(sess, []) == []
    for stride in [0, 25, 1.5]:
        with pytest.raises(ValueError, match=f"stride={stride}"):
            score_tokens(sess, [[1, 2]], stride)


def test_next_token_probs(sess):
    text = [i % 61 for i in range(70)]
    wanted = np.exp(log_softmax(oracle.logits(WEIGHTS, HPARAMS, text[-24:])[-1]))
    tokens, probabilities = next_token_probs(sess, text, 4)
    assert tokens.tolist() == np.argsort(-wanted)[:4].tolist()
    np.testing.assert_allclose(probabilities, wanted[tokens], atol=1e-6)
    tokens, probabilities = next_token_probs(sess, text, 1000)
    assert sorted(tokens) == list(range(61))
    assert abs(probabilities.sum() - 1) < 1e-5
    with pytest.raises(ValueError, match="k=0"):
        next_token_probs(sess, text, 0)


def search(sess, prefixes, length, beams, sampling=GREEDY, **options):
    """What beam search finds for each prefix, the best first."""
    with BeamSearch(sess, prefixes, length, beams, sampling, **options) as found:
        while not found.done:
            found.step()
        return found.best()


def likeliest(prefix, length, beams, stop=None):
    """[(score, new tokens)] by full forward passes: the definition, in the plainest words."""
    going, found, start = [(0.0, [])], [], 0
    for written in range(length):
        if len(prefix) + written - start > HPARAMS.n_ctx:
            start = len(prefix) + written - HPARAMS.n_ctx // 2
        ways = []
        for total, new in going:
            scores = log_softmax(oracle.logits(WEIGHTS, HPARAMS, (prefix + new)[start:])[-1])
            ways += [(total + score, [*new, token]) for token, score in enumerate(scores)]
        ways = sorted(ways, reverse=True)[: 2 * beams.count]
        found += [way for way in ways[: beams.count] if way[1][-1] == stop]
        going = [way for way in ways if way[1][-1] != stop][: beams.count]
        judged = sorted((beams.score(total, len(new)), new) for total, new in found)
        best = judged[-beams.count :]
        if len(best) == beams.count and best[0][0] >= beams.score(going[0][0], written + 1):
            return best[::-1]
    judged = [(beams.score(total, len(new)), new) for total, new in found + going]
    return sorted(judged, reverse=True)[: beams.count]


@pytest.mark.parametrize("stop", [None, 0, 44])
@pytest.mark.parametrize("beams", [Beams(1), Beams(3), Beams(4, 0.0), Beams(2, -1.0), Beams(5, 3)])
def test_beam_search_finds_what_full_passes_find(sess, beams, stop):
    length = 30  # the window slides, at another moment for each prefix
    found = search(sess, MANY, length, beams, SamplingParams(temperature=0, stop_token=stop))
    for prefix, texts in zip(MANY, found, strict=True):
        wanted = likeliest(prefix, length, beams, stop)
        assert [text.tokens for text in texts] == [new for _, new in wanted]
        assert [text.score for text in texts] == pytest.approx([s for s, _ in wanted], rel=1e-4)


def test_some_searches_end_before_others(sess):
    """So rows leave the batch in the test above, and windows slide beside rows that ended."""
    found = search(sess, MANY, 30, Beams(3), SamplingParams(stop_token=0))
    lengths = [max(len(text.tokens) for text in texts) for texts in found]
    assert min(lengths) < 10
    assert max(lengths) == 30


def test_with_a_beam_for_each_token_nothing_is_missed(sess):
    count = HPARAMS.n_vocab
    (found,) = search(sess, [[5, 6]], 2, Beams(count))
    first = log_softmax(oracle.logits(WEIGHTS, HPARAMS, [5, 6])[-1])
    second = [
        log_softmax(oracle.logits(WEIGHTS, HPARAMS, [5, 6, token])[-1]) for token in range(count)
    ]
    totals = (first[:, None] + np.array(second)) / 2
    assert found[0].tokens == [*map(int, np.unravel_index(totals.argmax(), totals.shape))]
    assert [text.score for text in found] == pytest.approx(
        np.sort(totals, axis=None)[::-1][:count], rel=1e-4
    )


def test_one_beam_is_greedy(sess):
    (found,) = search(sess, [[3]], 40, Beams(1))
    assert found[0].tokens == expected([3], 40)


def test_a_search_obeys_penalties_and_ends(sess):
    free = search(sess, [[3]], 12, Beams(3))[0][0].tokens
    sampling = SamplingParams(
        bad_words=((free[0],),), no_repeat_ngram_size=1, repetition_penalty=2.0
    )
    (found,) = search(sess, [[3]], 12, Beams(3), sampling)
    for text in found:
        assert free[0] not in text.tokens
        assert 3 not in text.tokens
        assert len(set(text.tokens)) == 12
    (found,) = search(sess, [[3]], 12, Beams(3), ends=lambda new: len(new) == 4)
    assert [len(text.tokens) for text in found] == [4, 4, 4]


def test_a_search_can_be_left_early(sess):
    with BeamSearch(sess, [[3], [4, 5]], 12, Beams(3)) as found:
        assert found.best() == [[], []]
        for _ in range(4):
            assert found.step() == 2
        assert [[len(text.tokens) for text in texts] for texts in found.best()] == [[4] * 3] * 2
        assert not found.done


def test_a_search_builds_nothing_new(sess):
    search(sess, [[3]], 40, Beams(2))
    operations = len(sess.graph.get_operations())
    search(sess, [[3], [4, 5, 6]], 50, Beams(5, 0.5), SamplingParams(stop_token=3))
    assert len(sess.graph.get_operations()) == operations


@pytest.mark.parametrize("change", [{"count": 0}, {"count": 1.5}, {"length_penalty": float("nan")}])
def test_beams_out_of_range(change):
    with pytest.raises(ValueError, match=str(next(iter(change.values())))):
        Beams(**change)


def test_a_search_that_cannot_begin_leaves_nothing(sess, monkeypatch):
    def interrupted(self, rows):
        raise KeyboardInterrupt

    monkeypatch.setattr(sequences.Generation, "prime", interrupted)
    with pytest.raises(KeyboardInterrupt):
        search(sess, [[3]], 4, Beams(2))


def test_a_search_with_nothing_left(sess):
    everything = SamplingParams(bad_words=tuple((token,) for token in range(HPARAMS.n_vocab)))
    with pytest.raises(ValueError, match="leave no token to choose"):
        search(sess, [[3]], 4, Beams(2), everything)


def test_a_search_in_broken_weights():
    broken = {name: value * np.nan for name, value in WEIGHTS.items()}
    with started(broken) as sess, pytest.raises(RuntimeError, match="weights are broken"):
        search(sess, [[3]], 4, Beams(2))
