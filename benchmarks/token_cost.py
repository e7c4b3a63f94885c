"""What one generated token takes: graph nodes that run, those of them that compute, and time.

    python benchmarks/token_cost.py
    python benchmarks/token_cost.py --size 355M --batch 8 --precision bfloat16 --types
    python benchmarks/token_cost.py --gpu-operations  # on a CPU, the nodes that a GPU would run

The model has random weights. A trace of a chunk of decoding steps (RunMetadata) less that of one
step gives what a step runs. Nodes that compute are those that start a kernel on a GPU; the others
give a tensor another shape or name, read some of its rows, or steer the loop. The time in products
is that of the nodes that multiply matrices, traced; the time of a token is measured without a
trace.
"""

from __future__ import annotations

import argparse
import collections
import statistics
import sys
import time
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

STEPS = 21
# No kernel starts for them.
FREE = {
    "Const", "ControlTrigger", "Enter", "Exit", "ExpandDims", "Identity", "IdentityN", "LoopCond",
    "Merge", "NextIteration", "NoOp", "Placeholder", "ReadVariableOp", "Reshape", "Shape", "Size",
    "Slice", "Squeeze", "StopGradient", "Switch", "VarHandleOp", "_Arg", "_Retval", "_Send",
    "_Recv",
}  # fmt: skip


class Run(NamedTuple):
    """A run of the session: without a trace it has only seconds."""

    nodes: collections.Counter[str]  # by type
    product_seconds: float
    seconds: float


class TracedSession:
    """Generates with a session, and returns its run that decodes."""

    def __init__(self, size: str, batch: int, precision: str) -> None:
        import tensorflow as tf

        from gpt_2_simple import model, sample, session
        from gpt_2_simple.common.published import published_hparams

        self.tf, self.sample, self.batch = tf, sample, batch
        self.sess = session.start_tf_sess()
        state = session.build_model(self.sess, published_hparams(size), [], precision=precision)
        with self.sess.graph.as_default():
            self.sess.run([v.initializer for v in model.flatten(state.weights)])
        self.plain_run, self.sess.run = self.sess.run, self.run
        self.runs: list[Run] = []
        self.is_traced = False

    def run(self, fetches, feeds=None):
        began, options = time.perf_counter(), {}
        if self.is_traced:
            trace = self.tf.compat.v1.RunOptions(trace_level=3)
            options = {"options": trace, "run_metadata": self.tf.compat.v1.RunMetadata()}
        result = self.plain_run(fetches, feeds, **options)
        seconds = time.perf_counter() - began
        stats = options["run_metadata"].step_stats.dev_stats if options else []
        nodes, products = collections.Counter(), 0
        for node in (node for device in stats for node in device.node_stats):
            kind = self.kind_of(node)
            nodes[kind] += 1
            if "MatMul" in kind or "Einsum" in kind:
                products += node.op_end_rel_micros - node.op_start_rel_micros
        self.runs.append(Run(nodes, products / 1e6, seconds))
        return result

    def kind_of(self, node) -> str:
        """A node's type; a label that ends in it, as Grappler's own nodes have, comes first."""
        if " = " in node.timeline_label:
            return node.timeline_label.split(" = ", 1)[1].split("(", 1)[0]
        name = node.node_name.split(":")[0]
        try:
            return self.sess.graph.get_operation_by_name(name).type
        except (KeyError, ValueError):
            return name.rsplit("/", 1)[-1]

    def decode(self, steps: int) -> Run:
        self.runs.clear()
        greedy = self.sample.SamplingParams(temperature=0)
        prefixes = [[464]] * self.batch
        list(self.sample.generate_tokens(self.sess, prefixes, steps, greedy, chunk=steps))
        return max(self.runs, key=lambda run: (run.nodes.total(), run.seconds))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="124M")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--precision", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--gpu-operations", action="store_true")
    parser.add_argument("--types", action="store_true", help="count the nodes of each type")
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    if options.gpu_operations:
        from gpt_2_simple.generation import operations

        operations.has_gpu = lambda sess: True
    traced = TracedSession(options.size, options.batch, options.precision)
    seconds = []
    for _ in range(options.rounds + 1):
        many, one = traced.decode(STEPS), traced.decode(1)
        seconds.append((many.seconds - one.seconds) / (STEPS - 1))
    traced.is_traced = True
    many, one = traced.decode(STEPS), traced.decode(1)
    nodes = {kind: (n - one.nodes[kind]) / (STEPS - 1) for kind, n in many.nodes.items()}
    if options.types:
        for kind, n in sorted(nodes.items(), key=lambda item: -item[1]):
            print(f"{n:8.1f} {kind}{'  (starts no kernel)' if kind in FREE else ''}")
    computing = sum(n for kind, n in nodes.items() if kind not in FREE)
    products = (many.product_seconds - one.product_seconds) / (STEPS - 1)
    print(f"{options.size}, {options.precision}, batch {options.batch}; a token:")
    print(f"  {sum(nodes.values()):.0f} nodes, {computing:.0f} of them compute")
    print(
        f"  {1e3 * statistics.median(seconds[1:]):.1f} ms; traced, {1e3 * products:.1f} in products"
    )


if __name__ == "__main__":
    main()
