"""Training, saving and reading back vocabularies; the tokenizers library reads them too."""

import os
import sys

import pytest
from trained_vocabulary import DATA, TOPICS, needs_data, trained_vocabulary

from gpt_2_simple.data.vocabulary import byte_vocabulary, save_vocabulary, train_vocabulary
from gpt_2_simple.encoder import END_OF_TEXT, Encoder, get_encoder

tokenizers = pytest.importorskip("tokenizers")


@pytest.fixture
def trained():
    return trained_vocabulary()


@pytest.fixture
def folder(trained, tmp_path):
    save_vocabulary(trained, tmp_path)
    return tmp_path


def test_byte_vocabulary_has_each_byte_and_end_of_text():
    encoder = byte_vocabulary()
    assert (encoder.n_vocab, encoder.end_of_text, encoder.bpe_merges) == (257, 256, [])
    assert encoder.encode("aé") == list("aé".encode())
    assert encoder.decode_bytes(range(256)) == bytes(range(256))
    assert encoder.decoder[256] == END_OF_TEXT


def test_train_vocabulary_learns_vocab_size_tokens(trained):
    assert (trained.n_vocab, trained.end_of_text) == (1500, 1499)
    assert len(trained.encode(TOPICS)) < len(TOPICS.encode()) / 2


def test_train_vocabulary_on_short_text_yields_fewer_tokens():
    assert train_vocabulary([], 1000).n_vocab == 257
    assert train_vocabulary(["any"], 257).bpe_merges == []
    encoder = train_vocabulary(iter(["\ud800 lone", "abab abab"]), 1000)
    assert 257 < encoder.n_vocab < 300
    assert encoder.decode(encoder.encode("\ud800 abab")) == "\ud800 abab"


def test_vocab_size_below_257_raises_value_error():
    with pytest.raises(ValueError, match="vocab_size=256 must be at least 257"):
        train_vocabulary(["text"], 256)


def test_missing_tokenizers_library_names_the_extra_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ImportError, match=r'pip install "gpt_2_simple\[bpe\]"'):
        train_vocabulary(["text"], 300)


def test_get_encoder_reads_a_saved_vocabulary(trained, folder):
    read = get_encoder(folder)
    assert (read.encoder, read.bpe_merges) == (trained.encoder, trained.bpe_merges)
    assert read.encode(TOPICS) == trained.encode(TOPICS)
    assert sorted(os.listdir(folder)) == ["encoder.json", "vocab.bpe"]


@pytest.mark.parametrize("merges", [0, 1, 100])
def test_tokenizers_library_reads_a_saved_vocabulary(trained, tmp_path, merges):
    # With fewer merges some tokens are never made; the files stay valid.
    save_vocabulary(Encoder(trained.encoder, trained.bpe_merges[:merges]), tmp_path)
    text = (tmp_path / "vocab.bpe").read_text(encoding="utf-8")
    assert text.startswith("#version: 0.2\n")
    lines = text.split("\n")[1:-1]  # as OpenAI's own reader does
    assert [tuple(line.split()) for line in lines] == trained.bpe_merges[:merges]
    paths = str(tmp_path / "encoder.json"), str(tmp_path / "vocab.bpe")
    peer = tokenizers.Tokenizer(tokenizers.models.BPE.from_file(*paths))
    peer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    assert peer.encode("The import system").ids == get_encoder(tmp_path).encode("The import system")


def test_save_that_fails_leaves_the_old_files(trained, folder, monkeypatch):
    before = (folder / "encoder.json").read_bytes()

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        save_vocabulary(byte_vocabulary(), folder)
    assert (folder / "encoder.json").read_bytes() == before
    assert sorted(os.listdir(folder)) == ["encoder.json", "vocab.bpe"]


@needs_data
def test_save_writes_gpt2s_files_byte_for_byte(tmp_path):
    save_vocabulary(get_encoder(DATA), tmp_path)
    assert (tmp_path / "vocab.bpe").read_bytes() == (DATA / "vocab.bpe").read_bytes()
    written = (tmp_path / "encoder.json").read_text(encoding="utf-8")
    assert written == (DATA / "encoder.json").read_text(encoding="utf-8")
