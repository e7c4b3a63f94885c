"""Token chunks in, int32 [batch, time] batches out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from ..common.report import say
from .token_file import TokenChunks

SAMPLING = ("random", "epoch")


class Batch(NamedTuple):
    """A batch and what of it is to be learned.

    Attributes:
        tokens: int32 [batch, time].
        weights: float32 [batch, time], 1 for each token that is to be predicted, 0 for padding and
            for what is only there to predict the rest from.
    """

    tokens: np.ndarray
    weights: np.ndarray


def window_length(chunks: Sequence[np.ndarray], wanted: int, sampling: str = "random") -> int:
    """How long the training windows can be: as long as wanted, if the dataset is long enough.

    Args:
        chunks: the dataset.
        wanted: the length that the model is trained with at most.
        sampling: how WindowSampler draws: 'random' keeps within a chunk, 'epoch' does not.

    Returns:
        The number of tokens in a window.

    Raises:
        ValueError: if there are fewer than the 2 tokens that it takes to predict one.
    """
    lengths = [len(chunk) for chunk in chunks]
    longest = max(lengths, default=0) if sampling == "random" else sum(lengths)
    if longest < 2:
        raise ValueError(
            f"the dataset has {sum(lengths)} tokens in {len(lengths)} chunks: "
            "training needs at least 2 in a row, the second to be predicted from the first"
        )
    return min(wanted, longest)


def split_dataset(
    chunks: Sequence[np.ndarray], val_split: float, whole_chunks: bool = False
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Takes the last part of a dataset away for validation.

    Args:
        chunks: the dataset.
        val_split: which share of the tokens to take, above 0 and below 1.
        whole_chunks: take the share nearest to that which cuts no chunk, if there is one.

    Returns:
        The chunks to train on, and those to validate on.

    Raises:
        ValueError: if the share is not between 0 and 1, or one of the parts has under 2 tokens.
    """
    if not 0 < val_split < 1:
        raise ValueError(f"val_split={val_split} must be above 0 and below 1, such as 0.05")
    total = sum(len(chunk) for chunk in chunks)
    cut = total - math.ceil(total * val_split)
    if whole_chunks:
        ends = np.cumsum([len(chunk) for chunk in chunks])
        ends = ends[(ends >= 2) & (ends <= total - 2)]
        cut = int(ends[np.abs(ends - cut).argmin()]) if len(ends) else cut
    if cut < 2 or total - cut < 2:
        raise ValueError(
            f"val_split={val_split} of {total} tokens leaves {cut} to train on and "
            f"{total - cut} to validate on: each needs at least 2"
        )
    train: list[np.ndarray] = []
    held_out: list[np.ndarray] = []
    start = 0
    for chunk in chunks:
        here = min(max(cut - start, 0), len(chunk))
        if here:
            train.append(chunk[:here])
        if here < len(chunk):
            held_out.append(chunk[here:])
        start += len(chunk)
    return train, held_out


