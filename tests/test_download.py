"""Downloads: fetched, continued, verified; from a server that fails in many ways."""

import base64
import collections
import email.utils
import errno
import gzip
import hashlib
import http.server
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import requests
import tensorflow as tf

from gpt_2_simple.common import report
from gpt_2_simple.data import vocabulary
from gpt_2_simple.storage import download

tf1 = tf.compat.v1
SHARED = Path(__file__, "../../../shared/data").resolve()
DATA = "model.ckpt.data-00000-of-00001"
PATH = "/mirror/models/124M/"
CUT = 3 * download._CHUNK_BYTES  # where connections break; whether a cut chunk is lost is urllib3's
PAGE = b"<!DOCTYPE html><html><body>Please log in</body></html>"
REAL_SHA256 = dict(download.VOCABULARY_SHA256)


@pytest.fixture(scope="session")
def content(tmp_path_factory):
    """The seven files of a small model, as bytes by name."""
    folder = tmp_path_factory.mktemp("published")
    with tf1.Session(graph=tf.Graph()) as sess:
        for layer in range(4):
            value = np.random.default_rng(layer).standard_normal((100, 128), np.float32)
            tf1.get_variable(f"model/h{layer}/w", initializer=value, use_resource=False)
        sess.run(tf1.global_variables_initializer())
        tf1.train.Saver().save(sess, os.path.join(folder, "model.ckpt"))
    (folder / "hparams.json").write_text('{"n_vocab": 50257, "n_ctx": 16}')
    (folder / "encoder.json").write_text('{"a": 0, "b": 1, "ab": 2}')
    (folder / "vocab.bpe").write_text("#version: 0.2\na b\n")
    files = {name: (folder / name).read_bytes() for name in download.MODEL_FILES}
    assert len(files[DATA]) == 4 * 100 * 128 * 4
    return files


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_GET(self):
        server, name = self.server, self.path.rpartition("/")[2]
        server.seen.append((self.command, self.path, dict(self.headers)))
        script = server.script[name]
        behave = script.pop(0) if script else server.always.get(name, serve)
        if not self.path.startswith(PATH) or name not in server.files:
            behave = answer(404)
        behave(self, server.files[name] if name in server.files else b"")

    do_HEAD = do_GET

    def reply(self, status, headers, body):
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def hang_up(self):
        self.close_connection = True
        self.wfile.flush()
        self.connection.shutdown(socket.SHUT_RDWR)


class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, files):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = dict(files)
        self.seen = []  # (method, path, headers) of each request
        self.script = collections.defaultdict(list)  # by file name: how to treat the next requests
        self.always = {}  # by file name: how to treat all other requests
        self.headers = {"ETag": '"version 1"', "Last-Modified": "Mon, 01 Jan 2024 00:00:00 GMT"}
        self.url = f"http://127.0.0.1:{self.server_port}/mirror"

    def handle_error(self, request, client_address):
        pass  # clients that hang up

    def ranges(self, name=DATA):
        """The Range header of each request for a file."""
        return [seen[2].get("Range") for seen in self.seen if seen[1] == PATH + name]

    def names(self):
        return [path.rpartition("/")[2] for _, path, _ in self.seen]


