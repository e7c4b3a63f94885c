"""The loop: exact resumes, interruptions, errors, validation, schedules, and what it writes."""

import contextlib
import errno
import glob
import io
import json
import math
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

import gpt_2_simple as gpt2
from gpt_2_simple import session
from gpt_2_simple.common import report
from gpt_2_simple.generation import scoring, text_stream
from gpt_2_simple.storage import checkpoint, checkpoint_ops, runs
from gpt_2_simple.training import loss_scale
from gpt_2_simple.training import trainer as train
from gpt_2_simple.training import validation as evaluate
from gpt_2_simple.training.history import read_history

RUN = {"model_name": "tiny", "sample_every": 0, "learning_rate": 0.01, "batch_size": 2,
       "accumulate_gradients": 1, "seed": 1, "verbose": 0}  # fmt: skip


def finetune(sess, steps, run_name="run1", dataset="text.txt", **changes):
    return gpt2.finetune(sess, dataset, steps, run_name=run_name, **{**RUN, **changes})


def tensors(prefix):
    reader = tf.train.load_checkpoint(prefix)
    return {name: reader.get_tensor(name) for name in reader.get_variable_to_shape_map()}


def distance(run_name, other):
    """The largest difference between the weights, and optimizer states, of two runs."""
    most = 0.0
    for kind in ("model", "optimizer"):
        ours, theirs = (
            tensors(
                checkpoint.latest_checkpoint(f"checkpoint/{name}").replace("model-", f"{kind}-")
            )
            for name in (run_name, other)
        )
        assert ours.keys() == theirs.keys()
        most = max([most, *(float(np.abs(ours[n] - theirs[n]).max()) for n in ours)])
    return most


