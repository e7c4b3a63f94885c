"""From files to chunks of tokens: joining, end tokens, the cache of encoded text, encode_csv."""

import os
from pathlib import Path

import numpy as np
import pytest
from word_encoder import ENC, END_OF_TEXT, WordEncoder, load, some_text, texts_of, wrapped, write

from gpt_2_simple.data import dataset, parallel_encode
from gpt_2_simple.data.dataset import encode_csv, load_dataset
from gpt_2_simple.data.token_file import MAGIC, save_npz
from gpt_2_simple.data.windows import WindowSampler

SHARED = Path(__file__).parents[1] / ".." / "shared" / "data"


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("GPT_2_SIMPLE_CACHE", str(tmp_path / "cache"))


def test_short_file_ends_with_the_end_token(tmp_path):
    path = write(tmp_path / "a.txt", "Some text.\r\nMore.")
    assert texts_of(path) == ["Some text.\nMore.<|endoftext|>"]
    assert load(path)[0].tolist() == ENC.encode(
        "Some text.\nMore.<|endoftext|>", allow_special=True
    )


def test_single_file_longer_than_combine_has_no_end_token(tmp_path):
    path = write(tmp_path / "a.txt", "word " * 10)
    assert texts_of(path, combine=50) == ["word " * 10]
    assert texts_of(path, combine=51) == ["word " * 10 + "<|endoftext|>"]


def test_files_are_joined_until_a_chunk_has_combine_characters(tmp_path):
    for name, text in (("a", "aaaa"), ("b", "bb"), ("c", "c" * 9), ("d", "d")):
        write(tmp_path / f"{name}.txt", text)
    # 4 + 13 characters of end token + 2 make 19: the separator counts.
    assert texts_of(tmp_path, combine=19) == [
        "aaaa<|endoftext|>bb<|endoftext|>",
        "ccccccccc<|endoftext|>d<|endoftext|>",
    ]


def test_joined_files_are_encoded_as_one_text(tmp_path):
    write(tmp_path / "a.txt", "one ")
    write(tmp_path / "b.txt", "!two")
    whole = "one <|endoftext|>!two<|endoftext|>"
    assert load(tmp_path)[0].tolist() == ENC.encode(whole, allow_special=True)


def test_rows_before_a_text_file_count_toward_combine(tmp_path):
    write(tmp_path / "a.csv", "text\nrow\n")
    write(tmp_path / "b.txt", "text")
    write(tmp_path / "c.txt", "more")
    row = "<|startoftext|>row<|endoftext|>\n"
    assert texts_of(tmp_path, combine=len(row) + 4) == [
        row + "text<|endoftext|>",
        "more<|endoftext|>",
    ]


def test_load_dataset_takes_the_three_arguments_of_gpt_2_simple_0_8_1(tmp_path):
    for name in ("a.txt", "b.txt"):
        write(tmp_path / name, "word")
    assert len(load_dataset(ENC, str(tmp_path), 50000)) == 1
    assert len(load_dataset(ENC, str(tmp_path), combine=4)) == 2


@pytest.mark.skipif(not SHARED.exists(), reason="needs GPT-2's vocabulary and tiny Shakespeare")
def test_shakespeare_has_338025_tokens():
    from gpt_2_simple.encoder import get_encoder

    (chunk,) = load_dataset(get_encoder(str(SHARED)), SHARED / "shakespeare.txt")
    assert len(chunk) == 338025
    assert chunk[:8].tolist() == [5962, 22307, 25, 198, 8421, 356, 5120, 597]


def test_end_token_is_one_id_if_the_vocabulary_has_it(tmp_path):
    path = write(tmp_path / "a.txt", "x")
    characters = ENC.encode("x<|endoftext|>")
    assert len(characters) == 14
    assert load(path)[0].tolist() == [256 + ord("x"), END_OF_TEXT]
    assert load(path, allow_special=False)[0].tolist() == characters

    class Without(WordEncoder):
        end_of_text = None

    assert load(path, Without())[0].tolist() == characters


def test_empty_files_add_nothing(tmp_path):
    for name, text in (("a", "a"), ("b", ""), ("c", "c")):
        write(tmp_path / f"{name}.txt", text)
    assert texts_of(tmp_path) == ["a<|endoftext|>c<|endoftext|>"]


