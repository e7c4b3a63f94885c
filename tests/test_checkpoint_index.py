import os
import struct
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from gpt_2_simple.storage import checkpoint_index

PUBLISHED_INDEX = Path(__file__, "../../../shared/data/model.ckpt.index").resolve()
tf1 = tf.compat.v1


def save(folder, tensors):
    with tf1.Session(graph=tf.Graph()) as sess:
        for name, value in tensors.items():
            tf1.get_variable(name, initializer=value, use_resource=False)
        sess.run(tf1.global_variables_initializer())
        return tf1.train.Saver().save(sess, os.path.join(folder, "model.ckpt"))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    generator = np.random.default_rng(0)
    tensors = {
        # Names that share beginnings, and enough of them for several blocks.
        f"model/h{layer}/{name}": generator.standard_normal(shape).astype(np.float32)
        for layer in range(60)
        for name, shape in (("attn/c_attn/w", (1, 4, 12)), ("attn/c_attn/b", (12,)), ("ln_1/g", ()))
    }
    tensors["step"] = np.int64(7)
    tensors["empty"] = np.zeros((0, 3), np.float32)
    return save(tmp_path_factory.mktemp("checkpoint"), tensors), tensors


@pytest.fixture(scope="module")
def small_index(tmp_path_factory):
    prefix = save(tmp_path_factory.mktemp("small"), {"wte": np.ones((3, 2), np.float32)})
    return Path(prefix + ".index").read_bytes()


def test_index_has_the_names_shapes_and_types_that_tensorflow_reads(checkpoint):
    prefix, tensors = checkpoint
    entries = checkpoint_index.read_index(prefix + ".index")
    reader = tf.train.load_checkpoint(prefix)
    assert {name: list(entry.shape) for name, entry in entries.items()} == (
        reader.get_variable_to_shape_map()
    )
    assert {name: tf.as_dtype(entry.dtype) for name, entry in entries.items()} == (
        reader.get_variable_to_dtype_map()
    )


def test_index_has_the_byte_ranges_of_the_tensors(checkpoint):
    prefix, tensors = checkpoint
    data = Path(prefix + ".data-00000-of-00001").read_bytes()
    entries = checkpoint_index.read_index(prefix + ".index")
    assert len(entries) == len(tensors) == 182
    for name, entry in entries.items():
        content = data[entry.offset : entry.offset + entry.size]
        assert content == tensors[name].tobytes()
    assert checkpoint_index.data_sizes(entries) == {0: len(data)}


def test_data_sizes_are_counted_by_shard():
    entry = checkpoint_index.Entry(dtype=1, shape=(2,), shard=0, offset=8, size=8)
    entries = {"a": entry, "b": entry._replace(offset=0), "c": entry._replace(shard=2, size=4)}
    assert checkpoint_index.data_sizes(entries) == {0: 16, 2: 12}
    assert checkpoint_index.data_sizes({}) == {}


def test_masked_crc32c_of_known_values():
    def unmasked(data):  # undoes LevelDB's mask
        rotated = (checkpoint_index.masked_crc32c(data) - 0xA282EAD8) & 0xFFFFFFFF
        return (rotated << 15 | rotated >> 17) & 0xFFFFFFFF

    assert unmasked(b"123456789") == 0xE3069283  # the check value in the catalogue of CRCs
    assert unmasked(bytes(32)) == 0x8A9136AA  # RFC 3720, appendix B.4


def test_index_cut_short_anywhere_is_refused(tmp_path, small_index):
    path = tmp_path / "index"
    for size in range(len(small_index)):
        path.write_bytes(small_index[:size])
        with pytest.raises(ValueError, match="index is not a whole checkpoint index"):
            checkpoint_index.read_index(path)


def test_flipped_bits_are_refused_or_change_nothing(tmp_path, small_index):
    path = tmp_path / "index"
    path.write_bytes(small_index)
    whole = checkpoint_index.read_index(path)
    noticed = 0
    for position in range(len(small_index)):
        flipped = bytearray(small_index)
        flipped[position] ^= 0x10
        path.write_bytes(flipped)
        try:
            assert checkpoint_index.read_index(path) == whole
        except ValueError:
            noticed += 1
    # What nobody reads: the metaindex block, its handle, and the footer's padding.
    assert noticed > len(small_index) // 2


def test_compressed_block_raises_not_implemented(tmp_path, small_index):
    handles = checkpoint_index._read_varints(small_index[-48:], 4)
    kind = handles[2] + handles[3]
    compressed = bytearray(small_index)
    compressed[kind] = 1
    checksum = checkpoint_index.masked_crc32c(bytes(compressed[handles[2] : kind + 1]))
    compressed[kind + 1 : kind + 5] = struct.pack("<I", checksum)
    path = tmp_path / "index"
    path.write_bytes(compressed)
    with pytest.raises(NotImplementedError, match="compressed"):
        checkpoint_index.read_index(path)


@pytest.mark.parametrize("content", [b"", b"<html>" * 100, bytes(200)])
def test_file_that_is_no_index_is_refused(tmp_path, content):
    path = tmp_path / "page"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="page is not a whole checkpoint index"):
        checkpoint_index.read_index(path)


def test_missing_index(tmp_path):
    with pytest.raises(FileNotFoundError):
        checkpoint_index.read_index(tmp_path / "model.ckpt.index")


def test_message_fields():
    message = tf1.ConfigProto(intra_op_parallelism_threads=300, log_device_placement=True)
    message.gpu_options.visible_device_list = "0"
    fields = dict(checkpoint_index.message_fields(message.SerializeToString()))
    assert fields[2] == 300
    assert fields[8] == 1
    assert dict(checkpoint_index.message_fields(fields[6])) == {5: b"0"}
    assert list(checkpoint_index.message_fields(b"\x0d\x01\x00\x00\x00")) == [(1, 1)]


@pytest.mark.parametrize("message", [b"<html>", b"\x0a\x05abc", b"\x08", b"\x08" + b"\xff" * 11])
def test_message_fields_refuses_what_is_no_message(message):
    with pytest.raises(ValueError, match="a (field|number)"):
        list(checkpoint_index.message_fields(message))


@pytest.mark.skipif(not PUBLISHED_INDEX.exists(), reason="the published index is not here")
def test_published_124m():
    entries = checkpoint_index.read_index(PUBLISHED_INDEX)
    assert checkpoint_index.data_sizes(entries) == {0: 497_759_232}
    assert entries["model/wte"].shape == (50257, 768)
    assert entries["model/h11/attn/c_attn/w"].shape == (1, 768, 2304)
    assert len(entries) == 12 * 12 + 4
