"""A tiny model whose texts are varied, in a session, and requests to an engine for it."""

import contextlib
import dataclasses
import math
import threading
import time

import oracle
from small_model import loader

import gpt_2_simple as gpt2
from gpt_2_simple import session
from gpt_2_simple.generation.request import build_prompt
from gpt_2_simple.generation.settings import SamplingParams
from gpt_2_simple.generation.stopping import StopCriteria
from gpt_2_simple.serving.engine import Delta, Engine, EngineRequest, Failure
from gpt_2_simple.serving.server import Server, address_of, bound_socket

SIZES = {"n_layer": 2, "n_head": 2, "n_embd": 32, "n_ctx": 96}
NAME = "varied"


def weights(hparams):
    """Random weights whose greedy texts are not one letter."""
    found = oracle.random_weights(hparams, seed=1, scale=0.2)
    for name in found:
        found[name] *= 4 if name.endswith("wpe") else 3 if name.endswith("c_attn/w") else 1
    return found


def write_model(folder):
    """Writes the model to `folder`/varied."""
    gpt2.create_gpt2(model_name=NAME, model_dir=str(folder), seed=7, **SIZES)


def load(folder):
    """A session with the model, and what puts other weights into it."""
    sess = gpt2.start_tf_sess()
    gpt2.load_gpt2(sess, model_name=NAME, model_dir=str(folder))
    put = loader(sess)
    put(weights(session.graph_state(sess).hparams))
    return sess, put


@contextlib.contextmanager
def started_engine(folder, **limits):
    """A started engine for the model, which is written to the folder."""
    write_model(folder)
    sess, _ = load(folder)
    with sess, contextlib.closing(Engine(sess, **limits)) as engine:
        engine.start()
        yield engine


class Client:
    """Collects a request's events; `stop_after` tokens it goes away."""

    def __init__(self):
        self.events, self.over = [], threading.Event()
        self.n_open = None
        self.on_event = lambda event: None

    def __call__(self, event):
        self.events.append(event)
        if isinstance(event, Failure):
            self.over.set()
        elif isinstance(event, Delta) and event.finish_reason is not None:
            self.n_open -= 1
            if not self.n_open:
                self.over.set()
        self.on_event(event)

    def wait(self):
        assert self.over.wait(120)
        return self

    def deltas(self, index=0):
        return [e for e in self.events if isinstance(e, Delta) and e.number == index]

    def text(self, index=0):
        return "".join(delta.text for delta in self.wait().deltas(index))

    @property
    def failure(self):
        return next(e for e in self.wait().events if isinstance(e, Failure))


def request(sess, prompt="A", client=None, **changes):
    """An engine's request, with a client that listens."""
    encoder = session.graph_state(sess).encoder
    sampling = changes.pop("sampling", SamplingParams(temperature=0))
    client = Client() if client is None else client
    made = EngineRequest(
        prompt=build_prompt(prompt, encoder),
        sampling=sampling,
        length=20,
        stop=StopCriteria(None, changes.pop("stop", ()), sampling.stop_token),
        n_texts=1,
        seed=0,
        first_text=0,
        n_likeliest=-1,
        scores_prompt=False,
        streams=False,
        deadline=math.inf,
        listener=client,
    )
    made = dataclasses.replace(made, **changes)
    client.n_open = made.n_texts
    return made, client


def wait_until(condition, seconds=60):
    """Waits for what another thread does."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


@contextlib.contextmanager
def serving(app):
    """The address of a server for an ASGI application, and the server."""
    server = Server(app, grace_seconds=20)
    with bound_socket("127.0.0.1", 0) as listener:
        thread = threading.Thread(
            target=server.serve_until_stopped, args=[listener, lambda address: None]
        )
        thread.start()
        wait_until(lambda: server.started)
        try:
            yield address_of(listener), server
        finally:
            server.stop()
            thread.join()
