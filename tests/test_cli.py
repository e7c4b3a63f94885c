"""Command lines in; which functions they call with what, what they print and how they end."""

import ast
import dataclasses
import functools
import inspect
import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import types
import warnings
from pathlib import Path

import pytest
import tensorflow as tf

from gpt_2_simple import gpt_2, model
from gpt_2_simple.cli import commands, parser, plain_commands
from gpt_2_simple.cli import main as cli
from gpt_2_simple.common import published
from gpt_2_simple.data import dataset
from gpt_2_simple.distributed import ray
from gpt_2_simple.exchange import adapters, gguf, huggingface, push
from gpt_2_simple.generation import generate as generate_module
from gpt_2_simple.generation.settings import GenerationSettings
from gpt_2_simple.storage import add_tokens, create, download
from gpt_2_simple.training import history
from gpt_2_simple.training import memory_plan as memory

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def workplace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(parser.DEBUG_VARIABLE, raising=False)
    monkeypatch.setenv("COLUMNS", "80")
    return tmp_path


@functools.cache
def small_plan():
    return memory.memory_plan(model.HParams(n_vocab=300, n_ctx=32, n_embd=16, n_head=2, n_layer=1))


class Calls(list):
    """What the replaced functions were called with: (name, arguments by name)."""

    def of(self, name):
        return [arguments for called, arguments in self if called == name]

    def one(self, name):
        (arguments,) = self.of(name)
        return arguments

    def names(self):
        return [name for name, _ in self]


@pytest.fixture
def calls(monkeypatch):
    """Replaces each function that the command line calls; arguments must fit its signature.

    Datasets and runs need not exist.
    """
    monkeypatch.setattr(commands, "_check_files", lambda settings: None)
    for name in ("run_folder", "model_folder"):
        monkeypatch.setattr(plain_commands, name, lambda *names, **_: os.path.join(*names))
    calls = Calls()
    session = types.SimpleNamespace(close=lambda: calls.append(("close", {})))
    calls.results = {"start_tf_sess": session, "is_gpt2_downloaded": True}
    calls.results["memory_plan"] = small_plan()
    calls.results["fitting_plans"] = [small_plan()]
    targets = [
        (module, name)
        for command in FUNCTIONS.values()
        for module, names in command.items()
        for name in names
    ]
    targets += [(gpt_2, name) for name in ("start_tf_sess", "is_gpt2_downloaded", "download_gpt2")]
    targets += [(memory, "fitting_plans"), (ray, "finetune_on_ray")]
    calls.results["finetune_on_ray"] = types.SimpleNamespace(interrupted=False)
    for module, name in set(targets):
        signature = inspect.signature(getattr(module, name))
        monkeypatch.setattr(module, name, functools.partial(record, calls, name, signature))
    return calls


def record(calls, name, signature, *args, **kwargs):
    arguments = dict(signature.bind(*args, **kwargs).arguments)
    assert arguments.pop("sess", None) in (None, calls.results["start_tf_sess"])
    calls.append((name, arguments))
    if "destination_path" in arguments:
        Path(arguments["destination_path"]).write_text("a text")
    result = calls.results.get(name)
    if isinstance(result, BaseException):
        raise result
    return result


FUNCTIONS = {
    "finetune": {gpt_2: ["finetune"]},
    "generate": {gpt_2: ["generate", "load_gpt2"]},
    "serve": {gpt_2: ["serve"]},
    "download": {download: ["download_gpt2"]},
    "create": {create: ["create_gpt2"]},
    "add_tokens": {add_tokens: ["add_tokens"]},
    "encode": {dataset: ["encode_dataset"]},
    "encode_csv": {dataset: ["encode_csv"]},
    "memory": {memory: ["memory_plan"]},
    "plot": {history: ["plot_history"]},
    "merge": {adapters: ["merge_adapter"]},
    "quantize": {gpt_2: ["quantize"]},
    "export": {huggingface: ["export_huggingface"], gguf: ["export_gguf"]},
    "import": {huggingface: ["import_huggingface"]},
    "push": {push: ["push_to_hub"]},
}
# What a shell has no use for.
NOT_FLAGS = {"sess", "reuse", "on_step", "return_as_list", "sample_dir", "token"}
# What the command line adds to the functions.
OWN_FLAGS = {
    "finetune": {"workers", "ray"},
    "generate": {"nfiles", "folder", "prefix_file", "format"},
    "memory": {"model_dir", "gpu_gb", "json", "generate", "length", "prefix_length"},
    "export": {"format", "json"},
    **dict.fromkeys(
        ("add_tokens", "create", "encode_csv", "import", "merge", "plot", "push", "quantize"),
        {"json"},
    ),
}
# Flags that do not reach the function as they are.
CHANGED = {"destination_path", ("memory", "model_name")}

# The tables and the functions


def parameters(command):
    return {
        name: parameter
        for module, names in FUNCTIONS[command].items()
        for function in names
        for name, parameter in inspect.signature(getattr(module, function)).parameters.items()
        if name not in NOT_FLAGS
    }


def test_every_command_is_compared_with_its_functions():
    # `runs` and `models` show folders, see test_folder_commands.py.
    assert FUNCTIONS.keys() == commands.COMMANDS.keys() - {"runs", "models"}


@pytest.mark.parametrize("command", FUNCTIONS)
def test_every_argument_is_a_flag_and_every_flag_an_argument(command):
    flags = commands.COMMANDS[command].flags.keys()
    assert flags == parameters(command).keys() | OWN_FLAGS.get(command, set())


@pytest.mark.parametrize("command", FUNCTIONS)
def test_flag_defaults_are_the_functions_defaults(command):
    flags = commands.COMMANDS[command].flags
    for name, parameter in parameters(command).items():
        if parameter.default is not inspect.Parameter.empty:
            assert flags[name].default == parameter.default, name
            assert type(flags[name].default) is type(parameter.default), name


@pytest.mark.parametrize("command", FUNCTIONS)
def test_required_argument_is_the_one_without_default(command):
    required = {n for n, p in parameters(command).items() if p.default is inspect.Parameter.empty}
    spec = commands.COMMANDS[command]
    assert required == (
        {spec.positional} if spec.positional and spec.is_required(spec.positional) else set()
    )


@pytest.mark.parametrize("command", FUNCTIONS)
def test_flags_without_a_default_have_the_functions_type(command):
    kinds = {int: "int", float: "float", str: "str", bool: "bool", type(None): "None"}
    flags = commands.COMMANDS[command].flags
    for name, parameter in parameters(command).items():
        if flags[name].default is None:
            assert flags[name].kinds
            for kind in flags[name].kinds:
                assert kinds[kind] in str(parameter.annotation), name
            repeatable = flags[name].setting.repeatable
            assert ("Sequence" in str(parameter.annotation)) >= repeatable, name