@pytest.fixture(scope="module")
def sess():
    """One session for all tests, with one thread: what is built once serves them all."""
    with gpt2.start_tf_sess(threads=1) as session:
        yield session


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A current folder with a model that is quick to build, and a text of a few windows."""
    monkeypatch.chdir(tmp_path)
    gpt2.create_gpt2(model_name="tiny", n_layer=1, n_head=1, n_embd=8, n_ctx=16, seed=3)
    (tmp_path / "text.txt").write_text(
        "".join(f"{n} green bottles on the wall\n" for n in range(9))
    )
    return tmp_path


# --- going on -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "tolerance"),
    [
        ({"optimizer": "adam"}, 0),
        ({"optimizer": "adam", "accumulate_gradients": 3, "sampling": "epoch"}, 0),
        ({"optimizer": "adafactor", "accumulate_gradients": 2, "sampling": "epoch"}, 0),
        ({"optimizer": "sgd", "sampling": "epoch", "pad_documents": True, "warmup_steps": 15}, 0),
        ({"optimizer": "adam", "accumulate_gradients": 2}, 1e-6),
        ({"dropout": 0.2, "accumulate_gradients": 2}, 0),
        ({"gradient_clip": 0.1}, 0),
        ({"precision": "float16"}, 0),
    ],
)
def test_resumed_run_equals_an_uninterrupted_one(small, sess, monkeypatch, settings, tolerance):
    # float16 then skips its first steps: those of a run that forgot its scale, too.
    monkeypatch.setattr(loss_scale, "FIRST_LOSS_SCALE", 2.0**24)
    with contextlib.ExitStack() as stack:
        if tolerance:
            sess = stack.enter_context(gpt2.start_tf_sess())
        finetune(sess, 20, "whole", **settings)
        finetune(sess, 10, "parts", **settings)
        # Another seed would draw other data: a run goes on with its own.
        result = finetune(sess, 10, "parts", **{**settings, "seed": 2})
    assert result.step == 20
    assert distance("whole", "parts") <= tolerance
    state = runs.read_state("checkpoint/parts/model-20")
    assert state.sampler == runs.read_state("checkpoint/whole/model-20").sampler


def test_resume_keeps_optimizer_state_when_precision_changes(small, capsys):
    for count, precision in enumerate(("float32", "float16", "bfloat16", "float16"), 1):
        with gpt2.start_tf_sess(threads=1) as sess:
            finetune(sess, 1, precision=precision, verbose=1)
        saved = tensors(f"checkpoint/run1/optimizer-{count}")
        assert saved["optimizer/adam/step"] == count
        assert ("optimizer/loss_scale/scale" in saved) == (precision == "float16")
    assert saved["optimizer/loss_scale/good_steps"] == 1
    out = capsys.readouterr().out
    assert "goes on with other settings: precision float32 -> float16\n" in out
    assert "anew" not in out


def test_train_on_gives_the_loss_of_the_column_alone(workplace):
    (workplace / "qa.csv").write_text("q,a\nWhy,No\n", encoding="utf-8")
    table = {"template": "{q}: {a}", "train_on": "a", "pad_documents": True}
    prompt, answer = "<|startoftext|>Why: ", "No<|endoftext|>\n"
    with gpt2.start_tf_sess() as sess:
        gpt2.load_gpt2(sess, model_name="tiny", verbose=0)
        encoder = session.graph_state(sess).encoder
        tokens = [encoder.encode(text, allow_special=True) for text in (prompt, answer)]
        (log_probabilities,) = scoring.score_tokens(sess, [tokens[0] + tokens[1]])
        result = finetune(
            sess, 2, dataset="qa.csv", **table, batch_size=3, accumulate_gradients=2,
            sample_every=1, sample_length=2,
        )  # fmt: skip
    expected = -log_probabilities[-len(tokens[1]) :].mean()
    assert result.history[0].loss == pytest.approx(expected, rel=1e-5)
    assert abs(expected + log_probabilities.mean()) > 1e-3
    assert json.loads(Path("checkpoint/run1/settings.json").read_text())["train_on"] == "a"


def test_step_whose_windows_hold_only_context_changes_nothing(small, sess):
    prompts = "word " * 200
    (small / "qa.csv").write_text(f"q,a\n{prompts},Yes\n", encoding="utf-8")
    table = {"template": "{q}{a}", "train_on": "a", "sampling": "epoch", "optimizer": "sgd"}
    result = finetune(sess, 5, dataset="qa.csv", **table, batch_size=1, sequence_length=16)
    losses = [entry.loss for entry in result.history]
    assert losses.count(0) >= 3
    assert all(map(math.isfinite, losses))


def test_validation_without_anything_to_learn_raises_value_error(small, sess):
    (small / "qa.csv").write_text("q,a\n" + "word " * 200 + ",Yes\n", encoding="utf-8")
    with pytest.raises(ValueError, match="validation set has nothing to learn"):
        finetune(
            sess, 1, dataset="qa.csv", val_dataset="qa.csv", template="{q}{a}", train_on="a",
            val_batch_count=1, batch_size=1, sequence_length=16,
        )  # fmt: skip


def test_resume_says_what_the_run_lacks(small, sess, capsys):
    finetune(sess, 2)
    os.remove("checkpoint/run1/optimizer-2.index")
    assert finetune(sess, 1, verbose=1).step == 3
    out = capsys.readouterr().out
    assert (
        "checkpoint/run1/model-2 has no optimizer state beside it: the optimizer starts anew" in out
    )
    assert "has no state-" not in out

    # As gpt-2-simple 0.8.1 leaves a run.
    for name in os.listdir("checkpoint/run1"):
        if name.startswith(("optimizer", "state", "history", "settings", ".lock")):
            os.remove(f"checkpoint/run1/{name}")
    assert finetune(sess, 1, verbose=1).step == 4
    out = capsys.readouterr().out
    assert "has no optimizer state beside it" in out
    assert "has no state-3.json that can be read: the data starts anew" in out

    finetune(sess, 1, verbose=1, optimizer="sgd", learning_rate=0.02)
    out = capsys.readouterr().out
    assert "goes on with other settings: learning_rate 0.01 -> 0.02, optimizer adam -> sgd\n" in out
    assert "is of another optimizer" in out


def test_overwrite_keeps_the_latest_checkpoint_and_later_ones(small, sess):
    finetune(sess, 3, save_every=1, max_checkpoints=0)
    (small / "checkpoint" / "run1" / "mine.txt").write_text("mine")
    finetune(sess, 1, overwrite=True)
    assert checkpoint.named_checkpoints("checkpoint/run1") == ["model-4"]
    names = os.listdir("checkpoint/run1")
    assert not [name for name in names if re.search(r"-[123]\.", name)]
    assert "mine.txt" in names
    (events,) = glob.glob("checkpoint/run1/events*")
    steps = [event.step for event in tf.compat.v1.train.summary_iterator(events) if event.step]
    assert steps == [4]
    assert [entry.step for entry in read_history("checkpoint/run1")] == [1, 2, 3, 4]


@pytest.mark.parametrize("more", [[], ["--lora"]])
def test_kill_at_random_moments_loses_no_run(more):
    script = Path(__file__).parents[1] / "benchmarks" / "faults.py"
    done = subprocess.run(
        [sys.executable, script, "--kills", "6", *more],
        env={**os.environ, "PYTHONPATH": str(script.parents[1])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " 0 runs lost; " in done.stdout
    assert " 0 tensors differ " in done.stdout


def test_run_locked_by_another_training_is_refused(small, sess):
    def on_step(entry):
        with (
            gpt2.start_tf_sess() as other,
            pytest.raises(RuntimeError, match="run1 is being trained by process"),
        ):
            finetune(other, 1)

    assert finetune(sess, 1, on_step=on_step).step == 1


def test_full_disk_keeps_earlier_checkpoints(small, sess):
    finetune(sess, 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    least = os.path.getsize("checkpoint/run1/model-1.data-00000-of-00001") - 1
    resource.setrlimit(resource.RLIMIT_FSIZE, (least, hard))
    try:
        prefix = re.escape(str(small / "checkpoint/run1/model-2"))
        with pytest.raises(OSError, match=f"could not save {prefix}: .*too large"):
            finetune(sess, 1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert checkpoint.latest_checkpoint("checkpoint/run1") == "checkpoint/run1/model-1"
    assert finetune(sess, 1).step == 2


# --- stopping -----------------------------------------------------------------------------------


def send(number, at, times=1):
    def on_step(entry):
        if entry.step == at:
            for _ in range(times):
                os.kill(os.getpid(), number)

    return on_step


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_sigint_and_sigterm_save_and_return(small, sess, capsys, number):
    before = signal.getsignal(number)
    result = finetune(sess, -1, on_step=send(number, 3), verbose=1, sampling="epoch")
    assert (result.step, result.interrupted) == (3, True)
    assert result.checkpoint == "checkpoint/run1/model-3"
    out = capsys.readouterr().out
    assert "interrupted\ndata seen 0.4 times so far\nSaving checkpoint/run1/model-3\n" in out
    assert signal.getsignal(number) is before


def test_second_ctrl_c_raises_at_once(small, sess):
    with pytest.raises(KeyboardInterrupt):
        finetune(sess, -1, on_step=send(signal.SIGINT, 3, 2), save_every=2)
    assert checkpoint.latest_checkpoint("checkpoint/run1") == "checkpoint/run1/model-2"
    assert finetune(sess, 1).step == 3


def test_ctrl_c_within_a_step_undoes_the_sampler(small, sess, monkeypatch):
    finetune(sess, 4, "whole", accumulate_gradients=3)
    next_batches = train.Trainer.next_batches

    def draw_and_send(self):
        if self.run.step == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return next_batches(self)

    with monkeypatch.context() as patch:
        patch.setattr(train.Trainer, "next_batches", draw_and_send)
        assert finetune(sess, 4, "parts", accumulate_gradients=3).step == 2
    finetune(sess, 2, "parts", accumulate_gradients=3)
    assert distance("whole", "parts") == 0


def test_ctrl_c_ends_samples_and_validation_at_once(small, sess, monkeypatch):
    def endless(*_):
        os.kill(os.getpid(), signal.SIGINT)
        while True:
            yield "", "text"

    monkeypatch.setattr(text_stream, "generate_texts", endless)
    result = finetune(sess, 9, sample_every=2)
    assert (result.step, result.interrupted) == (2, True)

    def forever(*_):
        os.kill(os.getpid(), signal.SIGINT)
        while True:
            pass

    monkeypatch.setattr(evaluate, "mean_loss", forever)
    result = finetune(sess, 9, val_split=0.5, val_every=3)
    assert (result.step, result.interrupted, result.validation_loss) == (3, True, None)


def test_on_step_gets_each_entry_and_can_end_training(small, sess):
    seen = []

    def on_step(entry):
        seen.append(entry)
        return entry.step < 3

    result = finetune(sess, 9, on_step=on_step)
    assert (result.step, result.interrupted) == (3, False)
    assert seen == result.history
    assert [entry.step for entry in seen] == [1, 2, 3]
    assert all(0 < entry.loss < 7 and entry.tokens_per_second > 0 for entry in seen)
    assert {type(value) for entry in seen for value in entry} == {int, float, type(None)}


class Mishap(Exception):
    pass


def fail(at, before=lambda: None):
    def on_step(entry):
        if entry.step == at:
            before()
            raise Mishap

    return on_step


def test_on_step_returning_numpy_false_ends_training(small, sess):
    assert finetune(sess, 9, on_step=lambda entry: np.float32(entry.step) < 2).step == 2
    assert finetune(sess, 2, on_step=lambda entry: 0).step == 4  # an answer, but not that one


def test_sys_exit_in_on_step_saves_first(small, sess):
    with pytest.raises(SystemExit):
        finetune(sess, 9, on_step=lambda entry: sys.exit() if entry.step == 3 else None)
    assert checkpoint.latest_checkpoint("checkpoint/run1") == "checkpoint/run1/model-3"


def test_broken_pipe_saves_first(small, sess, monkeypatch):
    class Pipe(io.StringIO):
        def write(self, text):
            if "[3 |" in self.getvalue():
                raise BrokenPipeError
            return super().write(text)

    monkeypatch.setattr(sys, "stdout", Pipe())
    with pytest.raises(BrokenPipeError):
        finetune(sess, 9, verbose=1)
    saved = runs.step_of(checkpoint.latest_checkpoint("checkpoint/run1"))
    assert saved in (3, 4)


def test_first_ctrl_c_prints_a_line_at_once(small, sess, capsys):
    def on_step(entry):
        capsys.readouterr()
        os.kill(os.getpid(), signal.SIGINT)
        said = "Stopping after this step, then saving; once more stops at once\n"
        assert capsys.readouterr().out == said

    assert finetune(sess, 9, on_step=on_step, verbose=1).step == 1


@pytest.mark.parametrize(
    ("name", "content"), [("settings.json", "[1, 2]"), ("state-2.json", '{"sampler": {}}')]
)
def test_damaged_settings_or_state_file_does_not_stop_a_resume(small, sess, name, content):
    finetune(sess, 2)
    (small / "checkpoint" / "run1" / name).write_text(content)
    assert finetune(sess, 2).step == 4


def test_average_loss_of_an_unprinted_run_is_the_last_loss(small, sess):
    result = finetune(sess, 3, print_every=50)
    assert result.average_loss == result.loss
    result = finetune(sess, 4, print_every=2, run_name="run2")
    printed = [entry.loss for entry in result.history if entry.step % 2 == 0]
    expected = (printed[0] * 0.99 + printed[1]) / 1.99
    assert result.average_loss == pytest.approx(expected)


def test_error_in_on_step_saves_first(small, sess):
    with pytest.raises(Mishap):
        finetune(sess, 9, on_step=fail(3))
    assert checkpoint.latest_checkpoint("checkpoint/run1") == "checkpoint/run1/model-3"


@pytest.mark.parametrize("error", [KeyboardInterrupt, GeneratorExit])
def test_base_exception_in_on_step_saves_first(small, sess, error):
    def on_step(entry):
        if entry.step == 3:
            raise error

    with pytest.raises(error):
        finetune(sess, 9, on_step=on_step)
    assert checkpoint.latest_checkpoint("checkpoint/run1") == "checkpoint/run1/model-3"


def at(step, action):
    """An on_step that does something after one step."""

    def on_step(entry):
        if entry.step == step:
            action()

    return on_step


def out_of_memory(*_):
    raise tf.errors.ResourceExhaustedError(None, None, "OOM when allocating")


def test_out_of_memory_between_steps_saves_first(small, sess, monkeypatch):
    with pytest.raises(MemoryError):
        finetune(sess, 9, on_step=at(3, out_of_memory))
    assert checkpoint.latest_checkpoint("checkpoint/run1") == "checkpoint/run1/model-3"
    monkeypatch.setattr(text_stream, "generate_texts", out_of_memory)
    with pytest.raises(MemoryError):
        finetune(sess, 9, sample_every=2)
    assert checkpoint.latest_checkpoint("checkpoint/run1") == "checkpoint/run1/model-4"


@pytest.mark.parametrize(("fails_in", "saved"), [("learning_rate", 2), ("dropout_seed", 3)])
def test_out_of_memory_within_an_update_is_not_saved(small, sess, monkeypatch, fails_in, saved):
    """While a micro-batch is added, the weights are still whole; while they change, they are not.

    A run of the session is told by what is fed: an update takes the learning rate.
    """
    run = sess.run

    def on_step(entry):
        def exhausted(fetches, feed=None):
            if any(fails_in in tensor.name for tensor in feed or ()):
                out_of_memory()
            return run(fetches, feed)

        if entry.step == 3:
            monkeypatch.setattr(sess, "run", exhausted)

    with pytest.raises(MemoryError):
        finetune(sess, 9, save_every=2, accumulate_gradients=2, on_step=on_step)
    assert checkpoint.latest_checkpoint("checkpoint/run1") == f"checkpoint/run1/model-{saved}"


def test_passing_error_in_save_best_does_not_stop_later_saves(small, sess, monkeypatch):
    save_model = checkpoint_ops.save_model
    failures = [OSError(errno.ESTALE, "Stale file handle")]

    def fail_once(folder, base, *args):
        if base == checkpoint.BEST and failures:
            raise failures.pop()
        save_model(folder, base, *args)

    monkeypatch.setattr(checkpoint_ops, "save_model", fail_once)
    script_losses(monkeypatch, [2.0, 2.5])
    with pytest.warns(UserWarning, match="the best weights so far are not kept: .*Stale file"):
        result = finetune(sess, 4, val_split=0.3, val_every=2)
    assert (result.step, result.best_step, result.best_loss) == (4, 4, 2.5)
    best, last = tensors("checkpoint/run1/best"), tensors("checkpoint/run1/model-4")
    assert all(np.array_equal(best[name], last[name]) for name in last)


def test_passing_error_in_a_save_is_tried_again(small, sess, monkeypatch):
    save_model = checkpoint_ops.save_model
    failures = [OSError(errno.ESTALE, "Stale file handle")]

    def fail_once(*args):
        if failures:
            raise failures.pop()
        save_model(*args)

    monkeypatch.setattr(checkpoint_ops, "save_model", fail_once)
    with pytest.raises(OSError, match="Stale file handle"):
        finetune(sess, 9, save_every=3)
    assert checkpoint.latest_checkpoint("checkpoint/run1") == "checkpoint/run1/model-3"


def test_chdir_in_on_step_changes_no_path(small, sess, monkeypatch):
    (small / "elsewhere").mkdir()
    result = finetune(
        sess, 4, on_step=lambda entry: os.chdir(small / "elsewhere"), save_every=2, val_split=0.3,
        val_every=2, sample_every=2, sample_length=3,
    )  # fmt: skip
    assert os.listdir(small / "elsewhere") == []
    os.chdir(small)
    assert result.checkpoint == checkpoint.latest_checkpoint("checkpoint/run1")
    assert checkpoint.is_whole("checkpoint/run1/best")
    assert os.listdir("samples/run1") == ["samples-3"]
    os.chdir("elsewhere")
    gpt2.generate(sess, length=2, return_as_list=True)
    with pytest.raises(FileNotFoundError, match="no model in models/tiny"):
        finetune(sess, 1)
    os.chdir(small)
    with pytest.raises(train.Diverged, match="the session is back at checkpoint/run1/model-4"):
        finetune(sess, 9, learning_rate=1e30, on_step=lambda entry: os.chdir(small / "elsewhere"))


def test_removed_run_folder_is_made_again(small, sess):
    result = finetune(sess, 4, on_step=at(3, lambda: shutil.rmtree("checkpoint/run1")))
    assert checkpoint.latest_checkpoint("checkpoint/run1") == result.checkpoint
    assert finetune(sess, 1).step == 5
    with gpt2.start_tf_sess() as other:
        gpt2.load_gpt2(other, verbose=0)


def test_training_in_a_thread_saves_after_the_main_thread_ended(small):
    script = """
