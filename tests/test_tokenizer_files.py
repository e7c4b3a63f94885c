"""transformers' tokenizer files: the same ids as by the tokenizers library; what is refused."""

import json
import random

import pytest
from odd_strings import odd_strings
from trained_vocabulary import DATA, needs_data, trained_vocabulary

from gpt_2_simple.data.vocabulary import byte_vocabulary, save_vocabulary
from gpt_2_simple.encoder import Encoder, get_encoder, token_of_text
from gpt_2_simple.exchange import tokenizer_files

tokenizers = pytest.importorskip("tokenizers")


def write(folder, vocabulary):
    folder.mkdir(exist_ok=True)
    for name, text in tokenizer_files.tokenizer_files(vocabulary).items():
        (folder / name).write_text(text, encoding="utf-8", newline="\n")
    return str(folder)


def edit(folder, change):
    """Changes the content of tokenizer.json."""
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    path.write_text(json.dumps(content), encoding="utf-8")
    return str(folder)


def same(one, other):
    return (one.encoder, one.bpe_merges) == (other.encoder, other.bpe_merges)


def test_the_tokenizers_library_gives_the_same_ids(tmp_path):
    vocabulary = trained_vocabulary()
    write(tmp_path, vocabulary)
    tokenizer = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for text in odd_strings(500):
        ids = vocabulary.encode(text, allow_special=True)
        assert tokenizer.encode(text).ids == ids, text
        assert tokenizer.decode(ids, skip_special_tokens=False) == vocabulary.decode(
            ids, surrogates=False
        )


def test_files_are_read_again(tmp_path):
    vocabulary = trained_vocabulary()
    found = tokenizer_files.read_tokenizer(write(tmp_path, vocabulary), vocabulary.n_vocab)
    assert same(found.encoder, vocabulary)
    assert found.notes == []


def test_vocabulary_and_merges_are_read_without_tokenizer_json(tmp_path):
    vocabulary = trained_vocabulary()
    write(tmp_path, vocabulary)
    (tmp_path / "tokenizer.json").unlink()
    found = tokenizer_files.read_tokenizer(str(tmp_path), vocabulary.n_vocab)
    assert same(found.encoder, vocabulary)


def test_merges_as_pairs_are_read(tmp_path):
    vocabulary = trained_vocabulary()
    write(tmp_path, vocabulary)

    def split(content):
        content["model"]["merges"] = [pair.split(" ") for pair in content["model"]["merges"]]

    folder = edit(tmp_path, split)
    found = tokenizer_files.read_tokenizer(folder, vocabulary.n_vocab)
    assert same(found.encoder, vocabulary)


@needs_data
def test_gpt_2s_own_files_come_back_byte_for_byte(tmp_path):
    vocabulary = get_encoder(DATA)
    folder = write(tmp_path / "hf", vocabulary)
    found = tokenizer_files.read_tokenizer(folder, vocabulary.n_vocab)
    save_vocabulary(found.encoder, tmp_path / "ours")
    for name in ("encoder.json", "vocab.bpe"):
        assert (tmp_path / "ours" / name).read_bytes() == (DATA / name).read_bytes()


def test_a_vocabulary_without_end_of_text_has_no_added_token(tmp_path):
    tokens = {t: i for t, i in byte_vocabulary().encoder.items() if t != "<|endoftext|>"}
    folder = write(tmp_path, Encoder(tokens, []))
    assert json.loads((tmp_path / "tokenizer.json").read_text())["added_tokens"] == []
    found = tokenizer_files.read_tokenizer(folder, 256)
    assert found.encoder.end_of_text is None
    assert "has no <|endoftext|>" in found.notes[0]


def test_rows_without_a_token_are_named(tmp_path):
    folder = write(tmp_path, byte_vocabulary())
    found = tokenizer_files.read_tokenizer(folder, 260)
    assert found.encoder.n_vocab == 260
    assert found.encoder.decode([65, 258]).endswith("<|unused258|>")
    assert found.notes == [
        "3 rows of the embedding have no token; they are named <|unused257|> and so on"
    ]


def test_more_tokens_than_rows_are_refused(tmp_path):
    folder = write(tmp_path, byte_vocabulary())
    with pytest.raises(ValueError, match=r"up to id 256, and the model's embedding has 256 rows"):
        tokenizer_files.read_tokenizer(folder, 256)


