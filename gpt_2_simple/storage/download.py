"""A model's name in, its seven files out: fetched, resumed, verified, put in place whole.

A file arrives as `<name>.part`. Beside it, `<name>.part.json` remembers what the server said about
it, so that a later process can go on where this one stopped (RFC 9110, Range and If-Range). It
gets its name once it has passed its checks.
"""

from __future__ import annotations

import base64
import contextlib
import datetime
import email.utils
import errno
import hashlib
import json
import os
import random
import re
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import requests

from ..common import report
from ..common.files import write_text
from ..common.locks import wait_for_lock
from ..common.published import (
    BASE_URL_VARIABLE,
    DATA_FILE,
    DEFAULT_BASE_URL,
    INDEX_FILE,
    META_FILE,
    MODEL_FILES,
    MODEL_NAMES,
    N_VOCAB,
    VOCABULARY_SHA256,
)
from ..common.settings import settings_function
from . import checkpoint_index
from .settings import DownloadSettings

LOCK = ".download.lock"

_TIMEOUT = (10.0, 30.0)  # seconds to connect, seconds between two reads
_CHUNK_BYTES = 1 << 15  # what a cut connection may cost
_ADOPT_BYTES = 1 << 20  # a shorter leftover is no worthwhile start: it may be a server's error page
_TRIES = 6  # requests in a row, of which at most the first brought new bytes
_TRIES_IF_DAMAGED = 2  # whole files in a row that fail their checks
_BACK_OFF = (0.5, 30.0)  # seconds before the second try; at most
_LONGEST_WAIT = 120.0  # seconds that a server's Retry-After may ask for
_TRANSIENT_STATUSES = (408, 425, 429, 500, 502, 503, 504)
_LOGIN_HINT = " (a web page? perhaps this network wants you to log in first)"
_sleep = time.sleep


class _FetchError(Exception):
    """A request failed: why, and what another one may hope for."""

    def __init__(
        self,
        reason: str,
        *,
        final: bool = False,
        damaged: bool = False,
        status: int | None = None,
        wait: float | None = None,
    ) -> None:
        super().__init__(reason)
        self.final = final
        self.damaged = damaged
        self.status = status
        self.wait = wait


@settings_function(DownloadSettings)
def download_gpt2(settings: DownloadSettings) -> None:
    """Downloads one of OpenAI's GPT-2 models, or what is missing of it.

    Call it again after an interruption: it goes on where it stopped, keeps the files that are whole
    and replaces those that are not. Every file is verified before it gets its name: the vocabulary
    by its SHA-256, the weights by the length that their index gives, all by their Content-MD5 where
    the server sends one. A second process that wants the same model waits for the first.

    Args:
        settings: each of them is an argument.

    Raises:
        ValueError: there is no such model, or `base_url` is no http(s) address.
        FileExistsError: the folder holds a model that is not OpenAI's: its n_vocab differs.
        FileNotFoundError: the server has no such file.
        ConnectionError: the server cannot be reached, or keeps failing, or sends damaged files. The
            message lists the addresses, to fetch them by hand.
        OSError: with errno ENOSPC, before a file is fetched that the disk has no room for.
    """
    folder_url = f"{_base_url(settings.base_url)}/models/{settings.model_name}/"
    folder = Path(settings.model_dir, settings.model_name)
    if not _may_be_published(folder):
        raise FileExistsError(
            f"{folder} holds a model that is not OpenAI's (n_vocab is not {N_VOCAB}): "
            "move it away, lest the download replace it, or give another model_dir"
        )
    if is_gpt2_downloaded(settings.model_dir, settings.model_name):
        for name in MODEL_FILES:
            _Partial(folder / name).discard()
        report.say(f"{folder} is already there, and whole")
        return
    folder.mkdir(parents=True, exist_ok=True)
    lock = wait_for_lock(folder / LOCK, f"Waiting for another download into {folder}")
    with lock, requests.Session() as session:
        for name in MODEL_FILES:
            try:
                _ensure_file(session, folder_url + name, folder / name)
            except _FetchError as error:
                kind = FileNotFoundError if error.status == 404 else ConnectionError
                raise kind(_by_hand(name, error, folder_url, folder)) from error


def is_gpt2_downloaded(
    model_dir: str | os.PathLike[str] = "models", model_name: str = "124M"
) -> bool:
    """Says whether a model is there as a whole, downloaded or made here.

    All seven files must be there, be of their format and, under a published model's name, have the
    published vocabulary's SHA-256. The data file must be as long as its index says. It takes
    milliseconds, for the weights themselves are not read: TensorFlow checks each tensor when it
    loads it.

    Args:
        model_dir: the folder of models.
        model_name: the model's folder in it, of any name.

    Returns:
        True if no file is missing, cut short or damaged.
    """
    folder = Path(model_dir, model_name)
    published = model_name in MODEL_NAMES and _may_be_published(folder)
    return all(_defect(folder / name, name, published) is None for name in MODEL_FILES)