def test_npz_beside_text(tmp_path):
    save_npz(tmp_path / "a.npz", [np.array([104, 105])])
    write(tmp_path / "b.txt", "x")
    assert texts_of(tmp_path) == ["hi", "x<|endoftext|>"]


def test_encode_csv_writes_the_bytes_of_gpt_2_simple_0_8_1(tmp_path):
    path = write(tmp_path / "a.csv", 'text,n\r\na,1\r\n"b, ""c""",2\r\n"d\r\ne",3\r\nü,4\r\n')
    out = tmp_path / "out.txt"
    assert encode_csv(path, out) == 4
    assert out.read_bytes() == "".join(wrapped("a", 'b, "c"', "d\ne", "ü")).encode()
    assert encode_csv(path, str(out), False, "[", "]") == 5
    assert out.read_bytes() == '[text]\n[a]\n[b, "c"]\n[d\ne]\n[ü]\n'.encode()


def test_encode_csv_column_template_and_encoding(tmp_path, capsys):
    path = write(tmp_path / "a.data", b"\xef\xbb\xbfid,text\n1,caf\xe9\n\n2,b\n")
    out = tmp_path / "out.txt"
    with pytest.warns(UserWarning, match="1 bytes are not UTF-8"):
        encode_csv(path, out, column="id")
    assert out.read_text() == "".join(wrapped("1", "2"))
    assert "1 blank rows skipped" in capsys.readouterr().out
    path = write(tmp_path / "b.csv", "id,text\n1,café\n".encode("latin-1"))
    encode_csv(path, out, template="{id}: {text}", encoding="latin-1")
    assert out.read_text(encoding="utf-8") == "".join(wrapped("1: café"))


def test_encode_csv_that_fails_leaves_the_old_file(tmp_path):
    path = write(tmp_path / "a.csv", "id,text\n1,x\n")
    out = write(tmp_path / "out.txt", "before")
    with pytest.raises(ValueError, match="no column 'joke'"):
        encode_csv(path, out, column="joke")
    with pytest.raises(FileNotFoundError, match="nothing.csv"):
        encode_csv(tmp_path / "nothing.csv", out)
    assert Path(out).read_text() == "before"
    assert sorted(os.listdir(tmp_path)) == ["a.csv", "out.txt"]


@pytest.mark.parametrize("link", [None, os.symlink, os.link])
def test_encode_csv_onto_its_own_input_raises_value_error(tmp_path, link):
    path = write(tmp_path / "a.csv", "id,text\n1,x\n")
    out = path
    if link is not None:
        out = str(tmp_path / "out.txt")
        link(path, out)
    with pytest.raises(ValueError, match="give another out_path"):
        encode_csv(path, out)
    assert Path(path).read_text() == "id,text\n1,x\n"


@pytest.fixture
def large(monkeypatch):
    """Makes 20 kB of text a lot, in blocks of 2 kB."""
    monkeypatch.setattr(dataset, "LARGE_BYTES", 20_000)
    monkeypatch.setattr(parallel_encode.cut_into_blocks, "__defaults__", (2000, ("<|endoftext|>",)))


@pytest.mark.parametrize("processes", [1, 2])
def test_large_text_is_encoded_into_a_token_file_with_the_same_ids(
    tmp_path, large, processes, capsys
):
    text = some_text(60_000)
    path = write(tmp_path / "a.txt", text)
    (chunk,) = load(path, processes=processes)
    assert isinstance(chunk, np.memmap)
    assert chunk.tolist() == ENC.encode(text, allow_special=True)
    (kept,) = (tmp_path / "cache").iterdir()
    assert f"tokens are kept in {kept}" in capsys.readouterr().out
    windows = WindowSampler(load(path), seed=1).next_batch(3, 50).tokens
    in_memory = WindowSampler([np.array(ENC.encode(text, allow_special=True))], seed=1)
    assert windows.tolist() == in_memory.next_batch(3, 50).tokens.tolist()


