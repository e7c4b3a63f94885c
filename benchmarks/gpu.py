"""Whether the library keeps its promises on this machine's GPU: one command, under ten minutes.

    python benchmarks/gpu.py
    python benchmarks/gpu.py --models 124M 355M --minutes 4
    python benchmarks/gpu.py --reference-python PATH    # has torch and transformers
    python benchmarks/gpu.py --cpu                      # no GPU: a small model tries the script

Random weights of the real sizes; nothing is downloaded or written. It prints tables to paste, then
each promise and whether it held:

- Logits and ten training steps are the CPU's, and so are greedy tokens, each the likeliest by the
  CPU's logits; 124M, windows of 256 tokens.
- Training fits into the memory that memory_plan counts: each configuration runs in a process of its
  own whose allocator has the plan's total as its limit. The peak beside it is that of the tensors
  (tf.config.experimental.get_memory_info), without what the allocator loses between them.
- With --reference-python, training and generating are no slower than transformers on the same card.

Each model has the configuration that changes training least among those that fit on the card, in
three precisions, and its recomputing variant in float32. Windows have 1,024 tokens; seconds are
medians. Generating writes 100 tokens, top_k=40. In float32, matrix products may use TF32 on both
sides, as is TensorFlow's default. What there was no time for is left out, and said so.

Exits with 1 if a promise did not hold or could not be checked, with 2 if there is no GPU.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

from gpt_2_simple.common.hparams import PRECISIONS, HParams
from gpt_2_simple.common.published import PUBLISHED

WORKER = Path(__file__).resolve().with_name("gpu_worker.py")
MEGABYTE = 2**20
OUT_OF_MEMORY = "out of memory"
ABORTED = f"status {-signal.SIGABRT}"
OUT_OF_TIME = "no time left"

# (variant, precision of the activations, whether matrix products may use TF32)
VARIANTS = [
    ("float32 without TF32", "float32", False),
    ("float32", "float32", True),
    ("bfloat16", "bfloat16", True),
    ("float16", "float16", True),
]


class Tolerance(NamedTuple):
    """How far a variant may be from the CPU's float32.

    Attributes:
        logits: of the norm of the logits.
        losses: of a loss, the largest relative difference in ten steps.
        below: by how much a greedy token's logit may be below the largest.
    """

    logits: float
    losses: float
    below: float = 0.0


TOLERANCES = {
    "float32 without TF32": Tolerance(1e-4, 1e-4, 1e-2),
    "float32": Tolerance(5e-3, 1e-3, 0.1),
    "bfloat16": Tolerance(3e-2, 5e-3),
    "float16": Tolerance(5e-3, 1e-3),
}

# A task for which less is left is not begun: TensorFlow alone takes as long to start.
MIN_SECONDS = 5.0

# Ours may take this much of their time: two medians of equal speed differ by less.
NOT_SLOWER = 1.03


@dataclasses.dataclass(frozen=True)
class Promise:
    """What the library promises, what was measured, and whether that holds.

    `held` is None if there was no time to check.
    """

    text: str
    measured: str
    held: bool | None

    def __str__(self) -> str:
        verdict = {True: "held", False: "DID NOT HOLD", None: "not checked"}[self.held]
        return f"{verdict:13} {self.text}: {self.measured}"


class Outcome(NamedTuple):
    """The lines of a worker, and why there are no more; None if it ended well."""

    lines: list[dict[str, Any]]
    error: str | None


class Sizes(NamedTuple):
    """What is measured: with how large a model, for how long.

    Attributes:
        models: hyper-parameters by name.
        compared: the model that is compared with the CPU.
        compared_time: tokens in a window of the comparison.
        length: tokens of a generated text.
        runs: timed runs, at most.
        seconds: no run begins after so many.
    """

    models: dict[str, HParams]
    compared: HParams
    compared_time: int
    length: int = 100
    runs: int = 5
    seconds: float = 6.0


SMALL = HParams(n_vocab=5003, n_ctx=256, n_embd=128, n_head=4, n_layer=2)
ON_GPU = Sizes(PUBLISHED, PUBLISHED["124M"], 256)
ON_CPU = Sizes({"small": SMALL}, SMALL, 128, length=20, runs=2)
# The memory that --cpu gives the small model: enough for its best configuration.
CPU_LIMIT = 1024 * MEGABYTE


class Bench:
    """The device, the time that is left, and the promises checked so far."""

    def __init__(self, options: argparse.Namespace, folder: str) -> None:
        self.options, self.folder = options, folder
        self.sizes = ON_CPU if options.cpu else ON_GPU
        self.device = "CPU:0" if options.cpu else "GPU:0"
        self.deadline = time.monotonic() + 60 * options.minutes
        self.promises: list[Promise] = []
        self.left_out: list[str] = []
        self.n_tasks = 0

    def check(self, text: str, measured: str, held: bool | None) -> None:
        self.promises.append(Promise(text, measured, held))

    def run(self, what: str, task: dict[str, Any], python: str | None = None) -> Outcome:
        """Runs a task of the worker, on the device unless the task names another."""
        left = self.deadline - time.monotonic()
        if left < MIN_SECONDS:
            self.left_out.append(what)
            return Outcome([], OUT_OF_TIME)
        print(f"[{left:4.0f} s left] {what}", file=sys.stderr, flush=True)
        task = {"device": self.device, **task}
        self.n_tasks += 1
        path = Path(self.folder, f"{self.n_tasks}.jsonl")
        path.touch()
        command = [python or sys.executable, str(WORKER), json.dumps(task), str(path)]
        error = None
        try:
            done = subprocess.run(
                command, env=self.environment(task), timeout=left, check=False,
                stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, errors="replace",
            )  # fmt: skip
            if done.returncode:
                error = ([*done.stderr.strip().splitlines(), f"status {done.returncode}"])[-2:]
                error = ", ".join(error)
        except subprocess.TimeoutExpired:
            self.left_out.append(what)
            error = OUT_OF_TIME
        said = path.read_text(encoding="utf-8")
        print(said, end="", file=sys.stderr, flush=True)
        return Outcome([json.loads(line) for line in said.splitlines()], error)

    def environment(self, task: dict[str, Any]) -> dict[str, str]:
        """The CPU gets a GPU's allocator, with the task's limit; and no GPU."""
        if task["device"].startswith("GPU"):
            return dict(os.environ)
        limit = task.get("limit") or CPU_LIMIT if self.options.cpu else 0
        return os.environ | {
            "CUDA_VISIBLE_DEVICES": "-1",
            "TF_CPU_ALLOCATOR_USE_BFC": "true" if limit else "false",
            "TF_CPU_BFC_MEM_LIMIT_IN_MB": str(-(-limit // MEGABYTE)),
        }


# --- the device -----------------------------------------------------------------------------------


def driver_version() -> str:
    """What nvidia-smi says; 'unknown' where there is none."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.strip() or "unknown"


