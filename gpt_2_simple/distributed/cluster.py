"""TF_CONFIG in, this process as a worker of its cluster out: its channel and its server."""

from __future__ import annotations

import atexit
import hashlib
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import tensorflow as tf

from ..common.errors import first_line
from ..common.report import say
from .channel import WorkerLost, bind, open_channel
from .tf_config import ClusterSpec, read_tf_config

_JOB = "worker"

Item = TypeVar("Item")


class Cluster:
    """The workers that train one model together, seen from one of them.

    Attributes:
        spec: who they are, and which of them this is.
        channel: exchanges small values with them.
        target: the address of this process's TensorFlow server, for sessions.
    """

    def __init__(self, spec: ClusterSpec, config: Any):
        """Waits for the other workers, and starts this one's server.

        Args:
            spec: the workers.
            config: a ConfigProto: the server takes its threads and its GPU options from it.

        Raises:
            OSError: this worker's port is taken.
            WorkerLost: another worker did not come, or does not fit.
        """
        self.spec = spec
        with bind(spec) as listener:
            self.channel = open_channel(spec, code_digest(), listener)
        atexit.register(self.channel.close)
        self._server = self._start_server(config)
        self.target: str = self._server.target
        self.channel.gather("ready")
        say(f"Worker {spec.index} of {spec.count}")

    def _start_server(self, config: Any) -> Any:
        own = type(config)()
        own.CopyFrom(config)
        self.configure(own)
        cluster = tf.train.ClusterSpec({_JOB: list(self.spec.addresses)})
        try:
            return tf.distribute.Server(cluster, _JOB, self.spec.index, config=own)
        except tf.errors.OpError as error:
            message = f"{self.spec.name(self.spec.index)} cannot serve: {first_line(error)}"
            self.channel.fail(message)
            raise OSError(message) from error

    def configure(self, config: Any) -> None:
        """Makes a session's ConfigProto one of this worker's: it sees no other's devices."""
        config.experimental.collective_group_leader = f"/job:{_JOB}/replica:0/task:0"
        config.device_filters.append(f"/job:{_JOB}/task:{self.spec.index}")
        # Two sessions of a process share no variables.
        config.isolate_session_state = True

    @property
    def is_writer(self) -> bool:
        """Whether this worker writes the run: worker 0 does, and nobody else."""
        return self.spec.index == 0

    def share(self, items: Sequence[Item]) -> list[Item]:
        """This worker's share of a list; each item has one worker."""
        return list(items[self.spec.index :: self.spec.count])


def code_digest() -> str:
    """Identifies the package's source and TensorFlow's release."""
    digest = hashlib.sha256(tf.__version__.encode())
    folder = Path(__file__).parents[1]
    for path in sorted(folder.rglob("*.py")):
        digest.update(path.relative_to(folder).as_posix().encode())
        digest.update(path.read_bytes().replace(b"\r\n", b"\n"))
    return f"TensorFlow {tf.__version__}, {digest.hexdigest()[:12]}"


# A process is a worker of one cluster as long as it lives: TensorFlow cannot stop a server.
_joined: Cluster | None = None
_joining = threading.Lock()


def join(config: Any) -> Cluster | None:
    """Joins the cluster that TF_CONFIG names; None without TF_CONFIG. Later calls find it joined.

    Args:
        config: a ConfigProto, for the server that the first call starts.

    Raises:
        OSError: this worker's port is taken.
        RuntimeError: the cluster that this process belonged to is at its end.
        ValueError: TF_CONFIG cannot be read.
        WorkerLost: another worker did not come in time, or does not fit.
    """
    global _joined
    with _joining:
        if _joined is None:
            spec = read_tf_config()
            if spec is not None:
                _joined = Cluster(spec, config)
        elif _joined.channel.failure is not None:
            raise WorkerLost(
                f"this process was a worker of a cluster that has failed "
                f"({_joined.channel.failure}): start all workers again"
            )
        return _joined
