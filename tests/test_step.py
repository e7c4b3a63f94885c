"""A training step against the oracle and against plain TensorFlow."""

import dataclasses

import numpy as np
import oracle
import pytest
import tensorflow as tf

from gpt_2_simple import model, session
from gpt_2_simple.training import loss_scale, step
from gpt_2_simple.training.settings import step_settings

HPARAMS = model.HParams(n_vocab=23, n_ctx=12, n_embd=8, n_head=2, n_layer=3)
TOKENS = np.random.default_rng(0).integers(0, 23, [2, 12])


def load(sess, weights, hparams=HPARAMS):
    state = session.build_model(sess, hparams, [])
    for name, variable in session.named_variables(state).items():
        give(sess, variable, weights[name])
    return state


def give(sess, variable, value):
    sess.run(variable.initializer, {variable.initializer.inputs[1]: value})


def train(sess, state, settings, steps, tokens=TOKENS, rate=0.05):
    """Losses of some steps, and the weights after them."""
    ops = step.build_train_ops(state, settings, tokens.shape[1])
    sess.run(ops.initialize_state)
    share = np.full(
        ops.loss_weights.shape, 1 / np.prod(ops.loss_weights.shape.as_list()), np.float32
    )
    losses = []
    for _ in range(steps):
        if ops.add_micro_batch is None:
            feed = {ops.tokens: tokens, ops.loss_weights: share, ops.learning_rate: rate}
            losses.append(sess.run(ops.apply_gradients, feed))
            continue
        sess.run(ops.reset_gradients)
        for part in np.split(tokens, len(tokens) // settings.batch_size):
            sess.run(ops.add_micro_batch, {ops.tokens: part, ops.loss_weights: share})
        if ops.gradients_finite is not None and not sess.run(ops.gradients_finite):
            losses.append(sess.run(ops.skip_step))
        else:
            losses.append(sess.run(ops.apply_gradients, {ops.learning_rate: rate}))
    names = session.named_variables(state)
    return losses, dict(zip(names, sess.run(list(names.values())), strict=True))


class Plain:
    """tf.gradients of the plain loss: whole logits, nothing recomputed."""

    def __init__(self):
        self.sess = tf.compat.v1.Session(graph=tf.Graph())
        with self.sess.graph.as_default():
            self.state = session.build_model(self.sess, HPARAMS, [])
            tokens = tf.constant(TOKENS, tf.int32)
            logits = model.model(HPARAMS, tokens[:, :-1], reuse=True)["logits"]
            losses = tf.nn.sparse_softmax_cross_entropy_with_logits(
                labels=tokens[:, 1:], logits=logits
            )
            self.variables = session.named_variables(self.state)
            found = tf.gradients(tf.reduce_mean(losses), list(self.variables.values()))
            self.found = [tf.convert_to_tensor(g) for g in found]

    def gradients(self, weights):
        load(self.sess, weights)
        return dict(zip(self.variables, self.sess.run(self.found), strict=True))


@pytest.fixture(scope="module")
def plain():
    found = Plain()
    yield found
    found.sess.close()


def adam(plain, weights, steps, rate):
    """The oracle's losses and the weights, after Adam in NumPy."""
    moments = {name: (np.zeros_like(w), np.zeros_like(w)) for name, w in weights.items()}
    losses = []
    for count in range(1, steps + 1):
        losses.append(oracle.loss(weights, HPARAMS, TOKENS))
        gradients = plain.gradients(weights)
        weights = dict(weights)
        for name, gradient in gradients.items():
            m, v = moments[name]
            m = 0.9 * m + 0.1 * gradient
            v = 0.999 * v + 0.001 * gradient**2
            moments[name] = m, v
            size = rate * np.sqrt(1 - 0.999**count) / (1 - 0.9**count)
            weights[name] = weights[name] - size * m / (np.sqrt(v) + 1e-8)
    return losses, weights


@pytest.mark.parametrize("save_memory", [False, True])
@pytest.mark.parametrize("batch_size", [2, 1])
def test_ten_steps_of_adam_equal_numpy_oracle(sess, plain, save_memory, batch_size):
    weights = oracle.random_weights(HPARAMS, scale=0.2)
    state = load(sess, weights)
    settings = step_settings(
        batch_size=batch_size,
        accumulate_gradients=2 // batch_size,
        use_memory_saving_gradients=save_memory,
    )
    losses, after = train(sess, state, settings, 10, rate=0.01)
    expected_losses, expected = adam(plain, weights, 10, 0.01)
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-4)
    for name in expected:
        np.testing.assert_allclose(after[name], expected[name], rtol=1e-2, atol=2e-3)


