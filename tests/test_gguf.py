"""GGUF files, read again by the gguf library; the Modelfile; what cannot be written."""

import os
import re
import sys
from pathlib import Path

import numpy as np
import oracle
import pytest
from exchange_models import HPARAMS, with_added_tokens, write_ours
from trained_vocabulary import trained_vocabulary

import gpt_2_simple as gpt2
from gpt_2_simple.common.hparams import HParams
from gpt_2_simple.data.vocabulary import byte_vocabulary
from gpt_2_simple.encoder import Encoder
from gpt_2_simple.exchange import gguf as our_gguf

gguf = pytest.importorskip("gguf")


@pytest.fixture(autouse=True)
def current_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def weights():
    """The weights of models/mine."""
    return write_ours("models/mine")


def read(path):
    """The tensors of a file as float32, in NumPy's order of axes, and its keys."""
    reader = gguf.GGUFReader(path)
    tensors = {
        tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(
            tensor.shape[::-1]
        )
        for tensor in reader.tensors
    }
    return tensors, {name: field.contents() for name, field in reader.fields.items()}


def expected_tensors(weights):
    """The tensors by llama.cpp's names, matrices as [outputs, inputs]."""
    names = {
        "ln_1": "attn_norm", "attn/c_attn": "attn_qkv", "attn/c_proj": "attn_output",
        "ln_2": "ffn_norm", "mlp/c_fc": "ffn_up", "mlp/c_proj": "ffn_down",
    }  # fmt: skip
    found = {
        "token_embd.weight": weights["model/wte"],
        "position_embd.weight": weights["model/wpe"],
        "output_norm.weight": weights["model/ln_f/g"],
        "output_norm.bias": weights["model/ln_f/b"],
    }
    for name, value in weights.items():
        match = re.fullmatch(r"model/h(\d+)/(.*)/([gbw])", name)
        if match:
            kind = "bias" if match[3] == "b" else "weight"
            found[f"blk.{match[1]}.{names[match[2]]}.{kind}"] = (
                value[0].T if match[3] == "w" else value
            )
    return found


def test_float32_file_has_every_tensor_under_llama_cpps_name(weights):
    path = gpt2.export_gguf(model_name="mine", quantization="f32")
    assert path == os.path.join("export", "mine-f32", "mine-f32.gguf")
    found, _ = read(path)
    expected = expected_tensors(weights)
    assert set(found) == set(expected)
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)


@pytest.mark.parametrize(
    ("quantization", "error"), [("f16", 1e-3), ("q8_0", 5e-3), ("q4_0", 0.126)]
)
def test_other_types_are_near(weights, quantization, error):
    found, _ = read(gpt2.export_gguf(model_name="mine", quantization=quantization))
    for name, value in expected_tensors(weights).items():
        is_exact = value.ndim == 1 or name.startswith("position")
        limit = 0 if is_exact else error * np.abs(value).max()
        assert np.abs(found[name] - value).max() <= limit, name


def test_rows_are_quantized_in_parts_as_in_one(weights, monkeypatch):
    one = Path(gpt2.export_gguf(model_name="mine", quantization="q4_0")).read_bytes()
    monkeypatch.setattr(our_gguf, "_CHUNK_ROWS", 7)
    parts = gpt2.export_gguf(model_name="mine", quantization="q4_0", path="parts")
    assert Path(parts).read_bytes() == one


def test_keys_state_the_sizes_and_the_tokens(weights):
    _, keys = read(gpt2.export_gguf(model_name="mine"))
    expected = {
        "general.architecture": "gpt2", "general.name": "mine", "general.file_type": 1,
        "gpt2.block_count": 3, "gpt2.context_length": 32, "gpt2.embedding_length": 32,
        "gpt2.feed_forward_length": 128, "gpt2.attention.head_count": 2,
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.bos_token_id": 256, "tokenizer.ggml.eos_token_id": 256,
        "tokenizer.ggml.add_bos_token": False,
    }  # fmt: skip
    assert {name: keys[name] for name in expected} == expected
    assert keys["gpt2.attention.layer_norm_epsilon"] == pytest.approx(1e-5)
    types = keys["tokenizer.ggml.token_type"]
    assert types[256] == gguf.TokenType.CONTROL
    assert set(types[:256]) == {gguf.TokenType.NORMAL}


