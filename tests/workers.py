"""Processes that are the workers of a cluster on this machine; for the tests of distributed/."""

import contextlib
import os
import subprocess
import sys
import threading
from typing import NamedTuple

import numpy as np
import tensorflow as tf

import gpt_2_simple as gpt2
from gpt_2_simple.distributed.launcher import free_addresses
from gpt_2_simple.distributed.tf_config import tf_config
from gpt_2_simple.storage import adapter_files, checkpoint

# No test asserts a time. This only bounds a test that hangs.
LIMIT_SECONDS = 270


class Ended(NamedTuple):
    """How a worker ended."""

    status: int
    out: str
    err: str


class Workers:
    """Starts worker processes that run code; all have ended when the block ends.

    `code` is one script for all, or a list with each worker's. `indices` are those to start.
    """

    def __init__(self, folder, code, count, indices=None, addresses=None, **variables):
        self.folder, self.count, self.variables = str(folder), count, variables
        self.codes = [code] * count if isinstance(code, str) else code
        self.addresses = addresses or free_addresses(count)
        self.indices = range(count) if indices is None else indices

    def __enter__(self):
        self.processes = [self._start(index) for index in self.indices]
        return self

    def _start(self, index):
        environment = {
            **os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", "PYTHONUNBUFFERED": "1",
            "TF_CONFIG": tf_config(self.addresses, index), "GPT2_START_SECONDS": "200",
            **self.variables,
        }  # fmt: skip
        return subprocess.Popen(
            [sys.executable, "-c", self.codes[index]], cwd=self.folder, env=environment,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def line(self, number, start):
        """Waits for a line of a worker that starts so."""
        for line in self.processes[number].stdout:
            if line.startswith(start):
                return line
        raise AssertionError(f"worker {number} ended: {self.processes[number].stderr.read()}")

    def wait(self):
        """How each has ended."""
        ended = [None] * len(self.processes)

        def collect(number, process):
            out, err = process.communicate(timeout=LIMIT_SECONDS)
            ended[number] = Ended(process.returncode, out, err)

        threads = [threading.Thread(target=collect, args=p) for p in enumerate(self.processes)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return ended

    def __exit__(self, *_):
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            process.wait()
            process.stdout.close()
            process.stderr.close()


def run_workers(folder, code, count, **options):
    """Runs workers to their ends, which must be good ones; returns what each has printed."""
    with Workers(folder, code, count, **options) as workers:
        ended = workers.wait()
    for index, worker in enumerate(ended):
        assert worker is not None, f"worker {index} did not end within {LIMIT_SECONDS} s"
        assert worker.status == 0, f"worker {index}: {worker.out}\n{worker.err}"
    return [worker.out for worker in ended]


@contextlib.contextmanager
def training_place(folder):
    """A folder with a model and a text, which is the current one meanwhile."""
    before = os.getcwd()
    os.chdir(folder)
    try:
        gpt2.create_gpt2(model_name="tiny", n_layer=1, n_head=2, n_embd=16, n_ctx=16, seed=3)
        text = "".join(f"{n} green bottles on the wall\n" for n in range(40))
        (folder / "text.txt").write_text(text)
        yield
    finally:
        os.chdir(before)


def tensors(prefix):
    """A checkpoint's tensors by name."""
    reader = tf.train.load_checkpoint(prefix)
    return {name: reader.get_tensor(name) for name in reader.get_variable_to_shape_map()}


def weights(run):
    """The weights of a run's last checkpoint, or its adapter's."""
    latest = checkpoint.latest_checkpoint(f"checkpoint/{run}")
    if adapter_files.is_adapter(latest):
        return adapter_files.read_adapter(latest).tensors
    return tensors(latest)


def distance(found, expected):
    """The largest difference, as a share of the largest number.

    The keys' bias is left out: it adds the same to all scores of a query, so its gradient is
    rounding noise, which Adafactor makes as large as any other.
    """
    assert found.keys() == expected.keys()
    pairs = []
    for name in found:
        a, b = np.float64(found[name]), np.float64(expected[name])
        if name.endswith("c_attn/b"):
            a, b = (np.delete(x.reshape(3, -1), 1, axis=0) for x in (a, b))
        pairs.append((a, b))
    most = max(float(np.abs(a - b).max()) for a, b in pairs)
    return most / max(float(np.abs(b).max()) for _, b in pairs)
