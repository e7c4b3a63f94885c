"""The API as OpenAI's own client and curl use it, over a real connection; and what it refuses."""

import asyncio
import concurrent.futures
import contextlib
import json
import runpy
import socket
import sys
import threading
import time
from pathlib import Path

import httpx
import openai
import pytest
from served_model import NAME, load, serving, wait_until, write_model

import gpt_2_simple as gpt2
from gpt_2_simple import session
from gpt_2_simple.serving import api, bodies
from gpt_2_simple.serving import engine as engines
from gpt_2_simple.serving import server as servers
from gpt_2_simple.serving.engine import Engine


@pytest.fixture(scope="module")
def sess(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    write_model(folder)
    sess, _ = load(folder)
    yield sess
    sess.close()


@pytest.fixture(scope="module")
def engine(sess):
    engine = Engine(sess, max_batch=8, max_queue=16)
    engine.start()
    yield engine
    engine.close()


def served(engines, **limits):
    """The address of a server for these engines, and the server."""
    return serving(api.make_app(engines, api.Limits(**limits)))


@pytest.fixture(scope="module")
def address(engine):
    with served({NAME: engine}, hosts=("127.0.0.1",)) as (address, _):
        yield address


@pytest.fixture(scope="module")
def client(address):
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def http(address):
    with httpx.Client(base_url=address, timeout=60) as http:
        yield http


def generated(sess, prompt, **settings):
    options = {"length": 16, "temperature": 0, "return_as_list": True, "stop_token": END}
    return [
        text.removeprefix(prompt)
        for text in gpt2.generate(sess, prefix=prompt, **{**options, **settings})
    ]


END = "<|endoftext|>"


# --- what OpenAI's client gets --------------------------------------------------------------------


def test_completion(client, sess):
    made = client.completions.create(model=NAME, prompt="Where", temperature=0)
    assert made.object == "text_completion"
    assert made.model == NAME
    (choice,) = made.choices
    assert [choice.text] == generated(sess, "Where")
    assert (choice.index, choice.finish_reason, choice.logprobs) == (0, "length", None)
    usage = made.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (5, 16, 21)


def test_seeded_texts_are_those_of_generate(client, sess):
    made = client.completions.create(
        model=NAME, prompt=["One", "Two"], n=3, seed=7, temperature=0.9, top_p=0.8, max_tokens=10,
        extra_body={"top_k": 30},
    )  # fmt: skip
    wanted = gpt2.generate(
        sess, prefix=["One", "Two"], nsamples=3, batch_size=None, seed=7, temperature=0.9,
        top_p=0.8, top_k=30, length=10, stop_token=END, return_as_list=True,
    )  # fmt: skip
    assert [choice.text for choice in made.choices] == [text[3:] for text in wanted]
    assert [choice.index for choice in made.choices] == list(range(6))
    assert made.usage.prompt_tokens == 6


@pytest.mark.parametrize(
    ("prompt", "texts"),
    [
        ("ab", ["ab"]),
        (["ab", "c"], ["ab", "c"]),
        ([97, 98], ["ab"]),
        ([[97, 98], [99]], ["ab", "c"]),
    ],
)
def test_forms_of_prompts(client, sess, prompt, texts):
    made = client.completions.create(model=NAME, prompt=prompt, temperature=0, max_tokens=5)
    wanted = [generated(sess, text, length=5)[0] for text in texts]
    assert [choice.text for choice in made.choices] == wanted


def test_no_prompt_starts_from_endoftext(http, sess):
    answer = http.post("/v1/completions", json={"model": NAME, "temperature": 0}).json()
    (wanted,) = gpt2.generate(sess, length=16, temperature=0, stop_token=END, return_as_list=True)
    assert answer["choices"][0]["text"].lstrip("\n") == wanted
    assert answer["usage"]["prompt_tokens"] == 1


def test_stream(client, sess):
    pieces = list(
        client.completions.create(
            model=NAME, prompt="Where", temperature=0, max_tokens=40, stream=True,
            stream_options={"include_usage": True},
        )
    )  # fmt: skip
    *texts, last = pieces
    assert ["".join(p.choices[0].text for p in texts)] == generated(sess, "Where", length=40)
    reasons = [piece.choices[0].finish_reason for piece in texts]
    assert reasons == [None] * (len(texts) - 1) + ["length"]
    assert all(piece.usage is None for piece in texts)
    assert last.choices == []
    assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (5, 40)
    assert len({piece.id for piece in pieces}) == 1


def test_stream_of_several_texts(client, sess):
    texts = {}
    for piece in client.completions.create(
        model=NAME, prompt=["One", "Two"], n=2, seed=7, stream=True, max_tokens=12, echo=True
    ):
        for choice in piece.choices:
            texts[choice.index] = texts.get(choice.index, "") + choice.text
    wanted = gpt2.generate(
        sess, prefix=["One", "Two"], nsamples=2, batch_size=None, seed=7, temperature=1.0,
        length=12, stop_token=END, return_as_list=True,
    )  # fmt: skip
    assert [texts[i] for i in range(4)] == wanted


def test_async_client(address, sess):
    async def ask():
        async with openai.AsyncOpenAI(base_url=f"{address}/v1", api_key="none") as client:
            calls = [
                client.completions.create(model=NAME, prompt=f"{i}", temperature=0)
                for i in range(12)
            ]
            made = await asyncio.gather(*calls)
            stream = await client.completions.create(
                model=NAME, prompt="A", temperature=0, stream=True
            )
            return made, "".join([piece.choices[0].text async for piece in stream])

    made, text = asyncio.run(ask())
    assert [m.choices[0].text for m in made] == [generated(sess, f"{i}")[0] for i in range(12)]
    assert [text] == generated(sess, "A")


def test_logprobs_and_echo(client, sess):
    made = client.completions.create(
        model=NAME, prompt="Where é", temperature=0, max_tokens=6, logprobs=3, echo=True
    )
    (choice,) = made.choices
    found = choice.logprobs
    text = choice.text
    assert text.startswith("Where é")
    assert found.tokens[:6] == list("Where ")
    assert found.tokens[6:8] == ["bytes:\\xc3", "bytes:\\xa9"]
    assert found.text_offset[:8] == [0, 1, 2, 3, 4, 5, 6, 7][:7] + [7]
    assert found.token_logprobs[0] is None
    assert found.top_logprobs[0] is None
    tokens = session.graph_state(sess).encoder.encode("Where é")
    wanted = gpt2.sample.score_tokens(sess, [tokens])[0]
    assert found.token_logprobs[1 : len(tokens)] == pytest.approx(wanted.tolist(), abs=1e-4)
    # A new text is greedy: each token is the likeliest of its place.
    new = range(len(tokens), len(found.tokens))
    assert new
    for i in new:
        assert len(found.top_logprobs[i]) == 3
        assert found.token_logprobs[i] == max(found.top_logprobs[i].values())
        assert found.text_offset[i] <= len(text)


def test_max_tokens_of_0_scores_the_prompt(client):
    made = client.completions.create(
        model=NAME, prompt="Where", max_tokens=0, logprobs=0, echo=True
    )
    assert made.choices[0].text == "Where"
    assert len(made.choices[0].logprobs.token_logprobs) == 5
    assert made.choices[0].finish_reason == "length"
    assert made.usage.completion_tokens == 0


def test_best_of_returns_the_likeliest(client):
    common = {"model": NAME, "prompt": "One", "seed": 3, "max_tokens": 8, "logprobs": 0}
    every = client.completions.create(n=6, **common).choices
    means = [sum(c.logprobs.token_logprobs) / len(c.logprobs.token_logprobs) for c in every]
    best = client.completions.create(n=2, best_of=6, **common)
    order = sorted(range(6), key=lambda i: -means[i])[:2]
    assert [choice.text for choice in best.choices] == [every[i].text for i in order]
    assert best.usage.completion_tokens == 48


def test_stop_logit_bias_and_penalties(client, sess):
    whole = generated(sess, "Where", length=40)[0]
    stop = whole[9:12]
    made = client.completions.create(
        model=NAME, prompt="Where", temperature=0, max_tokens=40, stop=[stop, "\x00\x00"]
    )
    assert made.choices[0].text == whole[: whole.index(stop)]
    assert made.choices[0].finish_reason == "stop"
    made = client.completions.create(
        model=NAME, prompt="Where", temperature=0, logit_bias={"101": 100}, max_tokens=9
    )
    assert made.choices[0].text == "e" * 9
    made = client.completions.create(
        model=NAME, prompt="Where", temperature=0, presence_penalty=1.5, frequency_penalty=0.5,
        extra_body={"repetition_penalty": 1.2, "min_tokens": 3, "ignore_eos": False},
    )  # fmt: skip
    wanted = generated(
        sess, "Where", presence_penalty=1.5, frequency_penalty=0.5, repetition_penalty=1.2,
        min_length=3,
    )  # fmt: skip
    assert [made.choices[0].text] == wanted


def test_endoftext_ends_a_text_unless_ignored(client, engine):
    end = str(engine.encoder.end_of_text)
    options = {"model": NAME, "prompt": "A", "logit_bias": {end: 100}, "max_tokens": 5}
    made = client.completions.create(**options)
    assert (made.choices[0].text, made.choices[0].finish_reason) == ("", "stop")
    assert made.usage.completion_tokens == 1
    made = client.completions.create(**options, extra_body={"min_tokens": 3})
    assert made.usage.completion_tokens == 4
    made = client.completions.create(**options, extra_body={"ignore_eos": True})
    assert (made.choices[0].text, made.choices[0].finish_reason) == (END * 5, "length")


def test_truncated_prompts(client, sess):
    for wanted, kept in ((5, 5), (-1, 96 - 16)):
        made = client.completions.create(
            model=NAME, prompt="x" * 200 + "Where", temperature=0,
            extra_body={"truncate_prompt_tokens": wanted},
        )  # fmt: skip
        assert made.usage.prompt_tokens == kept
        assert [made.choices[0].text] == generated(sess, ("x" * 200 + "Where")[-kept:])


def test_models(client, http):
    assert [model.id for model in client.models.list()] == [NAME]
    assert client.models.retrieve(NAME).owned_by == "gpt_2_simple"
    with pytest.raises(openai.NotFoundError, match="it may be: varied"):
        client.models.retrieve("gpt-9")


# --- what is refused ------------------------------------------------------------------------------

BAD = [
    ({"temperature": "hot"}, "temperature"),
    ({"temperature": True}, "temperature"),
    ({"temperature": 2.5}, "temperature"),
    ({"temperature": 1e300}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"repetition_penalty": 1e-40}, "repetition_penalty"),
    ({"repetition_penalty": 101}, "repetition_penalty"),
    ({"presence_penalty": -1e300}, "presence_penalty"),
    ({"max_tokens": -1}, "max_tokens"),
    ({"max_tokens": 1.5}, "max_tokens"),
    ({"max_tokens": 96}, "max_tokens"),
    ({"n": 0}, "n"),
    ({"n": 9}, "n"),
    ({"n": 3, "best_of": 2}, "best_of"),
    ({"best_of": 2, "stream": True}, "best_of"),
    ({"stream": 1}, "stream"),
    ({"stream": "yes"}, "stream"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"stream": True, "stream_options": {"x": 1}}, "stream_options"),
    ({"logprobs": 21}, "logprobs"),
    ({"stop": ""}, "stop"),
    ({"stop": ["a", 5]}, "stop"),
    ({"stop": list("abcde")}, "stop"),
    ({"logit_bias": {"257": 1}}, "logit_bias"),
    ({"logit_bias": {"a": 1}}, "logit_bias"),
    ({"logit_bias": {"1": 101}}, "logit_bias"),
    ({"logit_bias": {"1": 10**400}}, "logit_bias"),
    ({"logit_bias": [1]}, "logit_bias"),
    ({"seed": 2**64}, "seed"),
    ({"prompt": []}, "prompt"),
    ({"prompt": [[]]}, "prompt"),
    ({"prompt": [257]}, "prompt"),
    ({"prompt": 65}, "prompt"),
    ({"prompt": [""] * 300_000}, "prompt"),
    ({"prompt": [[1]] * 17}, "prompt"),
    ({"prompt": [-1]}, "prompt"),
    ({"prompt": {"a": 1}}, "prompt"),
    ({"prompt": [True]}, "prompt"),
    ({"prompt": "x" * 81}, "prompt"),
    ({"suffix": "end"}, "suffix"),
    ({"messages": []}, "messages"),
    ({"temprature": 1}, "temprature"),
    ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
    ({"model": 5}, "model"),
    ({"model": None}, "model"),
]


