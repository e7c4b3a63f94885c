"""Parts of text in, blocks of token ids out in the same order, encoded on every core.

A text may be cut wherever a run of white space begins: GPT-2's pattern never joins white space to
what stands before it, and no word before the cut looks further ahead than to it. So the ids of
the parts, one after the other, are the ids of the whole. Helper processes import this module.
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
from collections.abc import Collection, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

import numpy as np
import regex

from ..encoder import END_OF_TEXT, WHITE_SPACE

BLOCK_CHARACTERS = 1 << 20
MAX_PROCESSES = 4  # each takes about 100 MB
MAX_CACHED_WORDS = 1 << 18  # in all processes together: about 40 MB

_WHITE_SPACES = frozenset(re.findall(f"[{WHITE_SPACE}]", "".join(map(chr, range(0x3001)))))
_WORDS = re.compile(f"[{WHITE_SPACE}]*[^{WHITE_SPACE}]+|[{WHITE_SPACE}]+")
_ASCII_WORDS = re.compile(r"\s*\S+|\s+", re.ASCII)  # twice as quick
# Where a run of letters or digits ends is as safe, and found in text without spaces too. Only
# letters that every release of Unicode has: the encoder takes the newest for signs.
_LETTER = r"[A-Za-z\u0410-\u044f\u0e01-\u0e30\u3041-\u3096\u30a1-\u30fa\u4e00-\u9fa5\uac00-\ud7a3]"
# (?r) searches from the end.
_SAFE_CUT = regex.compile(rf"(?r)(?<=\S)(?=\s)|(?<={_LETTER})(?=\P{{L}})|(?<=[0-9])(?=\P{{N}})")


# Added to the id of a token that is read but not learned; such ids need 32 bits.
CONTEXT_FLAG = 1 << 31

# Ranges [start, end) of a text's characters, in order.
Spans = tuple[tuple[int, int], ...]


class ChunkPart(NamedTuple):
    """A part of a chunk's text, and whether the chunk ends with it.

    `context` is what is read but not learned.
    """

    text: str
    ends_chunk: bool
    context: Spans = ()


class TextBlock(NamedTuple):
    """Texts in a row, and for each of them whether a chunk ends with it.

    `contexts` are each text's spans that are read but not learned.
    """

    texts: list[str]
    ends_chunk: list[bool]
    contexts: list[Spans]

    def add(self, text: str, ends_chunk: bool, context: Spans) -> None:
        """Appends a text."""
        self.texts.append(text)
        self.ends_chunk.append(ends_chunk)
        self.contexts.append(context)


class TokenBlock(NamedTuple):
    """The ids of a TextBlock's texts, one after the other, and how many each text has."""

    ids: bytes
    counts: list[int]
    ends_chunk: list[bool]


def cut_into_blocks(
    parts: Iterable[ChunkPart],
    size: int = BLOCK_CHARACTERS,
    special_tokens: Collection[str] = (END_OF_TEXT,),
) -> Iterator[TextBlock]:
    """Gathers parts of text into blocks of about `size` characters, cut where it is safe.

    To join the parts of a chunk first would change nothing. `special_tokens` are never cut.
    """
    block = TextBlock([], [], [])
    open_text: list[str] = []
    open_context: Spans = ()
    n_open = n_characters = 0
    for text, ends, context in parts:
        open_text.append(text)
        open_context += tuple((start + n_open, end + n_open) for start, end in context)
        n_open += len(text)
        n_characters += len(text)
        is_full = n_characters >= size
        if ends or is_full:
            before, after = "".join(open_text), ""
            if not ends:
                before, after = split_safely(before, special_tokens)
            inside, open_context = _split_spans(open_context, len(before))
            block.add(before, ends, inside)
            open_text, n_open = ([], 0) if ends else ([after], len(after))
        if is_full:
            yield block
            block, n_characters = TextBlock([], [], []), n_open
    if open_text:
        block.add("".join(open_text), True, open_context)
    if block.texts:
        yield block


def _split_spans(spans: Spans, cut: int) -> tuple[Spans, Spans]:
    """The spans before a cut, and those after it, counted from there."""
    before = tuple((start, min(end, cut)) for start, end in spans if start < cut)
    return before, tuple((max(start - cut, 0), end - cut) for start, end in spans if end > cut)


def split_safely(text: str, special_tokens: Collection[str] = (END_OF_TEXT,)) -> tuple[str, str]:
    """Splits a text at the last place where the ids of both parts are the ids of the whole.

    No special token is cut, nor the start of one at the text's end, which may go on there. If there
    is no place to cut, the first part is empty.
    """
    cut = _last_cut(text, len(text))
    while (start := _start_of_special(text, cut, special_tokens)) is not None:
        cut = _last_cut(text, start)
    return text[:cut], text[cut:]


