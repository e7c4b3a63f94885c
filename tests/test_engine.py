"""Continuous batching: each text is generate()'s, whatever runs beside it; faults stay alone."""

import contextlib
import itertools
import math

import numpy as np
import pytest
from served_model import load, request, wait_until, weights, write_model

import gpt_2_simple as gpt2
from gpt_2_simple import session
from gpt_2_simple.generation import kv_cache, sequences
from gpt_2_simple.generation.sampling import BROKEN
from gpt_2_simple.generation.settings import SamplingParams
from gpt_2_simple.serving import engine as engines
from gpt_2_simple.serving.engine import Delta, Engine, PromptScores

DRAWN = SamplingParams(temperature=1.0, top_k=20)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    write_model(folder)
    sess, put = load(folder)
    yield sess, put
    sess.close()


@pytest.fixture
def sess(loaded):
    return loaded[0]


@contextlib.contextmanager
def running(sess, **limits):
    engine = Engine(sess, **limits)
    engine._thread.start()  # without the graphs of the warm-up, which later tests have anyway
    try:
        yield engine
    finally:
        engine.close()
        assert sess.run(kv_cache.cache_ops(sess).n_caches) == 0


@pytest.fixture
def engine(sess):
    with running(sess, max_batch=6) as engine:
        yield engine


def generated(sess, prompt, **settings):
    """What generate() writes after a prompt."""
    options = {"length": 20, "temperature": 0, "include_prefix": False, "return_as_list": True}
    # Without its prefix, generate() drops newlines at the start of a text.
    texts = gpt2.generate(
        sess, prefix=f"{prompt}", **{**options, **settings, "include_prefix": True}
    )
    return [text.removeprefix(prompt) for text in texts]


def submit(engine, *requests):
    engine.submit([made for made, _ in requests])
    return [client for _, client in requests]


def test_texts_equal_those_of_generate_whatever_runs_beside_them(sess, engine):
    prompts = ["A", "Where the bee sucks", "x" * 60, "é", "To be, or not to be", "1 2 3"]
    cases = []
    for i in range(24):
        prompt, length = prompts[i % 6], 5 + 7 * (i % 5)
        settings = [
            {"temperature": 0},
            {"temperature": 1.0, "top_k": 20, "seed": i},
            {"temperature": 0, "repetition_penalty": 1.5},
            {"temperature": 0.8, "top_p": 0.7, "seed": 5, "frequency_penalty": 0.5},
            {"temperature": 0.7, "seed": 1, "stop_token": 101, "min_length": 3},
            {"temperature": 0, "logit_bias": {"e": 3.0}},
            {"temperature": 1.2, "seed": 9, "stop": ["a", "th"]},
        ][i % 7]
        cases.append((prompt, length, settings))
    clients = []
    for i, (prompt, length, settings) in enumerate(cases):
        named = {k: v for k, v in settings.items() if k not in ("seed", "stop", "logit_bias")}
        bias = ((101, 3.0),) if "logit_bias" in settings else ()
        clients += submit(
            engine,
            request(
                sess, prompt, length=length, sampling=SamplingParams(**named, logit_bias=bias),
                seed=settings.get("seed", 0), stop=tuple(settings.get("stop", ())),
                streams=bool(i % 2), n_likeliest=3 if i % 3 == 0 else -1,
            ),
        )  # fmt: skip
        if i % 5 == 4:  # so that requests join while others run
            clients[-2].wait()
    for client, (prompt, length, settings) in zip(clients, cases, strict=True):
        assert [client.text()] == generated(sess, prompt, **{"length": length, **settings})
        last = client.deltas()[-1]
        assert last.finish_reason == ("length" if last.n_tokens == length else "stop")
    wait_until(lambda: engine._generation.n_slots == 0)  # nothing is kept for nobody


def test_several_texts_of_a_prompt_are_those_of_nsamples(sess, engine):
    (client,) = submit(engine, request(sess, "Once", n_texts=4, seed=3, sampling=DRAWN))
    wanted = generated(sess, "Once", nsamples=4, batch_size=4, seed=3, temperature=1.0, top_k=20)
    assert [client.text(i) for i in range(4)] == wanted
    (client,) = submit(engine, request(sess, "Once", seed=3, first_text=2, sampling=DRAWN))
    assert client.text() == wanted[2]


def test_first_come_first_served(sess):
    finished = []
    with running(sess, max_batch=1) as engine:
        requests = [request(sess, "x" * (50 - 9 * i), length=5) for i in range(5)]
        for i, (_, client) in enumerate(requests):
            client.on_event = lambda event, i=i: finished.append(i)
        clients = submit(engine, *requests)
        [client.wait() for client in clients]
    assert finished == list(range(5))


@pytest.fixture
def watched(monkeypatch):
    """What the generations do: 'prefill', tokens [rows, time]; or 'decode', rows."""
    log = []
    prefill_run, decode = sequences.run, sequences.Generation.decode

    def run(sess, fetches, feeds):
        for placeholder, value in feeds.items():
            if getattr(placeholder, "name", "").startswith("sample") and np.ndim(value) == 2:
                log.append(("run", np.shape(value)))
        return prefill_run(sess, fetches, feeds)

    def watch(self, steps, *args):
        log.append(("decode", [row.n_cached for row in self.rows], self))
        return decode(self, steps, *args)

    monkeypatch.setattr(sequences, "run", run)
    monkeypatch.setattr(sequences.Generation, "decode", watch)
    return log


