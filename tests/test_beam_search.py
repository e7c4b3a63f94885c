"""Beam search against its definition in full forward passes."""

import numpy as np
import oracle
import pytest
from small_model import GREEDY, HPARAMS, PREFIXES, WEIGHTS, expected, log_softmax, started

from gpt_2_simple.generation import sequences
from gpt_2_simple.sample import Beams, BeamSearch, SamplingParams


def search(sess, prefixes, length, beams, sampling=GREEDY, **options):
    """What beam search finds for each prefix, the best first."""
    with BeamSearch(sess, prefixes, length, beams, sampling, **options) as found:
        while not found.done:
            found.step()
        return found.best()


def likeliest(prefix, length, beams, stop=None):
    """[(score, new tokens)] by full forward passes: the definition, in the plainest words."""
    running, finished, start = [(0.0, [])], [], 0
    for n_generated in range(length):
        if len(prefix) + n_generated - start > HPARAMS.n_ctx:
            start = len(prefix) + n_generated - HPARAMS.n_ctx // 2
        candidates = []
        for total, new in running:
            logits = oracle.logits(WEIGHTS, HPARAMS, (prefix + new)[start:])[-1]
            steps = enumerate(log_softmax(logits))
            candidates += [(total + step, [*new, token]) for token, step in steps]
        candidates = sorted(candidates, reverse=True)[: 2 * beams.count]
        finished += [found for found in candidates[: beams.count] if found[1][-1] == stop]
        running = [found for found in candidates if found[1][-1] != stop][: beams.count]
        scored = sorted((beams.score(total, len(new)), new) for total, new in finished)
        best = scored[-beams.count :]
        next_score = beams.score(running[0][0], n_generated + 1)
        if len(best) == beams.count and best[0][0] >= next_score:
            return best[::-1]
    scored = [(beams.score(total, len(new)), new) for total, new in finished + running]
    return sorted(scored, reverse=True)[: beams.count]


@pytest.mark.parametrize("stop", [None, 0, 44])
@pytest.mark.parametrize("beams", [Beams(1), Beams(3), Beams(4, 0.0), Beams(2, -1.0), Beams(5, 3)])
def test_beam_search_equals_full_forward_passes(small_sess, beams, stop):
    length = 30  # the window slides, at another moment for each prefix
    found = search(
        small_sess, PREFIXES, length, beams, SamplingParams(temperature=0, stop_token=stop)
    )
    for prefix, texts in zip(PREFIXES, found, strict=True):
        wanted = likeliest(prefix, length, beams, stop)
        assert [text.tokens for text in texts] == [new for _, new in wanted]
        assert [text.score for text in texts] == pytest.approx([s for s, _ in wanted], rel=1e-4)


def test_beam_searches_end_at_different_lengths(small_sess):
    """So rows leave the batch in the test above, and windows slide beside rows that ended."""
    found = search(small_sess, PREFIXES, 30, Beams(3), SamplingParams(stop_token=0))
    lengths = [max(len(text.tokens) for text in texts) for texts in found]
    assert min(lengths) < 10
    assert max(lengths) == 30


def test_beam_search_with_a_beam_for_each_token_is_exhaustive(small_sess):
    count = HPARAMS.n_vocab
    (found,) = search(small_sess, [[5, 6]], 2, Beams(count))
    first = log_softmax(oracle.logits(WEIGHTS, HPARAMS, [5, 6])[-1])
    second = [
        log_softmax(oracle.logits(WEIGHTS, HPARAMS, [5, 6, token])[-1]) for token in range(count)
    ]
    totals = (first[:, None] + np.array(second)) / 2
    assert found[0].tokens == [*map(int, np.unravel_index(totals.argmax(), totals.shape))]
    assert [text.score for text in found] == pytest.approx(
        np.sort(totals, axis=None)[::-1][:count], rel=1e-4
    )


def test_beam_search_with_one_beam_is_greedy(small_sess):
    (found,) = search(small_sess, [[3]], 40, Beams(1))
    assert found[0].tokens == expected([3], 40)


def test_beam_search_applies_penalties_and_ends(small_sess):
    free = search(small_sess, [[3]], 12, Beams(3))[0][0].tokens
    sampling = SamplingParams(
        bad_words=((free[0],),), no_repeat_ngram_size=1, repetition_penalty=2.0
    )
    (found,) = search(small_sess, [[3]], 12, Beams(3), sampling)
    for text in found:
        assert free[0] not in text.tokens
        assert 3 not in text.tokens
        assert len(set(text.tokens)) == 12
    (found,) = search(small_sess, [[3]], 12, Beams(3), ends=lambda new: len(new) == 4)
    assert [len(text.tokens) for text in found] == [4, 4, 4]


def test_beam_search_can_be_left_early(small_sess):
    with BeamSearch(small_sess, [[3], [4, 5]], 12, Beams(3)) as found:
        assert found.best() == [[], []]
        for _ in range(4):
            assert found.step() == 2
        assert [[len(text.tokens) for text in texts] for texts in found.best()] == [[4] * 3] * 2
        assert not found.done


def test_second_beam_search_adds_no_operations(small_sess):
    search(small_sess, [[3]], 40, Beams(2))
    operations = len(small_sess.graph.get_operations())
    search(small_sess, [[3], [4, 5, 6]], 50, Beams(5, 0.5), SamplingParams(stop_token=3))
    assert len(small_sess.graph.get_operations()) == operations


def test_beam_search_interrupted_at_prefill_frees_the_cache(small_sess, monkeypatch):
    def interrupted(self, rows):
        raise KeyboardInterrupt

    monkeypatch.setattr(sequences.Generation, "add", interrupted)
    with pytest.raises(KeyboardInterrupt):
        search(small_sess, [[3]], 4, Beams(2))


def test_beam_search_without_allowed_tokens_is_an_error(small_sess):
    everything = SamplingParams(bad_words=tuple((token,) for token in range(HPARAMS.n_vocab)))
    with pytest.raises(ValueError, match="leave no token to choose"):
        search(small_sess, [[3]], 4, Beams(2), everything)


def test_beam_search_with_nan_weights_is_an_error():
    broken = {name: value * np.nan for name, value in WEIGHTS.items()}
    with started(broken) as sess, pytest.raises(RuntimeError, match="weights are broken"):
        search(sess, [[3]], 4, Beams(2))
