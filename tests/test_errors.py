"""Errors' messages in one line."""

import pytest
import tensorflow as tf

from gpt_2_simple.common.errors import first_line


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("steps=0 must be 1 or above"), "steps=0 must be 1 or above"),
        (OSError(28, "No space left on device"), "[Errno 28] No space left on device"),
        (ValueError("\n  one\ntwo"), "two"),
        (ValueError(), ""),
        (RuntimeError("From /job:worker/replica:0/task:0:\nOOM in Add\n\t [[x]]"), "OOM in Add"),
    ],
)
def test_first_line_of_python_errors(error, line):
    assert first_line(error) == line


def test_first_line_leaves_out_places_in_the_graph():
    with tf.Graph().as_default(), tf.compat.v1.Session() as sess:
        index = tf.compat.v1.placeholder_with_default(7, [])
        with pytest.raises(tf.errors.InvalidArgumentError) as caught:
            sess.run(tf.gather([1, 2], index))
    assert len(str(caught.value).splitlines()) > 1
    assert first_line(caught.value) == "indices = 7 is not in [0, 2)"
