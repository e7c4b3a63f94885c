"""Pythons that hold the programs which ours is compared with; named by environment variables."""

import json
import os
import subprocess
from pathlib import Path

import pytest

TRANSFORMERS, LLAMA_CPP = "GPT2_REFERENCE_PYTHON", "GPT2_LLAMA_CPP_PYTHON"


def python_of(variable, module):
    """The Python that a variable names; skips the test if it is not set or lacks the module."""
    python = os.environ.get(variable)
    if not python:
        pytest.skip(f"{variable} names no Python that has {module}")
    found = subprocess.run([python, "-c", f"import {module}"], capture_output=True, text=True)
    if found.returncode:
        pytest.skip(f"{variable}={python} has no {module}: {found.stderr[-200:]}")
    return python


def ask(python, script, folder, request, tmp_path):
    """Runs a script of this folder on (folder, request); returns its answer."""
    files = [tmp_path / "request.json", tmp_path / "answer.json"]
    files[0].write_text(json.dumps(request), encoding="utf-8")
    command = [python, str(Path(__file__).with_name(script)), str(folder), *map(str, files)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(files[1].read_text(encoding="utf-8"))