def fixed_windows(
    chunks: Sequence[np.ndarray], length: int, count: int, pad_documents: bool = False
) -> Batch:
    """Evenly spaced windows that do not overlap, to validate on: the same ones every time.

    Args:
        chunks: the dataset.
        length: tokens in a window.
        count: how many windows there are at most.
        pad_documents: whether each window lies within one chunk, filled up if it is shorter.

    Returns:
        Tokens and weights, each [windows, time].

    Raises:
        ValueError: if the dataset is shorter than one window, or has nothing to predict.
    """
    stream = _Stream(chunks)
    if pad_documents:
        documents = _DocumentWindows(stream, length)
        if not documents.count:
            raise ValueError(documents.missing)
        chosen = np.linspace(0, documents.count - 1, min(count, documents.count)).astype(np.int64)
        return stream.batch([documents.locate(index) for index in chosen.tolist()], length)
    if not 2 <= length <= stream.size:
        raise ValueError(f"length={length} must be from 2 to the dataset's {stream.size} tokens")
    fitting = max(1, (stream.size - 1) // (length - 1))
    starts = np.linspace(0, stream.size - length, min(count, fitting)).astype(np.int64)
    return stream.batch([_Window(start, length) for start in starts.tolist()], length)


class _Stream:
    """All chunks of a dataset as one row of tokens."""

    def __init__(self, chunks: Sequence[np.ndarray]):
        self.chunks = chunks
        if isinstance(chunks, TokenChunks):
            self.ends = chunks.ends
        else:
            self.ends = np.cumsum([len(chunk) for chunk in chunks], dtype=np.int64)
        self.size = int(self.ends[-1]) if len(self.ends) else 0

    @property
    def lengths(self) -> np.ndarray:
        """How many tokens each chunk has."""
        return np.diff(self.ends, prepend=0)

    def batch(self, windows: Sequence[_Window], length: int, pad_id: int = 0) -> Batch:
        """Reads windows of at most `length` tokens, each filled up with `pad_id`."""
        tokens = np.full((len(windows), length), pad_id, np.int32)
        weights = np.zeros((len(windows), length), np.float32)
        for row, window in enumerate(windows):
            tokens[row, : window.size] = self.read(window.start, window.size)
            weights[row, window.fresh : window.size] = 1
        return Batch(tokens, weights)

    def read(self, start: int, length: int) -> np.ndarray:
        """Reads a stretch of the row, across chunks: int32 [length]."""
        tokens = np.empty(length, np.int32)
        index = int(np.searchsorted(self.ends, start, side="right"))
        filled = 0
        while filled < length:
            chunk = self.chunks[index]
            within = start + filled - (int(self.ends[index]) - len(chunk))
            part = chunk[within : within + length - filled]
            tokens[filled : filled + len(part)] = part
            filled += len(part)
            index += 1
        return tokens


class _Window(NamedTuple):
    """A stretch of the row of tokens, of which those from `fresh` on are to be predicted."""

    start: int
    size: int
    fresh: int = 1


class _FreeWindows:
    """Every window that lies within a chunk, wherever it starts."""

    def __init__(self, stream: _Stream, length: int):
        self.length = length
        self.starts = stream.ends - stream.lengths
        self.until = np.cumsum(np.maximum(stream.lengths - length + 1, 0))
        self.count = int(self.until[-1]) if len(self.until) else 0
        self.predictable = int(np.maximum(stream.lengths - 1, 0).sum())
        self.missing = (
            f"no chunk of the dataset has {length} tokens in a row, the longest has "
            f"{max(stream.lengths, default=0)}: window_length() tells how long windows can be"
        )

    def locate(self, index: int) -> _Window:
        chunk = int(np.searchsorted(self.until, index, side="right"))
        before = int(self.until[chunk - 1]) if chunk else 0
        return _Window(int(self.starts[chunk]) + index - before, self.length)


class _PackedWindows:
    """Windows side by side over all chunks; each predicts on from the last token of the one before.

    The last one is moved back to end with the data, and predicts only what is new in it.
    """

    def __init__(self, stream: _Stream, length: int):
        self.length = length
        self.last = stream.size - length
        self.predictable = max(stream.size - 1, 0)
        self.count = 0 if self.last < 0 else math.ceil(self.predictable / (length - 1))
        self.missing = (
            f"the dataset has {stream.size} tokens, fewer than a window of {length}: "
            "window_length() tells how long windows can be"
        )

    def locate(self, index: int) -> _Window:
        context = index * (self.length - 1)
        start = min(context, self.last)
        return _Window(start, self.length, context - start + 1)


class _DocumentWindows:
    """Windows that each lie within one chunk, side by side; a chunk's last may be shorter."""

    def __init__(self, stream: _Stream, length: int):
        self.length = length
        self.ends = stream.ends
        self.starts = stream.ends - stream.lengths
        predictable = np.maximum(stream.lengths - 1, 0)
        self.until = np.cumsum(-(-predictable // (length - 1)))
        self.count = int(self.until[-1]) if len(self.until) else 0
        self.predictable = int(predictable.sum())
        self.missing = "no document of the dataset has 2 tokens, so there is nothing to predict"

    def locate(self, index: int) -> _Window:
        chunk = int(np.searchsorted(self.until, index, side="right"))
        before = int(self.until[chunk - 1]) if chunk else 0
        start = int(self.starts[chunk]) + (index - before) * (self.length - 1)
        return _Window(start, min(self.length, int(self.ends[chunk]) - start))


class WindowSampler:
    """Draws windows of tokens from chunks, from a random generator of its own.

    With sampling='random' every window that lies within a chunk is as likely as any other, each
    time. With sampling='epoch' the windows lie side by side over all chunks, and come in a new
    random order each epoch: every token is predicted once an epoch, but for the very first.

    Args:
        chunks: 1-D arrays of ids.
        seed: of the generator; None for another one each time.
        sampling: 'random' or 'epoch'.
        pad_documents: draw windows that each lie within one chunk (a document, if load_dataset had
            pad_documents=True), filled up with `pad_id`.
        pad_id: what to fill up with; the weights of a Batch are 0 there.

    Attributes:
        total_size: how many tokens there are in all.

    Raises:
        ValueError: if there are no tokens, or no such sampling.
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
        self._stream = _Stream(chunks)
        self.total_size = self._stream.size
        if not self.total_size:
            raise ValueError("there are no tokens to sample: the dataset is empty")
        self.sampling = sampling
        self.pad_documents = pad_documents
        self.pad_id = pad_id
        self._generator = np.random.default_rng(seed)
        self._length = 0
        self._predicted = 0
        self._epoch_seed: int | None = None
        self._position = 0

    @property
    def times_seen(self) -> float:
        """How often the data has been seen so far: tokens drawn for prediction, per token."""
        return self._predicted / max(self._windows.predictable, 1) if self._length else 0.0

    def sample(self, length: int) -> np.ndarray:
        """Draws one window: int32 [length]."""
        return self.sample_batch(1, length)[0]

    def sample_batch(self, batch_size: int, length: int) -> np.ndarray:
        """Draws some windows: int32 [batch_size, length]."""
        return self.sample_weighted(batch_size, length).tokens

    def sample_weighted(self, batch_size: int, length: int) -> Batch:
        """Draws some windows, and tells what is to be predicted in them.

        Args:
            batch_size: how many windows.
            length: how many tokens in each.

        Returns:
            Tokens and weights, each [batch_size, length].

        Raises:
            ValueError: if no window of this length can be drawn from the dataset.
        """
        self._set_length(length)
        windows = [self._windows.locate(self._next_index()) for _ in range(batch_size)]
        self._predicted += sum(window.size - window.fresh for window in windows)
        return self._stream.batch(windows, length, self.pad_id)

    def _set_length(self, length: int) -> None:
        """Settles which windows there are; another length begins another epoch."""
        if length == self._length:
            return
        if length < 2:
            raise ValueError(f"length={length} must be at least 2: a token, and the one after it")
        if self.pad_documents:
            windows: Any = _DocumentWindows(self._stream, length)
        elif self.sampling == "random":
            windows = _FreeWindows(self._stream, length)
            unreached = int(self._stream.lengths[self._stream.lengths < length].sum())
            if windows.count and unreached:
                say(
                    f"{unreached:,} of the {self.total_size:,} tokens are in chunks shorter than "
                    f"a window of {length} and are never drawn; sampling='epoch' draws all"
                )
        else:
            windows = _PackedWindows(self._stream, length)
        if not windows.count:
            raise ValueError(windows.missing)
        self._windows, self._length, self._epoch_seed = windows, length, None

    def _next_index(self) -> int:
        count = self._windows.count
        if self.sampling == "random":
            return int(self._generator.integers(count))
        if self._epoch_seed is None or self._position == count:
            self._begin_epoch(int(self._generator.integers(1 << 62)))
        self._position += 1
        return int(self._order[self._position - 1])

    def _begin_epoch(self, seed: int, position: int = 0) -> None:
        self._epoch_seed, self._position = seed, position
        self._order = np.random.default_rng(seed).permutation(self._windows.count)

    def state(self) -> dict[str, Any]:
        """What `restore` needs to draw on as if nothing had happened; JSON can hold it."""
        return {
            "dataset": self._identity(),
            "generator": self._generator.bit_generator.state,
            "predicted": self._predicted,
            "length": self._length,
            "epoch_seed": self._epoch_seed,
            "position": self._position,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Goes on where `state` was taken.

        If the dataset or the sampling is another one now, the generator and the count of tokens
        go on, a new epoch begins, and a line says so.

        Raises:
            ValueError: if `state` is not one of a WindowSampler.
        """
        try:
            self._generator.bit_generator.state = state["generator"]
            self._predicted = int(state["predicted"])
            length, position = int(state["length"]), int(state["position"])
            epoch_seed, identity = state["epoch_seed"], state["dataset"]
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"this is not the state of a WindowSampler: {error!r}") from error
        if identity != self._identity():
            say("The dataset or its sampling has changed since this run was saved: a new epoch")
            return
        if length:
            self._set_length(length)
        if epoch_seed is not None:
            self._begin_epoch(int(epoch_seed), position)

    def _identity(self) -> list[Any]:
        return [self.total_size, len(self._stream.ends), self.sampling, self.pad_documents]
