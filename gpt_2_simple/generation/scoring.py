"""Texts in, the probabilities that the model gives their tokens out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from .. import model, session
from ..common.checks import check_whole
from ..encoder import Encoder
from ..storage.load import THE_LOADED, ensure_loaded
from .kv_cache import build_once, placeholder
from .request import as_strings, encode, start_ids
from .sampling import BROKEN, HEALTHY, check_status
from .sequences import TOKENS_AT_ONCE, checked_tokens

# Scoring makes so many rows of logits at a time.
LOGITS_ROWS = 256


class ScoreOps(NamedTuple):
    """What the model says of `tokens` [rows, time].

    Attributes:
        tokens: what it reads.
        targets: [rows, time], what comes after each of them.
        scores: log-probabilities of the targets [rows, time].
        next: log-probabilities of what comes after the last column [rows, n_vocab].
    """

    tokens: Any
    targets: Any
    scores: Any
    next: Any


def score_tokens(
    sess: tf.compat.v1.Session, rows: Sequence[Sequence[int]], stride: int | None = None
) -> list[np.ndarray]:
    """Log-probabilities (natural) of each row's tokens, given those before.

    Args:
        sess: a session that holds a model.
        rows: token ids; the rows may differ in length and be longer than the context.
        stride: how far the window moves along rows longer than n_ctx; None for n_ctx // 2. Tokens
            then have at least n_ctx - stride tokens before them. Smaller is slower and better.

    Returns:
        A float32 array for each row, shorter than it by one: nothing comes before the first token.

    Raises:
        ValueError: an argument out of range.
        RuntimeError: the session is closed or holds no model; weights that are not numbers.
    """
    score = build_once(sess, _build_score)
    hparams = session.graph_state(sess).hparams
    stride = max(1, hparams.n_ctx // 2) if stride is None else stride
    check_whole("stride", stride, 1)
    if stride > hparams.n_ctx:
        raise ValueError(f"stride={stride} must not be above n_ctx={hparams.n_ctx}")
    texts = [checked_tokens(row, hparams.n_vocab) for row in rows]
    scores = [np.zeros(len(text) - 1, np.float32) for text in texts]
    windows = _windows([len(text) - 1 for text in texts], hparams.n_ctx, stride)
    while windows:
        count = max(1, TOKENS_AT_ONCE // windows[0].length)
        group, windows = windows[:count], windows[count:]
        pairs = np.zeros([2, len(group), group[0].length], np.int32)
        for i, (length, row, start, _) in enumerate(group):
            text = texts[row][start : start + length + 1]
            pairs[:, i, :length] = text[:-1], text[1:]
        found = sess.run(score.scores, {score.tokens: pairs[0], score.targets: pairs[1]})
        for (length, row, start, known), values in zip(group, found, strict=True):
            scores[row][start + known : start + length] = values[known:length]
    check_status(np.where([np.isfinite(values).all() for values in scores], HEALTHY, BROKEN))
    return scores


class _Window(NamedTuple):
    """A part of a row, of which another window tells the first `known` tokens better."""

    length: int
    row: int
    start: int
    known: int


def _windows(lengths: list[int], n_ctx: int, stride: int) -> list[_Window]:
    """Covers rows of these lengths; the longest windows first, as likes pad each other least."""
    found = []
    for row, length in enumerate(lengths):
        starts = range(0, max(1, length - n_ctx + stride), stride) if length else ()
        for start in starts:
            known = n_ctx - stride if start else 0
            found.append(_Window(min(n_ctx, length - start), row, start, known))
    return sorted(found, reverse=True)


def likeliest_next_tokens(
    sess: tf.compat.v1.Session, tokens: Sequence[int], k: int = 10
) -> tuple[np.ndarray, np.ndarray]:
    """The likeliest next tokens.

    Args:
        sess: a session that holds a model.
        tokens: the text so far, of which the last n_ctx are read.
        k: how many; at most the whole vocabulary.

    Returns:
        Token ids int32 [k], the likeliest first, and their probabilities float32 [k].

    Raises:
        ValueError: an argument out of range.
        RuntimeError: the session is closed or holds no model; weights that are not numbers.
    """
    score = build_once(sess, _build_score)
    hparams = session.graph_state(sess).hparams
    check_whole("k", k, 1)
    text = checked_tokens(tokens, hparams.n_vocab)[-hparams.n_ctx :]
    (found,) = sess.run(score.next, {score.tokens: [text]})
    check_status(np.where(np.isfinite(found).all(), HEALTHY, BROKEN))
    best = np.argsort(-found, kind="stable")[:k].astype(np.int32)
    return best, np.exp(found[best])


def _build_score(weights: model.Weights, hparams: model.HParams) -> ScoreOps:
    tokens, targets = (placeholder(tf.int32, None, None) for _ in range(2))
    time_ = tf.shape(tokens)[1]
    mask = model.causal_mask(time_, time_)
    x = tf.gather(weights.wte, tokens) + weights.wpe[:time_]
    for block in weights.blocks:
        x, _ = model.transformer_block(x, block, hparams.n_head, None, lambda *_: mask)
    h = model.layer_norm(x, weights.ln_f)  # [rows, time, embd]
    flat, wanted = tf.reshape(h, [-1, hparams.n_embd]), tf.reshape(targets, [-1])

    def body(start: tf.Tensor, out: tf.TensorArray) -> tuple[tf.Tensor, tf.TensorArray]:
        end = start + LOGITS_ROWS
        scores = tf.nn.log_softmax(model.project(weights, flat[start:end]))
        found = tf.gather(scores, wanted[start:end], batch_dims=1)
        return end, out.write(start // LOGITS_ROWS, found)

    out = tf.TensorArray(tf.float32, 0, True, infer_shape=False, element_shape=[None])
    _, out = tf.while_loop(
        lambda start, _: start < tf.shape(flat)[0], body, [tf.constant(0), out],
        parallel_iterations=1,
    )  # fmt: skip
    scores = tf.reshape(out.concat(), tf.shape(targets))
    return ScoreOps(tokens, targets, scores, tf.nn.log_softmax(model.project(weights, h[:, -1])))


class TextScore(NamedTuple):
    """What a model thinks of a text.

    Attributes:
        text: the text.
        tokens: its token ids.
        log_probabilities: natural logarithms of each token's probability given those before,
            float32 [tokens]. The first token comes after `<|endoftext|>`, where the vocabulary
            has that, and else counts for nothing: 0.
        perplexity: the exponential of their negative mean.
    """

    text: str
    tokens: list[int]
    log_probabilities: np.ndarray
    perplexity: float


def score_texts(
    sess: tf.compat.v1.Session, enc: Encoder, texts: Sequence[str], stride: int | None
) -> list[TextScore]:
    """Scores each text; see gpt_2.score.

    Raises:
        ValueError: an empty text.
    """
    rows = [encode(enc, text) for text in texts]
    if not all(rows):
        raise ValueError("an empty text has no score; leave it out")
    start = [] if enc.end_of_text is None else [enc.end_of_text]
    found = score_tokens(sess, [start + row for row in rows], stride)
    scores = []
    for text, row, values in zip(texts, rows, found, strict=True):
        known = values if start else np.concatenate([np.zeros(1, np.float32), values])
        mean = float(values.mean()) if len(values) else 0.0
        scores.append(TextScore(text, row, known, float(np.exp(-mean))))
    return scores


def score(
    sess: tf.compat.v1.Session, texts: str | Sequence[str], stride: int | None = None
) -> list[TextScore]:
    """Tells how likely a model finds texts.

    Args:
        sess: a session with a model.
        texts: a text, or several.
        stride: tokens by which the window moves along a text longer than the context; None means
            half of it. Smaller is slower, and gives each token more to go by.

    Returns:
        For each text its tokens, their log-probabilities and its perplexity.

    Raises:
        RuntimeError: the session holds no model, or is closed.
        ValueError: an empty text, or a stride out of range.
    """
    state = ensure_loaded(sess, THE_LOADED, "checkpoint", None, "models")
    return score_texts(sess, state.encoder, as_strings("texts", texts), stride)


def next_token_probs(
    sess: tf.compat.v1.Session, prefix: str = "", k: int = 10
) -> list[tuple[str, float]]:
    """Tells what a model would go on with.

    Args:
        sess: a session with a model.
        prefix: the text so far, of which the last n_ctx tokens are read.
        k: how many tokens to tell.

    Returns:
        The likeliest next tokens, as text, and their probabilities, the likeliest first.

    Raises:
        RuntimeError: the session holds no model, or is closed.
        ValueError: k is out of range, or the prefix is no string.
    """
    enc = ensure_loaded(sess, THE_LOADED, "checkpoint", None, "models").encoder
    if not isinstance(prefix, str):
        raise ValueError(f"prefix={prefix!r} must be a string")
    found, shares = likeliest_next_tokens(sess, start_ids(enc, prefix), k)
    pairs = zip(found, shares, strict=True)
    return [(enc.decode([token], surrogates=False), float(share)) for token, share in pairs]