import threading
import gpt_2_simple as gpt2

sess = gpt2.start_tf_sess()

def train():
    gpt2.finetune(sess, "text.txt", 3, model_name="tiny", accumulate_gradients=1, sample_every=2,
                  sample_length=3, save_every=1, val_split=0.3, val_every=1,
                  on_step=lambda entry: threading.main_thread().join())

threading.Thread(target=train).start()
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert checkpoint.latest_checkpoint("checkpoint/run1") == "checkpoint/run1/model-3"
    assert os.path.exists("samples/run1/samples-3")


def test_numpy_settings_train_save_and_resume(small, sess):
    settings = {"seed": np.int64(7), "pad_documents": np.bool_(True), "batch_size": np.uint8(2),
                "learning_rate": np.float32(0.01), "val_split": np.float64(0.3),
                "accumulate_gradients": np.int8(2), "use_memory_saving_gradients": np.bool_(False),
                "sample_every": np.int16(2), "sample_length": 3.0}  # fmt: skip
    assert finetune(sess, 2e0, **settings).step == 2
    result = finetune(sess, np.array(2), **settings)
    assert result.step == 4
    state = runs.read_state(result.checkpoint)
    assert {type(value) for value in vars(state).values()} <= {int, float, str, tuple, dict}
    assert state.seed == 7
    assert [entry.step for entry in read_history("checkpoint/run1")] == [1, 2, 3, 4]
    recorded = json.loads((small / "checkpoint/run1/settings.json").read_text())
    assert (recorded["seed"], recorded["steps"], recorded["pad_documents"]) == (7, 2, True)


