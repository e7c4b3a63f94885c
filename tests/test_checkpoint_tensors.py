"""Checkpoints that are written and read one tensor after the other."""

import contextlib
import os
from pathlib import Path

import numpy as np
import oracle
import pytest
import tensorflow as tf

from gpt_2_simple.common.hparams import HParams
from gpt_2_simple.common.published import DATA_FILE, INDEX_FILE
from gpt_2_simple.storage import checkpoint, checkpoint_index, checkpoint_tensors

tf1 = tf.compat.v1
HPARAMS = HParams(n_vocab=50, n_ctx=8, n_embd=8, n_head=2, n_layer=2)


@pytest.fixture
def written(tmp_path):
    weights = oracle.random_weights(HPARAMS)
    with checkpoint_tensors.write_checkpoint(str(tmp_path)) as write:
        for name, value in weights.items():
            write(name, value)
    return str(tmp_path / "model.ckpt"), weights


def test_written_checkpoint_is_what_tensorflow_reads(written):
    prefix, weights = written
    reader = tf.train.load_checkpoint(prefix)
    assert set(reader.get_variable_to_shape_map()) == set(weights)
    for name, value in weights.items():
        np.testing.assert_array_equal(reader.get_tensor(name), value)
        assert reader.get_tensor(name).dtype == np.float32
    assert checkpoint.is_whole(prefix)


def test_written_checkpoint_has_two_files_and_nothing_else(written):
    prefix, _ = written
    assert sorted(os.listdir(os.path.dirname(prefix))) == [DATA_FILE, INDEX_FILE]


def test_written_checkpoint_is_restored_by_a_saver(written):
    prefix, weights = written
    with tf1.Session(graph=tf.Graph()) as sess:
        variable = tf1.get_variable("model/h1/mlp/c_fc/w", [1, 8, 32], use_resource=False)
        tf1.train.Saver([variable]).restore(sess, prefix)
        np.testing.assert_array_equal(sess.run(variable), weights["model/h1/mlp/c_fc/w"])


def test_tensors_are_read_by_name(written):
    prefix, weights = written
    with checkpoint_tensors.open_checkpoint(prefix) as read:
        for name in reversed(weights):
            np.testing.assert_array_equal(read(name), weights[name])


@pytest.mark.parametrize("dtype", [tf.float16, tf.bfloat16, tf.float64])
def test_tensors_of_other_types_are_read_as_float32(tmp_path, dtype):
    with tf1.Session(graph=tf.Graph()) as sess:
        tf1.get_variable("wte", initializer=tf.cast([1.5, -2.0], dtype), use_resource=False)
        sess.run(tf1.global_variables_initializer())
        prefix = tf1.train.Saver().save(sess, str(tmp_path / "model.ckpt"))
    with checkpoint_tensors.open_checkpoint(prefix) as read:
        value = read("wte")
    assert value.dtype == np.float32
    assert value.tolist() == [1.5, -2.0]


def read_all(prefix, before_the_second=lambda: None):
    with checkpoint_tensors.open_checkpoint(prefix) as read:
        read("model/wte")
        before_the_second()
        for name in oracle.random_weights(HPARAMS):
            read(name)


def test_a_changed_byte_in_a_tensor_is_found(written):
    prefix, _ = written
    data = Path(prefix + ".data-00000-of-00001")
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    with pytest.raises(ValueError, match="is damaged"):
        read_all(prefix)


def test_a_checkpoint_that_goes_away_while_it_is_read_is_told(written):
    prefix, _ = written

    def remove():
        os.remove(prefix + ".data-00000-of-00001")
        os.remove(prefix + ".index")

    with pytest.raises(FileNotFoundError, match="went away while it was read"):
        read_all(prefix, remove)


def test_without_a_whole_write_there_is_no_index(tmp_path):
    with (
        contextlib.suppress(KeyboardInterrupt),
        checkpoint_tensors.write_checkpoint(str(tmp_path)) as write,
    ):
        write("wte", np.zeros(3, np.float32))
        raise KeyboardInterrupt
    assert not (tmp_path / INDEX_FILE).exists()


def test_the_callers_default_graph_stays(written):
    prefix, _ = written
    with tf.Graph().as_default() as graph:
        with checkpoint_tensors.open_checkpoint(prefix) as read:
            read("model/wte")
            assert tf1.get_default_graph() is graph
        assert graph.get_operations() == []


def test_aligned_arrays_start_where_tensorflow_takes_them_without_a_copy():
    for size in (1, 7, 1000):
        array = checkpoint_tensors.aligned_empty((size, 3))
        assert array.ctypes.data % 64 == 0
        assert array.shape == (size, 3)
        assert array.dtype == np.float32


def test_index_of_many_entries_is_read_again(tmp_path):
    entries = {
        f"model/h{i}/w": checkpoint_index.Entry(1, (i, 300), 0, i * 10**9, i * 1200, 2**32 - 1 - i)
        for i in range(700)
    }
    (tmp_path / "an.index").write_bytes(checkpoint_index.index_bytes(entries))
    assert checkpoint_index.read_index(tmp_path / "an.index") == entries
