"""multi_gpu=True spreads the blocks over several devices; here they are logical CPU devices."""

import functools

import numpy as np
import pytest
import tensorflow as tf

import gpt_2_simple as gpt2
from gpt_2_simple import session

DEVICES = ["/device:CPU:0", "/device:CPU:1"]
SETTINGS = {"model_name": "tiny", "batch_size": 2, "accumulate_gradients": 2, "sample_every": 0,
            "seed": 1, "learning_rate": 0.001, "verbose": 0}  # fmt: skip


@pytest.fixture
def two_devices(monkeypatch):
    """Sessions have two CPU devices, which count as this machine's GPUs."""
    config = functools.partial(tf.compat.v1.ConfigProto, device_count={"CPU": 2})
    monkeypatch.setattr(tf.compat.v1, "ConfigProto", config)
    monkeypatch.setattr(session, "get_available_gpus", lambda: DEVICES)


def tensors(prefix):
    reader = tf.train.load_checkpoint(prefix)
    return {name: reader.get_tensor(name) for name in reader.get_variable_to_shape_map()}


def test_run_on_two_devices_is_that_of_one(workplace, sess, two_devices):
    one = gpt2.finetune(sess, "text.txt", 3, run_name="one", **SETTINGS)
    with gpt2.start_tf_sess() as spread:
        two = gpt2.finetune(spread, "text.txt", 3, run_name="two", multi_gpu=True, **SETTINGS)
        variables = session.named_variables(session.graph_state(spread))
        places = {name: variable.device[-5:] for name, variable in variables.items()}
        assert {places[name] for name in places if "/h0/" in name} == {"CPU:0"}
        assert {places[name] for name in places if "/h1/" in name} == {"CPU:1"}
        texts = [
            gpt2.generate(s, length=8, temperature=0, prefix="ten", return_as_list=True)
            for s in (sess, spread)
        ]
        assert texts[0] == texts[1]
    ours, theirs = tensors(one.checkpoint), tensors(two.checkpoint)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        np.testing.assert_allclose(theirs[name], value, rtol=0, atol=1e-6, err_msg=name)
    with gpt2.start_tf_sess() as again:  # and the other way round
        gpt2.load_gpt2(again, run_name="one", multi_gpu=True, verbose=0)
        score = gpt2.score(again, "ten green bottles")[0].perplexity
    assert score == pytest.approx(gpt2.score(sess, "ten green bottles")[0].perplexity, rel=1e-5)
