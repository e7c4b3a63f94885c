"""The package as a whole: its public names, its layers, what an import does, what is shipped."""

import ast
import graphlib
import importlib
import inspect
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import NamedTuple

import pytest

import gpt_2_simple as gpt2

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "gpt_2_simple"

# The rooms (folders and modules of the root), by layer. A module imports from its own room and from
# earlier layers only. A new room must be given its place here. A module of a room may have a place
# of its own: sessions join a cluster, and what starts a cluster's processes trains.
LAYERS = [
    ["common"],
    ["distributed.tf_config"],
    ["distributed.channel"],
    ["distributed.cluster"],
    ["distributed.collectives"],
    ["encoder", "model", "precision", "memory_saving_gradients"],
    ["adapter", "data", "quantized"],
    ["session"],
    ["storage"],
    ["generation"],
    ["sample", "training"],
    ["exchange", "distributed", "serving"],
    ["gpt_2"],
    ["src", "cli"],
    ["__main__", "__init__"],
]
FUTURE_ROOMS = {"serving"}

# Imports within functions, and the reason for each.
FUNCTION_IMPORTS = {
    ("__init__", "common.report"),  # the package imports nothing until a name is asked for
    ("__init__", "common.stderr_filter"),  # the same
    ("__main__", "cli.program"),  # Ctrl-C while it is loaded is told in a line
    ("gpt_2", "cli.main"),  # points to a later layer: scripts call gpt_2.cmd()
    ("storage.create", "tensorflow"),  # wrong sizes are reported before TensorFlow is loaded
    ("storage.create", "model"),  # the same
    ("storage.create", "storage.checkpoint_ops"),  # the same
    ("data.vocabulary", "tokenizers"),  # an extra
    ("storage.hub_library", "huggingface_hub"),  # an extra
    ("storage.hub_library", "huggingface_hub.errors"),  # the same
    ("exchange.gguf", "gguf"),  # an extra
    ("training.history", "matplotlib.figure"),  # an extra
    ("training.history", "IPython.display"),  # there only in notebooks
    ("storage.drive", "google.colab"),  # there only in Colab
    ("serving.play", "google.colab"),  # the same
    ("serving.play", "IPython.display"),  # there only in notebooks
    ("distributed.launcher", "training.trainer"),  # TensorFlow, for the result alone
    ("cli.completion", "argcomplete"),  # an extra
    ("serving.server", "resource"),  # Windows has none
}

