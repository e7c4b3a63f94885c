"""Text in, token ids out, and back: GPT-2's byte-level byte pair encoding (BPE).

Ids are those of tiktoken and of Hugging Face's tokenizers for the same encoder.json and vocab.bpe.

Lone surrogates (which Python's strings may hold and UTF-8 may not) are encoded as the three bytes
that the "surrogatepass" error handler gives them, and `Encoder.decode` restores them, so that
`decode(encode(text)) == text` for every string.
"""

from __future__ import annotations

import codecs
import functools
import heapq
import itertools
import json
import os
import re
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import regex

END_OF_TEXT = "<|endoftext|>"
MERGES_HEADER = "#version"

# Letters and numbers that came with Unicode 17 and 18. tiktoken 0.14 and tokenizers 0.23 know
# Unicode 16, newer releases of regex know more. Without this list, ids would depend on the release
# of regex that is installed.
_NEWER_THAN_UNICODE_16 = (
    r"\u0558\u058b-\u058c\u088f\u0c5c\u0cdc\u208f\u209d-\u209f\ua7ce-\ua7cf\ua7d2\ua7d4\ua7dd"
    r"\ua7e2\ua7f1\uab6c-\uab6d\U000107bb-\U000107bf\U00010940-\U00010959\U00010ec5-\U00010ec7"
    r"\U00010ed9-\U00010eee\U00011b0a\U00011db0-\U00011ddb\U00011de0-\U00011de9\U00011df1"
    r"\U0001246f\U00012475-\U0001247f\U00012550-\U00012686\U00016ea0-\U00016eb8"
    r"\U00016ebb-\U00016ed3\U00016ff2-\U00016ff6\U000187f8-\U000187ff\U00018cd6-\U00018cda"
    r"\U00018d09-\U00018d20\U00018d80-\U00018df2\U00018e00-\U00019191\U000191a0-\U000191d2"
    r"\U0001b123-\U0001b128\U0001b168\U0001d6a6\U0001df1f-\U0001df24\U0001df2b-\U0001df81"
    r"\U0001df90-\U0001df96\U0001dfcd-\U0001dfff\U0001e6c0-\U0001e6de\U0001e6e0-\U0001e6e2"
    r"\U0001e6e4-\U0001e6e5\U0001e6e7-\U0001e6ed\U0001e6f0-\U0001e6f4\U0001e6fe-\U0001e6ff"
    r"\U0002b73a-\U0002b73f\U0002b81e\U0002cea2-\U0002cead\U000323b0-\U00033479"
    r"\U0003d000-\U0003fc3f"
)
_LETTERS = rf"[\p{{L}}--[{_NEWER_THAN_UNICODE_16}]]"
_NUMBERS = rf"[\p{{N}}--[{_NEWER_THAN_UNICODE_16}]]"

# White space as \s of the regex package has it: no more and no less. Python's re adds \x1c-\x1f.
WHITE_SPACE = r"\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"


def _words_pattern(letters: str, numbers: str) -> str:
    """GPT-2's split of text into words; takes what stands inside the brackets of two classes."""
    return (
        rf" ?[{letters}]+|'(?:[sdmt]|ll|ve|re)| ?[^{WHITE_SPACE}{letters}{numbers}]+"
        rf"| ?[{numbers}]+|[{WHITE_SPACE}]+(?![^{WHITE_SPACE}])|[{WHITE_SPACE}]+"
    )


def _up_to_ffff(inside: str) -> str:
    """A class's characters up to U+FFFF, as ranges that the standard library understands."""
    runs = regex.findall(f"[{inside}]+", "".join(map(chr, range(0x10000))), regex.V1)
    return "".join(f"{run[0]}-{run[-1]}" for run in runs)


# The patterns take 0.1 s to make, so they are made at their first use. The standard library's
# engine is some four times as fast as regex, but it has no \p{L} and is slow with classes that
# reach beyond U+FFFF.
@functools.cache
def _words_up_to_ffff() -> re.Pattern[str]:
    return re.compile(_words_pattern(_up_to_ffff(_LETTERS), _up_to_ffff(_NUMBERS)))


@functools.cache
def _words() -> regex.Pattern[str]:
    return regex.compile(_words_pattern(_LETTERS, _NUMBERS), regex.V1)


# White space after something else always begins a new word, so a text may be cut there.
_SAFE_CUT = re.compile(r"\S(?=[ \n])")
_PART_CHARS = 4096

