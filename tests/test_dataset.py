import csv
import functools
import gzip
import io
import json
import math
import os
import random
import sys
import warnings
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt_2_simple.data import dataset, parallel_encode, tables, token_file
from gpt_2_simple.data import text_files as documents
from gpt_2_simple.data.dataset import (
    WindowSampler,
    encode_csv,
    fixed_windows,
    load_dataset,
    save_npz,
    save_tokens,
    split_dataset,
    window_length,
)

SHARED = Path(__file__).parents[1] / ".." / "shared" / "data"
GPT2_WORDS = regex.compile(
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
)
END_OF_TEXT = 512


def ids_of(text):
    """A dataset's ids of a text."""
    return ENC.encode(text, allow_special=True)


class WordEncoder:
    """Bytes, each word's first with 256 added: its ids tell where GPT-2's pattern splits."""

    n_vocab = 513
    end_of_text = END_OF_TEXT
    encoder = {str(number): number for number in range(513)}  # noqa: RUF012
    bpe_merges: list = []  # noqa: RUF012

    def encode(self, text, allow_special=False):
        pieces = text.split("<|endoftext|>") if allow_special else [text]
        ids = []
        for number, piece in enumerate(pieces):
            ids += [END_OF_TEXT] * (number > 0)
            for word in GPT2_WORDS.findall(piece):
                first, *rest = word.encode("utf-8", "surrogatepass")
                ids += [256 + first, *rest]
        return ids

    def decode_bytes(self, ids):
        return b"".join(b"<|endoftext|>" if i == END_OF_TEXT else bytes([i % 256]) for i in ids)

    def decode(self, ids):
        return self.decode_bytes(ids).decode("utf-8", "surrogatepass")


ENC = WordEncoder()


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("GPT_2_SIMPLE_CACHE", str(tmp_path / "cache"))


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def texts_of(path, **options):
    return [ENC.decode(chunk) for chunk in load_dataset(ENC, path, **options)]


# What gpt-2-simple 0.8.1 makes of the same files.


def test_a_short_file_ends_with_the_end_token(tmp_path):
    path = write(tmp_path / "a.txt", "Some text.\r\nMore.")
    assert texts_of(path) == ["Some text.\nMore.<|endoftext|>"]
    assert load_dataset(ENC, path)[0].tolist() == ids_of("Some text.\nMore.<|endoftext|>")


def test_a_long_file_alone_ends_with_its_own_text(tmp_path):
    path = write(tmp_path / "a.txt", "word " * 10)
    assert texts_of(path, combine=50) == ["word " * 10]
    assert texts_of(path, combine=51) == ["word " * 10 + "<|endoftext|>"]


def test_files_are_joined_until_a_chunk_is_long_enough(tmp_path):
    for name, text in (("a", "aaaa"), ("b", "bb"), ("c", "c" * 9), ("d", "d")):
        write(tmp_path / f"{name}.txt", text)
    # 4 + 13 characters of end token + 2 make 19: the separator counts.
    assert texts_of(tmp_path, combine=19) == [
        "aaaa<|endoftext|>bb<|endoftext|>",
        "ccccccccc<|endoftext|>d<|endoftext|>",
    ]


def test_words_that_meet_across_a_join_are_encoded_together(tmp_path):
    write(tmp_path / "a.txt", "one ")
    write(tmp_path / "b.txt", "!two")
    whole = "one <|endoftext|>!two<|endoftext|>"
    assert load_dataset(ENC, tmp_path)[0].tolist() == ids_of(whole)


def test_the_choice_of_a_first_column_is_said(tmp_path, capsys):
    path = write(tmp_path / "a.csv", "id,text\n1,one\n2,two\n")
    said = f"{path}: its first column is used, of 2; column= names another\n"
    load_dataset(ENC, path)
    assert said in capsys.readouterr().out
    load_dataset(ENC, path, column="text")
    load_dataset(ENC, write(tmp_path / "b.csv", "text\none\n"))
    assert "first column" not in capsys.readouterr().out


def test_a_quote_that_is_left_open_is_noticed(tmp_path):
    path = write(tmp_path / "a.csv", 'text\na pipe\n"two\nlines"\n"open\nthree\nfour\n')
    with pytest.warns(UserWarning, match="a quote is left open: lines 5 to 7 were read as one"):
        load_dataset(ENC, path)
    load_dataset(ENC, write(tmp_path / "b.csv", 'text\n6" pipe\nthe end\n'))  # no warning


def test_csv_rows_are_wrapped_and_joined(tmp_path):
    path = write(tmp_path / "a.csv", 'text\nfirst\n"sec, ond",x\n"two\nlines"\n')
    with pytest.warns(UserWarning, match="1 rows have more columns"):
        found = texts_of(path)
    assert found == [
        "<|startoftext|>first<|endoftext|>\n"
        "<|startoftext|>sec, ond<|endoftext|>\n"
        "<|startoftext|>two\nlines<|endoftext|>\n"
    ]


def test_rows_before_a_text_file_count_toward_its_chunk(tmp_path):
    write(tmp_path / "a.csv", "text\nrow\n")
    write(tmp_path / "b.txt", "text")
    write(tmp_path / "c.txt", "more")
    row = "<|startoftext|>row<|endoftext|>\n"
    assert texts_of(tmp_path, combine=len(row) + 4) == [
        row + "text<|endoftext|>",
        "more<|endoftext|>",
    ]


