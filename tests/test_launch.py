"""The command `serve`, and serving.app(): loading, the address, the end, and what is refused."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import warnings

import httpx
import pytest

import gpt_2_simple as gpt2
from gpt_2_simple import serving
from gpt_2_simple.serving import launch
from gpt_2_simple.serving.server import bound_socket
from gpt_2_simple.serving.settings import AppSettings, ServeSettings

ON_WINDOWS = sys.platform == "win32"


def generated(folder, prompt):
    with gpt2.start_tf_sess() as sess:
        gpt2.load_gpt2(sess, model_name="tiny", model_dir=str(folder / "models"))
        (text,) = gpt2.generate(
            sess, prefix=prompt, length=9, temperature=0, return_as_list=True,
            stop_token="<|endoftext|>",
        )  # fmt: skip
    return text.removeprefix(prompt)


@pytest.mark.skipif(ON_WINDOWS, reason="Windows has no such signals")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_command_serves_until_a_signal_and_exits_with_0(workplace, number):
    command = [sys.executable, "-u", "-m", "gpt_2_simple", "serve"]
    command += ["--model_name", "tiny", "--port", "0", "--api_key", "sesam"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"},
    ) as process:  # fmt: skip
        line = ""
        while "Serving" not in line:
            line = process.stdout.readline()
            assert line, process.stderr.read()
        assert line.startswith("Serving tiny at http://127.0.0.1:")
        address = line.split()[3]
        body = {"model": "tiny", "prompt": "secret", "temperature": 0, "max_tokens": 9}
        answer = httpx.post(
            f"{address}/v1/completions", json=body, headers={"authorization": "Bearer sesam"},
            timeout=60,
        )  # fmt: skip
        process.send_signal(number)
        out, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert answer.json()["choices"][0]["text"] == generated(workplace, "secret")
    assert "secret" not in out


def test_a_taken_port_is_told_before_a_model_is_loaded(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match=f"port={port} .*give another port"):
            gpt2.serve(port=port)
    with pytest.raises(FileNotFoundError, match="no run in"):
        gpt2.serve(port=0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_batch": 0}, "max_batch=0"),
        ({"timeout": 0}, "timeout=0"),
        ({"port": 70000}, "port=70000"),
        ({"run_name": [5]}, r"run_name=\[5\]"),
        ({"api_key": ""}, "api_key=''"),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(ValueError, match=message):
        ServeSettings(**settings)


def test_names_of_models():
    assert AppSettings().run_name == ("run1",)
    assert AppSettings(model_name="124M").run_name == ()
    assert AppSettings(run_name=["a", "b"]).run_name == ("a", "b")
    with pytest.raises(ValueError, match="two models have one name"):
        serving.app(run_name="a", model_name="a")


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
@pytest.mark.parametrize("key", [None, "sesam"])
def test_a_host_that_others_reach_without_a_key_is_warned_of(monkeypatch, tmp_path, host, key):
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with pytest.raises(FileNotFoundError):
            gpt2.serve(host=host, port=0, api_key=key)
    assert bool(caught) == (host == "0.0.0.0" and key is None)


def test_a_missing_extra_is_named_with_its_pip_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "gpt_2_simple.serving.server", None)
    monkeypatch.delitem(sys.modules, "gpt_2_simple.serving.server")
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(ImportError, match=r'uvicorn: pip install "gpt_2_simple\[serve\]"'):
        gpt2.serve(port=0)


def test_the_application_of_several_runs_mounts_anywhere(workplace):
    gpt2.create_gpt2(model_name="other", model_dir="models", seed=1, n_layer=1, n_embd=8, n_ctx=16)
    app = serving.app(model_name=["tiny", "other"], max_batch=2, api_key="sesam")

    async def use():
        transport = httpx.ASGITransport(app)
        headers = {"authorization": "Bearer sesam"}
        async with httpx.AsyncClient(
            transport=transport, base_url="http://any.example", headers=headers
        ) as client:
            names = [model["id"] for model in (await client.get("/v1/models")).json()["data"]]
            texts = []
            for name in names:
                body = json.dumps({"model": name, "prompt": "A", "max_tokens": 5})
                answer = await client.post("/v1/completions", content=body)
                texts.append(answer.json()["usage"]["completion_tokens"])
            return names, texts

    names, tokens = asyncio.run(use())
    assert names == ["tiny", "other"]
    assert all(0 < count <= 5 for count in tokens)
    asyncio.run(shut_down(app))


def test_a_mounted_application_asks_for_its_key_and_has_its_page(workplace):
    from starlette.applications import Starlette
    from starlette.routing import Mount
    from starlette.testclient import TestClient

    app = serving.app(model_name="tiny", api_key="sesam")
    client = TestClient(Starlette(routes=[Mount("/ai", app)]))
    assert client.get("/ai/v1/models").status_code == 401
    headers = {"authorization": "Bearer sesam"}
    assert client.get("/ai/v1/models", headers=headers).status_code == 200
    assert "<textarea" in client.get("/ai/").text
    asyncio.run(shut_down(app))


async def shut_down(app):
    """Sends what a server sends to an application at its end."""
    messages = [{"type": "lifespan.startup"}, {"type": "lifespan.shutdown"}]
    sent = []

    async def receive():
        return messages.pop(0)

    async def send(message):
        sent.append(message["type"])

    await app({"type": "lifespan", "asgi": {"version": "3.0"}}, receive, send)
    assert sent == ["lifespan.startup.complete", "lifespan.shutdown.complete"]


def test_broken_weights_are_told_before_the_port_answers(workplace, monkeypatch):
    def fail(self):
        raise RuntimeError("the model's weights are broken")

    monkeypatch.setattr(launch.Engine, "_warm_up", fail)
    with pytest.raises(RuntimeError, match="weights are broken"):
        gpt2.serve(model_name="tiny", port=0)


def test_address_of_ipv6():
    from gpt_2_simple.serving.server import address_of

    try:
        with bound_socket("::1", 0) as listener:
            assert address_of(listener).startswith("http://[::1]:")
    except OSError:
        pytest.skip("this machine has no IPv6")
