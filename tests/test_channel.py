"""The workers' channel: exchanges, and what is told when one is missing, wrong, killed or frozen.

Here the workers are threads of one process.
"""

import contextlib
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import workers

from gpt_2_simple.distributed import channel as channels
from gpt_2_simple.distributed.channel import WorkerLost, bind, open_channel
from gpt_2_simple.distributed.tf_config import ClusterSpec


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Short waits."""
    monkeypatch.setattr(channels, "HEARTBEAT_SECONDS", 0.1)
    monkeypatch.setattr(channels, "SILENCE_SECONDS", 1.5)
    monkeypatch.setattr(channels, "RETRY_SECONDS", 0.05)
    monkeypatch.setattr(channels, "HELLO_SECONDS", 2.0)
    monkeypatch.setenv("GPT2_START_SECONDS", "3")


def start(spec, code="same"):
    with bind(spec) as listener:
        return open_channel(spec, code, listener)


def outcome(function, *args):
    """What a function returns, or the message of its error."""
    try:
        return function(*args)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def all_at_once(calls):
    """Runs functions in threads; what each returned, or its error's message."""
    with ThreadPoolExecutor(len(calls)) as pool:
        return [f.result() for f in [pool.submit(outcome, *call) for call in calls]]


def specs(count):
    addresses = tuple(workers.free_addresses(count))
    return [ClusterSpec(addresses, index) for index in range(count)]


@contextlib.contextmanager
def opened(count):
    """The channels of a cluster."""
    found = all_at_once([(start, spec) for spec in specs(count)])
    assert all(isinstance(c, channels.Channel) for c in found), found
    try:
        yield found
    finally:
        for channel in found:
            channel.close()


def cut(channel):
    """What a kill does: the connections end without a word, and the process says nothing more."""
    channel._is_closed = True
    for peer in channel._peers.values():
        handle = peer.connection.fileno()
        with socket.fromfd(handle, socket.AF_INET, socket.SOCK_STREAM) as copy:
            copy.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize("count", [2, 5])
def test_gather_and_broadcast_reach_all_workers_in_order(count):
    with opened(count) as cluster:
        for turn in range(3):
            found = all_at_once([(c.gather, [c.spec.index, turn]) for c in cluster])
            assert found == [[[index, turn] for index in range(count)]] * count
            found = all_at_once([(c.broadcast, c.spec.index + turn) for c in cluster])
            assert found == [turn] * count


def test_worker_0_does_not_wait_to_be_heard():
    with opened(2) as (center, other):
        center.note(latest="model-3")
        assert center.broadcast({"text": "é"}) == {"text": "é"}
        assert other.broadcast() == {"text": "é"}
        assert other.notes == {"latest": "model-3"}


def test_large_values_pass():
    with opened(2) as cluster:
        values = ["x" * 3_000_000, "y" * 3_000_000]
        assert all_at_once([(c.gather, values[c.spec.index]) for c in cluster]) == [values] * 2


def test_failure_of_a_worker_is_told_to_all():
    with opened(3) as cluster:
        called = threading.Event()
        cluster[2].on_failure = called.set
        cluster[1].fail("worker 1 failed: no such file")
        found = all_at_once([(c.gather, 1) for c in cluster])
        assert found == ["WorkerLost: worker 1 failed: no such file"] * 3
        assert called.wait(5)
        with pytest.raises(WorkerLost, match="no such file"):
            cluster[0].broadcast(1)


@pytest.mark.parametrize("lost", [0, 1])
def test_killed_worker_is_named(lost):
    with opened(3) as cluster:
        left = [c for c in cluster if c.spec.index != lost]
        cut(cluster[lost])
        name = cluster[0].spec.name(lost)
        for message in all_at_once([(c.gather, 1) for c in left]):
            assert message == f"WorkerLost: {name} is gone: it was killed, or its network is"


@pytest.mark.parametrize("frozen", [0, 2])
def test_frozen_worker_is_named(frozen, monkeypatch):
    with opened(3) as cluster:
        for peer in cluster[frozen]._peers.values():
            monkeypatch.setattr(peer, "_send", lambda message: None)
        left = [c for c in cluster if c.spec.index != frozen]
        for message in all_at_once([(c.gather, 1) for c in left]):
            assert f"{cluster[0].spec.name(frozen)} has not answered for" in message
            assert "it is frozen, or its network is" in message


