"""safetensors files, compared with the library of that name, and broken in many ways."""

import json
import struct

import ml_dtypes
import numpy as np
import pytest

from gpt_2_simple.storage import safetensors_file

safetensors_numpy = pytest.importorskip("safetensors.numpy")
TYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


@pytest.fixture
def tensors():
    rng = np.random.default_rng(0)
    shapes = {"wte": (7, 3), "h.0.bias": (5,), "scalar": (), "empty": (0, 4)}
    return {name: rng.standard_normal(shape).astype("f4") for name, shape in shapes.items()}


def write(path, tensors, precision="float32"):
    shapes = [(name, value.shape) for name, value in tensors.items()]
    safetensors_file.write_tensors(str(path), shapes, precision, tensors.__getitem__)
    return str(path)


def read(path):
    found = {}
    for name, tensor in safetensors_file.read_header(str(path)).items():
        found[name] = np.empty(tensor.shape, np.float32)
        safetensors_file.read_into(tensor, found[name])
    return found


def assert_equal(found, expected):
    assert set(found) == set(expected)
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)


@pytest.mark.parametrize("precision", TYPES)
def test_the_library_reads_what_is_written(tmp_path, tensors, precision):
    path = write(tmp_path / "a.safetensors", tensors, precision)
    found = safetensors_numpy.load_file(path)
    assert_equal(found, {name: value.astype(TYPES[precision]) for name, value in tensors.items()})
    assert {value.dtype for value in found.values()} == {np.dtype(TYPES[precision])}


@pytest.mark.parametrize("precision", TYPES)
def test_what_the_library_writes_is_read(tmp_path, tensors, precision):
    narrowed = {name: value.astype(TYPES[precision]) for name, value in tensors.items()}
    safetensors_numpy.save_file(narrowed, tmp_path / "a.safetensors")
    found = read(tmp_path / "a.safetensors")
    assert_equal(found, {name: value.astype(np.float32) for name, value in narrowed.items()})


def test_chunks_join_to_the_whole_tensor(tmp_path, tensors, monkeypatch):
    monkeypatch.setattr(safetensors_file, "_CHUNK", 4)
    assert_equal(read(write(tmp_path / "a", tensors, "bfloat16")), {
        name: value.astype(ml_dtypes.bfloat16).astype("f4") for name, value in tensors.items()
    })  # fmt: skip


def test_bfloat16_is_rounded_as_ml_dtypes_rounds():
    bits = np.random.default_rng(1).integers(0, 2**32, 200_000, dtype=np.uint32)
    ties = (np.arange(2**16, dtype=np.uint32) << 16) | 0x8000
    values = np.concatenate([bits, ties]).view(np.float32)
    values = values[np.abs(values) < 3e38]
    narrowed = safetensors_file.narrow(values, "bfloat16", "a")
    expected = values.astype(ml_dtypes.bfloat16).view(np.uint16)
    np.testing.assert_array_equal(narrowed, expected)


@pytest.mark.parametrize(
    ("value", "precision", "message"),
    [
        (np.nan, "float32", "wte holds numbers that are infinite or not a number"),
        (np.inf, "float16", "wte holds numbers that are infinite or not a number"),
        (7e4, "float16", "wte holds 7e[+]04, which is too large for float16.*'bfloat16'"),
        (-3.4028e38, "bfloat16", "which is too large for bfloat16.*'float32'"),
    ],
)
def test_numbers_that_a_type_does_not_hold_are_told(tmp_path, value, precision, message):
    tensors = {"wte": np.array([0, value], np.float32)}
    with pytest.raises(ValueError, match=message):
        write(tmp_path / "a", tensors, precision)


def test_a_tensor_that_is_not_finite_is_not_read(tmp_path):
    safetensors_numpy.save_file({"wte": np.array([1, np.nan], "f2")}, tmp_path / "a")
    with pytest.raises(ValueError, match="a: wte holds numbers that are infinite or not a number"):
        read(tmp_path / "a")


def test_a_tensor_of_another_type_is_told(tmp_path):
    safetensors_numpy.save_file({"wte": np.array([1, 2], "i1")}, tmp_path / "a")
    with pytest.raises(ValueError, match="wte has the type I8; float32, float16 and bfloat16"):
        read(tmp_path / "a")


def test_every_cut_of_a_file_is_told(tmp_path, tensors):
    whole = (tmp_path / "a").read_bytes() if write(tmp_path / "a", tensors) else b""
    for size in range(0, len(whole), 3):
        (tmp_path / "cut").write_bytes(whole[:size])
        with pytest.raises(ValueError, match="cut is not a whole safetensors file"):
            safetensors_file.read_header(str(tmp_path / "cut"))


def header_file(path, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return str(path)


@pytest.mark.parametrize(
    "header",
    [
        b"not json",
        b"[1, 2]",
        b"\xff\xfe",
        b"[" * 100_000,
        {"a": 3},
        {"a": {"dtype": "F32", "shape": [2]}},
        {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}},
        {"a": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}},
        {"a": {"dtype": "F32", "shape": [2.0], "data_offsets": [0, 8]}},
        {"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}},
        {"a": {"dtype": "F32", "shape": [2], "data_offsets": ["0", "8"]}},
        {"a": {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}},
        {"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 12]}},
        {
            "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
            "b": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]},
        },
    ],
)
def test_broken_headers_are_told(tmp_path, header):
    path = header_file(tmp_path / "broken", header, bytes(8))
    with pytest.raises(ValueError, match="broken is not a whole safetensors file"):
        safetensors_file.read_header(path)


def test_a_header_longer_than_the_file_is_not_read(tmp_path):
    (tmp_path / "huge").write_bytes(struct.pack("<Q", 2**62) + b"{}")
    with pytest.raises(ValueError, match="reaches past"):
        safetensors_file.read_header(str(tmp_path / "huge"))


def test_shards_are_filled_in_order():
    tensors = [("a", (10,)), ("b", (5,)), ("c", (100,)), ("d", (1,)), ("e", (2,))]
    shards = safetensors_file.plan_shards(tensors, "float16", 30)
    assert {file: [name for name, _ in shard] for file, shard in shards.items()} == {
        "model-00001-of-00003.safetensors": ["a", "b"],
        "model-00002-of-00003.safetensors": ["c"],
        "model-00003-of-00003.safetensors": ["d", "e"],
    }
    index = safetensors_file.shard_index(shards, "float16")
    assert index["metadata"] == {"total_parameters": 118, "total_size": 236}
    assert index["weight_map"]["d"] == "model-00003-of-00003.safetensors"


def test_what_fits_has_one_file():
    assert list(safetensors_file.plan_shards([("a", (10,)), ("b", (5,))], "float32", 60)) == [
        "model.safetensors"
    ]


def test_numbers_lie_at_multiples_of_8(tmp_path, tensors):
    header = safetensors_file.read_header(write(tmp_path / "a", tensors))
    assert header["wte"].start % 8 == 0


def test_no_file_is_replaced(tmp_path, tensors):
    path = write(tmp_path / "a", tensors)
    with pytest.raises(FileExistsError):
        write(path, tensors)
