"""Token chunks in, int32 [batch, time] batches of windows out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from ..common.report import say
from .parallel_encode import CONTEXT_FLAG
from .settings import SAMPLING
from .token_file import TokenChunks


class Batch(NamedTuple):
    """Windows of tokens, and which of their tokens are to be learned.

    Attributes:
        tokens: int32 [batch, time].
        loss_mask: float32 [batch, time - 1], for tokens[:, 1:]: 1 for each token that is to be
            predicted; 0 for padding, and for tokens that only give context.
    """

    tokens: np.ndarray
    loss_mask: np.ndarray


def window_length(
    chunks: Sequence[np.ndarray], wanted: int, sampling: str = "random", pad_documents: bool = False
) -> int:
    """How many tokens the training windows have: `wanted`, or fewer if no text is that long.

    `sampling` and `pad_documents` are as in WindowSampler: only 'epoch' without pad_documents draws
    windows that reach over several chunks.

    Raises:
        ValueError: there are fewer than the 2 tokens that it takes to predict one.
    """
    stream = _TokenStream(chunks)
    lengths = np.diff(_span_ends(stream, sampling, pad_documents), prepend=0)
    longest = int(lengths.max(initial=0))
    if longest < 2:
        raise ValueError(
            f"the dataset has {stream.size} tokens in {len(chunks)} chunks: "
            "training needs at least 2 in a row, the second to be predicted from the first"
        )
    return min(wanted, longest)


def split_dataset(
    chunks: Sequence[np.ndarray], val_split: float, whole_chunks: bool = False
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Takes the last part of a dataset away: returns chunks to train on, and to validate on.

    `val_split` is the share of the tokens to take, above 0 and below 1. With whole_chunks the cut
    is between two chunks if possible, where the share comes nearest to val_split.

    Raises:
        ValueError: the share is not between 0 and 1, or one of the parts has under 2 tokens.
    """
    if not 0 < val_split < 1:
        raise ValueError(f"val_split={val_split} must be above 0 and below 1, such as 0.05")
    stream = _TokenStream(chunks)
    total = stream.size
    cut = total - math.ceil(total * val_split)
    cuts_between = stream.ends[(stream.ends >= 2) & (stream.ends <= total - 2)]
    if whole_chunks and len(cuts_between):
        cut = int(cuts_between[np.abs(cuts_between - cut).argmin()])
    if cut < 2 or total - cut < 2:
        raise ValueError(
            f"val_split={val_split} of {total} tokens leaves {cut} to train on and "
            f"{total - cut} to validate on: each needs at least 2"
        )
    train, held_out = [], []
    for chunk, end in zip(chunks, stream.ends.tolist(), strict=True):
        n_train = max(cut - (end - len(chunk)), 0)
        train.append(chunk[:n_train])
        held_out.append(chunk[n_train:])
    return [part for part in train if len(part)], [part for part in held_out if len(part)]