@pytest.mark.skipif(not SHARED.exists(), reason="needs GPT-2's vocabulary and tiny Shakespeare")
def test_shakespeare_has_338025_tokens():
    from gpt_2_simple.encoder import get_encoder

    (chunk,) = load_dataset(get_encoder(str(SHARED)), SHARED / "shakespeare.txt")
    assert len(chunk) == 338025
    assert chunk[:8].tolist() == [5962, 22307, 25, 198, 8421, 356, 5120, 597]


def test_end_tokens_are_one_id_where_there_is_such(tmp_path):
    path = write(tmp_path / "a.txt", "x")
    characters = ENC.encode("x<|endoftext|>")
    assert len(characters) == 14
    assert load_dataset(ENC, path)[0].tolist() == [256 + ord("x"), END_OF_TEXT]
    assert load_dataset(ENC, path, allow_special=False)[0].tolist() == characters

    class Without(WordEncoder):
        end_of_text = None

    assert load_dataset(Without(), path)[0].tolist() == characters


# Finding files.


def test_a_folder_is_searched_in_order_without_hidden_files(tmp_path):
    for name in ("b.txt", "a/z.txt", "a.txt", ".hidden", ".git/config", "a/.x"):
        write(tmp_path / name, "x")
    found = [os.path.relpath(file.path, tmp_path) for file in documents.find_files(tmp_path)]
    assert found == ["a.txt", "b.txt", os.path.join("a", "z.txt")]


def test_globs_and_lists(tmp_path):
    b, a = write(tmp_path / "b.txt", "b"), write(tmp_path / "a.txt", "a")
    write(tmp_path / "sub" / "c.txt", "c")
    names = [Path(file.path).name for file in documents.find_files(str(tmp_path / "*.txt"))]
    assert names == ["a.txt", "b.txt"]
    names = [Path(file.path).name for file in documents.find_files(str(tmp_path / "**" / "*.txt"))]
    assert sorted(names) == ["a.txt", "b.txt", "c.txt"]
    names = [Path(file.path).name for file in documents.find_files(str(tmp_path / "**"))]
    assert names == ["a.txt", "b.txt", "c.txt"]
    os.symlink(tmp_path / "nothing", tmp_path / "broken.txt")
    assert len(documents.find_files(str(tmp_path / "*.txt"))) == 2
    assert [file.path for file in documents.find_files([b, Path(a)])] == [b, a]


def test_a_glob_leaves_out_what_is_no_text_as_a_folder_does(tmp_path):
    write(tmp_path / "a.txt", "a")
    (tmp_path / "b.png").write_bytes(b"\x89PNG\0\0")
    with pytest.warns(UserWarning, match=r"b\.png' is not UTF-8 text and was left out"):
        assert texts_of(str(tmp_path / "*"), combine=1) == ["a<|endoftext|>"]


def test_a_file_whose_name_looks_like_a_pattern(tmp_path):
    assert texts_of(write(tmp_path / "a[1].txt", "x"), combine=1) == ["x"]


def test_a_missing_path_says_what_was_looked_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "shakespeare.txt", "x")
    with pytest.raises(FileNotFoundError, match="Did you mean 'shakespeare.txt'") as error:
        load_dataset(ENC, "shakespear.txt")
    assert str(tmp_path) in str(error.value)
    with pytest.raises(FileNotFoundError, match="no folder 'nowhere'"):
        load_dataset(ENC, "nowhere/a.txt")


def test_nothing_to_read(tmp_path):
    (tmp_path / "in").mkdir()
    with pytest.raises(ValueError, match="holds no file"):
        load_dataset(ENC, tmp_path / "in")
    with pytest.raises(ValueError, match="list of datasets is empty"):
        load_dataset(ENC, [])
    with pytest.raises(ValueError, match="is empty"):
        load_dataset(ENC, write(tmp_path / "in" / "a.txt", ""))
    with pytest.raises(ValueError, match="is empty"):
        load_dataset(ENC, write(tmp_path / "in" / "b.csv", ""))
    with pytest.raises(ValueError, match="combine=0"):
        load_dataset(ENC, write(tmp_path / "in" / "c.txt", "x"), combine=0)


def test_empty_files_add_nothing(tmp_path):
    for name, text in (("a", "a"), ("b", ""), ("c", "c")):
        write(tmp_path / f"{name}.txt", text)
    assert texts_of(tmp_path) == ["a<|endoftext|>c<|endoftext|>"]


# What files hold.


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("picture.png", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"),
        ("essay.docx", b"PK\x03\x04\x14\x00\x06\x00" + bytes(range(256)) * 4),
        ("noise.txt", random.Random(0).randbytes(1000)),
        ("cyrillic.txt", "Привет, мир. Как дела?".encode("cp1251")),
        ("unmarked.txt", "plain".encode("utf-16-le")),
        ("table.csv", b"a\0b\n1\n"),
    ],
)
def test_a_binary_file_is_named(tmp_path, name, content):
    with pytest.raises(ValueError, match="is not UTF-8 text") as error:
        load_dataset(ENC, write(tmp_path / name, content))
    assert name in str(error.value)
    assert ".jsonl" in str(error.value)


def test_a_binary_file_in_a_folder_is_left_out_with_a_warning(tmp_path):
    write(tmp_path / "in" / "cover.png", b"\x89PNG\0\0")
    write(tmp_path / "in" / "a.txt", "x")
    with pytest.warns(UserWarning, match="cover.png' is not UTF-8 text and was left out"):
        assert texts_of(tmp_path / "in") == ["x<|endoftext|>"]


