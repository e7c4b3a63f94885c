"""Paths in; the files that they stand for, and their decoded text, out: encodings and gzip."""

from __future__ import annotations

import codecs
import contextlib
import difflib
import glob
import gzip
import io
import os
import re
import threading
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TextIO

from ..common.files import is_special
from ..common.report import say, warn

SUPPORTED = (
    "a text file, .csv, .tsv, .json or .jsonl (each also as .gz), an .npz or .tokens file of "
    "encode_dataset, a folder, a glob pattern, or a list of these"
)
KINDS = {
    ".csv": "csv",
    ".tsv": "tsv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".npz": "npz",
    ".tokens": "tokens",
}
BYTE_ORDER_MARKS = (  # UTF-32's first: its little-endian mark begins with UTF-16's
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
HEAD_BYTES = 1 << 16
READ_BYTES = 1 << 20
MAX_PATH_LENGTH = 1000
MAX_TOLD = 10
MAX_UNDECODABLE = 0.3  # share of a text file's first bytes
MAX_NULS = 0.01  # share of a text file's first characters


class DataFile(NamedTuple):
    """One file of a dataset.

    Its kind is 'text', 'csv', 'tsv', 'json' (an array of objects), 'jsonl', 'npz' or 'tokens', by
    its suffix. It is `named` if the user named it, rather than its folder or a pattern.
    """

    path: str
    kind: str
    named: bool

    @property
    def is_table(self) -> bool:
        """Whether each of its rows is a document."""
        return self.kind in ("csv", "tsv", "json", "jsonl")

    @property
    def is_text(self) -> bool:
        """Whether it holds text, maybe as a table, rather than tokens."""
        return self.kind not in ("npz", "tokens")

    @property
    def is_gzip(self) -> bool:
        """Whether it is packed."""
        return self.path.lower().endswith(".gz")


@dataclass
class ReadReport:
    """What the user should know about the files that were read; printed once, at the end."""

    lines: list[str] = field(default_factory=list)  # what was decided for the user, or skipped
    warnings: list[str] = field(default_factory=list)  # what may have cost the user some data

    def tell(self) -> None:
        """Prints the lines and raises the warnings, the first ten of each."""
        for told, tell, kind in ((self.lines, say, "lines"), (self.warnings, warn, "warnings")):
            for text in told[:MAX_TOLD]:
                tell(text)
            if len(told) > MAX_TOLD:
                tell(f"... and {len(told) - MAX_TOLD} more {kind} like these")


def find_files(path: Any) -> list[DataFile]:
    """Lists the files that a path stands for, or a list of paths, in its order; each file once.

    A path is a file, a folder (with its subfolders, also linked ones, without hidden files) or a
    glob pattern. The files of the last two are sorted by name. Those of them that cannot be read
    are left out with a warning.

    Raises:
        FileNotFoundError: there is nothing of that name.
        ValueError: a folder holds no file, the list is empty, or it is not a path, or the path is
            a device or a named pipe.
    """
    files: dict[str, DataFile] = {}
    n_repeated = 0
    for file in _files_of(path):
        place = os.path.realpath(file.path)
        first = files.setdefault(place, file)
        if first is not file:
            files[place] = first._replace(named=first.named or file.named)
            n_repeated += 1
            if n_repeated <= MAX_TOLD:
                say(f"{file.path} is the file {first.path}, which is read once")
    return list(files.values())


def _files_of(path: Any) -> list[DataFile]:
    if isinstance(path, (list, tuple)):
        if not path:
            raise ValueError(f"the list of datasets is empty: give {SUPPORTED}")
        return [file for one in path for file in _files_of(one)]
    if not isinstance(path, (str, os.PathLike)):
        raise ValueError(f"the dataset {path!r} is neither a path nor a list of paths")
    path = os.path.expanduser(os.fspath(path))
    if os.path.isfile(path):
        return [DataFile(path, kind_of(path), named=True)]
    if os.path.isdir(path):
        return _files_in_folder(path)
    if is_special(path):
        raise ValueError(
            f"the dataset {path!r} is a device or a named pipe, and a dataset is read more than "
            f"once: write it to a file first, as in `cat {path} > text.txt`"
        )
    return _files_of_pattern(path)


def _files_of_pattern(pattern: str) -> list[DataFile]:
    # '**' finds a folder and also the files in it: each file is taken once.
    files: dict[str, DataFile] = {}
    found = [one for one in sorted(glob.glob(pattern, recursive=True)) if os.path.exists(one)]
    for path in found:
        inside = _files_in_folder(path) if os.path.isdir(path) else _readable_files([path])
        files |= {file.path: file for file in inside}
    if not found:
        raise FileNotFoundError(_not_found(pattern))
    if not files:
        raise ValueError(f"none of the files {pattern!r} can be read: give {SUPPORTED}")
    return list(files.values())


def _files_in_folder(folder: str) -> list[DataFile]:
    paths = []
    seen = {os.path.realpath(folder)}
    for parent, folders, names in os.walk(folder, onerror=_tell_left_out, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in list(folders):
            target = os.path.realpath(os.path.join(parent, name))
            if target in seen:  # through a link, which may lead to a folder above
                folders.remove(name)
            seen.add(target)
        paths += [os.path.join(parent, name) for name in sorted(names) if not name.startswith(".")]
    files = _readable_files(paths)
    if not files:
        raise ValueError(f"the folder {folder!r} holds no file that can be read and is not hidden")
    return files


def _readable_files(paths: Sequence[str]) -> list[DataFile]:
    """The files that can be opened, of those that the user did not name; warns of the others."""
    files = []
    for path in paths:
        if is_special(path):
            warn(f"{path!r} is a device or a named pipe and was left out")
            continue
        try:
            open(path, "rb").close()
        except OSError as error:
            _tell_left_out(error)
            continue
        files.append(DataFile(path, kind_of(path), named=False))
    return files


def _tell_left_out(error: OSError) -> None:
    warn(f"{error.filename!r} cannot be read and was left out: {error.strerror}")


def kind_of(path: str) -> str:
    """A file's kind by its suffix, without '.gz': see DataFile. The content of a .json decides."""
    stem = path.lower().removesuffix(".gz")
    suffix = os.path.splitext(stem)[1]
    return _kind_of_json(path) if suffix == ".json" else KINDS.get(suffix, "text")


def _kind_of_json(path: str) -> str:
    """'json' for an array of objects, 'jsonl' for an object a line, 'text' for any other."""
    try:
        head = _read_head(path)
        start = head.decode(_choose_encoding(head, None), "ignore").lstrip()
    except (OSError, EOFError, zlib.error):
        return "text"  # open_text() tells what is wrong
    if re.match(r"\[\s*\{", start):
        return "json"
    return "jsonl" if re.match(r"\{.*\}\s*\n\s*\{.*", start) else "text"


def _read_head(path: str) -> bytes:
    with gzip.open(path) if path.lower().endswith(".gz") else open(path, "rb") as binary:
        return binary.read(HEAD_BYTES)


def _not_found(path: str) -> str:
    """The error message for a path that does not exist, with similar names if there are any."""
    if len(path) > MAX_PATH_LENGTH or "\n" in path:
        return f"there is no dataset {path[:60]!r}...: give the path of a file, not the text itself"
    parent, name = os.path.split(path)
    message = f"there is no dataset {path!r}: looked for a file, a folder and a glob pattern"
    if not os.path.isabs(path):
        message += f" in {os.getcwd()!r}"
    if os.path.isdir(parent or "."):
        close = difflib.get_close_matches(name, sorted(os.listdir(parent or ".")))
        if close:
            nearest = " or ".join(repr(os.path.join(parent, one)) for one in close)
            message += f". Did you mean {nearest}?"
    elif parent:
        message += f". There is no folder {parent!r} either"
    return message


# --- decoding -------------------------------------------------------------------------------------


@contextlib.contextmanager
def open_text(
    file: DataFile, encoding: str | None, report: ReadReport, on_bytes: Callable[[int], object]
) -> Iterator[TextIO]:
    """Opens a file as text, unpacked if it is a .gz; bytes that cannot be decoded are left out.

    A binary file that the user did not name is left out with a warning, and reads as empty. A
    damaged gzip file that the user did not name ends, with a warning, where it is damaged.

    `encoding=None` stands for UTF-8, or what a byte order mark tells. `report` takes the warnings.
    `on_bytes` is called with the number of bytes, each time that some of the file are read.

    Raises:
        ValueError: the encoding is unknown, the gzip file is damaged, or a file that the user
            named is not text.
    """
    has_yielded = False
    left_out = _LeftOut()
    try:
        head = _read_head(file.path)
        is_sure = file.named and encoding is not None
        encoding = _choose_encoding(head, encoding)
        shown = "UTF-8" if encoding == "utf-8-sig" else encoding
        if not _is_text(head, encoding, is_sure):
            if file.named:
                raise ValueError(
                    f"{file.path!r} is not {shown} text: if it is text, name its encoding, "
                    f"as in encoding='utf-16' or 'cp1251'. A dataset is {SUPPORTED}"
                )
            report.warnings.append(f"{file.path!r} is not {shown} text and was left out")
            has_yielded = True
            yield io.StringIO()
            return
        with _CountingFile(file.path, on_bytes) as on_disk:
            raw: Any = on_disk
            if file.is_gzip:
                raw = gzip.GzipFile(fileobj=io.BufferedReader(on_disk, READ_BYTES))
            reader = _CountingReader(raw, left_out)
            with io.TextIOWrapper(reader, encoding=encoding, errors=COUNT_AND_LEAVE_OUT) as text:
                has_yielded = True
                yield text
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        message = f"{file.path!r} is not a whole gzip file: {error}"
        if file.named:
            raise ValueError(message) from error
        report.warnings.append(f"{message}; what comes after the damage was left out")
        if not has_yielded:
            yield io.StringIO()
    if left_out.n_bytes:
        report.warnings.append(
            f"{file.path!r}: {left_out.n_bytes:,} bytes are not {shown} and were left out; "
            "if it is in another encoding, name it, as in encoding='latin-1'"
        )


def _choose_encoding(head: bytes, encoding: str | None) -> str:
    """The encoding that was asked for, or that the file's first bytes tell."""
    if encoding is None:
        marked = (name for mark, name in BYTE_ORDER_MARKS if head.startswith(mark))
        encoding = next(marked, "utf-8")
    try:
        name = codecs.lookup(encoding).name
        b"x".decode(encoding, "ignore")
    except (LookupError, UnicodeError) as error:  # 'rot13' and its like are known, but of no bytes
        raise ValueError(f"encoding={encoding!r} is unknown to Python: {error}") from error
    return "utf-8-sig" if name == "utf-8" else encoding


def _is_text(head: bytes, encoding: str, is_sure: bool) -> bool:
    """Whether a file's first bytes look like text in this encoding.

    Text without an error may hold a few NULs if it is UTF-8, which no binary file is, or if the
    user is sure: names the file and its encoding.
    """
    left_out = _decoding.left_out = _LeftOut()
    text = codecs.getincrementaldecoder(encoding)(errors=COUNT_AND_LEAVE_OUT).decode(head)
    if "\0" in text:
        is_utf8 = encoding == "utf-8-sig" and text.count("\0") <= MAX_NULS * len(text)
        return left_out.n_bytes == 0 and (is_sure or is_utf8)
    return left_out.n_bytes <= MAX_UNDECODABLE * len(head)


COUNT_AND_LEAVE_OUT = "gpt_2_simple.count_and_leave_out"
_decoding = threading.local()  # its left_out: the count of the file that this thread decodes now


@dataclass
class _LeftOut:
    """How many bytes of one file could not be decoded and were left out."""

    n_bytes: int = 0


def _count_and_leave_out(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeDecodeError):
        raise error
    _decoding.left_out.n_bytes += error.end - error.start
    return "", error.end


codecs.register_error(COUNT_AND_LEAVE_OUT, _count_and_leave_out)


class _CountingFile(io.FileIO):
    """A file that tells how many bytes were read of it."""

    def __init__(self, path: str, on_bytes: Callable[[int], object]):
        super().__init__(path)
        self.on_bytes = on_bytes

    def readinto(self, buffer: Any) -> int | None:
        count = super().readinto(buffer)
        self.on_bytes(count or 0)
        return count


class _CountingReader(io.BufferedReader):
    """Bytes of a file for a TextIOWrapper, which decodes them right after it has read them.

    Several files may be read in turns in one thread. So each read says whose bytes come next.
    """

    def __init__(self, raw: Any, left_out: _LeftOut):
        super().__init__(raw, READ_BYTES)
        self._left_out = left_out

    def read1(self, size: int = -1, /) -> bytes:
        _decoding.left_out = self._left_out
        return super().read1(size)

    def read(self, size: int | None = -1, /) -> bytes:
        _decoding.left_out = self._left_out
        return super().read(size)
