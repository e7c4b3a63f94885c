import dataclasses

import numpy as np
import oracle
import pytest
import tensorflow as tf

from gpt_2_simple import model, session

HPARAMS = model.HParams(n_vocab=61, n_ctx=40, n_embd=24, n_head=3, n_layer=3)
TOKENS = np.random.default_rng(3).integers(0, 61, [2, 40])


def load(sess, hparams, weights):
    state = session.build_model(sess, hparams, [])
    for name, variable in session.named_variables(state).items():
        sess.run(variable.initializer, {variable.initializer.inputs[1]: weights[name]})
    return state


def relative(found, expected):
    return np.abs(found - expected).max() / np.abs(expected).max()


def differences(function, weights, name, index, step=1e-3):
    """The slope of `function` at one element of one variable, by central differences."""
    values = []
    for sign in (1, -1):
        moved = {key: value.astype(np.float64) for key, value in weights.items()}
        moved[name][index] += sign * step
        values.append(function(moved))
    return (values[0] - values[1]) / (2 * step)


def test_logits_equal_numpy_oracle(sess):
    weights = oracle.random_weights(HPARAMS)
    load(sess, HPARAMS, weights)
    with sess.graph.as_default():
        X = tf.compat.v1.placeholder(tf.int32, [None, None])
        logits = model.model(hparams=HPARAMS, X=X, reuse=True)["logits"]
    for length in (1, 2, 17, 40):
        found = sess.run(logits, {X: TOKENS[:, :length]})
        assert found.shape == (2, length, 61)
        for row in range(2):
            expected = oracle.logits(weights, HPARAMS, TOKENS[row, :length])
            assert relative(found[row], expected) < 2e-5


@pytest.mark.parametrize("length", [1, 255, 256, 257, 600])
def test_logits_with_query_chunks_equal_numpy_oracle(sess, length):
    hparams = dataclasses.replace(HPARAMS, n_ctx=600)
    weights = oracle.random_weights(hparams)
    load(sess, hparams, weights)
    tokens = np.random.default_rng(0).integers(0, 61, [1, length])
    with sess.graph.as_default():
        X = tf.compat.v1.placeholder(tf.int32, [1, length])
        logits = model.model(hparams, X, reuse=True)["logits"]
    assert (
        relative(sess.run(logits, {X: tokens})[0], oracle.logits(weights, hparams, tokens[0]))
        < 2e-5
    )


def test_past_replaces_earlier_tokens(sess):
    weights = oracle.random_weights(HPARAMS)
    load(sess, HPARAMS, weights)
    with sess.graph.as_default():
        X = tf.compat.v1.placeholder(tf.int32, [2, None])
        past = tf.compat.v1.placeholder(
            tf.float32, model.past_shape(hparams=HPARAMS, batch_size=2, sequence=None)
        )
        first = model.model(HPARAMS, X, reuse=True)
        rest = model.model(HPARAMS, X, past=past, reuse=True)
    logits, present = sess.run([first["logits"], first["present"]], {X: TOKENS[:, :15]})
    assert present.shape == (2, 3, 2, 3, 15, 8)
    whole, whole_present = sess.run([first["logits"], first["present"]], {X: TOKENS})
    more, more_present = sess.run(
        [rest["logits"], rest["present"]], {X: TOKENS[:, 15:], past: present}
    )
    assert relative(np.concatenate([logits, more], 1), whole) < 2e-5
    assert relative(np.concatenate([present, more_present], 4), whole_present) < 2e-5


def test_every_gradient_equals_finite_differences_of_the_oracle(sess):
    """tf.gradients through our registered gradients, against differences of the NumPy loss."""
    hparams = model.HParams(n_vocab=11, n_ctx=270, n_embd=6, n_head=2, n_layer=2)
    weights = oracle.random_weights(hparams, scale=0.3)
    state = load(sess, hparams, weights)
    batch = np.random.default_rng(5).integers(0, 11, [1, 270])  # two chunks of queries
    with sess.graph.as_default():
        X = tf.constant(batch, tf.int32)
        logits = model.model(hparams, X, reuse=True)["logits"][:, :-1]
        losses = tf.nn.sparse_softmax_cross_entropy_with_logits(labels=X[:, 1:], logits=logits)
        names, variables = zip(*session.named_variables(state).items(), strict=True)
        gradients = tf.gradients(tf.reduce_mean(losses), variables)
        gradients = sess.run([tf.convert_to_tensor(g) for g in gradients])

    def loss(moved):
        return oracle.loss(moved, hparams, batch)

    for name, gradient in zip(names, gradients, strict=True):
        index = np.unravel_index(np.argmax(np.abs(gradient)), gradient.shape)
        slope = differences(loss, weights, name, index)
        assert abs(gradient[index] - slope) < 1e-3 * abs(slope) + 1e-5, name