def test_undecodable_bytes_are_counted(tmp_path):
    path = write(tmp_path / "a.txt", b"caf\xe9, 5\xa0\xa3 and much more text\xe2\x82")
    with pytest.warns(UserWarning, match="a.txt': 5 bytes are not UTF-8 and were left out"):
        assert texts_of(path) == ["caf, 5 and much more text<|endoftext|>"]


def test_undecodable_bytes_beyond_the_first_part_are_counted(tmp_path):
    path = write(tmp_path / "a.txt", b"good text\n" * 200_000 + b"\xff\xfe")
    with pytest.warns(UserWarning, match="2 bytes"):
        (text,) = texts_of(path)
    assert text == "good text\n" * 200_000


def test_a_file_of_many_warnings_says_how_many(tmp_path):
    for number in range(12):
        write(tmp_path / f"{number:02}.txt", b"some text \xff")
    with pytest.warns(UserWarning, match="not UTF-8|more warnings") as caught:
        load_dataset(ENC, tmp_path)
    assert len(caught) == 11
    assert "2 more" in str(caught[-1].message)


@pytest.mark.parametrize(
    ("encoded", "encoding"),
    [
        ("naïve €\n".encode(), None),
        (b"\xef\xbb\xbf" + "naïve €\n".encode(), None),
        ("naïve €\n".encode("utf-16"), None),
        (b"\xfe\xff" + "naïve €\n".encode("utf-16-be"), None),
        ("naïve €\n".encode("utf-32"), None),
        ("naïve €\n".encode("cp1252"), "cp1252"),
        ("naïve €\n".encode("utf-16-le"), "utf-16-le"),
        (b"\xef\xbb\xbf" + "naïve €\n".encode(), "utf8"),
    ],
)
def test_encodings(tmp_path, encoded, encoding):
    path = write(tmp_path / "a.txt", encoded)
    assert texts_of(path, encoding=encoding) == ["naïve €\n<|endoftext|>"]


def test_an_unknown_encoding(tmp_path):
    with pytest.raises(ValueError, match="encoding='klingon'"):
        load_dataset(ENC, write(tmp_path / "a.txt", "x"), encoding="klingon")


@pytest.mark.parametrize("name", ["a.txt", "a.csv", "a.tsv", "a.jsonl"])
def test_gzip_of_any(tmp_path, name):
    plain = b'{"text": "x"}\n' if name.endswith("jsonl") else b"text\nx\n"
    expected = texts_of(write(tmp_path / name, plain))
    assert texts_of(write(tmp_path / f"{name}.gz", gzip.compress(plain))) == expected
    assert "x" in expected[0]


def test_a_cut_gzip_file(tmp_path):
    cut = gzip.compress(random.Random(1).randbytes(200_000).hex().encode())[:100_000]
    with pytest.raises(ValueError, match="a.txt.gz' is not a whole gzip file"):
        load_dataset(ENC, write(tmp_path / "a.txt.gz", cut))
    with pytest.raises(ValueError, match="b.txt.gz' is not a whole gzip file"):
        load_dataset(ENC, write(tmp_path / "b.txt.gz", b"plain text"))


# Tables.

JOKES = 'ID,Joke,Stars\n1,"He said ""no"", then left",3\n2,"Two\nlines",4\n'


def rows_of(path, **options):
    return [ENC.decode(chunk) for chunk in load_dataset(ENC, path, pad_documents=True, **options)]


def wrapped(*texts):
    return [f"<|startoftext|>{text}<|endoftext|>\n" for text in texts]


@pytest.mark.parametrize("column", ["Joke", 1, "1"])
def test_a_column_by_name_and_by_number(tmp_path, column):
    path = write(tmp_path / "a.csv", JOKES)
    assert rows_of(path, column=column) == wrapped('He said "no", then left', "Two\nlines")


def test_columns_through_a_template(tmp_path):
    path = write(tmp_path / "a.csv", JOKES)
    rows = rows_of(path, template="{Joke} ({2} stars)")
    assert rows == wrapped('He said "no", then left (3 stars)', "Two\nlines (4 stars)")


def test_a_missing_column_lists_those_there_are(tmp_path):
    path = write(tmp_path / "a.csv", JOKES)
    for options in ({"column": "joke"}, {"column": 3}, {"column": -1}, {"template": "{joke}"}):
        with pytest.raises(ValueError, match="no column .*columns are 'ID', 'Joke', 'Stars'"):
            load_dataset(ENC, path, **options)
    path = write(tmp_path / "a.jsonl", '{"a": "x", "b": "y"}\n')
    with pytest.raises(ValueError, match="no column 'text': its columns are 'a', 'b'"):
        load_dataset(ENC, path, column="text")
    with pytest.raises(ValueError, match="exclude each other"):
        load_dataset(ENC, path, column="a", template="{b}")
    with pytest.raises(ValueError, match="names no column"):
        load_dataset(ENC, path, template="text")


def test_tsv(tmp_path):
    path = write(tmp_path / "a.tsv", 'id\ttext\n1\ta, b\n2\t"tab\tinside"\n'.encode("utf-16"))
    assert rows_of(path, column="text") == wrapped("a, b", "tab\tinside")


