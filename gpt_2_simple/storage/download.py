"""A published model's name in, its seven files in a folder out, each of them verified.

A file is downloaded as `<name>.part`. Beside it, `<name>.part.json` keeps what the server said
about it, so that a later process can continue it (RFC 9110, Range and If-Range). The file gets its
name when it has passed its checks.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
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
from ..common.files import replace, sync_file, write_text
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
from ..encoder import get_encoder
from . import checkpoint_index
from .settings import DownloadSettings

LOCK = ".download.lock"

_TIMEOUT = (10.0, 30.0)  # seconds to connect, seconds between two reads
_CHUNK_BYTES = 1 << 15  # at most so many bytes are lost when a connection breaks
# A shorter file that another program left is not worth continuing; it may be an error page.
_MIN_LEFTOVER_BYTES = 1 << 20
_MAX_TRIES = 6  # requests in a row that bring no new bytes
_MAX_DAMAGED = 2  # whole files in a row that fail their checks
_BACK_OFF = (0.5, 30.0)  # seconds before the second try, and the most before any
_MAX_WAIT = 120.0  # seconds that a server's Retry-After may ask for
_TRANSIENT_STATUSES = (408, 425, 429, 500, 502, 503, 504)
_LOGIN_HINT = " (a web page? perhaps this network wants you to log in first)"
_UNENCODED = {"Accept-Encoding": "identity"}  # so that bytes can be counted and continued
_sleep = time.sleep


@dataclasses.dataclass(eq=False)
class _FetchError(Exception):
    """A request failed."""

    reason: str
    final: bool = False  # whether another request would fail, too
    damaged: bool = False  # whether a file came that failed its checks
    status: int | None = None  # the HTTP status, if that is the reason
    wait: float | None = None  # seconds that the server asks to wait before another request

    def __str__(self) -> str:
        return self.reason


@settings_function(DownloadSettings)
def download_gpt2(settings: DownloadSettings) -> None:
    """Downloads one of OpenAI's GPT-2 models, or the files of it that are missing.

    After an interruption, call it again: it continues where it stopped, keeps the whole files and
    replaces the damaged ones. Every file is verified before it gets its name: the vocabulary by its
    SHA-256, the weights by the length that their index gives, and all files by their Content-MD5 if
    the server sends one. A second process that downloads the same model waits for the first.

    Args:
        settings: each of them is an argument.

    Raises:
        ValueError: there is no such model, or `base_url` is no http(s) address.
        FileExistsError: the folder holds a model that is not OpenAI's: its n_vocab or its
            vocabulary differs.
        FileNotFoundError: the server has no such file.
        ConnectionError: the server cannot be reached, keeps failing, or sends damaged files. The
            message lists the addresses of the files, to download them in another way.
        OSError: the disk has no room for a file (errno ENOSPC); raised before it is downloaded.
    """
    folder_url = f"{_base_url(settings.base_url)}/models/{settings.model_name}/"
    folder = Path(settings.model_dir, settings.model_name)
    if not _may_be_published(folder):
        raise FileExistsError(
            f"{folder} holds a model that is not OpenAI's (n_vocab is not {N_VOCAB}, or its "
            "vocabulary is another one): "
            "move it away, or give another model_dir, so that the download does not replace it"
        )
    if is_gpt2_downloaded(settings.model_dir, settings.model_name):
        for name in MODEL_FILES:
            _Partial(folder_url + name, folder / name).discard()
        report.say(f"{folder} is already there, and whole")
        return
    folder.mkdir(parents=True, exist_ok=True)
    lock = wait_for_lock(folder / LOCK, f"Waiting for another download into {folder}")
    with lock, requests.Session() as session:
        for name in MODEL_FILES:
            try:
                _ensure_file(session, _Partial(folder_url + name, folder / name))
            except _FetchError as error:
                kind = FileNotFoundError if error.status == 404 else ConnectionError
                raise kind(_by_hand(name, error, folder_url, settings)) from error


def is_gpt2_downloaded(
    model_dir: str | os.PathLike[str] = "models", model_name: str = "124M"
) -> bool:
    """Whether all files of a model are there and whole; the model may be downloaded or made here.

    Each of the seven files must have its format. The data file must be as long as its index says.
    If the model has a published model's name, its vocabulary must have the published SHA-256. This
    takes milliseconds, since the weights are not read: TensorFlow checks each tensor when it loads
    it.

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


def _by_hand(name: str, error: Exception, folder_url: str, settings: DownloadSettings) -> str:
    given = {"model_dir": settings.model_dir, "base_url": settings.base_url}
    changed = {n: v for n, v in given.items() if v != getattr(DownloadSettings, n)}
    arguments = {"model_name": settings.model_name, **changed}
    call = ", ".join(f"{argument}={value!r}" for argument, value in arguments.items())
    folder = Path(settings.model_dir, settings.model_name)
    urls = "\n".join(f"  {folder_url}{file}" for file in MODEL_FILES)
    return (
        f"could not download {name}: {str(error).rstrip('.')}.\n"
        f"gpt2.download_gpt2({call}) continues where it stopped. If the server "
        "cannot be reached from here, give a mirror as base_url (or in the environment variable "
        f"{BASE_URL_VARIABLE}), or download these files in another way and put them into "
        f"{folder.resolve()}:\n{urls}"
    )


