"""Text of any length in, packed token ids out in the same order, encoded on every core.

A text may be cut wherever a run of white space begins: GPT-2's pattern never joins white space to
what stands before it, and no piece before the cut looks further ahead than to it. So the ids of
the parts, one after the other, are the ids of the whole. This module is what the helper processes
import: it does not need TensorFlow.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import os
import pickle
import queue
import re
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import regex

BLOCK_CHARACTERS = 1 << 20
MOST_PROCESSES = 4  # each takes about 100 MB
CACHED_WORDS = 1 << 18  # in all processes together: about 40 MB

# White space as the regex package's \s has it; Python's re adds \x1c-\x1f.
_WHITE = r"\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
WHITE = frozenset(re.findall(f"[{_WHITE}]", "".join(map(chr, range(0x3001)))))
_WORDS = re.compile(f"[{_WHITE}]*[^{_WHITE}]+|[{_WHITE}]+")
_ASCII_WORDS = re.compile(r"\s*\S+|\s+", re.ASCII)  # twice as quick
# Where a run of letters or digits ends is as safe, and found in text without spaces too. Only
# letters that every release of Unicode has: the encoder takes the newest for no letters.
_LETTER = r"[A-Za-z\u0410-\u044f\u0e01-\u0e30\u3041-\u3096\u30a1-\u30fa\u4e00-\u9fa5\uac00-\ud7a3]"
# (?r) searches from the end.
_SAFE_CUT = regex.compile(rf"(?r)(?<=\S)(?=\s)|(?<={_LETTER})(?=\P{{L}})|(?<=[0-9])(?=\P{{N}})")


class Block(NamedTuple):
    """Some texts in a row, and for each whether a chunk of the dataset ends with it."""

    texts: list[str]
    ends: list[bool]


class PackedBlock(NamedTuple):
    """A block's ids one after the other in bytes, how many each text has, and the chunks' ends."""

    ids: bytes
    counts: list[int]
    ends: list[bool]


def cut_into_blocks(
    parts: Iterable[tuple[str, bool]], size: int = BLOCK_CHARACTERS
) -> Iterator[Block]:
    """Gathers parts of text into blocks of about one size, cut where it is safe.

    Args:
        parts: text, and whether a chunk ends with it. The parts of one chunk belong together, so
            that joining them first changes nothing.
        size: how many characters a block holds, roughly.

    Yields:
        Blocks that hold the same text in the same order.
    """
    texts: list[str] = []
    ends: list[bool] = []
    open_text: list[str] = []
    held = 0
    for text, ends_chunk in parts:
        open_text.append(text)
        held += len(text)
        if ends_chunk:
            texts.append("".join(open_text))
            ends.append(True)
            open_text = []
        if held < size:
            continue
        if open_text:
            before, after = split_safely("".join(open_text))
            texts.append(before)
            ends.append(False)
            open_text = [after]
        yield Block(texts, ends)
        texts, ends, held = [], [], sum(map(len, open_text))
    if open_text:
        texts.append("".join(open_text))
        ends.append(True)
    if texts:
        yield Block(texts, ends)


def split_safely(text: str) -> tuple[str, str]:
    """Splits a text at the last place where encoding both parts gives the ids of the whole.

    Returns:
        The two parts; the first is empty if there is no such place.
    """
    found = _SAFE_CUT.search(text)
    cut = found.start() if found else 0
    return text[:cut], text[cut:]


class Packer:
    """Encodes texts, and remembers the ids of the words it met.

    Args:
        enc: the encoder.
        dtype: the ids' type.
        allow_special: whether special tokens in the text are encoded as such.
        most: how many words are remembered, roughly.
    """

    def __init__(
        self, enc: Any, dtype: np.dtype, allow_special: bool = False, most: int = CACHED_WORDS
    ):
        self.encode = functools.partial(enc.encode, allow_special=allow_special)
        self.dtype = np.dtype(dtype)
        self.most = most
        self.packed: dict[str, bytes] = {}
        # How many bytes of text each id stands for; ids that stand for nothing are never made.
        known = set(enc.encoder.values())
        self.id_widths = np.array(
            [len(enc.decode_bytes([i])) if i in known else 0 for i in range(enc.n_vocab)]
        )

    def pack(self, texts: list[str]) -> tuple[bytes, list[int]]:
        """Encodes texts: all their ids as bytes, and how many ids each has."""
        split = [split_words(text) for text in texts]
        found = [[*map(self.packed.get, words)] for words in split]
        gaps = [[i for i, ids in enumerate(row) if ids is None] for row in found]
        new = {words[i] for words, places in zip(split, gaps, strict=True) for i in places}
        if len(self.packed) + len(new) > self.most:
            # The words of this block are likely to come again; those of long ago are not.
            kept = set().union(*split) - new
            self.packed = {word: self.packed[word] for word in kept}
        self._learn(new)
        for words, row, places in zip(split, found, gaps, strict=True):
            for i in places:
                row[i] = self.packed[words[i]]
        packed = [b"".join(row) for row in found]
        return b"".join(packed), [len(ids) // self.dtype.itemsize for ids in packed]

    def _learn(self, words: set[str]) -> None:
        """Encodes words all at once: what begins with white space and ends without stands alone."""
        together = [word for word in words if word[0] in WHITE and word[-1] not in WHITE]
        for word in words.difference(together):
            self.packed[word] = np.array(self.encode(word), self.dtype).tobytes()
        ids = np.array(self.encode("".join(together)), self.dtype)
        word_ends = np.cumsum([len(word.encode("utf-8", "surrogatepass")) for word in together])
        id_ends = np.cumsum(self.id_widths[ids])
        ends = (np.searchsorted(id_ends, word_ends) + 1) * self.dtype.itemsize
        packed = ids.tobytes()
        start = 0
        for word, end in zip(together, ends.tolist(), strict=True):
            self.packed[word] = packed[start:end]
            start = end


def split_words(text: str) -> list[str]:
    """Splits a text before each run of white space; joined, the words are the text."""
    return (_ASCII_WORDS if text.isascii() else _WORDS).findall(text)


def core_count() -> int:
    """How many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def pack_blocks(
    blocks: Iterable[Block], enc: Any, dtype: np.dtype, allow_special: bool, processes: int
) -> Iterator[PackedBlock]:
    """Encodes blocks in order, in helper processes if that is asked for and possible.

    Args:
        blocks: what to encode; read only as far ahead as keeps the processes busy.
        enc: the encoder; it must be picklable for helper processes.
        dtype: the ids' type.
        allow_special: whether special tokens in the text are encoded as such.
        processes: how many processes encode; 1 is this one.

    Yields:
        The packed blocks.
    """
    local = Packer(enc, dtype, allow_special)
    share = local.most // processes
    helpers = _start_helpers((enc, dtype, allow_special, share), processes)
    if helpers:
        yield from _pack_in_helpers(blocks, helpers, local)
    else:
        for block in blocks:
            yield PackedBlock(*local.pack(block.texts), block.ends)


