"""GGUF files against llama.cpp.

GPT2_LLAMA_CPP_PYTHON names a Python that has it: `pip install xllamacpp`, which brings a built
llama.cpp.
"""

import numpy as np
import oracle
import pytest
import reference
from exchange_models import read_ours, with_added_tokens, write_ours
from odd_strings import odd_strings
from small_model import log_softmax
from trained_vocabulary import DATA, TOPICS, trained_vocabulary

import gpt_2_simple as gpt2
from gpt_2_simple.common.hparams import HParams
from gpt_2_simple.encoder import get_encoder

pytestmark = pytest.mark.llama_cpp


@pytest.fixture(autouse=True)
def current_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def python():
    return reference.python_of(reference.LLAMA_CPP, "xllamacpp")


@pytest.fixture
def own_model():
    """models/own: 3 blocks, a vocabulary with added tokens. Returns its sizes and vocabulary."""
    vocabulary = with_added_tokens(trained_vocabulary())
    hparams = HParams(vocabulary.n_vocab, n_ctx=64, n_embd=64, n_head=2, n_layer=3)
    write_ours("models/own", hparams, vocabulary)
    return hparams, vocabulary


def ask(python, quantization, hparams, request, tmp_path):
    path = gpt2.export_gguf(model_name="own", quantization=quantization)
    request |= {"n_ctx": hparams.n_ctx, "n_vocab": hparams.n_vocab}
    request["plain"] = get_encoder("models/own").encoder["a"]
    return reference.ask(python, "reference_llama_cpp.py", path, request, tmp_path)


def expected_log_probs(hparams, tokens):
    return log_softmax(oracle.logits(read_ours("models/own"), hparams, tokens))


def greedy(hparams, prefix, length):
    tokens = list(prefix)
    for _ in range(length):
        tokens.append(int(expected_log_probs(hparams, tokens)[-1].argmax()))
    return tokens[len(prefix) :]


def test_token_ids_of_an_own_vocabulary(python, own_model, tmp_path):
    hparams, vocabulary = own_model
    texts = odd_strings(1000)
    found = ask(python, "f32", hparams, {"texts": texts}, tmp_path)
    for text, ids in zip(texts, found["ids"], strict=True):
        assert ids == vocabulary.encode(text, allow_special=True), text


def test_token_ids_of_gpt_2s_vocabulary(python, tmp_path):
    if not DATA.is_dir():
        pytest.skip("GPT-2's own vocabulary is not here")
    vocabulary = get_encoder(DATA)
    hparams = HParams(vocabulary.n_vocab, n_ctx=64, n_embd=32, n_head=2, n_layer=1)
    write_ours("models/own", hparams, vocabulary)
    texts = odd_strings(2000)
    found = ask(python, "f16", hparams, {"texts": texts}, tmp_path)
    for text, ids in zip(texts, found["ids"], strict=True):
        assert ids == vocabulary.encode(text, allow_special=True), text


@pytest.mark.parametrize(("quantization", "error"), [("f32", 5e-3), ("f16", 3e-2)])
def test_log_probabilities_and_greedy_text(python, own_model, tmp_path, quantization, error):
    hparams, vocabulary = own_model
    tokens = vocabulary.encode("The quick brown fox, and 42 more of them.")
    request = {"prefixes": [tokens[:3], tokens], "prefix": tokens[:5], "length": 20}
    found = ask(python, quantization, hparams, request, tmp_path)
    expected = expected_log_probs(hparams, tokens)
    assert np.abs(np.array(found["log_probs"][0]) - expected[2]).max() <= error
    assert np.abs(np.array(found["log_probs"][1]) - expected[-1]).max() <= error
    assert found["greedy"] == greedy(hparams, tokens[:5], 20)


@pytest.mark.parametrize(("quantization", "change"), [("q8_0", 0.01), ("q4_0", 0.1)])
def test_perplexity(python, own_model, tmp_path, quantization, change):
    hparams, vocabulary = own_model
    tokens = vocabulary.encode(TOPICS)[: hparams.n_ctx]
    prefixes = [tokens[:length] for length in range(1, len(tokens))]
    found = ask(python, quantization, hparams, {"prefixes": prefixes}, tmp_path)
    theirs = [row[token] for row, token in zip(found["log_probs"], tokens[1:], strict=True)]
    ours = expected_log_probs(hparams, tokens)[np.arange(len(tokens) - 1), tokens[1:]]
    assert np.exp(-np.mean(theirs)) == pytest.approx(np.exp(-np.mean(ours)), rel=change)