def _may_be_published(folder: Path) -> bool:
    """Whether a folder may hold a published model.

    It does not if it has another n_vocab, or a whole vocabulary that is not the published one: its
    two files fit together, which damaged files never do.
    """
    try:
        if json.loads((folder / "hparams.json").read_bytes())["n_vocab"] != N_VOCAB:
            return False
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return True
    files = {name: folder / name for name in VOCABULARY_SHA256}
    if all(_defect(path, name, published=True) is None for name, path in files.items()):
        return True
    try:
        return get_encoder(folder).n_vocab != N_VOCAB
    except (OSError, ValueError, RecursionError):
        return True


# --- checks of a file ---------------------------------------------------------------------------


def _defect(path: Path, name: str, published: bool) -> str | None:
    """What is wrong with the file at `path`, which should be the model's file `name`, or None."""
    if not path.is_file():
        return "it is missing"
    try:
        if name == DATA_FILE:
            size, needed = path.stat().st_size, _min_data_bytes(path.parent)
            return (
                None
                if size >= needed
                else f"it has {size:,} bytes where its index needs {needed:,}"
            )
        if name == INDEX_FILE:
            return None if checkpoint_index.read_index(path) else "it lists no tensor"
        return _content_defect(name, path.read_bytes(), published)
    except NotImplementedError:
        return None  # The index is compressed: only TensorFlow can read it.
    except (ValueError, RecursionError) as error:
        return str(error)


def _content_defect(name: str, content: bytes, published: bool) -> str | None:
    if name == "checkpoint" and not re.search(rb'model_checkpoint_path:\s*"[^"\n]+"', content):
        return "it does not name a checkpoint"
    if name.endswith(".json"):
        table = json.loads(content)
        if not table or not isinstance(table, dict):
            return "it is not a JSON object with entries"
        if published and name == "hparams.json" and table.get("n_vocab") != N_VOCAB:
            return f"its n_vocab is not {N_VOCAB}"
    if name == "vocab.bpe":
        content.decode("utf-8")
    if name == META_FILE and not list(checkpoint_index.message_fields(content)):
        return "it is empty"
    digest = VOCABULARY_SHA256.get(name) if published else None
    if digest is not None and hashlib.sha256(content).hexdigest() != digest:
        return "its SHA-256 is not that of the published file"
    return None


def _min_data_bytes(folder: Path) -> int:
    try:
        entries = checkpoint_index.read_index(folder / INDEX_FILE)
    except FileNotFoundError as error:
        raise ValueError("its index is missing") from error
    return checkpoint_index.data_sizes(entries).get(0, 0)


# --- a file that is being downloaded ------------------------------------------------------------


class _Version(NamedTuple):
    """The version of a file that a server has, from its headers."""

    url: str
    etag: str | None = None  # only a strong one: If-Range must not use a weak one
    last_modified: str | None = None
    total: int | None = None  # the file's length in bytes
    md5: str | None = None  # the header Content-MD5

    @classmethod
    def announced(cls, url: str, headers: Mapping[str, str]) -> _Version:
        """Reads the headers of an answer about the whole file."""
        if _is_encoded(headers):
            return cls(url)  # The length and the MD5 are those of the encoded bytes.
        etag = headers.get("ETag", "")
        length = headers.get("Content-Length", "")
        chunked = "Transfer-Encoding" in headers
        return cls(
            url,
            etag if etag.startswith('"') else None,
            headers.get("Last-Modified"),
            int(length) if length.isdecimal() and not chunked else None,
            _md5(headers),
        )

    @property
    def validator(self) -> str | None:
        """What If-Range sends, so that the server tells whether the file has changed."""
        return self.etag or self.last_modified

    def contradicts(self, headers: Mapping[str, str]) -> bool:
        """Whether the answer to a range request is about another version of the file."""
        other = _Version.announced(self.url, headers)
        pairs = (self.etag, other.etag), (self.last_modified, other.last_modified)
        return _is_encoded(headers) or any(a != b for a, b in pairs if None not in (a, b))


def _is_encoded(headers: Mapping[str, str]) -> bool:
    return headers.get("Content-Encoding", "identity") != "identity"


def _md5(headers: Mapping[str, str]) -> str | None:
    value = headers.get("Content-MD5", "")
    with contextlib.suppress(ValueError):
        if len(base64.b64decode(value, validate=True)) == 16:
            return value
    return None