def plan(handler, body):
    """What a good server answers: status, headers and body."""
    headers = dict(handler.server.headers)
    if headers.pop("md5", None):
        headers["Content-MD5"] = base64.b64encode(hashlib.md5(body).digest()).decode()
    wanted = re.fullmatch(r"bytes=(\d+)-", handler.headers.get("Range", ""))
    current = handler.headers.get("If-Range") in (
        None,
        headers.get("ETag"),
        headers.get("Last-Modified"),
    )
    if not wanted or not current:
        return 200, headers | {"Content-Length": str(len(body))}, body
    headers.pop("Content-MD5", None)
    start = int(wanted[1])
    if start >= len(body):
        return 416, {"Content-Range": f"bytes */{len(body)}", "Content-Length": "0"}, b""
    rest = body[start:]
    headers["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
    return 206, headers | {"Content-Length": str(len(rest))}, rest


def serve(handler, body):
    handler.reply(*plan(handler, body))


def answer(status, body=b"no", **headers):
    headers = {key.replace("_", "-"): value for key, value in headers.items()}
    return lambda handler, _: handler.reply(
        status, {"Content-Length": str(len(body))} | headers, body
    )


def cut(handler, body):
    """Sends the headers, CUT bytes, and hangs up."""
    status, headers, rest = plan(handler, body)
    handler.reply(status, headers, rest[:CUT])
    handler.hang_up()


def cut_within_a_chunk(handler, body):
    status, headers, rest = plan(handler, body)
    handler.reply(status, headers, rest[:50_001])
    handler.hang_up()


def hang_up(handler, body):
    handler.hang_up()


def ignore_range(handler, body):
    del handler.headers["Range"]
    serve(handler, body)


def ignore_range_and_cut(handler, body):
    del handler.headers["Range"]
    cut(handler, body)


def with_headers(**changes):
    """Serves well, but for some headers."""

    def behave(handler, body):
        status, headers, rest = plan(handler, body)
        headers |= {key.replace("_", "-"): value for key, value in changes.items()}
        handler.reply(status, headers, rest)
        handler.hang_up()

    return behave


def announce_too_much(handler, body):
    with_headers(Content_Length=str(len(body) + 10))(handler, body)


def announce_too_little(handler, body):
    with_headers(Content_Length=str(len(body) - 10))(handler, body)


def wrong_md5(handler, body):
    with_headers(Content_MD5=base64.b64encode(bytes(16)).decode())(handler, body)


def ignore_if_range(handler, body):
    """Answers 206 with bytes of another version, and says so in its ETag."""
    del handler.headers["If-Range"]
    with_headers(ETag='"version 2"')(handler, bytes(len(body)))


def wrong_start(handler, body):
    """Answers any range with bytes from 7 on, as many as were asked for, and says so."""
    rest = body[7 : 7 + len(body) - CUT]
    headers = {"Content-Range": f"bytes 7-{6 + len(rest)}/{len(body)}"}
    handler.reply(206, headers | {"Content-Length": str(len(rest))}, rest)


def other_total(handler, body):
    """Answers a range from a longer file, without a validator to tell it by."""
    rest = bytes(len(body) - CUT)
    headers = {"Content-Range": f"bytes {CUT}-{len(body) - 1}/{len(body) + 1}"}
    handler.reply(206, headers | {"Content-Length": str(len(rest))}, rest)


def chunked_page(handler, body):
    headers = {"Transfer-Encoding": "chunked", "Content-Type": "text/html; charset=utf-8"}
    handler.reply(200, headers, b"%x\r\n%b\r\n0\r\n\r\n" % (len(PAGE), PAGE))


def zip_it(handler, body):
    body = gzip.compress(body)
    headers = {"Content-Encoding": "gzip", "Content-Length": str(len(body)), "ETag": '"zipped"'}
    handler.reply(200, headers, body)


def chunks(handler, body):
    handler.reply(
        200, {"Transfer-Encoding": "chunked"}, b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
    )


def chunks_and_a_length(handler, body):
    headers = {"Transfer-Encoding": "chunked", "Content-Length": str(len(body) + 50)}
    handler.reply(200, headers, b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body))


def until_the_end(handler, body):
    """Neither a length nor chunks: the body ends when the connection does."""
    handler.reply(200, {}, body)
    handler.hang_up()


def until_an_early_end(handler, body):
    handler.reply(200, {}, body[:-5])
    handler.hang_up()


def stall(handler, body):
    status, headers, rest = plan(handler, body)
    handler.reply(status, headers, rest[:CUT])
    handler.wfile.flush()
    time.sleep(1.0)
    handler.hang_up()


@pytest.fixture
def server(content):
    with Server(content) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def waits(monkeypatch):
    """The seconds of each back-off, which takes no time here."""
    waits = []
    monkeypatch.setattr(download, "_sleep", waits.append)
    return waits


