"""The same weights here and in Hugging Face's GPT-2: losses of ten steps, scores, texts.

    python benchmarks/parity.py --reference-python PATH   # has torch and transformers
    python benchmarks/parity.py --reference-python PATH --size 355M

Ten steps of Adam, each of two micro-batches of one window, recomputing on our side; then what the
trained models think of tokens that they never saw, and what they write: greedily, and by beam
search. PyTorch's Adam adds epsilon to another term than TensorFlow's; it is given the epsilon that
makes them equal.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile

import numpy as np
from generate import END, PUBLISHED, hugging_face_config, import_ours, write_run

STEPS = 10
RATE = 1e-4
LENGTH = 20
BEAMS = 4


def ours(folder: str, size: str, time: int) -> dict:
    """Losses, scores and texts; leaves the weights it began with in weights.npz."""
    import_ours()
    from gpt_2_simple import gpt_2, sample, session
    from gpt_2_simple.training import step
    from gpt_2_simple.training.settings import step_settings

    os.chdir(folder)
    write_run(size)
    sess = gpt_2.start_tf_sess()
    gpt_2.load_gpt2(sess)
    state = session.graph_state(sess)
    names = session.named_variables(state)
    np.savez("weights.npz", **dict(zip(names, sess.run(list(names.values())), strict=True)))
    windows = np.load("tokens.npy")
    config = step_settings(
        batch_size=1, accumulate_gradients=windows.shape[1], use_memory_saving_gradients=True
    )
    ops = step.build_train_ops(state, config, time)
    sess.run(ops.initialize_state)
    shape = ops.loss_weights.shape.as_list()
    share = np.full(shape, 1 / np.prod(shape), np.float32)
    losses = []
    for micro_batches in windows:
        sess.run(ops.reset_gradients)
        for tokens in micro_batches:
            sess.run(ops.add_micro_batch, {ops.tokens: tokens[np.newaxis], ops.loss_weights: share})
        losses.append(sess.run(ops.apply_gradients, {ops.learning_rate: RATE}))
    unseen = np.load("unseen.npy")
    scores = [scores.mean() for scores in sample.score_tokens(sess, unseen)]
    start = unseen[:1, :20].tolist()
    (greedy,) = sample.generate_tokens(
        sess, start, LENGTH, sample.SamplingParams(temperature=0), chunk=LENGTH
    )
    with sample.Search(sess, start, LENGTH, sample.Beams(BEAMS)) as search:
        while not search.done:
            search.step()
        best = search.best()[0]
    return {
        "losses": [float(loss) for loss in losses],
        "scores": [float(score) for score in scores],
        "greedy": greedy[0].tolist(),
        "beams": [found.tokens for found in best],
        "beam scores": [found.score for found in best],
    }


def torch_name(name: str) -> str:
    """The name in Hugging Face's model of our variable, such as 'model/h3/attn/c_attn/w'."""
    parts = name.split("/")[1:]
    if parts[0].startswith("h"):
        parts[0] = f"h.{parts[0][1:]}"
    ends = {"w": "weight", "g": "weight", "b": "bias", "wte": "wte.weight", "wpe": "wpe.weight"}
    return ".".join(["transformer", *parts[:-1], ends[parts[-1]]])


def theirs(folder: str, size: str) -> dict:
    """The same by Hugging Face."""
    import torch
    import transformers

    os.chdir(folder)
    config = hugging_face_config(size, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    net = transformers.GPT2LMHeadModel(config)
    weights = {
        torch_name(n): torch.tensor(np.squeeze(w)) for n, w in np.load("weights.npz").items()
    }
    missing, unexpected = net.load_state_dict(weights, strict=False)
    assert not unexpected, unexpected
    assert missing == ["lm_head.weight"], missing  # which is wte
    optimizer = torch.optim.Adam(net.parameters(), lr=RATE)
    losses = []
    for count, windows in enumerate(np.load("tokens.npy"), start=1):
        optimizer.zero_grad()
        loss = 0.0
        for tokens in windows:
            tokens = torch.tensor(tokens[np.newaxis])
            part = net(input_ids=tokens, labels=tokens).loss / len(windows)
            part.backward()
            loss += float(part.detach())
        optimizer.param_groups[0]["eps"] = 1e-8 / (1 - 0.999**count) ** 0.5
        optimizer.step()
        losses.append(loss)
    net.eval()
    unseen = torch.tensor(np.load("unseen.npy"))
    with torch.inference_mode():
        scores = [-float(net(input_ids=row[None], labels=row[None]).loss) for row in unseen]
        settings = {
            "do_sample": False, "max_new_tokens": LENGTH, "eos_token_id": None,
            "pad_token_id": END,
        }  # fmt: skip
        start = unseen[:1, :20]
        greedy = net.generate(start, **settings)[0, 20:]
        found = net.generate(
            start, num_beams=BEAMS, num_return_sequences=BEAMS, output_scores=True,
            return_dict_in_generate=True, **settings,
        )  # fmt: skip
    return {
        "losses": losses,
        "scores": scores,
        "greedy": greedy.tolist(),
        "beams": found.sequences[:, 20:].tolist(),
        "beam scores": found.sequences_scores.tolist(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--reference-python", required=True, help="has torch and transformers")
    parser.add_argument("--size", choices=PUBLISHED, default="124M")
    parser.add_argument("--time", type=int, default=1024, help="tokens in a window")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        print(json.dumps(theirs(options.serve, options.size)))
        return
    with tempfile.TemporaryDirectory() as folder:
        rng = np.random.default_rng(0)
        # Words of a text come unequally often: something to learn.
        words = rng.zipf(1.3, [STEPS, 2, options.time]) % END
        np.save(f"{folder}/tokens.npy", words)
        np.save(f"{folder}/unseen.npy", rng.zipf(1.3, [3, min(options.time, 300)]) % END)
        here = ours(folder, options.size, options.time)
        command = [options.reference_python, os.path.abspath(__file__), "--serve", folder]
        command += ["--reference-python", "-", "--size", options.size]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        there = json.loads(output.splitlines()[-1])
    print("step      ours  Hugging Face")
    for step, pair in enumerate(zip(here["losses"], there["losses"], strict=True), start=1):
        print("{:4d} {:9.5f} {:13.5f}".format(step, *pair))
    failed = False
    for name in ["losses", "scores", "beam scores"]:
        a, b = np.array(here[name]), np.array(there[name])
        worst = float(np.max(np.abs(a - b) / np.abs(b)))
        failed |= worst > 1e-4
        print(f"{name}: largest relative difference {worst:.1e}")
    for name in ["greedy", "beams"]:
        same = here[name] == there[name]
        failed |= not same
        print(f"{name}: {'the same tokens' if same else 'OTHER TOKENS'}")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
