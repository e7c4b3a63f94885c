"""The encoder against naive BPE, the tokenizers library, tiktoken, and on files that are broken."""

import itertools

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from trained_vocabulary import DATA, OTHER_LANGUAGES, TOPICS, needs_data, trained_vocabulary

from gpt_2_simple import encoder as module
from gpt_2_simple.data.vocabulary import byte_vocabulary, save_vocabulary
from gpt_2_simple.encoder import (
    END_OF_TEXT,
    Encoder,
    IncrementalDecoder,
    bytes_to_unicode,
    check_vocabulary,
    get_encoder,
)

tokenizers = pytest.importorskip("tokenizers")

NASTY = [
    "",
    " ",
    "\n",
    "a",
    "\ufffd",
    "  two  spaces   three",
    "trailing   ",
    " \n \t\r\n x",
    "I'll we've they're 'tis 'S 'LL it's'll'",
    "1234567 ½ ² ٣ Ⅷ",
    "naïve café \u00a0 no-break \u2003em\u3000wide\x85next\x1c\x1d\x1e\x1f",
    "👩‍👩‍👧‍👦 🇩🇪 e\u0301 \u200b\ufeff",
    "你好，世界。こんにちは 안녕",
    "\x00\x01\x7f\x80\xad\xff\ufffd\ufffe\U0010ffff",
    "<|endoftext|> <|endoftext|>x",
    "-" * 1000 + "=" * 77 + "." * 33 + "!!!...\"'",
    "a" * 3000 + " " * 500 + "b" * 300 + "\n" * 200 + "é" * 400,
    "supercalifragilisticexpialidocious" * 40,
]
ANY_STRING = st.text(st.characters(exclude_categories=()), max_size=60)
FEW_SIGNS = st.text(st.sampled_from("abé'st 1½.\n\t\u00a0你ß"), max_size=80)


@pytest.fixture(scope="module")
def trained():
    return trained_vocabulary()


@pytest.fixture(scope="module")
def peer(trained):
    """The tokenizers library with the same vocabulary."""
    peer = tokenizers.Tokenizer(tokenizers.models.BPE(trained.encoder, trained.bpe_merges))
    peer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    return peer


@pytest.fixture
def folder(trained, tmp_path):
    save_vocabulary(trained, tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def gpt2():
    return get_encoder(DATA)


def naive_ids(encoder, word):
    """BPE as its definition reads, for one word."""
    ranks = {pair: rank for rank, pair in enumerate(encoder.bpe_merges)}
    parts = [bytes_to_unicode()[byte] for byte in word.encode("utf-8", "surrogatepass")]
    while True:
        known = [
            (ranks[pair], i) for i, pair in enumerate(itertools.pairwise(parts)) if pair in ranks
        ]
        if not known:
            return [encoder.encoder[part] for part in parts]
        _, i = min(known)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]


def is_same_in_all_releases(text):
    """Whether a text has no letter that newer Unicode tables class otherwise than older ones."""
    newer = module.regex.compile(f"[{module._NEWER_THAN_UNICODE_16}]")
    return not newer.search(text)