def _last_cut(text: str, end: int) -> int:
    """The last place up to `end` where a text may be cut if no special token is near."""
    found = _SAFE_CUT.search(text, 0, end + 1)  # one character more, since it looks ahead
    return found.start() if found else 0


def _start_of_special(text: str, cut: int, special_tokens: Collection[str]) -> int | None:
    """Where a special token starts that a cut would part; None if there is none."""
    for token in special_tokens:
        for start in range(max(cut - len(token) + 1, 0), cut):
            there = text[start : start + len(token)]
            if there == token or (start + len(there) == len(text) and token.startswith(there)):
                return start
    return None


def split_before_white_space(text: str) -> list[str]:
    """Splits a text before each run of white space; joined, the words are the text."""
    return (_ASCII_WORDS if text.isascii() else _WORDS).findall(text)


class BlockEncoder:
    """Encodes texts, and remembers the ids of about `max_words` of the words in them.

    If `allow_special` is true, each special token in the text is one token.
    """

    def __init__(
        self,
        enc: Any,
        dtype: np.dtype,
        allow_special: bool = False,
        max_words: int = MAX_CACHED_WORDS,
    ):
        self.encode = functools.partial(enc.encode, allow_special=allow_special)
        self.dtype = np.dtype(dtype)
        self.max_words = max_words
        self.cache: dict[str, bytes] = {}
        # How many bytes of text each id stands for; 0 for ids that are never made.
        known = set(enc.encoder.values())
        self.id_widths = np.array(
            [len(enc.decode_bytes([i])) if i in known else 0 for i in range(enc.n_vocab)]
        )

    def encode_block(self, block: TextBlock) -> TokenBlock:
        """Encodes a block of texts."""
        words_of = [split_before_white_space(text) for text in block.texts]
        # Nearly all words are known: a second look-up of the others alone is cheapest.
        ids_of: list[list[Any]] = [[*map(self.cache.get, words)] for words in words_of]
        gaps_of = [[i for i, ids in enumerate(row) if ids is None] for row in ids_of]
        new = {words[i] for words, gaps in zip(words_of, gaps_of, strict=True) for i in gaps}
        if len(self.cache) + len(new) > self.max_words:
            # The words of this block are likely to come again; those of long ago are not.
            kept = set[str]().union(*words_of) - new
            self.cache = {word: self.cache[word] for word in kept}
        self._learn(new)
        for words, row, gaps in zip(words_of, ids_of, gaps_of, strict=True):
            for i in gaps:
                row[i] = self.cache[words[i]]
        encoded = [b"".join(row) for row in ids_of]
        for number, context in enumerate(block.contexts):
            if context:
                encoded[number] = self._flag(encoded[number], block.texts[number], context)
        counts = [len(ids) // self.dtype.itemsize for ids in encoded]
        return TokenBlock(b"".join(encoded), counts, block.ends_chunk)

    def _flag(self, encoded: bytes, text: str, context: Spans) -> bytes:
        """Adds CONTEXT_FLAG to the ids of tokens that lie wholly within spans of the text."""
        ids = np.frombuffer(encoded, self.dtype).copy()
        byte_of = _byte_offsets(text)
        is_context = np.zeros(byte_of[-1] + 1, np.int64)
        for start, end in context:
            is_context[byte_of[start] + 1 : byte_of[end] + 1] = 1
        n_before = np.cumsum(is_context)  # bytes of context before each place in the text
        widths = self.id_widths[ids]
        ends = np.cumsum(widths)
        ids[n_before[ends] - n_before[ends - widths] == widths] |= CONTEXT_FLAG
        return ids.tobytes()

    def _learn(self, words: set[str]) -> None:
        """Adds words to the cache.

        Words that begin with white space and end without it are encoded in one go, since the ids
        of such words, joined, are those of the joined words.
        """
        joined = [w for w in words if w[0] in _WHITE_SPACES and w[-1] not in _WHITE_SPACES]
        for word in words.difference(joined):
            self.cache[word] = np.array(self.encode(word), self.dtype).tobytes()
        ids = np.array(self.encode("".join(joined)), self.dtype)
        word_ends = np.cumsum([len(word.encode("utf-8", "surrogatepass")) for word in joined])
        id_ends = np.cumsum(self.id_widths[ids])
        ends = (np.searchsorted(id_ends, word_ends) + 1) * self.dtype.itemsize
        encoded = ids.tobytes()
        start = 0
        for word, end in zip(joined, ends.tolist(), strict=True):
            self.cache[word] = encoded[start:end]
            start = end


def _byte_offsets(text: str) -> np.ndarray:
    """Where each character of a text starts in its UTF-8, and where the last one ends."""
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
    widths = 1 + (codes >= 0x80) + (codes >= 0x800) + (codes >= 0x10000)
    return np.concatenate([[0], np.cumsum(widths, dtype=np.int64)])


def core_count() -> int:
    """How many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def encode_blocks(
    blocks: Iterable[TextBlock], enc: Any, dtype: np.dtype, allow_special: bool, processes: int
) -> Iterator[TokenBlock]:
    """Encodes blocks in order, in helper processes if that is asked for and possible.

    Blocks are read only as far ahead as keeps the processes busy. The encoder must be picklable for
    helper processes; `processes=1` is this process alone.
    """
    local = BlockEncoder(enc, dtype, allow_special)
    encoder_arguments = (enc, dtype, allow_special, MAX_CACHED_WORDS // processes)
    helpers = _start_helpers(encoder_arguments, processes) if processes > 1 else []
    if helpers:
        yield from _encode_in_helpers(blocks, helpers, local)
    else:
        yield from map(local.encode_block, blocks)


def _encode_in_helpers(
    blocks: Iterable[TextBlock], helpers: list[_Helper], local: BlockEncoder
) -> Iterator[TokenBlock]:
    one_at_a_time = threading.Lock()
    idle: queue.SimpleQueue[_Helper] = queue.SimpleQueue()
    for helper in helpers:
        idle.put(helper)

    def encode(block: TextBlock) -> TokenBlock:
        helper = idle.get()
        try:
            return helper.encode_block(block)
        except (EOFError, OSError, pickle.UnpicklingError):
            # The helper died, of a lack of memory perhaps: this process does its share.
            with one_at_a_time:
                return local.encode_block(block)
        finally:
            idle.put(helper)

    pool = ThreadPoolExecutor(len(helpers), thread_name_prefix="encode")
    try:
        pending: deque[Future[TokenBlock]] = deque()
        for block in blocks:
            pending.append(pool.submit(encode, block))
            if len(pending) > 2 * len(helpers):
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        for helper in helpers:
            helper.close()


class _Helper:
    """A process that encodes blocks: pickles go in and come out through its pipes.

    It is not one of multiprocessing's, which import the user's script again: many scripts have no
    `if __name__ == "__main__"`.
    """

    def __init__(self, arguments: bytes):
        path = [*map(os.fspath, sys.path), str(Path(__file__).parents[2])]
        code = f"import sys; sys.path[:] = {path!r}; from {__name__} import serve; serve()"
        self.process = subprocess.Popen(
            [sys.executable, "-I", "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        self._requests = cast(BinaryIO, self.process.stdin)
        self._answers = cast(BinaryIO, self.process.stdout)
        self._send(arguments)

    def encode_block(self, block: TextBlock) -> TokenBlock:
        self._send(pickle.dumps(block, pickle.HIGHEST_PROTOCOL))
        return self.receive()

    def receive(self) -> Any:
        answer = pickle.load(self._answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def _send(self, pickled: bytes) -> None:
        self._requests.write(pickled)
        self._requests.flush()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._requests.close()
        self._answers.close()
        self.process.wait()


def _start_helpers(encoder_arguments: tuple[Any, ...], processes: int) -> list[_Helper]:
    """Starts processes, or none at all if any of them fails to start."""
    helpers: list[_Helper] = []
    try:
        arguments = pickle.dumps(encoder_arguments)
        for _ in range(processes):
            helpers.append(_Helper(arguments))
        for helper in helpers:
            helper.receive()
    except Exception:  # Whatever the reason, the work can be done in this process.
        for helper in helpers:
            helper.close()
        return []
    return helpers


def serve() -> None:
    """What a helper process does: it encodes the blocks that it is sent until its input ends."""
    requests, answers = sys.stdin.buffer, sys.stdout.buffer
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    gc.disable()  # there are a great many lists here and no cycles: the search costs time
    encoder = BlockEncoder(*pickle.load(requests))
    answer: Any = "ready"
    while True:
        pickle.dump(answer, answers, pickle.HIGHEST_PROTOCOL)
        answers.flush()
        try:
            block = pickle.load(requests)
        except EOFError:
            return
        try:
            answer = encoder.encode_block(block)
        except Exception as error:  # sent to the parent, which raises it
            answer = error
