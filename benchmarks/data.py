"""Encodes text of several sizes and prints MB/s and memory, beside tiktoken and gpt-2-simple 0.8.1.

    python benchmarks/data.py --vocabulary models/124M --text shakespeare.txt --sizes 1.1 100 1000

Each measurement runs in a process of its own, all encoders in turn in every round, so that a busy
machine slows all alike; figures are medians, ratios those of each round's. Memory is the most that
a process and its children held together, above what it held once its imports were done (Linux
only). Ours is timed from the file to the finished token file on disk, twice: the second time finds
the tokens kept by the first. tiktoken is timed for encode_batch alone, over slices of 64 MB whose
ids are dropped.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

MEGABYTE = 1_000_000
DOCUMENT_CHARACTERS = 100_000
SLICE_CHARACTERS = 64 * MEGABYTE
OURS, PEER = "ours", "tiktoken encode_batch"
TIKTOKEN_PATTERN = (
    r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vocabulary", default="models/124M", help="has encoder.json, vocab.bpe")
    parser.add_argument("--text", help="what to repeat and perturb (default: Python's own help)")
    parser.add_argument("--sizes", type=float, nargs="+", default=[1.1, 100], help="in MB")
    parser.add_argument("--old-python", help="an interpreter that has gpt-2-simple 0.8.1")
    parser.add_argument("--old-most", type=float, default=2, help="MB that 0.8.1 is given at most")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        measure(*arguments.measure, arguments.vocabulary)
        return
    print(f"{core_count()} cores")
    print(f"{'MB':>8} {'encoder':<24} {'MB/s':>8} {'x tiktoken':>11} {'tokens':>14} {'memory':>11}")
    for size in arguments.sizes:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "text.txt")
            make_text(path, int(size * MEGABYTE), read_text(arguments.text))
            pythons = {OURS: sys.executable, PEER: sys.executable}
            if arguments.old_python and size <= arguments.old_most:
                pythons["0.8.1"] = arguments.old_python
            rounds = [
                {
                    name: run(python, name, path, arguments.vocabulary)
                    for name, python in pythons.items()
                }
                for _ in range(arguments.rounds)
            ]
            for name in pythons:
                report(size, name, rounds)


def read_text(path: str | None) -> str:
    if path:
        return Path(path).read_text(encoding="utf-8")
    from pydoc_data.topics import topics

    return "\n".join(topics.values())


def make_text(path: Path, size: int, text: str) -> None:
    """Writes copies of a text, each with its lines shuffled and one word in 30 misspelt."""
    draw = random.Random(0)
    written = 0
    with open(path, "wb") as file:
        while written < size:
            lines = text.split("\n")
            if written:
                draw.shuffle(lines)
                lines = [misspell(line, draw) if draw.random() < 0.25 else line for line in lines]
            encoded = ("\n".join(lines) + "\n").encode()[: size - written]
            file.write(encoded)
            written += len(encoded)


def misspell(line: str, draw: random.Random) -> str:
    """Puts a random letter in a random place."""
    place = draw.randrange(len(line) + 1)
    return line[:place] + chr(draw.randrange(97, 123)) + line[place:]


def run(python: str, name: str, path: Path, vocabulary: str) -> dict[str, float] | str:
    """Measures in a process of its own; a string says why that was not possible."""
    command = [python, __file__, "--measure", name, str(path), "--vocabulary", vocabulary]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return (done.stderr.strip() or f"exit status {done.returncode}").splitlines()[-1]
    return json.loads(done.stdout.splitlines()[-1])


def report(size: float, name: str, rounds: list[dict[str, dict[str, float] | str]]) -> None:
    """Prints the medians of one encoder, or why it could not be run."""
    results = [results[name] for results in rounds]
    failed = [result for result in results if isinstance(result, str)]
    if failed:
        print(f"{size:8.1f} {name:<24} {failed[0]}")
        return

    def median(key: str) -> float:
        return statistics.median(result[key] for result in results)

    ratios = [
        results[PEER]["seconds"] / results[name]["seconds"]
        for results in rounds
        if not isinstance(results[PEER], str)
    ]
    ratio = f"{statistics.median(ratios):11.2f}" if ratios else f"{'?':>11}"
    memory = f"{median('memory'):11.0f}" if "memory" in results[0] else f"{'?':>11}"
    speed, tokens = size / median("seconds"), results[0]["tokens"]
    print(f"{size:8.1f} {name:<24} {speed:8.2f} {ratio} {tokens:14,.0f} {memory}", flush=True)
    if "seconds_again" in results[0]:
        label = f"{name}, kept tokens"
        print(f"{size:8.1f} {label:<24} {size / median('seconds_again'):8.2f}", flush=True)


def measure(name: str, path: str, vocabulary: str) -> None:
    """Runs one encoder; prints its figures as JSON."""
    encode = {
        OURS: measure_ours,
        PEER: measure_tiktoken,
        "0.8.1": measure_old,
    }[name]
    print(json.dumps(encode(path, vocabulary)))


def measure_ours(path: str, vocabulary: str) -> dict[str, float]:
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from gpt_2_simple import encoder
    from gpt_2_simple.data import dataset

    with tempfile.TemporaryDirectory() as cache, watched_memory() as memory:
        start = time.perf_counter()
        enc = encoder.get_encoder(vocabulary)
        loaded = time.perf_counter()
        found = dataset.find_dataset(path)
        (chunk,) = dataset.tokenize(found, enc, cache)
        encoded = time.perf_counter()
        dataset.tokenize(found, enc, cache)
        again = time.perf_counter() - encoded
        tokens = len(chunk)
        del chunk
    times = {"seconds": encoded - loaded, "vocabulary_seconds": loaded - start}
    if os.path.getsize(path) > dataset.LARGE_BYTES:
        times["seconds_again"] = again
    return {**times, "tokens": tokens, **memory}


def measure_tiktoken(path: str, vocabulary: str) -> dict[str, float]:
    import tiktoken
    from tiktoken.load import data_gym_to_mergeable_bpe_ranks

    ranks = data_gym_to_mergeable_bpe_ranks(f"{vocabulary}/vocab.bpe", f"{vocabulary}/encoder.json")
    enc = tiktoken.Encoding(
        "gpt2", pat_str=TIKTOKEN_PATTERN, mergeable_ranks=ranks, special_tokens={}
    )
    seconds, tokens = 0.0, 0
    with watched_memory() as memory, open(path, encoding="utf-8", errors="ignore") as file:
        while text := file.read(SLICE_CHARACTERS):
            documents = [
                text[start : start + DOCUMENT_CHARACTERS]
                for start in range(0, len(text), DOCUMENT_CHARACTERS)
            ]
            start = time.perf_counter()
            ids = enc.encode_batch(documents, num_threads=core_count(), disallowed_special=())
            seconds += time.perf_counter() - start
            tokens += sum(map(len, ids))
            del ids
    return {"seconds": seconds, "tokens": tokens, **memory}


def measure_old(path: str, vocabulary: str) -> dict[str, float]:
    from gpt_2_simple.src import encoder, load_dataset

    with watched_memory() as memory:
        enc = encoder.get_encoder(vocabulary)
        start = time.perf_counter()
        chunks = load_dataset.load_dataset(enc, path, 50000)
        seconds = time.perf_counter() - start
    return {"seconds": seconds, "tokens": sum(map(len, chunks)), **memory}


def core_count() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


@contextlib.contextmanager
def watched_memory(interval: float = 0.02):
    """Yields a dict that then holds the most memory held within the block, in MB."""
    before, most, found = resident_bytes(), 0, {}
    stopped = threading.Event()

    def watch() -> None:
        nonlocal most
        while not stopped.wait(interval):
            most = max(most, resident_bytes() or 0)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield found
    finally:
        stopped.set()
        watcher.join()
        if before is not None:
            found["memory"] = max(0, most - before) / MEGABYTE


def resident_bytes() -> int | None:
    """What this process and its children hold of the memory; None where nothing tells."""
    if not os.path.exists("/proc/self/statm"):
        return None
    total = 0
    for process in [str(os.getpid()), *children(os.getpid())]:
        with contextlib.suppress(OSError):
            pages = Path("/proc", process, "statm").read_text().split()[1]
            total += int(pages) * os.sysconf("SC_PAGE_SIZE")
    return total


def children(process: int) -> list[str]:
    found: list[str] = []
    for listed in Path(f"/proc/{process}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            found += listed.read_text().split()
    return found


if __name__ == "__main__":
    main()
