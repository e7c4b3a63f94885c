"""The validation loss against the NumPy oracle's."""

import numpy as np
import oracle
import pytest

from gpt_2_simple import model, session
from gpt_2_simple.data.windows import Batch
from gpt_2_simple.training import validation as evaluate


@pytest.fixture
def loaded(sess):
    """A session's memory, and the weights that the session holds."""
    hparams = model.HParams(n_vocab=11, n_ctx=8, n_embd=4, n_head=2, n_layer=2)
    weights = oracle.random_weights(hparams)
    state = session.build_model(sess, hparams, [])
    for name, variable in session.named_variables(state).items():
        sess.run(variable.initializer, {variable.initializer.inputs[1]: weights[name]})
    return state, weights


@pytest.mark.parametrize("rows", [256, 5])
def test_validation_loss_is_the_mean_over_all_windows(sess, loaded, rows, monkeypatch):
    monkeypatch.setattr(evaluate, "LOGIT_ROWS", rows)
    state, weights = loaded
    windows = np.random.default_rng(1).integers(0, 11, (5, 7)).astype(np.int32)
    ops = evaluate.build_evaluation(sess, state, 2, 7)  # the last batch is half full
    loss_mask = np.ones([5, 6], np.float32)
    expected = oracle.loss(weights, state.hparams, windows)
    found = evaluate.mean_loss(sess, ops, Batch(windows, loss_mask))
    assert found == pytest.approx(expected, rel=1e-5)

    # A document that ends early: what comes after it does not count.
    loss_mask[1:, 2:] = 0
    parts = [oracle.loss(weights, state.hparams, part) for part in (windows[:1], windows[1:, :3])]
    found = evaluate.mean_loss(sess, ops, Batch(windows, loss_mask))
    assert found == pytest.approx((6 * parts[0] + 8 * parts[1]) / 14, rel=1e-5)


def test_evaluation_graph_is_built_once(sess, loaded):
    ops = evaluate.build_evaluation(sess, loaded[0], 2, 7)
    count = len(sess.graph.get_operations())
    assert evaluate.build_evaluation(sess, loaded[0], 2, 7) is ops
    assert len(sess.graph.get_operations()) == count
