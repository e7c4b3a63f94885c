"""Models from and to the Hugging Face hub: huggingface_hub's client against a local server."""

import os
import subprocess
import sys
from pathlib import Path

import hub_server
import pytest
from exchange_models import assert_weights_equal, read_ours, write_ours, write_transformers

from gpt_2_simple.exchange import hub

pytest.importorskip("huggingface_hub")


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A running hub; processes that the test starts find it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with hub_server.serve() as running:
        for name, value in running.environment(tmp_path / "hf_home").items():
            monkeypatch.setenv(name, value)
        yield running


def publish(server, repo="me/mine", **config):
    """Puts a model on the hub; returns its weights."""
    weights = write_transformers("theirs", **config)
    files = {path.name: path.read_bytes() for path in Path("theirs").iterdir()}
    server.repos[repo] = {"private": False, "files": files, "commits": []}
    return weights


def run(code, **environment):
    """Runs code in a process of its own, where huggingface_hub reads its variables."""
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment}, capture_output=True, text=True, timeout=240,
    )  # fmt: skip


# huggingface_hub tries again and again, and waits longer each time.
DOWNLOAD = """
import time
sleep, time.sleep = time.sleep, lambda seconds: sleep(min(seconds, 0.01))
from gpt_2_simple.exchange import hub
try:
    print(hub.download({repo!r}, {revision!r}))
except Exception as error:
    print(type(error).__name__, error)
"""


def download(repo="me/mine", revision=None, **environment):
    result = run(DOWNLOAD.format(repo=repo, revision=revision), **environment)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def command(*words, **environment):
    return run(
        f"import sys; from gpt_2_simple.cli.main import main; sys.exit(main({list(words)}))",
        **environment,
    )


def paths_read(server):
    return [path.rpartition("/")[2] for method, path in server.seen if method == "GET"]


def test_import_takes_a_model_from_the_hub(server):
    weights = publish(server)
    server.repos["me/mine"]["files"] |= {"pytorch_model.bin": b"x" * 1000, "tf_model.h5": b"y"}
    result = command("import", "me/mine")
    assert result.returncode == 0, result.stderr
    assert result.stdout.endswith(f"Imported me/mine as {Path('models', 'mine')}\n")
    assert_weights_equal(read_ours("models/mine"), weights)
    assert "model.safetensors" in paths_read(server)
    assert not {"pytorch_model.bin", "tf_model.h5"} & {*paths_read(server)}


def test_a_download_goes_on_where_it_broke_off(server):
    publish(server)
    server.cut.add("model.safetensors")
    folder = download()
    assert (
        Path(folder, "model.safetensors").read_bytes()
        == Path("theirs/model.safetensors").read_bytes()
    )


def test_a_model_in_the_cache_needs_no_connection(server):
    publish(server)
    folder = download()
    server.seen.clear()
    assert download(HF_HUB_OFFLINE="1") == folder
    assert server.seen == []


def test_what_is_not_gpt_2_is_refused_before_its_weights_are_downloaded(server):
    publish(server, model_type="llama")
    assert "ValueError" in (out := download())
    assert "model_type='llama' is not 'gpt2'" in out
    assert "model.safetensors" not in paths_read(server)


@pytest.mark.parametrize(
    ("repo", "revision", "environment", "told"),
    [
        ("me/other", None, {}, "FileNotFoundError 'me/other' is no folder here, and no model on"),
        ("me/mine", "v2", {}, "FileNotFoundError me/mine on the hub has no such revision"),
        ("no such name!", None, {}, "ValueError 'no such name!' is neither a folder nor a name"),
        ("me/mine", None, {"HF_HUB_OFFLINE": "1"}, "ConnectionError the hub failed for me/mine"),
        (
            "me/mine", None, {"HF_ENDPOINT": "http://127.0.0.1:9"},
            "ConnectionError the hub failed for me/mine",
        ),
    ],
)  # fmt: skip
def test_what_the_hub_has_not_is_told(server, repo, revision, environment, told):
    publish(server)
    assert told in download(repo, revision, **environment)


def test_a_model_with_pickles_only_is_told(server):
    publish(server)
    files = server.repos["me/mine"]["files"]
    files["pytorch_model.bin"] = files.pop("model.safetensors")
    out = download()
    assert "FileNotFoundError me/mine has no .safetensors: its weights are pickles" in out
    assert "pytorch_model.bin" not in paths_read(server)


def test_a_model_without_a_config_is_told(server):
    publish(server)
    del server.repos["me/mine"]["files"]["config.json"]
    assert "FileNotFoundError me/mine on the hub lacks a file" in download()


def test_a_private_model_needs_the_right_token(server):
    publish(server)
    server.token = "right"
    assert "HF_TOKEN" in download()
    assert Path(download(HF_TOKEN="right"), "config.json").is_file()


def test_a_server_that_fails_is_told(server):
    publish(server)
    server.fail["/config.json$"] = 500
    assert "ConnectionError the hub failed for me/mine" in download()


def test_push_makes_a_private_repository_with_all_files(server):
    write_ours("models/mine")
    server.token = "secret"
    result = command("push", "me/new", "--model_name", "mine", HF_TOKEN="secret")
    assert result.returncode == 0, result.stderr
    assert f"Pushed to {server.url}/me/new" in result.stdout
    pushed = server.repos["me/new"]
    assert pushed["private"] is True
    names = ["config.json", "model.safetensors", "tokenizer.json", "README.md", "vocab.json"]
    assert set(names) <= set(pushed["files"])
    assert pushed["commits"] == ["Upload a model from gpt_2_simple"]
    result = command("import", "me/new", "--model_name", "back", HF_TOKEN="secret")
    assert result.returncode == 0, result.stderr
    assert_weights_equal(read_ours("models/back"), read_ours("models/mine"))


PUSH = """
import gpt_2_simple as gpt2
try:
    print(gpt2.push_to_hub("me/new", model_name="mine", **{arguments}))
except Exception as error:
    print(type(error).__name__, error)
"""


def push(**arguments):
    result = run(PUSH.format(arguments=arguments))
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()[-1]


def test_a_second_push_replaces_the_weights_of_the_first(server):
    write_ours("models/mine")
    assert push(max_shard_size="50KB", private=False) == f"{server.url}/me/new"
    files = server.repos["me/new"]["files"]
    files["notes.txt"] = b"mine"
    assert "model.safetensors.index.json" in files
    assert push(token="not looked at") == f"{server.url}/me/new"
    assert [name for name in files if name.startswith("model")] == ["model.safetensors"]
    assert files["notes.txt"] == b"mine"
    assert server.repos["me/new"]["private"] is False


def test_a_push_with_a_wrong_token_is_told(server):
    write_ours("models/mine")
    server.token = "right"
    assert push(token="wrong").startswith("PermissionError the hub does not accept the token")
    assert server.repos == {}


def test_a_push_of_what_is_not_there_asks_the_hub_nothing(server):
    write_ours("models/other")
    assert push().startswith("FileNotFoundError no model in")
    assert server.seen == []


def test_without_huggingface_hub_the_pip_line_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=r'pip install "gpt_2_simple\[hub\]"'):
        hub.load_library()
