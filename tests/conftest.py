"""What several test files share: a tiny model on disk, and sessions that are closed again."""

import os
import shutil
import signal

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")

import hypothesis
import pytest

TINY = {"n_layer": 2, "n_head": 2, "n_embd": 16, "n_ctx": 32}

TEXT = "".join(f"{n} green bottles, hanging on the wall.\n" for n in range(200))


# Nothing is kept between runs: the repository may be a folder that nobody may write to.
hypothesis.settings.register_profile("keeps_nothing", database=None)
hypothesis.settings.load_profile("keeps_nothing")

# A shell's background job starts with SIGINT ignored, and a training leaves it so.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def tiny_source(tmp_path_factory):
    """A models folder that holds `tiny`; not to be changed."""
    import gpt_2_simple as gpt2

    folder = tmp_path_factory.mktemp("models")
    gpt2.create_gpt2(model_name="tiny", model_dir=str(folder), seed=7, **TINY)
    return folder


@pytest.fixture
def workplace(tiny_source, tmp_path, monkeypatch):
    """A current folder with models/tiny/ and text.txt, as a user would have it."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_source, tmp_path / "models")
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    return tmp_path


@pytest.fixture
def sess():
    """A session of its own, closed after the test."""
    import gpt_2_simple as gpt2

    session = gpt2.start_tf_sess()
    yield session
    session.close()


@pytest.fixture(scope="session")
def small_model_session():
    """A session that holds small_model's model."""
    import small_model

    session = small_model.started()  # no `with`: that would make its graph the default graph
    yield session
    session.close()


@pytest.fixture
def small_sess(small_model_session):
    """The same session for each test; none may leave a cache there."""
    from gpt_2_simple.generation import kv_cache

    yield small_model_session
    assert small_model_session.run(kv_cache.cache_ops(small_model_session).n_caches) == 0
