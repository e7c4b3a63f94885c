"""The smallest allocator limit under which texts are generated, beside the plan's prediction.

    python benchmarks/generation_memory.py
    python benchmarks/generation_memory.py --sizes 355M --precisions float32 bfloat16

Random weights of the real size are loaded, and texts are generated, in a process whose CPU
allocator is TensorFlow's BFC allocator, a GPU's, with a hard limit. Loading needs the largest
variable twice, on the CPU: cases that need less than that are no test of the plan. int8 is missing:
on a CPU its weights lie in a mapped file and in oneDNN's own memory.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

ROOT = Path(__file__).resolve().parents[1]
MEGABYTE = 2**20
# Texts at the same time, tokens of a prefix, tokens to generate.
CASES = [(1, 900, 100), (8, 500, 100), (8, 10, 600), (20, 10, 300)]

TRIAL = """
import sys
import gpt_2_simple as gpt2
from gpt_2_simple import sample
size, precision, batch, prefix, length = *sys.argv[1:3], *map(int, sys.argv[3:])
sess = gpt2.start_tf_sess()
gpt2.load_gpt2(sess, model_name=size, precision=precision)
prefixes = [[(464 + 7 * row + i) % 50000 for i in range(prefix)] for row in range(batch)]
settings = sample.SamplingParams(temperature=0.7, top_k=40)
list(sample.generate_tokens(sess, prefixes, length, settings, seed=0))
print("GENERATED")
"""


def generates(folder: Path, arguments: list[str], limit: int) -> bool:
    """Whether a case runs under a limit in MB."""
    environment = os.environ | {
        "TF_CPU_ALLOCATOR_USE_BFC": "true",
        "TF_CPU_BFC_MEM_LIMIT_IN_MB": str(limit),
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run(
        [sys.executable, "-c", TRIAL, *arguments], cwd=folder, env=environment,
        capture_output=True, text=True, errors="replace", check=False,
    )  # fmt: skip
    if "GENERATED" in done.stdout:
        return True
    if not any(word in done.stderr for word in ("ResourceExhausted", "OOM", "memory")):
        raise RuntimeError(f"{arguments} failed for another reason than memory: {done.stderr}")
    return False


def bisect(folder: Path, arguments: list[str], plan: float, share: float) -> int:
    """The smallest limit in MB, to `share` of itself."""
    low, high = int(0.8 * plan), int(plan)
    while not generates(folder, arguments, high):
        low, high = high, int(1.06 * high)
    while high - low > share * high:
        middle = (high + low) // 2
        low, high = (low, middle) if generates(folder, arguments, middle) else (middle, high)
    return high


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="*", default=["124M"])
    parser.add_argument("--precisions", nargs="*", default=["float32", "bfloat16"])
    parser.add_argument("--share", type=float, default=0.03, help="precision of the bisection")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "gpt2-sizes")
    options = parser.parse_args()
    from memory import prepare

    from gpt_2_simple.generation.memory_plan import generation_memory_plan

    print("| model, precision | batch | prefix | length | generated under, MB | plan, MB |")
    print("|---" * 6 + "|")
    options.folder.mkdir(parents=True, exist_ok=True)
    for size in options.sizes:
        prepare(options.folder, size)
        for precision in options.precisions:
            for batch, prefix, length in CASES:
                plan = generation_memory_plan(
                    size, precision=precision, batch_size=batch, prefix_length=prefix, length=length
                )
                arguments = [size, precision, *map(str, (batch, prefix, length))]
                total = plan.total / MEGABYTE
                found = bisect(options.folder, arguments, total, options.share)
                print(
                    f"| {size}, {precision} | {batch} | {prefix} | {length} "
                    f"| {found:,} | {total:,.0f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