def test_max_batch_bounds_the_rows(sess, watched):
    with running(sess, max_batch=3) as engine:
        requests = [request(sess, str(i), length=6 + i, n_texts=1 + i % 2) for i in range(9)]
        clients = submit(engine, *requests)
        [client.wait() for client in clients]
    rows = [len(entry[1]) for entry in watched if entry[0] == "decode"]
    assert max(rows) == 3
    assert all(generated(sess, str(i), length=6 + i) == [c.text()] for i, c in enumerate(clients))


def test_bytes_bound_the_cache(sess, watched):
    bytes_a_column = 2 * 4 * 2 * 32
    with running(sess, max_batch=8, max_cache_bytes=bytes_a_column * 70) as engine:
        requests = [request(sess, "x" * 10, length=10 + i) for i in range(6)]
        clients = submit(engine, *requests)
        [client.wait() for client in clients]
        sizes = {e[2].n_slots * e[2].capacity for e in watched if e[0] == "decode"}
    assert max(len(entry[1]) for entry in watched if entry[0] == "decode") == 3
    assert max(sizes) <= 70
    with running(sess, max_batch=8, max_cache_bytes=1) as engine:
        large = submit(engine, request(sess, "x"))[0]
        assert [large.text()] == generated(sess, "x")  # alone, a request always runs


def test_a_long_prompt_is_computed_in_pieces_between_which_others_grow(sess, watched, monkeypatch):
    monkeypatch.setattr(engines, "PREFILL_TOKENS", 8)
    monkeypatch.setattr(engines, "BUSY_CHUNK_SECONDS", 0.0)
    monkeypatch.setattr(engines, "CHUNK_SECONDS", 0.0)  # else a quick machine ends "A" too soon
    with running(sess, max_batch=4) as engine:
        short, _ = pair = request(sess, "A", length=60, streams=True)
        client = pair[1]
        long = request(sess, "y" * 50, length=5)
        client.on_event = lambda event: long and len(client.events) == 2 and submit(engine, long)
        submit(engine, pair)
        assert [client.text()] == generated(sess, "A", length=60)
        assert [long[1].text()] == generated(sess, "y" * 50, length=5)
    pieces = [i for i, entry in enumerate(watched) if entry[0] == "run" and entry[1] == (1, 8)]
    assert len(pieces) == 6  # 49 tokens; the last of them is alone
    for start, end in itertools.pairwise(pieces):
        assert "decode" in [entry[0] for entry in watched[start:end]]


def test_short_prompts_are_computed_together(sess, watched):
    with running(sess, max_batch=8) as engine:
        with engine._condition:
            clients = submit(engine, *(request(sess, "ab" * (i + 1), length=4) for i in range(4)))
        [client.wait() for client in clients]
    assert ("run", (4, 7)) in watched
    for i, client in enumerate(clients):
        assert [client.text()] == generated(sess, "ab" * (i + 1), length=4)


def test_a_full_queue_refuses_and_a_closed_engine_too(sess):
    engine = Engine(sess, max_queue=2)
    submit(engine, request(sess))
    with pytest.raises(engines.QueueFullError):
        submit(engine, request(sess), request(sess))  # all or none
    assert engine.n_waiting == 1
    (client,) = submit(engine, request(sess))
    engine._thread.start()
    engine.close()
    client.wait()  # failed, or was quicker
    with pytest.raises(engines.ClosedError):
        submit(engine, request(sess))


def test_a_client_that_goes_away_frees_its_row(sess, engine):
    gone, client = request(sess, "A", length=90, streams=True, n_texts=3)
    other = request(sess, "B", length=70)
    jobs = engine.submit([gone, other[0]])
    client.on_event = lambda event: jobs[0].cancel()
    assert [other[1].text()] == generated(sess, "B", length=70)
    assert len(client.events) == 1
    gone, client = request(sess, "A", length=90)

    def fail(event):
        raise ConnectionError

    client.on_event = fail  # a listener that fails is as one that has gone
    submit(engine, (gone, client))
    wait_until(lambda: engine.n_running == 0 and engine.n_waiting == 0)


def test_a_client_that_goes_away_while_its_prompt_is_computed(sess, monkeypatch):
    monkeypatch.setattr(engines, "PREFILL_TOKENS", 4)
    run, jobs = sequences.run, []

    def cancel_then_run(sess, fetches, feeds):
        if jobs and engine._joining:
            jobs[0].cancel()
        return run(sess, fetches, feeds)

    monkeypatch.setattr(sequences, "run", cancel_then_run)
    with running(sess) as engine:
        made, client = request(sess, "y" * 60)
        jobs += engine.submit([made])
        other = submit(engine, request(sess, "B"))[0]
        assert [other.text()] == generated(sess, "B")
    assert client.events == []