# These bytes are a surrogate that "surrogatepass" wrote; UTF-8 never holds them.
_SURROGATE = re.compile(rb"(\xed[\xa0-\xbf][\x80-\xbf])")

# Limits of the cache of words, which takes about 20 MB (some 300 bytes a word).
_MAX_CACHED_WORDS = 65_536
_MAX_CACHED_WORD_CHARS = 32

# In longer words a heap finds the next merge faster than a scan does.
_LONG_WORD_BYTES = 100


@functools.lru_cache(maxsize=1)
def bytes_to_unicode() -> dict[int, str]:
    """Maps each byte to the character that stands for it in a vocabulary's files.

    A printable character of Latin-1 stands for its own byte; the characters from U+0100 on stand
    for the other bytes, in their order.
    """
    spare = itertools.count(256)
    return {
        byte: chr(byte if chr(byte).isprintable() and byte != 0x20 else next(spare))
        for byte in range(256)
    }


class _Merges:
    """Turns a word's bytes into token ids by byte pair encoding (Sennrich et al. 2016).

    It merges the pair of the lowest rank, of several such pairs the leftmost, until no pair has a
    rank.

    Args:
        byte_ids: each byte's id.
        merges: the ids (left, right, made) of each merge, the lowest rank first.
        n_vocab: the highest id + 1.
    """

    def __init__(
        self, byte_ids: list[int], merges: list[tuple[int, int, int]], n_vocab: int
    ) -> None:
        self.byte_ids = byte_ids
        self.made = [made for _, _, made in merges]
        self.no_rank = len(merges)
        # left id -> right id -> rank. Most ids share one empty dict; the last entry is for id -1.
        empty: dict[int, int] = {}
        self.ranks = [empty] * (n_vocab + 1)
        for rank, (left, right, _) in enumerate(merges):
            if self.ranks[left] is empty:
                self.ranks[left] = {}
            self.ranks[left][right] = rank

    def apply(self, word: bytes) -> list[int]:
        """Merges a word of at least one byte."""
        parts = [*map(self.byte_ids.__getitem__, word), -1]  # -1 ends the word: it never merges
        if len(parts) > _LONG_WORD_BYTES:
            return self._apply_to_long(parts)
        rank_of, made, no_rank = self.ranks, self.made, self.no_rank
        ranks = [rank_of[left].get(right, no_rank) for left, right in itertools.pairwise(parts)]
        while (rank := min(ranks)) != no_rank:
            i = ranks.index(rank)
            parts[i] = token = made[rank]
            del parts[i + 1], ranks[i]
            # At the left end, i - 1 is -1: the entry of the closing -1, which never has a rank.
            ranks[i - 1] = rank_of[parts[i - 1]].get(token, no_rank)
            ranks[i] = rank_of[token].get(parts[i + 1], no_rank)
        parts.pop()
        return parts

    def _apply_to_long(self, parts: list[int]) -> list[int]:
        """Does what apply() does, in O(n log n) for n bytes; `parts` ends with -1."""
        rank_of, no_rank = self.ranks, self.no_rank
        size = len(parts)
        after = array("q", [*range(1, size), size - 1])
        before = array("q", range(-1, size - 1))
        pairs = itertools.pairwise(parts)
        ranks = array("q", (rank_of[left].get(right, no_rank) for left, right in pairs))
        ranks.append(no_rank)
        heap = [rank * size + i for i, rank in enumerate(ranks) if rank != no_rank]
        heapq.heapify(heap)
        while heap:
            rank, i = divmod(heapq.heappop(heap), size)
            if ranks[i] != rank:
                continue  # merged or changed since it was pushed
            gone = after[i]
            parts[i], parts[gone], ranks[gone] = self.made[rank], -1, no_rank
            after[i] = after[gone]
            before[after[i]] = i
            for left in (before[i], i):
                ranks[left] = rank = rank_of[parts[left]].get(parts[after[left]], no_rank)
                if rank != no_rank:
                    heapq.heappush(heap, rank * size + left)
        return [token for token in parts if token >= 0]


