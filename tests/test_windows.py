"""Drawing windows of tokens from chunks: sampling, epochs, restoring, splits."""

import json
import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt_2_simple.data.windows import WindowSampler, fixed_windows, split_dataset, window_length


def test_random_windows_are_uniform_and_stay_within_chunks():
    chunks = [np.arange(10), np.arange(100, 103), np.arange(200, 204)]
    sampler = WindowSampler(chunks, seed=1)
    assert sampler.total_size == 17
    drawn = Counter(tuple(sampler.sample(3).tolist()) for _ in range(11_000))
    possible = {tuple(c[i : i + 3].tolist()) for c in chunks for i in range(len(c) - 2)}
    assert set(drawn) == possible  # all 11: the first, the last, and a chunk of just this length
    assert min(drawn.values()) > 850
    assert max(drawn.values()) < 1150


def test_number_of_tokens_that_random_windows_never_reach_is_printed(capsys):
    sampler = WindowSampler([np.arange(30), np.arange(4), np.arange(5)], seed=0)
    sampler.next_batch(3, 5)
    sampler.next_batch(3, 5)
    assert capsys.readouterr().out.count("4 of the 39 tokens") == 1


def test_window_as_long_as_the_dataset():
    assert WindowSampler([np.arange(4)], seed=0).sample(4).tolist() == [0, 1, 2, 3]


def test_batches_are_int32_and_equal_single_samples():
    chunks = [np.arange(1000, dtype=np.uint16)]
    batch = WindowSampler(chunks, seed=3).next_batch(4, 10).tokens
    assert batch.dtype == np.int32
    assert batch.shape == (4, 10)
    singles = WindowSampler(chunks, seed=3)
    assert [singles.sample(10).tolist() for _ in range(4)] == batch.tolist()


def test_sampler_leaves_numpys_global_seed_alone():
    np.random.seed(5)
    before = np.random.get_state()[1].tolist()
    WindowSampler([np.arange(100)]).next_batch(2, 10)
    assert np.random.get_state()[1].tolist() == before


@pytest.mark.parametrize("sampling", ["random", "epoch"])
@pytest.mark.parametrize("pad_documents", [False, True])
def test_restored_sampler_draws_the_same_windows(sampling, pad_documents):
    chunks = [np.arange(30), np.arange(50, 57), np.arange(100, 180)]
    options = {"sampling": sampling, "pad_documents": pad_documents}
    sampler = WindowSampler(chunks, seed=7, **options)
    sampler.next_batch(5, 6)
    state = json.loads(json.dumps(sampler.state()))
    expected = [sampler.next_batch(3, 6).tokens.tolist() for _ in range(20)]
    resumed = WindowSampler(chunks, seed=8, **options)
    resumed.restore(state)
    assert [resumed.next_batch(3, 6).tokens.tolist() for _ in range(20)] == expected
    assert resumed.times_seen == sampler.times_seen
    assert resumed.state() == sampler.state()


def test_restore_of_a_state_taken_before_any_draw():
    sampler = WindowSampler([np.arange(30)], seed=7, sampling="epoch")
    resumed = WindowSampler([np.arange(30)], seed=8, sampling="epoch")
    resumed.restore(sampler.state())
    assert sampler.times_seen == 0
    assert sampler.next_batch(9, 6).tokens.tolist() == resumed.next_batch(9, 6).tokens.tolist()


def test_restore_of_another_datasets_state_begins_a_new_epoch(capsys):
    sampler = WindowSampler([np.arange(30)], seed=7, sampling="epoch")
    sampler.sample(5)
    resumed = WindowSampler([np.arange(40)], seed=8, sampling="epoch")
    resumed.restore(sampler.state())
    assert "a new epoch" in capsys.readouterr().out
    assert resumed.sample(5).shape == (5,)
    with pytest.raises(ValueError, match="not the state of a WindowSampler"):
        resumed.restore({"step": 3})