@pytest.mark.parametrize(("change", "param"), BAD, ids=lambda value: str(value)[:40])
def test_wrong_parameters_are_named(http, change, param):
    answer = http.post("/v1/completions", json={"model": NAME, "prompt": "A", **change})
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["param"] == param
    assert param in error["message"]
    assert error["type"] == "invalid_request_error"


def test_null_stands_for_the_default(http):
    body = dict.fromkeys(["max_tokens", "stop", "logit_bias", "suffix", "stream_options", "n"])
    answer = http.post("/v1/completions", json={"model": NAME, "prompt": "A", **body})
    assert answer.status_code == 200


def test_a_prompt_that_is_too_long_says_how_long_it_may_be(http):
    answer = http.post("/v1/completions", json={"model": NAME, "prompt": "secret " * 30})
    assert "it may have 80" in answer.json()["error"]["message"]
    assert "secret" not in answer.text


@pytest.mark.parametrize(
    ("method", "path", "content", "status", "message"),
    [
        ("POST", "/v1/completions", b"{", 400, "not JSON"),
        ("POST", "/v1/completions", b"[1]", 400, "JSON object"),
        ("POST", "/v1/completions", b"\xff", 400, "not JSON"),
        ("POST", "/v1/completions", b'{"model": NaN}', 400, "not JSON"),
        ("POST", "/v1/completions", b"[" * 100_000, 400, "not JSON"),
        ("POST", "/v1/completions", b" " * (2**20 + 1), 413, "above 1048576 bytes"),
        ("POST", "/v1/completions", b'{"model": "gpt-9"}', 404, "not served here"),
        ("GET", "/v1/completions", None, 405, "no such method"),
        ("TRACE", "/v1/completions", None, 405, "no such method"),
        ("GET", "/nothing", None, 404, "nothing at this address"),
        ("POST", "/v1/chat/completions", b"{}", 404, "chat is not supported"),
    ],
)
def test_errors_have_openais_form(http, method, path, content, status, message):
    answer = http.request(method, path, content=content)
    assert answer.status_code == status
    assert message in answer.json()["error"]["message"]
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_a_large_body_without_a_length_is_refused(http):
    answer = http.post("/v1/completions", content=(b" " * 10_000 for _ in range(200)))
    assert answer.status_code == 413


