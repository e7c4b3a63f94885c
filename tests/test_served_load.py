"""Idle, slow, half-open and flooding clients of a real server; others are served meanwhile."""

import contextlib
import json
import os
import socket
import sys
import threading
import time

import httpx
import pytest
from served_model import NAME, serving, started_engine, wait_until

from gpt_2_simple.serving import api, bodies
from gpt_2_simple.serving import server as servers

ON_LINUX = sys.platform == "linux"
MB = 2**20
GET = b"GET /health HTTP/1.1\r\nHost: x\r\n"


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    with started_engine(tmp_path_factory.mktemp("models"), max_batch=8, max_queue=16) as engine:
        yield engine


@pytest.fixture
def served(engine):
    """Its address, and the server."""
    with serving(api.make_app({NAME: engine}, api.Limits())) as (address, server):
        complete(address)
        yield address, server


@pytest.fixture
def many_files():
    """Lets this process, in which clients and server are, open 4,096 files."""
    resource = pytest.importorskip("resource", reason="Windows has no limit to raise")
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    hard, wanted = before[1], 4096
    if hard != resource.RLIM_INFINITY and hard < wanted:
        pytest.skip(f"a process may open {hard} files here; {wanted} are needed")
    if before[0] != resource.RLIM_INFINITY and before[0] < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def complete(address):
    """Asserts that another client gets its text."""
    body = {"model": NAME, "prompt": "A", "max_tokens": 20, "temperature": 0}
    answer = httpx.post(f"{address}/v1/completions", json=body, timeout=60)
    assert answer.json()["usage"]["completion_tokens"] == 20


def resident_bytes():
    """This process's memory; 0 where it is not known."""
    if not ON_LINUX:
        return 0
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@contextlib.contextmanager
def connections(address, count, receive_buffer=None):
    """Connections of clients."""
    host, port = address.removeprefix("http://").split(":")
    with contextlib.ExitStack() as stack:
        found = []
        for _ in range(count):
            connection = stack.enter_context(socket.socket())
            if receive_buffer is not None:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
            connection.settimeout(60)
            connection.connect((host, int(port)))
            found.append(connection)
        yield found


def read_all(connection):
    """All that comes until the server closes the connection."""
    found = b""
    with contextlib.suppress(ConnectionError):
        while part := connection.recv(65536):
            found += part
    return found


def send(connection, data):
    """Whether the server still takes the bytes."""
    try:
        connection.sendall(data)
    except ConnectionError:
        return False
    return True


def test_1000_idle_connections_take_bounded_memory_and_others_are_served(served, many_files):
    address, server = served
    before = resident_bytes()
    with connections(address, 1000):
        wait_until(lambda: len(server.server_state.connections) >= 1000)
        complete(address)
        assert resident_bytes() - before < 100 * MB
    wait_until(lambda: len(server.server_state.connections) == 0)


def test_a_head_that_comes_one_byte_at_a_time_is_closed_in_time(served, monkeypatch):
    address, server = served
    monkeypatch.setattr(servers, "HEAD_SECONDS", 1)
    with connections(address, 50) as slow:
        end = time.monotonic() + 60
        while slow_ones := [c for c in slow if send(c, b"G")]:
            assert time.monotonic() < end, f"{len(slow_ones)} are still open"
            complete(address)
            slow = slow_ones
    wait_until(lambda: len(server.server_state.connections) == 0)


def test_the_second_head_of_a_connection_has_a_time_limit_too(served, monkeypatch):
    address, server = served
    monkeypatch.setattr(servers, "HEAD_SECONDS", 1)
    with connections(address, 20) as slow:
        for connection in slow:
            connection.sendall(GET + b"\r\n")
            assert b" 200 " in connection.recv(65536)
            connection.sendall(b"G")  # and no more: the connection rests no longer
        complete(address)
        wait_until(lambda: len(server.server_state.connections) == 0)


def test_a_body_that_goes_on_after_its_answer_is_not_read_for_ever(served, monkeypatch):
    address, server = served
    monkeypatch.setattr(servers, "HEAD_SECONDS", 1)
    with connections(address, 1) as (connection,):
        connection.sendall(b"POST /health HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n{")
        assert b" 405 " in connection.recv(65536)
        end = time.monotonic() + 60
        while send(connection, b" "):
            assert time.monotonic() < end
            time.sleep(0.01)
    wait_until(lambda: len(server.server_state.connections) == 0)


def test_a_request_that_comes_one_byte_at_a_time_is_answered_within_the_limits(served):
    address, _ = served
    body = json.dumps({"model": NAME, "prompt": "A", "max_tokens": 3}).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: "
    with connections(address, 1) as (connection,):
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for byte in head + str(len(body)).encode() + b"\r\n\r\n" + body:
            connection.sendall(bytes([byte]))
        assert b" 200 OK" in read_all(connection).splitlines()[0]


def large_request():
    """A request with an answer that no socket's buffers hold."""
    body = {"model": NAME, "prompt": ["A" * 40] * 12, "max_tokens": 50, "n": 8, "logprobs": 20,
            "echo": True}  # fmt: skip
    content = json.dumps(body).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: "
    return head + str(len(content)).encode() + b"\r\n\r\n" + content