def _base_url(base_url: str | None) -> str:
    url = base_url or os.environ.get(BASE_URL_VARIABLE) or DEFAULT_BASE_URL
    if not re.match(r"https?://[^/]", url):
        raise ValueError(f"base_url={url!r} must start with https:// or http:// and a server")
    return url.rstrip("/")


def _by_hand(name: str, error: Exception, folder_url: str, folder: Path) -> str:
    urls = "\n".join(f"  {folder_url}{file}" for file in MODEL_FILES)
    return (
        f"could not download {name}: {error}\n"
        "Call download_gpt2 again to go on where it stopped. If the server cannot be reached from "
        f"here, give a mirror as base_url (or in the environment variable {BASE_URL_VARIABLE}), or "
        f"fetch these files in another way and put them into {folder.resolve()}:\n{urls}"
    )


def _may_be_published(folder: Path) -> bool:
    """Whether nothing speaks against this being a published model: its n_vocab would."""
    try:
        return json.loads((folder / "hparams.json").read_bytes())["n_vocab"] == N_VOCAB
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return True


# What is wrong with a file


def _defect(path: Path, name: str, published: bool) -> str | None:
    """Says what is wrong with the file at `path`, or None; `name` says what it should be."""
    if not path.is_file():
        return "it is missing"
    try:
        if name == DATA_FILE:
            return _data_defect(path)
        if name == INDEX_FILE:
            return None if checkpoint_index.read_index(path) else "it lists no tensor"
        content = path.read_bytes()
        return _content_defect(name, content) or (published and _unpublished(name, content)) or None
    except NotImplementedError:
        return None  # a compressed index: only TensorFlow can tell
    except (ValueError, RecursionError) as error:
        return str(error)


def _content_defect(name: str, content: bytes) -> str | None:
    if name == "checkpoint" and not re.search(rb'model_checkpoint_path:\s*"[^"\n]+"', content):
        return "it does not name a checkpoint"
    if name.endswith(".json"):
        table = json.loads(content)
        return None if table and isinstance(table, dict) else "it is not a JSON object with entries"
    if name == "vocab.bpe":
        content.decode("utf-8")
    if name == META_FILE and not list(checkpoint_index.message_fields(content)):
        return "it is empty"
    return None


def _unpublished(name: str, content: bytes) -> str | None:
    digest = VOCABULARY_SHA256.get(name)
    if digest is not None and hashlib.sha256(content).hexdigest() != digest:
        return "its SHA-256 is not that of the published file"
    if name == "hparams.json" and json.loads(content).get("n_vocab") != N_VOCAB:
        return f"its n_vocab is not {N_VOCAB}"
    return None


def _data_defect(path: Path) -> str | None:
    size, least = path.stat().st_size, _least_data_size(path.parent)
    return None if size >= least else f"it has {size:,} bytes where its index needs {least:,}"


def _least_data_size(folder: Path) -> int:
    try:
        return checkpoint_index.data_sizes(checkpoint_index.read_index(folder / INDEX_FILE)).get(
            0, 0
        )
    except FileNotFoundError as error:
        raise ValueError("its index is missing") from error


# A file on its way


class _Version(NamedTuple):
    """Which version of a file a server has, as its headers tell."""

    url: str
    etag: str | None = None
    last_modified: str | None = None
    total: int | None = None
    md5: str | None = None

    @classmethod
    def announced(cls, url: str, headers: Mapping[str, str]) -> _Version:
        """Reads the headers of an answer that is about the whole file."""
        if _is_encoded(headers):
            return cls(url)  # length, MD5 and ranges are those of the encoded bytes, not the file's
        etag = headers.get("ETag", "")
        length = headers.get("Content-Length", "")
        chunked = "Transfer-Encoding" in headers
        return cls(
            url,
            etag if etag.startswith('"') else None,  # If-Range must not use a weak one
            headers.get("Last-Modified"),
            int(length) if length.isdecimal() and not chunked else None,
            _md5(headers),
        )

    @property
    def validator(self) -> str | None:
        """What If-Range sends: without it nothing tells that a file has not changed."""
        return self.etag or self.last_modified

    def contradicts(self, headers: Mapping[str, str]) -> bool:
        """Whether an answer, to a range, is about another version of the file."""
        other = _Version.announced(self.url, headers)
        return (
            _is_encoded(headers)
            or None not in (self.etag, other.etag)
            and self.etag != other.etag
            or None not in (self.last_modified, other.last_modified)
            and self.last_modified != other.last_modified
        )


def _is_encoded(headers: Mapping[str, str]) -> bool:
    return headers.get("Content-Encoding", "identity") != "identity"