def test_block_is_updated_before_the_block_below_is_recomputed(sess):
    """So no more than a block's gradients are ever alive; seen on the graph that ran."""
    state = load(sess, oracle.random_weights(HPARAMS))
    settings = step_settings(batch_size=2, accumulate_gradients=1, use_memory_saving_gradients=True)
    ops = step.build_train_ops(state, settings, TOKENS.shape[1])
    sess.run(ops.initialize_state)
    share = np.full(ops.loss_weights.shape, 1 / TOKENS.size, np.float32)
    options = tf.compat.v1.RunOptions(
        trace_level=tf.compat.v1.RunOptions.FULL_TRACE, output_partition_graphs=True
    )
    seen = tf.compat.v1.RunMetadata()
    feed = {ops.tokens: TOKENS, ops.loss_weights: share, ops.learning_rate: 0.1}
    sess.run(ops.apply_gradients, feed, options, seen)
    ran = {
        stats.node_name: (stats.all_start_nanos, stats.all_start_nanos + stats.all_end_rel_nanos)
        for device in seen.step_stats.dev_stats
        for stats in device.node_stats
    }
    updated = {
        node.input[0]: ran[node.name][1]
        for part in seen.partition_graphs
        for node in part.node
        if node.op == "ResourceApplyAdam"
    }
    assert len(updated) == len(session.named_variables(state))
    for below in range(HPARAMS.n_layer - 1):
        copies = [
            start
            for name, (start, _) in ran.items()
            if name.startswith("train/gradients/recompute") and f"/h{below}/" in name
        ]
        above = [end for name, end in updated.items() if name.startswith(f"model/h{below + 1}/")]
        assert len(copies) > 10
        assert len(above) == 12
        assert max(above) <= min(copies)


@pytest.mark.parametrize("rows", [3, 4, 6, 11, 100])
def test_linear_cross_entropy_in_chunks_equals_whole_loss_and_gradients(sess, monkeypatch, rows):
    monkeypatch.setattr(step, "LOSS_ROWS", rows)
    rng = np.random.default_rng(1)
    h, wte = rng.standard_normal([11, 8]), rng.standard_normal([23, 8])
    labels, weights = rng.integers(0, 23, [11]), rng.random([11]) / 11
    with sess.graph.as_default():
        h, wte = tf.constant(h, tf.float32), tf.constant(wte, tf.float32)
        labels, weights = tf.constant(labels, tf.int32), tf.constant(weights, tf.float32)
        chunked = step.linear_cross_entropy(h, wte, labels, weights)
        losses = tf.nn.sparse_softmax_cross_entropy_with_logits(
            labels=labels, logits=tf.matmul(h, wte, transpose_b=True)
        )
        plain = tf.reduce_sum(losses * weights)
        found, expected = sess.run([[*chunked], [plain, *tf.gradients(plain, [h, wte])]])
        parts = []
        other = step.linear_cross_entropy(
            h, wte, labels, weights, on_part=lambda part: parts.append(part) or part.op
        )
        summed = sess.run(tf.add_n(parts))
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6 * np.abs(b).max())
    np.testing.assert_allclose(summed, expected[2], rtol=1e-6, atol=1e-6 * np.abs(summed).max())
    assert other.dwte is None


@pytest.mark.parametrize("optimizer", ["adam", "adafactor", "sgd"])
def test_losses_are_equal_with_recomputing_and_accumulating(optimizer):
    weights = oracle.random_weights(HPARAMS, scale=0.2)
    results = []
    for batch_size in (2, 1):
        for save_memory in (False, True):
            settings = step_settings(
                batch_size=batch_size,
                accumulate_gradients=2 // batch_size,
                use_memory_saving_gradients=save_memory,
                optimizer=optimizer,
            )
            with tf.Graph().as_default(), tf.compat.v1.Session() as sess:
                results.append(train(sess, load(sess, weights), settings, 3)[0])
    np.testing.assert_allclose(results, results[:1] * 4, rtol=1e-5)