def test_an_own_vocabulary_is_written_with_its_merges():
    vocabulary = trained_vocabulary()
    hparams = HParams(vocabulary.n_vocab, n_ctx=16, n_embd=32, n_head=2, n_layer=1)
    write_ours("models/own", hparams, vocabulary)
    _, keys = read(gpt2.export_gguf(model_name="own"))
    assert keys["tokenizer.ggml.tokens"] == list(vocabulary.encoder)
    assert keys["tokenizer.ggml.merges"] == [" ".join(pair) for pair in vocabulary.bpe_merges]


def test_special_tokens_have_their_own_text_and_type():
    vocabulary = with_added_tokens(byte_vocabulary())
    write_ours("models/own", HParams(vocabulary.n_vocab, 16, 32, 2, 1), vocabulary)
    _, keys = read(gpt2.export_gguf(model_name="own"))
    assert keys["tokenizer.ggml.tokens"][257:] == ["<|startoftext|>", "[PAD]", "مرحبا"]
    types = keys["tokenizer.ggml.token_type"]
    assert types[256:] == [gguf.TokenType.CONTROL, *[gguf.TokenType.USER_DEFINED] * 3]


def test_ids_without_a_token_and_added_tokens_have_names():
    tokens = {**byte_vocabulary().encoder, "<my pad>": 258}
    found = our_gguf.gguf_tokens(Encoder(tokens, []))
    assert found[256:] == ["<|endoftext|>", "<|unused257|>", "<myĠpad>"]
    assert found[:256] == list(byte_vocabulary().encoder)[:256]


def test_the_modelfile_continues_texts_as_they_are(weights):
    path = Path(gpt2.export_gguf(model_name="mine", quantization="q8_0"))
    assert path.with_name("Modelfile").read_text(encoding="utf-8").splitlines() == [
        "FROM ./mine-q8_0.gguf",
        'TEMPLATE """{{ .Prompt }}"""',
        "PARAMETER num_ctx 32",
        'PARAMETER stop "<|endoftext|>"',
    ]
    assert sorted(os.listdir(path.parent)) == ["Modelfile", "mine-q8_0.gguf"]


@pytest.mark.parametrize("quantization", ["q8_0", "q4_0"])
def test_a_width_that_is_no_multiple_of_32_is_refused(quantization):
    hparams = HParams(n_vocab=257, n_ctx=8, n_embd=48, n_head=2, n_layer=1)
    write_ours("models/mine", hparams)
    with pytest.raises(ValueError, match="multiple of 32.*n_embd=48: give quantization='f16'"):
        gpt2.export_gguf(model_name="mine", quantization=quantization)
    assert not os.path.exists("export")


def test_a_vocabulary_without_end_of_text_is_refused():
    tokens = {t: i for t, i in byte_vocabulary().encoder.items() if t != "<|endoftext|>"}
    hparams = HParams(n_vocab=256, n_ctx=8, n_embd=32, n_head=2, n_layer=1)
    write_ours("models/mine", hparams, Encoder(tokens, []))
    with pytest.raises(ValueError, match="has no <|endoftext|>"):
        gpt2.export_gguf(model_name="mine")


@pytest.mark.parametrize(
    ("value", "quantization", "message"),
    [
        (np.nan, "f32", "model/h1/mlp/c_fc/w holds numbers that are infinite or not a number"),
        (1e5, "f16", "holds 1e[+]05, which is too large for F16: give quantization='f32'"),
        (1e5, "q8_0", "holds 1e[+]05, which is too large for Q8_0"),
    ],
)
def test_numbers_that_a_type_does_not_hold_are_told_and_nothing_is_left(
    value, quantization, message
):
    weights = oracle.random_weights(HPARAMS)
    weights["model/h1/mlp/c_fc/w"][0, 3, 3] = value
    write_ours("models/mine", weights=weights)
    with pytest.raises(ValueError, match=message):
        gpt2.export_gguf(model_name="mine", quantization=quantization)
    assert os.listdir("export") == []


def test_what_exists_is_not_replaced(weights):
    os.mkdir("there")
    with pytest.raises(FileExistsError, match="there exists, and nothing is replaced"):
        gpt2.export_gguf(model_name="mine", path="there")


def test_a_full_disk_is_told(weights, monkeypatch):
    def full(self, tensor):
        raise OSError("1000 requested and 0 written")  # as NumPy's tofile() has it

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", full)
    with pytest.raises(OSError, match="could not write there: 1000 requested and 0 written"):
        gpt2.export_gguf(model_name="mine", path="there")
    assert sorted(os.listdir(".")) == ["models"]


def test_without_gguf_the_pip_line_is_told(weights, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ImportError, match=r'pip install "gpt_2_simple\[gguf\]"'):
        gpt2.export_gguf(model_name="mine")
