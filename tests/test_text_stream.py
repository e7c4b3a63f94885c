"""Stops, streams and batches, with an engine that writes what the test tells it to."""

import numpy as np
import pytest

import gpt_2_simple as gpt2
from gpt_2_simple import model, session
from gpt_2_simple.data import vocabulary
from gpt_2_simple.generation import (
    beam_search,
    output,
    request,
    sequences,
    stopping,
    text_stream,
)
from gpt_2_simple.generation.settings import SamplingParams

ENC = vocabulary.byte_vocabulary()
STATE = session.GraphState(hparams=model.HParams(257, 32, 16, 2, 2), encoder=ENC)
END = ENC.end_of_text


class Engine:
    """Stands in for sample.generate_tokens: each row's tokens are given, a few at a time."""

    def __init__(self, rows, piece=3, interrupt_after=None):
        self.rows, self.piece, self.interrupt_after = rows, piece, interrupt_after
        self.calls, self.given, self.closed = [], 0, 0

    def __call__(self, sess, prefixes, length, settings, seed, row_ids):
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
def write(monkeypatch):
    """write(what each row holds, settings of the job...) -> the texts, and the engine."""

    def run(*rows, prefix=None, nsamples=None, batch_size=None, piece=3, collect=None,
            interrupt_after=None, stop_token=None, length=None, **end):  # fmt: skip
        rows = [row if isinstance(row, list) else list(row.encode()) for row in rows]
        engine = Engine(rows, piece, interrupt_after)
        monkeypatch.setattr(sequences, "generate_tokens", engine)
        length = length or max(map(len, rows))
        nsamples = nsamples or (len(rows) if prefix is None or isinstance(prefix, str) else 1)
        job = request.make_request(
            prefix,
            nsamples,
            batch_size,
            length,
            SamplingParams(),
            7,
            stopping.StopCriteria(**end),
        )
        job = request.with_tokens(job, ENC, stop_token, None)
        function = collect or text_stream.generate_texts
        return function(None, STATE, job), engine

    return run


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
def test_a_text_ends_at_its_first_stop_however_it_comes(write, piece, end, expected):
    found, _ = write("one two three two", piece=piece, **end)
    assert list(found) == [expected]
    found, _ = write("one two three two", piece=piece, collect=text_stream.stream_text, **end)
    assert "".join(found) == expected


@pytest.mark.parametrize("piece", [1, 2, 7])
def test_a_stream_never_shows_what_may_become_a_stop_or_half_a_character(write, piece):
    found, _ = write(
        "naïve ✓ 日本 ENX END", piece=piece, stop=("END",), collect=text_stream.stream_text
    )
    pieces = list(found)
    assert "".join(pieces) == "naïve ✓ 日本 ENX "
    assert "\ufffd" not in "".join(pieces)
    for count in range(len(pieces)):
        assert "naïve ✓ 日本 ENX ".startswith("".join(pieces[:count]))
    assert pieces[-1] == ""


def test_half_a_character_at_the_end_is_told_as_such(write):
    found, _ = write(list("ab✓".encode())[:-1], collect=text_stream.stream_text)
    assert "".join(found) == "ab\ufffd"


def test_the_engine_rests_when_all_rows_have_ended(write):
    found, engine = write("a.bcdefghijkl", "abcd.efghijkl", stop=(".",), batch_size=2)
    assert list(found) == ["a", "abcd"]
    assert engine.given == 2
    assert engine.closed == 1


def test_a_stop_token_ends_a_text(write):
    row = [*b"abc", END]
    assert list(write(row, stop_token="<|endoftext|>", length=9)[0]) == ["abc"]
    assert list(write(row, stop_token=END, length=9, include_stop=True)[0]) == ["abc<|endoftext|>"]
    assert list(write([*row, *b"de"], length=9)[0]) == ["abc<|endoftext|>de"]


def test_many_prefixes_keep_their_order(write):
    found, engine = write(
        "1", "2", "3", "4", "5", "6", prefix=["a", "bb", "ccc"], nsamples=2, batch_size=4
    )
    assert list(found) == ["a1", "a2", "bb3", "bb4", "ccc5", "ccc6"]
    (first, _, _, rows), (second, _, _, more) = engine.calls
    assert first == [(97,), (97,), (98, 98), (98, 98)]
    assert second == [(99, 99, 99), (99, 99, 99)]
    assert (rows, more) == ([0, 1, 2, 3], [4, 5])


