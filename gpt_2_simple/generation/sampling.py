"""Logits in, the next tokens out: penalties, temperature, top-k and top-p."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from .kv_cache import placeholder

# What is wrong with a row's logits: nothing, they are not finite, or every token is forbidden.
HEALTHY, BROKEN, NOTHING_LEFT = 0, 1, 2

# top_p alone first looks for its nucleus among this many of the likeliest tokens, then among all.
NUCLEUS_CANDIDATES = 1024

# To draw from the whole vocabulary, first a bucket of this many tokens is drawn, then one of them.
BUCKET_SIZE = 256


@dataclasses.dataclass
class SamplingPlaceholders:
    """SamplingParams as placeholders."""

    temperature: Any = placeholder(tf.float32)
    top_k: Any = placeholder(tf.int32)
    top_p: Any = placeholder(tf.float32)
    repetition_penalty: Any = placeholder(tf.float32)
    no_repeat_ngram_size: Any = placeholder(tf.int32)
    min_length: Any = placeholder(tf.int32)
    bad_words: Any = placeholder(tf.int32, None, None)  # [words, longest], -1 at the left of others
    stop_token: Any = placeholder(tf.int32)  # -1 for none
    changes_logits: Any = placeholder(tf.bool)


class TextTokens(NamedTuple):
    """The texts so far, for the penalties."""

    tokens: Any  # [rows, time], -1 where there is none
    text_length: Any  # the column at which the texts end
    n_generated: Any  # new tokens that each text has


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
    rows, n_vocab = tf.unstack(tf.shape(logits))

    def count_tokens(tokens: tf.Tensor, is_counted: tf.Tensor) -> tf.Tensor:
        row = tf.broadcast_to(tf.range(rows)[:, tf.newaxis], tf.shape(tokens))
        indices = tf.stack([row, tf.maximum(tokens, 0)], axis=2)
        counts = tf.cast(is_counted & (tokens >= 0), tf.int32)
        return tf.scatter_nd(indices, counts, [rows, n_vocab])

    tokens = text.tokens[:, : text.text_length]
    penalty = params.repetition_penalty
    penalized = tf.where(logits < 0, logits * penalty, logits / penalty)
    logits = tf.where(count_tokens(tokens, tokens >= 0) > 0, penalized, logits)
    forbidden = count_tokens(*_repeated_ngram_ends(tokens, params.no_repeat_ngram_size))
    forbidden += count_tokens(*_bad_word_ends(tokens, params.bad_words))
    is_early_stop = tf.equal(tf.range(n_vocab), params.stop_token) & (
        text.n_generated < params.min_length
    )
    return tf.where((forbidden > 0) | is_early_stop, -math.inf, logits)


def _repeated_ngram_ends(tokens: tf.Tensor, n: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """The last token of each n-gram [rows, n-grams], and whether it would repeat the n-gram.

    It would if the n-gram's other tokens equal the last n - 1 tokens of the text.
    """
    length = tf.shape(tokens)[1]
    before = tf.maximum(n - 1, 0)
    n_ngrams = tf.where(n > 0, tf.maximum(length - before, 0), 0)
    tail = tokens[:, length - tf.minimum(before, length) :]
    starts = tf.gather(tokens, tf.range(n_ngrams)[:, tf.newaxis] + tf.range(before), axis=1)
    is_same = tf.equal(starts, tail[:, tf.newaxis]) & (starts >= 0)
    return tokens[:, before : before + n_ngrams], tf.reduce_all(is_same, axis=2)


def _bad_word_ends(tokens: tf.Tensor, words: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """The last token of each word [rows, words], and whether the text ends with its others."""
    rows, length = tf.unstack(tf.shape(tokens))
    starts, last = words[:, :-1], words[:, -1]
    tail = tokens[:, length - tf.shape(starts)[1] :][:, tf.newaxis]
    is_same = tf.reduce_all(tf.equal(tail, starts) | (starts < 0), axis=2)
    return tf.tile(last[tf.newaxis], [rows, 1]), is_same


def choose_token(logits: tf.Tensor, uniform: tf.Tensor, params: SamplingPlaceholders) -> tf.Tensor:
    """Next tokens [rows], from logits [rows, n_vocab] and a random number in [0, 1) a row.

    Top-p is nucleus sampling (Holtzman et al. 2019); after top-k, it takes its share of what top-k
    has left.
    """
    n_vocab = tf.shape(logits)[1]
    is_top_p_on = (params.top_p > 0) & (params.top_p < 1)
    top_p = tf.cast(params.top_p, tf.float64)

    def weights(logits: tf.Tensor, largest: tf.Tensor) -> tf.Tensor:
        return tf.exp((logits - largest) / params.temperature)

    def all_weights() -> tf.Tensor:
        return weights(logits, tf.reduce_max(logits, axis=1, keepdims=True))

    def likeliest(k: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        values, tokens = tf.math.top_k(logits, k)
        return tokens, _cumulate(weights(values, values[:, :1]))

    def draw(tokens: tf.Tensor, cumulative: tf.Tensor, cutoff: tf.Tensor) -> tf.Tensor:
        return tf.gather(tokens, _draw(cumulative, uniform, cutoff)[0], batch_dims=1)

    def top_k_then_top_p() -> tf.Tensor:
        tokens, cumulative = likeliest(params.top_k)
        return draw(tokens, cumulative, cumulative[:, -1] * tf.where(is_top_p_on, top_p, 1.0))

    def top_p_alone() -> tf.Tensor:
        cutoff = top_p * tf.cast(tf.reduce_sum(all_weights(), axis=1), tf.float64)
        few = likeliest(tf.minimum(NUCLEUS_CANDIDATES, n_vocab))
        are_enough = tf.reduce_all(few[1][:, -1] >= cutoff)
        tokens, cumulative = tf.cond(are_enough, lambda: few, lambda: likeliest(n_vocab))
        return draw(tokens, cumulative, cutoff)

    def from_all() -> tf.Tensor:
        return _draw_in_two_stages(all_weights(), uniform)

    def sample() -> tf.Tensor:
        is_top_k_on = (params.top_k > 0) & (params.top_k < n_vocab)
        return tf.cond(
            is_top_k_on, top_k_then_top_p, lambda: tf.cond(is_top_p_on, top_p_alone, from_all)
        )

    greedy = functools.partial(tf.argmax, logits, axis=1, output_type=tf.int32)
    return tf.cond(params.temperature > 0, sample, greedy)


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
