"""How fast a text is encoded: ours, tiktoken and gpt-2-simple 0.8.1 side by side, one thread each.

    python benchmarks/encode.py models/124M some_text.txt
    python benchmarks/encode.py models/124M some_text.txt --old .../gpt_2_simple/src/encoder.py

Each round times all of them in turn, so that a busy machine slows all alike; the ratio is the
median of the rounds' ratios.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gpt_2_simple.encoder import END_OF_TEXT, Encoder, get_encoder

PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"


def tiktoken_encode(encoder: Encoder) -> Callable[[str], list[int]]:
    """tiktoken with the same vocabulary, made from it without a download."""
    import tiktoken

    ranks = {encoder.decode_bytes([i]): i for t, i in encoder.encoder.items() if t != END_OF_TEXT}
    return tiktoken.Encoding(
        "from-files", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={}
    ).encode_ordinary


def old_encode(path: str, folder: str) -> Callable[[str], list[int]]:
    """gpt-2-simple 0.8.1's encoder from its file; it shares our package's name."""
    spec = importlib.util.spec_from_file_location("old_encoder", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return lambda text: module.get_encoder(folder).encode(text)


def timed(encode: Callable[[str], list[int]], text: str) -> tuple[float, list[int]]:
    start = time.perf_counter()
    ids = encode(text)
    return time.perf_counter() - start, ids


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", help="holds encoder.json and vocab.bpe")
    parser.add_argument("file", help="UTF-8 text")
    parser.add_argument("--old", help="gpt-2-simple 0.8.1's src/encoder.py (includes loading)")
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    text = Path(args.file).read_text(encoding="utf-8")
    megabytes = len(text.encode()) / 1e6
    encoder = get_encoder(args.folder)

    peers = {}
    if importlib.util.find_spec("tiktoken"):
        peers["tiktoken"] = tiktoken_encode(encoder)
    if args.old:
        peers["gpt-2-simple 0.8.1"] = old_encode(args.old, args.folder)
    seconds: dict[str, list[float]] = {}
    for _ in range(args.rounds):
        fresh = Encoder(encoder.encoder, encoder.bpe_merges)
        runs = {"ours, first call": fresh.encode, "ours, again": fresh.encode, **peers}
        results = {name: timed(encode, text) for name, encode in runs.items()}
        ids = results["ours, again"][1]
        for name, (took, theirs) in results.items():
            if theirs != ids:
                raise SystemExit(f"{name} gives other ids")
            seconds.setdefault(name, []).append(took)

    reference = "tiktoken" if "tiktoken" in seconds else "ours, again"
    print(f"{megabytes:.2f} MB, {len(ids):,} tokens, medians of {args.rounds} rounds")
    for name, times in seconds.items():
        ratios = [theirs / own for theirs, own in zip(seconds[reference], times, strict=True)]
        speed, best = megabytes / statistics.median(times), megabytes / min(times)
        ratio = statistics.median(ratios)
        print(f"{name:20} {speed:6.2f} MB/s (best {best:6.2f})  {ratio:5.2f} x {reference}")


if __name__ == "__main__":
    main()