@pytest.mark.parametrize("command", FUNCTIONS)
def test_help_shows_every_flag_with_its_default(command, capsys):
    assert cli.main([command, "--help"]) == 0
    lines = capsys.readouterr().out
    text = re.sub(r"(?<=\w)- ", "-", " ".join(lines.split()))  # words are broken at hyphens
    spec = commands.COMMANDS[command]
    assert set(re.findall(r"^  --(\w+)", lines, re.M)) == {*spec.flags, "debug"}
    for name, field in spec.flags.items():
        meaning = field.setting.shell_help
        assert meaning[0].isupper() or meaning[0] in "'0", name
        assert not meaning.endswith("."), name
        assert "`" not in meaning, name
        default = spec.own_defaults.get(name, field.default)
        shown = field.setting.default_help or repr(default)
        if default is dataclasses.MISSING:
            shown = "none; required"
        elif default != field.default:
            shown = f"{default!r}; in Python {field.default!r}"
        wanted = f"{meaning} (default: {shown})"
        assert re.search(rf"--{name} \S+ {re.escape(' '.join(wanted.split()))}", text), name
    for example in spec.examples:
        assert example in text


@pytest.mark.parametrize("command", FUNCTIONS)
def test_docstring_has_an_entry_for_each_setting(command):
    for module, names in FUNCTIONS[command].items():
        for name in names:
            function = getattr(module, name)
            for parameter in inspect.signature(function).parameters:
                assert re.search(rf"^    {parameter}: \S", inspect.getdoc(function), re.M), (
                    parameter
                )


def test_command_line_defaults_of_0_8_1():
    assert commands.COMMANDS["finetune"].own_defaults == {
        "workers": 1,
        "sample_every": 1000000,
        "save_every": 100,
        "print_every": 10,
        "multi_gpu": True,
    }
    assert commands.COMMANDS["generate"].own_defaults == {"multi_gpu": True}
    own = commands.OutputSettings()
    assert (own.nfiles, own.folder) == (1, "gen")


@pytest.mark.parametrize("command", FUNCTIONS)
def test_examples_in_help_are_accepted(command, calls, workplace):
    (workplace / "titles.txt").write_text("A title\n")
    (workplace / "jokes.csv").write_text("joke\nKnock knock\n")
    for example in commands.COMMANDS[command].examples:
        calls.clear()
        program, *argv = shlex.split(example)
        assert program == "gpt_2_simple"
        if "jsonl" in argv:  # that goes another way, see test_json_lines
            continue
        if command == "memory" and "--generate" in argv:  # see test_generation_memory.py
            continue
        assert cli.main(argv) == 0
        functions = {name for names in FUNCTIONS[command].values() for name in names}
        assert {*functions, "fitting_plans", "finetune_on_ray"} & {*calls.names()}


@pytest.mark.parametrize(
    ("words", "function"),
    [
        ("", "export_huggingface"),
        ("--format huggingface --max_shard_size 1GB", "export_huggingface"),
        ("--format gguf", "export_gguf"),
        ("--quantization q8_0", "export_gguf"),
    ],
)
def test_export_chooses_the_format(calls, words, function):
    assert cli.main(["export", "poems", *words.split()]) == 0
    assert calls.names() == [function]
    assert calls.one(function)["run_name"] == "poems"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--format huggingface --quantization f16", "--format huggingface has no --quantization"),
        ("--quantization f16 --precision float16", "--format gguf has no --precision"),
    ],
)
def test_export_refuses_flags_of_the_other_format(calls, capsys, words, told):
    assert cli.main(["export", *words.split()]) == 1
    assert told in capsys.readouterr().err
    assert calls == []


# Forms of a command line

FINETUNE_DEFAULTS = {
    "sample_every": 1000000,
    "save_every": 100,
    "print_every": 10,
    "multi_gpu": True,
}


@pytest.mark.parametrize(
    "line",
    [
        "finetune a.txt --steps 10 --overwrite True",
        "finetune --steps 10 a.txt --overwrite True",
        "finetune --steps=10 --overwrite a.txt=b --overwrite=true a.txt",
        "--steps 10 --overwrite true finetune a.txt",
        "--steps 10 finetune --overwrite True a.txt",
        "finetune a.txt --overwrite --steps 10",
        "finetune --dataset a.txt --overwrite --steps 10",
        "--mode finetune --dataset a.txt --steps 10 --overwrite True",
        "--overwrite True --dataset a.txt --steps 10 --mode finetune",
        "--dataset=a.txt --steps=10 --mode=finetune --overwrite=True",
        "--mode finetune a.txt --steps 10 --overwrite",
        "--dataset a.txt --steps 10 --overwrite True finetune",
        "finetune a.txt --step 10 --overwri",
    ],
)
def test_argument_order_of_finetune(calls, line):
    if "a.txt=b" in line:  # a wrong value, then a right one
        assert cli.main(line.split()) == 2
        return
    assert cli.main(line.split()) == 0
    expected = FINETUNE_DEFAULTS | {"dataset": "a.txt", "steps": 10, "overwrite": True}
    assert calls.one("finetune") == expected


def test_only_given_flags_are_passed_on(calls):
    assert cli.main(["finetune", "a.txt"]) == 0
    assert calls.one("finetune") == FINETUNE_DEFAULTS | {"dataset": "a.txt"}


def test_several_datasets_are_a_list(calls):
    assert cli.main(["finetune", "a.txt", "--steps", "-1", "b.txt"]) == 0
    assert calls.one("finetune")["dataset"] == ["a.txt", "b.txt"]
    assert calls.one("finetune")["steps"] == -1


@pytest.mark.parametrize(
    ("given", "value"),
    [(["--overwrite", "False"], False), (["--overwrite=FALSE"], False), (["--overwrite"], True)],
)
def test_boolean_flags(calls, given, value):
    assert cli.main(["finetune", "a.txt", *given]) == 0
    assert calls.one("finetune")["overwrite"] is value


def sample_value(field):
    """A text for the flag, and the value that it stands for."""
    if field.name == "lora_targets":  # words that are choices, in a list
        return "c_fc", ["c_fc"]
    if field.setting.choices:
        return field.setting.choices[-1], field.setting.choices[-1]
    if int in field.kinds and str not in field.kinds:
        return "300", 300
    if bool in field.kinds:
        return str(not field.default), not field.default
    if float in field.kinds:
        return "0.5", 0.5
    text = " word=2" if field.name == "logit_bias" else f"some {field.name}"
    return text, [text] if field.setting.repeatable else text