def test_without_a_prefix_texts_start_after_the_end_of_another(write):
    found, engine = write("\n\nabc")
    assert list(found) == ["abc"]
    assert engine.calls[0][0] == [(END,)]


def test_a_prefix_can_be_left_out(write):
    found, _ = write("\nabc", prefix="p", include_prefix=False)
    assert list(found) == ["abc"]


def test_ctrl_c_gives_what_there_is(write):
    found, engine = write("abcdef", "uvwxyz", "123456", batch_size=1, interrupt_after=3)
    got = [next(found), next(found)]
    assert got == ["abcdef", "uvw"]
    with pytest.raises(KeyboardInterrupt):
        next(found)
    assert engine.closed == 2


def test_the_batch_size_is_chosen_by_what_the_caches_take(write):
    def at_once(hparams, total):
        job = request.GenerationRequest(
            ("",), total, None, 5, SamplingParams(), None, stopping.StopCriteria()
        )
        return text_stream.rows_at_once(hparams, job)

    assert at_once(STATE.hparams, 5) == 5
    assert at_once(STATE.hparams, 5000) == text_stream.MOST_ROWS
    assert at_once(model.HParams(50257, 1024, 1600, 25, 48), 5000) == 3


def test_what_cannot_be_is_refused(write):
    with pytest.raises(ValueError, match=r"prefix=\[\]"):
        write("a", prefix=[])
    with pytest.raises(ValueError, match="string"):
        write("a", prefix=[b"x"])
    with pytest.raises(ValueError, match="empty string"):
        write("a", stop=("",))
    with pytest.raises(ValueError, match="is no token"):
        write("a", stop_token="nothing such")
    with pytest.raises(ValueError, match="multiple of batch_size=3"):
        write("a", nsamples=10, batch_size=3)


def test_bad_words_are_given_with_and_without_a_space():
    job = request.GenerationRequest(("",), 1, 1, 5, SamplingParams(), None, stopping.StopCriteria())
    settings = request.with_tokens(job, ENC, None, ["no"]).settings
    space = ENC.encode(" ")[0]
    assert (
        settings.bad_words == tuple(sorted([(110, 111), (space, 110, 111)]))
        or len(settings.bad_words) == 2
    )
    with pytest.raises(ValueError, match="empty string"):
        request.with_tokens(job, ENC, None, [""])


def test_a_file_gets_its_name_when_it_is_whole(tmp_path):
    path = tmp_path / "out.txt"
    with output.file_writer(str(path)) as put:
        put("a\n")
        assert not path.exists()
    assert path.read_text() == "a\n"


def test_a_folder_is_no_file_to_write_to(tmp_path):
    with pytest.raises(ValueError, match="is a folder"), output.file_writer(str(tmp_path)):
        raise AssertionError("nothing must be generated")


def _failing_writer(path):
    with output.file_writer(str(path)) as put:
        put("kept")
        raise KeyboardInterrupt