def _md5(headers: Mapping[str, str]) -> str | None:
    value = headers.get("Content-MD5", "")
    with contextlib.suppress(ValueError):
        if len(base64.b64decode(value, validate=True)) == 16:
            return value
    return None


class _Partial:
    """A file that is not whole yet, and the note of which version of it this is."""

    def __init__(self, target: Path) -> None:
        self.target = target
        self.path = target.with_name(target.name + ".part")
        self.note = target.with_name(target.name + ".part.json")

    def size(self) -> int:
        return self.path.stat().st_size if self.path.is_file() else 0

    def version(self) -> _Version | None:
        """The version that the note tells of; None if there is none or it cannot be read."""
        try:
            return _Version(**json.loads(self.note.read_bytes()))
        except (OSError, ValueError, TypeError):
            return None

    def resumable(self, url: str) -> _Version | None:
        """The version to go on with; None if what is there is nothing to go on with."""
        version = self.version()
        if version is None or version.url != url or version.validator is None or not self.size():
            return None
        return None if version.total is not None and version.total < self.size() else version

    def begin(self, version: _Version) -> None:
        self.discard()  # first, lest a crash leave the old bytes under the new note
        write_text(self.note, json.dumps(version._asdict()))

    def discard(self) -> None:
        self.path.unlink(missing_ok=True)
        self.note.unlink(missing_ok=True)

    def land(self) -> None:
        os.replace(self.path, self.target)
        self.note.unlink(missing_ok=True)


# Fetching


def _ensure_file(session: requests.Session, url: str, target: Path) -> None:
    partial = _Partial(target)
    if _defect(target, target.name, published=True) is None:
        partial.discard()
        return
    least = 0
    if target.name == DATA_FILE:
        with contextlib.suppress(NotImplementedError):
            least = _least_data_size(target.parent)
        _adopt(session, url, partial)
    tries = damages = 0
    farthest = partial.size()
    while True:
        try:
            _receive(session, url, partial, least)
            _verify(partial)
            partial.land()
            return
        except _FetchError as error:
            damages += error.damaged
            # Beyond the farthest byte so far: a server that always starts over makes no progress.
            tries = 1 if partial.size() > farthest else tries + 1
            farthest = max(farthest, partial.size())
            if error.final or tries >= _TRIES or damages >= _TRIES_IF_DAMAGED:
                raise
            _back_off(target.name, tries, error)


def _adopt(session: requests.Session, url: str, partial: _Partial) -> None:
    """Goes on with a data file that another program left cut short.

    Nothing tells which version of the file it began with, so it counts only where the server sends
    the MD5 of the whole file, which the result must then match.
    """
    target = partial.target
    if partial.resumable(url) or not target.is_file() or target.stat().st_size < _ADOPT_BYTES:
        return
    try:
        with session.head(
            url, headers={"Accept-Encoding": "identity"}, timeout=_TIMEOUT, allow_redirects=True
        ) as response:
            version = _Version.announced(url, response.headers)
            known = response.status_code == 200 and version.md5 and version.validator
    except requests.RequestException:
        return
    if known and target.stat().st_size < (version.total or 0):
        partial.begin(version)
        os.replace(target, partial.path)


def _receive(session: requests.Session, url: str, partial: _Partial, least: int) -> None:
    """Makes one request, and returns if the partial file then has all its bytes.

    Args:
        session: the session that asks.
        url: the file's address.
        partial: what is there already, continued if the server allows it, else begun anew.
        least: how many bytes the file must have.

    Raises:
        _FetchError: the file is not complete.
    """
    try:
        _exchange(session, url, partial, least)
    except (
        requests.ConnectionError,
        requests.Timeout,
        requests.exceptions.ChunkedEncodingError,
        requests.exceptions.ContentDecodingError,
    ) as error:
        raise _FetchError(f"the connection failed: {_reason(error)}") from error
    except requests.RequestException as error:
        raise _FetchError(str(error), final=True) from error
    version = partial.version()
    if version and version.total not in (None, partial.size()):
        raise _FetchError(f"{partial.size():,} of {version.total:,} bytes came")


def _reason(error: Exception) -> str:
    """Says why a connection failed: it stands inside urllib3's "Max retries exceeded"."""
    inner = error.args[0] if error.args else error
    inner = getattr(inner, "reason", inner)
    return str(inner.args[0] if isinstance(inner, Exception) and inner.args else inner)


