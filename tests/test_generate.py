"""generate() and its relatives on a small trained model: beam search, lengths, 16 bits."""

import json

import numpy as np
import pytest

import gpt_2_simple as gpt2
from gpt_2_simple import session
from gpt_2_simple.generation import beam_search, text_stream
from gpt_2_simple.generation.generate import iterate_texts
from gpt_2_simple.generation.output import json_line
from gpt_2_simple.generation.settings import GenerationSettings


@pytest.fixture
def loaded(workplace, sess):
    """A session with the tiny model, trained a little: its bytes then differ in likelihood."""
    gpt2.finetune(
        sess, "text.txt", model_name="tiny", steps=40, learning_rate=0.01, accumulate_gradients=1,
        sample_every=0, seed=1, verbose=0,
    )  # fmt: skip
    return sess


def generate(sess, prefix, **settings):
    return gpt2.generate(sess, prefix=prefix, return_as_list=True, length=12, **settings)


def test_beam_search_finds_likelier_texts_than_greedy(loaded):
    def total(text):
        (score,) = gpt2.score(loaded, text)
        return score.log_probabilities.sum()

    best = generate(loaded, None, num_beams=6, nsamples=3)
    (greedy,) = generate(loaded, None, temperature=0)
    totals = [total(text) for text in best]
    assert sorted(totals, reverse=True) == totals
    assert totals[0] >= total(greedy)
    assert len(set(best)) == 3


def test_beam_search_of_several_prefixes_keeps_their_order(loaded):
    prefixes = ["one ", "two green", "x"]
    together = generate(loaded, prefixes, num_beams=3, nsamples=2, batch_size=None)
    alone = [generate(loaded, prefix, num_beams=3, nsamples=2) for prefix in prefixes]
    assert together == [text for texts in alone for text in texts]
    assert [text.startswith(prefixes[i // 2]) for i, text in enumerate(together)] == [True] * 6


def test_beam_search_ends_at_a_stop_and_leaves_the_prefix_out(loaded):
    (free,) = generate(loaded, "on the ", num_beams=4, include_prefix=False)
    stop = free[3:5]
    for text in generate(
        loaded, "on the ", num_beams=4, nsamples=4, stop=stop, include_prefix=False
    ):
        assert stop not in text
        assert not text.startswith("on the ")


def test_ctrl_c_returns_the_texts_of_an_unfinished_beam_search(loaded, monkeypatch):
    step = beam_search.BeamSearch.step

    def interrupted(self):
        if self.n_generated == 5:
            raise KeyboardInterrupt
        return step(self)

    monkeypatch.setattr(beam_search.BeamSearch, "step", interrupted)
    texts = generate(loaded, "on", num_beams=4, nsamples=4)
    assert [len(text) for text in texts] == [len("on") + 5] * 4


def test_max_new_tokens_replaces_length(loaded):
    settings = {"temperature": 0, "return_as_list": True, "include_prefix": False}
    (short,) = gpt2.generate(loaded, prefix="one", max_new_tokens=5, **settings)
    (same,) = gpt2.generate(loaded, prefix="one", length=5, **settings)
    assert short == same
    streamed = "".join(
        gpt2.generate_stream(loaded, "one", max_new_tokens=5, temperature=0, include_prefix=False)
    )
    assert streamed == short
    with pytest.raises(ValueError, match="max_new_tokens=0"):
        gpt2.generate(loaded, max_new_tokens=0)


def test_beam_search_settings_out_of_range(loaded):
    with pytest.raises(ValueError, match="nsamples=4 must not be above num_beams=3"):
        generate(loaded, "a", nsamples=4, num_beams=3)
    with pytest.raises(ValueError, match="num_beams=0"):
        generate(loaded, "a", num_beams=0)
    with pytest.raises(ValueError, match="length_penalty=inf"):
        generate(loaded, "a", num_beams=2, length_penalty=float("inf"))
    with pytest.raises(ValueError, match="num_beams=2 cannot stream"):
        gpt2.generate(loaded, num_beams=2, stream=True)


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_weights_in_16_bits_give_nearly_the_same_scores(loaded, precision):
    wide = gpt2.score(loaded, "two green bottles")[0].log_probabilities
    with gpt2.start_tf_sess() as sess:
        gpt2.load_gpt2(sess, precision=precision, verbose=0)
        held = session.named_variables(session.graph_state(sess))
        kinds = {name: variable.dtype.name for name, variable in held.items()}
        assert kinds["model/h1/mlp/c_fc/w"] == precision
        assert kinds["model/h1/mlp/c_fc/b"] == kinds["model/wte"] == "float32"
        narrow = gpt2.score(sess, "two green bottles")[0].log_probabilities
        np.testing.assert_allclose(narrow, wide, atol=0.05)
        assert not np.array_equal(narrow, wide)
        # One row is computed otherwise than several; both are as the whole forward pass has it.
        (alone,) = generate(sess, "two", temperature=0)
        assert generate(sess, ["two", "one"], temperature=0, batch_size=None)[0] == alone
        (best,) = generate(sess, "two", num_beams=1, top_k=1)
        assert best == alone
        gpt2.load_gpt2(sess, verbose=0)  # keeps what the session has
        assert generate(sess, "two", temperature=0) == [alone]


def test_weights_in_16_bits_cannot_be_trained(loaded):
    with gpt2.start_tf_sess() as sess:
        gpt2.load_gpt2(sess, precision="bfloat16", verbose=0)
        with pytest.raises(ValueError, match="holds a model in bfloat16, and float32 is wanted"):
            gpt2.finetune(sess, "text.txt", model_name="tiny", steps=1, verbose=0)
        with pytest.raises(ValueError, match="holds a model in bfloat16"):
            gpt2.load_gpt2(sess, precision="float16")
    with gpt2.start_tf_sess() as sess, pytest.raises(ValueError, match="'int4' must be one of"):
        gpt2.load_gpt2(sess, precision="int4")


def test_iterate_texts_gives_what_generate_returns(loaded):
    settings = {"prefix": ["one ", "two"], "nsamples": 2, "batch_size": None, "seed": 3}
    texts = gpt2.generate(loaded, length=12, return_as_list=True, **settings)
    chosen = GenerationSettings(length=12, **settings)
    found = list(iterate_texts(loaded, chosen))
    assert [generated.text for generated in found] == texts
    assert [generated.prefix for generated in found] == ["one ", "one ", "two", "two"]
    lines = [json_line(*generated) for generated in found]
    assert [json.loads(line)["text"] for line in lines] == texts


def test_delimiter_follows_each_text(loaded, monkeypatch):
    texts = [("a", "ab"), ("", "c\n")]
    monkeypatch.setattr(text_stream, "generate_texts", lambda *_: (text for text in texts))
    gpt2.generate(loaded, nsamples=2, sample_delim="==\n", destination_path="out.txt")
    with open("out.txt") as file:
        assert file.read() == "ab\n==\nc\n\n==\n"
