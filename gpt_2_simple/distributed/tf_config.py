"""TF_CONFIG in, this process's place in a cluster out; no TensorFlow.

TensorFlow, Ray Train, Kubernetes' training operator and SageMaker set this variable:

    {"cluster": {"worker": ["host:port", ...]}, "task": {"type": "worker", "index": 0}}
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from typing import Any

VARIABLE = "TF_CONFIG"

# The jobs whose tasks train, in order: a chief, which older releases called master, is worker 0.
_TRAINING_JOBS = ("chief", "master", "worker")


@dataclasses.dataclass(frozen=True)
class ClusterSpec:
    """Who trains together.

    Attributes:
        addresses: "host:port" of each worker, worker 0 first.
        index: which of them this process is.
    """

    addresses: tuple[str, ...]
    index: int

    @property
    def address(self) -> str:
        """This worker's own."""
        return self.addresses[self.index]

    @property
    def count(self) -> int:
        """How many workers there are."""
        return len(self.addresses)

    def name(self, index: int) -> str:
        """A worker's name for lines and errors, such as 'worker 1 (10.0.0.2:2222)'."""
        return f"worker {index} ({self.addresses[index]})"


def tf_config(addresses: tuple[str, ...], index: int) -> str:
    """The variable's text for one of several workers."""
    task = {"type": "worker", "index": index}
    return json.dumps({"cluster": {"worker": list(addresses)}, "task": task})


def read_tf_config(environment: Mapping[str, str] = os.environ) -> ClusterSpec | None:
    """The cluster that TF_CONFIG names; None without the variable, or if there is one worker only.

    Raises:
        ValueError: it is no JSON, or it names no training task of its own cluster.
    """
    text = environment.get(VARIABLE, "").strip()
    if not text:
        return None
    try:
        config = json.loads(text)
        jobs, task = config.get("cluster") or {}, config.get("task") or {}
        tasks = [
            (job, number, str(address))
            for job in _TRAINING_JOBS
            for number, address in enumerate(_addresses(jobs.get(job, [])))
        ]
        place = (task.get("type", "worker"), int(task.get("index", 0)))
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{VARIABLE}={text!r} cannot be read ({error}): {_WANTED}") from error
    if len(tasks) < 2:
        return None
    if "ps" in jobs:
        raise ValueError(
            f"{VARIABLE}={text!r} names parameter servers ('ps'), which are not used here: every "
            "worker holds the whole model. Leave them out"
        )
    indices = [index for index, (job, number, _) in enumerate(tasks) if (job, number) == place]
    if not indices:
        raise ValueError(
            f"{VARIABLE}={text!r}: its task, {place[0]} {place[1]}, is none of the cluster's "
            f"workers: {_WANTED}"
        )
    addresses = tuple(address for _, _, address in tasks)
    for address in addresses:
        host, _, port = address.rpartition(":")
        if not host or not port.isdigit():
            raise ValueError(f"{VARIABLE}: {address!r} is no address: {_WANTED}")
    if len(set(addresses)) < len(addresses):
        raise ValueError(f"{VARIABLE}={text!r} gives two workers one address: {_WANTED}")
    return ClusterSpec(addresses, indices[0])


_WANTED = (
    'write it as {"cluster": {"worker": ["host:port", ...]}, "task": {"type": "worker", '
    '"index": 0}}, with another index in each process'
)


def _addresses(value: Any) -> list[Any]:
    """A job's addresses: a list, or an object by the tasks' numbers."""
    if isinstance(value, dict):
        return [value[key] for key in sorted(value, key=int)]
    return list(value)


def split_address(address: str) -> tuple[str, int]:
    """Host and port of "host:port"; an IPv6 host may stand in brackets."""
    host, _, port = address.rpartition(":")
    return host.removeprefix("[").removesuffix("]"), int(port)
