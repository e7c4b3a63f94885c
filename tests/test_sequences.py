"""Sequences that grow together: seeds, threads, ends, and arguments out of range."""

import threading

import numpy as np
import pytest
from small_model import GREEDY, PREFIXES, expected, started, write

from gpt_2_simple import sample, session
from gpt_2_simple.sample import SamplingParams, generate_tokens, next_token_probs, score_tokens


def test_prefix_longer_than_the_context_is_cut_with_one_warning(small_sess):
    prefix = [i % 61 for i in range(100)]
    with pytest.warns(UserWarning, match="first 81 tokens") as caught:
        found = write(small_sess, [prefix], 5)
    assert len(caught) == 1
    assert found[0].tolist() == expected(prefix[81:], 5)
    with pytest.warns(UserWarning, match="first 88 tokens"):  # half the context stays
        found = write(small_sess, [prefix], 50)
    assert found[0].tolist() == expected(prefix[88:], 50)


def test_same_seed_gives_same_tokens_in_any_batch(small_sess):
    settings = SamplingParams(temperature=1.0, top_k=20)
    alone = [
        write(small_sess, [p], 50, settings, seed=5, row_ids=[i])[0] for i, p in enumerate(PREFIXES)
    ]
    together = write(small_sess, PREFIXES, 50, settings, seed=5)
    assert together.tolist() == [tokens.tolist() for tokens in alone]
    assert write(small_sess, PREFIXES, 50, settings, seed=5, chunk=3).tolist() == together.tolist()
    backwards = write(small_sess, PREFIXES[::-1], 50, settings, seed=5, row_ids=[3, 2, 1, 0])
    assert backwards[::-1].tolist() == together.tolist()
    with started() as other:
        assert write(other, PREFIXES, 50, settings, seed=5).tolist() == together.tolist()
    assert write(small_sess, PREFIXES, 50, settings, seed=6).tolist() != together.tolist()
    assert write(small_sess, PREFIXES, 50, settings, seed=-1).shape == together.shape


def test_rows_of_one_prefix_differ_and_no_seed_draws_one(small_sess):
    settings = SamplingParams(temperature=1.0)
    first, second = (write(small_sess, [[1]] * 5, 30, settings) for _ in range(2))
    assert len({tuple(row) for row in [*first, *second]}) == 10


