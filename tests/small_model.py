"""A small random model in a session, and what it must write by full forward passes in NumPy."""

import numpy as np
import oracle
import tensorflow as tf

from gpt_2_simple import model, session
from gpt_2_simple.sample import SamplingParams, generate_tokens

HPARAMS = model.HParams(n_vocab=61, n_ctx=24, n_embd=32, n_head=4, n_layer=2)
WEIGHTS = oracle.random_weights(HPARAMS, seed=1, scale=0.2)
for _name in WEIGHTS:  # so that places and distant tokens matter, and greedy text is not one word
    WEIGHTS[_name] *= 4 if _name.endswith("wpe") else 3 if _name.endswith("c_attn/w") else 1
GREEDY = SamplingParams(temperature=0)
PREFIXES = [[7], [1, 2, 3], [4, 5, 6, 7, 8, 9, 10, 11, 12], list(range(20))]


def started(weights=WEIGHTS, hparams=HPARAMS):
    """A session with a model of these weights."""
    sess = session.start_tf_sess()
    session.build_model(sess, hparams, [])
    loader(sess)(weights)
    return sess


def loader(sess):
    """A function that puts weights in the session's model."""
    variables = model.flatten(session.graph_state(sess).weights)
    with sess.graph.as_default():
        values = {v.op.name: tf.compat.v1.placeholder(v.dtype, v.shape) for v in variables}
        assign = [v.assign(values[v.op.name]) for v in variables]
    return lambda weights: sess.run(assign, {values[name]: weights[name] for name in values})


def write(sess, prefixes, length, sampling=GREEDY, **options):
    """All tokens, [rows, time]."""
    return np.concatenate(list(generate_tokens(sess, prefixes, length, sampling, **options)), 1)


def expected(prefix, length, change=lambda logits, text, written: logits):
    """Greedy tokens by full forward passes; `change` does to the logits what a setting should."""
    text, start = list(prefix), 0
    for written in range(length):
        if len(text) - start > HPARAMS.n_ctx:
            start = len(text) - HPARAMS.n_ctx // 2
        logits = oracle.logits(WEIGHTS, HPARAMS, text[start:])[-1]
        text.append(int(change(logits.copy(), text, written).argmax()))
    return text[len(prefix) :]


def log_softmax(x):
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))
