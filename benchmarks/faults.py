"""Kills a training run at random moments, over and over, and counts the times it could not go on.

    python benchmarks/faults.py --kills 200
    python benchmarks/faults.py --kills 200 --lora    # a run that trains an adapter
    python benchmarks/faults.py --kills 50 --workers 2    # one of two workers is killed
    python benchmarks/faults.py --kills 200 --defects no-locks no-rename    # a foreign file system

Each time, a process of its own continues the run, saving after every step, until SIGKILL ends it at
a random moment of training and saving. A run is lost if the next process fails, or goes on from an
earlier step than had been saved. In the end the run is trained on in peace, and its weights are
compared, bit by bit, with those of a run of as many steps that nobody disturbed.

With several workers, one of them is killed. The run is lost, too, if another one does not end
within a minute, or not with the error that names the lost worker.
"""

from __future__ import annotations

import argparse
import os
import random
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import tensorflow as tf
from foreign_files import DEFECTS, simulate

import gpt_2_simple as gpt2
from gpt_2_simple.common import files
from gpt_2_simple.distributed import channel, launcher, tf_config
from gpt_2_simple.storage import adapter_files, checkpoint, runs

SIZES = {"n_layer": 1, "n_head": 1, "n_embd": 8, "n_ctx": 16}
TEXT = "".join(f"{n} green bottles, hanging on the wall.\n" for n in range(20))


# What else finetune() is told: the settings of an adapter, or of workers.
MORE: dict[str, object] = {}

# How long the workers that were not killed may take to end, in seconds.
END_WITHIN = 60
# The exit status of a worker that has lost another one.
LOST_ANOTHER = 3


def train(run_name: str, steps: int, save_every: int, tell: int | None = None) -> None:
    """Continues a run; writes each step's number to the pipe `tell`."""
    settings = {"accumulate_gradients": 2, **MORE}

    def on_step(entry: gpt2.history.Entry) -> None:
        if tell is not None:
            os.write(tell, b"%d\n" % entry.step)

    gpt2.finetune(
        gpt2.start_tf_sess(threads=1), "text.txt", steps, "faults", batch_size=2,
        learning_rate=0.01, run_name=run_name, sample_every=0,
        save_every=save_every, seed=1, sampling="epoch", val_split=0.2, val_every=3,
        max_checkpoints=2, on_step=on_step, verbose=0, **settings,
    )  # fmt: skip


class Child:
    """A process that does one thing; TensorFlow was imported, but not yet used, before it forks."""

    def __init__(self, function: Callable[[int], object]):
        self.read, write = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(self.read)
            try:
                function(write)
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
        os.close(write)
        self.steps: list[int] = []

    def listen(self, seconds: float) -> bool:
        """Notes the steps told within some time; ends early, with False, if the child has ended."""
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            if select.select([self.read], [], [], left)[0]:
                told = os.read(self.read, 1 << 16)
                if not told:
                    return False
                self.steps += map(int, told.split())
        return True

    def ends_within(self, seconds: float) -> bool:
        """Waits for its end."""
        return not self.listen(seconds)

    def await_step(self) -> bool:
        """Waits for the first step; False if the child ends before it."""
        while not self.steps:
            if not self.listen(0.01):
                return False
        return True

    def end(self, number: int | None = None) -> int:
        """Kills it, if a signal is given, and waits for its end: 0 if that was a good one."""
        if number is not None:
            os.kill(self.pid, number)
        _, status = os.waitpid(self.pid, 0)
        while self.listen(1):
            pass
        os.close(self.read)
        return os.waitstatus_to_exitcode(status)


def in_child(function: Callable[[], object]) -> None:
    """Does something in a process of its own, and stops if it fails."""
    if Child(lambda _: function()).end():
        sys.exit("failed, see above")


def start_workers(count: int, function: Callable[[int], object]) -> list[Child]:
    """Starts processes that do something together; one process if `count` is 1."""
    if count == 1:
        return [Child(function)]
    addresses = launcher.free_addresses(count)

    def as_worker(index: int) -> Callable[[int], None]:
        def work(tell: int) -> None:
            os.environ[tf_config.VARIABLE] = tf_config.tf_config(addresses, index)
            try:
                function(tell)
            except channel.WorkerLost:
                os._exit(LOST_ANOTHER)

        return work

    return [Child(as_worker(index)) for index in range(count)]


def train_in_peace(workers: int, run_name: str, steps: int, save_every: int) -> None:
    """Trains in processes of their own, and stops if one fails."""
    children = start_workers(workers, lambda _: train(run_name, steps, save_every))
    if any([child.end() for child in children]):
        sys.exit("failed, see above")