def test_each_block_output_is_a_checkpoint(sess):
    session.build_model(sess, HPARAMS, [])
    with sess.graph.as_default():
        X = tf.compat.v1.placeholder(tf.int32, [2, 8])
        model.model(HPARAMS, X, reuse=True)
        checkpoints = tf.compat.v1.get_collection("checkpoints")
    assert [t.shape.as_list() for t in checkpoints] == [[2, 8, 24]] * 3


def test_variable_names_and_shapes_as_in_published_checkpoints(sess):
    state = session.build_model(sess, HPARAMS, [])
    weights = oracle.random_weights(HPARAMS)
    found = {n: tuple(v.shape.as_list()) for n, v in session.named_variables(state).items()}
    assert found == {name: value.shape for name, value in weights.items()}
    with sess.graph.as_default():
        assert len(tf.compat.v1.global_variables()) == len(found)


def test_default_hparams_are_124M_without_a_vocabulary():
    assert dataclasses.asdict(model.default_hparams()) == {
        "n_vocab": 0, "n_ctx": 1024, "n_embd": 768, "n_head": 12, "n_layer": 12,
    }  # fmt: skip


def test_override_from_dict_replaces_named_values():
    hparams = model.default_hparams()
    hparams.override_from_dict({"n_layer": 3, "n_vocab": 9})
    assert (hparams.n_layer, hparams.n_vocab, hparams.n_embd) == (3, 9, 768)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"n_layers": 3}, "n_layers"),
        ({"n_layer": 0}, "n_layer=0"),
        ({"n_layer": 2.5}, "n_layer=2.5"),
        ({"n_layer": True}, "n_layer=True"),
        ({"n_vocab": -1}, "n_vocab=-1"),
        ({"n_embd": 100}, "multiple of n_head=12"),
    ],
)
def test_override_from_dict_rejects_impossible_values(values, message):
    hparams = model.default_hparams()
    with pytest.raises(ValueError, match=message):
        hparams.override_from_dict(values)
    assert hparams == model.default_hparams()


def test_model_without_vocabulary_size_raises(sess):
    with sess.graph.as_default(), pytest.raises(ValueError, match="n_vocab=0"):
        model.model(model.default_hparams(), tf.zeros([1, 1], tf.int32))


@pytest.mark.parametrize("dtype", [tf.float16, tf.bfloat16, tf.float32])
def test_gelu_and_its_gradient_at_the_edge_of_16_bits(sess, dtype):
    x = np.array([-65504, -300, -100, -70, -9, -1, -0.1, 0, 0.1, 1, 9, 70, 100, 300, 65504])
    with sess.graph.as_default():
        fed = tf.constant(x, dtype)
        y = model.gelu(fed)
        found = sess.run([tf.cast(t, tf.float32) for t in (y, *tf.gradients(y, fed))])
    u = model.GELU_SCALE * (x + model.GELU_CUBIC * x**3)
    slope = model.GELU_SCALE * (1 + 3 * model.GELU_CUBIC * x**2)
    expected = 0.5 * x * (1 + np.tanh(u))
    gradient = 0.5 * (1 + np.tanh(u)) + 0.5 * x * (1 - np.tanh(u) ** 2) * slope
    np.testing.assert_allclose(found[0], expected, rtol=0.02, atol=0.01)
    np.testing.assert_allclose(found[1], gradient, rtol=0.02, atol=0.01)


@pytest.mark.parametrize("dtype", [tf.float16, tf.bfloat16, tf.float32])
@pytest.mark.parametrize("rate", [0.01, 0.1])
def test_dropout_has_its_rate_in_16_bits(sess, dtype, rate):
    with sess.graph.as_default():
        dropout = model.Dropout(rate, tf.constant([3, 4]))
        dropped = tf.cast(dropout(tf.ones([1000, 200], dtype)), tf.float32)
        found = sess.run(dropped)
    assert abs(np.mean(found == 0) - rate) < 0.002
    assert np.allclose(found[found != 0], 1 / (1 - rate), rtol=0.005)