def test_surrogates_and_unusual_characters(http, sess):
    for prompt in ("\ud800", "\x00", "👩‍👩‍👧", "ﷺ"):
        body = json.dumps({"model": NAME, "prompt": prompt, "echo": True, "temperature": 0})
        answer = http.post("/v1/completions", content=body)
        assert answer.status_code == 200
        assert answer.json()["choices"][0]["text"].startswith(prompt)


def test_keys_are_needed_where_there_is_one(engine):
    with served({NAME: engine}, api_key="sesam") as (address, _), httpx.Client() as http:
        for key in (None, "sesa", "sesame", "ſesam"):
            headers = {} if key is None else {"authorization": f"Bearer {key}".encode()}
            answer = http.get(f"{address}/v1/models", headers=headers)
            assert answer.status_code == 401
            assert answer.json()["error"]["code"] == "invalid_api_key"
            assert answer.headers["www-authenticate"] == "Bearer"
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="sesam")
        assert client.completions.create(model=NAME, prompt="A").choices[0].text
        assert http.get(f"{address}/health").json() == {"status": "ok"}
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=f"{address}/v1", api_key="x").models.list()


def test_other_pages_and_names_are_refused(http, address, engine):
    body = {"model": NAME, "prompt": "A"}
    for origin in ("https://evil.example", "null", "http://[", address.replace("127", "128")):
        answer = http.post("/v1/completions", json=body, headers={"origin": origin})
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "origin_not_allowed")
    assert http.post("/v1/completions", json=body, headers={"origin": address}).status_code == 200
    answer = http.get("/health", headers={"host": "evil.example"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (403, "host_not_allowed")
    with served({NAME: engine}, allow_origin=("https://mine.example",)) as (address, _):
        headers = {"origin": "https://mine.example"}
        answer = httpx.post(f"{address}/v1/completions", json=body, headers=headers)
        assert answer.headers["access-control-allow-origin"] == "https://mine.example"
        headers["access-control-request-method"] = "POST"
        answer = httpx.options(f"{address}/v1/completions", headers=headers)
        assert answer.status_code == 204
        assert "authorization" in answer.headers["access-control-allow-headers"]
        answer = httpx.get(f"{address}/health", headers={"origin": "https://other.example"})
        assert answer.status_code == 403


def test_answers_have_safe_headers(http):
    for path in ("/health", "/nothing", "/v1/models"):
        headers = http.get(path).headers
        assert headers["content-security-policy"].startswith("default-src 'none'")
        assert headers["x-content-type-options"] == "nosniff"
        assert "server" not in headers


# --- load, time, and the end ----------------------------------------------------------------------


def test_a_full_queue_is_told_with_retry_after(sess):
    engine = Engine(sess, max_batch=1, max_queue=1)  # it does not run
    with served({NAME: engine}, timeout=0.5) as (address, _):
        first = threading.Thread(
            target=httpx.post, args=[f"{address}/v1/completions"], kwargs={"json": {"model": NAME}}
        )
        first.start()
        wait_until(lambda: engine.n_waiting == 1)
        answer = httpx.post(f"{address}/v1/completions", json={"model": NAME})
        assert answer.status_code == 429
        assert int(answer.headers["retry-after"]) > 0
        assert answer.json()["error"]["type"] == "rate_limit_error"
        engine._thread.start()
        first.join()
        engine.close()
        answer = httpx.post(f"{address}/v1/completions", json={"model": NAME})
        assert answer.status_code == 503


def test_others_are_answered_while_a_request_is_queued(http, engine, monkeypatch):
    """Making thousands of texts takes a while."""
    began, answered, submit = threading.Event(), threading.Event(), engine.submit

    def slow_submit(requests):
        began.set()
        assert answered.wait(20)
        return submit(requests)

    monkeypatch.setattr(engine, "submit", slow_submit)
    body = {"model": NAME, "prompt": "Where", "max_tokens": 1}
    with concurrent.futures.ThreadPoolExecutor() as pool:
        made = pool.submit(http.post, "/v1/completions", json=body)
        assert began.wait(20)
        assert http.get("/health").status_code == 200
        answered.set()
        assert made.result().status_code == 200


def test_time_over_before_the_first_token_is_408(engine):
    with served({NAME: engine}, timeout=0.0) as (address, _):
        for stream in (False, True):
            body = {"model": NAME, "prompt": "A", "stream": stream}
            answer = httpx.post(f"{address}/v1/completions", json=body)
            assert answer.status_code == 408
            assert "time limit" in answer.json()["error"]["message"]


def test_a_client_that_goes_away_frees_its_rows(address, engine, monkeypatch):
    decode = engines.sequences.Generation.decode

    def slow(self, steps, *args):
        time.sleep(0.05)
        return decode(self, 1, *args)

    monkeypatch.setattr(engines.sequences.Generation, "decode", slow)
    for stream in (False, True):
        body = json.dumps({"model": NAME, "prompt": "A", "max_tokens": 90, "stream": stream})
        host, port = address.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as connection:
            head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\n"
            connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode())
            wait_until(lambda: engine.n_running == 1)
            if stream:
                assert b"200 OK" in connection.recv(1000)
        began = time.monotonic()
        wait_until(lambda: engine.n_running == 0)
        assert time.monotonic() - began < 3  # 90 tokens would take 4.5 s


def refuses(address):
    """Whether no new connection is taken."""
    try:
        httpx.get(f"{address}/health")
    except httpx.TransportError:
        return True
    return False


def test_shutdown_finishes_what_is_being_written(sess, engine, monkeypatch):
    decode = engines.sequences.Generation.decode

    def slow(self, steps, *args):
        time.sleep(0.02)
        return decode(self, 1, *args)

    monkeypatch.setattr(engines.sequences.Generation, "decode", slow)
    with (
        served({NAME: engine}) as (address, server),
        openai.OpenAI(base_url=f"{address}/v1", api_key="none") as client,
    ):
        stream = client.completions.create(
            model=NAME, prompt="A", temperature=0, max_tokens=50, stream=True
        )
        text = next(stream).choices[0].text
        server.stop()
        wait_until(lambda: refuses(address))
        text += "".join(piece.choices[0].text for piece in stream)
    monkeypatch.undo()
    assert [text] == generated(sess, "A", length=50)


def test_metrics(http, client):
    before = http.get("/metrics").text
    client.completions.create(
        model=NAME, prompt="Where", max_tokens=7, extra_body={"ignore_eos": True}
    )
    http.post("/v1/completions", content=b"{")
    running = f'gpt_2_simple_rows_running{{model="{NAME}"}} 0.0'
    # A text is answered before its row is free.
    assert any(running in http.get("/metrics").text or time.sleep(0.1) for _ in range(300))
    found = {}
    for text in (before, http.get("/metrics").text):
        for line in text.splitlines():
            if not line.startswith("#"):
                name, value = line.rsplit(" ", 1)
                found.setdefault(name, []).append(float(value))
    label = f'{{model="{NAME}"}}'
    prefix = "gpt_2_simple_"
    change = {name: values[-1] - values[0] for name, values in found.items()}
    assert change[f"{prefix}prompt_tokens_total{label}"] == 5
    assert change[f"{prefix}generation_tokens_total{label}"] == 7
    assert change[f"{prefix}time_to_first_token_seconds_count{label}"] == 1
    assert change[f"{prefix}tokens_per_second_count{label}"] == 1
    assert found[f"{prefix}requests_waiting{label}"][-1] == 0
    assert found[f"{prefix}rows_running{label}"][-1] == 0
    assert found[f'{prefix}requests_total{{model="",status="400"}}'][-1] >= 1


def test_the_description_lists_every_parameter(http):
    description = http.get("/openapi.json").json()
    assert description["openapi"].startswith("3.1")
    properties = description["components"]["schemas"]["CompletionRequest"]["properties"]
    for name in ("prompt", "max_tokens", "logit_bias", "top_k", "truncate_prompt_tokens", "n"):
        assert properties[name]["description"]
    assert properties["n"]["maximum"] == 8
    assert properties["model"]["enum"] == [NAME]
    assert properties["temperature"] == {
        "description": properties["temperature"]["description"],
        "type": ["number", "null"], "minimum": 0, "maximum": 2, "default": 1.0,
    }  # fmt: skip


def test_the_description_states_the_most_tokens_that_a_served_model_writes(
    http, client, engine, tmp_path
):
    def maximum(http):
        schemas = http.get("/openapi.json").json()["components"]["schemas"]
        return schemas["CompletionRequest"]["properties"]["max_tokens"]["maximum"]

    most = maximum(http)
    made = client.completions.create(model=NAME, prompt="A", max_tokens=most)
    assert made.choices[0].finish_reason in ("length", "stop")
    with pytest.raises(openai.BadRequestError, match="max_tokens"):
        client.completions.create(model=NAME, prompt="A", max_tokens=most + 1)

    gpt2.create_gpt2(
        model_name="long", model_dir=str(tmp_path), n_layer=1, n_head=1, n_embd=8, n_ctx=128
    )
    with contextlib.closing(gpt2.start_tf_sess()) as sess:
        gpt2.load_gpt2(sess, model_name="long", model_dir=str(tmp_path))
        both = {NAME: engine, "long": Engine(sess, max_batch=1)}
        with served(both) as (address, _), httpx.Client(base_url=address) as http:
            assert maximum(http) == 127


def test_an_error_in_the_server_tells_no_secret(http, monkeypatch, capsys):
    def fail(*args):
        raise KeyError("/home/me/secret prompt")

    monkeypatch.setattr(api.completions, "read_completion", fail)
    answer = http.post("/v1/completions", json={"model": NAME, "prompt": "secret prompt"})
    assert answer.status_code == 500
    assert answer.json()["error"]["type"] == "server_error"
    printed = capsys.readouterr()
    assert "secret" not in answer.text + printed.out + printed.err


def test_the_example_with_openais_client(address, monkeypatch, capsys):
    example = Path(__file__).parent.parent / "examples" / "serve_client.py"
    monkeypatch.setattr(
        sys, "argv", [str(example), "--address", address, "--prompt", "Once", "--max_tokens", "6"]
    )
    runpy.run_path(str(example), run_name="__main__")
    out = capsys.readouterr().out
    assert f"--- two texts of {NAME}\nOnce" in out
    assert "12 tokens were written" in out
    assert "--- how likely each token was\n" in out


def connect(address):
    host, port = address.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)))
    connection.settimeout(20)
    return connection