# Flags that another one must come with.
TOGETHER = {
    "patience": ["--val_split", "0.1"],
    "lr_schedule": ["--steps", "9"],
    "min_length": ["--stop_token", "5"],
    "nsamples": ["--batch_size", "auto"],
    "batch_size": ["--nsamples", "300"],
    "min_learning_rate": ["--learning_rate", "1"],
    "lora_alpha": ["--lora_rank", "8"],
    "lora_dropout": ["--lora_rank", "8"],
    "lora_targets": ["--lora_rank", "8"],
    "base_precision": ["--lora_rank", "8"],
}


@pytest.mark.parametrize("command", FUNCTIONS)
def test_every_flag_reaches_its_function(command, calls):
    for name, field in commands.COMMANDS[command].flags.items():
        if name in OWN_FLAGS.get(command, ()) or {name, (command, name)} & CHANGED:
            continue
        calls.clear()
        text, value = sample_value(field)
        spec = commands.COMMANDS[command]
        needed = list(TOGETHER.get(name, [])) if command in ("finetune", "generate") else []
        if (command, name) == ("merge", "model_name"):
            needed = ["--adapter", "poems"]
        if spec.positional and spec.is_required(spec.positional) and name != spec.positional:
            needed += [f"--{spec.positional}", "x"]
        assert cli.main([command, *needed, f"--{name}", text]) == 0, name
        functions = [function for names in FUNCTIONS[command].values() for function in names]
        seen = [c[name] for function in functions for c in calls.of(function) if name in c]
        assert seen
        assert all(given == value for given in seen)


def test_values_that_look_like_flags_or_commands(calls):
    line = ["generate", "--prefix", "finetune", "--truncate=--end", "--sample_delim", "-- end --"]
    assert cli.main(line) == 0
    call = calls.one("generate")
    assert call["prefix"] == "finetune"
    assert call["truncate"] == "--end"
    assert call["sample_delim"] == "-- end --"
    assert cli.main(["--prefix", "", "--length_penalty", "-1", "generate"]) == 0
    assert calls.of("generate")[1]["prefix"] == ""
    assert calls.of("generate")[1]["length_penalty"] == -1.0


FLAGS_OF_0_8_1 = {
    "run_name": "r", "checkpoint_dir": "c", "model_name": "124M", "model_dir": "m",
    "dataset": "a.txt", "steps": "5", "restore_from": "fresh", "sample_every": "7",
    "save_every": "8", "print_every": "9", "optimizer": "sgd", "overwrite": "True",
    "nfiles": "1", "nsamples": "2", "folder": "g", "length": "20", "temperature": "0.5",
    "top_k": "3", "top_p": "0.9", "batch_size": "2", "prefix": "p", "truncate": "t",
    "include_prefix": "False", "sample_delim": "d", "multi_gpu": "False",
}  # fmt: skip


@pytest.mark.parametrize("mode", ["finetune", "generate"])
def test_each_mode_accepts_all_flags_of_0_8_1(calls, mode, capsys):
    flags = [word for name, value in FLAGS_OF_0_8_1.items() for word in (f"--{name}", value)]
    assert cli.main(["--mode", mode, *flags]) == 0
    notes = set(re.findall(r"note: \w+ makes no use of (\w+)", capsys.readouterr().err))
    options = commands.COMMANDS[mode].flags.keys()
    assert notes == FLAGS_OF_0_8_1.keys() - options
    used = set().union(*(arguments for name, arguments in calls if name != "close"))
    assert used >= (FLAGS_OF_0_8_1.keys() & options) - {"folder", "nfiles"}


def test_generate_ignores_a_dataset_as_0_8_1_did_but_says_so(calls, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "shakespeare.txt").write_text("text")
    assert cli.main(["generate", "shakespeare.txt"]) == 0
    assert "note: generate makes no use of dataset 'shakespeare.txt'" in capsys.readouterr().err


def test_generate_with_a_word_that_is_no_file_names_the_flag_for_a_run(calls, capsys):
    assert cli.main(["generate", "chg"]) == 2
    assert "for a run of that name give --run_name chg" in capsys.readouterr().err
    assert calls == []


# Wrong usage


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "COMMAND"),
        ("frobnicate", "invalid choice: 'frobnicate'"),
        ("--mode frobnicate", "invalid choice: 'frobnicate'"),
        ("--mode", "COMMAND"),
        ("finetune", "needs DATASET"),
        ("--mode finetune", "needs DATASET"),
        ("finetune a.txt --steps", "expected one argument"),
        ("finetune a.txt --steps ten", "invalid int value: 'ten'"),
        ("finetune a.txt --learning_rate fast", "invalid float value: 'fast'"),
        ("finetune a.txt --overwrite maybe", "'maybe' is neither True nor False"),
        ("finetune --overwrite a.txt", "'a.txt' is neither True nor False"),
        ("generate --include_prefix=1", "'1' is neither True nor False"),
        ("generate --seed x", "invalid int value: 'x'"),
        ("generate --nfiles 0", "--nfiles 0 must be a whole number, 1 or above"),
        ("generate --nfiles -2", "--nfiles -2 must be a whole number, 1 or above"),
        ("generate --format xml", "--format 'xml' must be one of 'text', 'jsonl'"),
        ("finetune a.txt --frobnicate 3", "unrecognized arguments: --frobnicate 3"),
        ("finetune a.txt --dataset b.txt", "--dataset 'b.txt' was given, and 'a.txt' beside it"),
        ("download 124M 355M", "'355M' is more than one model_name"),
        ("encode", "needs FILE_PATH"),
        ("encode_csv", "needs CSV_PATH"),
    ],
)
def test_wrong_usage_exits_with_2_and_names_the_mistake(calls, capsys, line, message):
    assert cli.main(line.split()) == 2
    error = capsys.readouterr().err
    assert error.startswith("usage: gpt_2_simple")
    assert message in error.splitlines()[-1]
    assert calls == []


@pytest.mark.parametrize("line", [["--help"], ["-h"], ["--mode", "generate", "-h"]])
def test_help_exits_with_0(capsys, line):
    assert cli.main(line) == 0
    out, error = capsys.readouterr()
    assert out.startswith("usage: gpt_2_simple")
    assert error == ""