def fixed_windows(
    chunks: Sequence[np.ndarray], length: int, count: int, pad_documents: bool = False
) -> Batch:
    """At most `count` evenly spaced windows to validate on, the same ones every time.

    They do not overlap. With pad_documents each lies within one chunk, and is filled up if that is
    shorter than `length` tokens.

    Raises:
        ValueError: the dataset is shorter than one window, or has nothing to predict.
    """
    stream = _TokenStream(chunks)
    if pad_documents:
        windows = _Windows(stream, length, "epoch", pad_documents)
        chosen = np.linspace(0, windows.count - 1, min(count, windows.count)).astype(np.int64)
        return stream.batch([windows.locate(index) for index in chosen.tolist()], length)
    if not 2 <= length <= stream.size:
        raise ValueError(f"length={length} must be from 2 to the dataset's {stream.size} tokens")
    n_fitting = max(1, (stream.size - 1) // (length - 1))
    starts = np.linspace(0, stream.size - length, min(count, n_fitting)).astype(np.int64)
    return stream.batch([_Window(start, length) for start in starts.tolist()], length)


def without_flags(tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The ids of tokens, some of which may have CONTEXT_FLAG, and whether each is to be learned."""
    tokens = np.asarray(tokens, np.uint32)
    return tokens & ~np.uint32(CONTEXT_FLAG), tokens < CONTEXT_FLAG


class _Window(NamedTuple):
    """A part of the token stream; its tokens before `first_target` are not to be predicted."""

    start: int
    size: int
    first_target: int = 1


class _TokenStream:
    """All chunks of a dataset, one after the other, as one row of tokens."""

    def __init__(self, chunks: Sequence[np.ndarray]):
        self._chunks = chunks
        if isinstance(chunks, TokenChunks):
            self.ends = chunks.ends
        else:
            self.ends = np.cumsum([len(chunk) for chunk in chunks], dtype=np.int64)
        self.size = int(self.ends[-1]) if len(self.ends) else 0

    def batch(self, windows: Sequence[_Window], length: int, pad_id: int = 0) -> Batch:
        """Reads windows of at most `length` tokens, each filled up with `pad_id`."""
        tokens = np.full((len(windows), length), pad_id, np.int32)
        loss_mask = np.zeros((len(windows), length - 1), np.float32)
        for row, window in enumerate(windows):
            ids, is_learned = without_flags(self._read(window.start, window.size))
            tokens[row, : window.size] = ids
            loss_mask[row, : window.size - 1] = is_learned[1:]
            loss_mask[row, : window.first_target - 1] = 0
        return Batch(tokens, loss_mask)

    def _read(self, start: int, length: int) -> np.ndarray:
        """Reads tokens across chunks: uint32 [length]."""
        tokens = np.empty(length, np.uint32)
        index = int(np.searchsorted(self.ends, start, side="right"))
        n_read = 0
        while n_read < length:
            chunk = self._chunks[index]
            offset = start + n_read - (int(self.ends[index]) - len(chunk))
            part = chunk[offset : offset + length - n_read]
            tokens[n_read : n_read + len(part)] = part
            n_read += len(part)
            index += 1
        return tokens


def _span_ends(stream: _TokenStream, sampling: str, pad_documents: bool) -> np.ndarray:
    """Where the spans end that windows lie within: the chunks, or the whole stream as one span."""
    is_packed = sampling == "epoch" and not pad_documents
    return stream.ends[-1:] if is_packed else stream.ends


def _count_targets(lengths: np.ndarray) -> int:
    """How many tokens can be predicted from one before them in their span."""
    return int(np.maximum(lengths - 1, 0).sum())


class _Windows:
    """Windows of one length, numbered from 0, span by span.

    With sampling='random' they start at every token. With sampling='epoch' or pad_documents they
    lie side by side: each starts with the last token of the one before. The last one of a span is
    shorter with pad_documents; without, it is moved back, and predicts only what is new.

    Attributes:
        length: tokens in a window.
        count: how many windows there are.
        per_epoch: how many windows predict as many tokens as the dataset has to predict.
        n_unreachable: how many tokens are in spans too short for a window.
    """

    def __init__(self, stream: _TokenStream, length: int, sampling: str, pad_documents: bool):
        if length < 2:
            raise ValueError(f"length={length} must be at least 2: a token, and the one after it")
        self._ends = _span_ends(stream, sampling, pad_documents)
        lengths = np.diff(self._ends, prepend=0)
        self._starts = self._ends - lengths
        longest = max(lengths, default=0)
        if pad_documents and longest < 2:
            raise ValueError(
                "no document of the dataset has 2 tokens, so there is nothing to predict"
            )
        if not pad_documents and longest < length:
            reason = (
                f"no chunk of the dataset has {length} tokens in a row, the longest has {longest}"
            )
            if sampling == "epoch":
                reason = f"the dataset has {longest} tokens, fewer than a window of {length}"
            raise ValueError(f"{reason}: window_length() tells how long windows can be")
        self.length = length
        self._pad_documents = pad_documents
        self.n_unreachable = 0 if pad_documents else int(lengths[lengths < length].sum())
        is_random = sampling == "random" and not pad_documents
        self._stride = 1 if is_random else length - 1
        if is_random:
            counts = np.maximum(lengths - length + 1, 0)
        else:
            counts = -(-np.maximum(lengths - 1, 0) // self._stride)
        self.count = int(counts.sum())
        self.per_epoch = _count_targets(lengths) / (length - 1) if is_random else self.count
        self._first_indices = np.cumsum(counts) - counts

    def locate(self, index: int) -> _Window:
        span = int(np.searchsorted(self._first_indices, index, side="right")) - 1
        number = index - int(self._first_indices[span])
        context, end = int(self._starts[span]) + number * self._stride, int(self._ends[span])
        if self._pad_documents:
            return _Window(context, min(self.length, end - context))
        start = min(context, end - self.length)
        return _Window(start, self.length, context - start + 1)


class WindowSampler:
    """Draws windows of tokens from chunks, with a random generator of its own.

    With sampling='random' every window that lies within a chunk is as likely as any other, each
    time. With sampling='epoch' the windows lie side by side over all chunks, and come in a new
    random order each epoch: every token is predicted once an epoch, except the very first.

    Args:
        chunks: 1-D arrays of ids.
        seed: of the generator; None draws another one each time.
        sampling: 'random' or 'epoch'.
        pad_documents: draw windows that each lie within one chunk (a document, if the dataset was
            read with pad_documents=True), filled up with `pad_id`.
        pad_id: the id that fills up a window; a batch's loss_mask is 0 there.

    Attributes:
        total_size: how many tokens there are in all.

    Raises:
        ValueError: there are no tokens, or there is no such sampling.
    """

    def __init__(
        self,
        chunks: Sequence[np.ndarray],
        seed: int | None = None,
        sampling: str = "random",
        pad_documents: bool = False,
        pad_id: int = 0,
    ):
        if sampling not in SAMPLING:
            raise ValueError(f"sampling={sampling!r} must be one of {SAMPLING}")
        self._stream = _TokenStream(chunks)
        self.total_size = self._stream.size
        if not self.total_size:
            raise ValueError("there are no tokens to sample: the dataset is empty")
        self.sampling = sampling
        self.pad_documents = pad_documents
        self.pad_id = pad_id
        span_ends = _span_ends(self._stream, sampling, pad_documents)
        self._n_targets = _count_targets(np.diff(span_ends, prepend=0))
        self._n_predicted = 0
        self._generator = np.random.default_rng(seed)
        self._windows: _Windows | None = None
        self._epoch: _Epoch | None = None

    @property
    def times_seen(self) -> float:
        """How often the data has been seen so far: tokens drawn to be predicted, per token."""
        return self._n_predicted / max(self._n_targets, 1)

    def windows_per_epoch(self, length: int) -> float:
        """How many windows of `length` tokens show the whole dataset once, on average.

        Raises:
            ValueError: no window of this length can be drawn from the dataset.
        """
        return self._windows_of(length).per_epoch

    def sample(self, length: int) -> np.ndarray:
        """Draws one window: int32 [length]; gpt-2-simple 0.8.1's Sampler.sample."""
        return self.next_batch(1, length).tokens[0]

    def next_batch(self, batch_size: int, length: int) -> Batch:
        """Draws `batch_size` windows of `length` tokens.

        Another length than before begins a new epoch.

        Raises:
            ValueError: no window of this length can be drawn from the dataset.
        """
        if self._windows is None or self._windows.length != length:
            self._windows, self._epoch = self._windows_of(length), None
            self._tell_unreachable(self._windows)
        count = self._windows.count
        drawn = [self._windows.locate(self._next_index(count)) for _ in range(batch_size)]
        self._n_predicted += sum(window.size - window.first_target for window in drawn)
        return self._stream.batch(drawn, length, self.pad_id)

    def _windows_of(self, length: int) -> _Windows:
        return _Windows(self._stream, length, self.sampling, self.pad_documents)

    def _tell_unreachable(self, windows: _Windows) -> None:
        """Prints how many tokens are in no window, if there are some."""
        if windows.n_unreachable:
            say(
                f"{windows.n_unreachable:,} of the {self.total_size:,} tokens are in chunks "
                f"shorter than a window of {windows.length} and are never drawn; "
                "sampling='epoch' draws all"
            )

    def _next_index(self, count: int) -> int:
        if self.sampling == "random":
            return int(self._generator.integers(count))
        if self._epoch is None or self._epoch.position == count:
            self._epoch = _Epoch(int(self._generator.integers(1 << 62)), count)
        return self._epoch.next_index()

    def state(self) -> dict[str, Any]:
        """What restore() needs to draw the same windows that come next; JSON can hold it."""
        return {
            "dataset": self._identity(),
            "generator": self._generator.bit_generator.state,
            "predicted": self._n_predicted,
            "length": self._windows.length if self._windows else 0,
            "epoch_seed": self._epoch.seed if self._epoch else None,
            "position": self._epoch.position if self._epoch else 0,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continues where state() was called; a state that is refused changes nothing.

        If the dataset or the sampling has changed since then, the generator and the count of
        tokens continue, a new epoch begins, and a line says so.

        Raises:
            ValueError: it is not the state of a WindowSampler.
        """
        windows, epoch = None, None
        try:
            generator = np.random.default_rng(0)
            generator.bit_generator.state = state["generator"]
            n_predicted, length = int(state["predicted"]), int(state["length"])
            seed, position = state["epoch_seed"], int(state["position"])
            if n_predicted < 0:
                raise ValueError(f"predicted={n_predicted} must be 0 or above")
            is_same = state["dataset"] == self._identity()
            if is_same and length:
                windows = self._windows_of(length)
            if windows is not None and seed is not None:
                epoch = _Epoch(int(seed), windows.count, position)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"this is not the state of a WindowSampler: {error!r}") from error
        if windows is not None and (self._windows is None or self._windows.length != length):
            self._tell_unreachable(windows)
        self._generator, self._n_predicted = generator, n_predicted
        self._windows, self._epoch = windows, epoch
        if not is_same:
            say("The dataset or its sampling has changed since this run was saved: a new epoch")

    def _identity(self) -> list[Any]:
        return [self.total_size, len(self._stream.ends), self.sampling, self.pad_documents]


class _Epoch:
    """A random order of all windows, and how many of them were drawn."""

    def __init__(self, seed: int, count: int, position: int = 0):
        if not 0 <= position <= count:
            raise ValueError(f"position={position} must be from 0 to the {count} windows")
        self.seed = seed
        self.position = position
        self._order = np.random.default_rng(seed).permutation(count)

    def next_index(self) -> int:
        self.position += 1
        return int(self._order[self.position - 1])
