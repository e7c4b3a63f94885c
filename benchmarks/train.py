"""Seconds a training step, side by side with Hugging Face on PyTorch: 124M, 1 x 1,024 tokens, Adam.

    python benchmarks/train.py --reference-python /path/to/python   # has torch and transformers
    python benchmarks/train.py --lora --reference-python ...        # adapters; has peft, too

Random float32 weights of the real sizes. Each variant runs in a process of its own; steps take
turns, one at a time, so that all meet the same weather. Medians, without each one's first step.
Prints the ratios, each variant's peak RSS, and its losses.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

from generate import PUBLISHED, hugging_face_config

ROOT = Path(__file__).resolve().parents[1]
TOKENS = 1024
VOCABULARY = 50257


class Ours:
    def __init__(self, size, recompute, **lora):
        sys.path.insert(0, str(ROOT))
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
        import numpy as np
        import tensorflow as tf

        import gpt_2_simple  # noqa: F401 (sets TF_ENABLE_ONEDNN_OPTS)
        from gpt_2_simple import session
        from gpt_2_simple.adapter import build_adapter
        from gpt_2_simple.common.published import published_hparams
        from gpt_2_simple.training import step
        from gpt_2_simple.training.settings import step_settings

        self.sess = session.start_tf_sess()
        hparams, held = published_hparams(size), lora.get("base_precision", "float32")
        state = session.build_model(self.sess, hparams, [], held)
        config = step_settings(
            accumulate_gradients=1, use_memory_saving_gradients=recompute, **lora
        )
        if config.lora:
            with self.sess.graph.as_default():
                state.adapter = build_adapter(hparams, [], config.lora)
        self.ops = step.build_train_ops(state, config, TOKENS)
        with self.sess.graph.as_default():
            self.sess.run(tf.compat.v1.global_variables_initializer())
        self.feed = {
            self.ops.tokens: np.random.default_rng(0).integers(0, VOCABULARY, [1, TOKENS]),
            self.ops.loss_weights: np.full([1, TOKENS - 1], 1 / (TOKENS - 1), np.float32),
            self.ops.learning_rate: 1e-4,
        }

    def step(self):
        return float(self.sess.run(self.ops.apply_gradients, self.feed))


class HuggingFace:
    def __init__(self, size, recompute):
        import numpy as np
        import torch
        import transformers

        config = hugging_face_config(
            size, use_cache=False, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
        )
        self.model = transformers.GPT2LMHeadModel(config)
        self.model.train()
        if recompute:
            self.model.gradient_checkpointing_enable()
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-4)
        tokens = np.random.default_rng(0).integers(0, VOCABULARY, [1, TOKENS])
        self.tokens = torch.tensor(tokens)

    def step(self):
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.model(input_ids=self.tokens, labels=self.tokens).loss
        loss.backward()
        self.optimizer.step()
        return float(loss)


class Peft(HuggingFace):
    def __init__(self, size, recompute, **lora):
        import peft
        import torch

        super().__init__(size, recompute)
        config = peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")
        if recompute:
            self.model.enable_input_require_grads()
        self.model = peft.get_peft_model(self.model, config)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.Adam(trained, lr=1e-4)


LORA = {"lora_rank": 8, "lora_targets": "all"}
NARROW = {**LORA, "base_precision": "bfloat16"}

FULL = {
    "ours": (Ours, False, {}),
    "ours, recomputing": (Ours, True, {}),
    "Hugging Face": (HuggingFace, False, {}),
    "Hugging Face, recomputing": (HuggingFace, True, {}),
}
ADAPTERS = {
    "ours": (Ours, False, {}),
    "ours, recomputing": (Ours, True, {}),
    "LoRA": (Ours, False, LORA),
    "LoRA, recomputing": (Ours, True, LORA),
    "LoRA, bfloat16 base": (Ours, False, NARROW),
    "LoRA, bfloat16 base, recomputing": (Ours, True, NARROW),
    "peft": (Peft, False, {}),
    "peft, recomputing": (Peft, True, {}),
}
VARIANTS = FULL | ADAPTERS


def serve(variant, size):
    """Takes a step for each line on standard input; answers with its seconds and loss."""
    kind, recompute, lora = VARIANTS[variant]
    trainer = kind(size, recompute, **lora)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    print(json.dumps("ready"), file=answers, flush=True)
    for _ in sys.stdin:
        began = time.perf_counter()
        loss = trainer.step()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        said = {"seconds": time.perf_counter() - began, "loss": loss, "peak": peak}
        print(json.dumps(said), file=answers, flush=True)


def start(variant, python, size):
    process = subprocess.Popen(
        [python, __file__, "--serve", variant, "--size", size],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    process.stdout.readline()
    return process


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--reference-python", help="has torch and transformers")
    parser.add_argument("--size", default="124M", choices=PUBLISHED)
    parser.add_argument(
        "--only", nargs="*", help="variants to run; the first is the base of ratios"
    )
    parser.add_argument("--lora", action="store_true", help="adapters of rank 8 in all layers")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--serve", choices=VARIANTS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(arguments.serve, arguments.size)
        return
    running = {}
    for variant, (kind, _, _) in (ADAPTERS if arguments.lora else FULL).items():
        python = sys.executable if kind is Ours else arguments.reference_python
        if python and (not arguments.only or variant in arguments.only):
            running[variant] = start(variant, python, arguments.size)
    found = {variant: [] for variant in running}
    for _ in range(arguments.rounds + 1):
        for variant, process in running.items():
            process.stdin.write("\n")
            process.stdin.flush()
            found[variant].append(json.loads(process.stdout.readline()))
    for process in running.values():
        process.stdin.close()
        process.wait()
    medians = {v: statistics.median(s["seconds"] for s in said[1:]) for v, said in found.items()}
    base = medians.get("Hugging Face", next(iter(medians.values())))
    print(f"{'variant':34}{'s/step':>8}{'ratio':>8}{'peak MB':>9}  losses")
    for variant, said in found.items():
        losses = " ".join(f"{s['loss']:.2f}" for s in said)
        print(f"{variant:34}{medians[variant]:8.2f}{medians[variant] / base:8.2f}"
              f"{said[-1]['peak']:9}  {losses}")  # fmt: skip
    if not {"ours", "ours, recomputing"} <= medians.keys():
        return
    print(f"recomputing costs us {medians['ours, recomputing'] / medians['ours']:.2f} of a step")
    if "Hugging Face, recomputing" in medians:
        ratio = medians["ours, recomputing"] / medians["Hugging Face, recomputing"]
        print(f"recomputing on both sides: {ratio:.2f} of theirs")


if __name__ == "__main__":
    main()