def test_samples_are_written_before_they_are_printed(small, sess, monkeypatch):
    def say(*parts, end="\n"):
        if str(parts[0]).startswith("======== SAMPLE"):
            shown.append(str(parts[0]))
            written = (small / "samples/run1/samples-3").read_bytes()
            assert written == "\n".join(shown).encode()

    shown = []
    monkeypatch.setattr(train, "say", say)
    finetune(sess, 3, sample_every=2, sample_num=2, sample_length=3)
    assert len(shown) == 2


def test_samples_folder_that_cannot_be_made_is_a_warning(small, sess):
    (small / "samples").write_text("a file")
    with pytest.warns(UserWarning, match="samples cannot be written in .*samples/run1: "):
        assert finetune(sess, 3, sample_every=2, sample_length=3).step == 3


@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
def test_training_prints_to_a_console_without_utf_8(small, sess, monkeypatch, encoding):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding))
    monkeypatch.setattr(
        text_stream, "generate_texts", lambda *_: iter([("", "\ufffd \u20ac \u4f60")])
    )
    assert finetune(sess, 3, sample_every=2, verbose=1).step == 3
    assert "? \u20ac ?\n" in raw.getvalue().decode(encoding) or encoding == "ascii"
    assert (small / "samples/run1/samples-3").read_text("utf-8").endswith("\ufffd \u20ac \u4f60\n")