def kill_one(children: list[Child], rng: random.Random, span: float) -> list[str]:
    """Kills a process at a random moment, and waits for the others; returns what went wrong."""
    victim = rng.choice(children)
    # One in ten dies while it starts.
    alive = victim.listen(rng.uniform(0, 3)) if rng.random() < 0.1 else children[0].await_step()
    if not alive or not children[0].listen(rng.uniform(0, span)):
        return [f"a process ended by itself: {[child.end(signal.SIGKILL) for child in children]}"]
    faults = []
    os.kill(victim.pid, signal.SIGKILL)
    for index, child in enumerate(children):
        if child is victim:
            child.end()
        elif not child.ends_within(END_WITHIN):
            child.end(signal.SIGKILL)
            faults.append(f"worker {index} did not end")
        elif (status := child.end()) != LOST_ANOTHER:
            faults.append(f"worker {index} ended with status {status}")
    return faults


def kill_often(kills: int, span: float, workers: int, rng: random.Random) -> tuple[int, int]:
    """Trains and kills; returns how often the run was lost, and a save was hit."""
    lost = in_save = saved = 0
    folder = os.path.join("checkpoint", "killed")
    for count in range(1, kills + 1):
        children = start_workers(workers, lambda tell: train("killed", 10**6, 1, tell))
        faults = kill_one(children, rng, span)
        steps = children[0].steps
        left = os.listdir(folder) if os.path.exists(folder) else []
        in_save += any(name.startswith((".saving-", ".saved-")) for name in left)
        if steps and steps[0] <= saved:
            faults.append(f"step {saved} was saved, but {steps[0]} came next")
        # When a step is told, the one before it has been saved.
        saved = max([saved, *(step - 1 for step in steps)])
        names = checkpoint.named_checkpoints(folder)
        if saved and not checkpoint.is_whole(os.path.join(folder, names[-1])):
            faults.append(f"the file checkpoint names {names[-1]}, which is not whole")
        for fault in faults:
            print(f"kill {count}: {fault}")
        lost += bool(faults)
        if count % 10 == 0:
            print(f"{count} kills, {in_save} of them in a save, {lost} lost, step {saved}")
    return lost, in_save


def differing(run_name: str, other: str) -> list[str]:
    """The names of the weights and optimizer state in which two runs differ."""
    folders = [os.path.join("checkpoint", name) for name in (run_name, other)]
    ours, theirs = (tensors(checkpoint.latest_checkpoint(folder)) for folder in folders)
    return [name for name in ours if not np.array_equal(ours[name], theirs[name])]


def tensors(prefix: str) -> dict[str, np.ndarray]:
    """A checkpoint's weights, or adapter, and its optimizer state."""
    found: dict[str, np.ndarray] = {}
    prefixes = [prefix, runs.path_beside(prefix, runs.OPTIMIZER)]
    if adapter_files.is_adapter(prefix):
        found |= adapter_files.read_adapter(prefixes.pop(0)).tensors
    for path in prefixes:
        reader = tf.train.load_checkpoint(path)
        found |= {name: reader.get_tensor(name) for name in reader.get_variable_to_shape_map()}
    return found


def main() -> int:
    """Runs the benchmark; 0 if no run was lost."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--span", type=float, default=1.0, help="seconds from a first step to kill")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--lora", action="store_true", help="train an adapter")
    parser.add_argument("--workers", type=int, default=1, help="that train together")
    parser.add_argument(
        "--defects", nargs="+", choices=DEFECTS, default=[], help="of a simulated file system"
    )
    options = parser.parse_args()
    if options.lora:
        MORE.update(lora_rank=2, lora_targets="all")
    if options.workers > 1:
        MORE.update(accumulate_gradients=options.workers)
    sys.stdout.reconfigure(line_buffering=True)
    started = time.monotonic()
    simulate(options.defects)
    with files.temporary_folder() as place:
        os.chdir(place)
        with open("text.txt", "w", encoding="utf-8") as file:
            file.write(TEXT)
        in_child(lambda: gpt2.create_gpt2(model_name="faults", seed=1, **SIZES))
        rng = random.Random(options.seed)
        lost, in_save = kill_often(options.kills, options.span, options.workers, rng)
        train_in_peace(options.workers, "killed", 3, 1)
        last = runs.step_of(checkpoint.latest_checkpoint(os.path.join("checkpoint", "killed")))
        train_in_peace(options.workers, "peaceful", last, 10**6)
        differ = differing("killed", "peaceful")
        left = sorted(os.listdir(os.path.join("checkpoint", "killed")))
        os.chdir("/")
    left = [name for name in left if not name.startswith("events.")]
    print(f"left in the run's folder, but for events: {' '.join(left)}")
    print(
        f"{options.kills} kills, {in_save} of them in a save, {lost} runs lost; "
        f"after {last} steps {len(differ)} tensors differ from an undisturbed run's; "
        f"{time.monotonic() - started:.0f} s"
    )
    return 1 if lost or differ else 0


if __name__ == "__main__":
    sys.exit(main())
