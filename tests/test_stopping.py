"""Where a text ends, and what of it may be shown before."""

import numpy as np
import pytest

from gpt_2_simple.generation.stopping import StopCriteria, ends_with


@pytest.mark.parametrize(
    ("text", "expected"),
    [("", 0), ("abc", 3), ("abcE", 3), ("abcEN", 3), ("ENx", 3), ("ab-", 2), ("ab-E", 2)],
)
def test_count_ready_excludes_the_start_of_a_stop(text, expected):
    assert StopCriteria(truncate="-END", stop=("END",)).count_ready(text) == expected


def test_find_end_looks_back_for_a_stop_that_began_before():
    criteria = StopCriteria(stop=("END", "x"))
    assert criteria.find_end("abcEND", n_searched=5) == 3
    assert criteria.find_end("xabEND", n_searched=4) == 3
    assert criteria.find_end("abcEN", n_searched=4) is None
    assert StopCriteria().find_end("abc") is None


@pytest.mark.parametrize("as_tokens", [list, np.array])
def test_stop_token_is_dropped_unless_included(as_tokens):
    tokens = as_tokens([5, 6])
    assert list(StopCriteria(stop_token=6).drop_stop_token(tokens)) == [5]
    assert list(StopCriteria(stop_token=6, include_stop=True).drop_stop_token(tokens)) == [5, 6]
    assert list(StopCriteria(stop_token=5).drop_stop_token(tokens)) == [5, 6]
    assert ends_with(tokens, 6)
    assert not ends_with(tokens, None)
    assert not ends_with(as_tokens([]), 6)
