"""The Tab key, as a real bash asks."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import gpt_2_simple as gpt2

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
# Completes the line in $COMP_LINE with the function that argcomplete gives to the shell.
SCRIPT = """
gpt_2_simple() { "$PYTHON" -m gpt_2_simple "$@"; }
eval "$("$PYTHON" -c 'import argcomplete; print(argcomplete.shellcode(["gpt_2_simple"]))')"
COMP_WORDS=($COMP_LINE); COMP_CWORD=$((${#COMP_WORDS[@]} - 1)); COMP_POINT=${#COMP_LINE}
COMP_TYPE=9
_python_argcomplete gpt_2_simple
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.fixture
def folder(workplace):
    for run in ("poems", "prose"):
        shutil.copytree("models/tiny", f"checkpoint/{run}")
        Path("checkpoint", run, "counter").write_text("counter_1")
    return workplace


def completed(line):
    environment = {**os.environ, "PYTHON": sys.executable, "COMP_LINE": line}
    done = subprocess.run(
        ["bash", "-c", SCRIPT], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stderr == ""
    return {word.strip() for word in done.stdout.splitlines() if word.strip()}


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("fine", {"finetune"}),
        ("generate --temp", {"--temperature"}),
        ("generate --run_name p", {"poems", "prose"}),
        ("generate --model_name t", {"tiny"}),
        ("download 7", {"774M"}),
        ("runs rm po", {"poems"}),
        ("runs re", {"rename"}),
        ("plot pr", {"prose"}),
        ("finetune --optimizer ada", {"adam", "adafactor"}),
        ("generate --stream T", {"True"}),
        ("finetune tex", {"text.txt"}),
        ("runs show --checkpoint_dir nowhere x", set()),
    ],
)
def test_tab_offers_what_may_follow(folder, line, expected):
    assert completed(f"gpt_2_simple {line}") == expected


def test_without_argcomplete_nothing_is_run(folder):
    code = (
        "import sys; sys.modules['argcomplete'] = None; from gpt_2_simple.__main__ import run; "
        "sys.argv[1:] = ['runs', 'rm', 'poems', '--yes']; sys.exit(run())"
    )
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, "_ARGCOMPLETE": "1"})
    assert done.returncode != 0
    assert [run.name for run in gpt2.list_runs()] == ["poems", "prose"]
