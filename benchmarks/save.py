"""Times a save of 124M with its Adam state beside `dd conv=fsync` of as many bytes.

    python benchmarks/save.py --rounds 5 --folder .

Each round saves once and runs dd once, in turns, so that both meet the same disk. Nothing is
trained: the weights are random, the optimizer's state is zeros.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import tensorflow as tf

import gpt_2_simple as gpt2
from gpt_2_simple import model, session
from gpt_2_simple.common.published import published_hparams
from gpt_2_simple.storage import checkpoint_manager, runs
from gpt_2_simple.storage.optimizer_state import OptimizerState
from gpt_2_simple.training.optimizer import make_optimizer


def make_saves(sess: tf.compat.v1.Session, folder: str) -> checkpoint_manager.CheckpointManager:
    """The operations that save a new model and its Adam state, which the session then holds."""
    state = session.build_model(sess, published_hparams("124M"), [])
    variables = model.flatten(state.weights)
    with sess.graph.as_default():
        optimizer = make_optimizer("adam", 0.1)
        for variable in variables:
            optimizer.apply(tf.zeros(variable.shape), variable)
        slots = optimizer.variables()
        sess.run([variable.initializer for variable in [*variables, *slots]])
    return checkpoint_manager.CheckpointManager(
        sess, state, folder, 1, OptimizerState(sess, state, slots), None
    )


def timed_save(saves: checkpoint_manager.CheckpointManager, step: int) -> tuple[float, int]:
    """Seconds that a save takes, as the loop does it, and how many bytes it writes."""
    started = time.perf_counter()
    if not saves.are_weights_finite():
        sys.exit("the weights are not finite")
    saves.save(runs.RunState(step=step))
    seconds = time.perf_counter() - started
    names = [name for name in os.listdir(saves.folder) if f"-{step}." in name]
    return seconds, sum(os.path.getsize(os.path.join(saves.folder, name)) for name in names)


def timed_dd(folder: str, size: int) -> float:
    """Seconds that dd takes to write `size` bytes and to flush them."""
    path = os.path.join(folder, "dd")
    command = ["dd", "if=/dev/zero", f"of={path}", "bs=1M", f"count={size >> 20}", "conv=fsync"]
    started = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    seconds = time.perf_counter() - started
    os.remove(path)
    return seconds


def main() -> None:
    """Prints each round's times, and the medians."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", default=".", help="where to write, on the disk to be measured")
    options = parser.parse_args()
    ratios = []
    with tempfile.TemporaryDirectory(dir=options.folder) as folder, gpt2.start_tf_sess() as sess:
        saves = make_saves(sess, folder)
        timed_save(saves, 1)  # the first one builds the .meta file
        for step in range(2, 2 + options.rounds):
            seconds, size = timed_save(saves, step)
            saves.close()  # dd is not to share the disk with the removal of the step before
            by_dd = timed_dd(folder, size)
            ratios.append(seconds / by_dd)
            print(
                f"{size / 1e6:.0f} MB: save {seconds:.1f} s, dd {by_dd:.1f} s, "
                f"ratio {ratios[-1]:.2f}",
                flush=True,
            )
    print(f"median ratio {statistics.median(ratios):.2f}")


if __name__ == "__main__":
    main()
