"""What int8 costs in quality: perplexity and choices of a trained model, beside float32's.

    python benchmarks/int8_quality.py --vocabulary PATH --text PATH
    python benchmarks/int8_quality.py --vocabulary PATH --text PATH --steps 20 --n_embd 64   # a try

The vocabulary is GPT-2's (a folder with encoder.json and vocab.bpe). A model of 12 blocks is
trained on the text but its last tenth, and scores that tenth in windows of its whole context, by
the graph that also fills the cache for generating: in float32, and in int8. It tells the two
perplexities, and in how many places both find the same token the likeliest.

Then the same with outliers planted, as large GPT-2 models have them: two columns of each layer
norm's output become 32 times as large, and the next matrix's rows as much smaller. In float32 that
changes nothing; in int8 the other columns share what is left of a row's 127 steps.

Exits with 1 if a perplexity differs by more than 0.5%, or fewer than 97% of the choices agree.
"""

from __future__ import annotations

import argparse
import math
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
from child_process import in_child

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

N_CTX = 1024
MAX_PERPLEXITY_CHANGE, MIN_AGREEMENT = 0.005, 0.97
OUTLIERS, FACTOR = (3, 11), 32  # a power of two, so that nothing is rounded
PLAIN, PLANTED = "plain", "outliers planted"


class Quality(NamedTuple):
    """A model's scores of the held-out text."""

    perplexity: float
    choices: np.ndarray  # the likeliest token in each place


def train(options: argparse.Namespace) -> None:
    """Trains a model, and writes it as the runs PLAIN and PLANTED."""
    import gpt_2_simple as gpt2
    from gpt_2_simple import model, session
    from gpt_2_simple.common.published import N_VOCAB
    from gpt_2_simple.storage import checkpoint_ops
    from gpt_2_simple.storage.create import write_model

    folder = Path("models/random")
    folder.mkdir(parents=True)
    for name in ("encoder.json", "vocab.bpe"):
        shutil.copyfile(options.vocabulary / name, folder / name)
    sizes = model.HParams(N_VOCAB, N_CTX, options.n_embd, max(1, options.n_embd // 64), 12)
    write_model(str(folder), sizes, seed=0)
    with gpt2.start_tf_sess() as sess:
        gpt2.finetune(
            sess, "text.txt", options.steps, model_name="random", run_name=PLAIN,
            learning_rate=6e-4, warmup_steps=options.steps // 10, lr_schedule="cosine",
            accumulate_gradients=1, batch_size=4, sequence_length=256, sample_every=0,
            save_every=options.steps, seed=0, print_every=max(1, options.steps // 10),
        )  # fmt: skip
        shutil.copytree(f"checkpoint/{PLAIN}", f"checkpoint/{PLANTED}")
        state = session.graph_state(sess)
        plant_outliers(sess, state.weights)
        save = state.build_once(checkpoint_ops.build_save, *model.flatten(state.weights))
        path = f"checkpoint/{PLANTED}/model-{options.steps}"
        checkpoint_ops.write_checkpoint(sess, save, path)


def plant_outliers(sess, weights) -> None:
    """Makes some columns of the layer norms' outputs large, and undoes that in the next matrix."""
    for block in weights.blocks:
        for norm, layer in ((block.ln_1, block.c_attn), (block.ln_2, block.mlp_c_fc)):
            g, b, w = sess.run([norm.g, norm.b, layer.w])
            for i in OUTLIERS:
                g[i] *= FACTOR
                b[i] *= FACTOR
                w[..., i, :] /= FACTOR
            for variable, value in zip((norm.g, norm.b, layer.w), (g, b, w), strict=True):
                sess.run(variable.initializer, {variable.initializer.inputs[1]: value})


def measure(run_name: str, precision: str, n_windows: int) -> Quality:
    """Scores the held-out text with a run."""
    import gpt_2_simple as gpt2
    from gpt_2_simple import session
    from gpt_2_simple.generation.sequences import Generation, Sequence
    from gpt_2_simple.generation.settings import SamplingParams

    with gpt2.start_tf_sess() as sess:
        gpt2.load_gpt2(sess, run_name=run_name, precision=precision, verbose=0)
        text = Path("held_out.txt").read_text(encoding="utf-8")
        tokens = session.graph_state(sess).encoder.encode(text)
        scores, choices = [], []
        for start in range(0, min(n_windows * N_CTX, len(tokens) - N_CTX), N_CTX):
            window = Sequence(tokens[start : start + N_CTX + 1], SamplingParams(), 1)
            generation = Generation(sess)
            for piece in generation.join([window], n_likeliest=1):
                if piece.likeliest is not None:
                    scores += piece.likeliest.log_probabilities[0].tolist()
                    choices += piece.likeliest.top_tokens[0, :, 0].tolist()
            generation.free()
    return Quality(math.exp(-np.mean(scores)), np.array(choices))


def compare(run_name: str, n_windows: int) -> bool:
    """Prints a run's quality in float32 and in int8; whether both are near enough."""
    exact, found = (in_child(measure, run_name, p, n_windows) for p in ("float32", "int8"))
    change = found.perplexity / exact.perplexity - 1
    agreement = np.mean(exact.choices == found.choices)
    print(
        f"{run_name:17s} perplexity {exact.perplexity:.3f}, in int8 {found.perplexity:.3f} "
        f"({change:+.3%}); {agreement:.2%} of {len(exact.choices):,} choices agree"
    )
    return abs(change) <= MAX_PERPLEXITY_CHANGE and bool(agreement >= MIN_AGREEMENT)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--vocabulary", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=400, help="of 4 x 256 tokens")
    parser.add_argument("--n_embd", type=int, default=384)
    parser.add_argument("--windows", type=int, default=20, help="of 1,024 tokens, to score")
    options = parser.parse_args()
    options.vocabulary = options.vocabulary.resolve()
    text = options.text.read_text(encoding="utf-8")
    middle = len(text) * 9 // 10
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        Path("text.txt").write_text(text[:middle], encoding="utf-8")
        Path("held_out.txt").write_text(text[middle:], encoding="utf-8")
        in_child(train, options)
        is_good = [compare(run_name, options.windows) for run_name in (PLAIN, PLANTED)]
        os.chdir("/")
    print(f"{time.perf_counter() - began:.0f} s")
    if not all(is_good):
        raise SystemExit("int8 is further from float32 than promised")


if __name__ == "__main__":
    main()
