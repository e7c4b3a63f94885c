"""A generation's cache leaves the session however the generation ends."""

import pytest
from small_model import GREEDY, PREFIXES, started, write

from gpt_2_simple.generation import kv_cache
from gpt_2_simple.sample import generate_tokens


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