@pytest.mark.parametrize("path", ["/dev/full", None])
def test_training_goes_on_when_standard_output_is_dead(small, sess, monkeypatch, path, capsys):
    output = io.StringIO() if path is None else open(path, "w")  # noqa: SIM115
    if path is None:
        output.close()
    monkeypatch.setattr(sys, "stdout", output)
    assert finetune(sess, 3, verbose=1).step == 3
    monkeypatch.undo()
    with contextlib.suppress(OSError):
        output.close()
    assert capsys.readouterr().err.count("note: output cannot be printed") == 1
    assert os.path.exists(small / "checkpoint/run1/model-3.index")


def test_float16_that_skips_on_at_scale_1_diverges(small, sess, monkeypatch):
    run_step = train.Trainer.run_step

    def overflowing(self, batches, learning_rate):
        self.ops = self.ops._replace(gradients_finite=never)
        return run_step(self, batches, learning_rate)

    with sess.graph.as_default():
        never = tf.constant(False)
    monkeypatch.setattr(train.Trainer, "run_step", overflowing)
    with pytest.raises(
        train.Diverged,
        match=r"overflow even at a loss scale of 1: 5 steps in a row .* step \d+; "
        r"precision='bfloat16'",
    ):
        finetune(sess, 99, precision="float16")


def test_ctrl_c_in_the_first_step_undoes_the_epoch_sampler(small, sess, monkeypatch):
    settings = {"sampling": "epoch", "accumulate_gradients": 3}
    finetune(sess, 9, "whole", **settings)
    next_batches = train.Trainer.next_batches

    def draw_and_send(self):
        os.kill(os.getpid(), signal.SIGINT)
        return next_batches(self)

    with monkeypatch.context() as patch:
        patch.setattr(train.Trainer, "next_batches", draw_and_send)
        result = finetune(sess, 9, "parts", **settings)
    assert (result.step, result.interrupted) == (0, True)
    assert f"{result.loss:.2f} {result.average_loss:.2f}" == "nan nan"
    finetune(sess, 9, "parts", **settings)
    assert distance("whole", "parts") == 0
    states = [runs.read_state(f"checkpoint/{name}/model-9") for name in ("whole", "parts")]
    assert states[0].sampler == states[1].sampler


def test_diverged_is_raised_when_the_last_checkpoint_is_gone(small, sess):
    def on_step(entry):
        shutil.rmtree("models/tiny")

    with pytest.raises(
        train.Diverged, match=r"the loss is .*the last checkpoint cannot be restored: .*model.ckpt"
    ):
        finetune(sess, 9, learning_rate=1e30, on_step=on_step)


def poison(sess):
    def put():
        variable = next(v for v in sess.graph.get_collection("variables") if "ln_f/b" in v.name)
        value = np.full(variable.shape, np.nan, np.float32)
        sess.run(variable.initializer, {variable.initializer.inputs[1]: value})

    return put


