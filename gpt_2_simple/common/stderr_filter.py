"""A process's standard error in; the same without TensorFlow's notes out.

TensorFlow's C++ code writes to file descriptor 2, before it looks at any level of logging. The file
is also a program of its own that imports nothing of the package: a process that reads the other's
end of a pipe still writes its last words when that one is killed.
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys

# TensorFlow's variable: the level below which nothing is logged. 0 and 1 let notes through.
LOG_LEVEL = "TF_CPP_MIN_LOG_LEVEL"

_NOTE = re.compile(
    r"""
      WARNING:\ All\ log\ messages\ before\ absl::InitializeLog
    | To\ enable\ the\ following\ instructions:
    # information and warnings: I0000 00:00:1795721342.253 27505 port.cc:153] ...
    | [IW]\d{4}\ \d\d:\d\d:\d+\.\d+\ +\d+\ \S+:\d+\]
    # TensorFlow before 2.16: 2026-01-31 00:00:00.000000: I tensorflow/core/util/port.cc:113] ...
    | \d{4}-\d\d-\d\d\ \d\d:\d\d:\d\d\.\d+:\ [IW]\ \S+:\d+\]
    # errors that are none: what is registered twice, and what this processor cannot do
    | .*\ Unable\ to\ register\ cu\w+\ (?:factory|plugin)
    | .*\ computation\ placer\ already\ registered
    | .*\ oneDNN\ supports\ \w+\ only\ on\ platforms\ with
    """,
    re.VERBOSE,
)
_NO_DRIVER = re.compile(r".* failed call to cuInit")
# Where one of these is, there is a card, and a driver that does not start is worth a line.
_NVIDIA_DEVICES = ("/dev/nvidiactl", "/proc/driver/nvidia", "/dev/dxg")


def is_note(line: str) -> bool:
    """Whether TensorFlow wrote a line of standard error that tells its user nothing."""
    if _NOTE.match(line):
        return True
    return bool(_NO_DRIVER.match(line)) and not any(map(os.path.exists, _NVIDIA_DEVICES))


def wants_notes() -> bool:
    """Whether the user asked for them."""
    return os.environ.get(LOG_LEVEL) in ("0", "1")


def filter_stderr() -> None:
    """From now on TensorFlow's notes do not reach this process's standard error.

    Python's own lines and progress bars go there as before; other lines, of this process and of
    those that it starts, pass another process. Where that cannot be had, nothing is filtered.
    """
    if sys.platform == "win32" or not _is_descriptor_2(sys.stderr):
        return
    with contextlib.suppress(OSError):
        python = open(  # it stands for standard error until the end
            os.dup(2), "w", 1, encoding=sys.stderr.encoding, errors=sys.stderr.errors
        )
        sys.stderr.flush()
        _filter_descriptor_2()
        sys.stderr = python


def filter_notebook() -> None:
    """The same in a notebook's kernel, whose Python lines do not go through descriptor 2.

    ipykernel watches the descriptor, and shows what C++ code writes there below the cell.
    """
    if sys.platform == "win32" or _is_descriptor_2(sys.stderr) or wants_notes():
        return
    with contextlib.suppress(OSError):
        _filter_descriptor_2()


def _filter_descriptor_2() -> None:
    """Puts another process between descriptor 2 and where it led."""
    terminal = os.dup(2)
    try:
        reader = subprocess.Popen(
            [sys.executable, "-I", "-S", os.path.abspath(__file__)],
            stdin=subprocess.PIPE,
            stdout=terminal,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C in a terminal goes to all processes of a session
        )
    finally:
        os.close(terminal)
    assert reader.stdin is not None
    os.dup2(reader.stdin.fileno(), 2)
    reader.stdin.close()
    reader.returncode = 0  # it ends by itself, after this process: no one waits for it


def _is_descriptor_2(stream: object) -> bool:
    try:
        return stream is sys.__stderr__ and stream.fileno() == 2  # type: ignore[union-attr]
    except (AttributeError, OSError, ValueError):
        return False


def main() -> None:
    """Copies standard input to standard output, line by line, without the notes."""
    with open(0, "rb", buffering=0) as source, open(1, "wb", buffering=0) as target:
        rest = b""
        while block := source.read(65536):
            *lines, rest = (rest + block).split(b"\n")
            kept = [line + b"\n" for line in lines if not is_note(line.decode("utf-8", "replace"))]
            # No note is so long or has such characters. A carriage return ends a line that is drawn
            # again; by a NUL ipykernel wakes its own reader, and waits for that.
            if len(rest) > 65536 or b"\r" in rest or b"\0" in rest:
                kept.append(rest)
                rest = b""
            _write(target, b"".join(kept))
        if not is_note(rest.decode("utf-8", "replace")):
            _write(target, rest)


def _write(target: object, content: bytes) -> None:
    while content:
        content = content[target.write(content) :]  # type: ignore[attr-defined]


if __name__ == "__main__":
    with contextlib.suppress(OSError):  # whoever read standard error has gone away
        main()