class TestIds:
    @given(ANY_STRING.filter(lambda text: not module._SURROGATE.search(surrogate_bytes(text))))
    def test_ids_equal_tokenizers_library_on_any_text(self, trained, peer, text):
        if is_same_in_all_releases(text):
            assert trained.encode(text) == peer.encode(text).ids

    @given(FEW_SIGNS)
    def test_ids_equal_tokenizers_library_on_words_and_spaces(self, trained, peer, text):
        assert trained.encode(text) == peer.encode(text).ids

    @pytest.mark.parametrize("text", NASTY)
    def test_ids_equal_tokenizers_library_on_nasty_texts(self, trained, peer, text):
        assert trained.encode(text) == peer.encode(text).ids

    def test_ids_equal_tokenizers_library_on_long_texts(self, trained, peer):
        for text in (TOPICS, TOPICS.replace("e", "é"), OTHER_LANGUAGES):
            assert trained.encode(text) == peer.encode(text).ids
            assert trained.encode(text) == peer.encode(text).ids  # now from memory

    def test_character_classes_equal_tokenizers_library(self, peer):
        # Whole blocks of one kind (Han, Hangul, private use) are sampled.
        dense = [range(0x3400), range(0xA000, 0xAC00), range(0xF900, 0x17000)]
        sampled = [range(0x18000, 0x20000, 3), range(0x3400, 0xD800, 61)]
        far = [range(0x20000, 0x110000, 61), range(0xE0000, 0xE0200)]
        characters = map(chr, itertools.chain(*dense, *sampled, *far))
        # Beside "a" and "1" a letter, a number, a space and a sign are each split differently.
        for text in [f"a{char}1{char}" for char in characters if is_same_in_all_releases(char)]:
            theirs = [word for word, _ in peer.pre_tokenizer.pre_tokenize_str(text)]
            assert list(map(encoded_word, module.split_words(text))) == theirs

    def test_letters_newer_than_unicode_16_are_split_as_signs(self):
        assert module.split_words("a\u088f") == ["a", "\u088f"]
        assert module.split_words("a!\U0003d000\U00011de0") == [
            "a",
            "!\U0003d000\U00011de0",
        ]

    @given(FEW_SIGNS | st.text(st.characters(max_codepoint=0xFFFF, exclude_categories=())))
    def test_re_and_regex_patterns_split_text_up_to_ffff_alike(self, text):
        assert module._words_up_to_ffff().findall(text) == module._words().findall(text)

    @given(FEW_SIGNS | st.text("a. \n\t\x1c") | ANY_STRING)
    def test_text_is_cut_into_parts_between_words(self, text):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "_PART_CHARS", 2)
            chunks = list(module._parts(text))
        words = [word for chunk in chunks for word in module.split_words(chunk)]
        assert words == module.split_words(text)

    @settings(max_examples=300)
    @given(
        st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), max_size=12),
        st.randoms(use_true_random=False),
        st.booleans(),
        st.lists(st.text("abc", max_size=30), max_size=5),
        st.sampled_from([2, 100]),
    )
    def test_ids_equal_naive_bpe_for_any_merges(self, picks, random, shuffle, words, long_word):
        tokens, merges = ["a", "b", "c"], []
        for left, right in picks:
            pair = tokens[left % len(tokens)], tokens[right % len(tokens)]
            if pair not in merges:
                merges.append(pair)
                tokens.append("".join(pair))
        if shuffle:
            random.shuffle(merges)
        vocabulary = [*bytes_to_unicode().values(), *dict.fromkeys(tokens[3:])]
        encoder = Encoder({token: i for i, token in enumerate(vocabulary)}, merges)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "_LONG_WORD_BYTES", long_word)
            for word in [*words, *tokens]:
                assert encoder.encode(word) == (naive_ids(encoder, word) if word else [])

    def test_ids_equal_naive_bpe_if_a_token_is_made_in_two_ways(self):
        merges = [("a", "c"), ("c", "ac"), ("ac", "ac"), ("c", "acac"), ("a", "cac")]
        vocabulary = dict.fromkeys([*bytes_to_unicode().values(), *map("".join, merges)])
        encoder = Encoder({token: i for i, token in enumerate(vocabulary)}, merges)
        assert encoder.encode("cacac") == naive_ids(encoder, "cacac")

    def test_ids_equal_tokenizers_library_on_very_long_words(self, trained, peer):
        for word in ("-" * 300_000, "abcdefghij" * 30_000, "é" * 100_000):
            assert trained.encode(word) == peer.encode(word).ids

    def test_full_word_cache_is_cleared_and_changes_no_id(self, trained, monkeypatch):
        monkeypatch.setattr(module, "_MAX_CACHED_WORDS", 10)
        forgetful = Encoder(trained.encoder, trained.bpe_merges)
        assert forgetful.encode(TOPICS) == trained.encode(TOPICS)
        assert len(forgetful._ids_of_word) <= trained.n_vocab + 10
        forgetful.encode("y" * 1000)
        assert "y" * 1000 not in forgetful._ids_of_word


def surrogate_bytes(text):
    return text.encode("utf-8", "surrogatepass")


def encoded_word(word):
    return "".join(bytes_to_unicode()[byte] for byte in word.encode())


