"""What a run's folder keeps of its steps; files that cannot be written are warnings."""

import glob
import os

import pytest
import tensorflow as tf

from gpt_2_simple.storage.runs import RunState
from gpt_2_simple.training import run_logger
from gpt_2_simple.training.history import History, read_history


def log_steps(logger, count):
    for _ in range(count):
        logger.run.step += 1
        logger.log(logger.step(1.5, 0.01, 8, 0.1))


def new_logger(folder, step=0):
    return run_logger.RunLogger(str(folder), RunState(step=step), None, 1)


def test_calls_in_one_second_write_events_files_of_their_own(tmp_path):
    for call in range(3):
        logger = new_logger(tmp_path, step=2 * call)
        log_steps(logger, 2)
        logger.close()
    files = glob.glob(f"{tmp_path}/events.out.tfevents.*")
    events = [list(tf.compat.v1.train.summary_iterator(path)) for path in files]
    assert sorted([event.step for event in found if event.step] for found in events) == [
        [1, 2], [3, 4], [5, 6],
    ]  # fmt: skip


class FailingWriter:
    """An events file on a disk that went away."""

    def __init__(self, error):
        self.error = error

    def add_summary(self, summary, step):
        pass

    def close(self):
        raise self.error


@pytest.mark.parametrize(
    "error",
    [OSError("No space left"), tf.errors.UnavailableError(None, None, "No space left")],
)
def test_events_file_that_cannot_be_closed_is_a_warning(tmp_path, error):
    logger = new_logger(tmp_path)
    logger._events.close()
    logger._events = FailingWriter(error)
    log_steps(logger, 1)
    with pytest.warns(UserWarning, match="TensorBoard's events file cannot be written: No space"):
        logger.close()
    assert [entry.step for entry in read_history(str(tmp_path))] == [1]


def test_history_that_cannot_be_written_is_one_warning(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError("No space left")

    monkeypatch.setattr(History, "add", refuse)
    logger = new_logger(tmp_path)
    with pytest.warns(UserWarning, match="history.jsonl cannot be written: No space left") as found:
        log_steps(logger, 3)
    assert len(found) == 1
    assert [entry.step for entry in logger.entries] == [1, 2, 3]
    logger.close()


def test_events_writer_that_cannot_start_is_a_warning(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise RuntimeError("can't create new thread at interpreter shutdown")

    monkeypatch.setattr(tf.compat.v1.summary, "FileWriter", refuse)
    with pytest.warns(UserWarning, match="events file cannot be written: can't create new thread"):
        logger = new_logger(tmp_path)
    log_steps(logger, 2)
    logger.samples(2, "text")
    logger.close()
    assert not [name for name in os.listdir(tmp_path) if name.startswith("events")]
