"""Seconds a step of two workers with a core each, beside one worker with one core; over slow links.

    python benchmarks/distributed.py
    python benchmarks/distributed.py --micro-batches 2 --tokens 256
    python benchmarks/distributed.py --links 1 10    # as root on Linux: two network namespaces

Each worker computes the same: so many micro-batches, forward and backward, and the update; two
workers also sum their gradients. Steps take turns, one at a time, so that all meet the same
weather. Medians, without each one's first step. The bytes are those that the network's interface
counted, beside the ring's 2 (w - 1) / w x gradient bytes a worker. With --links, two workers in
namespaces of their own have a link of so many Gbit/s between them (tc's token bucket); their step
is compared with the formula: one worker's step + bytes / bandwidth.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VOCABULARY = 50257
SPACES = ("gpt2-a", "gpt2-b")
HOSTS = ("10.211.55.1", "10.211.55.2")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=512)
    # As finetune() has them: 5 micro-batches of one window.
    parser.add_argument("--tokens", type=int, default=1024, help="in a window")
    parser.add_argument("--micro-batches", type=int, default=5, help="of each worker, in a step")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--links", type=float, nargs="*", default=[], help="in Gbit/s")
    parser.add_argument("--serve", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve is not None:
        serve(arguments)
        return
    alone = [start(arguments, 0)]
    for link in [*arguments.links, None]:  # one pair at a time: three processes fit in 3 GB
        with contextlib.ExitStack() as stack:
            if link is None:
                name, hosts, prefixes = "two workers", ["127.0.0.1"] * 2, [[], []]
            else:
                name, hosts = f"two workers, {link:g} Gbit/s", HOSTS
                spaces = stack.enter_context(linked(link))
                prefixes = [["ip", "netns", "exec", space] for space in spaces]
            addresses = [f"{h}:{p}" for h, p in zip(hosts, free_ports(2), strict=True)]
            pair = [start(arguments, i, addresses, prefixes[i]) for i in range(2)]
            stack.callback(end, pair)
            report(take_turns({"one worker": alone, name: pair}, arguments.rounds), link)
    end(alone)


# --- the workers ----------------------------------------------------------------------------------


def serve(arguments: argparse.Namespace) -> None:
    """Takes a step for each line on standard input; answers with its seconds."""
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[arguments.serve % len(cores)]})
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    worker = Worker(arguments)
    print(json.dumps(worker.gradient_bytes), file=answers, flush=True)
    for _ in sys.stdin:
        print(json.dumps(worker.step()), file=answers, flush=True)


class Worker:
    """One process's model and its step."""

    def __init__(self, arguments: argparse.Namespace):
        sys.path.insert(0, str(ROOT))
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
        import numpy as np
        import tensorflow as tf

        import gpt_2_simple  # noqa: F401 (sets TF_ENABLE_ONEDNN_OPTS)
        from gpt_2_simple import session
        from gpt_2_simple.common.hparams import HParams
        from gpt_2_simple.distributed.collectives import Collectives
        from gpt_2_simple.training import step
        from gpt_2_simple.training.settings import step_settings

        size, time = arguments.width, arguments.tokens
        hparams = HParams(
            n_vocab=VOCABULARY, n_ctx=time, n_embd=size, n_head=size // 64, n_layer=arguments.layers
        )
        self.sess = session.start_tf_sess(threads=1)
        state = session.build_model(self.sess, hparams, [])
        self.count = arguments.micro_batches
        settings = step_settings(accumulate_gradients=max(2, self.count))
        self.ops = step.build_train_ops(state, settings, time)
        self.collectives = state.cluster and state.build_once(Collectives, state.cluster)
        with self.sess.graph.as_default():
            self.sess.run(tf.compat.v1.global_variables_initializer())
        variables = session.named_variables(state).values()
        self.gradient_bytes = sum(4 * int(np.prod(v.shape.as_list())) for v in variables)
        self.feed = {
            self.ops.tokens: np.random.default_rng(0).integers(0, VOCABULARY, [1, time]),
            self.ops.loss_weights: np.full([1, time - 1], 1 / (time - 1), np.float32),
        }

    def step(self) -> dict[str, float]:
        ops, times, sent = self.ops, [], sent_bytes()
        began = time.perf_counter()
        self.sess.run(ops.reset_gradients)
        for number in range(self.count):
            before = time.perf_counter()
            if self.collectives is not None and number == self.count - 1:
                self.collectives.run(self.sess, ops.sum_over_workers, self.feed)
            else:
                self.sess.run(ops.add_micro_batch, self.feed)
            times.append(time.perf_counter() - before)
        sent = sent_bytes() - sent
        self.sess.run(ops.apply_gradients, {ops.learning_rate: 1e-4})
        seconds = time.perf_counter() - began
        alone = statistics.mean(times[:-1]) if times[:-1] else times[-1]
        return {"seconds": seconds, "sums": max(times[-1] - alone, 0.0), "sent": sent}