def test_blank_rows_are_skipped_and_counted(tmp_path, capsys):
    path = write(tmp_path / "a.csv", 'id,text\n1,a\n\n2,\n3," "\n4\n5,b\n\n')
    assert rows_of(path, column="text") == wrapped("a", "b")
    assert "5 blank rows skipped" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("first", "is_header"),
    [
        ("text", True),
        ("Joke,ID", True),
        ("Why did the chicken cross the road?", False),
        ("A sentence of many more words than a name", False),
        ("12,34", False),
        ("a,", False),
        ("same,same", False),
    ],
)
def test_a_header_is_detected(tmp_path, capsys, first, is_header):
    path = write(tmp_path / "a.csv", f"{first}\nrow,1\n")
    expected = ["row"] if is_header else [first.split(",")[0], "row"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        assert rows_of(path) == wrapped(*expected)
        assert rows_of(path, header=True) == wrapped("row")
        assert rows_of(path, header=False) == wrapped(first.split(",")[0], "row")
    assert ("reads like data" in capsys.readouterr().out) != is_header


def test_a_column_named_like_a_sentence(tmp_path):
    path = write(tmp_path / "a.csv", "id,Is it funny?\n1,yes\n")
    assert rows_of(path, column="Is it funny?") == wrapped("yes")


def test_fields_longer_than_csv_allows_by_default(tmp_path):
    csv.field_size_limit(131072)
    long = "word " * 50_000 + "end"
    assert rows_of(write(tmp_path / "a.csv", f"text\n{long}\n")) == wrapped(long)
    assert csv.field_size_limit() == 131072


def test_an_open_quote_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "LONGEST_FIELD", 1000)
    path = write(tmp_path / "a.csv", 'text\n"open\n' + "row\n" * 1000)
    with pytest.raises(ValueError, match="a.csv', line .*quote left open"):
        load_dataset(ENC, path)


def test_json_lines(tmp_path):
    lines = [{"id": 1, "text": "a\nb"}, {"text": None}, {"id": 2, "text": "c", "n": 2.5}]
    content = "\n\n".join(json.dumps(line) for line in lines)
    path = write(tmp_path / "a.jsonl", content)
    assert rows_of(path) == wrapped("a\nb", "c")
    assert rows_of(path, template="{id}{n}") == wrapped("1", "22.5")
    other = write(tmp_path / "b.jsonl", '{"n": 1, "body": "x"}')
    assert rows_of(other) == rows_of(other, column=1) == wrapped("x")


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "line 2: not JSON"),
        ("[1]", "line 2: list, where an object"),
        ('{"text": ["x"]}', "line 2: column 'text' holds a list"),
    ],
)
def test_malformed_json_lines(tmp_path, line, reason):
    path = write(tmp_path / "a.jsonl", '{"text": "x"}\n' + line)
    with pytest.raises(ValueError, match=reason):
        load_dataset(ENC, path)


# encode_csv.


def test_encode_csv_writes_what_it_always_did(tmp_path):
    path = write(tmp_path / "a.csv", 'text,n\r\na,1\r\n"b, ""c""",2\r\n"d\r\ne",3\r\nü,4\r\n')
    out = tmp_path / "out.txt"
    assert encode_csv(path, out) == 4
    assert out.read_bytes() == "".join(wrapped("a", 'b, "c"', "d\ne", "ü")).encode()
    assert encode_csv(path, str(out), False, "[", "]") == 5
    assert out.read_bytes() == '[text]\n[a]\n[b, "c"]\n[d\ne]\n[ü]\n'.encode()


def test_encode_csv_options(tmp_path, capsys):
    path = write(tmp_path / "a.data", b"\xef\xbb\xbfid,text\n1,caf\xe9\n\n2,b\n")
    out = tmp_path / "out.txt"
    with pytest.warns(UserWarning, match="1 bytes are not UTF-8"):
        encode_csv(path, out, column="id")
    assert out.read_text() == "".join(wrapped("1", "2"))
    assert "1 blank rows skipped" in capsys.readouterr().out
    path = write(tmp_path / "b.csv", "id,text\n1,café\n".encode("latin-1"))
    encode_csv(path, out, template="{id}: {text}", encoding="latin-1")
    assert out.read_text(encoding="utf-8") == "".join(wrapped("1: café"))


def test_encode_csv_leaves_nothing_half_written(tmp_path):
    path = write(tmp_path / "a.csv", "id,text\n1,x\n")
    out = write(tmp_path / "out.txt", "before")
    with pytest.raises(ValueError, match="no column 'joke'"):
        encode_csv(path, out, column="joke")
    with pytest.raises(FileNotFoundError, match="nothing.csv"):
        encode_csv(tmp_path / "nothing.csv", out)
    assert Path(out).read_text() == "before"
    assert sorted(os.listdir(tmp_path)) == ["a.csv", "out.txt"]


# .npz and .tokens.


def test_npz_round_trip(tmp_path):
    chunks = [np.arange(5), np.array([7], np.uint16)]
    save_npz(tmp_path / "a", chunks)
    with np.load(tmp_path / "a.npz") as npz:
        assert npz.files == ["arr_0", "arr_1"]
    loaded = load_dataset(ENC, tmp_path / "a.npz")
    assert [chunk.tolist() for chunk in loaded] == [[0, 1, 2, 3, 4], [7]]


@pytest.mark.parametrize(
    "array",
    [
        np.array([513]),
        np.array([-1, 3]),
        np.array([0.5]),
        np.zeros((2, 2), int),
        np.array(["text"]),
        np.array([{}], dtype=object),
    ],
)
def test_an_npz_of_another_kind(tmp_path, array):
    np.savez(tmp_path / "a.npz", array)
    with pytest.raises(ValueError, match="a.npz' is not a dataset that encode_dataset wrote"):
        load_dataset(ENC, tmp_path / "a.npz")


def npy():
    with io.BytesIO() as file:
        np.save(file, np.arange(3))
        return file.getvalue()


