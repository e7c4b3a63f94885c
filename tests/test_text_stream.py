"""Stops, streams and batches, with an engine that writes the tokens that the test names."""

import numpy as np
import pytest

from gpt_2_simple import model
from gpt_2_simple.data import vocabulary
from gpt_2_simple.generation import request, sequences, text_stream
from gpt_2_simple.generation.settings import GenerationSettings

ENCODER = vocabulary.byte_vocabulary()
HPARAMS = model.HParams(257, 32, 16, 2, 2)
END = ENCODER.end_of_text


class Session:
    """Stands in for a session: nothing runs in it."""


SESSION = Session()


class Engine:
    """Stands in for sequences.generate_tokens: gives each row's tokens, a few at a time."""

    def __init__(self, rows, piece=3, interrupt_after=None):
        self.rows, self.piece, self.interrupt_after = rows, piece, interrupt_after
        self.calls, self.given, self.closed = [], 0, 0

    def __call__(self, sess, prefixes, length, sampling, seed, row_ids, strategy):
        assert strategy is None
        self.calls.append((list(map(tuple, prefixes)), length, seed, row_ids))
        return self.write(row_ids, length)

    def write(self, row_ids, length):
        ended = np.zeros(len(row_ids), bool)
        try:
            for start in range(0, length, self.piece):
                if self.interrupt_after is not None and self.given >= self.interrupt_after:
                    raise KeyboardInterrupt
                size = min(self.piece, length - start)
                piece = np.full([len(row_ids), size], -1, np.int32)
                for row, ids in enumerate(piece):
                    more = self.rows[row_ids[row]][start : start + size]
                    if not ended[row]:
                        ids[: len(more)] = more
                self.given += 1
                ended |= np.asarray((yield piece))
        finally:
            self.closed += 1


@pytest.fixture
def make_request(monkeypatch):
    """make_request(what each row holds..., settings of generate()) -> the request, the engine."""

    def make(*rows, piece=3, interrupt_after=None, **settings):
        rows = [row if isinstance(row, list) else list(row.encode()) for row in rows]
        engine = Engine(rows, piece, interrupt_after)
        monkeypatch.setattr(sequences, "generate_tokens", engine)
        defaults = {
            "length": max(map(len, rows)),
            "nsamples": 1 if isinstance(settings.get("prefix"), list) else len(rows),
            "batch_size": None,
            "seed": 7,
        }
        chosen = GenerationSettings(**{**defaults, **settings})
        return request.build_request(chosen, ENCODER, HPARAMS), engine

    return make


@pytest.fixture
def generate(make_request):
    """generate(as make_request) -> the texts."""

    def generate(*rows, **settings):
        texts = text_stream.generate_texts(SESSION, make_request(*rows, **settings)[0])
        return [generated.text for generated in texts]

    return generate


@pytest.fixture
def stream(make_request):
    """stream(as make_request) -> the pieces of the first text."""
    return lambda *rows, **settings: list(
        text_stream.stream_text(SESSION, make_request(*rows, **settings)[0], 0)
    )


@pytest.mark.parametrize("piece", [1, 2, 3, 50])
@pytest.mark.parametrize(
    ("end", "expected"),
    [
        ({}, "one two three two"),
        ({"stop": ("two",)}, "one "),
        ({"stop": ("two",), "include_stop": True}, "one two"),
        ({"stop": ("three", "wo t")}, "one t"),
        ({"stop": ("tw", "two")}, "one "),
        ({"stop": ("tw", "two"), "include_stop": True}, "one tw"),
        ({"stop": ("e two", "tw")}, "one "),
        ({"stop": ("e two", " two")}, "on"),
        ({"stop": ("absent",)}, "one two three two"),
        ({"truncate": " three"}, "one two"),
        ({"truncate": " three", "stop": ("two",), "include_stop": True}, "one two"),
        ({"truncate": "two", "include_stop": True}, "one "),
    ],
)
def test_text_ends_at_its_first_stop_whatever_the_chunks(generate, stream, piece, end, expected):
    assert generate("one two three two", piece=piece, **end) == [expected]
    assert "".join(stream("one two three two", piece=piece, **end)) == expected


@pytest.mark.parametrize("piece", [1, 2, 7])
def test_stream_holds_back_starts_of_stops_and_half_characters(stream, piece):
    pieces = stream("naïve ✓ 日本 ENX END", piece=piece, stop=("END",))
    assert "".join(pieces) == "naïve ✓ 日本 ENX "
    assert "\ufffd" not in "".join(pieces)
    for count in range(len(pieces)):
        assert "naïve ✓ 日本 ENX ".startswith("".join(pieces[:count]))
    assert all(pieces)


def test_half_a_character_at_the_end_becomes_u_fffd(stream):
    assert "".join(stream(list("ab✓".encode())[:-1])) == "ab\ufffd"


def test_generation_stops_when_all_texts_have_ended(make_request):
    request, engine = make_request("a.bcdefghijkl", "abcd.efghijkl", stop=(".",), batch_size=2)
    found = text_stream.generate_texts(SESSION, request)
    assert list(found) == [("", "a"), ("", "abcd")]
    assert engine.given == 2
    assert engine.closed == 1


def test_stop_token_ends_a_text(generate):
    row = [*b"abc", END]
    assert generate(row, stop_token="<|endoftext|>", length=9) == ["abc"]
    assert generate(row, stop_token=END, length=9, include_stop=True) == ["abc<|endoftext|>"]
    assert generate([*row, *b"de"], length=9) == ["abc<|endoftext|>de"]


def test_texts_of_several_prefixes_keep_their_order(make_request):
    request, engine = make_request(
        "1", "2", "3", "4", "5", "6", prefix=["a", "bb", "ccc"], nsamples=2, batch_size=4
    )
    found = list(text_stream.generate_texts(SESSION, request))
    assert [generated.text for generated in found] == ["a1", "a2", "bb3", "bb4", "ccc5", "ccc6"]
    assert [generated.prefix for generated in found] == ["a", "a", "bb", "bb", "ccc", "ccc"]
    (first, _, _, rows), (second, _, _, more) = engine.calls
    assert first == [(97,), (97,), (98, 98), (98, 98)]
    assert second == [(99, 99, 99), (99, 99, 99)]
    assert (rows, more) == ([0, 1, 2, 3], [4, 5])


def test_text_without_prefix_starts_from_endoftext(make_request):
    request, engine = make_request("\n\nabc")
    assert list(text_stream.generate_texts(SESSION, request)) == [("", "abc")]
    assert engine.calls[0][0] == [(END,)]


def test_include_prefix_false_leaves_the_prefix_out(generate):
    assert generate("\nabc", prefix="p", include_prefix=False) == ["abc"]


def test_ctrl_c_yields_finished_and_unfinished_texts(make_request):
    request, engine = make_request("abcdef", "uvwxyz", "123456", batch_size=1, interrupt_after=3)
    found = text_stream.generate_texts(SESSION, request)
    assert [next(found).text, next(found).text] == ["abcdef", "uvw"]
    with pytest.raises(KeyboardInterrupt):
        next(found)
    assert engine.closed == 2


@pytest.mark.parametrize("finish", [True, False])
def test_stream_left_early_frees_the_engine(make_request, finish):
    request, engine = make_request("abcdef")
    pieces = text_stream.stream_text(SESSION, request, 0)
    assert next(pieces) == "abc"
    if finish:
        assert list(pieces) == ["def"]
    pieces.close()
    assert engine.closed == 1