def _pack_in_helpers(
    blocks: Iterable[Block], helpers: list[_Helper], local: Packer
) -> Iterator[PackedBlock]:
    one_at_a_time = threading.Lock()
    idle: queue.SimpleQueue[_Helper] = queue.SimpleQueue()
    for helper in helpers:
        idle.put(helper)

    def pack(block: Block) -> PackedBlock:
        helper = idle.get()
        try:
            return PackedBlock(*helper.pack(block.texts), block.ends)
        except (EOFError, OSError, pickle.UnpicklingError):
            # The helper died, of a lack of memory perhaps: its share is done here.
            with one_at_a_time:
                return PackedBlock(*local.pack(block.texts), block.ends)
        finally:
            idle.put(helper)

    pool = ThreadPoolExecutor(len(helpers), thread_name_prefix="encode")
    try:
        pending: deque[Future[PackedBlock]] = deque()
        for block in blocks:
            pending.append(pool.submit(pack, block))
            if len(pending) > 2 * len(helpers):
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        for helper in helpers:
            helper.close()


# The package's own __init__ imports TensorFlow, so a bare package of that name stands in for it.
# Not multiprocessing, which imports the user's script again: many have no `if __name__ == ...`.
_BOOTSTRAP = """
import pickle, sys, types
sys.path[:], folder = pickle.load(sys.stdin.buffer)
package = types.ModuleType("gpt_2_simple")
package.__path__ = [folder]
sys.modules["gpt_2_simple"] = package
from gpt_2_simple.parallel_encode import serve
serve(sys.stdin.buffer, sys.stdout.buffer)
"""


class _Helper:
    """A process that packs texts: pickles go in and come out through its pipes."""

    def __init__(self, arguments: bytes):
        self.process = subprocess.Popen(
            [sys.executable, "-I", "-c", _BOOTSTRAP],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        self._send(pickle.dumps((sys.path, os.path.dirname(os.path.abspath(__file__)))))
        self._send(arguments)

    def pack(self, texts: list[str]) -> tuple[bytes, list[int]]:
        self._send(pickle.dumps(texts, pickle.HIGHEST_PROTOCOL))
        return self.receive()

    def receive(self) -> Any:
        answer = pickle.load(self.process.stdout)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def _send(self, pickled: bytes) -> None:
        self.process.stdin.write(pickled)
        self.process.stdin.flush()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait()


def _start_helpers(packer_arguments: tuple[Any, ...], processes: int) -> list[_Helper]:
    """Starts processes, or none at all if one is enough or any of them fails to start."""
    helpers: list[_Helper] = []
    if processes < 2:
        return helpers
    try:
        arguments = pickle.dumps(packer_arguments)
        for _ in range(processes):
            helpers.append(_Helper(arguments))
        for helper in helpers:
            helper.receive()
    except Exception:  # Whatever the reason, the work can be done in this process.
        for helper in helpers:
            helper.close()
        return []
    return helpers


def serve(requests: BinaryIO, answers: BinaryIO) -> None:
    """What a helper process does: packs the texts it is sent until its input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    gc.disable()  # there are a great many lists here and no cycles: the search costs time
    packer = Packer(*pickle.load(requests))
    answer: Any = "ready"
    while True:
        pickle.dump(answer, answers, pickle.HIGHEST_PROTOCOL)
        answers.flush()
        try:
            texts = pickle.load(requests)
        except EOFError:
            return
        try:
            answer = packer.pack(texts)
        except Exception as error:  # sent to the parent, which raises it
            answer = error