@pytest.mark.parametrize("content", [b"", b"text", b"PK\x03\x04broken", npy()])
def test_an_npz_that_is_none(tmp_path, content):
    with pytest.raises(ValueError, match="a.npz' is not a dataset .*encode_dataset") as error:
        load_dataset(ENC, write(tmp_path / "a.npz", content))
    assert "pickle" not in str(error.value)


def test_another_archive_named_npz(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("word/document.xml", "<text/>")
    with pytest.raises(ValueError, match="array 'word/document.xml' is .*not a row of token ids"):
        load_dataset(ENC, tmp_path / "a.npz")


def test_npz_beside_text(tmp_path):
    save_npz(tmp_path / "a.npz", [np.array([104, 105])])
    write(tmp_path / "b.txt", "x")
    assert texts_of(tmp_path) == ["hi", "x<|endoftext|>"]


def test_token_file_round_trip(tmp_path, monkeypatch):
    monkeypatch.setattr(dataset, "SAVED_TOKENS", 3)
    chunks = [np.arange(7), np.arange(3), np.array([257])]
    path = tmp_path / "a.tokens"
    save_tokens(path, chunks, ENC)
    loaded = load_dataset(ENC, path)
    assert [chunk.tolist() for chunk in loaded] == [chunk.tolist() for chunk in chunks]
    assert isinstance(loaded[0], np.memmap)
    assert loaded[-1].tolist() == [257]
    assert [len(chunk) for chunk in loaded[:2]] == [7, 3]
    with pytest.raises(IndexError):
        loaded[3]


def test_a_token_file_that_is_not_ours(tmp_path):
    path = tmp_path / "a.tokens"
    save_tokens(path, [np.arange(100)], ENC)
    whole = path.read_bytes()
    long_footer = whole[:-16] + b"\xff" * 8 + whole[-8:]
    shortened = whole[:8] + whole[10:]
    for content in (whole[:-1], whole[:50], b"", b"text" * 100, long_footer, shortened):
        with pytest.raises(ValueError, match="a.tokens' is not a whole token file"):
            load_dataset(ENC, write(path, content))

    class Another(WordEncoder):
        encoder = {"a": 0}  # noqa: RUF012

    write(path, whole)
    with pytest.raises(ValueError, match="another vocabulary"):
        load_dataset(Another(), path)


# Drawing windows.


def test_random_windows_are_fair_and_stay_within_chunks():
    chunks = [np.arange(10), np.arange(100, 103), np.arange(200, 204)]
    sampler = WindowSampler(chunks, seed=1)
    assert sampler.total_size == 17
    drawn = Counter(tuple(sampler.sample(3).tolist()) for _ in range(11_000))
    possible = {tuple(c[i : i + 3].tolist()) for c in chunks for i in range(len(c) - 2)}
    assert set(drawn) == possible  # all 11: the first, the last, and a chunk of just this length
    assert min(drawn.values()) > 850
    assert max(drawn.values()) < 1150


def test_tokens_that_random_windows_never_reach_are_told(capsys):
    sampler = WindowSampler([np.arange(30), np.arange(4), np.arange(5)], seed=0)
    sampler.sample_batch(3, 5)
    sampler.sample_batch(3, 5)
    assert capsys.readouterr().out.count("4 of the 39 tokens") == 1


def test_a_window_as_long_as_the_data():
    assert WindowSampler([np.arange(4)], seed=0).sample(4).tolist() == [0, 1, 2, 3]


def test_batches_are_int32_and_the_same_as_single_windows():
    chunks = [np.arange(1000, dtype=np.uint16)]
    batch = WindowSampler(chunks, seed=3).sample_batch(4, 10)
    assert batch.dtype == np.int32
    assert batch.shape == (4, 10)
    singles = WindowSampler(chunks, seed=3)
    assert [singles.sample(10).tolist() for _ in range(4)] == batch.tolist()


def test_the_global_seed_is_left_alone():
    np.random.seed(5)
    before = np.random.get_state()[1].tolist()
    WindowSampler([np.arange(100)]).sample_batch(2, 10)
    assert np.random.get_state()[1].tolist() == before


@pytest.mark.parametrize("sampling", ["random", "epoch"])
@pytest.mark.parametrize("pad_documents", [False, True])
def test_a_restored_sampler_draws_the_same_windows(sampling, pad_documents):
    chunks = [np.arange(30), np.arange(50, 57), np.arange(100, 180)]
    options = {"sampling": sampling, "pad_documents": pad_documents}
    sampler = WindowSampler(chunks, seed=7, **options)
    sampler.sample_batch(5, 6)
    state = json.loads(json.dumps(sampler.state()))
    expected = [sampler.sample_batch(3, 6).tolist() for _ in range(20)]
    resumed = WindowSampler(chunks, seed=8, **options)
    resumed.restore(state)
    assert [resumed.sample_batch(3, 6).tolist() for _ in range(20)] == expected
    assert resumed.times_seen == sampler.times_seen
    assert resumed.state() == sampler.state()


def test_a_state_taken_before_any_draw():
    sampler = WindowSampler([np.arange(30)], seed=7, sampling="epoch")
    resumed = WindowSampler([np.arange(30)], seed=8, sampling="epoch")
    resumed.restore(sampler.state())
    assert sampler.times_seen == 0
    assert sampler.sample_batch(9, 6).tolist() == resumed.sample_batch(9, 6).tolist()


def test_a_state_of_other_data_begins_a_new_epoch(capsys):
    sampler = WindowSampler([np.arange(30)], seed=7, sampling="epoch")
    sampler.sample(5)
    resumed = WindowSampler([np.arange(40)], seed=8, sampling="epoch")
    resumed.restore(sampler.state())
    assert "a new epoch" in capsys.readouterr().out
    assert resumed.sample(5).shape == (5,)
    with pytest.raises(ValueError, match="not the state of a WindowSampler"):
        resumed.restore({"step": 3})


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=8),
    length=st.integers(2, 12),
    batch_size=st.integers(1, 3),
    pad_documents=st.booleans(),
)
def test_an_epoch_predicts_every_token_once(lengths, length, batch_size, pad_documents):
    tokens = np.arange(sum(lengths))
    chunks = np.split(tokens, np.cumsum(lengths)[:-1])
    firsts = {int(chunk[0]) for chunk in chunks if len(chunk)} if pad_documents else {0}
    expected = Counter(set(tokens.tolist()) - firsts)
    fits = bool(expected) if pad_documents else len(tokens) >= length
    if not fits:
        return
    sampler = WindowSampler(chunks, 0, "epoch", pad_documents, pad_id=-1)
    predicted: Counter = Counter()
    visited = set()
    while sampler.times_seen < 1:
        batch = sampler.sample_weighted(1, length)
        predicted.update(batch.tokens[batch.weights == 1].tolist())
        visited.update(batch.tokens[batch.tokens >= 0].tolist())
        assert batch.weights[0, 0] == 0
        real = batch.tokens[0][batch.tokens[0] >= 0]
        assert (np.diff(real) == 1).all()
        if pad_documents:
            assert any(set(real.tolist()) <= set(chunk.tolist()) for chunk in chunks)
    assert predicted == expected
    assert sampler.times_seen == 1
    skipped = {int(chunk[0]) for chunk in chunks if len(chunk) == 1} if pad_documents else set()
    assert visited == set(tokens.tolist()) - skipped
    sampler.sample_batch(batch_size, length)
    assert sampler.times_seen > 1