@pytest.mark.parametrize(
    ("change", "trained"),
    [
        ({"only_train_transformer_layers": True}, ("model/h",)),
        ({"train_last_blocks": 1}, ("model/h2/",)),
        ({"train_last_blocks": 2}, ("model/h1/", "model/h2/")),
    ],
)
@pytest.mark.parametrize("save_memory", [False, True])
def test_frozen_variables_stay_and_have_no_optimizer_state(sess, change, trained, save_memory):
    weights = oracle.random_weights(HPARAMS)
    state = load(sess, weights)
    settings = step_settings(
        batch_size=2, accumulate_gradients=1, use_memory_saving_gradients=save_memory, **change
    )
    _, after = train(sess, state, settings, 2)
    for name, value in weights.items():
        assert np.array_equal(after[name], value) is not name.startswith(trained), name
    ops = step.build_train_ops(state, settings, 12)
    slots = [v.op.name for v in ops.state_variables if "/m/" in v.op.name]
    assert len(slots) == sum(name.startswith(trained) for name in weights)
    assert all(any(part in slot for part in trained) for slot in slots)


def test_backward_pass_stops_at_frozen_blocks(sess):
    state = load(sess, oracle.random_weights(HPARAMS))
    settings = step_settings(batch_size=2, accumulate_gradients=1, train_last_blocks=1)
    before = {op.name for op in sess.graph.get_operations()}
    step.build_train_ops(state, settings, 12)
    made = [op.name for op in sess.graph.get_operations() if op.name not in before]
    gradients = [name for name in made if "gradients" in name]
    assert any("/h2/" in name for name in gradients)
    assert not any("/h1/" in name or "/h0/" in name for name in gradients)


def test_recomputed_dropout_equals_stored_dropout(sess):
    """Recomputed with other random numbers, the gradients would differ from the stored ones'."""
    weights = oracle.random_weights(HPARAMS, scale=0.2)
    results = []
    for save_memory in (False, True):
        settings = step_settings(batch_size=2, accumulate_gradients=1, dropout=0.3,
                            use_memory_saving_gradients=save_memory)  # fmt: skip
        with tf.Graph().as_default(), tf.compat.v1.Session() as own:
            results.append(train(own, load(own, weights), settings, 4)[0])
    np.testing.assert_allclose(results[0], results[1], rtol=1e-5)
    plain = train(
        sess, load(sess, weights), step_settings(batch_size=2, accumulate_gradients=1), 4
    )[0]
    assert abs(plain[0] - results[0][0]) > 1e-3


def test_dropout_seed_decides_the_masks(sess):
    state = load(sess, oracle.random_weights(HPARAMS))
    settings = step_settings(batch_size=2, accumulate_gradients=2, dropout=0.5)
    ops = step.build_train_ops(state, settings, 12)
    sess.run(ops.initialize_state)
    share = np.full(ops.loss_weights.shape, 1 / 22, np.float32)

    def loss(seed):
        sess.run(ops.reset_gradients)
        feed = {ops.tokens: TOKENS, ops.loss_weights: share, ops.dropout_seed: seed}
        sess.run(ops.add_micro_batch, feed)
        return sess.run(ops.apply_gradients, {ops.learning_rate: 0.0})

    assert loss([1, 2]) == loss([1, 2])
    assert len({float(loss([seed, 5])) for seed in range(6)}) == 6


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_half_precision_reaches_the_float32_loss(precision):
    hparams = dataclasses.replace(HPARAMS, n_embd=16)
    tokens = np.tile(np.random.default_rng(2).integers(0, 23, [2, 6]), 2)
    weights = oracle.random_weights(hparams, scale=0.05)
    last = {}
    for name in ("float32", precision):
        settings = step_settings(batch_size=2, accumulate_gradients=1, precision=name,
                            use_memory_saving_gradients=True)  # fmt: skip
        with tf.Graph().as_default(), tf.compat.v1.Session() as sess:
            losses, after = train(sess, load(sess, weights, hparams), settings, 50, tokens, 0.002)
            last[name] = losses[-1]
            assert all(value.dtype == np.float32 for value in after.values())
    assert last["float32"] < 2.9
    assert abs(last[precision] / last["float32"] - 1) < 0.02