def test_nan_weights_are_never_saved(small, sess, monkeypatch, capsys):
    finetune(sess, 1)
    with pytest.raises(Mishap):
        finetune(sess, 9, on_step=fail(3, poison(sess)), verbose=1)
    assert "could not save step 3: a weight is infinite or no number" in capsys.readouterr().out
    assert checkpoint.latest_checkpoint("checkpoint/run1") == "checkpoint/run1/model-1"

    put = poison(sess)
    with pytest.raises(train.Diverged, match="a weight is infinite or no number after step 2"):
        finetune(sess, 1, on_step=lambda entry: put())
    script_losses(monkeypatch, [math.nan])
    with pytest.raises(train.Diverged, match="validation loss is nan after step 4"):
        finetune(sess, 9, val_split=0.5, val_every=4)
    assert checkpoint.latest_checkpoint("checkpoint/run1") == "checkpoint/run1/model-1"


def test_diverged_says_when_the_last_checkpoint_is_nan_too(small, sess):
    finetune(sess, 1)
    poison(sess)()
    state = session.graph_state(sess)
    saves = state.build_once(checkpoint_ops.build_save, *session.named_variables(state).values())
    sess.run(saves.done, {saves.prefix: "checkpoint/run1/model-1"})
    with pytest.raises(
        train.Diverged, match=r"back at checkpoint/run1/model-1, whose weights are no better: rest"
    ):
        finetune(sess, 1)


def test_nan_loss_restores_the_last_checkpoint(small, sess):
    finetune(sess, 2)
    before = tensors("checkpoint/run1/model-2")
    with pytest.raises(
        train.Diverged,
        match=r"the loss is (nan|inf) in step \d+; training stopped, and the session is back at "
        r"checkpoint/run1/model-2\. Try a lower learning_rate than 1e\+30",
    ):
        finetune(sess, 9, learning_rate=1e30, accumulate_gradients=2)
    assert checkpoint.latest_checkpoint("checkpoint/run1") == "checkpoint/run1/model-2"
    for variable in sess.graph.get_collection("variables"):
        if variable.op.name in before:
            assert np.array_equal(sess.run(variable), before[variable.op.name])


# --- validation ---------------------------------------------------------------------------------


def script_losses(monkeypatch, losses):
    remaining = iter(losses)
    monkeypatch.setattr(evaluate, "mean_loss", lambda *_: next(remaining))


def test_best_loss_starts_anew_with_another_validation_set(small, sess, monkeypatch, capsys):
    options = {"val_every": 1, "patience": 2, "verbose": 1}
    (small / "other.txt").write_text("nothing like it " * 9)
    script_losses(monkeypatch, [2.0, 2.5, 2.25, 2.1, 1.9, 3.0, 2.9, 3.1, 3.2])
    assert finetune(sess, 9, val_split=0.3, **options).step == 3
    # It was stopped; to be gone on with all the same gives it its patience again.
    result = finetune(sess, 2, val_split=0.3, **options)
    assert (result.step, result.best_step) == (5, 5)
    assert "validation set is another" not in capsys.readouterr().out
    result = finetune(sess, 9, val_dataset="other.txt", **options)
    assert (result.step, result.best_step, result.best_loss) == (9, 7, 2.9)
    assert "The validation set is another than before" in capsys.readouterr().out


def test_validation_with_pad_documents(small, sess, monkeypatch):
    rows = "".join(f"row {n}\n" for n in range(40))
    (small / "rows.csv").write_text("text\n" + rows)
    seen = []
    monkeypatch.setattr(evaluate, "mean_loss", lambda sess, ops, windows: seen.append(windows) or 1)
    options = {"dataset": "rows.csv", "val_split": 0.2, "pad_documents": True}
    finetune(sess, 1, **options, sampling="epoch", sequence_length=16)
    decode = session.graph_state(sess).encoder.decode
    shown = []
    for tokens, weights in zip(*seen[0], strict=True):
        size = int(weights.sum()) + 1
        assert (tokens[size:] == 0).all()
        shown.append(decode(tokens[:size]))
    assert max(text.count("row") for text in shown) == 1
    assert sum("row" in text for text in shown) == 8


def test_a_training_without_an_end_tells_so(small, sess, monkeypatch, capsys):
    script_losses(monkeypatch, [2.0, 3.0])
    result = finetune(sess, -1, val_split=0.3, val_every=1, patience=1, verbose=1)
    assert result.step == 2
    told = "Training...\nNo steps or epochs were given: the training goes on until "
    out = capsys.readouterr().out
    assert f"{told}the validation loss gets no better (patience=1), or you interrupt it" in out

    finetune(sess, -1, on_step=send(signal.SIGINT, 3), verbose=1)
    assert f"{told}you interrupt it (Ctrl-C), which saves" in capsys.readouterr().out
    finetune(sess, 1, verbose=1)
    assert "No steps" not in capsys.readouterr().out


def test_a_validation_loss_that_stays_is_no_warning(small, sess, monkeypatch, capsys):
    script_losses(monkeypatch, [3.0, 2.0, 2.00001, 2.00002, 2.00001])
    finetune(sess, 10, val_split=0.3, val_every=2, verbose=1)
    out = capsys.readouterr().out
    assert out.count("The validation loss stays at 2.00 since step 4. Checkpoint 'best'") == 1
    assert "Warning" not in out


