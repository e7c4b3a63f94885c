"""Logits in, the next tokens out: penalties, biases, temperature, top-k and top-p, row by row."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from .kv_cache import placeholder
from .settings import SamplingParams

# What is wrong with a row's logits: nothing, they are not finite, or every token is forbidden.
HEALTHY, BROKEN, NOTHING_LEFT = 0, 1, 2

# top_p alone first looks for its nucleus among this many of the likeliest tokens, then among all.
NUCLEUS_CANDIDATES = 1024

# To draw from the whole vocabulary, first a bucket of this many tokens is drawn, then one of them.
BUCKET_SIZE = 256


@dataclasses.dataclass
class SamplingPlaceholders:
    """Each row's SamplingParams as placeholders [rows].

    A value that all rows share may stand alone, as [1]: TensorFlow's kernels for scalars are the
    quickest. From the values come those ways to choose a token that some row needs.
    """

    temperature: Any = placeholder(tf.float32, None)
    top_k: Any = placeholder(tf.int32, None)  # below n_vocab; 0 for off
    top_p: Any = placeholder(tf.float32, None)
    repetition_penalty: Any = placeholder(tf.float32, None)
    presence_penalty: Any = placeholder(tf.float32, None)
    frequency_penalty: Any = placeholder(tf.float32, None)
    no_repeat_ngram_size: Any = placeholder(tf.int32, None)
    min_length: Any = placeholder(tf.int32, None)
    stop_token: Any = placeholder(tf.int32, None)  # -1 for none
    bad_words: Any = placeholder(tf.int32, None, None)  # [words, longest], -1 at the left of others
    bad_word_rows: Any = placeholder(tf.int32, None)  # the row of each word
    bias_places: Any = placeholder(tf.int32, None, 2)  # row and token of each bias
    biases: Any = placeholder(tf.float32, None)
    changes_logits: Any = placeholder(tf.bool)  # whether some row does, of those above
    adds_to_logits: Any = placeholder(tf.bool)  # whether some row has a presence penalty, ...

    def __post_init__(self) -> None:
        """Computes what a loop over tokens would compute again for each of them."""
        is_drawn, has_top_k = self.temperature > 0, self.top_k > 0
        self.has_top_p = (self.top_p > 0) & (self.top_p < 1)
        self.is_greedy = ~is_drawn
        self.draws_from_top_k = is_drawn & has_top_k
        self.draws_from_top_p = is_drawn & ~has_top_k & self.has_top_p
        self.draws_from_all = is_drawn & ~has_top_k & ~self.has_top_p
        # A greedy row's weights are not used, but 0 / 0 must not slow the others down.
        self.divisor = tf.where(is_drawn, self.temperature, 1.0)[:, tf.newaxis]
        self.largest_top_k = tf.maximum(tf.reduce_max(self.top_k), 1)


def sampling_feeds(
    placeholders: SamplingPlaceholders, rows: Sequence[SamplingParams], n_vocab: int
) -> dict[Any, Any]:
    """What to feed for rows with these settings."""
    one_for_all = [] if len(set(rows)) > 1 else rows[:1]
    values: dict[str, Any] = {
        field.name: [getattr(row, field.name) for row in one_for_all or rows]
        for field in dataclasses.fields(SamplingParams)
        if field.name not in ("bad_words", "logit_bias")
    }
    values["top_k"] = [top_k if top_k < n_vocab else 0 for top_k in values["top_k"]]
    for name in ("temperature", "top_p"):
        values[name] = [_in_float32(value) for value in values[name]]
    values["stop_token"] = [-1 if stop is None else stop for stop in values["stop_token"]]
    for name, of_rows in values.items():
        values[name] = of_rows if len(set(of_rows)) > 1 else of_rows[:1]
    words = [(i, word) for i, row in enumerate(rows) for word in row.bad_words]
    longest = max((len(word) for _, word in words), default=1)
    padded = [(-1,) * (longest - len(word)) + word for _, word in words]
    biases = [(i, *entry) for i, row in enumerate(rows) for entry in row.logit_bias]
    values |= {
        "bad_words": np.reshape(padded, [-1, longest]),
        "bad_word_rows": [i for i, _ in words],
        "bias_places": np.reshape([(i, token) for i, token, _ in biases], [-1, 2]),
        "biases": [bias for *_, bias in biases],
        "changes_logits": any(row.changes_logits for row in rows),
        "adds_to_logits": any(row.adds_to_logits for row in rows),
    }
    return {getattr(placeholders, name): value for name, value in values.items()}


def _in_float32(value: float) -> float:
    """The nearest number above 0 that float32 holds, neither 0 nor infinite; 0 stays."""
    limits = np.finfo(np.float32)
    return value and min(max(value, float(limits.tiny)), float(limits.max))


class TextTokens(NamedTuple):
    """The texts so far, for the penalties."""

    tokens: Any  # [rows, time], -1 where there is none
    text_length: Any  # the column at which the texts end
    n_generated: Any  # new tokens that each text has [rows]


def check_status(status: np.ndarray, precision: str) -> None:
    """Raises RuntimeError if a row is BROKEN, and ValueError if NOTHING_LEFT.

    The precision is that of the model; see BuiltModel.
    """
    if BROKEN in status and precision == "float16":
        raise RuntimeError(
            "the model gives logits that are not finite numbers: float16 holds none above 65504; "
            "load the model with precision='bfloat16' or 'float32' in another session, or load "
            "another checkpoint"
        )
    if BROKEN in status:
        raise RuntimeError(
            "the model's weights are broken: they give logits that are not finite numbers; "
            "load another checkpoint"
        )
    if NOTHING_LEFT in status:
        raise ValueError(
            "bad_words, no_repeat_ngram_size and min_length leave no token to choose; allow more"
        )


def next_token(
    logits: tf.Tensor, uniform: tf.Tensor, text: TextTokens, params: SamplingPlaceholders
) -> tuple[tf.Tensor, tf.Tensor]:
    """Next tokens [rows], and HEALTHY, BROKEN or NOTHING_LEFT [rows]; arguments: choose_token."""
    logits, is_broken = process_logits(logits, text, params)
    tokens = choose_token(logits, uniform, params)
    is_allowed = tf.math.is_finite(tf.gather(logits, tokens, batch_dims=1))
    return tokens, tf.where(is_broken, BROKEN, tf.where(is_allowed, HEALTHY, NOTHING_LEFT))


def process_logits(
    logits: tf.Tensor, text: TextTokens, params: SamplingPlaceholders
) -> tuple[tf.Tensor, tf.Tensor]:
    """Applies the penalties to logits [rows, n_vocab], if there are any.

    Returns:
        The logits, -inf for tokens that must not come; and whether they came in broken [rows].
    """
    is_broken = ~tf.math.is_finite(tf.reduce_sum(logits, axis=1))
    logits = tf.cond(
        params.changes_logits, lambda: _apply_penalties(logits, text, params), lambda: logits
    )
    return logits, is_broken


def _apply_penalties(
    logits: tf.Tensor, text: TextTokens, params: SamplingPlaceholders
) -> tf.Tensor:
    shape = tf.shape(logits)  # [rows, n_vocab]
    tokens = text.tokens[:, : text.text_length]
    is_token = tokens >= 0
    token_rows = tf.broadcast_to(tf.range(shape[0])[:, tf.newaxis], tf.shape(tokens))

    def count(rows: tf.Tensor, tokens: tf.Tensor, is_counted: tf.Tensor) -> tf.Tensor:
        places = tf.stack([rows, tf.maximum(tokens, 0)], axis=-1)
        return tf.scatter_nd(places, tf.cast(is_counted, tf.int32), shape)

    def add_to_logits() -> tf.Tensor:
        # Presence, frequency and bias as OpenAI's API defines them; vLLM counts new tokens only.
        first_new = text.text_length - text.n_generated[:, tf.newaxis]
        is_new = tf.range(tf.shape(tokens)[1]) >= first_new
        counts = tf.cast(count(token_rows, tokens, is_new & is_token), tf.float32)
        added = tf.scatter_nd(params.bias_places, params.biases, shape)
        added -= params.frequency_penalty[:, tf.newaxis] * counts
        return logits + added - params.presence_penalty[:, tf.newaxis] * tf.minimum(counts, 1.0)

    penalty = params.repetition_penalty[:, tf.newaxis]
    penalized = tf.where(logits < 0, logits * penalty, logits / penalty)
    logits = tf.where(count(token_rows, tokens, is_token) > 0, penalized, logits)
    logits = tf.cond(params.adds_to_logits, add_to_logits, lambda: logits)
    ends_ngram = _repeated_ngram_ends(tokens, params.no_repeat_ngram_size)
    forbidden = count(token_rows, tokens, ends_ngram & is_token)
    ends_word = _bad_word_ends(tokens, params.bad_words, params.bad_word_rows)
    forbidden += count(params.bad_word_rows, params.bad_words[:, -1], ends_word)
    is_stop = tf.equal(tf.range(shape[1]), params.stop_token[:, tf.newaxis])
    is_early_stop = is_stop & (text.n_generated < params.min_length)[:, tf.newaxis]
    return tf.where((forbidden > 0) | is_early_stop, -math.inf, logits)


def _repeated_ngram_ends(tokens: tf.Tensor, sizes: tf.Tensor) -> tf.Tensor:
    """Whether each of the tokens [rows, time], if it came next, would repeat the n-gram it ends.

    It would if the n - 1 tokens before it equal the last n - 1 tokens of the text. `sizes` [rows]
    has each row's n, 0 for off.
    """
    length = tf.shape(tokens)[1]
    most_before = tf.maximum(tf.reduce_max(sizes) - 1, 0)
    padded = tf.pad(tokens, [[0, 0], [most_before, 0]], constant_values=-1)
    back = tf.range(1, most_before + 1)
    ends = most_before + tf.range(length)[:, tf.newaxis]
    before = tf.gather(padded, ends - back, axis=1)  # [rows, time, most_before]
    tail = tf.gather(padded, most_before + length - back, axis=1)[:, tf.newaxis]
    is_same = tf.equal(before, tail) & (before >= 0)
    is_outside = back > sizes[:, tf.newaxis, tf.newaxis] - 1
    return tf.reduce_all(is_same | is_outside, axis=2) & (sizes > 0)[:, tf.newaxis]


def _bad_word_ends(tokens: tf.Tensor, words: tf.Tensor, word_rows: tf.Tensor) -> tf.Tensor:
    """Whether each word's row of the texts ends with the word's tokens except the last [words]."""
    starts = words[:, :-1]
    tail = tokens[:, tf.shape(tokens)[1] - tf.shape(starts)[1] :]
    is_same = tf.equal(tf.gather(tail, word_rows), starts) | (starts < 0)
    return tf.reduce_all(is_same, axis=1)


def choose_token(logits: tf.Tensor, uniform: tf.Tensor, params: SamplingPlaceholders) -> tf.Tensor:
    """Next tokens [rows], from logits [rows, n_vocab] and a random number in [0, 1) a row.

    Top-p is nucleus sampling (Holtzman et al. 2019); after top-k, it takes its share of what top-k
    has left. Each way to choose runs only if some row needs it.
    """
    rows, n_vocab = tf.unstack(tf.shape(logits))
    top_p = tf.cast(params.top_p, tf.float64)

    def weights(logits: tf.Tensor, largest: tf.Tensor) -> tf.Tensor:
        return tf.exp((logits - largest) / params.divisor)

    def all_weights() -> tf.Tensor:
        return weights(logits, tf.reduce_max(logits, axis=1, keepdims=True))

    def likeliest(k: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        values, tokens = tf.math.top_k(logits, k)
        return tokens, _cumulate(weights(values, values[:, :1]))

    def draw(tokens: tf.Tensor, cumulative: tf.Tensor, cutoff: tf.Tensor) -> tf.Tensor:
        return tf.gather(tokens, _draw(cumulative, uniform, cutoff)[0], batch_dims=1)

    def greedy() -> tf.Tensor:
        return tf.argmax(logits, axis=1, output_type=tf.int32)

    def top_k_then_top_p() -> tf.Tensor:
        tokens, cumulative = likeliest(params.largest_top_k)
        last = tf.broadcast_to(tf.maximum(params.top_k, 1) - 1, [rows])
        total = tf.gather(cumulative, last, batch_dims=1)
        return draw(tokens, cumulative, total * tf.where(params.has_top_p, top_p, 1.0))

    def top_p_alone() -> tf.Tensor:
        cutoff = top_p * tf.cast(tf.reduce_sum(all_weights(), axis=1), tf.float64)
        few = likeliest(tf.minimum(NUCLEUS_CANDIDATES, n_vocab))
        are_enough = tf.reduce_all((few[1][:, -1] >= cutoff) | ~params.draws_from_top_p)
        tokens, cumulative = tf.cond(are_enough, lambda: few, lambda: likeliest(n_vocab))
        return draw(tokens, cumulative, cutoff)

    def from_all() -> tf.Tensor:
        return _draw_in_two_stages(all_weights(), uniform)

    chosen = tf.zeros([rows], tf.int32)
    for is_chosen_so, choose in (
        (params.is_greedy, greedy),
        (params.draws_from_top_k, top_k_then_top_p),
        (params.draws_from_top_p, top_p_alone),
        (params.draws_from_all, from_all),
    ):
        chosen = _for_rows(is_chosen_so, choose, chosen)
    return chosen


def _for_rows(is_meant: tf.Tensor, choose: Callable[[], tf.Tensor], chosen: tf.Tensor) -> tf.Tensor:
    """The tokens `chosen`, with those of `choose` in the rows that are meant."""
    return tf.cond(
        tf.reduce_any(is_meant), lambda: tf.where(is_meant, choose(), chosen), lambda: chosen
    )


def _cumulate(weights: tf.Tensor) -> tf.Tensor:
    return tf.cumsum(tf.cast(weights, tf.float64), axis=1)


def _draw(
    cumulative: tf.Tensor, uniform: tf.Tensor, cutoff: tf.Tensor | None = None
) -> tuple[tf.Tensor, tf.Tensor]:
    """Draws an index for each row by inverse transform sampling, from weights [rows, n].

    The first index whose cumulative weight reaches the cutoff [rows] is the last that may be drawn.

    Returns:
        The indices [rows], and what is left of the random numbers [rows]: uniform in [0, 1) too,
        and independent of the indices.
    """

    def first_not_below(is_below: tf.Tensor) -> tf.Tensor:
        n_below = tf.reduce_sum(tf.cast(is_below, tf.int32), axis=1)
        return tf.minimum(n_below, tf.shape(cumulative)[1] - 1)

    total = cumulative[:, -1]
    if cutoff is not None:
        last = first_not_below(cumulative < cutoff[:, tf.newaxis])
        total = tf.gather(cumulative, last, batch_dims=1)
    target = uniform * total
    index = first_not_below(cumulative <= target[:, tf.newaxis])
    start = tf.gather(tf.pad(cumulative, [[0, 0], [1, 0]]), index, batch_dims=1)
    end = tf.gather(cumulative, index, batch_dims=1)
    return index, tf.minimum((target - start) / (end - start), 1.0 - 2.0**-53)


def _draw_in_two_stages(weights: tf.Tensor, uniform: tf.Tensor) -> tf.Tensor:
    """Draws an index [rows] in proportion to weights [rows, n]: first a bucket, then within it.

    It saves the cumulative sum over the whole vocabulary.
    """
    size = tf.shape(weights)[1]
    weights = tf.pad(weights, [[0, 0], [0, -size % BUCKET_SIZE]])
    weights = tf.reshape(weights, [tf.shape(weights)[0], -1, BUCKET_SIZE])
    bucket, uniform = _draw(_cumulate(tf.reduce_sum(weights, axis=2)), uniform)
    index, _ = _draw(_cumulate(tf.gather(weights, bucket, batch_dims=1)), uniform)
    return tf.minimum(bucket * BUCKET_SIZE + index, size - 1)