def test_threads_generate_from_one_session(small_sess):
    settings = SamplingParams(temperature=1.0, top_p=0.9)
    jobs = [(PREFIXES[i % 4 :], seed) for i, seed in enumerate(range(8))]
    alone = [
        write(small_sess, prefixes, 40, settings, seed=seed).tolist() for prefixes, seed in jobs
    ]
    found = [None] * len(jobs)

    def work(i):
        prefixes, seed = jobs[i]
        found[i] = write(small_sess, prefixes, 40, settings, seed=seed).tolist()

    threads = [threading.Thread(target=work, args=[i]) for i in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == alone


def test_threads_build_the_graph_at_the_same_time():
    with started() as sess:
        found = {}

        def work(seed):
            found[seed] = write(sess, PREFIXES, 10, SamplingParams(), seed=seed).tolist()

        threads = [threading.Thread(target=work, args=[seed]) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert found == {
            s: write(sess, PREFIXES, 10, SamplingParams(), seed=s).tolist() for s in range(4)
        }


def test_later_calls_add_no_operations(small_sess):
    def calls(count):
        for i in range(count):
            settings = SamplingParams(
                temperature=i % 3, top_k=i % 5, top_p=(i % 4) / 4, stop_token=i % 2 or None,
                repetition_penalty=1 + i % 2, no_repeat_ngram_size=i % 4,
                bad_words=((1,), (2, 3))[: i % 3],
            )  # fmt: skip
            write(small_sess, PREFIXES[: 1 + i % 4], 1 + i % 30, settings, seed=i)
        score_tokens(small_sess, PREFIXES)
        next_token_probs(small_sess, [1])

    calls(5)
    before = len(small_sess.graph.get_operations())
    calls(100)
    assert len(small_sess.graph.get_operations()) == before


def test_stop_token_ends_a_row(small_sess):
    plain = [expected(prefix, 60) for prefix in PREFIXES]
    stop = plain[0][10]
    found = write(small_sess, PREFIXES, 60, SamplingParams(temperature=0, stop_token=stop), chunk=4)
    for tokens, whole in zip(found.tolist(), plain, strict=True):
        end = whole.index(stop) + 1 if stop in whole else 60
        end = min(end, found.shape[1])
        assert tokens[:end] == whole[:end]
        assert set(tokens[end:]) <= {-1}
    assert (
        write(small_sess, PREFIXES[:1], 60, SamplingParams(temperature=0, stop_token=stop)).shape[1]
        < 60
    )


def test_send_ends_rows(small_sess):
    plain = [expected(prefix, 60) for prefix in PREFIXES]
    tokens = generate_tokens(small_sess, PREFIXES, 60, GREEDY, chunk=6)
    pieces = [next(tokens)]
    ends = [60, pieces[0].shape[1], 60, 60]
    for ended in [[0, 1, 0, 0], [0, 1, 1, 0], None, [1, 0, 0, 0], [1, 1, 1, 0]]:
        written = sum(piece.shape[1] for piece in pieces)
        for row, now in enumerate(ended or []):
            ends[row] = min(ends[row], written) if now else ends[row]
        pieces.append(tokens.send(ended))
    with pytest.raises(StopIteration):
        tokens.send([1, 1, 1, 1])
    found = np.concatenate(pieces, 1)
    for row, end in enumerate(ends):
        assert found[row, :end].tolist() == plain[row][: min(end, found.shape[1])]
        assert (found[row, end:] == -1).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prefixes": []}, "at least one prefix"),
        ({"prefixes": [[1], []]}, "empty prefix"),
        ({"prefixes": [[61]]}, "token 61 is not in the vocabulary of 61"),
        ({"prefixes": [[-1]]}, "token -1"),
        ({"length": 0}, "length=0"),
        ({"length": 2.0}, "length=2.0"),
        ({"seed": "x"}, "seed='x'"),
        ({"seed": 1.5}, "seed=1.5"),
        ({"sampling": [SamplingParams()] * 2}, "2 sampling for 1 prefixes"),
        ({"sampling": SamplingParams(logit_bias=((61, 1.0),))}, "token 61"),
        ({"row_ids": [1, 2]}, "2 row_ids for 1 prefixes"),
        ({"chunk": 0}, "chunk=0"),
        ({"sampling": SamplingParams(stop_token=61)}, "stop_token=61"),
        ({"sampling": SamplingParams(bad_words=[[1, 61]])}, "token 61"),
    ],
)
def test_arguments_out_of_range_raise_before_generation(small_sess, arguments, message):
    with pytest.raises(ValueError, match=message):
        generate_tokens(**{"sess": small_sess, "prefixes": [[1]], "length": 5, **arguments})


def test_session_without_model_or_closed_is_an_error():
    with session.start_tf_sess() as sess:
        with pytest.raises(RuntimeError, match="load_gpt2"):
            generate_tokens(sess, [[1]], 5)
        with pytest.raises(RuntimeError, match="load_gpt2"):
            score_tokens(sess, [[1, 2]])
    with pytest.raises(RuntimeError, match="closed"):
        generate_tokens(sess, [[1]], 5)


def test_names_of_the_last_release_stay():
    assert sample.Sampling is SamplingParams
    assert sample.Search is sample.BeamSearch
    assert sample.Found is sample.Hypothesis


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_fault_is_an_error_only_for_a_text_that_has_not_ended(small_sess, chunk):
    settings = SamplingParams(temperature=0, no_repeat_ngram_size=1)  # 61 tokens, each of them once

    def read(generation, tokens, count):
        """Adds the generation's tokens to `tokens`, and ends the text when there are so many."""
        part = next(generation)
        while True:
            tokens += part[part >= 0].tolist()
            part = generation.send([len(tokens) >= count])

    whole, ended = [], []
    with pytest.raises(ValueError, match="leave no token"):
        read(generate_tokens(small_sess, [[7]], 100, settings, chunk=chunk), whole, 100)
    assert sorted([7, *whole]) == list(range(61))
    with pytest.raises(StopIteration):
        read(generate_tokens(small_sess, [[7]], 100, settings, chunk=chunk), ended, 55)
    assert ended[:55] == whole[:55]


def test_lengths_and_strides_may_be_small_numpy_integers(small_sess):
    tokens = generate_tokens(small_sess, [[7]], np.int8(100), GREEDY, chunk=np.uint8(9))
    assert np.concatenate(list(tokens), 1)[0].tolist() == expected([7], 100)
    row = list(range(61)) * 4
    (found,), (wanted,) = (score_tokens(small_sess, [row], n) for n in (np.int8(16), 16))
    assert found.tolist() == wanted.tolist()
    assert len(next_token_probs(small_sess, [7], np.int8(5))[0]) == 5
