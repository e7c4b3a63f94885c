"""The package as a whole: what it exports and imports, what importing does, what is shipped."""

import ast
import importlib
import inspect
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import gpt_2_simple as gpt2

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "gpt_2_simple"

# What a module may import, by level: only modules of a lower level. A test of the whole design:
# a new module must be given its place here.
LEVELS = [
    ["report", "files", "bundle", "schedule", "interruption"],
    ["history", "encoder", "parallel_encode", "download", "colab", "memory_saving_gradients"],
    ["token_file", "documents", "optimizer", "model"],
    ["sampler", "session", "checkpoint"],
    ["dataset", "runs", "sample", "evaluate", "step", "create"],
    ["memory", "texts", "watch"],
    ["train"],
    ["gpt_2"],
    ["cli"],
    ["__main__"],
]
WITHOUT_TENSORFLOW = [
    "report", "files", "bundle", "history", "schedule", "interruption", "encoder",
    "parallel_encode", "token_file", "documents", "sampler", "dataset", "download", "colab", "cli",
]  # fmt: skip

# gpt-2-simple 0.8.1's functions: names, order and defaults of their arguments.
OLD = {
    "download_gpt2": {"model_dir": "models", "model_name": "124M"},
    "start_tf_sess": {"threads": -1, "server": None},
    "reset_session": {"sess": ..., "threads": -1, "server": None},
    "get_available_gpus": {},
    "finetune": {
        "sess": ..., "dataset": ..., "steps": -1, "model_name": "124M", "model_dir": "models",
        "combine": 50000, "batch_size": 1, "learning_rate": 0.0001, "accumulate_gradients": 5,
        "restore_from": "latest", "run_name": "run1", "checkpoint_dir": "checkpoint",
        "sample_every": 100, "sample_length": 1023, "sample_num": 1, "multi_gpu": False,
        "save_every": 1000, "print_every": 1, "max_checkpoints": 1,
        # It was False in 0.8.1; None leaves it to what the device's memory holds.
        "use_memory_saving_gradients": None, "only_train_transformer_layers": False,
        "optimizer": "adam", "overwrite": False, "reuse": False,
    },
    "load_gpt2": {
        "sess": ..., "checkpoint": "latest", "run_name": "run1", "checkpoint_dir": "checkpoint",
        "model_name": None, "model_dir": "models", "multi_gpu": False, "reuse": False,
    },
    "generate": {
        "sess": ..., "run_name": "run1", "checkpoint_dir": "checkpoint", "model_name": None,
        "model_dir": "models", "sample_dir": "samples", "return_as_list": False, "truncate": None,
        "destination_path": None, "sample_delim": "=" * 20 + "\n", "prefix": None, "seed": None,
        "nsamples": 1, "batch_size": 1, "length": 1023, "temperature": 0.7, "top_k": 0,
        "top_p": 0.0, "include_prefix": True,
    },
    "generate_to_file": {
        "sess": ..., "run_name": "run1", "checkpoint_dir": "checkpoint", "model_name": None,
        "model_dir": "models", "truncate": None, "destination_path": "gpt_2_gen_texts.txt",
        "sample_delim": "=" * 20 + "\n", "prefix": None, "seed": None, "nsamples": 1,
        "batch_size": 1, "length": 1023, "temperature": 0.7, "top_k": 0, "top_p": 0.0,
        "include_prefix": True,
    },
    "mount_gdrive": {},
    "is_mounted": {},
    "get_tarfile_name": {"checkpoint_folder": ...},
    "copy_checkpoint_to_gdrive": {"run_name": "run1", "copy_folder": False},
    "copy_checkpoint_from_gdrive": {"run_name": "run1", "copy_folder": False},
    "copy_file_to_gdrive": {"file_path": ...},
    "copy_file_from_gdrive": {"file_path": ...},
    "is_gpt2_downloaded": {"model_dir": "models", "model_name": "124M"},
    "encode_csv": {
        "csv_path": ..., "out_path": "csv_encoded.txt", "header": True,
        "start_token": "<|startoftext|>", "end_token": "<|endoftext|>",
    },
    "encode_dataset": {
        "file_path": ..., "model_dir": "models", "out_path": "text_encoded.npz",
        "model_name": "124M", "combine": 50000,
    },
    "cmd": {},
}  # fmt: skip


