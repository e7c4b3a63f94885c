"""Logits in, the next tokens out: penalties, temperature, top-k and top-p."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from .kv_cache import placeholder

HEALTHY, BROKEN, NOTHING_LEFT = 0, 1, 2

# top_p alone first looks for its nucleus among this many of the likeliest tokens, then among all.
NUCLEUS = 1024

# Drawing from the whole vocabulary first draws a stretch of so many tokens.
STRETCH = 256


class SamplingPlaceholders(NamedTuple):
    """SamplingParams, as placeholders: scalars, but for bad_words [words, longest], -1 on the left."""

    temperature: Any
    top_k: Any
    top_p: Any
    repetition_penalty: Any
    no_repeat_ngram_size: Any
    min_length: Any
    bad_words: Any
    stop_token: Any
    controlled: Any


def sampling_placeholders() -> SamplingPlaceholders:
    return SamplingPlaceholders(
        temperature=placeholder(tf.float32),
        top_k=placeholder(tf.int32),
        top_p=placeholder(tf.float32),
        repetition_penalty=placeholder(tf.float32),
        no_repeat_ngram_size=placeholder(tf.int32),
        min_length=placeholder(tf.int32),
        bad_words=placeholder(tf.int32, None, None),
        stop_token=placeholder(tf.int32),
        controlled=placeholder(tf.bool),
    )


def check_status(status: np.ndarray) -> None:
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
    logits: tf.Tensor,
    uniform: tf.Tensor,
    history: tf.Tensor,
    end: tf.Tensor,
    count: tf.Tensor,
    controls: SamplingPlaceholders,
) -> tuple[tf.Tensor, tf.Tensor]:
    """Logits [rows, n_vocab] -> tokens [rows] and what is wrong with the logits [rows]."""
    logits, broken = process_logits(logits, history, end, count, controls)
    token = choose_token(logits, uniform, controls)
    chosen = tf.math.is_finite(tf.gather(logits, token, batch_dims=1))
    fault = tf.where(broken, BROKEN, tf.where(chosen, HEALTHY, NOTHING_LEFT))
    return token, fault


def process_logits(
    logits: tf.Tensor,
    history: tf.Tensor,
    end: tf.Tensor,
    count: tf.Tensor,
    controls: SamplingPlaceholders,
) -> tuple[tf.Tensor, tf.Tensor]:
    """Logits [rows, n_vocab] after the penalties, if any, and which made no sense [rows]."""
    broken = ~tf.math.is_finite(tf.reduce_sum(logits, axis=1))
    logits = tf.cond(
        controls.controlled,
        lambda: _apply_processors(logits, history, end, count, controls),
        lambda: logits,
    )
    return logits, broken


def _apply_processors(
    logits: tf.Tensor,
    history: tf.Tensor,
    end: tf.Tensor,
    count: tf.Tensor,
    controls: SamplingPlaceholders,
) -> tf.Tensor:
    """Logits after the penalties.

    Args:
        logits: [rows, n_vocab].
        history: the text's tokens [rows, time], -1 where there is none.
        end: the column where the text ends.
        count: new tokens so far.
        controls: what to do.
    """
    rows, size = tf.unstack(tf.shape(logits))

    def count_tokens(tokens: tf.Tensor, counts: tf.Tensor) -> tf.Tensor:
        row = tf.broadcast_to(tf.range(rows)[:, tf.newaxis], tf.shape(tokens))
        where = tf.stack([row, tf.maximum(tokens, 0)], axis=2)
        return tf.scatter_nd(where, tf.cast(counts & (tokens >= 0), tf.int32), [rows, size])

    history = history[:, :end]
    penalty = controls.repetition_penalty
    penalised = tf.where(logits < 0, logits * penalty, logits / penalty)
    logits = tf.where(count_tokens(history, history >= 0) > 0, penalised, logits)
    banned = count_tokens(*_repeats(history, controls.no_repeat_ngram_size))
    banned += count_tokens(*_completions(history, controls.bad_words))
    stop = tf.equal(tf.range(size), controls.stop_token) & (count < controls.min_length)
    return tf.where((banned > 0) | stop, -math.inf, logits)


def _repeats(history: tf.Tensor, n: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Tokens [rows, windows] that followed an n-gram's start before, and where the text ends so."""
    end = tf.shape(history)[1]
    before = tf.maximum(n - 1, 0)
    windows = tf.where(n > 0, tf.maximum(end - before, 0), 0)
    tail = history[:, end - tf.minimum(before, end) :]
    seen = tf.gather(history, tf.range(windows)[:, tf.newaxis] + tf.range(before), axis=1)
    same = tf.equal(seen, tail[:, tf.newaxis]) & (seen >= 0)
    return history[:, before : before + windows], tf.reduce_all(same, axis=2)


