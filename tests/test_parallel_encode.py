"""Cutting text into blocks, and encoding them here and in helper processes."""

import functools
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st
from trained_vocabulary import trained_vocabulary
from word_encoder import ENC, WordEncoder, some_text

from gpt_2_simple.data import parallel_encode, token_file
from gpt_2_simple.data.parallel_encode import (
    CONTEXT_FLAG,
    BlockEncoder,
    ChunkPart,
    TextBlock,
    cut_into_blocks,
    encode_blocks,
    split_before_white_space,
    split_safely,
)
from gpt_2_simple.encoder import Encoder, token_of_text

SHARED = Path(__file__).parents[1] / ".." / "shared" / "data"


ANY_TEXT = st.text(
    alphabet=st.one_of(
        st.sampled_from(" \n\t\r\x0b\x1c\x1f\x85\xa0\u2028\u3000'sdtmlrev.,!<|>_09aZ"),
        st.sampled_from("éß漢字あア한글Жяก²Ⅷ٣\u0301\u200d😀\ua7ce\U000323b0\ud800"),
        st.characters(),
    ),
    max_size=40,
)


@settings(max_examples=1500, deadline=None)
@given(ANY_TEXT)
def test_split_safely_keeps_the_ids(text):
    before, after = split_safely(text)
    assert before + after == text
    assert ENC.encode(before) + ENC.encode(after) == ENC.encode(text)


@settings(max_examples=1500, deadline=None)
@given(ANY_TEXT)
def test_split_words_keeps_the_ids(text):
    words = split_before_white_space(text)
    assert "".join(words) == text
    assert [i for word in words for i in ENC.encode(word)] == ENC.encode(text)


@functools.cache
def block_encoder_of_gpt2(allow_special):
    from gpt_2_simple.encoder import get_encoder

    return BlockEncoder(get_encoder(str(SHARED)), np.uint16, allow_special, max_words=500)


@pytest.mark.skipif(not SHARED.exists(), reason="needs GPT-2's vocabulary")
@settings(max_examples=400, deadline=None)
@given(st.lists(ANY_TEXT, max_size=4), st.booleans())
def test_block_encoder_gives_the_encoders_ids(texts, allow_special):
    from gpt_2_simple.encoder import get_encoder

    enc, block_encoder = get_encoder(str(SHARED)), block_encoder_of_gpt2(allow_special)
    texts = [text.replace("|", "<|endoftext|>") for text in texts]
    ids, counts, _ = block_encoder.encode_block(TextBlock(texts, [True] * len(texts), []))
    expected = [enc.encode(text, allow_special=allow_special) for text in texts]
    assert counts == [len(one) for one in expected]
    assert np.frombuffer(ids, np.uint16).tolist() == sum(expected, [])
    for text in texts:
        before, after = split_safely(text)
        assert enc.encode(before) + enc.encode(after) == enc.encode(text)


def test_split_words_knows_every_white_space():
    characters = "".join(map(chr, range(sys.maxunicode + 1)))
    for character in regex.findall(r"\s", characters):
        assert split_before_white_space(f"a{character}") == ["a", character]
    others = regex.sub(r"\s", "", characters)
    assert split_before_white_space(others) == [others]


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(ANY_TEXT, st.booleans()), max_size=12), st.integers(1, 60))
def test_blocks_hold_the_same_chunks(parts, size):
    expected, text = [], ""
    for part, ends in [*parts, ("", True)]:
        text += part
        if ends:
            expected.append(text)
            text = ""
    blocks = list(cut_into_blocks((ChunkPart(*part) for part in parts), size))
    encoded = map(BlockEncoder(ENC, np.uint16).encode_block, blocks)
    chunks = token_file.join_blocks(encoded, np.dtype(np.uint16))
    assert [chunk.tolist() for chunk in chunks] == [ENC.encode(text) for text in expected if text]


@pytest.mark.parametrize("size", range(1, 30))
def test_end_of_text_is_not_cut_between_blocks(size):
    texts = ["a word", "<|endoftext|>", "more", "<|endoftext|>", "5"]
    blocks = cut_into_blocks([ChunkPart(text, False) for text in texts], size)
    encode_block = BlockEncoder(ENC, np.uint16, allow_special=True).encode_block
    (chunk,) = token_file.join_blocks(map(encode_block, blocks), np.dtype(np.uint16))
    assert chunk.tolist() == ENC.encode("".join(texts), allow_special=True)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(ANY_TEXT, st.booleans(), st.booleans()), max_size=12), st.integers(1, 60))