def python(code, *flags):
    """What a fresh interpreter prints."""
    result = subprocess.run(
        [sys.executable, *flags, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=240
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


@pytest.mark.parametrize("name", OLD)
def test_old_arguments_keep_their_places_and_defaults(name):
    parameters = list(inspect.signature(getattr(gpt2, name)).parameters.values())
    old = OLD[name]
    found = {p.name: ... if p.default is p.empty else p.default for p in parameters[: len(old)]}
    assert list(found.items()) == list(old.items())
    optional = (p.default is not p.empty or p.kind is p.VAR_KEYWORD for p in parameters[len(old) :])
    assert all(optional)


def test_all_public_names_are_there():
    assert set(OLD) < set(gpt2.__all__)
    assert {"encoder", "model", "sample", "memory_saving_gradients"} < set(gpt2.__all__)
    module = importlib.import_module("gpt_2_simple.gpt_2")
    assert sorted(module.__all__) == sorted(gpt2.__all__)
    for name in gpt2.__all__:
        assert getattr(gpt2, name) is getattr(module, name)
    with pytest.raises(AttributeError, match="nothing_like_this"):
        _ = gpt2.nothing_like_this


@pytest.mark.parametrize("name", [n for n in gpt2.__all__ if callable(getattr(gpt2, n))])
def test_public_functions_are_documented_and_typed(name):
    function = getattr(gpt2, name)
    signature = inspect.signature(function)
    assert len(inspect.getdoc(function)) > 30
    assert signature.return_annotation is not signature.empty
    assert all(p.annotation is not p.empty for p in signature.parameters.values())


def test_all_the_ways_to_import_work():
    code = (
        "from gpt_2_simple import gpt_2 as gpt2; assert gpt2.finetune\n"
        "from gpt_2_simple import *; assert generate and encoder.get_encoder and model\n"
        "import gpt_2_simple; print(gpt_2_simple.load_gpt2 is gpt2.load_gpt2)"
    )
    assert python(code) == "True"


def test_importing_changes_nothing_of_the_callers():
    code = """
import logging, random, sys, warnings
import numpy, tensorflow as tf
def state():
    return [tf.executing_eagerly(), sys.getrecursionlimit(), logging.getLogger().level,
            tf.get_logger().level, random.getstate(), str(numpy.random.get_state()),
            str(warnings.filters), tf.config.list_logical_devices("CPU"),
            len(tf.compat.v1.get_default_graph().get_operations())]
before = state()
import gpt_2_simple
gpt_2_simple.generate
print(before == state())
"""
    assert python(code) == "True"


def test_importing_raises_no_warning():
    code = (
        "import tensorflow, warnings; warnings.simplefilter('error')\n"
        "import gpt_2_simple as g; g.generate; print('clean')"
    )
    assert python(code) == "clean"


def imports_of(module):
    """Names of the package's modules that a module imports at its top."""
    found = set()
    for node in ast.parse((PACKAGE / f"{module}.py").read_text(encoding="utf-8")).body:
        if not isinstance(node, ast.ImportFrom):
            continue
        package, _, module_ = (node.module or "").partition(".")
        if node.level == 1 or package == "gpt_2_simple":
            module_ = node.module if node.level else module_
            found |= {module_} if module_ else {alias.name for alias in node.names}
    return found


def test_imports_point_down():
    modules = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__"}
    placed = [module for level in LEVELS for module in level]
    assert sorted(placed) == sorted(modules)
    below = set()
    for level in LEVELS:
        for module in level:
            assert imports_of(module) <= below, module
        below |= set(level)


def test_text_and_files_need_no_tensorflow():
    code = f"""
import importlib, sys
for name in {WITHOUT_TENSORFLOW}:
    importlib.import_module("gpt_2_simple." + name)
print([name for name in sys.modules if name.split(".")[0] in ("tensorflow", "keras")])
"""
    assert python(code) == "[]"


@pytest.fixture(scope="module")
def dist(tmp_path_factory):
    """A folder with the wheel and the sdist of this tree."""
    folder = tmp_path_factory.mktemp("dist")
    source = folder / "source"
    source.mkdir()
    names = ["setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in", "gpt_2_simple"]
    for name in names:
        path = ROOT / name
        if path.is_dir():
            (source / name).mkdir()
            for file in [*path.glob("*.py"), path / "py.typed"]:
                (source / name / file.name).write_bytes(file.read_bytes())
        elif path.exists():
            (source / name).write_bytes(path.read_bytes())
    subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(source)],
        check=True, capture_output=True, timeout=240,
    )  # fmt: skip
    return folder


def test_the_wheel_holds_every_module(dist):
    (wheel,) = dist.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        found = {n for n in archive.namelist() if n.startswith("gpt_2_simple/")}
        entry = archive.read(next(n for n in archive.namelist() if n.endswith("entry_points.txt")))
    expected = {f"gpt_2_simple/{path.name}" for path in PACKAGE.glob("*.py")}
    assert found == expected | {"gpt_2_simple/py.typed"}
    assert b"gpt_2_simple = gpt_2_simple.cli:main" in entry


def test_the_sdist_holds_every_module(dist):
    (sdist,) = dist.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        found = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    expected = {f"gpt_2_simple/{path.name}" for path in PACKAGE.glob("*.py")}
    assert expected | {"setup.py", "README.md", "LICENSE", "gpt_2_simple/py.typed"} <= found