def test_epochs_come_in_different_orders():
    sampler = WindowSampler([np.arange(201)], seed=0, sampling="epoch")
    first = sampler.sample_batch(20, 11)[:, 0].tolist()
    second = sampler.sample_batch(20, 11)[:, 0].tolist()
    assert sorted(first) == sorted(second) == list(range(0, 200, 10))
    assert first != second


def test_sampling_what_cannot_be_sampled():
    with pytest.raises(ValueError, match="sampling='shuffle'"):
        WindowSampler([np.arange(3)], sampling="shuffle")
    with pytest.raises(ValueError, match="no tokens"):
        WindowSampler([])
    with pytest.raises(ValueError, match="4 tokens in a row, the longest has 3"):
        WindowSampler([np.arange(3), np.arange(2)]).sample(4)
    with pytest.raises(ValueError, match="3 tokens, fewer than a window of 4"):
        WindowSampler([np.arange(3)], sampling="epoch").sample(4)
    with pytest.raises(ValueError, match="no document of the dataset has 2 tokens"):
        WindowSampler([np.arange(1)], pad_documents=True).sample(4)
    with pytest.raises(ValueError, match="length=1"):
        WindowSampler([np.arange(3)]).sample(1)


def test_window_length():
    chunks = [np.arange(10), np.arange(30)]
    assert window_length(chunks, 1024) == 30
    assert window_length(chunks, 20) == 20
    assert window_length(chunks, 1024, "epoch") == 40
    with pytest.raises(ValueError, match="1 tokens in 1 chunks.*at least 2"):
        window_length([np.arange(1)], 1024)
    with pytest.raises(ValueError, match="0 tokens in 0 chunks"):
        window_length([], 1024)


def test_split_dataset():
    chunks = [np.arange(10), np.arange(10, 30), np.arange(30, 40)]
    train, val = split_dataset(chunks, 0.3)
    assert [chunk.tolist() for chunk in train] == [list(range(10)), list(range(10, 28))]
    assert [chunk.tolist() for chunk in val] == [[28, 29], list(range(30, 40))]
    for share in (0, 1, -0.1, 1.5, math.nan):
        with pytest.raises(ValueError, match="val_split="):
            split_dataset(chunks, share)
    with pytest.raises(ValueError, match="leaves 39 to train on and 1 to validate"):
        split_dataset(chunks, 0.01)


@pytest.mark.parametrize(("share", "held_out"), [(0.3, [10]), (0.01, [10]), (0.6, [20, 10])])
def test_split_dataset_between_documents(share, held_out):
    chunks = [np.arange(10), np.arange(20), np.arange(10)]
    train, val = split_dataset(chunks, share, whole_chunks=True)
    assert [len(chunk) for chunk in val] == held_out
    assert [len(chunk) for chunk in train + val] == [10, 20, 10]


def test_a_single_document_is_cut():
    train, val = split_dataset([np.arange(10)], 0.3, whole_chunks=True)
    assert (len(train[0]), len(val[0])) == (7, 3)


def test_fixed_windows():
    chunks = [np.arange(10), np.arange(10, 50)]
    windows, weights = fixed_windows(chunks, 8, 3)
    assert windows.dtype == np.int32
    assert windows[:, 0].tolist() == [0, 21, 42]
    assert weights.tolist() == [[0] + [1] * 7] * 3
    everything, _ = fixed_windows(chunks, 8, 100)
    assert everything.shape == (7, 8)
    assert (np.diff(everything[:, 0]) >= 7).all()
    assert fixed_windows(chunks, 50, 3).tokens.tolist() == [list(range(50))]
    with pytest.raises(ValueError, match="50 tokens"):
        fixed_windows(chunks, 51, 3)