def test_busy_worker_is_waited_for():
    with opened(2) as (center, other):
        time.sleep(channels.SILENCE_SECONDS * 1.5)
        assert all_at_once([(center.gather, 0), (other.gather, 1)]) == [[0, 1]] * 2


def test_worker_that_has_ended_is_named():
    with opened(2) as (center, other):
        other.close()
        with pytest.raises(WorkerLost, match=r"worker 1 .* has ended while others wait for it"):
            center.gather(1)


def test_worker_that_never_starts_is_named():
    cluster = specs(3)
    found = all_at_once([(start, spec) for spec in cluster[:2]])
    for message in found:
        assert message.startswith(f"WorkerLost: {cluster[0].name(2)} did not start within 3 s")
        assert "GPT2_START_SECONDS" in message


def test_worker_0_that_never_starts_is_named():
    spec = specs(2)[1]
    message = outcome(start, spec)
    assert message.startswith(f"WorkerLost: {spec.name(0)} was not found within 3 s")


def test_worker_that_starts_late_is_waited_for():
    cluster = specs(2)

    def late(spec):
        time.sleep(1)
        return start(spec)

    for order in (cluster, cluster[::-1]):
        addresses = tuple(workers.free_addresses(2))
        order = [ClusterSpec(addresses, spec.index) for spec in order]
        found = all_at_once([(start, order[0]), (late, order[1])])
        assert all(isinstance(c, channels.Channel) for c in found), found
        for channel in found:
            channel.close()


def test_two_workers_of_one_index_are_told_on_all_sides(monkeypatch):
    monkeypatch.setattr(channels, "bind", lambda spec: None)  # they are on two machines
    cluster = specs(3)
    with bind(cluster[0]) as listener:
        found = all_at_once(
            [
                (open_channel, cluster[0], "same", listener),
                (open_channel, cluster[1], "same", None),
                (open_channel, cluster[1], "same", None),
            ]
        )
    for message in found:
        assert message.startswith("WorkerLost: two processes are worker 1: process ")
        assert "Give each its own index" in message


def test_other_code_and_other_clusters_are_told_on_all_sides():
    cluster = specs(2)
    for message in all_at_once([(start, cluster[0], "1.0"), (start, cluster[1], "1.1")]):
        assert "worker 1 (process" in message
        assert "runs other code of gpt_2_simple (1.1) than worker 0 (1.0)" in message
    cluster = specs(2)
    other = ClusterSpec((cluster[0].address, workers.free_addresses(1)[0]), 1)
    for message in all_at_once([(start, cluster[0]), (start, other)]):
        assert "lists other addresses" in message


def test_port_that_is_taken_is_told():
    spec = specs(2)[1]
    with bind(spec), pytest.raises(OSError, match=r"port \d+ of worker 1 .* is taken"):
        bind(spec)


def test_strangers_at_the_port_are_ignored():
    cluster = specs(2)

    def knock():
        host = cluster[0].address.split(":")[0]
        port = int(cluster[0].address.split(":")[1])
        for text in (b"", b"GET / HTTP/1.1\r\n\r\n", b"\0\0\0\2[]", b"\0\0\0\5hello"):
            while True:
                try:
                    with socket.create_connection((host, port), 2) as stranger:
                        stranger.sendall(text)
                    break
                except OSError:
                    time.sleep(0.02)
        return start(cluster[1])

    found = all_at_once([(start, cluster[0]), (knock,)])
    assert all(isinstance(c, channels.Channel) for c in found), found
    for channel in found:
        channel.close()


def test_something_else_at_the_address_of_worker_0_is_told():
    cluster = specs(2)
    with socket.create_server(("127.0.0.1", int(cluster[0].address.split(":")[1]))) as server:
        server.settimeout(0.2)
        ended = threading.Event()

        def answer():
            while not ended.is_set():
                with contextlib.suppress(OSError):
                    with server.accept()[0] as accepted:
                        accepted.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        message = outcome(start, cluster[1])
        ended.set()
        thread.join()
    assert "what answers there is no worker 0 that waits for others" in message


def test_wrong_number_of_seconds_is_told(monkeypatch):
    monkeypatch.setenv("GPT2_START_SECONDS", "soon")
    with pytest.raises(ValueError, match="GPT2_START_SECONDS='soon' must be a number"):
        channels.start_seconds()
