"""The optimizer's variables beside a checkpoint: restored, or refused with a reason."""

import os

import numpy as np
import pytest
from saved_run import SavedRun


@pytest.fixture
def saved_run(sess, tmp_path):
    return SavedRun(sess, tmp_path)


def restores(saved_run):
    manager = saved_run.manager()
    return manager.optimizer_state.restore(manager.latest)


def test_restore_fills_the_optimizers_variables(saved_run, capsys):
    saved_run.save(3, saved_run.manager(resume=False))
    saved_run.set(0)
    assert restores(saved_run)
    assert saved_run.sess.run(saved_run.optimizer["optimizer/adam/step"]) == 3
    assert np.all(saved_run.sess.run(saved_run.optimizer["optimizer/adam/m/model/wpe"]) == 3)
    assert capsys.readouterr().out.count("anew") == 0


def test_optimizer_starts_anew_if_its_state_is_missing_damaged_or_of_another(saved_run, capsys):
    saved_run.save(3, saved_run.manager(resume=False))
    left_out = saved_run.optimizer.pop("optimizer/adam/m/model/wpe")
    assert not restores(saved_run)
    assert "is of another optimizer, or other variables: the optimizer starts anew" in (
        capsys.readouterr().out
    )
    saved_run.optimizer["optimizer/adam/m/model/wpe"] = left_out
    path = os.path.join(saved_run.folder, "optimizer-3.data-00000-of-00001")
    with open(path, "r+b") as file:
        file.write(b"\xff\xff\xff\xff")
    assert not restores(saved_run)
    assert "is damaged" in capsys.readouterr().out
    os.remove(path)
    assert not restores(saved_run)
    assert "model-3 has no optimizer state beside it" in capsys.readouterr().out