@pytest.mark.parametrize("place", ["tokenizer.json", "added_tokens.json"])
def test_added_tokens_are_kept_and_told(tmp_path, place):
    folder = write(tmp_path, byte_vocabulary())
    if place == "tokenizer.json":
        edit(tmp_path, lambda c: c["added_tokens"].append({"id": 257, "content": "<my pad>"}))
    else:
        (tmp_path / place).write_text('{"<my pad>": 257}')
    found = tokenizer_files.read_tokenizer(folder, 258)
    assert found.encoder.decode([65, 257]) == found.encoder.decode([65]) + "<my pad>"
    assert "takes '<my pad>' in a text for one token" in found.notes[0]


def test_a_space_before_each_text_is_told(tmp_path):
    folder = write(tmp_path, byte_vocabulary())
    (tmp_path / "tokenizer_config.json").write_text('{"add_prefix_space": true}')
    found = tokenizer_files.read_tokenizer(folder, 257)
    assert "begin prefixes with one" in found.notes[0]


CHANGES = {
    "model.type='WordPiece'": lambda c: c["model"].update(type="WordPiece"),
    "model.byte_fallback=True": lambda c: c["model"].update(byte_fallback=True),
    "model.ignore_merges=True": lambda c: c["model"].update(ignore_merges=True),
    "model.end_of_word_suffix='</w>'": lambda c: c["model"].update(end_of_word_suffix="</w>"),
    "model.continuing_subword_prefix": lambda c: c["model"].update(continuing_subword_prefix="#"),
    "normalizer=": lambda c: c.update(normalizer={"type": "NFC"}),
    "pre_tokenizer.type='Metaspace'": lambda c: c.update(pre_tokenizer={"type": "Metaspace"}),
    "pre_tokenizer.type=None": lambda c: c.update(pre_tokenizer=None),
    "pre_tokenizer.use_regex=False": lambda c: c["pre_tokenizer"].update(use_regex=False),
    "it has no 'model'": lambda c: c.pop("model"),
    "it has no 'vocab'": lambda c: c["model"].pop("vocab"),
    "'x' is no token id": lambda c: c["model"]["vocab"].update(A="x"),
    "a merge needs": lambda c: c["model"]["merges"].append("no such"),
    "byte 0x41": lambda c: c["model"]["vocab"].pop("A"),
    "not enough values": lambda c: c["model"]["merges"].append("one"),
}


@pytest.mark.parametrize("message", CHANGES)
def test_other_tokenizers_are_refused_by_their_field(tmp_path, message):
    write(tmp_path, byte_vocabulary())
    folder = edit(tmp_path, CHANGES[message])
    with pytest.raises(ValueError, match=message) as error:
        tokenizer_files.read_tokenizer(folder, 300)
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize("content", ["", "[]", "{", "null", "\ufeff{}"])
def test_a_broken_tokenizer_file_is_told(tmp_path, content):
    (tmp_path / "tokenizer.json").write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match="tokenizer.json"):
        tokenizer_files.read_tokenizer(str(tmp_path), 257)


def test_a_missing_tokenizer_is_told(tmp_path):
    write(tmp_path, byte_vocabulary())
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "merges.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"neither tokenizer.json nor vocab.json with"):
        tokenizer_files.read_tokenizer(str(tmp_path), 257)


def test_odd_strings_are_many_and_differ():
    texts = odd_strings(2000)
    assert len(texts) == 2000
    assert len(set(texts)) > 1500
    assert sum(len(text) for text in texts) > 20_000
    assert odd_strings(2000) == texts


def test_added_tokens_are_one_token_here_as_in_the_tokenizers_library(tmp_path):
    base = trained_vocabulary()
    texts = ["<a>", "<a1", "word|x", "«é»", "a"]
    ids = {token_of_text(text): base.n_vocab + i for i, text in enumerate(texts[:-1])}
    vocabulary = Encoder({**base.encoder, **ids}, base.bpe_merges)
    assert vocabulary.special_tokens.keys() == {*texts[:-1], "<|endoftext|>"}
    folder = write(tmp_path, vocabulary)
    library = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    pieces = [*texts, "<|endoftext|>", " ", "\n", "the case", "<", "é", "1", "|"]
    rng = random.Random(1)
    for _ in range(500):
        text = "".join(rng.choices(pieces, k=rng.randint(1, 12)))
        assert vocabulary.encode(text, allow_special=True) == library.encode(text).ids, text
    again = tokenizer_files.read_tokenizer(folder, vocabulary.n_vocab).encoder
    assert again.encoder == vocabulary.encoder
