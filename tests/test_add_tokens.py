"""add_tokens(): a model with a larger vocabulary, from its rows to its generated texts."""

import json
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

import gpt_2_simple as gpt2
from gpt_2_simple.cli import main as cli
from gpt_2_simple.encoder import get_encoder


def tensors(folder):
    reader = tf.train.load_checkpoint(folder)
    return {name: reader.get_tensor(name) for name in reader.get_variable_to_shape_map()}


def test_new_rows_are_the_mean_and_all_else_is_the_same(workplace):
    folder = gpt2.add_tokens(["<a>", "«é»"], model_name="tiny", new_model_name="more")
    assert Path(folder) == Path("models/more")
    before, after = tensors("models/tiny"), tensors("models/more")
    assert before.keys() == after.keys()
    wte = after.pop("model/wte")
    np.testing.assert_array_equal(wte[:257], before["model/wte"])
    np.testing.assert_allclose(wte[257:], [before["model/wte"].mean(0)] * 2, atol=1e-8)
    assert all(np.array_equal(after[name], before[name]) for name in after)
    assert json.loads(Path("models/more/hparams.json").read_text())["n_vocab"] == 259
    enc = get_encoder("models/more")
    assert enc.encode("x<a>y«é»", allow_special=True) == [
        *enc.encode("x"),
        257,
        *enc.encode("y"),
        258,
    ]
    assert enc.decode([257, 258]) == "<a>«é»"
    with gpt2.start_tf_sess() as sess, gpt2.start_tf_sess() as other:
        gpt2.load_gpt2(sess, model_name="tiny")
        gpt2.load_gpt2(other, model_name="more")
        (old,), (new,) = gpt2.score(sess, "text"), gpt2.score(other, "text")
    # Two more tokens take a share of the probability of all, about 2 of 259.
    np.testing.assert_allclose(new.log_probabilities, old.log_probabilities, atol=0.02)


def test_model_with_new_tokens_is_trained_and_generates_up_to_one(workplace, sess):
    gpt2.add_tokens("<end>", model_name="tiny", new_model_name="more")
    Path("text.txt").write_text("ab<end>" * 300)
    options = {"model_name": "more", "sample_every": 0, "verbose": 0, "seed": 1}
    gpt2.finetune(sess, "text.txt", steps=100, learning_rate=0.005, **options)
    (text,) = gpt2.generate(
        sess, prefix="<end>", stop_token="<end>", length=20, temperature=0, return_as_list=True,
        include_prefix=False,
    )  # fmt: skip
    assert text == "ab"


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (["two words"], "'two words': give texts without white space"),
        ([""], "'': give texts without white space"),
        ([], "tokens is empty"),
        (["<a>", "<a>"], "'<a>', which is a token already"),
        (["a"], "'a', which is a token already"),
        (["<|endoftext|>"], "which is a token already"),
        (["\ud800"], "which is not Unicode"),
    ],
)
def test_wrong_tokens_raise_value_error_and_leave_nothing(workplace, tokens, message):
    with pytest.raises(ValueError, match=message.replace("|", r"\|")):
        gpt2.add_tokens(tokens, model_name="tiny", new_model_name="more")
    assert not Path("models/more").exists()


def test_existing_model_is_not_replaced(workplace):
    with pytest.raises(FileExistsError, match="models/tiny exists; give another new_model_name"):
        gpt2.add_tokens(["<a>"], model_name="tiny", new_model_name="tiny")


def test_command_adds_several_tokens(workplace, capsys):
    assert cli.main("add_tokens <a> <b> --model_name tiny".split()) == 0
    assert "models/tiny-extended with 259 tokens" in capsys.readouterr().out