def test_fixed_windows_within_documents():
    chunks = [np.arange(10, 13), np.arange(20, 30), np.arange(40, 41)]
    windows, weights = fixed_windows(chunks, 8, 5, pad_documents=True)
    assert windows.tolist() == [
        [10, 11, 12, 0, 0, 0, 0, 0], [*range(20, 28)], [27, 28, 29, 0, 0, 0, 0, 0],
    ]  # fmt: skip
    assert weights.tolist() == [[0, 1, 1] + [0] * 5, [0] + [1] * 7, [0, 1, 1] + [0] * 5]
    assert fixed_windows(chunks, 8, 2, pad_documents=True).tokens[:, 0].tolist() == [10, 27]
    with pytest.raises(ValueError, match="no document of the dataset has 2 tokens"):
        fixed_windows([np.arange(1), np.arange(1)], 2, 5, pad_documents=True)


# Text of any length.

CUT_TEXT = st.text(
    alphabet=st.one_of(
        st.sampled_from(" \n\t\r\x0b\x1c\x1f\x85\xa0\u2028\u3000'sdtmlrev.,!<|>_09aZ"),
        st.sampled_from("éß漢字あア한글Жяก²Ⅷ٣\u0301\u200d😀\ua7ce\U000323b0\ud800"),
        st.characters(),
    ),
    max_size=40,
)


@settings(max_examples=1500, deadline=None)
@given(CUT_TEXT)
def test_text_may_be_split_where_split_safely_says(text):
    before, after = parallel_encode.split_safely(text)
    assert before + after == text
    assert ENC.encode(before) + ENC.encode(after) == ENC.encode(text)


@settings(max_examples=1500, deadline=None)
@given(CUT_TEXT)
def test_words_encoded_alone_are_the_text_encoded(text):
    words = parallel_encode.split_words(text)
    assert "".join(words) == text
    assert [i for word in words for i in ENC.encode(word)] == ENC.encode(text)


@functools.cache
def packer_of_gpt2(allow_special):
    from gpt_2_simple.encoder import get_encoder

    return parallel_encode.Packer(get_encoder(str(SHARED)), np.uint16, allow_special, most=500)


@pytest.mark.skipif(not SHARED.exists(), reason="needs GPT-2's vocabulary")
@settings(max_examples=400, deadline=None)
@given(st.lists(CUT_TEXT, max_size=4), st.booleans())
def test_a_packer_gives_the_encoder_s_ids(texts, allow_special):
    from gpt_2_simple.encoder import get_encoder

    enc, packer = get_encoder(str(SHARED)), packer_of_gpt2(allow_special)
    texts = [text.replace("|", "<|endoftext|>") for text in texts]
    ids, counts = packer.pack(texts)
    expected = [enc.encode(text, allow_special=allow_special) for text in texts]
    assert counts == [len(one) for one in expected]
    assert np.frombuffer(ids, np.uint16).tolist() == sum(expected, [])
    for text in texts:
        before, after = parallel_encode.split_safely(text)
        assert enc.encode(before) + enc.encode(after) == enc.encode(text)


def test_every_white_space_is_known():
    characters = "".join(map(chr, range(sys.maxunicode + 1)))
    for character in regex.findall(r"\s", characters):
        assert parallel_encode.split_words(f"a{character}") == ["a", character]
    others = regex.sub(r"\s", "", characters)
    assert parallel_encode.split_words(others) == [others]


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(CUT_TEXT, st.booleans()), max_size=12), st.integers(1, 60))
def test_blocks_hold_the_same_chunks(parts, size):
    expected, text = [], ""
    for part, ends in [*parts, ("", True)]:
        text += part
        if ends:
            expected.append(text)
            text = ""
    blocks = list(parallel_encode.cut_into_blocks(iter(parts), size))
    packer = parallel_encode.Packer(ENC, np.uint16)
    packed = (parallel_encode.PackedBlock(*packer.pack(b.texts), b.ends) for b in blocks)
    chunks = token_file.gather_tokens(packed, np.dtype(np.uint16))
    assert [chunk.tolist() for chunk in chunks] == [ENC.encode(text) for text in expected if text]


def test_text_without_any_white_space_is_cut_too():
    blocks = list(parallel_encode.cut_into_blocks([("漢字，" * 100, False)] * 10, 200))
    assert len(blocks) == 11
    assert max(len(text) for block in blocks for text in block.texts) < 310


def test_the_words_that_are_kept_are_bounded():
    packer = parallel_encode.Packer(ENC, np.uint16, most=30)
    for start in range(0, 1000, 10):
        text = " ".join(map(str, range(start, start + 10)))
        ids, (count,) = packer.pack([text])
        assert np.frombuffer(ids, np.uint16).tolist() == ENC.encode(text)
        assert count == len(ENC.encode(text))
        assert len(packer.packed) <= 30


def test_a_large_vocabulary_takes_four_bytes():
    assert token_file.id_dtype(65536) == np.uint16
    assert token_file.id_dtype(65537) == np.uint32


@pytest.fixture
def large(monkeypatch):
    """Makes 20 kB of text a lot, in blocks of 2 kB."""
    monkeypatch.setattr(dataset, "LARGE_BYTES", 20_000)
    monkeypatch.setattr(parallel_encode.cut_into_blocks, "__defaults__", (2000,))


def some_text(characters, seed=0):
    draw = random.Random(seed)
    words = ["the", "of", " and", "naïve", "x,\n", "\n\n", "  12", "don't", "漢字", "<|endoftext|>"]
    text = ""
    while len(text) < characters:
        text += draw.choice(words) + draw.choice(["", " "])
    return text