class TestRoundTrip:
    @given(ANY_STRING)
    @example("\ud83d\ude00 \ud800x\udfff")
    @example("\ufffd\udced")
    def test_decode_restores_any_text_and_lone_surrogates(self, trained, text):
        for encoder in (trained, byte_vocabulary()):
            assert encoder.decode(encoder.encode(text)) == text
            assert encoder.decode_bytes(encoder.encode(text)) == surrogate_bytes(text)

    @given(ANY_STRING)
    def test_decode_without_surrogates_can_be_written_as_utf_8(self, trained, text):
        decoded = trained.decode(trained.encode(text), surrogates=False)
        assert decoded == surrogate_bytes(text).decode("utf-8", "replace")
        assert decoded.encode("utf-8").decode("utf-8") == decoded

    def test_half_a_character_decodes_to_a_replacement_character(self):
        encoder = byte_vocabulary()
        ids = encoder.encode("a😀b")
        assert encoder.decode(ids[:3]) == "a\ufffd"
        assert encoder.decode(ids[3:]) == "\ufffd\ufffdb"
        strict = Encoder(encoder.encoder, [], errors="strict")
        with pytest.raises(UnicodeDecodeError):
            strict.decode(ids[:3])

    @pytest.mark.parametrize("kind", [int, np.int32, np.int64, np.uint16])
    def test_decode_takes_numpy_integers(self, trained, kind):
        ids = [kind(token) for token in trained.encode("some text")]
        assert trained.decode(ids) == "some text"
        assert trained.decode(np.array(ids)) == "some text"

    @pytest.mark.parametrize("token", [-1, 1500, np.int64(1500)])
    def test_decode_of_an_unknown_id_raises_value_error(self, trained, token):
        assert trained.n_vocab == 1500
        for decode in (trained.decode, trained.decode_bytes, IncrementalDecoder(trained).feed):
            with pytest.raises(ValueError, match=rf"token id {token} is not in .* 1500 tokens"):
                decode([1, token])


class TestEndOfText:
    def test_end_of_text_is_split_like_other_text_by_default(self, trained, peer):
        text = f"one{END_OF_TEXT}two"
        assert trained.end_of_text not in trained.encode(text)
        assert trained.encode(text) == peer.encode(text).ids

    def test_end_of_text_is_one_token_with_allow_special(self, trained):
        end = trained.end_of_text
        assert trained.encode(END_OF_TEXT, allow_special=True) == [end]
        ids = trained.encode(f"{END_OF_TEXT}one {END_OF_TEXT}{END_OF_TEXT} two", allow_special=True)
        assert ids == [end, *trained.encode("one "), end, end, *trained.encode(" two")]
        assert trained.decode(ids) == f"{END_OF_TEXT}one {END_OF_TEXT}{END_OF_TEXT} two"

    def test_allow_special_without_the_token_raises_value_error(self):
        encoder = Encoder({char: byte for byte, char in bytes_to_unicode().items()}, [])
        assert (encoder.end_of_text, encoder.n_vocab) == (None, 256)
        assert encoder.encode("no such token", allow_special=True)
        with pytest.raises(ValueError, match="no token"):
            encoder.encode(END_OF_TEXT, allow_special=True)


class TestIncrementalDecoder:
    @given(st.data(), st.binary(max_size=30) | ANY_STRING.map(surrogate_bytes))
    def test_incremental_decoder_yields_whole_characters(self, data, raw):
        encoder = byte_vocabulary()
        ids = [encoder.encoder[bytes_to_unicode()[byte]] for byte in raw]
        decoder, pieces = IncrementalDecoder(encoder), []
        while ids:
            size = data.draw(st.integers(1, len(ids)))
            pieces.append(decoder.feed(ids[:size]))
            ids = ids[size:]
        pieces.append(decoder.flush())
        assert "".join(pieces) == raw.decode("utf-8", "replace")

    def test_incremental_decoder_yields_a_character_at_its_last_byte(self):
        encoder = byte_vocabulary()
        decoder = IncrementalDecoder(encoder)
        ids = encoder.encode("😀")
        assert [decoder.feed([token]) for token in ids] == ["", "", "", "😀"]
        assert [decoder.feed(ids[:2]), decoder.flush(), decoder.feed(ids), decoder.flush()] == [
            "",
            "\ufffd",
            "😀",
            "",
        ]