def test_cached_tokens_are_found_for_the_same_text_and_options_only(tmp_path, large, monkeypatch):
    path = write(tmp_path / "a.txt", some_text(30_000) + "\n")
    cache = tmp_path / "cache"

    def loaded(enc=ENC, **options):
        load(path, enc, processes=1, **options)
        return len(list(cache.iterdir()))

    assert loaded() == 1
    with monkeypatch.context() as patch:
        patch.setattr(dataset, "encode_blocks", None)  # to encode again would fail
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
    load(path, processes=1, cache_dir=tmp_path / "here")
    assert len(list((tmp_path / "here").iterdir())) == 1


def test_cached_tokens_repeat_lines_and_warnings(tmp_path, large, capsys):
    path = write(tmp_path / "a.csv", b"text\n" + b"some row\n\n" * 4000 + b"caf\xe9\n")
    for _ in range(2):
        with pytest.warns(UserWarning, match="1 bytes are not UTF-8"):
            load(path, processes=1)
        assert "4,000 blank rows skipped" in capsys.readouterr().out


def test_pad_documents_makes_each_row_a_chunk_of_a_token_file(tmp_path, large):
    rows = [some_text(40, seed).replace("\n", "") for seed in range(1000)]
    path = write(tmp_path / "a.csv", "text\n" + "".join(f'"{row}"\n' for row in rows))
    chunks = load(path, pad_documents=True, processes=2)
    assert [chunk.tolist() for chunk in chunks] == [
        ENC.encode(row, allow_special=True) for row in wrapped(*rows)
    ]
    sampler = WindowSampler(chunks, 0, "epoch", pad_documents=True)
    while sampler.times_seen < 1:
        sampler.next_batch(10, 200)
    assert sampler.times_seen == pytest.approx(1, abs=0.01)


class Refuses(WordEncoder):
    def encode(self, text, allow_special=False):
        if "no" in text:
            raise ValueError("this text is refused")
        return super().encode(text, allow_special)


@pytest.mark.parametrize("processes", [1, 2])
def test_error_while_encoding_leaves_no_token_file(tmp_path, large, processes):
    path = write(tmp_path / "a.txt", "yes " * 10_000 + "no")
    with pytest.raises(ValueError, match="this text is refused"):
        load(path, Refuses(), processes=processes)
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize("is_large", [False, True])
def test_files_of_a_list_are_read_in_its_order(tmp_path, monkeypatch, is_large):
    monkeypatch.setattr(dataset, "LARGE_BYTES", 0 if is_large else 1000)
    one, two = write(tmp_path / "one.txt", "one"), write(tmp_path / "two.txt", "two")
    save_npz(tmp_path / "a.npz", [np.array([104, 105])])
    paths = [two, str(tmp_path / "a.npz"), one]
    assert texts_of(paths, processes=1) == ["two<|endoftext|>", "hi", "one<|endoftext|>"]


def test_foreign_npz_in_a_folder_is_left_out_with_a_warning(tmp_path):
    write(tmp_path / "in" / "a.txt", "x")
    np.savez(tmp_path / "in" / "b.npz", np.ones((2, 2)))
    with pytest.warns(UserWarning, match="b.npz' was left out: .* float64"):
        assert texts_of(tmp_path / "in") == ["x<|endoftext|>"]


def test_unusable_cache_folder_encodes_into_memory(tmp_path, large, monkeypatch, capsys):
    text = some_text(30_000)
    path = write(tmp_path / "a.txt", text)
    folder = write(tmp_path / "file", "not a folder")
    (chunk,) = load(path, processes=1, cache_dir=folder)
    assert chunk.tolist() == ENC.encode(text + "<|endoftext|>", allow_special=True)
    assert f"cannot be kept in {folder}" in capsys.readouterr().out

    def fill_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(dataset, "write_tokens", fill_disk)
    assert load(path, processes=1)[0].tolist() == chunk.tolist()
    assert "No space left" in capsys.readouterr().out


def test_cached_tokens_with_another_footer_are_made_again(tmp_path, large):
    path = write(tmp_path / "a.txt", some_text(30_000))
    expected = load(path, processes=1)[0].tolist()
    (kept,) = (tmp_path / "cache").iterdir()
    kept.write_bytes(MAGIC + b"{}" + (2).to_bytes(8, "little") + MAGIC)
    assert load(path, processes=1)[0].tolist() == expected