def describe(bench: Bench) -> dict[str, Any]:
    """Prints the device; exits if there is none, or if TensorFlow does not start."""
    lines, error = bench.run("device", {"task": "describe"})
    if not lines:
        raise SystemExit(f"TensorFlow does not start: {error}")
    (found,) = lines
    if bench.options.cpu:
        print(f"CPU, TensorFlow {found['tensorflow']}: a small model, to try this script\n")
    elif not found["has_gpu"]:
        print(
            "TensorFlow sees no GPU. `nvidia-smi` shows whether the driver does; "
            "`pip install tensorflow[and-cuda]` brings the libraries. --cpu tries this script.",
            file=sys.stderr,
        )
        raise SystemExit(2)
    else:
        capability = ".".join(map(str, found["capability"])) or "unknown"
        print(
            f"{found['card']}, compute capability {capability}, driver {driver_version()}, "
            f"TensorFlow {found['tensorflow']} for CUDA {found['cuda']}, "
            f"{found['limit'] / MEGABYTE:,.0f} MB for a session\n"
        )
    return found


# --- logits and steps against the CPU's -----------------------------------------------------------


def compare(bench: Bench, precisions: list[str]) -> None:
    """The variants on the device and float32 on the CPU, with the same weights and tokens."""
    import numpy as np

    sizes, variants = bench.sizes, [v for v in VARIANTS if v[1] in precisions]
    arrays = {name: str(Path(bench.folder, f"{name}.npz")) for name in ("here", "cpu")}
    task = {"hparams": dataclasses.asdict(sizes.compared), "time": sizes.compared_time}
    here = bench.run(
        "logits and ten steps",
        {**task, "task": "compare", "variants": variants, "arrays": arrays["here"]},
    )
    reference = [("reference", "float32", False)]
    # Else nothing was written to judge, but the CPU's logits may still be wanted.
    texts = {"texts": arrays["here"]} if here.lines else {}
    cpu = bench.run(
        "the same on the CPU",
        {**task, "task": "compare", "variants": reference, "arrays": arrays["cpu"],
         "device": "CPU:0", **texts},
    )  # fmt: skip
    losses = {line["variant"]: np.array(line["losses"]) for line in here.lines}
    below = {line["judged"]: line["below"] for line in cpu.lines if "judged" in line}
    base = [np.array(line["losses"]) for line in cpu.lines if "variant" in line]
    print(
        f"| against the CPU, {sizes.compared_time} tokens | logits | ten losses | greedy tokens |"
    )
    print("|---|---|---|---|")
    for name, _, _ in variants:
        text = f"{name}: logits and ten training steps are the CPU's"
        if name not in losses or not base:
            error = here.error or cpu.error or "no result"
            bench.check(text, error, None if error == OUT_OF_TIME else False)
            continue
        theirs = np.load(arrays["cpu"])["reference logits"]
        ours = np.load(arrays["here"])[f"{name} logits"]
        found = Tolerance(
            float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)),
            float(np.max(np.abs(losses[name] / base[0] - 1))),
            below.get(name, 0.0),
        )
        shown = [f"{found.logits:.1e}", f"{found.losses:.1e}"]
        shown.append(f"{found.below:.1e}" if name in below else "")
        print(f"| {name} | {' | '.join(shown)} |", flush=True)
        limits = TOLERANCES[name]
        # Written so that NaN does not hold.
        held = all(value <= limit for value, limit in zip(found, limits, strict=True))
        bench.check(text, f"differences {', '.join(filter(None, shown))}, of {limits}", held)
    print()


