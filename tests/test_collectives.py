"""The graph of the sums over all workers, seen from one process."""

import types

import pytest
import tensorflow as tf

from gpt_2_simple.distributed import collectives

tf1 = tf.compat.v1


@pytest.fixture
def summed(monkeypatch):
    """Variables whose sums are in the graph, in pieces of 80 bytes at most."""
    monkeypatch.setattr(collectives, "PIECE_BYTES", 80)
    cluster = types.SimpleNamespace(spec=types.SimpleNamespace(index=0, count=2))
    with tf.Graph().as_default() as graph:
        variables = [
            tf1.get_variable(name, shape, use_resource=True)
            for name, shape in {"large": [7, 8], "small": [3], "wide": [2, 40]}.items()
        ]
        done = collectives.Collectives(cluster).sum_variables(variables, lambda variable: [])
        yield types.SimpleNamespace(graph=graph, variables=variables, done=done)


def test_pieces_hold_each_row_once(summed):
    assert [
        [(part.variable.op.name, part.start, part.end) for part in piece]
        for piece in collectives._pieces(summed.variables)
    ] == [
        [("large", 0, 2)], [("large", 2, 4)], [("large", 4, 6)],
        [("large", 6, 7), ("small", 0, 3)], [("wide", 0, 1)], [("wide", 1, 2)],
    ]  # fmt: skip


def test_a_summed_variable_is_not_copied_when_it_is_read(summed):
    """A write of some rows makes TensorFlow copy the variable in each later read, until it is told.

    A read of the whole value before the writes would be a reason to copy it, too.
    """
    operations = summed.graph.get_operations()
    reads = {o.name for o in operations if o.type == "ReadVariableOp"}
    assert reads == {f"{variable.op.name}/Read/ReadVariableOp" for variable in summed.variables}
    for variable, told in zip(summed.variables, summed.done, strict=True):
        handle = variable.handle
        writes = [
            operation
            for operation in operations
            if operation.type == "ResourceStridedSliceAssign" and operation.inputs[0] is handle
        ]
        assert writes
        assert told.type == "DisableCopyOnRead"
        assert told.inputs[0] is handle
        assert {*writes} <= {*told.control_inputs}


def test_rows_are_read_and_written_alone():
    with tf.Graph().as_default(), tf1.Session() as sess:
        variable = tf1.get_variable("v", initializer=tf.zeros([4, 2]), use_resource=True)
        sess.run(tf1.global_variables_initializer())
        rows = collectives._Rows(variable, 1, 3)
        write = rows.write(tf.constant([1.0, 2.0, 3.0, 4.0]))
        with tf.control_dependencies([write]):
            told = tf.raw_ops.DisableCopyOnRead(resource=variable.handle)
        sess.run(told)
        assert sess.run(variable).tolist() == [[0, 0], [1, 2], [3, 4], [0, 0]]
        assert sess.run(rows.read([])).tolist() == [1, 2, 3, 4]
        sess.run(variable.assign_add(tf.ones([4, 2])))
        assert sess.run(rows.read([])).tolist() == [2, 3, 4, 5]