def test_top_level_help_lists_commands_and_exit_statuses(capsys):
    cli.main(["--help"])
    text = capsys.readouterr().out
    assert all(f"\n    {name}" in text for name in commands.COMMANDS)
    assert "130 stopped by Ctrl-C" in text


def test_version(capsys, monkeypatch):
    monkeypatch.setattr(parser.importlib.metadata, "version", lambda name: "1.2.3")
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == "gpt_2_simple 1.2.3\n"


def test_version_without_installation(capsys, monkeypatch):
    def version(name):
        raise parser.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(parser.importlib.metadata, "version", version)
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == "gpt_2_simple (not installed)\n"


# Models


@pytest.mark.parametrize("model", [[], ["--model_name", "355M", "--model_dir", "m"]])
@pytest.mark.parametrize("there", [True, False])
def test_finetune_downloads_a_missing_model_first(calls, model, there, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("a text")
    calls.results["is_gpt2_downloaded"] = there
    assert cli.main(["finetune", "a.txt", *model]) == 0
    fetch = ["is_gpt2_downloaded"] if there else ["is_gpt2_downloaded", "download_gpt2"]
    assert calls.names() == [*fetch, "start_tf_sess", "finetune", "close"]
    name, folder = ("355M", "m") if model else ("124M", "models")
    expected = {"model_name": name, "model_dir": folder}
    assert all(calls.one(name) == expected for name in fetch)


@pytest.mark.parametrize("wrong", ["file", "run of another model"])
def test_finetune_checks_the_run_before_it_downloads(calls, wrong, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    calls.results["is_gpt2_downloaded"] = False
    (tmp_path / "checkpoint").mkdir()
    run = tmp_path / "checkpoint" / "run1"
    (tmp_path / "a.txt").write_text("a text")
    if wrong == "file":
        run.write_text("mine")
    if wrong == "run of another model":
        run.mkdir()
        sizes = {"n_vocab": 257, "n_ctx": 32, "n_embd": 16, "n_head": 2, "n_layer": 2}
        (run / "hparams.json").write_text(json.dumps(sizes))
    assert cli.main(["finetune", "a.txt"]) != 0
    assert calls.names() == ["is_gpt2_downloaded"]
    said = {"file": "run1 is a file", "run of another model": "other sizes"}
    assert said[wrong] in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("finetune missing.txt", "there is no dataset 'missing.txt'"),
        ("finetune here.txt --val_dataset missing.txt", "there is no dataset 'missing.txt'"),
        ("finetune missing.txt --model_name mine", "there is no dataset 'missing.txt'"),
        ("finetune missing.txt --ray local --workers 2", "there is no dataset 'missing.txt'"),
        ("finetune here.txt --model_name mine", "no model in models/mine"),
        ("finetune here.txt --model_name mine --workers 2", "no model in models/mine"),
        ("generate --run_name missing", "no run in checkpoint/missing"),
        ("generate --model_name mine", "no model in models/mine"),
        ("serve missing", "no run in checkpoint/missing"),
        ("serve --model_name 124M --model_name mine", "no model in models/mine"),
        ("quantize missing", "no run in checkpoint/missing"),
        ("export missing", "no run in checkpoint/missing"),
        ("export missing --format gguf", "no run in checkpoint/missing"),
        ("export --model_name 124M", "no model in models/124M"),
        ("push me/it --run_name missing", "no run in checkpoint/missing"),
        ("merge missing", "no run in checkpoint/missing"),
        ("add_tokens <a> --model_name mine", "no model in models/mine"),
        ("plot missing", "no run in checkpoint/missing"),
        ("generate --top_p 3", "top_p"),
    ],
)
def test_mistakes_are_told_before_tensorflow_is_imported(workplace, line, told):
    (workplace / "here.txt").write_text("a text")
    code = (
        "import sys; from gpt_2_simple.cli import main; status = main.main(sys.argv[1:]); "
        "assert 'tensorflow' not in sys.modules; sys.exit(status)"
    )
    done = python("-c", code, *line.split(), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert (done.returncode, done.stdout) == (1, "")
    (error,) = done.stderr.splitlines()
    assert told in error.replace(os.sep, "/")


@pytest.mark.parametrize(
    "line",
    ["finetune a.txt", "generate --model_name 124M", "generate --model_name 124M --folder x/y"],
)
def test_folders_that_cannot_be_written_are_told_before_a_download(
    calls, line, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("a text")
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
    calls.results["is_gpt2_downloaded"] = False
    assert cli.main(line.split()) == 1
    assert calls.names() == ["is_gpt2_downloaded"]
    assert f"cannot write in {tmp_path}" in capsys.readouterr().err


def test_wrong_settings_of_generate_are_told_before_a_download(calls, capsys):
    calls.results["is_gpt2_downloaded"] = False
    assert cli.main(["generate", "--model_name", "124M", "--top_p", "3"]) == 1
    assert "download_gpt2" not in calls.names()


def test_unpublished_model_is_not_downloaded(calls):
    calls.results["is_gpt2_downloaded"] = False
    assert cli.main(["finetune", "a.txt", "--model_name", "mine"]) == 0
    assert cli.main(["generate", "--model_name", "mine"]) == 0
    assert "download_gpt2" not in calls.names()
    assert calls.one("load_gpt2")["model_name"] == "mine"


@pytest.mark.parametrize("there", [True, False])
def test_generate_loads_the_named_model(calls, there):
    calls.results["is_gpt2_downloaded"] = there
    assert cli.main(["generate", "--model_name", "124M", "--model_dir", "m"]) == 0
    assert ("download_gpt2" in calls.names()) is not there
    load = calls.one("load_gpt2")
    assert (load["model_name"], load["model_dir"]) == ("124M", "m")


def test_generate_loads_a_run_without_a_model(calls):
    assert cli.main(["generate", "--run_name", "r", "--checkpoint", "model-5"]) == 0
    assert calls.names() == ["start_tf_sess", "load_gpt2", "generate", "close"]
    load = calls.one("load_gpt2")
    assert (load["run_name"], load["checkpoint"]) == ("r", "model-5")


# Generated files


def contents(folder):
    return {path.name: path.read_text() for path in Path(folder).iterdir()}


def test_output_file_names_of_0_8_1_are_printed(calls, capsys):
    assert cli.main(["generate"]) == 0
    (name,) = contents("gen")
    assert re.fullmatch(r"gpt2_gentext_\d{8}_\d{6}\.txt", name)
    assert capsys.readouterr().out == f"Wrote {os.path.join('gen', name)}\n"


@pytest.fixture
def stopped_clock(monkeypatch):
    class Clock(commands.datetime):
        @classmethod
        def now(cls, tz):
            return cls(2024, 2, 3, 4, 5, 6, tzinfo=tz)

    monkeypatch.setattr(commands, "datetime", Clock)
    return "gpt2_gentext_20240203_040506"


def test_output_files_of_the_same_second_do_not_collide(calls, stopped_clock, workplace):
    folder = workplace / "deep" / "gen"
    folder.mkdir(parents=True)
    (folder / "mine.txt").write_text("mine")
    (folder / f"{stopped_clock}.txt").write_text("earlier")
    assert cli.main(["generate", "--nfiles", "3", "--folder", "deep/gen"]) == 0
    assert contents(folder) == {
        "mine.txt": "mine",
        f"{stopped_clock}.txt": "earlier",
        f"{stopped_clock}-2.txt": "a text",
        f"{stopped_clock}-3.txt": "a text",
        f"{stopped_clock}-4.txt": "a text",
    }


def test_output_file_name_is_claimed_before_generating(calls, stopped_clock, monkeypatch):
    seen = []

    def generate(sess, destination_path, **options):
        seen.append(destination_path)
        if len(seen) == 1:  # another process starts in the same second
            assert cli.main(["generate"]) == 0

    monkeypatch.setattr(gpt_2, "generate", generate)
    assert cli.main(["generate"]) == 0
    assert len(set(seen)) == 2


def test_each_output_file_gets_its_own_seed(calls):
    assert cli.main(["generate", "--seed", "7", "--nfiles", "3"]) == 0
    assert [call["seed"] for call in calls.of("generate")] == [7, 8, 9]
    calls.clear()
    assert cli.main(["generate", "--nfiles", "2"]) == 0
    assert not any("seed" in call for call in calls.of("generate"))


def test_destination_path_is_never_replaced(calls, workplace, capsys):
    assert cli.main(["generate", "--destination_path", "mine.txt"]) == 0
    assert contents(workplace) == {"mine.txt": "a text"}
    (workplace / "mine.txt").write_text("precious")
    calls.clear()
    assert cli.main(["generate", "--destination_path", "mine.txt"]) == 1
    assert "mine.txt exists" in capsys.readouterr().err
    assert contents(workplace) == {"mine.txt": "precious"}
    assert calls == []


def test_destination_path_with_several_files_is_an_error(calls, capsys):
    assert cli.main(["generate", "--destination_path", "a.txt", "--nfiles", "2"]) == 1
    assert "--nfiles asks for 2" in capsys.readouterr().err


@pytest.mark.parametrize(("error", "status"), [(ValueError("no"), 1), (KeyboardInterrupt(), 130)])
def test_failed_generate_leaves_no_empty_file(calls, monkeypatch, error, status):
    def generate(sess, destination_path, **options):
        raise error

    monkeypatch.setattr(gpt_2, "generate", generate)
    assert cli.main(["generate"]) == status
    assert contents("gen") == {}
    assert calls.names()[-1] == "close"


def test_interrupted_generate_keeps_what_was_written(calls, monkeypatch):
    def generate(sess, destination_path, **options):
        Path(destination_path).write_text("half")
        raise KeyboardInterrupt

    monkeypatch.setattr(gpt_2, "generate", generate)
    assert cli.main(["generate"]) == 130
    assert list(contents("gen").values()) == ["half"]


def test_file_in_place_of_the_output_folder_is_an_error(calls, workplace, capsys):
    (workplace / "gen").write_text("mine")
    assert cli.main(["generate"]) == 1
    assert "gen" in capsys.readouterr().err
    assert (workplace / "gen").read_text() == "mine"


def test_verbose_0_prints_nothing(calls, capsys):
    assert cli.main(["generate", "--verbose", "0"]) == 0
    assert capsys.readouterr() == ("", "")
    assert calls.one("load_gpt2")["verbose"] == calls.one("generate")["verbose"] == 0


def test_repeatable_flags_make_lists(calls):
    line = ["--stop", "END", "--stop=###", "--bad_words", "a b", "--stop_token", "50256"]
    assert cli.main(["generate", *line]) == 0
    call = calls.one("generate")
    assert (call["stop"], call["bad_words"], call["stop_token"]) == (["END", "###"], ["a b"], 50256)


def test_batch_size_auto(calls):
    assert cli.main(["generate", "--batch_size", "auto"]) == 0
    assert calls.one("generate")["batch_size"] is None


def test_stream_prints_and_writes_no_file(calls, workplace, capsys):
    assert cli.main(["generate", "--stream"]) == 0
    assert "destination_path" not in calls.one("generate")
    assert calls.one("load_gpt2")["verbose"] == 0
    assert list(workplace.iterdir()) == []
    for more in (["--nfiles", "2"], ["--format", "text"], ["--destination_path", "a.txt"]):
        assert cli.main(["generate", "--stream", *more]) == 1
        assert "--stream prints" in capsys.readouterr().err


# Prefixes from a file, and JSON lines


def lines_of(path):
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def writing(calls, monkeypatch):
    """Lets the functions behind `generate` write texts with their prefixes, as the real ones do."""

    def texts_of(settings):
        return [
            (prefix, f"{prefix}\n\u00e9 {n}\n")
            for prefix in settings.prefixes
            for n in range(settings.nsamples)
        ]

    def generate(sess, destination_path, **options):
        texts = [text for _, text in texts_of(GenerationSettings(**options))]
        written = "".join(f"{text}\n" for text in texts)
        Path(destination_path).write_text(written, encoding="utf-8")

    monkeypatch.setattr(gpt_2, "generate", generate)
    monkeypatch.setattr(generate_module, "iterate_texts", lambda _, settings: texts_of(settings))
    return calls


def test_prefix_file_gives_a_list_of_prefixes(calls, workplace):
    text = "\ufeffone\r\n\n two \n   \nthr\u00e9e"
    (workplace / "p.txt").write_text(text, encoding="utf-8", newline="")
    assert cli.main(["generate", "--prefix_file", "p.txt"]) == 0
    call = calls.one("generate")
    assert call["prefix"] == ["one", " two ", "thr\u00e9e"]
    assert call["batch_size"] is None
    assert list(contents("gen").values()) == ["a text"]
    calls.clear()
    assert cli.main(["generate", "--prefix_file", "p.txt", "--batch_size", "1"]) == 0
    assert calls.one("generate")["batch_size"] == 1


@pytest.mark.parametrize(
    ("content", "more", "message"),
    [
        (None, [], "No such file"),
        (b"", [], "p.txt holds no prefix"),
        (b"\n  \n", [], "p.txt holds no prefix"),
        (b"caf\xe9", [], "p.txt is not UTF-8"),
        (b"a", ["--prefix", "b"], "--prefix_file p.txt, not both"),
    ],
)
def test_unusable_prefix_file_is_an_error(calls, workplace, capsys, content, more, message):
    if content is not None:
        (workplace / "p.txt").write_bytes(content)
    assert cli.main(["generate", "--prefix_file", "p.txt", *more]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert calls == []


def test_json_lines(writing, workplace):
    (workplace / "p.txt").write_text("a\nb\n")
    assert cli.main("generate --prefix_file p.txt --nsamples 2 --format jsonl".split()) == 0
    (name,) = contents("gen")
    assert re.fullmatch(r"gpt2_gentext_\d{8}_\d{6}\.jsonl", name)
    expected = [{"prefix": p, "text": f"{p}\n\u00e9 {n}\n"} for p in "ab" for n in (0, 1)]
    assert lines_of(f"gen/{name}") == expected
    assert "\u00e9" in Path("gen", name).read_text(encoding="utf-8")
    assert cli.main(["generate", "--destination_path", "one.jsonl"]) == 0
    assert lines_of("one.jsonl") == [{"prefix": "", "text": "\n\u00e9 0\n"}]
    assert cli.main("generate --destination_path text.jsonl --format text".split()) == 0
    assert (workplace / "text.jsonl").read_text(encoding="utf-8") == "\n\u00e9 0\n\n"
    assert cli.main(["generate", "--format", "xml"]) == 2


def test_json_lines_escape_lone_surrogates(writing):
    assert cli.main(["generate", "--prefix", "\udcff", "--destination_path", "a.jsonl"]) == 0
    assert lines_of("a.jsonl") == [{"prefix": "\udcff", "text": "\udcff\n\u00e9 0\n"}]


@pytest.mark.parametrize(("error", "status"), [(MemoryError(), 1), (KeyboardInterrupt(), 130)])
def test_json_lines_keep_finished_texts_after_an_error(calls, monkeypatch, capsys, error, status):
    def iterate_texts(sess, settings):
        yield "", "whole"
        yield "", "half"
        raise error

    monkeypatch.setattr(generate_module, "iterate_texts", iterate_texts)
    assert cli.main(["generate", "--nsamples", "5", "--destination_path", "a.jsonl"]) == status
    assert [line["text"] for line in lines_of("a.jsonl")] == ["whole", "half"]
    assert capsys.readouterr().out == "Wrote a.jsonl\n"


# Plans of memory, and plots


def test_memory_prints_tables_with_and_without_recomputing(calls, capsys):
    assert cli.main(["memory", "355M", "--batch_size", "2"]) == 0
    with_and_without = calls.of("memory_plan")
    flag = "use_memory_saving_gradients"
    assert [call.pop(flag) for call in with_and_without] == [False, True]
    expected = {"model_name": published.published_hparams("355M"), "batch_size": 2}
    assert with_and_without == [expected] * 2
    out = capsys.readouterr().out
    assert f"{flag}=False:\n{small_plan()}\n" in out
    assert f"{flag}=True:\n{small_plan()}\n" in out
    calls.clear()
    assert cli.main(["memory", f"--{flag}", "False"]) == 0
    assert calls.one("memory_plan")[flag] is False


def test_memory_prints_calls_that_can_be_pasted(tiny, capsys):
    assert cli.main("memory tiny --gpu_gb 1".split()) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) > 5
    pattern = r'gpt2\.(finetune\(sess, "your\.txt", model_name=\'tiny\', .*\))  # [\d,]+ MB'
    for line in lines:
        call = ast.parse(re.fullmatch(pattern, line)[1], mode="eval").body
        given = {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
        inspect.signature(gpt_2.finetune).bind(None, "your.txt", **given)
    assert cli.main("memory tiny --gpu_gb 1 --batch_size 3".split()) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert all("batch_size=3" in line for line in lines)


def test_memory_uses_93_percent_of_the_card(capsys):
    assert cli.main(["memory", "774M", "--gpu_gb", "16"]) == 0
    needed = re.findall(r"# ([\d,]+) MB", capsys.readouterr().out)
    assert 13_000 < max(int(megabytes.replace(",", "")) for megabytes in needed) < 0.93 * 16384
    # With settings, of these alone: 13,074 MB when recomputing, more when not.
    settings = ["--accumulate_gradients", "5", "--gpu_gb"]
    assert cli.main(["memory", "774M", *settings, "13.5"]) == 1
    assert "more than 93% of 13.5 GB" in capsys.readouterr().err
    assert cli.main(["memory", "774M", *settings, "14"]) == 0


@pytest.mark.parametrize("more", [[], ["--batch_size", "3"]])
def test_memory_says_when_nothing_fits(tiny, calls, capsys, more):
    calls.results["fitting_plans"] = []
    assert cli.main(["memory", "tiny", "--gpu_gb", "0.00001", *more]) == 1
    out, error = capsys.readouterr()
    assert out == ""
    assert error.startswith("gpt_2_simple: nothing fits: tiny")
    assert error.count("\n") == 1


def test_memory_of_an_unknown_model_is_an_error(workplace, capsys):
    assert cli.main(["memory", "huge"]) == 1
    assert "no model in models/huge" in capsys.readouterr().err
    assert cli.main(["memory", "--gpu_gb", "-1"]) == 2


def test_plot_prints_the_path_of_its_file(calls, capsys):
    calls.results["plot_history"] = "checkpoint/run2/history.png"
    assert cli.main(["plot", "run2"]) == 0
    assert calls.one("plot_history") == {"run_name": "run2"}
    assert capsys.readouterr().out == "checkpoint/run2/history.png\n"


# Errors


@pytest.mark.parametrize(
    "error",
    [
        ValueError("temperature=-1 must be\n  at least 0"),
        FileNotFoundError("temperature=-1 must be\n  at least 0"),
        RuntimeError("temperature=-1 must be\n  at least 0"),
        ImportError("temperature=-1 must be\n  at least 0"),
        MemoryError("temperature=-1 must be\n  at least 0"),
    ],
)
def test_errors_are_one_line_and_exit_with_1(calls, capsys, error):
    calls.results["finetune"] = error
    assert cli.main(["finetune", "a.txt"]) == 1
    message = "gpt_2_simple: error: temperature=-1 must be at least 0\n"
    assert capsys.readouterr() == ("", message)
    assert calls.names()[-1] == "close"


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (
            "models/nano exists; give another model_name, or overwrite=True to replace it",
            "models/nano exists; give another model_name, or --overwrite to replace it",
        ),
        ("give steps=5 or epochs=1.5, not both", "give --steps 5 or --epochs 1.5, not both"),
        ("overwrite=False; run_name='my run'.", "--overwrite False; --run_name 'my run'."),
        (
            "get it by gpt2.download_gpt2(model_dir='models', model_name='124M'), or make a small "
            "one by gpt2.create_gpt2()",
            "get it by gpt_2_simple download --model_dir 'models' --model_name '124M', or make a "
            "small one by gpt_2_simple create",
        ),
        (
            "make it by gpt2.finetune(sess, dataset, run_name='run1'), or name a model instead of "
            "a run, such as model_name='124M'",
            "make it by gpt_2_simple finetune dataset --run_name 'run1', or name a model instead "
            "of a run, such as --model_name '124M'",
        ),
        ("no file /data/steps=3/a.txt, restful=5", "no file /data/steps=3/a.txt, restful=5"),
    ],
)
def test_errors_name_flags_and_commands(calls, capsys, message, expected):
    calls.results["finetune"] = ValueError(message)
    assert cli.main(["finetune", "a.txt"]) == 1
    assert capsys.readouterr().err == f"gpt_2_simple: error: {expected}\n"


def test_flags_with_hyphens_are_those_with_underscores(calls):
    assert cli.main(["finetune", "a.txt", "--run-name", "my-run", "--save-every=5"]) == 0
    called = calls.one("finetune")
    assert (called["run_name"], called["save_every"]) == ("my-run", 5)


@pytest.mark.parametrize(("given", "expected"), [("2", 2), ("best", "best")])
def test_checkpoint_is_a_step_or_a_name(calls, given, expected):
    assert cli.main(["generate", "--checkpoint", given]) == 0
    assert calls.one("load_gpt2")["checkpoint"] == expected


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_full_standard_output_is_told_in_one_line_and_exits_with_1():
    with open("/dev/full", "w") as full:
        done = python("-m", "gpt_2_simple", "--version", stdout=full, stderr=subprocess.PIPE)
    assert done.returncode == 1
    message = "gpt_2_simple: error: standard output cannot be written: "
    assert done.stderr.startswith(message)
    assert done.stderr.count("\n") == 1


def test_tensorflow_errors_are_one_line(calls, capsys, monkeypatch):
    def finetune(sess, **options):
        with tf.Graph().as_default(), tf.compat.v1.Session() as session:
            index = tf.compat.v1.placeholder_with_default(7, [])
            session.run(tf.gather([1, 2], index, name="choose"))

    monkeypatch.setattr(gpt_2, "finetune", finetune)
    assert cli.main(["finetune", "a.txt"]) == 1
    message = "gpt_2_simple: error: InvalidArgumentError: indices = 7 is not in [0, 2)\n"
    assert capsys.readouterr().err == message


def test_error_without_message_shows_its_class(calls, capsys):
    calls.results["finetune"] = RuntimeError()
    assert cli.main(["finetune", "a.txt"]) == 1
    assert capsys.readouterr().err == "gpt_2_simple: error: RuntimeError\n"


@pytest.mark.parametrize("how", ["--debug", "1", "0", ""])
def test_debug_shows_the_traceback(calls, monkeypatch, how):
    calls.results["finetune"] = ValueError("no")
    line = ["finetune", "a.txt"]
    if how == "--debug":
        line.insert(0, how)
    else:
        monkeypatch.setenv(parser.DEBUG_VARIABLE, how)
    if how in ("0", ""):
        assert cli.main(line) == 1
        return
    with pytest.raises(ValueError, match="no"):
        cli.main(line)


def test_unexpected_errors_show_their_traceback(calls):
    calls.results["finetune"] = KeyError("wte")
    with pytest.raises(KeyError):
        cli.main(["finetune", "a.txt"])


def test_warnings_are_one_line(calls, capsys, monkeypatch):
    def finetune(sess, **options):
        warnings.warn("the text is short", stacklevel=2)

    monkeypatch.setattr(gpt_2, "finetune", finetune)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        show = warnings.showwarning
        assert cli.main(["finetune", "a.txt"]) == 0
        assert warnings.showwarning is show
    assert capsys.readouterr().err == "gpt_2_simple: warning: the text is short\n"


def test_ctrl_c_exits_with_130(calls, capsys):
    calls.results["finetune"] = types.SimpleNamespace(interrupted=True)
    assert cli.main(["finetune", "a.txt"]) == 130
    calls.results["finetune"] = types.SimpleNamespace(interrupted=False)
    assert cli.main(["finetune", "a.txt"]) == 0
    assert capsys.readouterr().err == ""
    calls.results["load_gpt2"] = KeyboardInterrupt()
    assert cli.main(["generate"]) == 130
    assert capsys.readouterr().err == "gpt_2_simple: interrupted\n"
    assert calls.names()[-1] == "close"


# In a process of its own


def python(*argv, **options):
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
    environment["PYTHONPATH"] = str(ROOT)
    command = [sys.executable, *argv]
    return subprocess.run(command, text=True, timeout=60, env=environment, **options)


WITHOUT_TENSORFLOW = """
import sys
sys.modules["tensorflow"] = None
from gpt_2_simple.cli.main import main
for line in sys.argv[1:]:
    print("ended with", main(line.split()))
    print("after", line, file=sys.stderr)
"""


def test_tensorflow_is_imported_only_for_work():
    lines = [
        "--help", "finetune --help", "--version", "finetune", "download frobnicate",
        "generate --model_name 124M",
    ]  # fmt: skip
    done = python("-c", WITHOUT_TENSORFLOW, *lines, capture_output=True)
    assert re.findall(r"ended with (\d)", done.stdout) == list("000211")
    *_, download, generate = re.split(r"after .*\n", done.stderr)[:-1]
    assert download.startswith("gpt_2_simple: error: --model_name 'frobnicate'")
    assert download.count("\n") == 1
    assert "tensorflow" in generate
    assert done.stderr.count("tensorflow") == generate.count("tensorflow")


def test_help_as_a_module_imports_no_tensorflow():
    done = python("-X", "importtime", "-m", "gpt_2_simple", "--help", capture_output=True)
    assert done.returncode == 0
    assert done.stdout.startswith("usage: gpt_2_simple")
    imported = re.findall(r"\| +([\w.]+)$", done.stderr, re.M)
    assert "gpt_2_simple.cli.main" in imported
    assert not [name for name in imported if name.startswith(("tensorflow", "keras"))]


@pytest.mark.skipif(os.name != "posix", reason="pipes break in other ways there")
def test_closed_pipe_exits_with_141():
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = python("-m", "gpt_2_simple", "--help", stdout=writer, stderr=subprocess.PIPE)
    finally:
        os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


# With a small model, from its making to its texts

TINY = {"model_name": "tiny", "n_layer": 1, "n_head": 2, "n_embd": 16, "n_ctx": 32, "seed": 1}
TEXT = "All work and no play makes Jack a dull boy.\n" * 50


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return gpt_2.create_gpt2(model_dir=str(folder), **TINY)


@pytest.fixture
def tiny(workplace, tiny_model):
    shutil.copytree(tiny_model, workplace / "models" / "tiny")
    (workplace / "text.txt").write_text(TEXT)
    return workplace


def test_create_encode_finetune_generate(workplace, capsys):
    (workplace / "text.txt").write_text(TEXT)
    flags = [word for name, value in TINY.items() for word in (f"--{name}", str(value))]
    assert cli.main(["create", *flags]) == 0
    assert cli.main(["encode", "text.txt", "--model_name", "tiny"]) == 0
    train = "--mode finetune --dataset text_encoded.npz --model_name tiny --steps 3 --print_every 1"
    assert cli.main(train.split() + ["--sample_length", "20"]) == 0
    out = capsys.readouterr().out
    assert len(re.findall(r"\[\d \| \d+\.\d\d\] loss=\d+\.\d\d avg=\d+\.\d\d", out)) == 3
    assert "Saving checkpoint/run1/model-3" in out
    line = "generate --length 10 --nsamples 2 --nfiles 2 --seed 5 --prefix Jack".split()
    assert cli.main(line) == 0
    first = capsys.readouterr().out
    texts = [Path(path).read_text() for path in re.findall(r"Wrote (\S+)", first)]
    assert len(texts) == 2
    assert all(text.count("=" * 20 + "\n") == 2 for text in texts)
    samples = [sample for text in texts for sample in text.split("=" * 20 + "\n")[:2]]
    assert all(sample.startswith("Jack") for sample in samples)
    assert len(set(samples)) == 4


def test_json_lines_and_stream_with_a_real_model(tiny, capsys):
    (tiny / "titles.txt").write_text("All work\nA\n")
    line = "generate --model_name tiny --length 3 --seed 1".split()
    assert cli.main([*line, "--prefix_file", "titles.txt", "--destination_path", "a.jsonl"]) == 0
    first, second = map(json.loads, (tiny / "a.jsonl").read_text(encoding="utf-8").splitlines())
    assert first["prefix"] == "All work"
    assert first["text"].startswith("All work")
    assert len(first["text"]) > len("All work")
    assert second["text"].startswith("A")
    assert capsys.readouterr().out.endswith("Wrote a.jsonl\n")
    assert cli.main([*line, "--prefix", "All work", "--stream"]) == 0
    assert capsys.readouterr().out == first["text"] + "\n"


def test_generate_from_a_model_without_a_run(tiny, capsys):
    assert cli.main(["generate", "--model_name", "tiny", "--length", "5"]) == 0
    assert "Loading pretrained model models/tiny/model.ckpt" in capsys.readouterr().out
    assert len(contents("gen")) == 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("finetune text.txt --model_name huge", "huge"),
        ("finetune nothing.txt --model_name tiny", "nothing.txt"),
        ("finetune text.txt --model_name tiny --optimizer frobnicate", "frobnicate"),
        ("finetune text.txt --model_name tiny --batch_size 0", "batch_size"),
        ("finetune text.txt --model_name tiny --steps -2", "--steps -2 must be"),
        ("finetune folder --model_name tiny", "the folder 'folder' holds no file"),
        ("finetune jokes.csv --model_name tiny --column joke", "its columns are 'ID', 'Joke'"),
        ("finetune text.txt --model_name tiny --checkpoint_dir . --run_name text.txt", "is a file"),
        ("generate --run_name poems", "poems"),
        ("generate --run_name folder --checkpoint_dir .", "./folder: it has no hparams.json"),
        ("generate --model_name tiny --temperature -1", "temperature"),
        ("generate --model_name tiny --top_p 1.5", "--top_p 1.5 must be"),
        ("generate --model_name tiny --length 0", "--length 0 must be"),
        ("generate --model_name tiny --nsamples 0", "--nsamples 0 must be"),
        ("generate --model_name tiny --stop ''", "--stop [''] holds an empty string"),
        ("generate --model_name tiny --nsamples 3 --batch_size 2", "multiple"),
        ("create --model_name tiny", "tiny"),
        ("encode nothing.txt --model_name tiny", "nothing.txt"),
        ("encode_csv nothing.csv", "nothing.csv"),
    ],
)
def test_library_errors_are_one_line(tiny, capsys, line, message):
    (tiny / "folder").mkdir()
    (tiny / "jokes.csv").write_text("ID,Joke\n1,ha\n")
    assert cli.main(shlex.split(line)) == 1
    error = capsys.readouterr().err
    assert error.startswith("gpt_2_simple: error: ")
    assert message in error
    assert error.count("\n") == 1


