"""Exports and imports against transformers, PyTorch and CTranslate2's converter.

GPT2_REFERENCE_PYTHON names a Python that has them.
"""

import json
import subprocess
from pathlib import Path

import ml_dtypes
import numpy as np
import oracle
import pytest
import reference
import tensorflow as tf
from exchange_models import assert_weights_equal, read_ours, with_added_tokens, write_ours
from odd_strings import odd_strings
from small_model import GREEDY, log_softmax
from trained_vocabulary import DATA, trained_vocabulary

import gpt_2_simple as gpt2
from gpt_2_simple import model
from gpt_2_simple.common.hparams import HParams
from gpt_2_simple.encoder import get_encoder
from gpt_2_simple.generation.sequences import generate_tokens
from gpt_2_simple.session import graph_state

pytestmark = pytest.mark.transformers

# distilgpt2 has GPT-2's vocabulary, width and heads, and 6 blocks.
DISTILGPT2 = HParams(n_vocab=50257, n_ctx=1024, n_embd=768, n_head=12, n_layer=6)


@pytest.fixture(autouse=True)
def current_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def python():
    return reference.python_of(reference.TRANSFORMERS, "transformers")


def own_model():
    """models/mine: 3 blocks, a vocabulary with added tokens. Returns its sizes and vocabulary."""
    vocabulary = with_added_tokens(trained_vocabulary())
    hparams = HParams(vocabulary.n_vocab, n_ctx=64, n_embd=48, n_head=3, n_layer=3)
    write_ours("models/mine", hparams, vocabulary)
    return hparams, vocabulary


def our_log_probs(sess, tokens):
    state = graph_state(sess)
    with sess.graph.as_default():
        weights = model.read(state.weights)
        hidden = model.hidden_states(weights, state.hparams, tf.constant([tokens], tf.int32))
        logits = model.unembed(weights, hidden.h)
    return log_softmax(sess.run(logits)[0].astype(np.float64))


def our_greedy(sess, tokens, length):
    chunks = list(generate_tokens(sess, [tokens], length, GREEDY))
    return np.concatenate(chunks, 1)[0].tolist()


def assert_equal_to_transformers(python, sess, path, name, vocabulary, tmp_path, n_texts):
    """Token ids, log-probabilities and greedy text of the folder `path` and the model `name`."""
    texts = odd_strings(n_texts)
    tokens = vocabulary.encode("The quick brown fox, and 42 more of them. " * 3)[:40]
    request = {"texts": texts, "tokens": [tokens], "prefix": tokens[:8], "length": 20}
    answer = reference.ask(python, "reference_transformers.py", path, request, tmp_path)
    for text, ids, decoded in zip(texts, answer["ids"], answer["decoded"], strict=True):
        assert ids == vocabulary.encode(text, allow_special=True), text
        assert decoded == text
    gpt2.load_gpt2(sess, model_name=name)
    ours, theirs = our_log_probs(sess, tokens), np.array(answer["log_probs"][0])
    assert np.abs(ours - theirs).max() <= 2e-5 * np.abs(theirs).max()
    assert our_greedy(sess, tokens[:8], 20) == answer["greedy"]


def test_a_model_of_3_blocks_with_its_own_vocabulary(python, sess, tmp_path):
    _, vocabulary = own_model()
    path = gpt2.export_huggingface(model_name="mine")
    assert_equal_to_transformers(python, sess, path, "mine", vocabulary, tmp_path, 2000)


def test_a_model_of_distilgpt2s_shape(python, sess, tmp_path):
    if not DATA.is_dir():
        pytest.skip("GPT-2's own vocabulary is not here")
    vocabulary = get_encoder(DATA)
    weights = oracle.random_weights(DISTILGPT2, scale=0.02)
    write_ours("models/distil", DISTILGPT2, vocabulary, weights)
    path = gpt2.export_huggingface(model_name="distil", max_shard_size="100MB")
    assert len(list(Path(path).glob("model-*.safetensors"))) > 2
    assert_equal_to_transformers(python, sess, path, "distil", vocabulary, tmp_path, 2000)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_what_transformers_saves_is_imported(python, sess, tmp_path, dtype):
    _, vocabulary = own_model()
    path = gpt2.export_huggingface(model_name="mine")
    save = {"path": str(tmp_path / "theirs"), "dtype": dtype, "max_shard_size": "100KB"}
    reference.ask(python, "reference_transformers.py", path, {"save": save}, tmp_path)
    assert len(list(Path("theirs").glob("model-*.safetensors"))) > 1
    gpt2.import_huggingface("theirs")
    expected = read_ours("models/mine")
    if dtype != "float32":
        narrow = np.float16 if dtype == "float16" else ml_dtypes.bfloat16
        expected = {name: v.astype(narrow).astype(np.float32) for name, v in expected.items()}
    assert_weights_equal(read_ours("models/theirs"), expected)
    assert get_encoder("models/theirs").encoder == vocabulary.encoder
    assert_equal_to_transformers(python, sess, "theirs", "theirs", vocabulary, tmp_path, 50)


def test_there_and_back_through_sharded_float16(python, sess, tmp_path):
    _, vocabulary = own_model()
    path = gpt2.export_huggingface(model_name="mine", precision="float16", max_shard_size="100KB")
    gpt2.import_huggingface(path, model_name="back")
    assert_equal_to_transformers(python, sess, path, "back", vocabulary, tmp_path, 50)


TRANSLATE = """
import json, sys
import ctranslate2
generator = ctranslate2.Generator(sys.argv[1], device="cpu")
found = generator.generate_batch(
    [json.loads(sys.argv[2])], max_length=20, min_length=20, sampling_topk=1,
    include_prompt_in_result=False)
print(json.dumps(found[0].sequences_ids[0]))
"""


def test_ctranslate2_converts_the_export_and_writes_the_same_text(python, sess, tmp_path):
    reference.python_of(reference.TRANSFORMERS, "ctranslate2")
    hparams, vocabulary = own_model()
    path = gpt2.export_huggingface(model_name="mine")
    convert = [python, "-m", "ctranslate2.converters.transformers"]
    arguments = ["--model", path, "--output_dir", "converted"]
    subprocess.run([*convert, *arguments], check=True, capture_output=True, timeout=600)
    tokens = vocabulary.encode("The quick brown fox")
    words = [vocabulary.decoder[token] for token in tokens]
    result = subprocess.run(
        [python, "-c", TRANSLATE, "converted", json.dumps(words)],
        check=True, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    gpt2.load_gpt2(sess, model_name="mine")
    assert our_greedy(sess, tokens, 20) == json.loads(result.stdout)