@pytest.mark.parametrize(
    ("losses", "said"),
    [
        ([3.0, 2.0, 2.00001, 2.00002, 2.5, 3.5], "from 2.00 in step 4 to 2.50"),
        ([3.0, 2.0, 2.5, 2.00001, 3.5, 3.6], "from 2.00 in step 4 to 3.50"),
        ([3.0, 2.001, 2.002, 2.003, 2.5, 3.5], "from 2.0010 in step 4 to 2.0030"),
    ],
)
def test_a_validation_loss_that_turns_up_is_warned_of_once(
    small, sess, monkeypatch, capsys, losses, said
):
    script_losses(monkeypatch, losses)
    finetune(sess, 12, val_split=0.3, val_every=2, verbose=1)
    out = capsys.readouterr().out
    assert f"Warning: the validation loss turns up, {said}" in out
    assert out.count("Warning") == 1


def test_best_checkpoint_and_early_stopping(small, sess, monkeypatch, capsys):
    script_losses(monkeypatch, [3.0, 2.0, 2.5, 2.25, 2.1])
    result = finetune(
        sess, 99, val_split=0.3, val_every=2, patience=3, save_every=1, max_checkpoints=0, verbose=1
    )
    assert (result.step, result.best_step, result.best_loss) == (10, 4, 2.0)
    assert result.validation_loss == 2.1
    out = capsys.readouterr().out
    assert re.search(r"\[4 \| \d+\.\d\d\] validation loss=2.00 perplexity=7.39, data seen \d", out)
    assert out.count("Warning: the validation loss turns up, from 2.00 in step 4 to 2.25") == 1
    assert "Stopping: no better validation loss for 3 validations\n" in out
    best, fourth = tensors("checkpoint/run1/best"), tensors("checkpoint/run1/model-4")
    assert all(np.array_equal(best[name], fourth[name]) for name in fourth)
    assert best.keys() == fourth.keys()

    gpt2.load_gpt2(sess, "best")
    assert "Loading checkpoint checkpoint/run1/best\n" in capsys.readouterr().out
    variable = next(v for v in sess.graph.get_collection("variables") if v.op.name == "model/wte")
    assert np.array_equal(sess.run(variable), best["model/wte"])
    assert tf.train.latest_checkpoint("checkpoint/run1") == "checkpoint/run1/model-10"
    with pytest.raises(FileNotFoundError, match="no whole .*model-11; .* model-9, model-10, best"):
        gpt2.load_gpt2(sess, "model-11")


def test_patience_continues_in_a_resumed_run(small, sess, monkeypatch):
    settings = {"val_split": 0.3, "val_every": 1, "patience": 3}
    script_losses(monkeypatch, [2.0, 3.0, 3.0])
    assert finetune(sess, 3, **settings).best_step == 1
    script_losses(monkeypatch, [2.5, 1.0])
    result = finetune(sess, 9, **settings)
    assert (result.step, result.best_step) == (4, 1)
    assert read_history("checkpoint/run1")[-1].validation_loss == 2.5


def test_last_step_is_always_validated(small, sess):
    (small / "other.txt").write_text("ten green bottles hanging on the wall\n" * 3)
    result = finetune(sess, 3, val_dataset="other.txt", val_every=2, val_batch_count=3)
    losses = [entry.validation_loss for entry in result.history]
    assert [loss is None for loss in losses] == [True, False, False]
    assert result.validation_loss == losses[2] == result.best_loss
    gpt2.load_gpt2(sess, verbose=0)
    again = finetune(sess, 1, val_dataset="other.txt", learning_rate=1e-30, val_batch_count=3)
    assert again.validation_loss == pytest.approx(losses[2], abs=1e-6)


def test_validation_set_shorter_than_a_window(small, sess, capsys):
    (small / "few.npz").write_bytes(b"")
    np.savez_compressed(small / "few.npz", np.arange(5, dtype=np.int32))
    assert finetune(sess, 1, val_dataset="few.npz", verbose=1).validation_loss > 0
    assert (
        "the validation set is shorter than 16 tokens: one window of 5\n" in capsys.readouterr().out
    )
    np.savez_compressed(small / "one.npz", np.arange(1, dtype=np.int32))
    with pytest.raises(ValueError, match="the validation set has 1 tokens: at least 2 are needed"):
        finetune(sess, 1, val_dataset="one.npz")


# --- how long, and how fast ---------------------------------------------------------------------


def test_learning_rate_follows_the_schedule(small, sess):
    settings = {"warmup_steps": 2, "lr_schedule": "linear", "min_learning_rate": 0.002}
    result = finetune(sess, 5, **settings)
    rates = [entry.learning_rate for entry in result.history]
    assert rates == pytest.approx([0.005, 0.01, 0.01, 0.006, 0.002])
    result = finetune(sess, 2, **settings)  # no second warmup; falls until the new last step
    rates = [entry.learning_rate for entry in result.history]
    assert rates == pytest.approx([0.002 + 0.008 / 4, 0.002])


def test_epochs_show_every_token_that_often(small, sess, capsys):
    result = finetune(sess, -1, epochs=2, sampling="epoch", accumulate_gradients=2, verbose=1)
    out = capsys.readouterr().out
    tokens = int(re.search(r"dataset has (\d+) tokens", out)[1])
    assert result.step == math.ceil(2 * math.ceil((tokens - 1) / 15) / 4)
    assert f"epochs=2 are {result.step} steps\n" in out
    state = runs.read_state(result.checkpoint)
    assert 2 * (tokens - 1) <= state.sampler["predicted"] < 2.3 * tokens


