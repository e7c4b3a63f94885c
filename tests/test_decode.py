"""The prefill and the decode loop against a NumPy GPT-2 that computes every position afresh."""

import threading

import numpy as np
import oracle
import pytest
import tensorflow as tf
from small_model import GREEDY, HPARAMS, PREFIXES, WEIGHTS, expected, loader, started, write

from gpt_2_simple import model, session
from gpt_2_simple.generation import decode, kv_cache, sequences
from gpt_2_simple.sample import SamplingParams, next_token_probs, score_tokens


@pytest.mark.parametrize("chunk", [1, 7, None])
@pytest.mark.parametrize("prefixes", [[[7]], [[1, 2, 3, 4, 5]], PREFIXES, [[9], [9], [3, 3], [9]]])
def test_greedy_equals_the_full_forward_pass(small_sess, prefixes, chunk):
    length = 60  # the window slides several times, at another moment for each row
    found = write(small_sess, prefixes, length, chunk=chunk)
    assert found.dtype == np.int32
    assert found.tolist() == [expected(prefix, length) for prefix in prefixes]


@pytest.mark.parametrize(
    ("max_tokens", "shapes"),
    [
        # Contexts of 19, 8 and 2 tokens; that of one token has none before its last.
        (1024, [(3, 19)]),
        (8, [(3, 2), (2, 4), (2, 4), (1, 8), (1, 1)]),
        (1, [(3, 1)] * 2 + [(2, 1)] * 6 + [(1, 1)] * 11),
    ],
)
def test_prefill_in_pieces_leaves_out_rows_that_are_done(
    small_sess, monkeypatch, max_tokens, shapes
):
    run, found = sequences.run, []

    def watch(sess, fetches, feeds):
        found.extend(np.shape(x) for x in feeds.values() if np.ndim(x) == 2)
        return run(sess, fetches, feeds)

    generation = sequences.Generation(small_sess)
    stream = sequences.random_stream(0, 0)
    rows = [sequences.Sequence(list(prefix), GREEDY, 4, stream) for prefix in PREFIXES]
    monkeypatch.setattr(sequences, "run", watch)
    for _ in generation.join(rows, max_tokens):
        pass
    monkeypatch.undo()
    assert found == shapes
    tokens = generation.decode(4).tokens.tolist()
    generation.free()
    assert tokens == [expected(prefix, 4) for prefix in PREFIXES]


@pytest.mark.parametrize(
    "hparams",
    [
        model.HParams(n_vocab=50, n_ctx=8, n_embd=6, n_head=1, n_layer=1),
        model.HParams(n_vocab=259, n_ctx=100, n_embd=24, n_head=3, n_layer=3),
        model.HParams(n_vocab=5, n_ctx=1, n_embd=10, n_head=5, n_layer=1),
    ],
)
def test_decode_of_other_model_sizes(hparams, monkeypatch):
    monkeypatch.setattr(sequences, "MIN_CACHE_GROWTH", 3)
    monkeypatch.setattr(sequences, "MAX_TOKENS_PER_RUN", 5)
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


def test_window_slides_many_times(small_sess):
    tokens = write(small_sess, [[5, 6]], 500)
    assert tokens[0].tolist() == expected([5, 6], 500)


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


@pytest.mark.parametrize("name", ["model/wte", "model/h1/mlp/c_fc/w", "model/ln_f/b"])
@pytest.mark.parametrize("settings", [{"temperature": 0}, {"top_k": 3}, {"top_p": 0.5}, {}])
def test_nan_weights_are_an_error(broken, name, settings):
    sess, spoil = broken
    spoil(name)
    for prefixes in [[[1]], PREFIXES]:
        with pytest.raises(RuntimeError, match="weights are broken"):
            write(sess, prefixes, 5, SamplingParams(**settings))
    assert sess.run(kv_cache.cache_ops(sess).n_caches) == 0
    with pytest.raises(RuntimeError, match="weights are broken"):
        next_token_probs(sess, [1, 2])
    with pytest.raises(RuntimeError, match="weights are broken"):
        score_tokens(sess, [[1, 2]])


def test_two_sessions_build_their_decode_loops_in_two_threads(monkeypatch):
    inside, first_is_done = threading.Event(), threading.Event()
    make_token, found = decode.next_token, {}

    def next_token(*args):
        if threading.current_thread().name == "first":
            second.start()
            inside.wait(0.5)  # for ever, if only one graph is built at a time
        else:
            inside.set()
            first_is_done.wait()
        return make_token(*args)

    def work(sess):
        try:
            found[threading.current_thread().name] = write(sess, [[7]], 5).tolist()
        finally:
            first_is_done.set()

    monkeypatch.setattr(decode, "next_token", next_token)
    with started() as one, started() as two:
        first = threading.Thread(target=work, args=[one], name="first")
        second = threading.Thread(target=work, args=[two], name="second")
        first.start()
        first.join()
        second.join()
    assert found == dict.fromkeys(["first", "second"], [expected([7], 5)])


def test_float16_overflow_names_the_precision():
    with session.start_tf_sess() as sess:
        session.build_model(sess, HPARAMS, [], "float16")
        large = np.full(4 * HPARAMS.n_embd, 1e5, np.float32)  # more than float16 holds
        loader(sess)({**WEIGHTS, "model/h1/mlp/c_fc/b": large})
        with pytest.raises(RuntimeError, match="float16 holds none above 65504"):
            write(sess, [[7]], 5)


@pytest.mark.parametrize("error", [None, tf.errors.CancelledError(None, None, "")])
def test_session_closed_while_it_generates_is_an_error_with_the_remedy(monkeypatch, error):
    with started() as sess:
        tokens = sequences.generate_tokens(sess, [[7]], 50, GREEDY, chunk=5)
        next(tokens)
        sess.close()
        if error is not None:  # as for a run that was going on

            def run(*_):
                raise error

            monkeypatch.setattr(sess, "run", run)
        with pytest.raises(RuntimeError, match=r"is closed; make another with start_tf_sess\(\)"):
            next(tokens)
