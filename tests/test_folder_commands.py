"""The commands `runs` and `models`: list, show, rename, remove."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import gpt_2_simple as gpt2
from gpt_2_simple.cli import folder_commands, main
from gpt_2_simple.common import locks
from gpt_2_simple.storage import rename_remove, runs


@pytest.fixture
def run(workplace, sess):
    options = {"model_name": "tiny", "sample_every": 0, "verbose": 0, "seed": 1}
    gpt2.finetune(sess, "text.txt", steps=3, run_name="poems", **options)
    return workplace / "checkpoint" / "poems"


def printed(capsys, line, status=0):
    capsys.readouterr()
    assert main.main(line.split()) == status
    return capsys.readouterr()


def test_lists_are_tables(run, capsys):
    head, row = printed(capsys, "runs").out.splitlines()
    assert head.split() == ["run", "model", "step", "loss", "validation", "saved", "size"]
    assert row.split()[:3] == ["poems", "tiny", "3"]
    assert row.split()[-1] == "MB"
    head, row = printed(capsys, "models").out.splitlines()
    assert head.split()[:3] == ["model", "layers", "heads"]
    assert row.split()[:3] == ["tiny", "2", "2"]
    for line, told in {
        "runs --checkpoint_dir none": "no runs in none\n",
        "models list --model_dir none": "no models in none\n",
    }.items():
        assert printed(capsys, line).out == told


def test_json_holds_what_the_functions_return(run, capsys):
    (listed,) = json.loads(printed(capsys, "runs --json").out)
    (expected,) = gpt2.list_runs()
    assert listed == {**expected._asdict(), "saved": expected.saved.isoformat()}
    (listed,) = json.loads(printed(capsys, "models --json").out)
    assert listed["hparams"]["n_embd"] == gpt2.list_models()[0].hparams.n_embd
    shown = json.loads(printed(capsys, "runs show poems --json").out)
    assert shown["folder"] == str(run)
    assert shown["settings"]["steps"] == 3
    assert shown["checkpoints"] == ["model-3"]
    assert shown["being_trained"] is False
    shown = json.loads(printed(capsys, "models show tiny --json").out)
    assert shown["runs"] == ["poems"]


def test_losses_that_are_no_numbers_are_null(run, capsys, monkeypatch):
    (known,) = gpt2.list_runs()
    broken = known._replace(loss=float("nan"), best_loss=float("inf"))
    monkeypatch.setattr(folder_commands, "list_runs", lambda parent: [broken])
    (listed,) = json.loads(printed(capsys, "runs --json").out, parse_constant=pytest.fail)
    assert (listed["loss"], listed["best_loss"]) == (None, None)


def test_show_tells_each_thing_on_a_line(run, capsys):
    (run / runs.SETTINGS).unlink()  # as a run of gpt-2-simple 0.8.1
    lines = printed(capsys, "runs show poems").out.splitlines()
    assert f"folder: {run}" in lines
    assert "step: 3" in lines
    (info,) = gpt2.list_runs()
    assert f"loss: {info.loss:.4g}" in lines
    assert f"saved: {info.saved.astimezone():%Y-%m-%d %H:%M}" in lines
    assert f"n_bytes: {info.n_bytes / 1e6:.1f} MB" in lines
    assert not any(line.startswith("settings") for line in lines)


def test_renamed_run_resumes(run, capsys):
    assert printed(capsys, "runs rename poems old/songs").out == "Renamed poems to old/songs\n"
    assert not run.exists()
    with gpt2.start_tf_sess() as sess:
        result = gpt2.finetune(
            sess,
            "text.txt",
            steps=1,
            model_name="tiny",
            run_name="old/songs",
            sample_every=0,
            verbose=0,
        )
    assert result.step == 4


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("runs rename poems taken", "exists already"),
        ("runs rename poems ../outside", "must lie in checkpoint"),
        ("runs rename poems .hidden", "not begin with a dot"),
        ("runs rename missing new", "no run in checkpoint"),
        ("runs rm missing --yes", "no run in checkpoint"),
        ("runs rm poems missing --yes", "no run in checkpoint"),
        ("runs show missing", "no run in checkpoint"),
        ("models show missing", "missing"),
        ("runs rm poems", "give --yes"),
        ("models rm tiny", "give --yes"),
        ("models rename tiny small", "give --yes"),
    ],
)
def test_refused_commands_change_nothing(run, capsys, monkeypatch, line, told):
    monkeypatch.setattr("sys.stdin", None)
    (run.parent / "taken").mkdir()
    before = sorted(map(str, run.parent.rglob("*")))
    error = printed(capsys, line, status=1).err
    assert told in error
    assert sorted(map(str, run.parent.rglob("*"))) == before
    assert Path("models/tiny").is_dir()


@pytest.mark.parametrize("words", ["shwo poems", "show", "rename poems", "rm", "list poems"])
def test_wrong_words_are_wrong_usage(workplace, capsys, words):
    assert "'rename OLD NEW'" in printed(capsys, f"runs {words}", status=2).err


@pytest.mark.parametrize(("answer", "status"), [("y", 0), ("", 1), ("no", 1)])
def test_removal_asks(run, capsys, monkeypatch, answer, status):
    monkeypatch.setattr("sys.stdin", type("Terminal", (), {"isatty": lambda self: True})())
    asked = []
    monkeypatch.setattr("builtins.input", lambda question: asked.append(question) or answer)
    printed(capsys, "runs rm poems", status=status)
    assert run.exists() == bool(status)
    assert asked == [f"Remove {os.path.join('checkpoint', 'poems')}? [y/N] "]


def test_removal_leaves_the_others_and_no_trash(run, capsys):
    shutil.copytree(run, run.parent / "songs")
    (run.parent / ".removing-killed-1").mkdir()  # a process was killed while it removed this
    assert printed(capsys, "runs rm poems --yes").out == "Removed poems\n"
    assert os.listdir(run.parent) == ["songs"]


def test_a_model_in_use_is_told(run, capsys):
    out = printed(capsys, "models rm tiny --yes").out
    assert "tiny is the model of poems" in out
    assert not Path("models/tiny").exists()


def test_run_that_is_being_trained_stays(run, capsys):
    with locks.lock_run(str(run)):
        assert json.loads(printed(capsys, "runs show poems --json").out)["being_trained"]
        for line in ("runs rm poems --yes", "runs rename poems new"):
            assert "poems" in printed(capsys, line, status=1).err
    assert run.exists()


def test_names_must_not_lead_out(workplace):
    for name in ("", os.path.abspath("x"), "../x", "a/../../x", ".x"):
        with pytest.raises(ValueError, match="cannot be a name"):
            rename_remove.rename_model("models", "tiny", name)


def test_they_do_not_load_tensorflow(workplace):
    code = (
        "import sys; from gpt_2_simple.cli import main; status = main.main(sys.argv[1:]); "
        "assert 'tensorflow' not in sys.modules; sys.exit(status)"
    )
    for line in ("runs", "models", "models show tiny"):
        done = subprocess.run([sys.executable, "-c", code, *line.split()], capture_output=True)
        assert (done.returncode, done.stderr) == (0, b"")