def _exchange(session: requests.Session, url: str, partial: _Partial, least: int) -> None:
    version = partial.resumable(url)
    offset = partial.size() if version else 0
    if version and version.total == offset:
        return
    headers = {"Accept-Encoding": "identity"}
    if version:
        headers |= {"Range": f"bytes={offset}-", "If-Range": str(version.validator)}
    with session.get(url, headers=headers, stream=True, timeout=_TIMEOUT) as response:
        if response.status_code == 200:
            _check_offer(response, offset, least)
            version, offset = _Version.announced(url, response.headers), 0
        elif version is None or response.status_code not in (206, 416):
            raise _status_error(response)
        elif not _continues(response, version, offset):
            partial.discard()
            raise _FetchError("the answer does not continue the file, which has to start over")
        elif response.status_code == 416:
            return
        _check_room(version, partial)
        if offset == 0:
            partial.begin(version)
        _write(response, version, offset, partial)


def _continues(response: requests.Response, version: _Version, offset: int) -> bool:
    """Whether a 206 goes on at `offset`, or a 416 says that there is nothing beyond it."""
    match = re.fullmatch(
        r"bytes (?:(\d+)-\d+|\*)/(\d+|\*)", response.headers.get("Content-Range", "")
    )
    if match is None or version.contradicts(response.headers):
        return False
    start, total = match.groups()
    if response.status_code == 416:
        return start is None and total == str(offset) and version.total in (None, offset)
    return start == str(offset) and (total == "*" or version.total in (None, int(total)))


def _status_error(response: requests.Response) -> _FetchError:
    reason = f"the server answered {response.status_code} {response.reason} for {response.url}"
    wait = _retry_after(response.headers.get("Retry-After", ""))
    if wait is not None and wait > _LONGEST_WAIT:
        return _FetchError(f"{reason} and asks to wait {wait:,.0f} s", final=True)
    transient = response.status_code in _TRANSIENT_STATUSES
    return _FetchError(reason, final=not transient, status=response.status_code, wait=wait)


def _retry_after(value: str) -> float | None:
    """Reads the seconds that a Retry-After header asks for, given as a number or as a date."""
    if value.isdecimal():
        return float(value)
    with contextlib.suppress(ValueError, TypeError):
        then = email.utils.parsedate_to_datetime(value)
        return max(0.0, (then - datetime.datetime.now(datetime.timezone.utc)).total_seconds())
    return None


def _check_offer(response: requests.Response, offset: int, least: int) -> None:
    """Refuses an answer that begins anew but cannot be the file: `offset` bytes would be lost."""
    total = _Version.announced(response.url, response.headers).total
    if total is not None and total < least:
        reason = f"the server has {total:,} bytes where the index needs {least:,}"
        raise _FetchError(reason, damaged=True)
    if offset and response.headers.get("Content-Type", "").startswith("text/html"):
        raise _FetchError(f"a web page came{_LOGIN_HINT}", damaged=True)


def _check_room(version: _Version, partial: _Partial) -> None:
    folder = partial.target.parent
    needed, free = (version.total or 0) - partial.size(), shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(
            errno.ENOSPC,
            f"{partial.target.name} needs {needed:,} more bytes, {folder.resolve()} has {free:,} "
            "free: make room or give another model_dir",
        )


def _write(response: requests.Response, version: _Version, offset: int, partial: _Partial) -> None:
    name = partial.target.name
    if not report.is_interactive():
        size = "" if version.total is None else f" ({version.total:,} bytes)"
        report.say(f"Fetching {name}{size}" + (f" from byte {offset:,} on" if offset else ""))
    with (
        open(partial.path, "ab") as file,
        report.progress(
            total=version.total, desc=f"Fetching {name}", unit="B", unit_scale=True, initial=offset
        ) as bar,
    ):
        for chunk in response.iter_content(_CHUNK_BYTES):
            file.write(chunk)
            bar.update(len(chunk))
        file.flush()
        os.fsync(file.fileno())


def _verify(partial: _Partial) -> None:
    version = partial.version()
    defect = _defect(partial.path, partial.target.name, published=True)
    if defect is None and version is not None and version.md5 is not None:
        digest = hashlib.md5(usedforsecurity=False)
        with open(partial.path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
        if digest.digest() != base64.b64decode(version.md5):
            defect = "its MD5 is not the one that the server announced"
    if defect is not None:
        with open(partial.path, "rb") as file:
            page = file.read(512).lstrip().startswith(b"<")
        partial.discard()
        hint = _LOGIN_HINT if page else ""
        raise _FetchError(f"what came is damaged: {defect}{hint}", damaged=True)


def _back_off(name: str, tries: int, error: _FetchError) -> None:
    first, longest = _BACK_OFF
    # Jitter keeps many clients of a server that failed from all coming back at once.
    seconds = min(longest, first * 2 ** (tries - 1)) * random.uniform(0.5, 1.0)
    if error.wait is not None:
        seconds = max(seconds, error.wait)
    report.say(f"Fetching {name}: {error}; trying again in {seconds:.1f} s")
    _sleep(seconds)