def read_all(connection):
    """All that comes until the server closes the connection."""
    found = b""
    with contextlib.suppress(ConnectionError):
        while part := connection.recv(65536):
            found += part
    return found


def test_idle_and_half_open_connections_are_closed_and_others_served(engine, monkeypatch):
    monkeypatch.setattr(servers, "HEAD_SECONDS", 2)
    with served({NAME: engine}) as (address, _), contextlib.ExitStack() as stack:
        idle = [stack.enter_context(connect(address)) for _ in range(200)]
        for connection in idle[:100]:
            connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n")  # and no more
        answer = httpx.post(f"{address}/v1/completions", json={"model": NAME, "prompt": "A"})
        assert answer.status_code == 200
        assert all(read_all(connection) == b"" for connection in idle)


def test_too_many_connections_are_closed_at_once(engine, monkeypatch):
    monkeypatch.setattr(servers, "MAX_CONNECTIONS", 3)
    with served({NAME: engine}) as (address, _), contextlib.ExitStack() as stack:
        first = [stack.enter_context(connect(address)) for _ in range(3)]
        assert read_all(stack.enter_context(connect(address))) == b""
        first[0].sendall(b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        assert b"200 OK" in read_all(first[0])


@pytest.mark.parametrize("flood", [b"X: " + b"a" * 100_000, b"a: b\r\n" * 20_000])
def test_a_flood_of_headers_is_refused(address, flood):
    with connect(address) as connection:
        with contextlib.suppress(ConnectionError):
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n" + flood)
        answer = read_all(connection)
        assert answer == b"" or b" 400 " in answer.splitlines()[0]
    assert httpx.get(f"{address}/health").status_code == 200


def test_a_body_that_does_not_come_is_not_waited_for(address, monkeypatch):
    monkeypatch.setattr(bodies, "BODY_SECONDS", 0.2)
    with connect(address) as connection:
        head = b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 100\r\n\r\n{"
        connection.sendall(head)
        assert b"did not arrive in time" in connection.recv(65536) + connection.recv(65536)