# Rooms and modules that load without TensorFlow.
WITHOUT_TENSORFLOW = [
    "common", "encoder", "data", "cli", "__main__",
    "training.settings", "training.history", "training.schedule", "training.interruption",
    "generation.settings", "storage.settings", "storage.create", "storage.download",
    "storage.listing", "storage.runs",    "storage.checkpoint", "storage.checkpoint_index",
    "storage.drive", "storage.safetensors_file", "storage.adapter_files", "storage.hub_library",
    "exchange.settings", "exchange.adapter_settings", "exchange.tensor_names",
    "exchange.config_file", "exchange.tokenizer_files", "exchange.hub",
    "distributed.tf_config", "distributed.channel", "distributed.launcher",
    "distributed.ray_job", "serving.settings",
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


def run_python(code, *flags):
    """Runs code in a fresh interpreter; returns what it prints."""
    result = subprocess.run(
        [sys.executable, *flags, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=240
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


@pytest.mark.parametrize("name", OLD)
def test_public_functions_keep_the_arguments_of_0_8_1(name):
    parameters = list(inspect.signature(getattr(gpt2, name)).parameters.values())
    old = OLD[name]
    found = {p.name: ... if p.default is p.empty else p.default for p in parameters[: len(old)]}
    assert list(found.items()) == list(old.items())
    optional = (p.default is not p.empty or p.kind is p.VAR_KEYWORD for p in parameters[len(old) :])
    assert all(optional)


def test_package_and_gpt_2_module_export_the_same_names():
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


def test_each_import_statement_of_0_8_1_works():
    code = (
        "from gpt_2_simple import gpt_2 as gpt2; assert gpt2.finetune\n"
        "from gpt_2_simple import *; assert generate and encoder.get_encoder and model\n"
        "import gpt_2_simple; print(gpt_2_simple.load_gpt2 is gpt2.load_gpt2)"
    )
    assert run_python(code) == "True"


def test_names_that_scripts_take_from_the_package():
    code = (
        "import sys, gpt_2_simple as gpt2; assert 'tensorflow' not in sys.modules\n"
        "assert gpt2.gpt_2.finetune is gpt2.finetune and gpt2.tf.compat.v1.Session\n"
        "from gpt_2_simple import *; print(tf is gpt2.tf and os.path.isdir('.'))"
    )
    assert run_python(code) == "True"


def test_import_leaves_global_state_unchanged():
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
    assert run_python(code) == "True"


def test_import_raises_no_warning():
    code = (
        "import tensorflow, warnings; warnings.simplefilter('error')\n"
        "import gpt_2_simple as g; g.generate; print('clean')"
    )
    assert run_python(code) == "clean"


def find_modules():
    """The path of each module, by its name within the package: 'training.step'; 'cli.__init__'."""
    paths = sorted(PACKAGE.rglob("*.py"))
    return {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in paths}


MODULES = find_modules()


class Import(NamedTuple):
    """An import statement's target, and whether the statement stands within a function."""

    target: str
    in_function: bool


def imports_of(module):
    """The imports of a module; those of the package's modules by their names within the package."""
    found = set()
    pending = [(ast.parse(MODULES[module].read_text(encoding="utf-8")), False)]
    while pending:
        node, in_function = pending.pop()
        in_function |= isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        pending += [(child, in_function) for child in ast.iter_child_nodes(node)]
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            found |= {Import(target, in_function) for target in targets_of(module, node)}
    return found


def targets_of(module, node):
    """The modules that an import statement of `module` loads."""
    if isinstance(node, ast.Import):
        return [alias.name.removeprefix("gpt_2_simple.") for alias in node.names]
    source = [node.module] if node.module else []
    if node.level:
        source = module.split(".")[: -node.level] + source
    prefix = ".".join(source).removeprefix("gpt_2_simple").lstrip(".")
    names = [f"{prefix}.{alias.name}".lstrip(".") for alias in node.names]
    submodules = [name for name in names if name in MODULES or f"{name}.__init__" in MODULES]
    return submodules or [prefix]


def room_of(module):
    return module.split(".")[0]


def place_of(module):
    """What stands for a module in LAYERS: itself, or its room."""
    return module if any(module in layer for layer in LAYERS) else room_of(module)


def package_imports_of(module):
    """The package's modules that a module imports when it is loaded."""
    rooms = {room_of(name) for name in MODULES}
    return {
        i.target for i in imports_of(module) if not i.in_function and room_of(i.target) in rooms
    }


def test_every_room_has_a_layer():
    placed = [room for layer in LAYERS for room in layer]
    assert len(placed) == len(set(placed))
    present = {place_of(module) for module in MODULES}
    assert present <= set(placed)
    assert set(placed) - present <= FUTURE_ROOMS


def test_imports_point_to_earlier_layers():
    wrong = {}
    earlier = set()
    for layer in LAYERS:
        for module in [module for module in MODULES if place_of(module) in layer]:
            places = {place_of(target) for target in package_imports_of(module)}
            wrong[module] = places - earlier - {place_of(module)}
        earlier |= set(layer)
    assert {module: rooms for module, rooms in wrong.items() if rooms} == {}


def test_modules_import_each_other_without_circles():
    graph = {module: package_imports_of(module) for module in MODULES}
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


@pytest.mark.parametrize(
    ("statement", "targets"),
    [
        ("from ..common.files import write_whole, check_folder", ["common.files"]),
        ("from .. import model, session", ["model", "session"]),
        ("from . import settings", ["training.settings"]),
        ("from .settings import TrainingSettings", ["training.settings"]),
        ("from gpt_2_simple.encoder import Encoder", ["encoder"]),
        ("from gpt_2_simple import encoder", ["encoder"]),
        ("import gpt_2_simple.encoder", ["encoder"]),
        ("import numpy as np, regex", ["numpy", "regex"]),
        ("from collections.abc import Sequence", ["collections.abc"]),
    ],
)
def test_import_statements_are_resolved_to_modules(statement, targets):
    assert targets_of("training.finetune", ast.parse(statement).body[0]) == targets


def test_imports_within_functions_have_a_reason():
    found = {(m, i.target) for m in MODULES for i in imports_of(m) if i.in_function}
    assert found == FUNCTION_IMPORTS


def test_modules_of_text_and_settings_load_without_tensorflow():
    names = [
        module.removesuffix(".__init__")
        for module in MODULES
        if module in WITHOUT_TENSORFLOW or room_of(module) in WITHOUT_TENSORFLOW
    ]
    assert len(names) >= len(WITHOUT_TENSORFLOW)
    code = f"""
import importlib, sys
for name in {names}:
    importlib.import_module("gpt_2_simple." + name)
print([name for name in sys.modules if name.split(".")[0] in ("tensorflow", "keras")])
"""
    assert run_python(code) == "[]"


def test_modules_have_at_most_600_lines():
    lines = {
        module: len(path.read_text(encoding="utf-8").splitlines())
        for module, path in MODULES.items()
    }
    assert {module: count for module, count in lines.items() if count > 600} == {}


def test_the_package_root_has_at_most_12_files():
    assert len([path for path in PACKAGE.iterdir() if path.is_file()]) <= 12


@pytest.fixture(scope="module")
def dist(tmp_path_factory):
    """A folder with the wheel and the sdist of this tree."""
    folder = tmp_path_factory.mktemp("dist")
    source = folder / "source"
    source.mkdir()
    for name in ["setup.py", "pyproject.toml", "README.md", "LICENSE"]:
        shutil.copy(ROOT / name, source)
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(PACKAGE, source / "gpt_2_simple", ignore=ignored)
    subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(source)],
        check=True, capture_output=True, timeout=240,
    )  # fmt: skip
    return folder


def package_files():
    files = [*MODULES.values(), PACKAGE / "py.typed", PACKAGE / "serving" / "page.html"]
    return {path.relative_to(ROOT).as_posix() for path in files}


def test_wheel_holds_every_module(dist):
    (wheel,) = dist.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        found = {n for n in archive.namelist() if n.startswith("gpt_2_simple/")}
        entry = archive.read(next(n for n in archive.namelist() if n.endswith("entry_points.txt")))
    assert found == package_files()
    assert b"gpt_2_simple = gpt_2_simple.__main__:run" in entry


def test_sdist_holds_every_module(dist):
    (sdist,) = dist.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        found = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    assert package_files() | {"setup.py", "README.md", "LICENSE"} <= found
