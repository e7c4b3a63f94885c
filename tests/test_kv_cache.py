"""A generation's cache leaves the session however the generation ends."""

import gc

import pytest
from conftest import TINY
from small_model import GREEDY, PREFIXES, started, write

import gpt_2_simple as gpt2
from gpt_2_simple import session
from gpt_2_simple.generation import kv_cache, text_stream
from gpt_2_simple.generation.request import build_request
from gpt_2_simple.generation.settings import GenerationSettings
from gpt_2_simple.model import HParams
from gpt_2_simple.sample import generate_tokens

SIZES = {"n_vocab": 257, **TINY}


@pytest.mark.parametrize("stop", ["close", "throw", "interrupt", "forget"])
def test_ending_generation_early_frees_the_cache(small_sess, stop):
    tokens = generate_tokens(small_sess, PREFIXES, 50, GREEDY, chunk=5)
    assert next(tokens).shape == (4, 5)
    assert small_sess.run(kv_cache.cache_ops(small_sess).n_caches) == 1
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


def test_interrupted_run_frees_the_cache(small_sess, monkeypatch):
    run = small_sess.run
    calls = []

    def fail(fetches, feeds=None, **options):
        result = run(fetches, feeds, **options)
        if isinstance(fetches, list):
            calls.append(result)
            if len(calls) == 2:
                raise KeyboardInterrupt  # as after a run, whose result is then lost
        return result

    monkeypatch.setattr(small_sess, "run", fail)
    with pytest.raises(KeyboardInterrupt):
        write(small_sess, PREFIXES, 50, chunk=5)


def test_generator_without_next_allocates_no_cache(small_sess):
    generate_tokens(small_sess, PREFIXES, 50, GREEDY)


def test_session_closed_before_generator():
    with started() as sess:
        tokens = generate_tokens(sess, [[1]], 50, GREEDY, chunk=5)
        next(tokens)
    tokens.close()


@pytest.mark.parametrize("kind", ["tokens", "stream", "texts", "beams"])
def test_garbage_collector_ends_generation_without_a_run(workplace, sess, monkeypatch, kind):
    gpt2.load_gpt2(sess, model_name="tiny", model_dir="models")
    settings = GenerationSettings(length=20, num_beams=2 if kind == "beams" else 1)
    if kind == "tokens":
        values = generate_tokens(sess, [[1]], 20, GREEDY, chunk=2)
    elif kind == "stream":
        values = gpt2.generate_stream(sess, length=20)
    elif kind == "texts":
        request = build_request(settings, session.graph_state(sess).encoder, HParams(**SIZES))
        values = text_stream._sample_batch(sess, request, range(1), [])
    else:
        request = build_request(settings, session.graph_state(sess).encoder, HParams(**SIZES))
        values = text_stream._search_batch(sess, request, range(1), [])
    next(values)
    run, runs = sess.run, []
    monkeypatch.setattr(sess, "run", lambda *args, **_: runs.append(args))
    del values  # within an operation's construction a run would wait for ever
    gc.collect()
    assert runs == []
    monkeypatch.setattr(sess, "run", run)
    assert sess.run(kv_cache.cache_ops(sess).n_caches) == 0


def test_closing_a_stream_frees_its_cache_at_once(workplace, sess):
    gpt2.load_gpt2(sess, model_name="tiny", model_dir="models")
    pieces = gpt2.generate_stream(sess, length=20)
    next(pieces)
    n_caches = kv_cache.cache_ops(sess).n_caches
    assert sess.run(n_caches) == 1
    pieces.close()
    assert sess.run(n_caches) == 0
