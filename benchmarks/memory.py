"""The smallest allocator limit under which each configuration trains, beside the plan's prediction.

    python benchmarks/memory.py                       # every row's own limit: does it fit?
    python benchmarks/memory.py --bisect              # the smallest limit that does
    python benchmarks/memory.py --rows 124M --bisect
    python benchmarks/memory.py --lora                # only the rows that train an adapter
    python benchmarks/memory.py --workers             # only the rows with several workers

A row: random weights of the real size are restored, two steps of 1 x 1,024 tokens are taken, and a
checkpoint is saved, in a process whose CPU allocator is TensorFlow's BFC allocator, a GPU's, with a
hard limit. 1558M takes one step where it accumulates, of two micro-batches; the bisection takes two
micro-batches a step where a row has more: all after the second find the accumulators as it did. The
limit that it finds is then tried with the whole row. The folder of random models is kept between
calls (124M takes 0.5 GB, 1558M 6.2 GB). A row with several workers needs the memory of all of them,
each under the limit; they share the optimizer's state.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gpt_2_simple.common import device_memory
from gpt_2_simple.distributed import launcher, tf_config

ROOT = Path(__file__).resolve().parents[1]
MEGABYTE = 2**20

TRIAL = """
import json, sys, time, resource
import numpy as np
import gpt_2_simple as gpt2
size, optimizer, accumulate, steps, precision, more = sys.argv[1:7]
sess = gpt2.start_tf_sess()
began = time.time()
result = gpt2.finetune(
    sess, "tokens.npz", model_name=size, steps=int(steps), optimizer=optimizer,
    accumulate_gradients=int(accumulate), use_memory_saving_gradients=True, sample_every=0,
    restore_from="fresh", run_name=f"{size}-{optimizer}-{accumulate}", seed=0, precision=precision,
    **json.loads(more),
)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
print(f"TRAINED seconds={time.time() - began:.0f} rss={peak} loss={result.loss:.3f}")
"""


class Row(NamedTuple):
    """A configuration, the limit it should train under, and what that stands for."""

    size: str
    optimizer: str
    accumulate: int
    limit: int
    card: str
    steps: int = 2
    precision: str = "float32"
    lora: str | None = None  # the type that holds the base of an adapter of rank 8 in all layers
    workers: int = 1

    @property
    def more_settings(self) -> dict[str, str | int]:
        """The settings of finetune() for an adapter, or for several workers."""
        if self.workers > 1:
            return {"shard_optimizer": True}
        if self.lora is None:
            return {}
        return {"lora_rank": 8, "lora_targets": "all", "base_precision": self.lora}

    @property
    def name(self) -> str:
        """The configuration in a few words."""
        lora = f"LoRA 8, {self.lora} base, " if self.lora else ""
        workers = f", {self.workers} workers" if self.workers > 1 else ""
        return f"{self.size}, {lora}{self.optimizer}, {self.accumulate}{workers}"


ROWS = [
    Row("124M", "adam", 5, 2700, "4 GB"),
    Row("355M", "adam", 5, 6700, "8 GB"),
    Row("774M", "adam", 5, 13900, "16 GB"),
    Row("774M", "adafactor", 1, 5300, "6 GB"),
    Row("1558M", "adafactor", 1, 9600, "11 GB"),
    Row("1558M", "adafactor", 2, 14900, "16 GB", steps=1),
    Row("124M", "adam", 1, 1100, "2 GB", lora="float32"),
    Row("774M", "adam", 1, 2500, "4 GB", lora="bfloat16"),
    Row("1558M", "adam", 1, 4400, "6 GB", lora="bfloat16"),
    Row("124M", "adam", 2, 2100, "4 GB", workers=2),
    Row("774M", "adam", 2, 10312, "11 GB", steps=1, workers=2),
]


def prepare(folder: Path, size: str) -> None:
    """A model of random weights in `folder`/models, and tokens to train it on."""
    import numpy as np
    from generate import write_vocabulary

    from gpt_2_simple.common.published import published_hparams
    from gpt_2_simple.storage import create

    model = folder / "models" / size
    if not (model / "checkpoint").exists():
        write_vocabulary(model)
        create.write_model(str(model), published_hparams(size), seed=0)
    tokens = np.random.default_rng(0).integers(0, 50257, 20000).astype(np.uint16)
    np.savez(folder / "tokens.npz", tokens)


def trains(folder: Path, row: Row, limit: int, log: Path) -> tuple[bool, str]:
    """Whether a row trains under a limit in MB, and the line that says how."""
    environment = os.environ | {
        "TF_CPU_ALLOCATOR_USE_BFC": "true",
        "TF_CPU_BFC_MEM_LIMIT_IN_MB": str(limit),
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "PYTHONPATH": str(ROOT),
    }
    arguments = [row.size, row.optimizer, str(row.accumulate), str(row.steps), row.precision]
    arguments.append(json.dumps(row.more_settings))
    with open(log, "a", encoding="utf-8") as output:
        output.write(f"== {row} limit={limit}\n")
        output.flush()
        start = output.tell()
        addresses = launcher.free_addresses(row.workers)
        processes = [
            subprocess.Popen(
                [sys.executable, "-c", TRIAL, *arguments],
                cwd=folder, stdout=output, stderr=subprocess.STDOUT,
                env=environment | as_worker(addresses, index),
            )
            for index in range(row.workers)
        ]  # fmt: skip
        status = max([abs(process.wait()) for process in processes])
    shutil.rmtree(folder / "checkpoint", ignore_errors=True)
    with open(log, encoding="utf-8", errors="replace") as written:
        written.seek(start)
        said = written.read()
    lines = [line for line in said.splitlines() if line.startswith("TRAINED")]
    if status == 0 and len(lines) == row.workers:
        return True, lines[-1].removeprefix("TRAINED ")
    if "ResourceExhausted" not in said and "OOM" not in said and "memory" not in said:
        raise RuntimeError(f"{row} failed for another reason than memory; see {log}")
    return False, ""


def as_worker(addresses: tuple[str, ...], index: int) -> dict[str, str]:
    """The variables of the environment of one of several workers."""
    return {tf_config.VARIABLE: tf_config.tf_config(addresses, index)} if addresses[1:] else {}


def bisect(folder: Path, row: Row, plan: float, log: Path, share: float) -> tuple[int, str]:
    """The smallest limit in MB that trains, to `share` of itself, and the line that says how.

    Looks near the plan first.
    """
    lines = {}

    def fits(limit: int) -> bool:
        found, lines[limit] = trains(folder, row, limit, log)
        said = lines[limit] if found else "no"
        print(f"    {row.name}: {limit} MB: {said}", flush=True)
        return found

    low, high = int(0.98 * plan), int(1.04 * plan)
    if fits(high):
        while fits(low):
            low, high = int(0.94 * low), low
    else:
        low, high = high, int(1.06 * high)
        while not fits(high):
            low, high = high, int(1.06 * high)
    while high - low > share * high:
        middle = (high + low) // 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high, lines[high]


CARDS = [4, 6, 8, 11, 16, 24]


def fits_table() -> str:
    """The README's table of what fits, from the plan: a row a card, a column a model."""
    from gpt_2_simple.common.published import PUBLISHED, published_hparams
    from gpt_2_simple.training import memory_plan as memory

    sizes = list(PUBLISHED)
    lines = [f"| card | {' | '.join(sizes)} |", "|---" * (len(sizes) + 1) + "|"]
    for card in CARDS:
        cells = []
        for size in sizes:
            limit = device_memory.usable_bytes(card)
            found = memory.fitting_plans(published_hparams(size), limit)
            cells.append(cell(found[0]) if found else "no")
        lines.append(f"| {card} GB | {' | '.join(cells)} |")
    return "\n".join(lines)


