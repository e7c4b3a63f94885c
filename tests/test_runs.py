"""What a run's folder holds beside weights: its model, its RunState, its settings."""

import json
import os

import pytest

import gpt_2_simple as gpt2
from gpt_2_simple.storage import runs

# As the release before the last renaming of fields wrote it.
STATE_7 = (
    '{"step": 7, "seconds": 12.5, "seed": 11, "losses": [9.5, 2.25], '
    '"sampler": {"seed": 3, "draws": 70}, "validation_loss": 2.5, "best_loss": 2.25, '
    '"best_step": 5, "worse": 2, "validation": "0123abcd"}\n'
)


def test_run_state_of_older_releases_is_read_and_written_alike(tmp_path):
    (tmp_path / "state-7.json").write_text(STATE_7)
    run = runs.read_state(str(tmp_path / "model-7"))
    assert run == runs.RunState(
        step=7,
        seconds=12.5,
        seed=11,
        losses=(9.5, 2.25),
        sampler={"seed": 3, "draws": 70},
        validation_loss=2.5,
        best_loss=2.25,
        best_step=5,
        validations_without_improvement=2,
        validation_set="0123abcd",
    )
    assert run.to_json() == STATE_7


@pytest.mark.parametrize("text", ["", "[1]", '{"steps": 3}', '{"losses": [1]}', '{"step": 3'])
def test_unreadable_run_state_is_said(tmp_path, text, capsys):
    (tmp_path / "state-3.json").write_text(text)
    assert runs.read_state(str(tmp_path / "model-3")) is None
    assert "has no state-3.json that can be read" in capsys.readouterr().out


def test_changed_settings_are_printed_on_resume(tmp_path, capsys):
    folder = str(tmp_path)
    runs.note_settings(folder, {"batch_size": 1, "steps": 5, "dataset": ("a", "b")}, False)
    runs.note_settings(
        folder, {"batch_size": 1, "steps": 6, "dataset": ("a", "b")}, True, ["steps"]
    )
    assert capsys.readouterr().out == ""
    runs.note_settings(folder, {"batch_size": 2, "dataset": "a"}, True)
    said = "This run goes on with other settings: batch_size 1 -> 2, dataset ['a', 'b'] -> a\n"
    assert capsys.readouterr().out == said
    (tmp_path / "settings.json").write_text("{")
    runs.note_settings(folder, {"batch_size": 2}, True)
    assert capsys.readouterr().out == ""
    assert json.loads((tmp_path / "settings.json").read_text()) == {"batch_size": 2}


def test_run_of_another_model_is_refused_before_anything_is_written(workplace, sess):
    gpt2.create_gpt2(model_name="wider", n_layer=2, n_head=2, n_embd=32, n_ctx=32)
    tiny = {"dataset": "text.txt", "steps": 1, "model_name": "tiny", "sample_every": 0}
    wider = {**tiny, "model_name": "wider"}
    gpt2.finetune(sess, **tiny)
    names = [name for name in os.listdir("checkpoint/run1") if name != ".lock"]
    before = [os.stat(f"checkpoint/run1/{name}").st_mtime_ns for name in names]

    with gpt2.start_tf_sess() as other:
        with pytest.raises(ValueError, match="run1 was made from a model of other sizes"):
            gpt2.finetune(other, **wider)
        with pytest.raises(ValueError, match="checkpoint/run1/model-1 does not fit its hparams"):
            gpt2.finetune(other, **wider, restore_from="checkpoint/run1", run_name="new")

    path = workplace / "models" / "tiny" / "encoder.json"
    kept = path.read_bytes()
    vocabulary = json.loads(kept)
    first, second = list(vocabulary)[:2]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    path.write_text(json.dumps(vocabulary), encoding="utf-8")
    with pytest.raises(ValueError, match=r"another vocabulary .* \(encoder\.json differs\)"):
        gpt2.finetune(sess, **tiny)
    assert before == [os.stat(f"checkpoint/run1/{name}").st_mtime_ns for name in names]

    path.write_bytes(kept)
    os.remove("checkpoint/run1/hparams.json")
    with pytest.raises(FileNotFoundError, match=r"run1: it has no hparams\.json"):
        gpt2.load_gpt2(sess)
    assert gpt2.finetune(sess, **tiny).step == 2
    gpt2.load_gpt2(sess)


def test_run_in_the_folder_of_its_model_is_refused(workplace, sess):
    before = sorted(os.listdir("models/tiny"))
    with pytest.raises(ValueError, match="holds the model itself, .* give another run_name"):
        gpt2.finetune(
            sess, "text.txt", model_name="tiny", checkpoint_dir="models", run_name="tiny", steps=1
        )
    assert sorted(set(os.listdir("models/tiny")) - {".lock"}) == before
    gpt2.load_gpt2(sess, model_name="tiny")


@pytest.mark.parametrize("options", [{"restore_from": "checkpiont"}, {"dataset": "empty.txt"}])
def test_failed_first_start_leaves_no_run(workplace, sess, options):
    (workplace / "empty.txt").write_text("")
    with pytest.raises((FileNotFoundError, ValueError)):
        gpt2.finetune(sess, **{"dataset": "text.txt", "model_name": "tiny", "steps": 1, **options})
    assert not [name for _, _, names in os.walk("checkpoint") for name in names if name != ".lock"]
    with pytest.raises(FileNotFoundError, match="no run in .*checkpoint holds no runs"):
        gpt2.load_gpt2(sess)