class _Partial:
    """A file that is not whole yet, and the note that says of which version it is."""

    def __init__(self, url: str, target: Path) -> None:
        self.url, self.target = url, target
        self.path = target.with_name(target.name + ".part")
        self.note = target.with_name(target.name + ".part.json")

    def size(self) -> int:
        return self.path.stat().st_size if self.path.is_file() else 0

    def version(self) -> _Version | None:
        """The version in the note; None if there is no note, or it cannot be read."""
        try:
            return _Version(**json.loads(self.note.read_bytes()))
        except (OSError, ValueError, TypeError):
            return None

    def resumable(self) -> _Version | None:
        """The version to continue; None if the file has to be downloaded from its start."""
        version = self.version()
        size = self.size()
        if version is None or version.url != self.url or version.validator is None or not size:
            return None
        return None if version.total is not None and version.total < size else version

    def begin(self, version: _Version) -> None:
        self.discard()  # First: a crash must not leave the old bytes under the new note.
        write_text(self.note, json.dumps(version._asdict()))

    def discard(self) -> None:
        self.path.unlink(missing_ok=True)
        self.note.unlink(missing_ok=True)

    def land(self) -> None:
        replace(self.path, self.target)
        self.note.unlink(missing_ok=True)


# --- requests -----------------------------------------------------------------------------------


def _ensure_file(session: requests.Session, partial: _Partial) -> None:
    target = partial.target
    if _defect(target, target.name, published=True) is None:
        partial.discard()
        return
    min_bytes = 0
    if target.name == DATA_FILE:
        with contextlib.suppress(NotImplementedError):
            min_bytes = _min_data_bytes(target.parent)
        _continue_leftover(session, partial)
    tries = damages = 0
    farthest = partial.size()
    while True:
        try:
            _receive(session, partial, min_bytes)
            _verify(partial)
            partial.land()
            return
        except _FetchError as error:
            damages += error.damaged
            # Only new bytes count as progress: a server may start over each time.
            tries = 1 if partial.size() > farthest else tries + 1
            farthest = max(farthest, partial.size())
            if error.final or tries >= _MAX_TRIES or damages >= _MAX_DAMAGED:
                raise
            _back_off(target.name, tries, error)


def _continue_leftover(session: requests.Session, partial: _Partial) -> None:
    """Prepares to continue a data file that another program left cut short.

    It is not known which version of the file this is. So it is continued only if the server sends
    the MD5 of the whole file, to compare the result with.
    """
    target = partial.target
    leftover = target.stat().st_size if target.is_file() else 0
    if leftover < _MIN_LEFTOVER_BYTES or partial.resumable():
        return
    try:
        with session.head(
            partial.url, headers=_UNENCODED, timeout=_TIMEOUT, allow_redirects=True
        ) as response:
            version = _Version.announced(partial.url, response.headers)
            known = response.status_code == 200 and version.md5 and version.validator
    except requests.RequestException:
        return
    if known and leftover < (version.total or 0):
        partial.begin(version)
        replace(target, partial.path)


def _receive(session: requests.Session, partial: _Partial, min_bytes: int) -> None:
    """Makes one request; raises _FetchError if the partial file then lacks any of its bytes.

    The file is continued if the server allows that, or else begun anew.
    """
    try:
        _request(session, partial, min_bytes)
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
    """Why a connection failed; the reason stands inside urllib3's "Max retries exceeded"."""
    inner = error.args[0] if error.args else error
    inner = getattr(inner, "reason", inner)
    return str(inner.args[0] if isinstance(inner, Exception) and inner.args else inner)


def _request(session: requests.Session, partial: _Partial, min_bytes: int) -> None:
    version = partial.resumable()
    offset = partial.size() if version else 0
    if version and version.total == offset:
        return
    headers = _UNENCODED
    if version:
        headers = headers | {"Range": f"bytes={offset}-", "If-Range": str(version.validator)}
    with session.get(partial.url, headers=headers, stream=True, timeout=_TIMEOUT) as response:
        if response.status_code == 200:
            _check_offer(response, offset, min_bytes)
            version, offset = _Version.announced(partial.url, response.headers), 0
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
    """Whether a 206 starts at byte `offset`, or a 416 says that the file ends there."""
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
    if wait is not None and wait > _MAX_WAIT:
        return _FetchError(f"{reason} and asks to wait {wait:,.0f} s", final=True)
    transient = response.status_code in _TRANSIENT_STATUSES
    return _FetchError(reason, final=not transient, status=response.status_code, wait=wait)


def _retry_after(value: str) -> float | None:
    """The seconds that a Retry-After header asks for, as a number or as a date; None if neither."""
    if value.isdecimal():
        return float(value)
    with contextlib.suppress(ValueError, TypeError):
        then = email.utils.parsedate_to_datetime(value)
        return max(0.0, (then - datetime.datetime.now(datetime.timezone.utc)).total_seconds())
    return None


def _check_offer(response: requests.Response, offset: int, min_bytes: int) -> None:
    """Refuses an answer that cannot be the file, before the `offset` bytes so far are discarded."""
    total = _Version.announced(response.url, response.headers).total
    if total is not None and total < min_bytes:
        reason = f"the server has {total:,} bytes where the index needs {min_bytes:,}"
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
        sync_file(file)


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
    # The random factor keeps the clients of a server that failed from all returning at once.
    seconds = min(longest, first * 2 ** (tries - 1)) * random.uniform(0.5, 1.0)
    seconds = max(seconds, error.wait or 0)
    report.say(f"Fetching {name}: {error}; trying again in {seconds:.1f} s")
    _sleep(seconds)