# --- training and generating ----------------------------------------------------------------------


def configurations(hparams: HParams, limit: int, precisions: list[str]) -> list[dict[str, Any]]:
    """The settings to train with: the best that fit, and the same recomputing, in float32."""
    from gpt_2_simple.training import memory_plan

    plans = memory_plan.fitting_plans(hparams, limit)
    if not plans:
        return []
    best = dataclasses.asdict(plans[0].settings)
    if plans[0].time == hparams.n_ctx:
        best["sequence_length"] = None
    found = [{**best, "precision": precision} for precision in precisions]
    if "float32" in precisions and not best["use_memory_saving_gradients"]:
        found.append({**best, "use_memory_saving_gradients": True})
    return found


def settings_text(settings: dict[str, Any]) -> str:
    words = [settings["optimizer"], f"accumulate {settings['accumulate_gradients']}"]
    if settings["use_memory_saving_gradients"]:
        words.append("recompute")
    if settings["sequence_length"]:
        words.append(f"windows of {settings['sequence_length']}")
    return ", ".join(words)


def megabytes(size: int | None) -> str:
    return "" if size is None else f"{size / MEGABYTE:,.0f}"


def train(bench: Bench, name: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Trains under the plan's limit, or without if that is too small; checks the plan."""
    from gpt_2_simple.training import memory_plan
    from gpt_2_simple.training.settings import StepSettings

    hparams, sizes = bench.sizes.models[name], bench.sizes
    total = memory_plan.plan(hparams, StepSettings(**settings)).total
    what = f"train {name}, {settings_text(settings)}, {settings['precision']}"
    task = {
        "task": "train", "hparams": dataclasses.asdict(hparams), "settings": settings,
        "runs": sizes.runs, "seconds": sizes.seconds,
    }  # fmt: skip
    text = f"{what}: fits into the plan's {megabytes(total)} MB"
    lines, error = bench.run(what, {**task, "limit": total})
    found = lines[0] if lines else {"error": error}
    # Some of oneDNN's kernels do not ask whether they got memory, and end the process.
    if found.get("error") == OUT_OF_MEMORY or (error or "").endswith(ABORTED):
        lines, error = bench.run(f"{what}, without a limit", task)
        found = lines[0] if lines else {"error": error}
        peak = f"peak {megabytes(found['peak'])} MB" if "peak" in found else found["error"]
        bench.check(text, f"{OUT_OF_MEMORY}; without a limit: {peak}", False)
    elif "error" in found:
        bench.check(text, found["error"], None if found["error"] == OUT_OF_TIME else False)
    else:
        bench.check(text, f"peak {megabytes(found['peak'])} MB", found["peak"] <= total)
    return {"plan": total, **found}


def generate(bench: Bench, name: str, precisions: list[str]) -> list[dict[str, Any]]:
    lines, error = bench.run(f"generate {name}", generate_task(bench, name, precisions, "generate"))
    if error and error != OUT_OF_TIME:
        bench.check(f"generate {name}", error, False)
    return lines


def generate_task(bench: Bench, name: str, precisions: list[str], task: str) -> dict[str, Any]:
    sizes = bench.sizes
    return {
        "task": task, "hparams": dataclasses.asdict(sizes.models[name]), "precisions": precisions,
        "batches": bench.options.batches, "length": sizes.length, "runs": sizes.runs,
        "seconds": sizes.seconds,
    }  # fmt: skip


def reference(
    bench: Bench, name: str, settings: list[dict[str, Any]], precisions: list[str]
) -> list[dict[str, Any]]:
    """What transformers takes for the same, by a Python that has it."""
    python = bench.options.reference_python
    if not python:
        return []
    task = {**generate_task(bench, name, precisions, "reference"), "settings": settings}
    lines, error = bench.run(f"transformers {name}", task, python)
    if error and error != OUT_OF_TIME:
        bench.check(f"transformers {name} can be measured", error, False)
    return lines


def compare_speed(bench: Bench, what: str, ours: float | None, theirs: float | None) -> str:
    """A cell with their figure, ours over theirs; both are seconds."""
    if not ours or not theirs:
        return ""
    ratio = ours / theirs
    held = ratio <= NOT_SLOWER
    bench.check(f"{what}: no slower than transformers", f"{ratio:.2f} of its time", held)
    return f"{ratio:.2f}"


class Measured(NamedTuple):
    """All that was measured of a model."""

    settings: list[dict[str, Any]]
    trained: list[dict[str, Any]]
    generated: list[dict[str, Any]]
    theirs: list[dict[str, Any]]


def measure(bench: Bench, name: str, limit: int) -> Measured | None:
    precisions = bench.options.precisions
    settings = configurations(bench.sizes.models[name], limit, precisions)
    if not settings:
        return None
    trained = [train(bench, name, each) for each in settings]
    generated = generate(bench, name, precisions)
    return Measured(settings, trained, generated, reference(bench, name, settings, precisions))


def training_table(bench: Bench, found: dict[str, Measured]) -> None:
    print("| training, settings | precision | plan, MB | peak, MB | s/step | transformers: s/step "
          "| peak, MB | ours over theirs |")  # fmt: skip
    print("|---" * 8 + "|")
    for name, measured in found.items():
        theirs = {line["setting"]: line for line in measured.theirs if "setting" in line}
        for number, (settings, ours) in enumerate(
            zip(measured.settings, measured.trained, strict=True)
        ):
            reference = theirs.get(number, {})
            what = f"{name}, {settings_text(settings)}"
            ratio = compare_speed(
                bench, f"train {what}, {settings['precision']}", ours.get("seconds"),
                reference.get("seconds"),
            )  # fmt: skip
            cells = [
                what, settings["precision"], megabytes(ours["plan"]), megabytes(ours.get("peak")),
                seconds_text(ours), seconds_text(reference), megabytes(reference.get("peak")),
                ratio,
            ]  # fmt: skip
            print(f"| {' | '.join(cells)} |")
    print()


def seconds_text(line: dict[str, Any]) -> str:
    return f"{line['seconds']:.3f}" if "seconds" in line else line.get("error", "")


def generating_table(bench: Bench, found: dict[str, Measured]) -> None:
    batches = bench.options.batches
    print(f"| generating, tokens/s of {bench.sizes.length} tokens (transformers') | "
          + " | ".join(f"batch {batch}" for batch in batches) + " | peak, MB |")  # fmt: skip
    print("|---" * (len(batches) + 2) + "|")
    for name, measured in found.items():
        for precision in bench.options.precisions:
            ours, theirs = (
                {line["batch"]: line for line in lines if line.get("precision") == precision}
                for lines in (measured.generated, measured.theirs)
            )
            cells = [f"{name}, {precision}"]
            for batch in batches:
                a, b = ours.get(batch, {}), theirs.get(batch, {})
                cells.append(speed_text(a) + (f" ({speed_text(b)})" if b else ""))
                if "speed" in a and "speed" in b:
                    what = f"generate {name}, {precision}, batch {batch}"
                    compare_speed(bench, what, 1 / a["speed"], 1 / b["speed"])
            peaks = [line["peak"] for line in ours.values() if "peak" in line]
            cells.append(megabytes(max(peaks, default=None)))
            print(f"| {' | '.join(cells)} |")
    print()


def speed_text(line: dict[str, Any]) -> str:
    return f"{line['speed']:,.0f}" if "speed" in line else line.get("error", "")


def parse_options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=PUBLISHED, help="by default all that fit")
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 20])
    parser.add_argument("--minutes", type=float, default=9, help="for all of it, at most")
    parser.add_argument("--reference-python", help="has torch and transformers")
    parser.add_argument("--cpu", action="store_true", help="try this script with a small model")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse_options(arguments)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(options, folder)
        limit = CPU_LIMIT if options.cpu else None
        limit = describe(bench)["limit"] or limit
        compare(bench, options.precisions)
        names = bench.sizes.models if options.cpu else options.models or PUBLISHED
        found = {}
        for name in names:
            measured = measure(bench, name, limit)
            if measured is None:
                print(f"{name} does not fit into this card's memory\n")
            else:
                found[name] = measured
    training_table(bench, found)
    generating_table(bench, found)
    print(*bench.promises, sep="\n")
    if bench.left_out:
        print(f"no time was left for: {'; '.join(bench.left_out)}")
    broken = [promise for promise in bench.promises if promise.held is False]
    print(f"{len(bench.promises)} promises, {len(broken)} did not hold")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
