"""Tokens a second of this library and of others, side by side: random float32 weights.

    python benchmarks/generate.py
    python benchmarks/generate.py --reference-python PATH  # has torch, transformers, ctranslate2
    python benchmarks/generate.py --old-python PATH        # has gpt-2-simple 0.8.1
    python benchmarks/generate.py --size 774M --cases 1x100 --precision bfloat16
    python benchmarks/generate.py --reference-python PATH --llama-python PATH --int8
    python benchmarks/generate.py --speculative --cases ""
    python benchmarks/generate.py --reference-python PATH --prompt 900 --cases ""

--int8 adds what has 8 bits: ours, CTranslate2's, and llama.cpp's q8_0, whose Python has xllamacpp.
--speculative compares plain decoding with prompt lookup, in one process: greedy text, which random
weights soon repeat, and drawn text, which they do not.
--prompt times a prompt of so many tokens and one new token.

Each library runs in a process of its own; the runs take turns, one at a time, so that all meet the
same weather. Medians, after one run each to warm up. Ours and 0.8.1's are whole calls of
generate(), text and all. The floor is the time in which all weights are read from memory once.
--precision is that of our weights; the others have float32.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gpt_2_simple.common.published import PUBLISHED, published_hparams

SETTINGS = {"top_k": 40, "temperature": 0.7}
CASES = "1x100 1x1000 8x100 20x100"
END = 50256


def vocabulary() -> tuple[list[str], list[tuple[str, str]]]:
    """The tokens and merges of a vocabulary of GPT-2's size; its words are junk."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [*map(chr, printable), *(chr(256 + i) for i in range(256 - len(printable)))]
    pairs = [(a, b) for a in letters for b in letters][:50000]
    return [*letters, *map("".join, pairs), "<|endoftext|>"], pairs


def write_vocabulary(folder: Path) -> None:
    """The two files of vocabulary(), by both of their names."""
    tokens, pairs = vocabulary()
    folder.mkdir(parents=True, exist_ok=True)
    encoder = json.dumps({token: i for i, token in enumerate(tokens)})
    merges = "\n".join(["#version: 0.2", *map(" ".join, pairs), ""])
    for name in ["encoder.json", "vocab.json"]:
        (folder / name).write_text(encoder, encoding="utf-8")
    for name in ["vocab.bpe", "merges.txt"]:
        (folder / name).write_text(merges, encoding="utf-8")


def write_run(size: str, with_gguf: bool) -> None:
    """checkpoint/run1/ with a model of random weights, and the same for llama.cpp."""
    gpt2 = import_ours()
    from gpt_2_simple.storage import create

    run = Path("checkpoint/run1")
    write_vocabulary(run)
    create.write_model(str(run), published_hparams(size), seed=0)
    if with_gguf:
        gpt2.export_gguf("run1", path="gguf", quantization="q8_0")


def import_ours():
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    import gpt_2_simple

    return gpt_2_simple


def hugging_face_config(size: str, **options):
    """The transformers configuration of a published model's sizes."""
    import transformers

    sizes = published_hparams(size)
    return transformers.GPT2Config(
        n_layer=sizes.n_layer, n_head=sizes.n_head, n_embd=sizes.n_embd, **options
    )


class Ours:
    def __init__(self, size: str, precision: str = "float32") -> None:
        self.gpt2 = import_ours()
        self.sess = self.gpt2.start_tf_sess()
        self.precision = precision

    def load(self) -> None:
        self.gpt2.load_gpt2(self.sess, precision=self.precision)

    def generate(self, batch: int, length: int) -> None:
        texts = self.gpt2.generate(
            self.sess, length=length, batch_size=batch, nsamples=batch, return_as_list=True,
            **SETTINGS,
        )  # fmt: skip
        assert len(texts) == batch

    def write(self, length: int, batch: int, temperature: float, speculative: str | None) -> None:
        texts = self.gpt2.generate(
            self.sess, length=length, batch_size=batch, nsamples=batch, return_as_list=True, seed=1,
            temperature=temperature, speculative=speculative,
        )  # fmt: skip
        assert len(texts) == batch

    def prompt(self, count: int) -> None:
        from gpt_2_simple.sample import generate_tokens

        (tokens,) = generate_tokens(self.sess, [list(range(count))], 1, seed=1)
        assert tokens.shape == (1, 1)

    def build_floor(self) -> None:
        import tensorflow as tf

        with self.sess.graph.as_default():
            variables = tf.compat.v1.global_variables()
            sums = [tf.cast(tf.reduce_sum(v.read_value()), tf.float32) for v in variables]
            self.sum = tf.add_n(sums)

    def floor(self) -> None:
        self.sess.run(self.sum)


