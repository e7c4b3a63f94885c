"""Peak memory and time of exports and imports, beside the size of the largest tensor.

    python benchmarks/exchange.py --sizes 124M 1558M
    python benchmarks/exchange.py --sizes 1558M --calls "export float32" "import float32"

For each size a model of random weights is made, exported as a folder of transformers, imported
again, and exported as GGUF, each in a process of its own, which a small process starts. The same is
done with a model of as many blocks and tokens that is 32 wide: what TensorFlow, the graph and the
vocabulary take. The difference of both peaks is printed as a multiple of the largest tensor. The
files lie in a folder that is removed at the end; 1558M takes up to 19 GB there.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile

import numpy as np

import gpt_2_simple.encoder as encoders
from gpt_2_simple.common.hparams import HParams
from gpt_2_simple.common.published import PUBLISHED
from gpt_2_simple.data.vocabulary import byte_vocabulary, save_vocabulary
from gpt_2_simple.exchange.tensor_names import tensors_of

MEGABYTE = 2**20

CALL = """
import resource, sys, time
import gpt_2_simple as gpt2
began = time.time()
{call}
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(f"PEAK {{peak // 1024}} SECONDS {{time.time() - began:.0f}}")
"""
CALLS = {
    "export float32": "gpt2.export_huggingface(model_name='{name}', path='out')",
    "import float32": "gpt2.import_huggingface('out', model_name='again')",
    "export bfloat16": "gpt2.export_huggingface(model_name='{name}', path='out', "
    "precision='bfloat16')",
    "import bfloat16": "gpt2.import_huggingface('out', model_name='again')",
    "export GGUF q8_0": "gpt2.export_gguf(model_name='{name}', path='out', quantization='q8_0')",
    "export GGUF f16": "gpt2.export_gguf(model_name='{name}', path='out', quantization='f16')",
}


def make_model(name: str, hparams: HParams) -> None:
    """Writes models/<name> with random weights."""
    from gpt_2_simple.storage import checkpoint_tensors

    folder = os.path.join("models", name)
    tokens = byte_vocabulary().encoder
    tokens |= {f"<|unused{i}|>": i for i in range(len(tokens), hparams.n_vocab)}
    save_vocabulary(encoders.Encoder(tokens, []), folder)
    rng = np.random.default_rng(0)
    with checkpoint_tensors.write_checkpoint(folder) as write:
        for tensor in tensors_of(hparams):
            write(tensor.ours, 0.02 * rng.standard_normal(tensor.our_shape, np.float32))
    checkpoint_tensors.write_model_files(folder, hparams)


def measure(call: str) -> tuple[int, int]:
    """The peak in MB, and the seconds, of a call in a process of its own."""
    command = [sys.executable, "-c", CALL.format(call=call)]
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "2"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    if result.returncode:
        raise SystemExit(result.stderr[-2000:])
    words = result.stdout.split()
    return int(words[words.index("PEAK") + 1]), int(words[words.index("SECONDS") + 1])


def measure_all(name: str, calls: list[str]) -> dict[str, tuple[int, int]]:
    """(peak in MB, seconds) of each call on a model, by the call's name."""
    found = {}
    for title in calls:
        found[title] = measure(CALLS[title].format(name=name))
        if title.startswith("import") or "GGUF" in title:  # an import reads the export before it
            for folder in ("out", os.path.join("models", "again")):
                shutil.rmtree(folder, ignore_errors=True)
    shutil.rmtree("out", ignore_errors=True)
    return found


def main() -> None:
    """Prints a line for each size and call."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", default=["124M"], choices=list(PUBLISHED))
    parser.add_argument("--calls", nargs="+", default=list(CALLS), choices=list(CALLS))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        for size in arguments.sizes:
            hparams = PUBLISHED[size]
            thin = HParams(hparams.n_vocab, hparams.n_ctx, 32, 1, hparams.n_layer)
            for name, sizes in (("thin", thin), (size, hparams)):
                # A process starts with the peak of the one that forked it.
                making = multiprocessing.get_context("spawn").Process(
                    target=make_model, args=(name, sizes)
                )
                making.start()
                making.join()
            largest = hparams.n_vocab * hparams.n_embd * 4 / MEGABYTE
            floor = measure_all("thin", arguments.calls)
            for title, (peak, seconds) in measure_all(size, arguments.calls).items():
                above = peak - floor[title][0]
                print(
                    f"{size:6}{title:18}{seconds:5} s, peak {peak:6,} MB, {above:5,} MB above the "
                    f"thin model's: {above / largest:.2f} x the largest tensor ({largest:.0f} MB)",
                    flush=True,
                )
            shutil.rmtree("models")
        os.chdir("/")


if __name__ == "__main__":
    main()
