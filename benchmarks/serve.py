"""Tokens a second of the server, and of generate() on the same weights, in turns.

    python benchmarks/serve.py
    python benchmarks/serve.py --rounds 5 --clients 32 --length 100
    python benchmarks/serve.py --n_layer 2 --n_embd 64 --n_vocab 1000     # a quick try

Random float32 weights of 124M's sizes; prompts of 20 to 200 tokens, 100 new tokens each, greedy.
One process serves; the clients are threads of this one, each with a connection of its own. In
turns, in each round: all clients at once; generate(batch_size=clients) on prompts of the same
lengths; eight clients at once, for the time to the first token; one client alone; generate() of one
text. Medians. --soak N then sends N requests of random shapes, and compares the process's memory
after a tenth of them with that after all.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import json
import os
import random
import statistics
import threading
import time
from collections.abc import Iterator

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import httpx
import numpy as np
import tensorflow as tf

import gpt_2_simple as gpt2
from gpt_2_simple import session
from gpt_2_simple.generation.settings import SamplingParams
from gpt_2_simple.model import HParams
from gpt_2_simple.sample import generate_tokens
from gpt_2_simple.serving import api
from gpt_2_simple.serving.engine import Engine
from gpt_2_simple.serving.server import Server, address_of, bound_socket

NAME = "random"


class AnyVocabulary:
    """Stands in for a vocabulary: each token is written as its id, so any size will do."""

    end_of_text = None
    errors = "replace"

    def __init__(self, n_vocab: int) -> None:
        self.n_vocab = n_vocab

    def decode_bytes(self, ids) -> bytes:
        return "".join(f"{i} " for i in ids).encode()

    def decode(self, ids, surrogates: bool = True) -> str:
        return self.decode_bytes(ids).decode()


def random_model(hparams: HParams):
    """A session with random weights."""
    sess = gpt2.start_tf_sess()
    state = session.build_model(sess, hparams, [])
    rng = np.random.default_rng(0)
    with sess.graph.as_default():
        for variable in session.named_variables(state).values():
            value = tf.compat.v1.placeholder(tf.float32, variable.shape)
            weights = rng.normal(0, 0.05, variable.shape.as_list())
            sess.run(variable.assign(value), {value: weights})
    state.encoder = AnyVocabulary(hparams.n_vocab)
    return sess


@contextlib.contextmanager
def served(engine: Engine) -> Iterator[str]:
    """The address of a server for this engine."""
    server = Server(api.make_app({NAME: engine}, api.Limits(timeout=3600)), grace_seconds=5)
    with bound_socket("127.0.0.1", 0) as listener:
        started = threading.Event()
        thread = threading.Thread(
            target=server.serve_until_stopped, args=[listener, lambda _: started.set()]
        )
        thread.start()
        started.wait()
        yield address_of(listener)
        server.stop()
        thread.join()


# Made once: making one takes longer than a token.
CLIENT = httpx.Client(timeout=3600, verify=False, limits=httpx.Limits(max_connections=None))


def ask(address: str, prompt: list[int], length: int) -> float:
    """Streams one completion; returns the seconds to its first piece."""
    body = {"model": NAME, "prompt": prompt, "max_tokens": length, "temperature": 0, "stream": True}
    began, first, text = time.perf_counter(), None, ""
    with CLIENT.stream("POST", f"{address}/v1/completions", json=body) as answer:
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                first = first or time.perf_counter() - began
                text += json.loads(line[6:])["choices"][0]["text"]
    assert len(text.split()) == length, text
    return first


def ask_all(address: str, prompts: list[list[int]], length: int) -> tuple[float, list[float]]:
    """Tokens a second of clients that ask at the same time, and their first pieces' seconds."""
    with concurrent.futures.ThreadPoolExecutor(len(prompts)) as pool:
        began = time.perf_counter()
        firsts = list(pool.map(lambda prompt: ask(address, prompt, length), prompts))
        return len(prompts) * length / (time.perf_counter() - began), firsts


def generate(sess, prompts: list[list[int]], length: int) -> float:
    """Tokens a second of one batch."""
    began = time.perf_counter()
    for _ in generate_tokens(sess, prompts, length, SamplingParams(temperature=0)):
        pass
    return len(prompts) * length / (time.perf_counter() - began)


def soak(address: str, count: int, hparams: HParams, clients: int) -> None:
    """Random shapes; each greedy text of a prompt must be the same whenever it is asked for."""
    rng, texts, memory = random.Random(0), {}, []

    def one(seed: int) -> None:
        choice = random.Random(seed % (count // 4))  # each shape comes about four times
        prompt = [choice.randrange(hparams.n_vocab) for _ in range(choice.randint(1, 60))]
        length = choice.randint(1, 30)
        body = {"model": NAME, "prompt": prompt, "max_tokens": length, "temperature": 0}
        answer = CLIENT.post(f"{address}/v1/completions", json=body)
        text = answer.json()["choices"][0]["text"]
        assert texts.setdefault(seed % (count // 4), text) == text, "a text was mixed up"

    order = list(range(count))
    rng.shuffle(order)
    for part in (order[: count // 10], order[count // 10 :]):
        with concurrent.futures.ThreadPoolExecutor(clients) as pool:
            list(pool.map(one, part))
        memory.append(resident_bytes())
    after, at_end = (m / 2**20 for m in memory)
    print(f"{count} requests: {after:.0f} MB after a tenth, {at_end:.0f} MB ({at_end / after:.3f})")


def resident_bytes() -> int:
    """The process's memory (Linux)."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def tell(name: str, values: list[float], unit: str) -> None:
    low, high = min(values), max(values)
    print(f"{name:46s} {statistics.median(values):8.2f} {unit} ({low:.2f}-{high:.2f})")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--length", type=int, default=100)
    parser.add_argument("--soak", type=int, default=0, help="requests of random shapes")
    parser.add_argument("--n_layer", type=int, default=12)
    parser.add_argument("--n_embd", type=int, default=768)
    parser.add_argument("--n_vocab", type=int, default=50257)
    options = parser.parse_args()
    heads = max(1, options.n_embd // 64)
    hparams = HParams(options.n_vocab, 1024, options.n_embd, heads, options.n_layer)
    sess, rng = random_model(hparams), np.random.default_rng(1)
    began = time.perf_counter()
    engine = Engine(sess, max_batch=options.clients)
    engine.start()
    print(f"the engine is ready after {time.perf_counter() - began:.1f} s")
    found: dict[str, list[float]] = {}
    with served(engine) as address:
        for number in range(options.rounds + 1):
            lengths = rng.integers(20, 201, options.clients)
            prompts = [rng.integers(0, options.n_vocab, n).tolist() for n in lengths]
            together, _ = ask_all(address, prompts, options.length)
            batch = generate(sess, prompts, options.length)
            _, firsts = ask_all(address, prompts[:8], options.length)
            alone, _ = ask_all(address, prompts[:1], options.length)
            one = generate(sess, prompts[:1], options.length)
            if number:  # the first round warms up
                for name, value in (
                    (f"server, {options.clients} clients, tokens/s", together),
                    (f"generate, batch of {options.clients}, tokens/s", batch),
                    ("ratio", together / batch),
                    ("seconds to the first token, 8 clients", statistics.median(firsts)),
                    ("server, one client, tokens/s", alone),
                    ("generate, one text, tokens/s", one),
                    ("ratio of one", alone / one),
                ):
                    found.setdefault(name, []).append(value)
        for name, values in found.items():
            tell(name, values, "")
        if options.soak:
            soak(address, options.soak, hparams, options.clients)
    engine.close()
    sess.close()


if __name__ == "__main__":
    main()