def test_float16_overflow_skips_the_step_and_halves_the_loss_scale(sess, monkeypatch):
    monkeypatch.setattr(loss_scale, "GOOD_STEPS", 3)
    weights = oracle.random_weights(HPARAMS)
    state = load(sess, weights)
    settings = step_settings(batch_size=2, accumulate_gradients=1, precision="float16")
    ops = step.build_train_ops(state, settings, 12)
    sess.run(ops.initialize_state)
    (scale,) = [v for v in ops.state_variables if v.op.name.endswith("loss_scale/scale")]
    give(sess, scale, 2.0**40)
    share = np.full(ops.loss_weights.shape, 1 / 22, np.float32)

    def attempt():
        sess.run(ops.reset_gradients)
        sess.run(ops.add_micro_batch, {ops.tokens: TOKENS, ops.loss_weights: share})
        finite = sess.run(ops.gradients_finite)
        loss = sess.run(ops.apply_gradients if finite else ops.skip_step, {ops.learning_rate: 0.01})
        assert np.isfinite(loss)
        return finite

    assert not attempt()
    assert sess.run(scale) == 2.0**39
    wte = sess.run(state.weights.wte)
    assert np.array_equal(wte, weights["model/wte"])
    give(sess, scale, 1024.0)
    assert [bool(attempt()) for _ in range(3)] == [True] * 3
    assert sess.run(scale) == 2048.0


def test_gradient_clip_limits_the_global_norm(plain):
    weights = oracle.random_weights(HPARAMS, scale=0.2)
    gradients = plain.gradients(weights).values()
    norm = np.sqrt(sum((g.astype(np.float64) ** 2).sum() for g in gradients))
    moves = {}
    for clip in (0.0, norm * 2, norm / 4):
        settings = step_settings(
            batch_size=2, accumulate_gradients=1, optimizer="sgd", gradient_clip=float(clip)
        )
        with tf.Graph().as_default(), tf.compat.v1.Session() as sess:
            _, after = train(sess, load(sess, weights), settings, 1, rate=0.1)
        moves[clip] = after["model/h0/mlp/c_fc/w"] - weights["model/h0/mlp/c_fc/w"]
    np.testing.assert_allclose(moves[norm * 2], moves[0.0], rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(moves[norm / 4] * 4, moves[0.0], rtol=1e-3, atol=1e-6)


def test_weight_decay_leaves_biases_and_gains(sess):
    weights = oracle.random_weights(HPARAMS)
    state = load(sess, weights)
    settings = step_settings(
        batch_size=2, accumulate_gradients=1, optimizer="sgd", weight_decay=0.5
    )
    ops = step.build_train_ops(state, settings, 12)
    sess.run(ops.initialize_state)
    none = np.zeros(ops.loss_weights.shape, np.float32)  # no loss, no gradient: decay alone moves
    sess.run(
        ops.apply_gradients, {ops.tokens: TOKENS, ops.loss_weights: none, ops.learning_rate: 0.1}
    )
    for name, variable in session.named_variables(state).items():
        factor = 1.0 if name.endswith(("/b", "/g")) else 0.95
        np.testing.assert_allclose(sess.run(variable), weights[name] * factor, rtol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"precision": "int8"}, "precision='int8' must be one of"),
        ({"dropout": 1.0}, "dropout=1.0"),
        ({"dropout": -0.1}, "dropout=-0.1"),
        ({"weight_decay": -1}, "weight_decay=-1"),
        ({"gradient_clip": float("nan")}, "gradient_clip=nan"),
        ({"train_last_blocks": 0}, "train_last_blocks=0"),
    ],
)
def test_step_settings_out_of_range_raise(change, message):
    with pytest.raises(ValueError, match=message):
        step_settings(**change)


def test_train_last_blocks_above_the_models_blocks_raises(sess):
    state = session.build_model(sess, HPARAMS, [])
    with pytest.raises(ValueError, match="the model has 3 blocks"):
        step.build_train_ops(state, step_settings(train_last_blocks=4), 12)


def test_building_a_step_keeps_the_users_checkpoints_collection(workplace, sess):
    import gpt_2_simple as gpt2

    with sess.graph.as_default():
        mine = tf.constant(1.0)
        tf.compat.v1.add_to_collection("checkpoints", mine)
    gpt2.finetune(
        sess, "text.txt", model_name="tiny", steps=2, val_split=0.2, val_every=1, sample_every=0,
        use_memory_saving_gradients=True,
    )  # fmt: skip
    assert sess.graph.get_collection("checkpoints") == [mine]
