"""Tokens a second of the server, and of generate() on the same weights, in turns.

    python benchmarks/serve.py
    python benchmarks/serve.py --rounds 5 --clients 32 --length 100
    python benchmarks/serve.py --n_layer 2 --n_embd 64 --n_vocab 1000     # a quick try
    python benchmarks/serve.py --reference-python PATH  # has transformers[serving], torch

Random float32 weights of 124M's sizes; prompts of 20 to 200 tokens, 100 new tokens each, greedy.
One process serves; the clients are threads of this one, each with a connection of its own. In
turns, in each round: all clients at once; generate(batch_size=clients) on prompts of the same
lengths; eight clients at once, for the time to the first token; one client alone; generate() of one
text. Medians. With --reference-python, `transformers serve` of an equal model takes its turns, too;
its prompts are texts of as many tokens.

    python benchmarks/serve.py --soak            # 5,000 requests
    python benchmarks/serve.py --soak 300 --n_layer 2 --n_embd 64

--soak instead starts `gpt_2_simple serve` in a process of its own, on a model with random weights
and a vocabulary of bytes, and sends requests of random shapes: one to four prompts, one or two
texts, streams, log-probabilities. It compares each greedy text with that of generate(), and tells
the server's memory after each tenth of the requests, and the time from the model's load to the
first answer.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import json
import os
import random
import statistics
import string
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import httpx
import numpy as np
import tensorflow as tf
from child_process import in_child

import gpt_2_simple as gpt2
from gpt_2_simple import session
from gpt_2_simple.generation.settings import SamplingParams
from gpt_2_simple.model import HParams
from gpt_2_simple.sample import generate_tokens
from gpt_2_simple.serving import api
from gpt_2_simple.serving.engine import Engine
from gpt_2_simple.serving.server import Server, address_of, bound_socket

NAME, N_CTX = "random", 1024
TOGETHER = "server, all clients, tokens/s"


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
    fill(sess, state)
    state.encoder = AnyVocabulary(hparams.n_vocab)
    return sess


def fill(sess, state) -> None:
    """Puts random weights into a session's model: near 1 for gains, so that texts differ."""
    rng = np.random.default_rng(0)
    with sess.graph.as_default():
        for name, variable in session.named_variables(state).items():
            value = tf.compat.v1.placeholder(tf.float32, variable.shape)
            mean = 1.0 if name.endswith("/g") else 0.0
            weights = rng.normal(mean, 0.1, variable.shape.as_list())
            sess.run(variable.assign(value), {value: weights})


def heads_of(options: argparse.Namespace) -> int:
    return max(1, options.n_embd // 64)


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


def ask_all(
    address: str, prompts: Sequence[Any], length: int, ask: Callable[..., float] = ask
) -> tuple[float, list[float]]:
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


# --- transformers serve ---------------------------------------------------------------------------

PEER = "hf"  # the folder, and the model's name


@contextlib.contextmanager
def peer_server(python: str) -> Iterator[str]:
    """The address of `transformers serve` with random weights of 124M's sizes."""
    with tempfile.TemporaryDirectory() as folder:
        writer = os.path.join(os.path.dirname(os.path.abspath(__file__)), "generate.py")
        command = [python, writer, "--serve", "write hugging face"]
        subprocess.run(command, cwd=folder, check=True, stderr=subprocess.DEVNULL)
        with bound_socket("127.0.0.1", 0) as listener:
            address = address_of(listener)
        command = [os.path.join(os.path.dirname(python), "transformers"), "serve", PEER,
                   "--continuous-batching", "--cb-num-blocks", "256",
                   "--cb-max-memory-percent", "0.9", "--device", "cpu",
                   "--dtype", "float32", "--host", "127.0.0.1",
                   "--port", address.rpartition(":")[2]]  # fmt: skip
        environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
        with open(os.path.join(folder, "log"), "w+") as log:
            process = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log)
            try:
                while not _answers(address):
                    if process.poll() is not None:
                        log.seek(0)
                        raise SystemExit(log.read()[-3000:])
                    time.sleep(0.5)
                yield address
            finally:
                process.terminate()
                process.wait()


def _answers(address: str) -> bool:
    try:
        return CLIENT.get(f"{address}/health").status_code == 200
    except httpx.TransportError:
        return False


