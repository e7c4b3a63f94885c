"""Processes that are the workers of a cluster on this machine; for the tests of distributed/."""

import contextlib
import os
import subprocess
import sys
import threading
from typing import NamedTuple

from gpt_2_simple.distributed.launcher import free_addresses
from gpt_2_simple.distributed.tf_config import tf_config

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