def test_tokens_that_lie_within_context_are_flagged_in_blocks_of_any_size(parts, size):
    expected, text, is_context = [], "", []
    for part, ends, in_context in [*parts, ("", True, False)]:
        text += part
        is_context += [in_context] * len(part.encode("utf-8", "surrogatepass"))
        if ends and text:
            ids, start = [], 0
            for i in ENC.encode(text):
                end = start + len(ENC.decode_bytes([i]))
                ids.append(i + CONTEXT_FLAG * all(is_context[start:end]))
                start = end
            expected.append(ids)
            text, is_context = "", []
    chunk_parts = (
        ChunkPart(text, ends, ((0, len(text)),) * (in_context and text != ""))
        for text, ends, in_context in parts
    )
    encode_block = BlockEncoder(ENC, np.dtype(np.uint32)).encode_block
    encoded = map(encode_block, cut_into_blocks(chunk_parts, size))
    chunks = token_file.join_blocks(encoded, np.dtype(np.uint32))
    assert [chunk.tolist() for chunk in chunks] == expected


def test_token_across_the_border_of_context_is_learned():
    enc = trained_vocabulary()
    text = "Is it the case? the case"
    start = len("Is it the case? ")
    block = TextBlock([text], [True], [((0, start),)])
    encoded = BlockEncoder(enc, np.dtype(np.uint32)).encode_block(block)
    ids = np.frombuffer(encoded.ids, np.uint32)
    context = enc.decode([i - CONTEXT_FLAG for i in ids.tolist() if i >= CONTEXT_FLAG])
    assert context == "Is it the case?"
    assert enc.decode([i for i in ids.tolist() if i < CONTEXT_FLAG]) == " the case"


def test_added_token_is_not_cut_between_blocks():
    base = trained_vocabulary()
    texts = ["<a1b>", "<2>"]
    ids = {token_of_text(text): base.n_vocab + i for i, text in enumerate(texts)}
    vocabulary = Encoder({**base.encoder, **ids}, base.bpe_merges)
    text = "see<a1b>the<2> <a1b>case 12<2>3" * 3
    for size in range(1, 40):
        parts = (ChunkPart(text[i : i + 7], False) for i in range(0, len(text), 7))
        blocks = cut_into_blocks(parts, size, vocabulary.special_tokens)
        encode_block = BlockEncoder(vocabulary, np.uint16, allow_special=True).encode_block
        (chunk,) = token_file.join_blocks(map(encode_block, blocks), np.dtype(np.uint16))
        assert chunk.tolist() == vocabulary.encode(text, allow_special=True)


def test_text_without_white_space_is_cut_into_blocks():
    blocks = list(cut_into_blocks([ChunkPart("漢字，" * 100, False)] * 10, 200))
    assert len(blocks) == 11
    assert max(len(text) for block in blocks for text in block.texts) < 310


def test_word_cache_is_bounded():
    block_encoder = BlockEncoder(ENC, np.uint16, max_words=30)
    for start in range(0, 1000, 10):
        text = " ".join(map(str, range(start, start + 10)))
        ids, (count,), _ = block_encoder.encode_block(TextBlock([text], [True], []))
        assert np.frombuffer(ids, np.uint16).tolist() == ENC.encode(text)
        assert count == len(ENC.encode(text))
        assert len(block_encoder.cache) <= 30


def test_helper_processes_import_no_tensorflow(monkeypatch):
    text = some_text(5000)
    blocks = [TextBlock([text, "two"], [True, False], [])] * 20
    started = parallel_encode._start_helpers((ENC, np.uint16, False, 1000), 2)
    assert len(started) == 2
    modules = Path(f"/proc/{started[0].process.pid}/maps")
    if modules.exists():
        assert "tensorflow" not in modules.read_text()
    for helper in started:
        helper.close()
    encoded = list(encode_blocks(iter(blocks), ENC, np.uint16, False, 2))
    assert len(encoded) == 20
    assert all(
        np.frombuffer(block.ids, np.uint16).tolist() == ENC.encode(text) + ENC.encode("two")
        for block in encoded
    )


class NotPicklable(WordEncoder):
    def __reduce__(self):
        raise TypeError("cannot be pickled")


class DiesElsewhere(WordEncoder):
    """Ends any process but the one it was made in, when it meets 'die'."""

    def __init__(self):
        self.home = os.getpid()

    def encode(self, text, allow_special=False):
        if "die" in text and os.getpid() != self.home:
            os._exit(3)
        return super().encode(text, allow_special)


@pytest.mark.parametrize("enc", [NotPicklable(), DiesElsewhere()])
def test_encoding_goes_on_when_helpers_fail(enc):
    texts = ["some text", "it may die here"] * 10
    blocks = [TextBlock([text], [True], []) for text in texts]
    encoded = encode_blocks(iter(blocks), enc, np.uint16, False, 2)
    assert [np.frombuffer(block.ids, np.uint16).tolist() for block in encoded] == [
        WordEncoder().encode(text) for text in texts
    ]


def test_encoding_goes_on_without_an_interpreter_for_helpers(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    blocks = [TextBlock(["text"], [True], [])]
    (encoded,) = encode_blocks(iter(blocks), ENC, np.uint16, False, 2)
    assert encoded.counts == [len(ENC.encode("text"))]
