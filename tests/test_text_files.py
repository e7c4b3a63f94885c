"""Finding files, and decoding them: encodings, binary files, gzip."""

import gzip
import itertools
import os
import random
from pathlib import Path

import pytest
from word_encoder import load, texts_of, write

from gpt_2_simple.data import text_files
from gpt_2_simple.data.dataset import read_documents
from gpt_2_simple.data.tables import RowFormat


def test_find_files_sorts_a_folder_and_skips_hidden_files(tmp_path):
    for name in ("b.txt", "a/z.txt", "a.txt", ".hidden", ".git/config", "a/.x"):
        write(tmp_path / name, "x")
    found = [os.path.relpath(file.path, tmp_path) for file in text_files.find_files(tmp_path)]
    assert found == ["a.txt", "b.txt", os.path.join("a", "z.txt")]


def test_find_files_of_globs_and_lists(tmp_path):
    b, a = write(tmp_path / "b.txt", "b"), write(tmp_path / "a.txt", "a")
    write(tmp_path / "sub" / "c.txt", "c")
    names = [Path(file.path).name for file in text_files.find_files(str(tmp_path / "*.txt"))]
    assert names == ["a.txt", "b.txt"]
    names = [Path(file.path).name for file in text_files.find_files(str(tmp_path / "**" / "*.txt"))]
    assert sorted(names) == ["a.txt", "b.txt", "c.txt"]
    names = [Path(file.path).name for file in text_files.find_files(str(tmp_path / "**"))]
    assert names == ["a.txt", "b.txt", "c.txt"]
    os.symlink(tmp_path / "nothing", tmp_path / "broken.txt")
    assert len(text_files.find_files(str(tmp_path / "*.txt"))) == 2
    assert [file.path for file in text_files.find_files([b, Path(a)])] == [b, a]


def test_glob_leaves_out_binary_files_with_a_warning(tmp_path):
    write(tmp_path / "a.txt", "a")
    (tmp_path / "b.png").write_bytes(b"\x89PNG\0\0")
    with pytest.warns(UserWarning, match=r"b\.png' is not UTF-8 text and was left out"):
        assert texts_of(str(tmp_path / "*"), combine=1) == ["a<|endoftext|>"]


def test_file_name_that_looks_like_a_glob(tmp_path):
    assert texts_of(write(tmp_path / "a[1].txt", "x"), combine=1) == ["x"]


def test_missing_path_names_similar_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "shakespeare.txt", "x")
    with pytest.raises(FileNotFoundError, match="Did you mean 'shakespeare.txt'") as error:
        load("shakespear.txt")
    assert str(tmp_path) in str(error.value)
    with pytest.raises(FileNotFoundError, match="no folder 'nowhere'"):
        load("nowhere/a.txt")


def test_empty_folder_list_or_file_raises_value_error(tmp_path):
    (tmp_path / "in").mkdir()
    with pytest.raises(ValueError, match="holds no file"):
        load(tmp_path / "in")
    with pytest.raises(ValueError, match="list of datasets is empty"):
        load([])
    with pytest.raises(ValueError, match="is empty"):
        load(write(tmp_path / "in" / "a.txt", ""))
    with pytest.raises(ValueError, match="is empty"):
        load(write(tmp_path / "in" / "b.csv", ""))
    with pytest.raises(ValueError, match="combine=0"):
        load(write(tmp_path / "in" / "c.txt", "x"), combine=0)


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
def test_binary_file_raises_value_error(tmp_path, name, content):
    with pytest.raises(ValueError, match="is not UTF-8 text") as error:
        load(write(tmp_path / name, content))
    assert name in str(error.value)
    assert ".jsonl" in str(error.value)


def test_folder_leaves_out_binary_files_with_a_warning(tmp_path):
    write(tmp_path / "in" / "cover.png", b"\x89PNG\0\0")
    write(tmp_path / "in" / "a.txt", "x")
    with pytest.warns(UserWarning, match="cover.png' is not UTF-8 text and was left out"):
        assert texts_of(tmp_path / "in") == ["x<|endoftext|>"]


def test_undecodable_bytes_are_counted(tmp_path):
    path = write(tmp_path / "a.txt", b"caf\xe9, 5\xa0\xa3 and much more text\xe2\x82")
    with pytest.warns(UserWarning, match="a.txt': 5 bytes are not UTF-8 and were left out"):
        assert texts_of(path) == ["caf, 5 and much more text<|endoftext|>"]


def test_undecodable_bytes_at_the_end_of_a_large_file_are_counted(tmp_path):
    path = write(tmp_path / "a.txt", b"good text\n" * 200_000 + b"\xff\xfe")
    with pytest.warns(UserWarning, match="2 bytes"):
        (text,) = texts_of(path)
    assert text == "good text\n" * 200_000


def test_read_report_limits_the_number_of_warnings(tmp_path):
    for number in range(12):
        write(tmp_path / f"{number:02}.txt", b"some text \xff")
    with pytest.warns(UserWarning, match="not UTF-8|more warnings") as caught:
        load(tmp_path)
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
def test_encodings_and_byte_order_marks(tmp_path, encoded, encoding):
    path = write(tmp_path / "a.txt", encoded)
    assert texts_of(path, encoding=encoding) == ["naïve €\n<|endoftext|>"]


def test_unknown_encoding_raises_value_error(tmp_path):
    with pytest.raises(ValueError, match="encoding='klingon'"):
        load(write(tmp_path / "a.txt", "x"), encoding="klingon")