@pytest.mark.parametrize("processes", [1, 2])
def test_large_text_is_encoded_into_a_file_with_the_same_ids(tmp_path, large, processes, capsys):
    text = some_text(60_000)
    path = write(tmp_path / "a.txt", text)
    (chunk,) = load_dataset(ENC, path, processes=processes)
    assert isinstance(chunk, np.memmap)
    assert chunk.tolist() == ids_of(text)
    (kept,) = (tmp_path / "cache").iterdir()
    assert f"tokens are kept in {kept}" in capsys.readouterr().out
    windows = WindowSampler(load_dataset(ENC, path), seed=1).sample_batch(3, 50)
    assert (
        windows.tolist()
        == WindowSampler([np.array(ids_of(text))], seed=1).sample_batch(3, 50).tolist()
    )


def test_the_cache_is_found_again_and_only_for_the_same(tmp_path, large, monkeypatch):
    path = write(tmp_path / "a.txt", some_text(30_000) + "\n")
    cache = tmp_path / "cache"

    def loaded(enc=ENC, **options):
        load_dataset(enc, path, processes=1, **options)
        return len(list(cache.iterdir()))

    assert loaded() == 1
    with monkeypatch.context() as patch:
        patch.setattr(dataset, "pack_blocks", None)  # to encode again would fail
        assert loaded() == 1
        os.rename(path, tmp_path / "b.txt")
        path = str(tmp_path / "b.txt")
        assert loaded() == 1
    (kept,) = cache.iterdir()
    kept.write_bytes(kept.read_bytes()[:-9])  # damaged: it is made again
    assert loaded() == 1
    assert loaded(combine=100_000) == 2
    assert loaded(allow_special=False) == 3
    assert loaded(pad_documents=True) == 4

    class Another(WordEncoder):
        bpe_merges = [("a", "b")]  # noqa: RUF012

    assert loaded(Another()) == 5
    assert loaded(encoding="latin-1") == 6
    write(Path(path), some_text(30_000) + "!")
    assert loaded() == 7
    load_dataset(ENC, path, processes=1, cache_dir=tmp_path / "here")
    assert len(list((tmp_path / "here").iterdir())) == 1


def test_the_cache_repeats_what_was_found(tmp_path, large, capsys):
    path = write(tmp_path / "a.csv", b"text\n" + b"some row\n\n" * 4000 + b"caf\xe9\n")
    for _ in range(2):
        with pytest.warns(UserWarning, match="1 bytes are not UTF-8"):
            load_dataset(ENC, path, processes=1)
        assert "4,000 blank rows skipped" in capsys.readouterr().out


def test_many_documents_in_a_file(tmp_path, large):
    rows = [some_text(40, seed).replace("\n", "") for seed in range(1000)]
    path = write(tmp_path / "a.csv", "text\n" + "".join(f'"{row}"\n' for row in rows))
    chunks = load_dataset(ENC, path, pad_documents=True, processes=2)
    assert [chunk.tolist() for chunk in chunks] == [ids_of(row) for row in wrapped(*rows)]
    sampler = WindowSampler(chunks, 0, "epoch", pad_documents=True)
    while sampler.times_seen < 1:
        sampler.sample_batch(10, 200)
    assert sampler.times_seen == pytest.approx(1, abs=0.01)


def test_helper_processes_import_no_tensorflow(monkeypatch):
    text = some_text(5000)
    blocks = [parallel_encode.Block([text, "two"], [True, False])] * 20
    started = parallel_encode._start_helpers((ENC, np.uint16, False, 1000), 2)
    assert len(started) == 2
    modules = Path(f"/proc/{started[0].process.pid}/maps")
    if modules.exists():
        assert "tensorflow" not in modules.read_text()
    for helper in started:
        helper.close()
    packed = list(parallel_encode.pack_blocks(iter(blocks), ENC, np.uint16, False, 2))
    assert len(packed) == 20
    assert all(
        np.frombuffer(p.ids, np.uint16).tolist() == ENC.encode(text) + ENC.encode("two")
        for p in packed
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


class Refuses(WordEncoder):
    def encode(self, text, allow_special=False):
        if "no" in text:
            raise ValueError("this text is refused")
        return super().encode(text, allow_special)


@pytest.mark.parametrize("enc", [NotPicklable(), DiesElsewhere()])
def test_helpers_that_fail_are_done_without(enc):
    texts = ["some text", "it may die here"] * 10
    blocks = [parallel_encode.Block([text], [True]) for text in texts]
    packed = parallel_encode.pack_blocks(iter(blocks), enc, np.uint16, False, 2)
    assert [np.frombuffer(p.ids, np.uint16).tolist() for p in packed] == [
        WordEncoder().encode(text) for text in texts
    ]


def test_no_interpreter_for_helpers(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    blocks = [parallel_encode.Block(["text"], [True])]
    (packed,) = parallel_encode.pack_blocks(iter(blocks), ENC, np.uint16, False, 2)
    assert packed.counts == [len(ENC.encode("text"))]


@pytest.mark.parametrize("processes", [1, 2])
def test_an_error_while_encoding_leaves_no_file(tmp_path, large, processes):
    path = write(tmp_path / "a.txt", "yes " * 10_000 + "no")
    with pytest.raises(ValueError, match="this text is refused"):
        load_dataset(Refuses(), path, processes=processes)
    assert list((tmp_path / "cache").iterdir()) == []
