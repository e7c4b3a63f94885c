"""Settings in, a running server or its ASGI application out."""

from __future__ import annotations

import contextlib
import importlib
import os
from types import ModuleType
from typing import Any, NamedTuple

import tensorflow as tf

from .. import session
from ..common.report import say, warn
from ..common.settings import settings_function
from ..storage.load import load_gpt2
from ..storage.settings import LOADED_RUN
from .engine import Engine
from .settings import API_KEY_VARIABLE, LOCAL_HOSTS, AppSettings, ServeSettings

# After Ctrl-C or SIGTERM, texts have so many seconds to be finished.
GRACE_SECONDS = 30


@settings_function(ServeSettings)
def serve(settings: ServeSettings) -> None:
    """Serves runs and models over HTTP, until Ctrl-C or SIGTERM.

    It speaks OpenAI's completions API. Needs `pip install "gpt_2_simple[serve]"`.

    Args:
        settings: each of them is an argument.

    Raises:
        FileNotFoundError: there is no such run or model.
        ImportError: an extra package is missing.
        OSError: the port is taken.
        RuntimeError: the weights are not finite numbers.
        ValueError: a setting is out of range.
    """
    server_module = import_extra("server")
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(server_module.bound_socket(settings.host, settings.port))
        if settings.host not in LOCAL_HOSTS and _key_of(settings) is None:
            warn(
                f"host={settings.host!r} lets others reach this server, and it asks for no key; "
                "give api_key"
            )
        served = _load(settings, stack)
        server = server_module.Server(
            _make_app(settings, served, is_local=settings.host in LOCAL_HOSTS), GRACE_SECONDS
        )
        for engine in served.engines.values():
            engine.on_death = lambda _: server.stop()
        names = ", ".join(served.engines)
        server.serve_until_stopped(
            listener, lambda address: say(f"Serving {names} at {address} (Ctrl-C stops)")
        )
        broken = [engine.error for engine in served.engines.values() if engine.error]
        if broken:
            raise RuntimeError(broken[0])


@settings_function(AppSettings)
def app(settings: AppSettings) -> Any:
    """The ASGI application that serve() runs, for a server of your own or to mount it.

    The models are loaded at once; the application's shutdown (ASGI's lifespan) frees them.

    Args:
        settings: each of them is an argument.

    Returns:
        An ASGI application.

    Raises:
        FileNotFoundError, ImportError, RuntimeError, ValueError: as serve().
    """
    import_extra("api")  # before minutes of loading
    stack = contextlib.ExitStack()
    with stack:
        served = _load(settings, stack)
        close = stack.pop_all().close
    return _make_app(settings, served, is_local=False, on_shutdown=close)


class Served(NamedTuple):
    """Loaded models and their engines, by name."""

    engines: dict[str, Engine]


def _load(settings: AppSettings, stack: contextlib.ExitStack) -> Served:
    """Loads all runs and models, each into a session of its own; the stack frees them."""
    named = [("run_name", name) for name in settings.run_name or ()]
    named += [("model_name", name) for name in settings.model_name or ()]
    names = [name for _, name in named]
    if len(set(names)) < len(names):
        raise ValueError(f"two models have one name: {', '.join(names)}; serve each once")
    engines = {}
    for argument, name in named:
        sess = stack.enter_context(contextlib.closing(session.start_tf_sess()))
        of_run = argument == "run_name"
        load_gpt2(
            sess,
            checkpoint=settings.checkpoint if of_run else "latest",
            run_name=name if of_run else LOADED_RUN,
            checkpoint_dir=settings.checkpoint_dir,
            model_name=None if of_run else name,
            model_dir=settings.model_dir,
            precision=settings.precision,
        )
        engines[name] = start_engine(sess, settings, stack)
    return Served(engines)


def start_engine(
    sess: tf.compat.v1.Session, settings: AppSettings, stack: contextlib.ExitStack
) -> Engine:
    """An engine for a session's model; the stack closes it."""
    engine = Engine(sess, settings.max_batch, settings.max_queue)
    engine.start()
    stack.callback(engine.close)
    return engine


def _key_of(settings: AppSettings) -> str | None:
    return settings.api_key or os.environ.get(API_KEY_VARIABLE) or None


def _make_app(
    settings: AppSettings, served: Served, is_local: bool, on_shutdown: Any = None
) -> Any:
    api, key = import_extra("api"), _key_of(settings)
    limits = api.Limits(
        api_key=key,
        allow_origin=tuple(settings.allow_origin or ()),
        hosts=LOCAL_HOSTS if is_local and key is None else (),
        timeout=settings.timeout,
        log_prompts=settings.log_prompts,
    )
    return api.make_app(served.engines, limits, on_shutdown)


def import_extra(module: str) -> ModuleType:
    """A module of this room that needs extra packages."""
    try:
        return importlib.import_module(f".{module}", __package__)
    except ImportError as error:
        if error.name is None or error.name.startswith("gpt_2_simple"):
            raise
        raise ImportError(
            f'the server needs {error.name}: pip install "gpt_2_simple[serve]"', name=error.name
        ) from None