def test_times_seen_right_after_restore():
    sampler = WindowSampler([np.arange(31)], seed=7)
    sampler.next_batch(12, 6)
    resumed = WindowSampler([np.arange(31)], seed=8)
    resumed.restore(sampler.state())
    assert resumed.times_seen == sampler.times_seen == 2
    longer = WindowSampler([np.arange(61)], seed=8)
    longer.restore(sampler.state())
    assert longer.times_seen == 1


@pytest.mark.parametrize(
    "damage",
    [
        {"generator": {"bit_generator": "MT19937"}},
        {"predicted": "many"},
        {"predicted": -1},
        {"length": 1},
        {"length": None},
        {"epoch_seed": -1},
        {"position": 100},
        {"position": "first"},
    ],
)
def test_restore_of_a_bad_state_changes_nothing(damage):
    sampler = WindowSampler([np.arange(30)], seed=7, sampling="epoch")
    sampler.next_batch(2, 6)
    other = WindowSampler([np.arange(30)], seed=8, sampling="epoch")
    other.next_batch(3, 6)
    before = other.state()
    with pytest.raises(ValueError, match="not the state of a WindowSampler"):
        other.restore(sampler.state() | damage)
    assert other.state() == before
    other.restore(sampler.state())
    assert other.state() == sampler.state()


def test_restore_of_a_state_before_any_draw_forgets_the_epoch():
    sampler = WindowSampler([np.arange(30)], seed=7, sampling="epoch")
    before = sampler.state()
    first = sampler.next_batch(5, 6).tokens.tolist()
    sampler.restore(before)
    assert sampler.next_batch(5, 6).tokens.tolist() == first


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=8),
    length=st.integers(2, 12),
    batch_size=st.integers(1, 3),
    pad_documents=st.booleans(),
)
def test_epoch_predicts_every_token_once(lengths, length, batch_size, pad_documents):
    tokens = np.arange(sum(lengths))
    chunks = np.split(tokens, np.cumsum(lengths)[:-1])
    firsts = {int(chunk[0]) for chunk in chunks if len(chunk)} if pad_documents else {0}
    expected = Counter(set(tokens.tolist()) - firsts)
    fits = bool(expected) if pad_documents else len(tokens) >= length
    if not fits:
        return
    sampler = WindowSampler(chunks, 0, "epoch", pad_documents, pad_id=-1)
    predicted: Counter = Counter()
    visited = set()
    while sampler.times_seen < 1:
        batch = sampler.next_batch(1, length)
        predicted.update(batch.tokens[:, 1:][batch.loss_mask == 1].tolist())
        visited.update(batch.tokens[batch.tokens >= 0].tolist())
        assert batch.loss_mask.shape == (1, length - 1)
        real = batch.tokens[0][batch.tokens[0] >= 0]
        assert (np.diff(real) == 1).all()
        if pad_documents:
            assert any(set(real.tolist()) <= set(chunk.tolist()) for chunk in chunks)
    assert predicted == expected
    assert sampler.times_seen == 1
    skipped = {int(chunk[0]) for chunk in chunks if len(chunk) == 1} if pad_documents else set()
    assert visited == set(tokens.tolist()) - skipped
    sampler.next_batch(batch_size, length)
    assert sampler.times_seen > 1


def test_epochs_have_different_orders():
    sampler = WindowSampler([np.arange(201)], seed=0, sampling="epoch")
    first = sampler.next_batch(20, 11).tokens[:, 0].tolist()
    second = sampler.next_batch(20, 11).tokens[:, 0].tolist()
    assert sorted(first) == sorted(second) == list(range(0, 200, 10))
    assert first != second