def test_diverged_training_is_one_line_and_exits_with_1(tiny, capsys):
    line = "finetune text.txt --model_name tiny --steps 9 --learning_rate 1e30"
    assert cli.main(line.split()) == 1
    out, error = capsys.readouterr()
    assert re.fullmatch(
        r"gpt_2_simple: error: the loss is (nan|inf) in step \d; training stopped, and the session "
        r"is back at models/tiny/model\.ckpt\. Try a lower learning_rate than 1e\+30, .*\n",
        error,
    )
    assert "Saving" not in out


class Interrupter(io.StringIO):
    """A screen before which someone presses Ctrl-C when the second step is shown."""

    def write(self, text):
        if text.startswith("[2 |"):
            signal.raise_signal(signal.SIGINT)
        return super().write(text)


def test_ctrl_c_in_training_saves_and_exits_with_130(tiny, monkeypatch):
    screen = Interrupter()
    monkeypatch.setattr(sys, "stdout", screen)
    line = "finetune text.txt --model_name tiny --steps 5000 --print_every 1"
    assert cli.main(line.split()) == 130
    printed = screen.getvalue()
    assert "interrupted" in printed
    saved = re.search(r"Saving checkpoint/run1/(model-\d+)\n$", printed)[1]
    assert (tiny / "checkpoint" / "run1" / f"{saved}.index").exists()


def test_missing_standard_output_is_no_error(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    assert cli.main(["memory", "124M"]) == 0