def _whole_tokens(
    byte_ids: list[int], merges: list[tuple[int, int, int]], n_vocab: int
) -> np.ndarray:
    """Finds the tokens whose bytes are encoded as that one token: they need no merging later.

    A token is one of them if both its halves are, and if no merge of a lower rank first joins the
    end of the left half to the start of the right half. To test this, the merges on both sides of
    the boundary are undone, the highest rank first. After each, the two tokens that meet at the
    boundary are looked up among the merges. Returns bool [n_vocab], which is False also where it is
    not certain, as for a repeated character.
    """
    whole = np.zeros(n_vocab, bool)
    whole[byte_ids] = True
    left, right, made = np.array(merges, np.int64).reshape(-1, 3).T
    order = np.arange(len(merges))
    rank = np.full(n_vocab, -1)  # of bytes, and of tokens that no merge makes: -1
    rank[made] = order
    if (rank[made] != order).any() or (np.maximum(rank[left], rank[right]) >= order).any():
        return whole  # one token is made in two ways, or its halves are made after it
    by_pair = np.argsort(left * n_vocab + right)
    pairs = (left * n_vocab + right)[by_pair]

    joined_first = np.zeros(len(merges), bool)  # by a merge across the boundary
    tested, a, b = order, left, right  # the merges left to test, and the tokens that meet in each
    while tested.size:
        undo_left = rank[a] > rank[b]
        undone = np.where(undo_left, rank[a], rank[b])
        a, b = np.where(undo_left, right[undone], a), np.where(undo_left, b, left[undone])
        found = np.minimum(np.searchsorted(pairs, a * n_vocab + b), len(pairs) - 1)
        joins = (pairs[found] == a * n_vocab + b) & (by_pair[found] <= undone) & (undone >= 0)
        joined_first[tested[joins]] = True
        go_on = (undone >= 0) & ~joins
        tested, a, b = tested[go_on], a[go_on], b[go_on]
    for (one, other, token), is_joined_first in zip(merges, joined_first.tolist(), strict=True):
        whole[token] = whole[one] and whole[other] and not is_joined_first
    return whole


class _WordIds(dict[str, Sequence[int]]):
    """A cache of each word's ids, which makes those of a new word when it is looked up.

    Beside the `known` words, which are the vocabulary's own, it keeps _MAX_CACHED_WORDS.
    """

    def __init__(self, merges: _Merges, known: dict[str, Sequence[int]]) -> None:
        super().__init__(known)
        self._merge = merges.apply
        self._max_words = len(known) + _MAX_CACHED_WORDS

    def __missing__(self, word: str) -> Sequence[int]:
        ids = self._merge(word.encode("utf-8", "surrogatepass"))
        if len(word) <= _MAX_CACHED_WORD_CHARS:
            if len(self) >= self._max_words:
                self.clear()
            self[word] = ids
        return ids


