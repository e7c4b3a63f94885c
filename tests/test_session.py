"""Sessions, and what their graphs remember."""

import gc
import signal
import sys
import threading
import weakref

import pytest
import tensorflow as tf

import gpt_2_simple as gpt2
from gpt_2_simple import model, session

HPARAMS = model.HParams(n_vocab=11, n_ctx=8, n_embd=8, n_head=2, n_layer=1)
OTHER = model.HParams(n_vocab=11, n_ctx=8, n_embd=16, n_head=2, n_layer=1)


def test_each_session_has_its_own_graph():
    a, b = gpt2.start_tf_sess(), gpt2.start_tf_sess()
    assert len({a.graph, b.graph, tf.compat.v1.get_default_graph()}) == 3
    a.close()
    b.close()


def test_two_sessions_hold_two_models():
    with gpt2.start_tf_sess() as a, gpt2.start_tf_sess() as b:
        session.build_model(a, HPARAMS, [])
        session.build_model(b, OTHER, [])
        assert session.graph_state(a).hparams == HPARAMS
        assert session.graph_state(b).hparams == OTHER


def test_model_is_built_once_and_another_is_refused(sess):
    first = session.build_model(sess, HPARAMS, [])
    count = len(sess.graph.get_operations())
    assert session.build_model(sess, HPARAMS, []) is first
    assert len(sess.graph.get_operations()) == count
    with pytest.raises(ValueError, match="reset_session"):
        session.build_model(sess, OTHER, [])


def build_sum(*values):
    return tf.add_n(values)


def test_build_once_adds_the_operations_of_a_builder_and_its_arguments_once(sess):
    state = session.build_model(sess, HPARAMS, [])
    a = state.weights.wpe
    first = state.build_once(build_sum, a, a)
    count = len(sess.graph.get_operations())
    assert first.graph is sess.graph
    assert state.build_once(build_sum, a, a) is first
    assert len(sess.graph.get_operations()) == count
    assert state.build_once(build_sum, a) is not first
    assert state.build_once(tf.constant, 1.0, name="x") is not state.build_once(tf.constant, 1.0)


def test_state_without_a_model_is_a_clear_error(sess):
    state = session.graph_state(sess)
    for name in ("hparams", "weights", "gpus"):
        with pytest.raises(RuntimeError, match=r"holds no model; call load_gpt2\(\) or finetune"):
            getattr(state, name)


def test_concurrent_threads_build_one_model(sess):
    found = []
    threads = [
        threading.Thread(target=lambda: found.append(session.build_model(sess, HPARAMS, [])))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert len({id(state) for state in found}) == 1


def test_reset_session_makes_room_for_another_model():
    sess = gpt2.start_tf_sess()
    session.build_model(sess, HPARAMS, [])
    with gpt2.reset_session(sess) as fresh:
        session.build_model(fresh, OTHER, [])
        with pytest.raises(RuntimeError, match="start_tf_sess"):
            session.graph_state(sess)


def test_session_can_be_closed_twice():
    sess = gpt2.start_tf_sess()
    sess.close()
    sess.close()
    gpt2.reset_session(sess).close()


def test_closed_session_frees_its_graph():
    sess = gpt2.start_tf_sess()
    session.build_model(sess, HPARAMS, [])
    graph = weakref.ref(sess.graph)
    sess.close()
    del sess
    gc.collect()
    assert graph() is None


def test_session_of_the_user_holds_a_model():
    with tf.Graph().as_default(), tf.compat.v1.Session() as own:
        state = session.build_model(own, HPARAMS, [])
        assert state.weights.wte.graph is own.graph


def test_reset_default_graph_leaves_sessions_alone(sess):
    session.build_model(sess, HPARAMS, [])
    tf.compat.v1.reset_default_graph()
    assert session.graph_state(sess).hparams == HPARAMS


def test_start_tf_sess_limits_threads():
    with gpt2.start_tf_sess(threads=1) as sess:
        config = sess._config
    assert config.intra_op_parallelism_threads == 1
    assert config.inter_op_parallelism_threads == 1
    assert config.gpu_options.allow_growth


def test_start_tf_sess_runs_on_a_server():
    server = tf.distribute.Server.create_local_server()
    with gpt2.start_tf_sess(server=server) as sess, sess.graph.as_default():
        assert sess.run(tf.constant(3)) == 3


def test_get_available_gpus_names_devices(monkeypatch):
    class Gpu:
        name = "/physical_device:GPU:1"

    monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind: [Gpu()])
    assert gpt2.get_available_gpus() == ["/device:GPU:1"]


def test_exported_graph_leaves_out_the_graph_state(sess):
    session.build_model(sess, HPARAMS, [])
    assert "gpt_2_simple" not in str(sess.graph.get_all_collection_keys())


def test_two_threads_cannot_both_claim_a_session(sess):
    barrier, refused, claimed = threading.Barrier(8), [], []

    def claim(number):
        barrier.wait(60)
        try:
            with session.training(sess, f"run{number}"):
                claimed.append(number)
                done.wait(60)
        except RuntimeError as error:
            refused.append(str(error))
            if len(refused) == 7:
                done.set()

    done = threading.Event()
    threads = [threading.Thread(target=claim, args=[number]) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(claimed) == 1
    assert all(f"is training run{claimed[0]}" in text for text in refused)
    session.check_idle(sess)


def test_model_whose_building_was_interrupted_is_completed(sess, monkeypatch):
    make, names = model._block_variables, []

    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(model, "_block_variables", interrupt)
    with pytest.raises(KeyboardInterrupt):
        session.build_model(sess, HPARAMS, [])
    monkeypatch.setattr(model, "_block_variables", make)
    names = session.named_variables(session.build_model(sess, HPARAMS, []))
    with gpt2.start_tf_sess() as other:
        assert set(names) == set(session.named_variables(session.build_model(other, HPARAMS, [])))


@pytest.mark.parametrize("tenth", range(10))
def test_interrupted_anywhere_a_model_gets_the_names_of_a_whole_one(tenth):
    def build(sess, interrupt_at=None):
        """Counts TensorFlow's calls while the model is built; sends SIGINT in one of them."""
        calls = 0

        def count(frame, event, arg):
            nonlocal calls
            calls += event == "return"
            if calls == interrupt_at and event == "return":
                signal.raise_signal(signal.SIGINT)

        sys.setprofile(count)
        try:
            session.build_model(sess, HPARAMS, [])
        finally:
            sys.setprofile(None)
        return calls

    with gpt2.start_tf_sess() as whole:
        n_calls = build(whole)
        names = sorted(session.named_variables(session.graph_state(whole)))
    step = n_calls // 97  # 9 places in each tenth
    for place in range(1 + tenth * n_calls // 10, (tenth + 1) * n_calls // 10, step):
        with gpt2.start_tf_sess() as sess:
            with pytest.raises(KeyboardInterrupt):
                build(sess, place)
            state = session.build_model(sess, HPARAMS, [])
            assert sorted(session.named_variables(state)) == names


def test_forked_process_is_told_that_it_cannot_use_the_session(sess, monkeypatch):
    session.build_model(sess, HPARAMS, [])
    process = session.os.getpid()
    monkeypatch.setattr(session.os, "getpid", lambda: process + 1)
    with pytest.raises(RuntimeError, match=f"that of process {process}, .* 'spawn'"):
        gpt2.generate(sess)
