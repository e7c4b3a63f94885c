"""Prefixes and settings in, finished texts out, in order or as they come."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import secrets
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from . import model, sample, session
from .encoder import Encoder, IncrementalDecoder
from .files import check_folder, is_special
from .report import progress, say
from .step import check_whole

# Rows generated at once where the caller leaves it open: more are hardly quicker on a CPU.
MOST_ROWS = 32

# Bytes of keys and values that these rows may take together, with their contexts full.
CACHE_BYTES = 2 * 2**30


ONE_BEAM = sample.Beams()


class End(NamedTuple):
    """Where texts end, and what of them is kept.

    Attributes:
        truncate: a text ends before the first of these after its prefix; None for none.
        stop: the same, for several strings.
        include_stop: whether a text keeps the `stop` it ends with.
        stop_token: a text ends with this token, which is no part of it unless include_stop.
        include_prefix: whether a text starts with its prefix.
    """

    truncate: str | None = None
    stop: tuple[str, ...] = ()
    include_stop: bool = False
    stop_token: int | None = None
    include_prefix: bool = True

    def find(self, text: str, start: int) -> int | None:
        """The place at which `text` ends, looking from `start` on; None if it does not yet.

        The stop that is complete first counts, and of several the longest: so it makes no
        difference in which pieces the text came.
        """
        found = [(text.find(stop, start), stop) for stop in self.strings]
        ends = [(place + len(stop), place, stop) for place, stop in found if place >= 0]
        if not ends:
            return None
        end, place, stop = min(ends)
        return end if self.include_stop and stop in self.stop else place

    @property
    def strings(self) -> tuple[str, ...]:
        """All that a text may end at."""
        return ((self.truncate,) if self.truncate else ()) + self.stop

    @property
    def longest(self) -> int:
        """Characters of the longest of them."""
        return max(map(len, self.strings), default=0)


class Job(NamedTuple):
    """What to generate.

    Attributes:
        prefixes: what texts start with; '' for nothing.
        nsamples: texts for each prefix.
        batch_size: texts generated at once; None for as many as is sensible.
        length: tokens to generate for each.
        settings: how tokens are drawn.
        seed: the same gives the same texts; None draws one.
        end: where texts end.
        beams: above one: the likeliest texts are searched, none is drawn.
    """

    prefixes: tuple[str, ...]
    nsamples: int
    batch_size: int | None
    length: int
    settings: sample.Sampling
    seed: int | None
    end: End
    beams: sample.Beams = ONE_BEAM

    @property
    def total(self) -> int:
        """How many texts there will be."""
        return len(self.prefixes) * self.nsamples


def as_strings(name: str, value: str | Iterable[str]) -> tuple[str, ...]:
    """An argument that is a string or several.

    Raises:
        ValueError: it is neither.
    """
    values = (value,) if isinstance(value, str) else value
    if isinstance(values, Iterable):
        values = tuple(values)
        if all(isinstance(one, str) for one in values):
            return values
    raise ValueError(f"{name}={value!r} must be a string or a list of strings")


def make_job(
    prefix: str | Sequence[str] | None,
    nsamples: int,
    batch_size: int | None,
    length: int,
    settings: sample.Sampling,
    seed: int | None,
    end: End,
    beams: sample.Beams = ONE_BEAM,
) -> Job:
    """Checks what generate() was given.

    Raises:
        ValueError: a number out of range, no prefix in the list, an empty stop, or texts that do
            not fill their batches.
    """
    check_whole("nsamples", nsamples, 1)
    check_whole("length", length, 1)
    if batch_size is not None:
        check_whole("batch_size", batch_size, 1)
        if nsamples % batch_size and (prefix is None or isinstance(prefix, str)):
            raise ValueError(f"nsamples={nsamples} must be a multiple of batch_size={batch_size}")
    if seed is not None:
        check_whole("seed", seed, 0)
    if any(not stop for stop in end.stop):
        raise ValueError(f"stop={list(end.stop)!r} holds an empty string; leave it out")
    prefixes = ("",) if prefix is None else as_strings("prefix", prefix)
    if not prefixes:
        raise ValueError("prefix=[] must hold at least one prefix; '' or None is one without text")
    if 1 < beams.count < nsamples:
        raise ValueError(
            f"nsamples={nsamples} must not be above num_beams={beams.count}: a search finds so many"
        )
    return Job(prefixes, nsamples, batch_size, length, settings, seed, end, beams)


def with_tokens(
    job: Job, enc: Encoder, stop_token: str | int | None, bad_words: Sequence[str] | None
) -> Job:
    """The job with what only the vocabulary can tell.

    Raises:
        ValueError: no such token, no token that `min_length` could hold back, or an empty bad word.
    """
    if job.settings.min_length and stop_token is None:
        raise ValueError(f"min_length={job.settings.min_length} needs a stop_token to hold back")
    if isinstance(stop_token, str):
        ids = encode(enc, stop_token)
        if len(ids) != 1:
            raise ValueError(f"stop_token={stop_token!r} is no token; give its id, or use stop=")
        (stop_token,) = ids
    bad_words = as_strings("bad_words", bad_words or ())
    if "" in bad_words:
        raise ValueError(f"bad_words={list(bad_words)!r} holds an empty string; leave it out")
    # A word has other tokens within a line than at its start.
    words = {tuple(enc.encode(form)) for word in bad_words for form in (word, f" {word}")}
    settings = dataclasses.replace(
        job.settings, stop_token=stop_token, bad_words=tuple(sorted(words))
    )
    return job._replace(settings=settings, end=job.end._replace(stop_token=stop_token))


def encode(enc: Encoder, text: str) -> list[int]:
    """The tokens of a text as a dataset has them: `<|endoftext|>` is one, if there is such."""
    return enc.encode(text, allow_special=enc.end_of_text is not None)


def start_ids(enc: Encoder, prefix: str) -> list[int]:
    """The tokens that a text starts from: the prefix's, or the end of the text before.

    Raises:
        ValueError: there is no prefix, and no `<|endoftext|>` in the vocabulary.
    """
    if prefix:
        return encode(enc, prefix)
    if enc.end_of_text is None:
        raise ValueError("this vocabulary has no <|endoftext|> to start from; give a prefix")
    return [enc.end_of_text]


class _Text:
    """One text as it grows.

    Attributes:
        new: what was generated so far after the prefix, up to its end.
        ended: whether there will be no more.
    """

    def __init__(self, enc: Encoder, prefix: str, end: End):
        self.prefix, self.end = prefix, end
        self.decoder = IncrementalDecoder(enc)
        self.new = ""
        self.told = 0
        self.started = self.ended = False

    def feed(self, ids: np.ndarray | Sequence[int]) -> None:
        """Takes the next tokens; -1 stands for none."""
        if self.ended:
            return
        ids = np.asarray(ids, np.int32)
        ids = ids[ids >= 0]
        stops = len(ids) and ids[-1] == self.end.stop_token
        self._add(self.decoder.feed(ids[:-1] if stops and not self.end.include_stop else ids))
        if stops:
            self.finish()

    def finish(self) -> None:
        """Ends the text; half a character at its end becomes U+FFFD."""
        if not self.ended:
            self._add(self.decoder.flush())
            self.ended = True

    def _add(self, more: str) -> None:
        # A stop may have begun in what was there before.
        start = max(0, len(self.new) - self.end.longest + 1)
        self.new += more
        place = self.end.find(self.new, start)
        if place is not None:
            self.new, self.ended = self.new[:place], True

    def tell(self) -> str:
        """What can be shown that was not yet: no more of it can turn out to be a stop's start."""
        safe = len(self.new)
        if not self.ended:
            for stop in self.end.strings:
                held = (n for n in range(len(stop) - 1, 0, -1) if self.new.endswith(stop[:n]))
                safe = min(safe, len(self.new) - next(held, 0))
        piece, self.told = self.new[self.told : safe], max(self.told, safe)
        if self.started or not (piece or self.ended):
            return piece
        self.started = True
        return self._start() + piece

    def _start(self) -> str:
        return self.prefix if self.end.include_prefix else ""

    @property
    def whole(self) -> str:
        """The text as the caller gets it."""
        if self.prefix and self.end.include_prefix:
            return self.prefix + self.new
        return self.new.lstrip("\n")