class HuggingFace:
    def __init__(self, size: str) -> None:
        import torch
        import transformers

        transformers.logging.set_verbosity_error()
        self.torch = torch
        self.model = transformers.GPT2LMHeadModel(hugging_face_config(size)).eval()

    def generate(self, batch: int, length: int) -> None:
        with self.torch.inference_mode():
            out = self.model.generate(
                self.torch.full([batch, 1], END), do_sample=True, max_new_tokens=length,
                min_new_tokens=length, pad_token_id=END, **SETTINGS,
            )  # fmt: skip
        assert out.shape == (batch, length + 1)

    def prompt(self, count: int) -> None:
        with self.torch.inference_mode():
            prompt = self.torch.arange(count)[None]
            out = self.model.generate(prompt, max_new_tokens=1, pad_token_id=END)
        assert out.shape == (1, count + 1)


def write_hugging_face(size: str) -> None:
    """hf/ with a model of random weights."""
    import transformers

    HuggingFace(size).model.save_pretrained("hf")
    write_vocabulary(Path("hf"))
    transformers.GPT2Tokenizer("hf/vocab.json", "hf/merges.txt").save_pretrained("hf")


class OursInt8(Ours):
    def __init__(self, size: str) -> None:
        super().__init__(size, "int8")
        self.load()


class CTranslate2:
    compute_type = "float32"

    def __init__(self, size: str) -> None:
        import ctranslate2

        if not os.path.isdir("ct2"):
            write_hugging_face(size)
            ctranslate2.converters.TransformersConverter("hf").convert("ct2", force=True)
        self.generator = ctranslate2.Generator(
            "ct2", device="cpu", compute_type=self.compute_type, intra_threads=os.cpu_count() or 1
        )

    def generate(self, batch: int, length: int) -> None:
        out = self.generator.generate_batch(
            [["<|endoftext|>"]] * batch, max_length=length, min_length=length,
            sampling_topk=SETTINGS["top_k"], sampling_temperature=SETTINGS["temperature"],
            include_prompt_in_result=False,
        )  # fmt: skip
        assert [len(result.sequences_ids[0]) for result in out] == [length] * batch

    def prompt(self, count: int) -> None:
        tokens, _ = vocabulary()
        (out,) = self.generator.generate_batch(
            [tokens[:count]], max_length=1, min_length=1, include_prompt_in_result=False
        )
        assert len(out.sequences_ids[0]) == 1


class CTranslate2Int8(CTranslate2):
    compute_type = "int8"


class LlamaCpp:
    """Our model as a GGUF file, behind llama.cpp's own server in this process."""

    def __init__(self, size: str) -> None:
        import xllamacpp

        parameters = xllamacpp.CommonParams()
        parameters.model.path = os.path.abspath("gguf/run1-q8_0.gguf")
        parameters.n_ctx = 1024
        parameters.n_parallel = 1
        parameters.cpuparams.n_threads = os.cpu_count() or 1
        self.server = xllamacpp.Server(parameters)

    def generate(self, batch: int, length: int) -> None:
        content = {
            "prompt": [END], "n_predict": length, "ignore_eos": True, "cache_prompt": False,
            "top_k": SETTINGS["top_k"], "temperature": SETTINGS["temperature"],
        }  # fmt: skip
        request = urllib.request.Request(
            f"{self.server.listening_address}/completion",
            json.dumps(content).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=600) as response:
            assert json.load(response)["tokens_predicted"] == batch * length