@pytest.mark.skipif(not ON_LINUX, reason="elsewhere a socket's buffers may hold the whole answer")
def test_a_client_that_reads_nothing_is_dropped_and_others_served(served, monkeypatch):
    address, server = served
    monkeypatch.setattr(servers, "WRITE_SECONDS", 1)
    with connections(address, 1, receive_buffer=4096) as (stuck,):
        stuck.sendall(large_request())
        wait_until(lambda: any(p.flow.write_paused for p in server.server_state.connections))
        complete(address)
        wait_until(lambda: len(server.server_state.connections) == 0)


def test_a_client_that_reads_slowly_gets_the_whole_answer(served, monkeypatch):
    address, _ = served
    monkeypatch.setattr(servers, "WRITE_SECONDS", 2)
    with connections(address, 1, receive_buffer=64 * 1024) as (slow,):
        slow.sendall(large_request().replace(b"Host: x", b"Host: x\r\nConnection: close"))
        found = b""
        while part := slow.recv(50_000):
            found += part
            time.sleep(0.05)
    head, _, body = found.partition(b"\r\n\r\n")
    assert b" 200 OK" in head
    assert len(json.loads(body)["choices"]) == 96


def test_half_open_connections_are_closed_and_others_served(served, monkeypatch):
    address, server = served
    monkeypatch.setattr(servers, "HEAD_SECONDS", 1)
    starts = b"", b"P", GET, GET + b"X: a", GET + b"\r\n"
    with connections(address, 100) as clients:
        for i, connection in enumerate(clients):
            connection.sendall(starts[i % len(starts)])
            if i % 2:
                connection.shutdown(socket.SHUT_WR)
        complete(address)
        wait_until(lambda: len(server.server_state.connections) == 0)


FLOODS = {
    "one header without end": GET + b"X: " + b"a" * MB,
    "many headers": GET + b"a: b\r\n" * 200_000,
    "a long address": b"GET /" + b"a" * MB,
    "many requests at once": (GET + b"\r\n") * 5_000,
    "chunks with long extensions": b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n"
    b"Transfer-Encoding: chunked\r\n\r\n1;" + b"a" * MB,
}


@pytest.mark.parametrize("flood", FLOODS.values(), ids=FLOODS.keys())
def test_floods_of_50_clients_take_bounded_memory_and_others_are_served(served, flood):
    address, server = served
    before = resident_bytes()
    with connections(address, 50) as clients:
        for connection in clients:
            connection.setblocking(False)
            with contextlib.suppress(OSError):
                connection.send(flood)
        complete(address)
        for connection in clients:
            with contextlib.suppress(OSError):
                connection.send(flood)
        complete(address)
        assert resident_bytes() - before < 100 * MB
    wait_until(lambda: len(server.server_state.connections) == 0)


def long_request(n_bytes):
    """A request with a prompt of so many bytes."""
    return request_of({"model": NAME, "prompt": "a" * n_bytes, "truncate_prompt_tokens": 5})


def request_of(body):
    """The last request of a connection."""
    content = json.dumps(body, separators=(",", ":")).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: "
    return head + str(len(content)).encode() + b"\r\n\r\n" + content


def test_slow_bodies_of_800_clients_take_bounded_memory_and_others_are_served(served, many_files):
    address, server = served
    before = resident_bytes()
    with connections(address, 800) as slow:
        for connection in slow:
            send(connection, long_request(MB - 1000)[:-1])
        complete(address)
        assert resident_bytes() - before < 500 * MB
        with connections(address, 1) as (quick,):
            quick.sendall(long_request(MB - 1000))
            assert b" 200 OK" in read_all(quick)
        assert resident_bytes() - before < 500 * MB
    wait_until(lambda: len(server.server_state.connections) == 0)


def test_few_bodies_are_read_at_the_same_time(served, monkeypatch):
    address, _ = served
    read, n_reading, most = api.completions.read_completion, 0, 0
    lock = threading.Lock()

    def counted(*args):
        nonlocal n_reading, most
        with lock:
            n_reading += 1
            most = max(most, n_reading)
        time.sleep(0.02)
        try:
            return read(*args)
        finally:
            with lock:
                n_reading -= 1

    monkeypatch.setattr(api.completions, "read_completion", counted)
    with connections(address, 40) as clients:
        for connection in clients:
            connection.sendall(long_request(100))
        statuses = {read_all(connection).split()[1] for connection in clients}
    assert statuses <= {b"200", b"429"}
    assert b"200" in statuses
    assert 1 < most <= bodies.MAX_READERS


def test_the_slowest_body_gives_way_and_is_told_when_to_come_again(served, monkeypatch):
    address, _ = served
    monkeypatch.setattr(bodies, "MAX_BODIES_BYTES", 100_000)
    arrived, make_room = [], bodies.Bodies._make_room

    def noted(self):
        arrived.extend(body for body in self._arriving if body not in arrived)
        make_room(self)

    monkeypatch.setattr(bodies.Bodies, "_make_room", noted)
    with connections(address, 4) as clients:
        for number, connection in enumerate(clients, start=1):
            connection.sendall(long_request(40_000)[:-1])
            wait_until(lambda number=number: len(arrived) == number)  # they arrive in this order
        for gone in clients[:2]:
            answer = read_all(gone)
            assert b" 503 " in answer.splitlines()[0]
            assert b"retry-after: " in answer
        complete(address)
        for kept in clients[2:]:
            kept.sendall(b"}")
            assert b" 200 OK" in read_all(kept).splitlines()[0]
    with connections(address, 1) as (alone,):  # what was held is free again
        alone.sendall(long_request(90_000))
        assert b" 200 OK" in read_all(alone).splitlines()[0]