class TestFiles:
    def test_get_encoder_reads_files_again_only_if_they_change(self, folder):
        first = get_encoder(folder)
        assert get_encoder(str(folder)) is first
        save_vocabulary(byte_vocabulary(), folder)
        assert get_encoder(folder).n_vocab == 257

    def test_get_encoder_reads_windows_line_ends_and_no_header(self, trained, folder):
        path = folder / "vocab.bpe"
        body = path.read_text(encoding="utf-8").partition("\n")[2]
        path.write_bytes(body.replace("\n", "\r\n").encode())
        assert get_encoder(folder).bpe_merges == trained.bpe_merges

    @pytest.mark.parametrize("name", ["encoder.json", "vocab.bpe"])
    def test_missing_vocabulary_file_is_named(self, folder, name):
        (folder / name).unlink()
        with pytest.raises(FileNotFoundError, match=rf"{name} is missing.*download_gpt2"):
            get_encoder(folder)
        (folder / name).mkdir()
        with pytest.raises(FileNotFoundError, match=name):
            get_encoder(folder)

    @pytest.mark.parametrize(
        ("name", "spoil", "message"),
        [
            ("encoder.json", lambda raw: b"", "is empty"),
            ("encoder.json", lambda raw: raw[: len(raw) // 2], "is not JSON"),
            ("encoder.json", lambda raw: b"\xef\xbb\xbf" + raw, "byte order mark"),
            ("encoder.json", lambda raw: b"\xff\xfe" + raw, "not UTF-8"),
            ("encoder.json", lambda raw: b"[]", "must hold an object"),
            ("encoder.json", lambda raw: b"{}", "byte 0x00"),
            ("encoder.json", lambda raw: raw.replace(b'": 7,', b'": "7",'), "'7', not a whole"),
            ("encoder.json", lambda raw: raw.replace(b'": 7,', b'": -7,'), "-7, not a whole"),
            ("encoder.json", lambda raw: raw.replace(b'": 7,', b'": true,'), "True, not a whole"),
            ("encoder.json", lambda raw: raw.replace(b'": 7,', b'": 8,'), "id 8 stands for"),
            ("encoder.json", lambda raw: raw.replace(b'"A": ', b'"none": '), "byte 0x41"),
            ("vocab.bpe", lambda raw: b"", "is empty"),
            ("vocab.bpe", lambda raw: b"\xef\xbb\xbf" + raw, "byte order mark"),
            ("vocab.bpe", lambda raw: b"\xff\xfe" + raw, "not UTF-8"),
            ("vocab.bpe", lambda raw: raw + b"alone\n", "line 1245: 'alone' is not two tokens"),
            ("vocab.bpe", lambda raw: raw + b"a b c\n", "'a b c' is not two tokens"),
            ("vocab.bpe", lambda raw: raw + b"\n\na b\n", "'' is not two tokens"),
            ("vocab.bpe", lambda raw: raw + b"Z zebra\n", "a merge needs 'zebra'"),
        ],
    )
    def test_broken_vocabulary_file_is_named(self, folder, name, spoil, message):
        path = folder / name
        path.write_bytes(spoil(path.read_bytes()))
        with pytest.raises(ValueError, match=message) as caught:
            get_encoder(folder)
        assert str(folder) in str(caught.value)
        assert name in str(caught.value)

    def test_check_vocabulary_of_another_size_raises_value_error(self, trained, folder):
        check_vocabulary(trained, 1500, folder)
        for n_vocab in (1499, 1501):
            with pytest.raises(ValueError, match=rf"encoder\.json has 1500 .*n_vocab={n_vocab}"):
                check_vocabulary(trained, n_vocab, folder)

    def test_added_tokens_and_gaps_between_ids(self):
        tokens = {char: byte for byte, char in bytes_to_unicode().items()} | {
            "ab": 300,
            "▁あ x": 400,
        }
        encoder = Encoder(tokens, [("a", "b")])
        assert encoder.n_vocab == 401
        assert encoder.encode("ab▁あ x") == [300, *encoder.encode("▁あ x")]
        assert encoder.decode([300, 400]) == "ab▁あ x"


@needs_data
class TestPublishedVocabulary:
    @pytest.mark.parametrize(
        ("text", "ids"),
        [
            ("Hello world", [15496, 995]),
            (" the", [262]),
            ("\n\n", [628]),
            ("\n\nx", [198, 198, 87]),
            (END_OF_TEXT, [27, 91, 437, 1659, 5239, 91, 29]),
        ],
    )
    def test_gpt2_ids_of_known_texts(self, gpt2, text, ids):
        assert gpt2.encode(text) == ids

    def test_gpt2_vocabulary_size_and_end_of_text(self, gpt2):
        assert (gpt2.n_vocab, gpt2.end_of_text) == (50257, 50256)
        assert gpt2.encode(END_OF_TEXT, allow_special=True) == [50256]

    def test_every_gpt2_token_merges_to_itself(self, gpt2):
        for token, token_id in gpt2.encoder.items():
            raw = gpt2.decode_bytes([token_id])
            if token != END_OF_TEXT:
                assert gpt2._ids_of_word._merge(raw) == [token_id]

    def test_gpt2_ids_equal_tiktoken(self, gpt2):
        tiktoken = pytest.importorskip("tiktoken")
        pattern = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
        ranks = {gpt2.decode_bytes([i]): i for t, i in gpt2.encoder.items() if t != END_OF_TEXT}
        peer = tiktoken.Encoding(
            "gpt2-from-its-files",
            pat_str=pattern,
            mergeable_ranks=ranks,
            special_tokens={END_OF_TEXT: 50256},
        )
        shakespeare = (DATA / "shakespeare.txt").read_text(encoding="utf-8")
        assert len(gpt2.encode(shakespeare)) == 338_025
        for text in [shakespeare, *NASTY]:
            assert gpt2.encode(text) == peer.encode_ordinary(text)