def test_time_over(sess, engine, monkeypatch):
    late = submit(engine, request(sess, deadline=-math.inf))[0]
    assert late.failure.status == 408
    made, client = request(sess, "A", length=90, streams=True, deadline=1e12)
    clock = [0.0]
    monkeypatch.setattr(engines.time, "monotonic", lambda: clock[0])

    def end_time(event):
        clock[0] = 2e12

    client.on_event = end_time
    submit(engine, (made, client))
    text = client.text()
    last = client.deltas()[-1]
    assert last.finish_reason == "length"
    assert 0 < last.n_tokens < 90
    monkeypatch.undo()
    assert generated(sess, "A", length=90)[0].startswith(text)


def test_logits_that_are_not_finite_fail_one_request(sess, engine, monkeypatch):
    decode = sequences.Generation.decode
    bad, client = request(sess, "bad", length=30)

    def spoil(self, steps, *args):
        chunk = decode(self, steps, *args)
        for row in self.rows:
            if row.tokens[:3] == list(b"bad"):
                row.status = BROKEN
        return chunk

    monkeypatch.setattr(sequences.Generation, "decode", spoil)
    others = [request(sess, "A", length=40), (bad, client), request(sess, "C", length=40)]
    submit(engine, *others)
    assert client.failure.status == 500
    assert "not finite" in client.failure.message
    monkeypatch.undo()
    for prompt, (_, other) in (("A", others[0]), ("C", others[2])):
        assert [other.text()] == generated(sess, prompt, length=40)
    assert engine.error is None


def test_settings_that_leave_no_token_fail_one_request(sess, engine):
    nothing = SamplingParams(bad_words=tuple((token,) for token in range(257)))
    first, second = submit(engine, request(sess, "A"), request(sess, "A", sampling=nothing))
    assert second.failure.status == 400
    assert [first.text()] == generated(sess, "A")


def test_broken_weights_end_the_engine(loaded):
    sess, put = loaded
    whole = weights(session.graph_state(sess).hparams)
    deaths = []
    try:
        with running(sess, on_death=deaths.append) as engine:
            put({**whole, "model/wte": whole["model/wte"] * np.nan})
            (client,) = submit(engine, request(sess))
            assert client.failure.status == 500
            wait_until(lambda: deaths)
            with pytest.raises(engines.ClosedError, match="weights are broken"):
                submit(engine, request(sess))
        assert "weights are broken" in deaths[0]
        with pytest.raises(RuntimeError, match="weights are broken"):
            Engine(sess).start()
    finally:
        put(whole)


def test_an_error_of_tensorflow_fails_what_runs_and_the_engine_lives_on(sess, engine, monkeypatch):
    decode = sequences.Generation.decode

    def fail(self, steps, *args):
        decode(self, steps, *args)
        raise MemoryError("/secret/path: no memory")

    monkeypatch.setattr(sequences.Generation, "decode", fail)
    clients = submit(engine, request(sess, "A"), request(sess, "B"))
    assert [client.failure.status for client in clients] == [500, 500]
    assert "secret" not in clients[0].failure.message
    monkeypatch.undo()
    assert [submit(engine, request(sess, "A"))[0].text()] == generated(sess, "A")


def test_scores_equal_those_of_score_tokens(sess, engine):
    made, client = request(sess, "Where", length=12, n_likeliest=4, scores_prompt=True)
    (other,) = submit(engine, request(sess, "A", length=30))
    submit(engine, (made, client))
    client.wait()
    scores = next(e for e in client.events if isinstance(e, PromptScores)).tokens
    new = client.deltas()[-1].tokens
    tokens = list(b"Where") + [score.token for score in new]
    assert [score.token for score in scores] == list(b"Where")
    assert scores[0].log_probability is None
    (wanted,) = gpt2.sample.score_tokens(sess, [tokens])
    found = [score.log_probability for score in [*scores[1:], *new]]
    assert found == pytest.approx(wanted.tolist(), abs=1e-4)
    for score in [*scores[1:], *new]:
        values = [p for _, p in score.likeliest]
        assert len(values) == 4
        assert values == sorted(values, reverse=True)
        assert dict(score.likeliest).get(score.token, score.log_probability) == pytest.approx(
            score.log_probability, abs=1e-4
        )
    assert client.deltas()[-1].log_probability == pytest.approx(sum(wanted[4:]), abs=1e-3)
    assert [other.text()] == generated(sess, "A", length=30)


def test_pieces_of_a_stream_never_hold_the_start_of_a_stop(sess, engine):
    whole = generated(sess, "A", length=60)[0]
    stop = whole[20:24]
    (client,) = submit(
        engine, request(sess, "A", length=60, stop=(stop,), streams=True, n_likeliest=0)
    )
    text = client.text()
    assert text == whole[: whole.index(stop)]
    seen = ""
    for delta in client.deltas():
        assert isinstance(delta, Delta)
        seen += delta.text
        assert whole.startswith(seen)
    scores = [score for delta in client.deltas() for score in delta.tokens]
    assert [score.offset for score in scores] == sorted(score.offset for score in scores)
    assert scores[-1].offset < len(text)