def test_padding_has_no_weight_in_the_loss(small, sess):
    """Micro-batches of unequal windows take the step of one batch of them all."""
    rows = ["a", "green bottle", "ten green bottles hanging on the wall", "wall"] * 4
    (small / "rows.csv").write_text("text\n" + "\n".join(rows) + "\n")
    settings = {"dataset": "rows.csv", "sampling": "epoch", "pad_documents": True,
                "optimizer": "sgd"}  # fmt: skip
    one = finetune(sess, 2, "one", batch_size=8, **settings)
    many = finetune(sess, 2, "many", batch_size=2, accumulate_gradients=4, **settings)
    assert one.loss == pytest.approx(many.loss, rel=1e-5)
    ours, theirs = tensors(one.checkpoint), tensors(many.checkpoint)
    for name, value in ours.items():
        np.testing.assert_allclose(theirs[name], value, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps=0 must be a whole number, 1 or above"),
        ({"steps": -2}, r"steps=-2 must be .* \(or -1: until Ctrl-C\)"),
        ({"steps": 5, "epochs": 1}, "give steps=5 or epochs=1, not both"),
        ({"epochs": 0}, "epochs=0 must be a number above 0"),
        ({"epochs": math.nan}, "epochs=nan must be"),
        ({"lr_schedule": "cosine"}, "lr_schedule='cosine' falls until the last step: give steps"),
        ({"lr_schedule": "step"}, "lr_schedule='step' must be one of"),
        ({"warmup_steps": -1}, "warmup_steps=-1 must be"),
        ({"sampling": "all"}, "sampling='all' must be one of 'random', 'epoch'"),
        ({"val_every": 0}, "val_every=0 must be"),
        ({"val_batch_count": 0}, "val_batch_count=0 must be"),
        ({"patience": -1}, "patience=-1 must be"),
        (
            {"patience": 2, "steps": 1},
            "patience=2 needs a validation set: give val_dataset or",
        ),
        ({"val_split": 0.1, "val_dataset": "text.txt"}, "give val_dataset='text.txt' or val_split"),
        ({"val_split": 1.5, "steps": 1}, "val_split=1.5 must be a number, 0 or above and below 1"),
    ],
)
def test_contradicting_settings_raise_value_error(small, sess, changes, message):
    with pytest.raises(ValueError, match=message):
        finetune(sess, **{"steps": -1, **changes})
    assert not os.path.exists("checkpoint/run1/checkpoint")


# --- what it writes -----------------------------------------------------------------------------


def test_history_tensorboard_events_and_samples(small, sess):
    finetune(sess, 4, print_every=2, val_split=0.3, val_every=3, sample_every=3, sample_length=5)
    found = read_history("checkpoint/run1")
    assert [entry.step for entry in found] == [2, 3, 4]
    assert [entry.validation_loss is None for entry in found] == [True, False, False]
    finetune(sess, 1)
    assert [entry.step for entry in read_history("checkpoint/run1")] == [2, 3, 4, 5]

    values = {}
    (first, _) = sorted(glob.glob("checkpoint/run1/events*"))
    for event in tf.compat.v1.train.summary_iterator(first):
        for value in event.summary.value:
            values.setdefault(value.tag, []).append((event.step, value))
    steps = {tag: [step for step, _ in found] for tag, found in values.items()}
    assert steps == {
        "loss": [1, 2, 3, 4], "learning_rate": [2, 3, 4], "tokens_per_second": [2, 3, 4],
        "validation_loss": [3, 4], "perplexity": [3, 4], "samples": [3],
    }  # fmt: skip
    text = values["samples"][0][1]
    assert text.metadata.plugin_data.plugin_name == "text"
    with open("samples/run1/samples-4", encoding="utf-8") as file:
        assert tf.make_ndarray(text.tensor)[0].decode() == file.read()
    loss = values["validation_loss"][0][1].simple_value
    assert values["perplexity"][0][1].simple_value == pytest.approx(math.exp(loss), rel=1e-4)


def test_broken_history_does_not_stop_a_run(small, sess):
    finetune(sess, 2)
    with open("checkpoint/run1/history.jsonl", "a") as file:
        file.write('{"step": 3, "lo')
    finetune(sess, 2)
    assert [entry.step for entry in read_history("checkpoint/run1")] == [1, 2, 3, 4]


def test_verbose_0_prints_nothing(small, sess, capfd):
    capfd.readouterr()
    finetune(sess, 4, val_split=0.3, val_every=2, sample_every=2, sample_length=5)
    assert capfd.readouterr().out == ""


def test_progress_bar_and_lines_together(small, sess, monkeypatch, capsys):
    monkeypatch.setattr(report, "is_interactive", lambda: True)
    finetune(sess, 3, verbose=1)
    captured = capsys.readouterr()
    assert "Training:" in captured.err
    assert "3/3" in captured.err
    assert re.search(r"loss=\d\.\d\d, avg=\d\.\d\d, tok/s=", captured.err)
    lines = [line for line in captured.out.splitlines() if line.startswith("[")]
    assert [bool(re.fullmatch(r"\[\d \| \d+\.\d\d\] loss=\d\.\d\d avg=\d\.\d\d", line))
            for line in lines] == [True] * 3  # fmt: skip
