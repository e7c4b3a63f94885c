"""Files of tokens: .npz and .tokens, ours, broken, and of another kind."""

import io
import zipfile

import numpy as np
import pytest
from word_encoder import ENC, WordEncoder, load, write

from gpt_2_simple.data import token_file
from gpt_2_simple.data.token_file import save_npz, save_tokens


def test_npz_round_trip(tmp_path):
    chunks = [np.arange(5), np.array([7], np.uint16)]
    save_npz(tmp_path / "a", chunks)
    with np.load(tmp_path / "a.npz") as npz:
        assert npz.files == ["arr_0", "arr_1"]
    loaded = load(tmp_path / "a.npz")
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
def test_npz_of_other_arrays_raises_value_error(tmp_path, array):
    np.savez(tmp_path / "a.npz", array)
    with pytest.raises(ValueError, match="a.npz' is not a dataset that encode_dataset wrote"):
        load(tmp_path / "a.npz")


def npy():
    with io.BytesIO() as file:
        np.save(file, np.arange(3))
        return file.getvalue()


@pytest.mark.parametrize("content", [b"", b"text", b"PK\x03\x04broken", npy()])
def test_file_that_is_not_npz_raises_value_error(tmp_path, content):
    with pytest.raises(ValueError, match="a.npz' is not a dataset .*encode_dataset") as error:
        load(write(tmp_path / "a.npz", content))
    assert "pickle" not in str(error.value)


def test_another_archive_named_npz_raises_value_error(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("word/document.xml", "<text/>")
    with pytest.raises(ValueError, match="array 'word/document.xml' is .*not a row of token ids"):
        load(tmp_path / "a.npz")


def test_token_file_round_trip(tmp_path, monkeypatch):
    monkeypatch.setattr(token_file, "BLOCK_TOKENS", 3)
    chunks = [np.arange(7), np.arange(3), np.array([257])]
    path = tmp_path / "a.tokens"
    save_tokens(path, chunks, ENC)
    loaded = load(path)
    assert [chunk.tolist() for chunk in loaded] == [chunk.tolist() for chunk in chunks]
    assert isinstance(loaded[0], np.memmap)
    assert loaded[-1].tolist() == [257]
    assert [len(chunk) for chunk in loaded[:2]] == [7, 3]
    with pytest.raises(IndexError):
        loaded[3]


def test_broken_or_foreign_token_file_raises_value_error(tmp_path):
    path = tmp_path / "a.tokens"
    save_tokens(path, [np.arange(100)], ENC)
    whole = path.read_bytes()
    long_footer = whole[:-16] + b"\xff" * 8 + whole[-8:]
    shortened = whole[:8] + whole[10:]
    for content in (whole[:-1], whole[:50], b"", b"text" * 100, long_footer, shortened):
        with pytest.raises(ValueError, match="a.tokens' is not a whole token file"):
            load(write(path, content))

    class Another(WordEncoder):
        encoder = {"a": 0}  # noqa: RUF012

    write(path, whole)
    with pytest.raises(ValueError, match="another vocabulary"):
        load(path, Another())


def test_id_dtype_is_uint32_above_65536_tokens():
    assert token_file.id_dtype(65536) == np.uint16
    assert token_file.id_dtype(65537) == np.uint32


def test_npz_with_an_empty_chunk(tmp_path):
    np.savez(tmp_path / "a.npz", np.array([1, 2]), np.array([]), np.array([3]))
    chunks = token_file.read_npz(str(tmp_path / "a.npz"), 257)
    assert [chunk.tolist() for chunk in chunks] == [[1, 2], [3]]