class Encoder:
    """A vocabulary that turns text into token ids and back.

    Attributes:
        encoder: token, in the characters of `bytes_to_unicode` -> id. Each byte is a token.
        decoder: id -> token.
        bpe_merges: the pairs of tokens to merge, the earliest first.
        errors: what decoding does with bytes that are not UTF-8, such as half a character: a name
            for `bytes.decode`.
        n_vocab: the highest id + 1.
        end_of_text: the id of `<|endoftext|>`, None if the vocabulary has none.
        special_tokens: text -> id of the tokens that no merge makes, `<|endoftext|>` among them.
            A token with white space in it is none of them.

    Raises:
        ValueError: a byte or a merge's token is missing, or two tokens have the same id.
    """

    def __init__(
        self,
        encoder: dict[str, int],
        bpe_merges: Iterable[tuple[str, str]],
        errors: str = "replace",
    ) -> None:
        self.encoder = encoder
        self.decoder = {token_id: token for token, token_id in encoder.items()}
        self.bpe_merges = list(bpe_merges)
        self.errors = errors
        byte_ids, merges = _checked(encoder, self.decoder, self.bpe_merges)
        self.n_vocab = max(self.decoder) + 1
        self.end_of_text = encoder.get(END_OF_TEXT)
        self._bytes = _token_bytes(encoder)
        usual = {*byte_ids, *(made for _, _, made in merges)}
        self.special_tokens = {
            text: token_id
            for token_id in encoder.values()
            if token_id not in usual and (text := self._special_text(token_id)) is not None
        }
        by_length = sorted(self.special_tokens, key=len, reverse=True)
        self._special = re.compile(f"({'|'.join(map(re.escape, by_length))})")
        known: dict[str, Sequence[int]] = {}
        for token_id in np.flatnonzero(_whole_tokens(byte_ids, merges, self.n_vocab)).tolist():
            try:
                known[self._bytes[token_id].decode()] = (token_id,)
            except UnicodeDecodeError:
                continue  # a part of a character is never a word
        self._ids_of_word = _WordIds(_Merges(byte_ids, merges, self.n_vocab), known)

    def _special_text(self, token_id: int) -> str | None:
        """The text of a token that no merge makes, None if it cannot stand in a text as a whole."""
        try:
            text = self._bytes[token_id].decode()
        except UnicodeDecodeError:
            return None
        return text if text and not regex.search(f"[{WHITE_SPACE}]", text) else None

    def encode(self, text: str, allow_special: bool = False) -> list[int]:
        """Turns text into token ids.

        Args:
            text: any string.
            allow_special: whether `<|endoftext|>` and other `special_tokens` in it are one token
                each. By default their characters are encoded like any others.

        Raises:
            ValueError: the text has `<|endoftext|>`, it is allowed, but the vocabulary lacks it.
        """
        ids: list[int] = []
        if allow_special and END_OF_TEXT in text and self.end_of_text is None:
            raise ValueError(
                f"this vocabulary has no token {END_OF_TEXT}: give allow_special=False"
            )
        if allow_special and self.special_tokens and self._special.search(text):
            for i, part in enumerate(self._special.split(text)):
                ids += [self.special_tokens[part]] if i % 2 else self.encode(part)
            return ids
        for part in _parts(text):
            ids_of_words = map(self._ids_of_word.__getitem__, split_words(part))
            ids.extend(itertools.chain.from_iterable(ids_of_words))
        return ids

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Turns token ids (Python's or NumPy's integers) into the bytes they stand for.

        Raises:
            ValueError: an id is not in the vocabulary.
        """
        try:
            return b"".join(map(self._bytes.__getitem__, ids))
        except KeyError as error:
            raise ValueError(
                f"token id {error.args[0]} is not in this vocabulary of {self.n_vocab} tokens"
            ) from None

    def decode(self, ids: Iterable[int], surrogates: bool = True) -> str:
        """Turns token ids into text; `decode(encode(text)) == text`.

        Bytes that are not UTF-8, such as half a character, become U+FFFD, or what `errors` says.

        Args:
            ids: Python's or NumPy's integers.
            surrogates: whether the bytes that `encode` makes of a lone surrogate become one again.
                Text with a lone surrogate cannot be written as UTF-8, so generated text is decoded
                with False, which treats these bytes like others that are not UTF-8.

        Raises:
            ValueError: an id is not in the vocabulary.
        """
        raw = self.decode_bytes(ids)
        if not surrogates:
            return raw.decode("utf-8", self.errors)
        return "".join(
            part.decode("utf-8", "surrogatepass" if i % 2 else self.errors)
            for i, part in enumerate(_SURROGATE.split(raw))
        )


class IncrementalDecoder:
    """Turns token ids into text, a few at a time, as soon as characters are complete.

    The joined results of `feed` and `flush` are `encoder.decode(ids, surrogates=False)`.
    """

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder
        self._decoder = codecs.getincrementaldecoder("utf-8")(encoder.errors)

    def feed(self, ids: Iterable[int]) -> str:
        """Takes the next ids; returns the text that they complete, which may be empty."""
        return self._decoder.decode(self._encoder.decode_bytes(ids))

    def flush(self) -> str:
        """Ends the text; returns U+FFFD if half a character is left. The next text may follow."""
        return self._decoder.decode(b"", final=True)


def get_encoder(folder: str | os.PathLike[str]) -> Encoder:
    """Reads the vocabulary of a model or a run, and reads it again only if its files change.

    Args:
        folder: the model's or the run's folder, which holds encoder.json and vocab.bpe.

    Returns:
        The vocabulary. Callers share it: do not change it.

    Raises:
        FileNotFoundError: one of the two files is missing.
        ValueError: one of the two files is broken; the message names it.
    """
    stamps = []
    for name in ("encoder.json", "vocab.bpe"):
        path = Path(folder, name)
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} is missing: copy it from the model that this folder belongs to, "
                "or download the model again with download_gpt2()"
            )
        status = path.stat()
        stamps.append((status.st_mtime_ns, status.st_size))
    return _load(os.path.abspath(folder), tuple(stamps))


@functools.lru_cache(maxsize=4)
def _load(folder: str, stamps: tuple[tuple[int, int], ...]) -> Encoder:
    """Reads a vocabulary; the cache compares `stamps`, which change when the files do."""
    vocabulary, merges = Path(folder, "encoder.json"), Path(folder, "vocab.bpe")
    encoder, bpe_merges = read_vocabulary(vocabulary), read_merges(merges)
    try:
        return Encoder(encoder, bpe_merges)
    except ValueError as error:
        raise ValueError(f"{vocabulary} with {merges.name}: {error}") from None


def check_vocabulary(encoder: Encoder, n_vocab: int, folder: str | os.PathLike[str]) -> None:
    """Raises ValueError if a vocabulary and the hparams.json in its folder differ in size."""
    if encoder.n_vocab != n_vocab:
        raise ValueError(
            f"{Path(folder, 'encoder.json')} has {encoder.n_vocab} tokens, but n_vocab={n_vocab} "
            "in hparams.json: these files belong to different models"
        )


def _parts(text: str) -> Iterator[str]:
    """Cuts text between words, into parts of _PART_CHARS or somewhat more."""
    start = 0
    while start < len(text):
        cut = _SAFE_CUT.search(text, start + _PART_CHARS)
        end = cut.end() if cut else len(text)
        yield text[start:end]
        start = end


def split_words(text: str) -> list[str]:
    """Splits text into GPT-2's words, which are encoded one by one; joined, they are the text."""
    if text.isascii() or max(text) <= "\uffff":
        return _words_up_to_ffff().findall(text)
    return _words().findall(text)