def test_sampling_errors_of_wrong_arguments_and_short_datasets():
    with pytest.raises(ValueError, match="sampling='shuffle'"):
        WindowSampler([np.arange(3)], sampling="shuffle")
    with pytest.raises(ValueError, match="no tokens"):
        WindowSampler([])
    with pytest.raises(ValueError, match="4 tokens in a row, the longest has 3"):
        WindowSampler([np.arange(3), np.arange(2)]).sample(4)
    with pytest.raises(ValueError, match="3 tokens, fewer than a window of 4"):
        WindowSampler([np.arange(3)], sampling="epoch").sample(4)
    with pytest.raises(ValueError, match="no document of the dataset has 2 tokens"):
        WindowSampler([np.arange(1)], pad_documents=True).sample(4)
    with pytest.raises(ValueError, match="length=1"):
        WindowSampler([np.arange(3)]).sample(1)


def test_window_length():
    chunks = [np.arange(10), np.arange(30)]
    assert window_length(chunks, 1024) == 30
    assert window_length(chunks, 20) == 20
    assert window_length(chunks, 1024, "epoch") == 40
    with pytest.raises(ValueError, match="1 tokens in 1 chunks.*at least 2"):
        window_length([np.arange(1)], 1024)
    with pytest.raises(ValueError, match="0 tokens in 0 chunks"):
        window_length([], 1024)


def test_split_dataset():
    chunks = [np.arange(10), np.arange(10, 30), np.arange(30, 40)]
    train, val = split_dataset(chunks, 0.3)
    assert [chunk.tolist() for chunk in train] == [list(range(10)), list(range(10, 28))]
    assert [chunk.tolist() for chunk in val] == [[28, 29], list(range(30, 40))]
    for share in (0, 1, -0.1, 1.5, math.nan):
        with pytest.raises(ValueError, match="val_split="):
            split_dataset(chunks, share)
    with pytest.raises(ValueError, match="leaves 39 to train on and 1 to validate"):
        split_dataset(chunks, 0.01)


@pytest.mark.parametrize(("share", "held_out"), [(0.3, [10]), (0.01, [10]), (0.6, [20, 10])])
def test_split_dataset_between_documents(share, held_out):
    chunks = [np.arange(10), np.arange(20), np.arange(10)]
    train, val = split_dataset(chunks, share, whole_chunks=True)
    assert [len(chunk) for chunk in val] == held_out
    assert [len(chunk) for chunk in train + val] == [10, 20, 10]


def test_split_dataset_cuts_a_single_document():
    train, val = split_dataset([np.arange(10)], 0.3, whole_chunks=True)
    assert (len(train[0]), len(val[0])) == (7, 3)


def test_fixed_windows():
    chunks = [np.arange(10), np.arange(10, 50)]
    windows, loss_mask = fixed_windows(chunks, 8, 3)
    assert windows.dtype == np.int32
    assert windows[:, 0].tolist() == [0, 21, 42]
    assert loss_mask.tolist() == [[1] * 7] * 3
    everything, _ = fixed_windows(chunks, 8, 100)
    assert everything.shape == (7, 8)
    assert (np.diff(everything[:, 0]) >= 7).all()
    assert fixed_windows(chunks, 50, 3).tokens.tolist() == [list(range(50))]
    with pytest.raises(ValueError, match="50 tokens"):
        fixed_windows(chunks, 51, 3)


def test_fixed_windows_within_documents():
    chunks = [np.arange(10, 13), np.arange(20, 30), np.arange(40, 41)]
    windows, loss_mask = fixed_windows(chunks, 8, 5, pad_documents=True)
    assert windows.tolist() == [
        [10, 11, 12, 0, 0, 0, 0, 0], [*range(20, 28)], [27, 28, 29, 0, 0, 0, 0, 0],
    ]  # fmt: skip
    assert loss_mask.tolist() == [[1, 1] + [0] * 5, [1] * 7, [1, 1] + [0] * 5]
    assert fixed_windows(chunks, 8, 2, pad_documents=True).tokens[:, 0].tolist() == [10, 27]
    with pytest.raises(ValueError, match="no document of the dataset has 2 tokens"):
        fixed_windows([np.arange(1), np.arange(1)], 2, 5, pad_documents=True)