class Old:
    """gpt-2-simple 0.8.1."""

    def __init__(self, size: str) -> None:
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
        import gpt_2_simple

        self.gpt2 = gpt_2_simple
        self.sess = gpt_2_simple.start_tf_sess()
        gpt_2_simple.load_gpt2(self.sess)

    generate = Ours.generate


LIBRARIES = {
    "ours": Ours, "ours int8": OursInt8, "Hugging Face": HuggingFace, "CTranslate2": CTranslate2,
    "CTranslate2 int8": CTranslate2Int8, "llama.cpp q8_0": LlamaCpp, "0.8.1": Old,
}  # fmt: skip
ONE_TEXT = {"llama.cpp q8_0"}
"""What is asked for one text at a time."""


def serve(library: str, size: str, precision: str) -> None:
    """Answers a line of input, a method and its arguments, with the seconds it took."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    worker = Ours(size, precision) if library == "ours" else LIBRARIES[library](size)
    print("{}", file=out, flush=True)
    for line in sys.stdin:
        method, *arguments = json.loads(line)
        began = time.perf_counter()
        getattr(worker, method)(*arguments)
        seconds = time.perf_counter() - began
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(json.dumps({"seconds": seconds, "peak": peak}), file=out, flush=True)


class Worker:
    """A library in a process of its own."""

    def __init__(self, python: str, library: str, size: str, precision: str, folder: str) -> None:
        log = open(f"{folder}/{library}.log", "w+")  # noqa: SIM115
        command = [python, os.path.abspath(__file__), "--serve", library, "--size", size]
        command += ["--precision", precision]
        self.process = subprocess.Popen(
            command, cwd=folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log,
            text=True,
        )  # fmt: skip
        self.log = log
        self.answer()

    def answer(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            self.log.seek(0)
            raise SystemExit(self.log.read()[-3000:])
        return json.loads(line)

    def __call__(self, method: str, *arguments: float | str | None) -> dict:
        self.process.stdin.write(json.dumps([method, *arguments]) + "\n")
        self.process.stdin.flush()
        return self.answer()

    def stop(self) -> None:
        self.process.stdin.close()
        self.process.wait()
        self.log.close()


def tell_start(ours: Worker) -> None:
    """Loading, the first call and the memory."""
    loaded = ours("load")
    print(f"load_gpt2 {loaded['seconds']:.2f} s, peak RSS {loaded['peak'] / 1e6:.0f} MB")
    first = ours("generate", 1, 20)["seconds"]
    second = ours("generate", 1, 20)
    more = first - second["seconds"]
    print(f"first call of 20 tokens {first:.2f} s, {more:.2f} s more than the second")
    print(f"peak RSS after that {second['peak'] / 1e6:.0f} MB")
    ours("build_floor")


def compare(workers: dict[str, Worker], batch: int, length: int, runs: int) -> None:
    workers = {name: workers[name] for name in workers if batch == 1 or name not in ONE_TEXT}
    seconds: dict[str, list[float]] = {name: [] for name in [*workers, "floor"]}
    peaks = {}
    for run in range(runs + 1):
        for name, worker in workers.items():
            answer = worker("generate", batch, length)
            peaks[name] = answer["peak"]
            if run:
                seconds[name].append(answer["seconds"])
        reads = [workers["ours"]("floor")["seconds"] for _ in range(5)]
        if run:
            seconds["floor"].append(statistics.median(reads) * length)
    ours = statistics.median(seconds["ours"])
    print(f"\nbatch {batch}, {length} tokens: tokens/s (of {runs} runs, least-most), ours over it")
    for name, values in seconds.items():
        median = statistics.median(values)
        tokens = batch * length
        spread = f"({tokens / max(values):.1f}-{tokens / min(values):.1f})"
        peak = f"  peak RSS {peaks[name] / 1e6:.0f} MB" if name in peaks else ""
        print(f"{name:16s} {tokens / median:8.1f} {spread:17s} {median / ours:6.2f}{peak}")
    sys.stdout.flush()


def compare_prompts(workers: dict[str, Worker], count: int, runs: int) -> None:
    """Seconds of a prompt and one new token, in turns."""
    workers = {n: worker for n, worker in workers.items() if hasattr(LIBRARIES[n], "prompt")}
    seconds: dict[str, list[float]] = {name: [] for name in workers}
    for run in range(runs + 1):
        for name, worker in workers.items():
            answer = worker("prompt", count)
            seconds[name] += [answer["seconds"]] if run else []
    ours = statistics.median(seconds["ours"])
    print(f"\na prompt of {count} tokens: seconds (of {runs} runs, least-most), over ours")
    for name, values in seconds.items():
        median, spread = statistics.median(values), f"({min(values):.3f}-{max(values):.3f})"
        print(f"{name:16s} {median:8.3f} {spread:17s} {median / ours:6.2f}")
    sys.stdout.flush()


def compare_speculation(ours: Worker, runs: int) -> None:
    """Seconds of plain decoding over those of prompt lookup, in turns."""
    print(f"\nprompt lookup, 100 tokens: tokens/s (medians of {runs} runs), over plain decoding")
    for kind, temperature in (("repeats", 0.0), ("does not", 1.0)):
        for batch in (1, 4):
            seconds: dict[str | None, list[float]] = {None: [], "prompt_lookup": []}
            for run in range(runs + 1):
                for way, values in seconds.items():
                    answer = ours("write", 100, batch, temperature, way)
                    values += [answer["seconds"]] if run else []
            plain, lookup = (batch * 100 / statistics.median(v) for v in seconds.values())
            print(f"{kind:9s} batch {batch} {plain:8.1f} {lookup:8.1f} {lookup / plain:6.2f}")
            sys.stdout.flush()


def _pythons(options: argparse.Namespace) -> dict[str, str]:
    """The Python of each library that is wanted."""
    found = {"ours": sys.executable}
    if options.int8:
        found["ours int8"] = sys.executable
    if options.reference_python:
        peers = ["Hugging Face", "CTranslate2", *(["CTranslate2 int8"] if options.int8 else [])]
        found |= dict.fromkeys(peers, options.reference_python)
    if options.llama_python:
        found["llama.cpp q8_0"] = options.llama_python
    if options.old_python:
        found["0.8.1"] = options.old_python
    return found


def measure(options: argparse.Namespace) -> None:
    """Starts the libraries, and times what the options ask for."""
    pythons = _pythons(options)
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, os.path.abspath(__file__), "--serve", "write"]
        command += ["--size", options.size]
        if options.llama_python:
            command += ["--llama-python", options.llama_python]
        subprocess.run(command, cwd=folder, check=True)
        workers = {}
        for name, python in pythons.items():
            workers[name] = Worker(python, name, options.size, options.precision, folder)
            if name == "ours":
                tell_start(workers[name])
        for case in options.cases.split():
            compare(workers, *map(int, case.split("x")), options.runs)
        if options.prompt:
            compare_prompts(workers, options.prompt, options.runs)
        if options.speculative:
            compare_speculation(workers["ours"], options.runs)
        for worker in workers.values():
            worker.stop()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--reference-python", help="has torch, transformers and ctranslate2")
    parser.add_argument("--old-python", help="has gpt-2-simple 0.8.1")
    parser.add_argument("--llama-python", help="has xllamacpp")
    parser.add_argument("--int8", action="store_true", help="add what has 8 bits")
    parser.add_argument("--speculative", action="store_true", help="add prompt lookup")
    parser.add_argument("--prompt", type=int, help="tokens of a prompt to time; at most 1,023")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--size", choices=PUBLISHED, default="124M")
    parser.add_argument("--precision", default="float32")
    parser.add_argument("--cases", default=CASES, help=f"batch x tokens, by default {CASES}")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve == "write":
        return write_run(options.size, bool(options.llama_python))
    if options.serve == "write hugging face":
        return write_hugging_face(options.size)
    if options.serve:
        return serve(options.serve, options.size, options.precision)
    return measure(options)


if __name__ == "__main__":
    main()
