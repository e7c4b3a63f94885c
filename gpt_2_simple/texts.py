"""A prefix and settings in, finished texts out, one after the other."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from . import sample
from .encoder import Encoder
from .report import progress, say


class Cut(NamedTuple):
    """What becomes of generated text: the prefix before it, the end at the first `truncate`.

    Attributes:
        prefix: what the text follows.
        truncate: where the text ends, None for nowhere.
        include_prefix: whether the result starts with the prefix.
    """

    prefix: str
    truncate: str | None
    include_prefix: bool

    def is_done(self, new_text: str) -> bool:
        """Whether more text after `new_text` would be cut away."""
        return bool(self.truncate) and self.truncate in new_text

    def apply(self, new_text: str) -> str:
        """The finished text of what was generated after the prefix."""
        if self.truncate:
            new_text = new_text.split(self.truncate, 1)[0]
        if self.prefix and self.include_prefix:
            return self.prefix + new_text
        return new_text.lstrip("\n")


class Job(NamedTuple):
    """What to generate.

    Attributes:
        prefix: what each text starts with; '' for nothing.
        nsamples: texts, a multiple of batch_size.
        batch_size: texts generated at once.
        length: tokens to generate for each.
        settings: how tokens are drawn.
        seed: the same gives the same texts; None draws one.
    """

    prefix: str
    nsamples: int
    batch_size: int
    length: int
    settings: sample.Sampling
    seed: int | None


def start_ids(enc: Encoder, prefix: str) -> list[int]:
    """The tokens that a text starts from: the prefix's, or the end of the text before.

    Raises:
        ValueError: there is no prefix, and no `<|endoftext|>` in the vocabulary.
    """
    if prefix:
        return enc.encode(prefix)
    if enc.end_of_text is None:
        raise ValueError("this vocabulary has no <|endoftext|> to start from; give a prefix")
    return [enc.end_of_text]


def generate_texts(sess: tf.compat.v1.Session, enc: Encoder, job: Job, cut: Cut) -> Iterator[str]:
    """Generates a job's texts, a batch at a time.

    Yields:
        Each finished text.
    """
    ids = start_ids(enc, job.prefix)
    seed = secrets.randbits(31) if job.seed is None else job.seed
    total = job.nsamples * job.length
    with progress(total=total, desc="Generating", unit="tok", leave=False) as bar:
        for first in range(0, job.nsamples, job.batch_size):
            rows = range(first, first + job.batch_size)
            new_texts = _generate_batch(sess, enc, job, cut, ids, seed, rows, bar.update)
            yield from map(cut.apply, new_texts)


def _generate_batch(
    sess: tf.compat.v1.Session,
    enc: Encoder,
    job: Job,
    cut: Cut,
    ids: list[int],
    seed: int,
    rows: range,
    on_tokens: Callable[[int], object],
) -> list[str]:
    """The new text of each row; stops when all rows have met what they are cut at."""
    prefixes = [ids] * len(rows)
    chunks: list[np.ndarray] = []
    texts = [""] * len(rows)
    with contextlib.closing(
        sample.generate_tokens(sess, prefixes, job.length, job.settings, seed, row_ids=list(rows))
    ) as stream:
        for chunk in stream:
            chunks.append(chunk)
            on_tokens(chunk.size)
            if cut.truncate:
                texts = [enc.decode(row) for row in np.concatenate(chunks, axis=1)]
                if all(map(cut.is_done, texts)):
                    return texts
    return [enc.decode(row) for row in np.concatenate(chunks, axis=1)]


@contextlib.contextmanager
def file_writer(path: str) -> Iterator[Callable[[str], None]]:
    """A function that adds text to a file, which gets its name when the block ends.

    Until then the text is in `<path>.part`; a block that ends by an error keeps what there is.
    """
    part = f"{path}.part"
    with open(part, "w", encoding="utf-8", errors="surrogatepass", newline="\n") as file:

        def write(text: str) -> None:
            file.write(text)
            file.flush()

        try:
            yield write
        finally:
            file.flush()
            os.fsync(file.fileno())
            os.replace(part, path)


def print_text(text: str) -> None:
    """Prints a text as it is; what the terminal cannot show becomes a question mark."""
    say(text.encode("utf-8", "replace").decode("utf-8"), end="")