def cell(plan) -> str:
    """A plan in a few words."""
    words = [plan.settings.optimizer, f"accumulate {plan.settings.accumulate_gradients}"]
    if plan.settings.lora:
        words = [f"LoRA {plan.settings.lora_rank}, {plan.settings.base_precision} base"]
    if plan.settings.use_memory_saving_gradients:
        words.append("recompute")
    if plan.time < plan.hparams.n_ctx:
        words.append(f"windows of {plan.time}")
    return f"{', '.join(words)}: {plan.total / 2**30:.1f} GB"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", nargs="*", help="sizes to run, such as 124M 355M")
    parser.add_argument("--lora", action="store_true", help="only the rows that train an adapter")
    parser.add_argument("--workers", action="store_true", help="only the rows of several workers")
    parser.add_argument("--bisect", action="store_true")
    parser.add_argument("--table", action="store_true", help="print the README's table and end")
    parser.add_argument("--share", type=float, default=0.02, help="precision of the bisection")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "gpt2-sizes")
    arguments = parser.parse_args()
    if arguments.table:
        print(fits_table())
        return
    arguments.folder.mkdir(parents=True, exist_ok=True)
    log = arguments.folder / "memory.log"
    from gpt_2_simple.training import memory_plan as memory

    print(
        "| model, optimizer, micro-batches | goal, MB | trained under, MB | plan | floor | notes |"
    )
    for row in ROWS:
        if arguments.rows and row.size not in arguments.rows:
            continue
        if (arguments.lora and row.lora is None) or (arguments.workers and row.workers == 1):
            continue
        prepare(arguments.folder, row.size)
        plan = memory.memory_plan(
            row.size, optimizer=row.optimizer, accumulate_gradients=row.accumulate,
            use_memory_saving_gradients=True, precision=row.precision, workers=row.workers,
            **row.more_settings,
        )  # fmt: skip
        limit, few, fits, said = row.limit, None, True, ""
        if arguments.bisect:
            few = row._replace(accumulate=min(2, row.accumulate))
            limit, said = bisect(arguments.folder, few, plan.total / MEGABYTE, log, arguments.share)
        if few != row:
            fits, said = trains(arguments.folder, row, limit, log)
        print(
            f"| {row.name} | {row.limit:,} | {limit:,} "
            f"| {plan.total / MEGABYTE:,.0f} | {plan.floor / MEGABYTE:,.0f} "
            f"| {said if fits else 'DOES NOT FIT'} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