@pytest.mark.parametrize("name", ["a.txt", "a.csv", "a.tsv", "a.jsonl"])
def test_gzip_of_text_and_tables(tmp_path, name):
    plain = b'{"text": "x"}\n' if name.endswith("jsonl") else b"text\nx\n"
    expected = texts_of(write(tmp_path / name, plain))
    assert texts_of(write(tmp_path / f"{name}.gz", gzip.compress(plain))) == expected
    assert "x" in expected[0]


def test_truncated_gzip_file_raises_value_error(tmp_path):
    cut = gzip.compress(random.Random(1).randbytes(200_000).hex().encode())[:100_000]
    with pytest.raises(ValueError, match="a.txt.gz' is not a whole gzip file"):
        load(write(tmp_path / "a.txt.gz", cut))
    with pytest.raises(ValueError, match="b.txt.gz' is not a whole gzip file"):
        load(write(tmp_path / "b.txt.gz", b"plain text"))


def test_damaged_gzip_file_in_a_folder_is_read_up_to_the_damage(tmp_path):
    cut = gzip.compress(random.Random(1).randbytes(3_000_000).hex().encode())[:-1_000_000]
    write(tmp_path / "data" / "a.txt.gz", cut)
    write(tmp_path / "data" / "b.txt.gz", b"plain text")
    write(tmp_path / "data" / "c.txt", "the last")
    with pytest.warns(UserWarning, match="is not a whole gzip file") as warned:
        text = "".join(texts_of(tmp_path / "data"))
    told = [str(warning.message) for warning in warned]
    assert [name for line in told for name in ("a.txt.gz", "b.txt.gz") if name in line] == [
        "a.txt.gz",
        "b.txt.gz",
    ]
    assert len(text) > 1_000_000
    assert text.endswith("the last<|endoftext|>")


def test_undecodable_bytes_are_counted_for_each_file_when_two_are_read_in_turns(tmp_path):
    one = write(tmp_path / "one.txt", b"\xff\xfe\xff" + b"text\n" * 500_000 + b"\xff")
    two = write(tmp_path / "two.txt", b"more\n" * 500_000 + b"\xff\xff")
    report = text_files.ReadReport()
    files = [text_files.DataFile(path, "text", named=True) for path in (one, two)]
    readers = [read_documents(file, RowFormat(), "utf-8", report) for file in files]
    for _ in itertools.zip_longest(*readers):
        pass
    counts = sorted(warning.split(" bytes")[0] for warning in report.warnings)
    assert counts == [f"{one!r}: 4", f"{two!r}: 2"]


def test_named_pipe_or_device_raises_value_error_and_is_left_out_of_a_folder(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    write(tmp_path / "a.txt", "x")
    for path in (tmp_path / "pipe", "/dev/null"):
        with pytest.raises(ValueError, match="is a device or a named pipe.*to a file first"):
            load(path)
    for path in (tmp_path, tmp_path / "*"):
        with pytest.warns(UserWarning, match="pipe' is a device or a named pipe and was left out"):
            assert texts_of(str(path)) == ["x<|endoftext|>"]


def test_folder_leaves_out_broken_links_and_unreadable_files_and_folders(tmp_path, monkeypatch):
    write(tmp_path / "a.txt", "x")
    os.symlink(tmp_path / "nothing", tmp_path / "broken.txt")
    with pytest.warns(UserWarning, match="broken.txt' cannot be read and was left out: No such"):
        assert texts_of(tmp_path) == ["x<|endoftext|>"]
    os.remove(tmp_path / "broken.txt")
    write(tmp_path / "sub" / "b.txt", "y")
    scandir = os.scandir

    def refuse_sub(path):
        if str(path).endswith("sub"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse_sub)
    with pytest.warns(UserWarning, match="sub' cannot be read and was left out: Permission"):
        assert texts_of(tmp_path) == ["x<|endoftext|>"]


def test_linked_folders_are_read_and_cycles_end(tmp_path):
    write(tmp_path / "elsewhere" / "b.txt", "b")
    write(tmp_path / "in" / "a.txt", "a")
    os.symlink(tmp_path / "elsewhere", tmp_path / "in" / "link")
    os.symlink(tmp_path / "in", tmp_path / "in" / "cycle")
    assert texts_of(tmp_path / "in") == ["a<|endoftext|>b<|endoftext|>"]


def test_file_that_is_named_twice_is_read_once(tmp_path, capsys):
    path = write(tmp_path / "a.txt", "x")
    assert [file.path for file in text_files.find_files([path, tmp_path, path])] == [path]
    assert capsys.readouterr().out.count(f"{path} is the file {path}, which is read once") == 2
    assert text_files.find_files([tmp_path, path]) == text_files.find_files(path)


def test_few_nuls_in_utf_8_are_text(tmp_path):
    text = "some text \0 " + "and more " * 100
    assert texts_of(write(tmp_path / "a.txt", text), combine=1) == [text]
    short = write(tmp_path / "b.txt", "a\0b")
    assert texts_of(short, combine=1, encoding="utf-8") == ["a\0b"]


@pytest.mark.parametrize("encoding", ["rot13", "hex", "undefined"])
def test_encoding_that_decodes_no_bytes_raises_value_error(tmp_path, encoding):
    with pytest.raises(ValueError, match=f"encoding='{encoding}'"):
        load(write(tmp_path / "a.txt", "x"), encoding=encoding)