@pytest.fixture(autouse=True)
def small_world(monkeypatch, content, waits):
    pins = {
        name: hashlib.sha256(content[name]).hexdigest() for name in ("encoder.json", "vocab.bpe")
    }
    monkeypatch.setattr(download, "VOCABULARY_SHA256", pins)
    monkeypatch.setattr(download, "_MIN_LEFTOVER_BYTES", 1000)
    monkeypatch.setattr(download.os, "fsync", lambda file: None)  # it would take most of the time
    monkeypatch.delenv("GPT2_BASE_URL", raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture
def fetch(server, tmp_path):
    """Downloads from the server; returns the model's folder."""

    def fetch(base_url=None):
        download.download_gpt2(tmp_path / "models", base_url=base_url or server.url)
        return tmp_path / "models" / "124M"

    return fetch


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "models" / "124M"
    folder.mkdir(parents=True)
    return folder


def put(folder, content, **sizes):
    """Writes the files, those in `sizes` cut short: as an interrupted 0.8.1 leaves them."""
    for name, body in content.items():
        (folder / name).write_bytes(body[: sizes.get(name, len(body))])


def read(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def is_downloaded(folder):
    return download.is_gpt2_downloaded(folder.parent, folder.name)


# The straight way


def test_download_fetches_the_seven_files(fetch, server, content, waits):
    folder = fetch()
    assert read(folder) == content
    assert server.names() == list(download.MODEL_FILES)
    assert server.names()[-1] == DATA
    assert {method for method, _, _ in server.seen} == {"GET"}
    assert {headers["Accept-Encoding"] for _, _, headers in server.seen} == {"identity"}
    assert not [headers for _, _, headers in server.seen if "Range" in headers]
    assert waits == []
    assert is_downloaded(folder)


def test_whole_files_are_not_fetched_again(fetch, server, content, capsys):
    folder = fetch()
    server.seen.clear()
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    capsys.readouterr()
    fetch()
    assert server.seen == []
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    assert "124M is already there" in capsys.readouterr().out


@pytest.mark.parametrize("name", download.MODEL_FILES)
def test_only_missing_files_are_fetched(fetch, server, folder, content, name):
    put(folder, content)
    (folder / name).unlink()
    assert not is_downloaded(folder)
    fetch()
    assert server.names() == [name]
    assert read(folder) == content


def test_download_keeps_other_files_in_the_folder(fetch, folder, content):
    (folder / "notes.txt").write_text("mine")
    (folder / "model.ckpt.data-00000-of-00001.bak").write_text("mine too")
    fetch()
    assert read(folder) == content | {
        "notes.txt": b"mine",
        "model.ckpt.data-00000-of-00001.bak": b"mine too",
    }


def test_download_flushes_a_file_before_it_gets_its_name(fetch, monkeypatch):
    synced, replace = set(), os.replace
    monkeypatch.setattr(download.os, "fsync", lambda file: synced.add(os.fstat(file).st_ino))

    def checked_replace(source, target):
        assert os.stat(source).st_ino in synced
        synced.discard(os.stat(source).st_ino)
        replace(source, target)

    monkeypatch.setattr(download.os, "replace", checked_replace)
    fetch()


def test_download_makes_model_dir(tmp_path, server, content):
    download.download_gpt2(str(tmp_path / "a" / "b"), "124M", server.url)
    assert read(tmp_path / "a" / "b" / "124M") == content


# A server that misbehaves for a while

RECOVERIES = {
    "cut once": [cut],
    "cut twice": [cut, cut],
    "cut within a chunk": [cut_within_a_chunk, cut_within_a_chunk],
    "no answer": [hang_up, hang_up, hang_up],
    "500": [answer(500), answer(502), answer(503)],
    "429": [answer(429, Retry_After="7")],
    "stalls": [stall],
    "announces too much": [announce_too_much],
    "announces too little": [announce_too_little],
    "wrong MD5": [wrong_md5],
    "web page": [answer(200, PAGE, Content_Type="text/html")],
    "web page without a length": [lambda handler, _: until_the_end(handler, PAGE)],
    "gzip that breaks off": [
        lambda handler, body: until_the_end(handler, gzip.compress(body)[:99])
    ],
    "no length, cut": [until_an_early_end],
    "cut, then ignores Range": [cut, ignore_range],
    "cut, then 416": [cut, answer(416, Content_Range="bytes */50")],
    "cut, then a bare 416": [cut, answer(416)],
    "cut, then the wrong range": [cut, wrong_start],
    "cut, then another total": [cut, other_total],
    "cut, then no Content-Range": [cut, with_headers(Content_Range="")],
    "cut, then another version": [cut, ignore_if_range],
    "cut, then 500": [cut, answer(500), cut],
    "cut, then a web page": [cut, answer(200, PAGE, Content_Type="text/html")],
}


@pytest.mark.parametrize("name", [DATA, "encoder.json"])
@pytest.mark.parametrize("case", RECOVERIES)
def test_download_recovers_from_failures(fetch, server, content, monkeypatch, case, name):
    if name == "encoder.json":  # as long as the data file, so that CUT falls into it
        body = json.dumps({f"token {i}": i for i in range(9000)}).encode()
        server.files[name] = content[name] if "announces" in case else body
        pins = {name: hashlib.sha256(server.files[name]).hexdigest()}
        monkeypatch.setattr(download, "VOCABULARY_SHA256", pins)
    monkeypatch.setattr(download, "_TIMEOUT", (1.0, 0.3))
    server.script[name] = list(RECOVERIES[case])
    folder = fetch()
    assert read(folder) == server.files
    assert server.script[name] == []


@pytest.mark.parametrize("behave", [zip_it, chunks, chunks_and_a_length, until_the_end])
def test_unusual_answers_need_no_second_request(fetch, server, content, waits, behave):
    for name in content:
        server.always[name] = behave
    assert read(fetch()) == content
    assert waits == []


def test_compressed_range_makes_the_file_start_over(fetch, server, content):
    def zip_ranges(handler, body):
        changes = {"Content_Encoding": "gzip"} if "Range" in handler.headers else {}
        with_headers(**changes)(handler, body)

    server.script[DATA] = [cut]
    server.always[DATA] = zip_ranges
    assert read(fetch()) == content
    assert server.ranges() == [None, f"bytes={CUT}-", None]


def test_resume_after_a_cut_fetches_no_byte_twice(fetch, server):
    server.script[DATA] = [cut, cut]
    fetch()
    assert server.ranges() == [None, f"bytes={CUT}-", f"bytes={2 * CUT}-"]
    assert {seen[2].get("If-Range") for seen in server.seen if "Range" in seen[2]} == {
        '"version 1"'
    }


@pytest.mark.parametrize("page", [answer(200, PAGE, Content_Type="text/html"), chunked_page])
def test_web_page_instead_of_a_range_keeps_the_bytes_so_far(fetch, server, page):
    server.script[DATA] = [cut, page]
    fetch()
    assert server.ranges() == [None, f"bytes={CUT}-", f"bytes={CUT}-"]


def test_back_off_doubles_and_progress_resets_it(fetch, server, waits):
    server.script[DATA] = [answer(503)] * 4 + [cut] + [answer(503)] * 2
    fetch()
    assert len(waits) == 7
    for wait, longest in zip(waits, [0.5, 1, 2, 4, 0.5, 1, 2], strict=True):
        assert longest / 2 <= wait <= longest
    assert len(set(waits)) == 7


@pytest.mark.parametrize("as_date", [False, True])
def test_retry_after_is_respected(fetch, server, waits, as_date):
    value = email.utils.formatdate(time.time() + 100, usegmt=True) if as_date else "100"
    server.script["hparams.json"] = [answer(429, Retry_After=value)]
    fetch()
    assert len(waits) == 1
    assert 90 <= waits[0] <= 100


def test_unreadable_retry_after_is_ignored(fetch, server, waits):
    server.script["hparams.json"] = [answer(503, Retry_After="soon")]
    fetch()
    assert len(waits) == 1
    assert waits[0] <= 0.5


# A server that never behaves


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


FAILURES = {
    "404": (answer(404), 1, "404"),
    "403": (answer(403), 1, "403"),
    "206 that nobody asked for": (answer(206), 1, "206"),
    "500": (answer(500), 6, "500"),
    "a wait of an hour": (answer(503, Retry_After="3600"), 1, "asks to wait 3,600 s"),
    "redirects in a circle": (answer(302, Location=PATH + DATA), 31, "redirects"),
    "cut always, no ranges": (ignore_range_and_cut, 7, "204,800|connection failed"),
    "no answer": (hang_up, 6, "connection failed"),
    "announces too much": (announce_too_much, 9, "connection failed|bytes came|start over"),
    "announces too little": (announce_too_little, 2, "204,790 bytes where the index needs 204,800"),
    "wrong MD5": (wrong_md5, 2, "MD5"),
    "web page": (answer(200, PAGE, Content_Type="text/html"), 2, "54 bytes"),
    "web page without a length": (lambda handler, _: chunks(handler, PAGE), 2, "log in"),
}


@pytest.mark.parametrize("case", FAILURES)
def test_download_gives_up(fetch, server, content, folder, case):
    behave, most_requests, reason = FAILURES[case]
    server.always[DATA] = behave
    with pytest.raises(OSError, match=reason) as caught:
        fetch()
    assert type(caught.value) is (FileNotFoundError if case == "404" else ConnectionError)
    for name in download.MODEL_FILES:
        assert f"{server.url}/models/124M/{name}\n" in f"{caught.value}\n"
    assert str(folder) in str(caught.value)
    assert "GPT2_BASE_URL" in str(caught.value)
    assert 1 <= len(server.ranges()) <= most_requests
    # What is in place stays, and what failed its checks gets no name.
    leftovers = read(folder)
    leftovers.pop(DATA + ".part", None)
    leftovers.pop(DATA + ".part.json", None)
    assert leftovers == {name: body for name, body in content.items() if name != DATA}
    assert not is_downloaded(folder)
    # And once the server has mended its ways, the next call succeeds.
    server.always.clear()
    fetch()
    assert read(folder) == content


def test_unreachable_server_is_a_connection_error(folder, waits):
    url = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(ConnectionError, match="refused") as caught:
        download.download_gpt2(folder.parent, base_url=url)
    assert f"{url}/models/124M/{DATA}" in str(caught.value)
    assert "Max retries" not in str(caught.value)
    assert len(waits) == 5
    assert read(folder) == {}


@pytest.mark.parametrize("name", download.MODEL_FILES)
def test_login_page_never_becomes_a_file(fetch, server, folder, name):
    server.always[name] = answer(200, PAGE)
    with pytest.raises(ConnectionError, match=name):
        fetch()
    assert not (folder / name).exists()


@pytest.mark.parametrize("name", ["encoder.json", "vocab.bpe"])
def test_vocabulary_with_another_sha256_is_refused(fetch, server, folder, name):
    server.files[name] = server.files[name].replace(b"a", b"c")
    with pytest.raises(ConnectionError, match="SHA-256"):
        fetch()
    assert not (folder / name).exists()


def test_hparams_with_another_n_vocab_are_refused(fetch, server, folder):
    server.files["hparams.json"] = b'{"n_vocab": 257}'
    with pytest.raises(ConnectionError, match="n_vocab is not 50257"):
        fetch()
    assert not (folder / "hparams.json").exists()


# From one run to the next


@pytest.fixture
def interrupted(fetch, server, folder):
    """A folder in which the data file is partly there; the server is well again."""
    server.script[DATA] = [cut] + [answer(500)] * 6
    with pytest.raises(ConnectionError, match="500"):
        fetch()
    server.seen.clear()
    server.script.clear()
    assert (folder / (DATA + ".part")).stat().st_size == CUT == 98304
    return folder


def test_resume_by_a_later_process(interrupted, fetch, server, content):
    fetch()
    assert server.names() == [DATA]
    assert server.ranges() == ["bytes=98304-"]
    assert read(interrupted) == content


def test_file_that_changed_on_the_server_starts_over(interrupted, fetch, server, content):
    server.headers = {"ETag": '"version 2"'}
    fetch()
    assert server.ranges() == ["bytes=98304-"]  # answered by 200 and the whole file
    assert read(interrupted) == content


def test_changed_file_that_does_not_fit_the_index_is_refused(interrupted, fetch, server):
    server.headers = {"ETag": '"version 2"'}
    server.files[DATA] = server.files[DATA][:1000]
    with pytest.raises(ConnectionError, match="1,000 bytes where the index needs 204,800"):
        fetch()
    assert (interrupted / (DATA + ".part")).stat().st_size == 98304


def test_file_of_another_server_starts_over(interrupted, fetch, server, content):
    fetch(server.url.replace("127.0.0.1", "localhost"))
    assert server.ranges() == [None]
    assert read(interrupted) == content


@pytest.mark.parametrize("note", [b"", b"{", b"[]", b'{"colour": 3}', b'{"etag": "1"}', None])
def test_partial_file_without_a_readable_note_starts_over(
    interrupted, fetch, server, content, note
):
    path = interrupted / (DATA + ".part.json")
    path.unlink() if note is None else path.write_bytes(note)
    (interrupted / (DATA + ".part")).write_bytes(bytes(98304))
    fetch()
    assert server.ranges() == [None]
    assert read(interrupted) == content


def test_partial_file_that_is_too_long_starts_over(interrupted, fetch, server, content):
    (interrupted / (DATA + ".part")).write_bytes(bytes(204801))
    fetch()
    assert server.ranges() == [None]
    assert read(interrupted) == content


def test_complete_partial_file_needs_no_request(interrupted, fetch, server, content):
    (interrupted / (DATA + ".part")).write_bytes(content[DATA])
    fetch()
    assert server.seen == []
    assert read(interrupted) == content


def test_status_416_completes_a_partial_file_of_unknown_length(interrupted, fetch, server, content):
    note = interrupted / (DATA + ".part.json")
    note.write_text(json.dumps(json.loads(note.read_text()) | {"total": None}))
    (interrupted / (DATA + ".part")).write_bytes(content[DATA])
    fetch()
    assert server.ranges() == ["bytes=204800-"]
    assert read(interrupted) == content


def test_md5_finds_a_damaged_partial_file(fetch, server, folder, content):
    server.headers["md5"] = True
    server.script[DATA] = [cut] + [answer(500)] * 6
    with pytest.raises(ConnectionError):
        fetch()
    with open(folder / (DATA + ".part"), "r+b") as file:
        file.write(b"spoiled!")
    server.seen.clear()
    server.script.clear()
    fetch()
    assert server.ranges() == ["bytes=98304-", None]
    assert read(folder) == content


@pytest.mark.parametrize(
    ("headers", "ranges"),
    [
        ({}, [None, None]),
        ({"ETag": 'W/"weak"'}, [None, None]),
        ({"Last-Modified": "Mon, 01 Jan 2024 00:00:00 GMT"}, [None, "bytes=98304-"]),
        ({"ETag": 'W/"weak"', "Last-Modified": "Monday"}, [None, "bytes=98304-"]),
    ],
)
def test_resume_needs_a_strong_validator(fetch, server, content, headers, ranges):
    server.headers = headers
    server.script[DATA] = [cut]
    assert read(fetch()) == content
    assert server.ranges() == ranges


def test_partial_file_beside_a_whole_file_is_removed(interrupted, fetch, content):
    (interrupted / DATA).write_bytes(content[DATA])  # fetched by hand
    fetch()
    assert read(interrupted) == content


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such signals between processes")
def test_ctrl_c_keeps_the_bytes_so_far(fetch, server, folder, content):
    part = folder / (DATA + ".part")

    def interrupt(handler, body):
        status, headers, rest = plan(handler, body)
        handler.reply(status, headers, rest[:CUT])
        handler.wfile.flush()
        while not part.exists() or part.stat().st_size < 98304:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.2)
        handler.hang_up()

    server.script[DATA] = [interrupt]
    # A shell that starts the tests in the background has them ignore the signal.
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            fetch()
    finally:
        signal.signal(signal.SIGINT, handler)
    assert part.stat().st_size == 98304
    assert not (folder / DATA).exists()
    fetch()
    assert server.ranges() == [None, "bytes=98304-"]
    assert read(folder) == content


# What gpt-2-simple 0.8.1 leaves


def test_truncated_data_file_is_continued_if_the_server_sends_its_md5(
    fetch, server, folder, content
):
    put(folder, content, **{DATA: 150_000})
    server.headers["md5"] = True
    assert not is_downloaded(folder)
    fetch()
    assert [method for method, _, _ in server.seen] == ["HEAD", "GET"]
    assert server.ranges() == [None, "bytes=150000-"]
    assert read(folder) == content


def test_truncated_data_file_without_md5_is_fetched_anew(fetch, server, folder, content):
    put(folder, content, **{DATA: 150_000})
    fetch()
    assert server.ranges() == [None, None]  # HEAD, GET
    assert read(folder) == content


def test_md5_finds_a_truncated_data_file_of_another_origin(fetch, server, folder, content):
    put(folder, content)
    (folder / DATA).write_bytes(bytes(150_000))
    server.headers["md5"] = True
    fetch()
    assert server.ranges() == [None, "bytes=150000-", None]
    assert read(folder) == content


@pytest.mark.parametrize("behave", [answer(405), answer(200), hang_up])
def test_truncated_data_file_and_a_server_without_head(fetch, server, folder, content, behave):
    put(folder, content, **{DATA: 150_000})
    server.script[DATA] = [behave]
    fetch()
    assert read(folder) == content


def test_truncated_data_file_stays_if_the_download_fails(fetch, server, folder, content):
    put(folder, content, **{DATA: 150_000})
    server.always[DATA] = answer(500)
    with pytest.raises(ConnectionError):
        fetch()
    assert (folder / DATA).read_bytes() == content[DATA][:150_000]


@pytest.mark.parametrize("name", download.MODEL_FILES)
@pytest.mark.parametrize("part", [0.0, 0.9])
def test_truncated_file_is_found_and_replaced(fetch, server, folder, content, name, part):
    put(folder, content, **{name: int(part * len(content[name]))})
    # The name in `checkpoint` comes first, so that most of a cut file may still do.
    readable = name == "checkpoint" and part > 0
    assert is_downloaded(folder) == readable
    fetch()
    assert is_downloaded(folder)
    assert readable or read(folder) == content


def test_error_pages_are_found_and_replaced(fetch, folder, content):
    put(folder, dict.fromkeys(content, b"<?xml version='1.0'?><Error>AccessDenied</Error>"))
    assert not is_downloaded(folder)
    fetch()
    assert read(folder) == content


# Models of other origins


def custom(content):
    return content | {
        "hparams.json": b'{"n_vocab": 257, "n_ctx": 8}',
        "encoder.json": '{"ä": 0}'.encode(),
        "vocab.bpe": b"",  # bytes only: no merges
    }


@pytest.mark.parametrize("model_name", ["nano", "124M", "my/own"])
def test_model_with_its_own_vocabulary_is_downloaded(tmp_path, content, model_name):
    folder = tmp_path / model_name
    folder.mkdir(parents=True)
    put(folder, custom(content))
    assert download.is_gpt2_downloaded(tmp_path, model_name)
    assert download.is_gpt2_downloaded(model_dir=str(tmp_path), model_name=model_name)
    with open(folder / DATA, "r+b") as file:
        file.truncate(204_799)
    assert not download.is_gpt2_downloaded(tmp_path, model_name)


def test_sha256_is_checked_only_under_a_published_name(tmp_path, content):
    for name in ("124M", "nano"):
        (tmp_path / name).mkdir()
        put(tmp_path / name, content | {"vocab.bpe": b"#version: 0.2\n"})
    assert not download.is_gpt2_downloaded(tmp_path, "124M")
    assert download.is_gpt2_downloaded(tmp_path, "nano")


@pytest.mark.parametrize(
    ("name", "body"),
    [
        ("vocab.bpe", b"#version: 0.2\n\xc3"),
        ("encoder.json", b"[]"),
        ("hparams.json", b"{}"),
        ("model.ckpt.meta", b""),
    ],
)
def test_damaged_own_model_is_not_downloaded(tmp_path, content, name, body):
    (tmp_path / "nano").mkdir()
    put(tmp_path / "nano", custom(content) | {name: body})
    assert not download.is_gpt2_downloaded(tmp_path, "nano")


def test_download_does_not_replace_an_own_model(fetch, server, folder, content):
    put(folder, custom(content))
    with pytest.raises(FileExistsError, match="not OpenAI's"):
        fetch()
    assert read(folder) == custom(content)
    assert server.seen == []


def test_missing_folder_is_not_downloaded(tmp_path):
    assert not download.is_gpt2_downloaded(tmp_path / "models")
    (tmp_path / "models" / "124M").mkdir(parents=True)
    assert not download.is_gpt2_downloaded(tmp_path / "models")
    assert not list(tmp_path.rglob("*.*"))


def test_folders_instead_of_files_are_not_downloaded(folder):
    for name in download.MODEL_FILES:
        (folder / name).mkdir()
    assert not is_downloaded(folder)


@pytest.mark.skipif(not (SHARED / "vocab.bpe").exists(), reason="the published files are not here")
def test_sha256_is_that_of_the_published_files():
    for name, digest in REAL_SHA256.items():
        assert hashlib.sha256((SHARED / name).read_bytes()).hexdigest() == digest


# Arguments


@pytest.mark.parametrize("name", ["", "125M", "124m", "gpt2", "../124M", None])
def test_unknown_model_name_lists_the_names(tmp_path, name):
    with pytest.raises(ValueError, match="'124M', '355M', '774M', '1558M'") as caught:
        download.download_gpt2(tmp_path / "models", name)
    assert repr(name) in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", download.MODEL_NAMES)
def test_each_model_name_has_its_own_folder(tmp_path, server, name):
    with pytest.raises(FileNotFoundError):
        download.download_gpt2(tmp_path, name, server.url + "/elsewhere")
    assert server.seen[0][1] == f"/mirror/elsewhere/models/{name}/checkpoint"
    assert (tmp_path / name).is_dir()


@pytest.mark.parametrize("url", ["ftp://example.org", "example.org/gpt-2", "https://", "/models"])
def test_base_url_must_be_an_http_address(tmp_path, url):
    with pytest.raises(ValueError, match="must start with https://") as caught:
        download.download_gpt2(tmp_path, base_url=url)
    assert repr(url) in str(caught.value)


def test_base_url_comes_from_argument_then_environment_then_default(fetch, server, monkeypatch):
    assert download._base_url(None) == "https://openaipublic.blob.core.windows.net/gpt-2"
    monkeypatch.setenv("GPT2_BASE_URL", "")
    assert download._base_url(None) == download.DEFAULT_BASE_URL
    monkeypatch.setenv("GPT2_BASE_URL", "http://mirror.example/x/")
    assert download._base_url(None) == "http://mirror.example/x"
    assert is_downloaded(fetch(server.url + "/"))


def test_environment_variable_names_a_mirror(tmp_path, server, monkeypatch, content):
    monkeypatch.setenv("GPT2_BASE_URL", server.url)
    monkeypatch.chdir(tmp_path)
    download.download_gpt2()
    assert read(tmp_path / "models" / "124M") == content


# Disk, progress, other processes


def limit_disk(monkeypatch, free):
    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr(download.shutil, "disk_usage", lambda path: usage(10**9, 0, free))


def test_disk_space_is_checked_before_the_download(fetch, server, folder, content, monkeypatch):
    put(folder, content)
    (folder / DATA).unlink()
    limit_disk(monkeypatch, 204_799)
    with pytest.raises(OSError, match="needs 204,800 more bytes.* has 204,799 free") as caught:
        fetch()
    assert caught.value.errno == errno.ENOSPC
    assert str(folder) in str(caught.value)
    assert read(folder) == {name: body for name, body in content.items() if name != DATA}


def test_only_missing_bytes_need_disk_space(interrupted, fetch, server, monkeypatch, content):
    limit_disk(monkeypatch, 204_800 - 98_304 - 1)
    with pytest.raises(OSError, match="needs 106,496 more bytes"):
        fetch()
    limit_disk(monkeypatch, 204_800 - 98_304)
    fetch()
    assert read(interrupted) == content


class Bar:
    def __init__(self, **options):
        self.options, self.count = options, 0

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def update(self, count):
        self.count += count


def test_progress_bar_counts_the_bytes_of_each_file(fetch, server, content, monkeypatch):
    bars = []
    monkeypatch.setattr(
        report, "progress", lambda **options: bars.append(Bar(**options)) or bars[-1]
    )
    server.script[DATA] = [cut]
    fetch()
    assert [bar.options["desc"] for bar in bars] == [
        f"Fetching {name}" for name in (*download.MODEL_FILES, DATA)
    ]
    for bar, name in zip(bars, content, strict=False):
        assert bar.options["total"] == len(content[name])
        assert bar.options["unit"] == "B"
    assert [bar.count for bar in bars[:6]] == [bar.options["total"] for bar in bars[:6]]
    first, second = bars[-2:]
    assert (first.options["initial"], first.count) == (0, 98304)
    assert (second.options["initial"], second.count) == (98304, 204800 - 98304)
    assert second.options["total"] == 204800


def test_without_a_terminal_each_file_is_one_line(fetch, server, monkeypatch, capsys):
    monkeypatch.setattr(report, "is_interactive", lambda: False)
    server.script[DATA] = [cut]
    fetch()
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert err == ""
    assert len(lines) == 7 + 2
    assert lines[0].startswith("Fetching checkpoint (")
    assert lines[6] == f"Fetching {DATA} (204,800 bytes)"
    assert re.fullmatch(rf"Fetching {DATA}: .*; trying again in 0\.\d s", lines[7])
    assert lines[8] == f"Fetching {DATA} (204,800 bytes) from byte 98,304 on"


def test_on_a_terminal_progress_bars_replace_the_lines(fetch, monkeypatch, capsys):
    monkeypatch.setattr(report, "is_interactive", lambda: True)
    fetch()
    out, err = capsys.readouterr()
    assert out == ""
    assert f"Fetching {DATA}: 100%" in err
    assert "205k/205k" in err


def test_verbosity_0_prints_nothing(fetch, server, capsys):
    server.script[DATA] = [cut]
    with report.verbosity(0):
        fetch()
    assert capsys.readouterr() == ("", "")


def test_two_downloads_at_once_fetch_each_file_once(fetch, server, content, monkeypatch):
    release = threading.Event()

    def slowly(handler, body):
        release.wait(10)
        serve(handler, body)

    server.script["checkpoint"] = [slowly]
    folders = []
    threads = [threading.Thread(target=lambda: folders.append(fetch())) for _ in range(4)]
    for thread in threads:
        thread.start()
    time.sleep(0.3)
    release.set()
    for thread in threads:
        thread.join()
    assert len(folders) == 4
    assert read(folders[0]) == content
    assert sorted(server.names()) == sorted(download.MODEL_FILES)


KILLED = """
import sys
from gpt_2_simple.storage import download
download.VOCABULARY_SHA256.clear()
download.download_gpt2(sys.argv[1], base_url=sys.argv[2])
"""


def test_killed_process_leaves_a_partial_file_and_no_lock(fetch, server, folder, content):
    reached, release = threading.Event(), threading.Event()

    def hold(handler, body):
        status, headers, rest = plan(handler, body)
        handler.reply(status, headers, rest[:CUT])
        handler.wfile.flush()
        reached.set()
        release.wait(60)

    server.script[DATA] = [hold]
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, folder.parent, server.url],
        cwd=Path(download.__file__).parents[1],
    )
    try:
        assert reached.wait(60)
        while not (folder / (DATA + ".part")).exists():
            time.sleep(0.01)
        assert (folder / ".download.lock").exists()
    finally:
        process.kill()
        process.wait()
        release.set()
    fetch()
    assert read(folder) == content


def test_requests_have_timeouts(fetch, monkeypatch):
    limits = []
    ask = requests.Session.request

    def request(self, *args, **options):
        limits.append(options["timeout"])
        return ask(self, *args, **options)

    monkeypatch.setattr(requests.Session, "request", request)
    fetch()
    assert limits == [(10.0, 30.0)] * 7


def test_own_vocabulary_of_the_published_size_is_not_replaced(
    fetch, server, folder, content, monkeypatch
):
    byte_vocabulary = vocabulary.byte_vocabulary()
    monkeypatch.setattr(download, "N_VOCAB", byte_vocabulary.n_vocab)
    put(folder, content | {"hparams.json": b'{"n_vocab": 257}'})
    vocabulary.save_vocabulary(byte_vocabulary, str(folder))
    before = read(folder)
    assert download.is_gpt2_downloaded(folder.parent, folder.name)
    with pytest.raises(FileExistsError, match="not OpenAI's .*its vocabulary is another one"):
        fetch()
    assert read(folder) == before
    assert server.seen == []
    (folder / "encoder.json").write_bytes(before["encoder.json"][:-9])  # damaged, not another one
    assert not download.is_gpt2_downloaded(folder.parent, folder.name)