def _completions(history: tf.Tensor, words: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Last tokens of the words [rows, words], and where the text ends with the others."""
    rows, end = tf.unstack(tf.shape(history))
    start, last = words[:, :-1], words[:, -1]
    tail = history[:, end - tf.shape(start)[1] :][:, tf.newaxis]
    same = tf.reduce_all(tf.equal(tail, start) | (start < 0), axis=2)
    return tf.tile(last[tf.newaxis], [rows, 1]), same


def choose_token(
    logits: tf.Tensor, uniform: tf.Tensor, controls: SamplingPlaceholders
) -> tf.Tensor:
    """Next tokens [rows], from logits [rows, n_vocab] and one number in [0, 1) a row."""
    size = tf.shape(logits)[1]
    nucleus = (controls.top_p > 0) & (controls.top_p < 1)
    top_p = tf.cast(controls.top_p, tf.float64)

    def masses(logits: tf.Tensor, best: tf.Tensor) -> tf.Tensor:
        return tf.exp((logits - best) / controls.temperature)

    def best() -> tf.Tensor:
        return tf.reduce_max(logits, axis=1, keepdims=True)

    def likeliest(k: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        values, tokens = tf.math.top_k(logits, k)
        return tokens, _cumulate(masses(values, values[:, :1]))

    def top_k() -> tf.Tensor:
        tokens, reached = likeliest(controls.top_k)
        within = reached[:, -1] * tf.where(nucleus, top_p, 1.0)
        return tf.gather(tokens, _draw(reached, uniform, within)[0], batch_dims=1)

    def top_p_alone() -> tf.Tensor:
        within = top_p * tf.cast(tf.reduce_sum(masses(logits, best()), axis=1), tf.float64)
        few = likeliest(tf.minimum(NUCLEUS, size))
        enough = tf.reduce_all(few[1][:, -1] >= within)
        tokens, reached = tf.cond(enough, lambda: few, lambda: likeliest(size))
        return tf.gather(tokens, _draw(reached, uniform, within)[0], batch_dims=1)

    def everything() -> tf.Tensor:
        return _draw_among_many(masses(logits, best()), uniform)

    def sample() -> tf.Tensor:
        truncated = (controls.top_k > 0) & (controls.top_k < size)
        return tf.cond(truncated, top_k, lambda: tf.cond(nucleus, top_p_alone, everything))

    def greedy() -> tf.Tensor:
        return tf.argmax(logits, axis=1, output_type=tf.int32)

    return tf.cond(controls.temperature > 0, sample, greedy)


def _cumulate(masses: tf.Tensor) -> tf.Tensor:
    return tf.cumsum(tf.cast(masses, tf.float64), axis=1)


def _draw(
    reached: tf.Tensor, uniform: tf.Tensor, within: tf.Tensor | None = None
) -> tuple[tf.Tensor, tf.Tensor]:
    """Draws an index by the inverse of a distribution function.

    Args:
        reached: cumulative masses [rows, n].
        uniform: [rows] of numbers in [0, 1).
        within: [rows]; the first index to reach it is the last that may come. None for all.

    Returns:
        Indices [rows], and what is left of `uniform`: again uniform in [0, 1), and independent.
    """

    def count(below: tf.Tensor) -> tf.Tensor:
        indices = tf.reduce_sum(tf.cast(below, tf.int32), axis=1)
        return tf.minimum(indices, tf.shape(reached)[1] - 1)

    total = reached[:, -1]
    if within is not None:
        total = tf.gather(reached, count(reached < within[:, tf.newaxis]), batch_dims=1)
    wanted = uniform * total
    index = count(reached <= wanted[:, tf.newaxis])
    start = tf.gather(tf.pad(reached, [[0, 0], [1, 0]]), index, batch_dims=1)
    end = tf.gather(reached, index, batch_dims=1)
    return index, tf.minimum((wanted - start) / (end - start), 1.0 - 2.0**-53)


def _draw_among_many(masses: tf.Tensor, uniform: tf.Tensor) -> tf.Tensor:
    """Draws an index [rows] with probabilities like masses [rows, n]: first a stretch, then one."""
    size = tf.shape(masses)[1]
    masses = tf.pad(masses, [[0, 0], [0, -size % STRETCH]])
    masses = tf.reshape(masses, [tf.shape(masses)[0], -1, STRETCH])
    stretch, uniform = _draw(_cumulate(tf.reduce_sum(masses, axis=2)), uniform)
    index, _ = _draw(_cumulate(tf.gather(masses, stretch, batch_dims=1)), uniform)
    return tf.minimum(stretch * STRETCH + index, size - 1)