def ask_peer(address: str, n_tokens: int, length: int) -> float:
    """As ask(), of a prompt of so many tokens, at least 1."""
    rng = random.Random(n_tokens)
    prompt = " ".join(rng.choices(string.ascii_letters, k=(n_tokens + 1) // 2))
    body = {"model": PEER, "prompt": prompt, "max_tokens": length, "temperature": 0, "stream": True}
    began, first, n_written, told = time.perf_counter(), None, 0, ""
    with CLIENT.stream("POST", f"{address}/v1/completions", json=body) as answer:
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                first, told = first or time.perf_counter() - began, line
                n_written = (json.loads(line[6:]).get("usage") or {}).get("completion_tokens", 0)
    if n_written != length:
        raise SystemExit(f"transformers serve wrote {n_written} tokens; its last line: {told}")
    return first


# --- --soak ---------------------------------------------------------------------------------------

LENGTHS = (1, 4, 16, 48)  # of the texts; generate() writes all texts of a length in one call


class Shape(NamedTuple):
    """A request of random shape, and the texts that it must get."""

    body: dict[str, Any]
    texts: list[str]


def write_model(folder: str, options: argparse.Namespace) -> None:
    """Writes a model with random weights and a vocabulary of bytes."""
    gpt2.create_gpt2(
        model_name=NAME, model_dir=folder, n_layer=options.n_layer, n_embd=options.n_embd,
        n_head=heads_of(options), n_ctx=N_CTX, seed=0,
    )  # fmt: skip
    with gpt2.start_tf_sess() as sess:
        gpt2.load_gpt2(sess, model_name=NAME, model_dir=folder)
        fill(sess, session.graph_state(sess))
        variables = session.named_variables(session.graph_state(sess))
        with sess.graph.as_default():
            saver = tf.compat.v1.train.Saver(dict(variables))
        saver.save(sess, os.path.join(folder, NAME, "model.ckpt"), write_meta_graph=False)


def random_shapes(folder: str, count: int) -> list[Shape]:
    """Requests, with the texts that generate() gives for their prompts.

    Raises SystemExit if the texts are too alike to show a mixed-up row.
    """
    rng, drawn = random.Random(0), []
    for _ in range(count):
        prompts = [random_text(rng) for _ in range(rng.choice((1, 1, 1, 2, 4)))]
        body = {
            "model": NAME, "prompt": prompts, "n": rng.choice((1, 1, 2)), "temperature": 0,
            "max_tokens": rng.choice(LENGTHS), "stream": rng.random() < 0.5,
            "logprobs": rng.choice((None, None, 0, 5)),
        }  # fmt: skip
        drawn.append(body)
    with gpt2.start_tf_sess() as sess:
        gpt2.load_gpt2(sess, model_name=NAME, model_dir=folder)
        found: dict[tuple[str, int], str] = {}
        for length in LENGTHS:
            bodies = [body for body in drawn if body["max_tokens"] == length]
            prompts = sorted({prompt for body in bodies for prompt in body["prompt"]})
            texts = gpt2.generate(
                sess, prefix=prompts, length=length, temperature=0, batch_size=None,
                include_prefix=False, stop_token="<|endoftext|>", return_as_list=True,
            ) if prompts else []  # fmt: skip
            found |= {(p, length): text for p, text in zip(prompts, texts, strict=True)}
    longest = [text for (_, length), text in found.items() if length == LENGTHS[-1]]
    if len(set(longest)) < 0.9 * len(longest):
        raise SystemExit("the model writes the same text for many prompts")
    return [
        Shape(b, [found[p, b["max_tokens"]] for p in b["prompt"] for _ in range(b["n"])])
        for b in drawn
    ]


def random_text(rng: random.Random) -> str:
    """Of 1 to 300 letters; most texts are short."""
    return "".join(rng.choices(string.ascii_letters + " ", k=int(300 ** rng.random())))


@contextlib.contextmanager
def server_process(folder: str, options: argparse.Namespace) -> Iterator[tuple[str, int]]:
    """The address of `gpt_2_simple serve`, and its process's number; prints when it was ready."""
    command = [sys.executable, "-m", "gpt_2_simple", "serve", "--model_name", NAME, "--model_dir",
               folder, "--port", "0", "--max_batch", str(options.clients), "--timeout", "3600",
               "--max_queue", str(8 * options.clients)]  # fmt: skip
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        began = time.perf_counter()
        for line in process.stdout:
            if line.startswith("Loading"):
                began = time.perf_counter()
            if " at http://" in line:
                break
        else:
            raise SystemExit("the server did not start")
        address = line.partition(" at ")[2].split()[0]
        CLIENT.get(f"{address}/health").raise_for_status()
        print(f"ready {time.perf_counter() - began:.1f} s after the model's load began")
        yield address, process.pid
    finally:
        process.terminate()
        process.communicate()


def texts_of(address: str, body: dict[str, Any]) -> list[str]:
    """The texts that the server gives for a request."""
    texts: dict[int, str] = {}
    with CLIENT.stream("POST", f"{address}/v1/completions", json=body) as answer:
        if answer.status_code != 200:
            raise SystemExit(f"status {answer.status_code}: {answer.read().decode()}")
        if body["stream"]:
            lines = [line[6:] for line in answer.iter_lines() if line.startswith("data: {")]
        else:
            lines = [answer.read().decode()]
    for line in lines:
        for choice in json.loads(line)["choices"]:
            texts[choice["index"]] = texts.get(choice["index"], "") + choice["text"]
    return [texts[index] for index in sorted(texts)]


def soak(options: argparse.Namespace) -> None:
    """Random shapes for a server of its own process: their texts, and its memory."""
    with tempfile.TemporaryDirectory() as folder:
        in_child(write_model, folder, options)
        shapes = in_child(random_shapes, folder, options.soak)
        different, memory = 0, []
        with server_process(folder, options) as (address, pid):
            tenth = -(-options.soak // 10)
            for part in (shapes[i : i + tenth] for i in range(0, options.soak, tenth)):
                with concurrent.futures.ThreadPoolExecutor(options.clients) as pool:
                    found = list(pool.map(lambda shape: texts_of(address, shape.body), part))
                for shape, texts in zip(part, found, strict=True):
                    # As gpt-2-simple's, generate's texts begin without line breaks.
                    if [text.lstrip("\n") for text in texts] != shape.texts:
                        different += 1
                        print(f"not generate's: {shape.body}: {texts} {shape.texts}")
                memory.append(resident_bytes(pid))
    n_texts = len({text for shape in shapes for text in shape.texts})
    print(f"{different} of {options.soak} requests got other texts than generate's "
          f"({n_texts} different texts)")  # fmt: skip
    megabytes = ", ".join(f"{m / 2**20:.0f}" for m in memory)
    print(f"memory after each tenth of the requests, MB: {megabytes}; "
          f"the last over the first {memory[-1] / memory[0]:.3f}")  # fmt: skip
    if different:
        raise SystemExit("only rounding, where two tokens are equally likely, may change a text")


def resident_bytes(pid: int) -> int:
    """A process's memory (Linux)."""
    with open(f"/proc/{pid}/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def tell(name: str, values: list[float], unit: str) -> None:
    low, high = min(values), max(values)
    print(f"{name:46s} {statistics.median(values):8.2f} {unit} ({low:.2f}-{high:.2f})")


def measure(options: argparse.Namespace) -> None:
    """Starts the servers, and lets them and generate() take turns."""
    hparams = HParams(options.n_vocab, N_CTX, options.n_embd, heads_of(options), options.n_layer)
    sess, rng = random_model(hparams), np.random.default_rng(1)
    began = time.perf_counter()
    engine = Engine(sess, max_batch=options.clients)
    engine.start()
    print(f"the engine is ready after {time.perf_counter() - began:.1f} s")
    found: dict[str, list[float]] = {}
    with contextlib.ExitStack() as stack:
        address = stack.enter_context(served(engine))
        python = options.reference_python
        peer = stack.enter_context(peer_server(python)) if python else None
        for number in range(options.rounds + 1):
            lengths = rng.integers(20, 201, options.clients).tolist()
            prompts = [rng.integers(0, options.n_vocab, n).tolist() for n in lengths]
            values = turn(sess, address, prompts, options.length)
            if peer is not None:
                values |= peer_turn(peer, lengths, options.length, values)
            if number:  # the first round warms up
                for name, value in values.items():
                    found.setdefault(name, []).append(value)
        for name, values_found in found.items():
            tell(name, values_found, "")
    engine.close()
    sess.close()


def turn(sess, address: str, prompts: list[list[int]], length: int) -> dict[str, float]:
    """One round of the server and of generate()."""
    together, _ = ask_all(address, prompts, length)
    batch = generate(sess, prompts, length)
    _, firsts = ask_all(address, prompts[:8], length)
    alone, _ = ask_all(address, prompts[:1], length)
    one = generate(sess, prompts[:1], length)
    return {
        TOGETHER: together,
        "generate, one batch, tokens/s": batch,
        "ratio": together / batch,
        "seconds to the first token, 8 clients": statistics.median(firsts),
        "server, one client, tokens/s": alone,
        "generate, one text, tokens/s": one,
        "ratio of one": alone / one,
    }


def peer_turn(
    address: str, lengths: list[int], length: int, ours: dict[str, float]
) -> dict[str, float]:
    """One round of transformers' server."""
    together, _ = ask_all(address, lengths, length, ask_peer)
    _, firsts = ask_all(address, lengths[:8], length, ask_peer)
    return {
        "transformers serve, all clients, tokens/s": together,
        "ours over it": ours[TOGETHER] / together,
        "its seconds to the first token, 8 clients": statistics.median(firsts),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--length", type=int, default=100)
    parser.add_argument(
        "--soak", type=int, nargs="?", const=5000, help="requests of random shapes, 10 or more"
    )
    parser.add_argument("--reference-python", help="has transformers[serving] and torch")
    parser.add_argument("--n_layer", type=int, default=12)
    parser.add_argument("--n_embd", type=int, default=768)
    parser.add_argument("--n_vocab", type=int, default=50257)
    options = parser.parse_args()
    sizes = options.n_layer, options.n_embd, options.n_vocab
    if options.reference_python and sizes != (12, 768, 50257):
        parser.error("--reference-python compares with a model of 124M's sizes")
    if options.soak:
        soak(options)
        return
    measure(options)


if __name__ == "__main__":
    main()