def rows_at_once(hparams: model.HParams, job: Job) -> int:
    """The batch size: the caller's, or what fits CACHE_BYTES with full contexts."""
    if job.batch_size is not None:
        return job.batch_size
    cache = 4 * 2 * hparams.n_layer * hparams.n_ctx * hparams.n_embd
    return max(1, min(job.total, MOST_ROWS, CACHE_BYTES // cache))


def generate_texts(sess: tf.compat.v1.Session, state: session.Memory, job: Job) -> Iterator[str]:
    """Generates a job's texts, a batch at a time.

    Yields:
        Each finished text, for each prefix in turn. After Ctrl-C, those that are finished and what
        there is of the others in the batch.

    Raises:
        KeyboardInterrupt: once all of that was given.
    """
    if job.beams.count > 1:
        yield from _search_texts(sess, state, job)
        return
    seed = secrets.randbits(31) if job.seed is None else job.seed
    prefixes = [prefix for prefix in job.prefixes for _ in range(job.nsamples)]
    step = rows_at_once(state.hparams, job)
    with progress(total=len(prefixes) * job.length, desc="Generating", unit="tok") as bar:
        for first in range(0, len(prefixes), step):
            rows = range(first, min(first + step, len(prefixes)))
            texts = [_Text(state.encoder, prefixes[row], job.end) for row in rows]
            interrupted = False
            try:
                for count in _write(sess, state.encoder, job, texts, rows, seed):
                    bar.update(count)
            except KeyboardInterrupt:
                interrupted = True
            bar.set_postfix(texts=rows.stop, refresh=False)
            yield from (text.whole for text in texts)
            if interrupted:
                raise KeyboardInterrupt


def _search_texts(sess: tf.compat.v1.Session, state: session.Memory, job: Job) -> Iterator[str]:
    """As generate_texts, by beam search: for each prefix the `nsamples` best texts."""

    def ends(new: list[int]) -> bool:
        return job.end.find(state.encoder.decode(new), 0) is not None

    step = max(1, rows_at_once(state.hparams, job) // job.beams.count)
    with progress(total=len(job.prefixes) * job.length, desc="Searching", unit="tok") as bar:
        for first in range(0, len(job.prefixes), step):
            prefixes = job.prefixes[first : first + step]
            starts = [start_ids(state.encoder, prefix) for prefix in prefixes]
            interrupted = False
            with sample.Search(
                sess, starts, job.length, job.beams, job.settings,
                ends if job.end.strings else None,
            ) as search:  # fmt: skip
                try:
                    while not search.done:
                        bar.update(search.step())
                except KeyboardInterrupt:
                    interrupted = True
                found = search.best()
            for prefix, texts in zip(prefixes, found, strict=True):
                for _, ids in texts[: job.nsamples]:
                    text = _Text(state.encoder, prefix, job.end)
                    text.feed(ids)
                    text.finish()
                    yield text.whole
            if interrupted:
                raise KeyboardInterrupt


def stream_text(sess: tf.compat.v1.Session, state: session.Memory, job: Job) -> Iterator[str]:
    """Generates a job's texts one after the other, each in pieces as they come.

    Yields:
        Pieces: never half a character, never the start of a stop. An empty piece ends a text.
    """
    seed = secrets.randbits(31) if job.seed is None else job.seed
    prefixes = [prefix for prefix in job.prefixes for _ in range(job.nsamples)]
    for row, prefix in enumerate(prefixes):
        text = _Text(state.encoder, prefix, job.end)
        for _ in _write(sess, state.encoder, job, [text], range(row, row + 1), seed):
            piece = text.tell()
            if piece:
                yield piece
        yield ""


def _write(
    sess: tf.compat.v1.Session,
    enc: Encoder,
    job: Job,
    texts: Sequence[_Text],
    rows: range,
    seed: int,
) -> Iterator[int]:
    """Lets `texts` grow to their ends; yields how many tokens were added each time."""
    starts = [start_ids(enc, text.prefix) for text in texts]
    tokens = sample.generate_tokens(sess, starts, job.length, job.settings, seed, list(rows))
    with contextlib.closing(tokens):
        try:
            piece = next(tokens)
            while True:
                for text, ids in zip(texts, piece, strict=True):
                    text.feed(ids)
                yield int(np.count_nonzero(piece >= 0))
                if all(text.ended for text in texts):
                    return
                piece = tokens.send(np.array([text.ended for text in texts]))
        except StopIteration:
            pass
        finally:
            for text in texts:
                text.finish()
    yield 0


class Score(NamedTuple):
    """What a model thinks of a text.

    Attributes:
        text: the text.
        tokens: its token ids.
        log_probabilities: natural logarithms of each token's probability given those before,
            float32 [tokens]. The first token comes after `<|endoftext|>`, where the vocabulary
            has that, and else counts for nothing: 0.
        perplexity: the exponential of their negative mean.
    """

    text: str
    tokens: list[int]
    log_probabilities: np.ndarray
    perplexity: float


def score_texts(
    sess: tf.compat.v1.Session, enc: Encoder, texts: Sequence[str], stride: int | None
) -> list[Score]:
    """Scores each text; see gpt_2.score.

    Raises:
        ValueError: an empty text.
    """
    rows = [encode(enc, text) for text in texts]
    if not all(rows):
        raise ValueError("an empty text has no score; leave it out")
    start = [] if enc.end_of_text is None else [enc.end_of_text]
    found = sample.score_tokens(sess, [start + row for row in rows], stride)
    scores = []
    for text, row, values in zip(texts, rows, found, strict=True):
        known = values if start else np.concatenate([np.zeros(1, np.float32), values])
        mean = float(values.mean()) if len(values) else 0.0
        scores.append(Score(text, row, known, float(np.exp(-mean))))
    return scores


@contextlib.contextmanager
def file_writer(path: str) -> Iterator[Callable[[str], None]]:
    """A function that adds text to a file, which gets its name when the block ends.

    Until then the text is in `<path>.<letters>.part`. A block that ends by an error keeps what
    there is, or, if there is nothing, the file that was there before.

    Raises:
        FileNotFoundError: there is no folder for it.
        ValueError: there is a folder of that name.
    """
    if os.path.isdir(path):
        raise ValueError(f"destination_path={path!r} is a folder; name a file in it")
    check_folder("destination_path", path)
    if is_special(path):
        with open(path, "w", encoding="utf-8", errors="surrogatepass", newline="\n") as file:
            yield lambda text: print(text, end="", file=file, flush=True)
        return
    path = os.path.realpath(path)
    part = f"{path}.{secrets.token_hex(4)}.part"
    keep = False
    try:
        with open(part, "x", encoding="utf-8", errors="surrogatepass", newline="\n") as file:

            def write(text: str) -> None:
                nonlocal keep
                keep = True
                file.write(text)
                file.flush()

            yield write
            keep = True
            file.flush()
            os.fsync(file.fileno())
    finally:
        if keep:
            os.replace(part, path)
        else:
            os.remove(part)


def print_text(text: str) -> None:
    """Prints a text as it is; what UTF-8 cannot hold becomes a question mark."""
    say(text.encode("utf-8", "replace").decode("utf-8"), end="")
