"""Texts in, the probabilities that the model gives their tokens out."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from .. import model, session
from ..common.checks import check_whole
from ..storage.load import ensure_loaded
from .kv_cache import build_once, fetched, model_precision, placeholder, run
from .request import build_prompt, encode_text
from .sampling import BROKEN, HEALTHY, check_status
from .sequences import MAX_TOKENS_PER_RUN, check_tokens
from .settings import as_strings

# Rows of logits that exist at the same time: 256 of 50,257 float32 are 51 MB.
MAX_LOGITS_ROWS = 256


@dataclasses.dataclass
class ScoreOps:
    """What the model predicts; natural logarithms of probabilities."""

    tokens: Any = placeholder(tf.int32, None, None)  # what it reads [rows, time]
    targets: Any = placeholder(tf.int32, None, None)  # the token after each of them [rows, time]
    log_probabilities: Any = fetched()  # of the targets [rows, time]
    next_log_probabilities: Any = fetched()  # of all tokens after the last column [rows, n_vocab]


class TextScore(NamedTuple):
    """How likely a model finds a text.

    Attributes:
        text: the text.
        tokens: its token ids.
        log_probabilities: the natural logarithm of each token's probability, given the tokens
            before it; float32 [tokens]. The first token comes after `<|endoftext|>`; if the
            vocabulary lacks that, its value is 0 and does not count.
        perplexity: the exponential of their negative mean.
    """

    text: str
    tokens: list[int]
    log_probabilities: np.ndarray
    perplexity: float


def score(
    sess: tf.compat.v1.Session, texts: str | Sequence[str], stride: int | None = None
) -> list[TextScore]:
    """Computes how likely a model finds texts.

    Args:
        sess: a session with a model.
        texts: a text, or several.
        stride: tokens by which the window moves along a text longer than the context; None for
            half of the context. With a smaller stride each token has more tokens before it, and
            scoring takes longer.

    Returns:
        For each text its tokens, their log-probabilities and its perplexity.

    Raises:
        RuntimeError: the session holds no model, or is closed; or the weights are not finite
            numbers.
        ValueError: a text is empty, or the stride is out of range.
    """
    encoder = ensure_loaded(sess).encoder
    texts = as_strings("texts", texts)
    rows = [encode_text(text, encoder) for text in texts]
    if not all(rows):
        raise ValueError("an empty text has no score; leave it out")
    start = [] if encoder.end_of_text is None else [encoder.end_of_text]
    scores = score_tokens(sess, [start + row for row in rows], stride)
    found = []
    for text, tokens, values in zip(texts, rows, scores, strict=True):
        mean = float(values.mean()) if len(values) else 0.0
        n_missing = len(tokens) - len(values)  # nothing may come before the first token
        found.append(TextScore(text, tokens, np.pad(values, (n_missing, 0)), float(np.exp(-mean))))
    return found


def next_token_probs(
    sess: tf.compat.v1.Session, prefix: str = "", k: int = 10
) -> list[tuple[str, float]]:
    """Computes which tokens a model finds likeliest after a text.

    Args:
        sess: a session with a model.
        prefix: the text; its last n_ctx tokens are read.
        k: how many tokens to return.

    Returns:
        The likeliest next tokens, as text, and their probabilities, the likeliest first.

    Raises:
        RuntimeError: the session holds no model, or is closed; or the weights are not finite
            numbers.
        ValueError: k is out of range, or the prefix is no string.
    """
    encoder = ensure_loaded(sess).encoder
    if not isinstance(prefix, str):
        raise ValueError(f"prefix={prefix!r} must be a string")
    tokens, probabilities = likeliest_next_tokens(sess, build_prompt(prefix, encoder).tokens, k)
    return [
        (encoder.decode([token], surrogates=False), float(probability))
        for token, probability in zip(tokens, probabilities, strict=True)
    ]


# --- token ids ------------------------------------------------------------------------------------


def score_tokens(
    sess: tf.compat.v1.Session, rows: Sequence[Sequence[int]], stride: int | None = None
) -> list[np.ndarray]:
    """Log-probabilities (natural) of each row's tokens, given those before.

    Args:
        sess: a session that holds a model.
        rows: token ids; the rows may differ in length and be longer than the context.
        stride: as in score(); tokens then have at least n_ctx - stride tokens before them.

    Returns:
        A float32 array for each row, shorter than it by one: nothing comes before the first token.

    Raises:
        ValueError, RuntimeError: as in score().
    """
    ops = build_once(sess, _build_score)
    hparams = session.graph_state(sess).hparams
    stride = max(1, hparams.n_ctx // 2) if stride is None else stride
    stride = check_whole("stride", stride, 1)
    if stride > hparams.n_ctx:
        raise ValueError(f"stride={stride} must not be above n_ctx={hparams.n_ctx}")
    rows = [check_tokens(row, hparams.n_vocab) for row in rows]
    scores = [np.zeros(len(row) - 1, np.float32) for row in rows]
    windows = _windows([len(row) - 1 for row in rows], hparams.n_ctx, stride)
    while windows:
        count = max(1, MAX_TOKENS_PER_RUN // windows[0].length)
        batch, windows = windows[:count], windows[count:]
        pairs = np.zeros([2, len(batch), batch[0].length], np.int32)
        for i, (length, row, start, _) in enumerate(batch):
            tokens = rows[row][start : start + length + 1]
            pairs[:, i, :length] = tokens[:-1], tokens[1:]
        found = run(sess, ops.log_probabilities, {ops.tokens: pairs[0], ops.targets: pairs[1]})
        for (length, row, start, skipped), values in zip(batch, found, strict=True):
            scores[row][start + skipped : start + length] = values[skipped:length]
    is_finite = [np.isfinite(values).all() for values in scores]
    check_status(np.where(is_finite, HEALTHY, BROKEN), model_precision(sess))
    return scores


class _Window(NamedTuple):
    """A part of a row that is scored in one run."""

    length: int  # how many tokens it scores
    row: int  # the row's number
    start: int  # where it starts in the row
    skipped: int  # scores at its start that the window before has, with more tokens before them


def _windows(lengths: list[int], n_ctx: int, stride: int) -> list[_Window]:
    """Covers rows of these lengths; the longest windows come first, so that padding is short."""
    windows = []
    for row, length in enumerate(lengths):
        starts = range(0, max(1, length - n_ctx + stride), stride) if length else ()
        for start in starts:
            skipped = n_ctx - stride if start else 0
            windows.append(_Window(min(n_ctx, length - start), row, start, skipped))
    return sorted(windows, reverse=True)


def likeliest_next_tokens(
    sess: tf.compat.v1.Session, tokens: Sequence[int], k: int = 10
) -> tuple[np.ndarray, np.ndarray]:
    """The likeliest next tokens.

    Args:
        sess: a session that holds a model.
        tokens: the text so far; its last n_ctx tokens are read.
        k: how many; at most the whole vocabulary.

    Returns:
        Token ids int32 [k], the likeliest first, and their probabilities float32 [k].

    Raises:
        ValueError, RuntimeError: as in next_token_probs().
    """
    ops = build_once(sess, _build_score)
    hparams = session.graph_state(sess).hparams
    k = check_whole("k", k, 1)
    read = check_tokens(tokens, hparams.n_vocab)[-hparams.n_ctx :]
    (scores,) = run(sess, ops.next_log_probabilities, {ops.tokens: [read]})
    check_status(np.where(np.isfinite(scores).all(), HEALTHY, BROKEN), model_precision(sess))
    best = np.argsort(-scores, kind="stable")[:k].astype(np.int32)
    return best, np.exp(scores[best])


def _build_score(weights: model.Weights, hparams: model.HParams) -> ScoreOps:
    ops = ScoreOps()
    time = tf.shape(ops.tokens)[1]
    mask = model.causal_mask(time, time)
    x = tf.gather(weights.wte, ops.tokens) + weights.wpe[:time]
    for block in weights.blocks:
        x, _ = model.transformer_block(x, block, hparams.n_head, None, lambda *_: mask)
    h = model.layer_norm(x, weights.ln_f)  # [rows, time, embd]
    rows = tf.reshape(h, [-1, hparams.n_embd])
    found = _target_log_probabilities(weights, rows, tf.reshape(ops.targets, [-1]))
    ops.log_probabilities = tf.reshape(found, tf.shape(ops.targets))
    ops.next_log_probabilities = tf.nn.log_softmax(model.unembed(weights, h[:, -1]))
    return ops


def _target_log_probabilities(
    weights: model.Weights, h: tf.Tensor, targets: tf.Tensor
) -> tf.Tensor:
    """Log-probabilities [rows] of the tokens `targets` [rows] after hidden states h [rows, embd].

    Never more than MAX_LOGITS_ROWS rows of logits exist.
    """

    def body(start: tf.Tensor, out: tf.TensorArray) -> tuple[tf.Tensor, tf.TensorArray]:
        end = start + MAX_LOGITS_ROWS
        log_probabilities = tf.nn.log_softmax(model.unembed(weights, h[start:end]))
        found = tf.gather(log_probabilities, targets[start:end], batch_dims=1)
        return end, out.write(start // MAX_LOGITS_ROWS, found)

    out = tf.TensorArray(tf.float32, 0, True, infer_shape=False, element_shape=[None])
    _, out = tf.while_loop(
        lambda start, _: start < tf.shape(h)[0],
        body,
        [tf.constant(0), out],
        parallel_iterations=1,
    )
    return out.concat()
