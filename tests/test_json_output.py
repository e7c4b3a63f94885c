"""The flag --json: standard output holds JSON and nothing else."""

import json
from pathlib import Path

import hub_server
import pytest

import gpt_2_simple as gpt2
from gpt_2_simple.cli import main
from gpt_2_simple.cli.commands import COMMANDS


@pytest.fixture
def place(workplace, sess):
    """A current folder with a run, a run that trained an adapter, and a table."""
    options = {"model_name": "tiny", "sample_every": 0, "verbose": 0, "seed": 1, "steps": 2}
    gpt2.finetune(sess, "text.txt", run_name="poems", **options)
    with gpt2.start_tf_sess() as another:
        gpt2.finetune(another, "text.txt", run_name="adapted", lora_rank=2, **options)
    (workplace / "table.csv").write_text("text\na\nb\n")
    return workplace


def printed(capsys, line, status=0):
    """What a command prints, read as JSON."""
    capsys.readouterr()
    assert main.main([*line.split(), "--json"]) == status
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(
    ("line", "path"),
    [
        ("create --model_name new --n_layer 1 --n_embd 8 --n_head 1", "models/new"),
        ("add_tokens <speaker> --model_name tiny --new_model_name plays", "models/plays"),
        ("export poems", "export/poems"),
        ("export poems --quantization f32", "export/poems-f32/poems-f32.gguf"),
    ],
)
def test_what_was_made_is_told_by_its_path(place, capsys, line, path):
    assert printed(capsys, line) == {"path": str(Path(path))}
    assert (place / path).exists()


def test_files_of_a_run(place, capsys):
    pytest.importorskip("matplotlib")
    quantized = Path(printed(capsys, "quantize poems")["path"])
    assert quantized.is_file()
    assert Path(printed(capsys, "plot poems")["path"]).read_bytes().startswith(b"\x89PNG")
    merged = printed(capsys, "merge adapted --merged_name whole")["checkpoint"]
    assert Path(f"{merged}.index").is_file()
    assert "whole" in merged


def test_a_model_that_goes_and_comes(place, capsys, monkeypatch):
    constants = pytest.importorskip("huggingface_hub.constants")
    with hub_server.serve() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        told = printed(capsys, "push me/poems --run_name poems")
        assert told == {"url": f"{hub.url}/me/poems"}
        assert "model.safetensors" in hub.repos["me/poems"]["files"]
    printed(capsys, "export poems --path theirs")
    assert printed(capsys, "import theirs") == {"path": str(Path("models/theirs"))}


def test_rows_of_a_table(place, capsys):
    assert printed(capsys, "encode_csv table.csv --out_path rows.txt") == {"rows": 2}


def test_memory_tells_arguments_and_bytes(place, capsys):
    plans = printed(capsys, "memory 355M --batch_size 2")
    flag = "use_memory_saving_gradients"
    assert [plan["arguments"][flag] for plan in plans] == [False, True]
    for plan in plans:
        arguments = dict(plan["arguments"])
        assert arguments.pop("model_name") == "355M"
        expected = gpt2.memory_plan("355M", **arguments)
        assert (plan["total"], plan["weights"]) == (expected.total, expected.weights)
    assert plans[1]["stored_activations"] < plans[0]["stored_activations"]


def test_memory_tells_what_fits_the_best_first(place, capsys):
    fitting = printed(capsys, "memory 774M --gpu_gb 16")
    assert main.main("memory 774M --gpu_gb 16".split()) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(fitting) > 1
    for line, plan in zip(lines, fitting, strict=True):
        assert all(f"{name}={value!r}" in line for name, value in plan["arguments"].items())
        assert line.endswith(f"# {plan['total'] / 2**20:,.0f} MB")
    assert printed(capsys, "memory 774M --batch_size 8 --gpu_gb 1", status=1) == []


def test_an_error_leaves_standard_output_empty(place, capsys):
    capsys.readouterr()
    assert main.main("export nothing --json".split()) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert "no run in checkpoint" in err


def test_each_command_that_makes_or_lists_something_has_the_flag():
    without = {name for name, command in COMMANDS.items() if "json" not in command.flags}
    # These write while they work, or return nothing.
    assert without == {"finetune", "generate", "serve", "download", "encode"}
