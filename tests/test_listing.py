"""What list_models() and list_runs() tell of folders, whole and broken."""

import shutil
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest

import gpt_2_simple as gpt2


def test_models_are_listed_by_name_with_sizes(workplace):
    gpt2.create_gpt2(model_name="a", n_layer=1, n_head=1, n_embd=8, n_ctx=16)
    Path("models/empty").mkdir()
    shutil.copytree("models/tiny", "models/cut")
    next(Path("models/cut").glob("*.index")).unlink()
    models = gpt2.list_models()
    assert [model.name for model in models] == ["a", "tiny"]
    assert models[0].hparams.n_embd == 8
    assert models[1].n_bytes == sum(path.stat().st_size for path in Path("models/tiny").iterdir())


def test_runs_tell_their_model_step_and_losses(workplace, sess):
    options = {"model_name": "tiny", "sample_every": 0, "verbose": 0, "seed": 1}
    result = gpt2.finetune(
        sess, "text.txt", steps=4, run_name="songs/new", val_split=0.2, val_every=2, **options
    )
    with gpt2.start_tf_sess() as other:
        gpt2.finetune(other, "text.txt", steps=1, run_name="b", **options)
    for name in ("settings.json", "state-1.json"):
        Path("checkpoint/b", name).unlink()  # as a run of gpt-2-simple 0.8.1
    first, second = gpt2.list_runs()
    assert (first.name, first.model_name, first.step, first.loss) == ("b", None, 1, None)
    assert (second.name, second.model_name, second.step) == ("songs/new", "tiny", 4)
    assert second.loss == pytest.approx(result.average_loss)
    assert second.validation_loss == result.validation_loss
    assert (second.best_loss, second.best_step) == (result.best_loss, result.best_step)
    assert abs(datetime.now(timezone.utc) - second.saved) < timedelta(minutes=10)
    assert second.n_bytes > 1000


def test_broken_and_missing_folders(workplace):
    assert gpt2.list_runs("nowhere") == []
    assert gpt2.list_models("nowhere") == []
    for name, content in {"a": "{}", "b": "not JSON"}.items():
        Path("checkpoint", name).mkdir(parents=True)
        Path("checkpoint", name, "hparams.json").write_text(content)
    shutil.copytree("models/tiny", "checkpoint/c")
    for path in Path("checkpoint/c").glob("model.ckpt*"):
        path.unlink()
    with pytest.warns(UserWarning, match="was left out") as warned:
        (run,) = gpt2.list_runs()
    assert len(warned) == 2
    assert (run.name, run.step, run.saved) == ("c", None, None)


def test_only_runs_and_models_that_a_name_can_reach_are_listed(workplace):
    for name in ("a/b/c", "a/b/c/d", ".hidden", "poems/.removing-x"):
        shutil.copytree("models/tiny", Path("checkpoint", name))
        Path("checkpoint", name, "counter").write_text("counter_1")
    shutil.copytree("models/tiny", "checkpoint/model")  # somebody put a model there
    assert [run.name for run in gpt2.list_runs()] == ["a/b/c"]
    shutil.copytree("checkpoint/a/b/c", "models/run")
    assert [model.name for model in gpt2.list_models()] == ["tiny"]


def test_a_file_in_the_place_of_the_folder_holds_nothing(workplace):
    Path("checkpoint").write_text("no folder")
    assert gpt2.list_runs() == []