def _checked(
    encoder: dict[str, int], decoder: dict[int, str], bpe_merges: list[tuple[str, str]]
) -> tuple[list[int], list[tuple[int, int, int]]]:
    """The ids of the bytes, and of the merges (left, right, made). ValueError: one is missing."""
    if len(decoder) < len(encoder):
        token, token_id = next((t, i) for t, i in encoder.items() if decoder[i] != t)
        raise ValueError(f"id {token_id} stands for {token!r} and for {decoder[token_id]!r}")
    for byte, char in bytes_to_unicode().items():
        if char not in encoder:
            raise ValueError(f"byte {byte:#04x} ({char!r}) is not in the vocabulary")
    byte_ids = [encoder[char] for char in bytes_to_unicode().values()]
    try:
        merges = [(encoder[a], encoder[b], encoder[a + b]) for a, b in bpe_merges]
    except KeyError as error:
        raise ValueError(f"a merge needs {error.args[0]!r}, not in the vocabulary") from None
    return byte_ids, merges


def token_of_text(text: str) -> str:
    """The token that stands for a text, in the characters of `bytes_to_unicode`."""
    return "".join(map(bytes_to_unicode().__getitem__, text.encode("utf-8")))


def _token_bytes(encoder: dict[str, int]) -> dict[int, bytes]:
    """The bytes that each id stands for.

    A token with characters that stand for no byte is an added token: it stands for its own text.
    """
    to_latin_1 = {ord(char): byte for byte, char in bytes_to_unicode().items()}
    known = frozenset(bytes_to_unicode().values())
    return {
        token_id: token.translate(to_latin_1).encode("latin-1")
        if known.issuperset(token)
        else token.encode("utf-8", "surrogatepass")
        for token, token_id in encoder.items()
    }


def _read_text(path: Path) -> str:
    """A text file's content; raises ValueError if it is empty or not UTF-8 without a mark."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from None
    if not text:
        raise ValueError(f"{path} is empty")
    if text.startswith("\ufeff"):
        raise ValueError(f"{path} starts with a byte order mark: save it as UTF-8 without one")
    return text


def read_vocabulary(path: Path) -> dict[str, int]:
    """Reads encoder.json: a JSON object of tokens and ids."""
    try:
        encoder = json.loads(_read_text(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(encoder, dict):
        raise ValueError(f"{path} must hold an object of tokens and ids, not {type(encoder)}")
    for token, token_id in encoder.items():
        if type(token_id) is not int or token_id < 0:
            raise ValueError(f"{path}: the id of {token!r} is {token_id!r}, not a whole number")
    return encoder


def read_merges(path: Path) -> list[tuple[str, str]]:
    """Reads vocab.bpe: a header, then two tokens a line."""
    lines = _read_text(path).rstrip("\n").split("\n")
    has_header = lines[0].startswith(MERGES_HEADER)
    merges = []
    for number, line in enumerate(lines[has_header:], start=1 + has_header):
        left, _, right = line.partition(" ")
        if not left or not right or " " in right:
            raise ValueError(f"{path}, line {number}: {line!r} is not two tokens and a space")
        merges.append((left, right))
    return merges