def sent_bytes() -> int:
    """What all of this machine's, or namespace's, interfaces have sent; 0 where nothing tells."""
    files = Path("/sys/class/net").glob("*/statistics/tx_bytes")
    return sum(int(file.read_text()) for file in files)


# --- processes and links --------------------------------------------------------------------------


def start(arguments, index, addresses=(), prefix=()):
    environment = {**os.environ, "GPT2_START_SECONDS": "300"}
    if addresses:
        task = {"type": "worker", "index": index}
        cluster = {"worker": list(addresses)}
        environment["TF_CONFIG"] = json.dumps({"cluster": cluster, "task": task})
    names = ("layers", "width", "tokens", "micro_batches")
    options = [f"--{n.replace('_', '-')}={getattr(arguments, n)}" for n in names]
    return subprocess.Popen(
        [*prefix, sys.executable, __file__, "--serve", str(index), *options],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        env=environment,
    )  # fmt: skip


def end(group):
    for process in group:
        process.stdin.close()
    for process in group:
        process.wait()


def free_ports(count):
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


@contextlib.contextmanager
def linked(gigabits):
    """Two network namespaces with a link of so many Gbit/s; their names."""

    def ip(*words, space=None):
        where = ["-n", space] if space else []
        subprocess.run(["ip", *where, *words], check=True)

    for space in SPACES:
        ip("netns", "add", space)
    try:
        ip("link", "add", "gpt2-a", "netns", SPACES[0], "type", "veth",
           "peer", "name", "gpt2-b", "netns", SPACES[1])  # fmt: skip
        for space, host in zip(SPACES, HOSTS, strict=True):
            ip("addr", "add", f"{host}/24", "dev", space, space=space)
            ip("link", "set", space, "up", space=space)
            ip("link", "set", "lo", "up", space=space)
            rate = f"{gigabits * 1000:.0f}mbit"
            subprocess.run(
                ["tc", "-n", space, "qdisc", "add", "dev", space, "root", "tbf", "rate", rate,
                 "burst", "4mb", "latency", "100ms"], check=True,
            )  # fmt: skip
        yield SPACES
    finally:
        for space in SPACES:
            subprocess.run(["ip", "netns", "del", space], check=False)


ready = {}


def take_turns(groups, rounds):
    """Each group's steps: by group, then by step, what each of its workers said."""
    for group in groups.values():
        for process in group:
            if process not in ready:
                ready[process] = json.loads(process.stdout.readline())
    found = {name: [] for name in groups}
    for _ in range(rounds + 1):
        for name, group in groups.items():
            for process in group:
                process.stdin.write("\n")
                process.stdin.flush()
            found[name].append([json.loads(process.stdout.readline()) for process in group])
    return {name: steps[1:] for name, steps in found.items()}


def report(found, link):
    gradient = next(iter(ready.values()))
    medians = {
        name: statistics.median(max(said["seconds"] for said in step) for step in steps)
        for name, steps in found.items()
    }
    alone = medians["one worker"]
    ratios = [
        2 * ours[0]["seconds"] / max(said["seconds"] for said in theirs)
        for (ours, theirs) in zip(*found.values(), strict=True)
    ]
    name = next(name for name in found if name != "one worker")
    steps = found[name]
    sums = statistics.median(max(said["sums"] for said in step) for step in steps)
    # One interface of a machine counts what both workers send; each namespace has its own.
    sent = statistics.median(sum(said["sent"] for said in step) for step in steps)
    sent = sent / 2 if link is not None else sent / 4
    print(
        f"{name}: {medians[name]:.2f} s a step, one worker {alone:.2f}: "
        f"{statistics.median(ratios):.2f} x the tokens/s; "
        f"in sums {sums / medians[name]:.0%} of a step; sent by each worker {sent / 1e6:.0f} MB, "
        f"{sent / gradient:.2f} of the gradients' {gradient / 1e6:.0f} MB"
    )
    if link is not None:
        formula = alone + gradient / (link * 1e9 / 8)
        print(f"  formula: {formula:.2f} s a step; measured {medians[name] / formula:.2f} of it")


if __name__ == "__main__":
    main()