def test_a_file_keeps_what_there_was_before_an_interruption(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        _failing_writer(tmp_path / "out.txt")
    assert (tmp_path / "out.txt").read_text() == "kept"


@pytest.fixture
def loaded(workplace, sess):
    """A session with the tiny model, trained a little: its bytes then differ in likelihood."""
    gpt2.finetune(
        sess, "text.txt", model_name="tiny", steps=40, learning_rate=0.01, accumulate_gradients=1,
        sample_every=0, seed=1, verbose=0,
    )  # fmt: skip
    return sess


def found(sess, prefix, **settings):
    return gpt2.generate(sess, prefix=prefix, return_as_list=True, length=12, **settings)


def test_a_search_finds_likelier_texts_than_greedy_writing(loaded):
    def total(text):
        (score,) = gpt2.score(loaded, text)
        return score.log_probabilities.sum()

    best = found(loaded, None, num_beams=6, nsamples=3)
    (greedy,) = found(loaded, None, temperature=0)
    totals = [total(text) for text in best]
    assert sorted(totals, reverse=True) == totals
    assert totals[0] >= total(greedy)
    assert len(set(best)) == 3


def test_a_search_from_several_prefixes_keeps_their_order(loaded):
    prefixes = ["one ", "two green", "x"]
    together = found(loaded, prefixes, num_beams=3, nsamples=2, batch_size=None)
    alone = [found(loaded, prefix, num_beams=3, nsamples=2) for prefix in prefixes]
    assert together == [text for texts_ in alone for text in texts_]
    assert [text.startswith(prefixes[i // 2]) for i, text in enumerate(together)] == [True] * 6


def test_a_search_ends_at_a_stop_and_has_no_prefix(loaded):
    (free,) = found(loaded, "on the ", num_beams=4, include_prefix=False)
    stop = free[3:5]
    for text in found(loaded, "on the ", num_beams=4, nsamples=4, stop=stop, include_prefix=False):
        assert stop not in text
        assert not text.startswith("on the ")


def test_ctrl_c_gives_what_a_search_has_found(loaded, monkeypatch):
    step = beam_search.BeamSearch.step

    def interrupted(self):
        if self.written == 5:
            raise KeyboardInterrupt
        return step(self)

    monkeypatch.setattr(beam_search.BeamSearch, "step", interrupted)
    texts_ = found(loaded, "on", num_beams=4, nsamples=4)
    assert [len(text) for text in texts_] == [len("on") + 5] * 4


def test_max_new_tokens_stands_for_length(loaded):
    settings = {"temperature": 0, "return_as_list": True, "include_prefix": False}
    (short,) = gpt2.generate(loaded, prefix="one", max_new_tokens=5, **settings)
    (same,) = gpt2.generate(loaded, prefix="one", length=5, **settings)
    assert short == same
    streamed = "".join(
        gpt2.generate_stream(loaded, "one", max_new_tokens=5, temperature=0, include_prefix=False)
    )
    assert streamed == short
    with pytest.raises(ValueError, match="max_new_tokens=0"):
        gpt2.generate(loaded, max_new_tokens=0)


def test_a_search_that_cannot_be_is_refused(loaded):
    with pytest.raises(ValueError, match="nsamples=4 must not be above num_beams=3"):
        found(loaded, "a", nsamples=4, num_beams=3)
    with pytest.raises(ValueError, match="num_beams=0"):
        found(loaded, "a", num_beams=0)
    with pytest.raises(ValueError, match="length_penalty=inf"):
        found(loaded, "a", num_beams=2, length_penalty=float("inf"))
    with pytest.raises(ValueError, match="num_beams=2 cannot stream"):
        gpt2.generate(loaded, num_beams=2, stream=True)


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_weights_in_16_bits_say_nearly_the_same(loaded, precision):
    wide = gpt2.score(loaded, "two green bottles")[0].log_probabilities
    with gpt2.start_tf_sess() as sess:
        gpt2.load_gpt2(sess, precision=precision, verbose=0)
        held = session.named_variables(session.graph_state(sess))
        kinds = {name: variable.dtype.name for name, variable in held.items()}
        assert kinds["model/h1/mlp/c_fc/w"] == precision
        assert kinds["model/h1/mlp/c_fc/b"] == kinds["model/wte"] == "float32"
        narrow = gpt2.score(sess, "two green bottles")[0].log_probabilities
        np.testing.assert_allclose(narrow, wide, atol=0.05)
        assert not np.array_equal(narrow, wide)
        # One row is computed otherwise than several; both are as the whole forward pass has it.
        (alone,) = found(sess, "two", temperature=0)
        assert found(sess, ["two", "one"], temperature=0, batch_size=None)[0] == alone
        (best,) = found(sess, "two", num_beams=1, top_k=1)
        assert best == alone
        gpt2.load_gpt2(sess, verbose=0)  # keeps what the session has
        assert found(sess, "two", temperature=0) == [alone]


def test_weights_in_16_bits_are_not_trained(loaded):
    with gpt2.start_tf_sess() as sess:
        gpt2.load_gpt2(sess, precision="bfloat16", verbose=0)
        with pytest.raises(ValueError, match="holds a model in bfloat16, and float32 is wanted"):
            gpt2.finetune(sess, "text.txt", model_name="tiny", steps=1, verbose=0)
        with pytest.raises(ValueError, match="holds a model in bfloat16"):
            gpt2.load_gpt2(sess, precision="float16")
    with gpt2.start_tf_sess() as sess, pytest.raises(ValueError, match="'int8' must be one of"):
        gpt2.load_gpt2(sess, precision="int8")
