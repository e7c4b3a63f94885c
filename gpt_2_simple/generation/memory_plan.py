"""A model's sizes, a precision, a batch and its tokens in, the bytes that generating needs out.

The terms count what decode.py and kv_cache.py hold when they hold most.
`benchmarks/generation_memory.py` compares the sums with the smallest allocator limits that do.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

from ..common.device_memory import FRAGMENTATION, MEGABYTE, megabyte_table
from ..common.hparams import GENERATING_PRECISIONS, HParams, variable_shapes
from ..common.published import hparams_of
from ..common.settings import settings_function
from .settings import MAX_TOKENS_PER_RUN, GenerationMemorySettings

FLOAT = 4
# Larger batches are hardly quicker.
MAX_BATCH = 256
MATRIX_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1}

# Float32 tensors [rows, n_vocab] that choosing a token holds at once.
LOGITS = 6

# Float32 tensors that prefill holds at once: as large as a block's widest activations
# [tokens, 4 n_embd], and as its attention [rows, n_head, tokens, columns].
WIDE_ACTIVATIONS, ATTENTIONS = 5, 3

# Where matrices have 16 bits, x and the product are there in both types.
WIDE_BESIDE_16_BITS = 3


@dataclasses.dataclass(frozen=True)
class GenerationMemoryPlan:
    """The bytes that generating needs when it needs most.

    Attributes:
        hparams: the model's sizes.
        precision: of the blocks' matrices, and with int8 of the output projection.
        batch_size: texts that are written at the same time.
        length: tokens to generate for each text.
        columns: tokens of a text that the model sees at most.
        weights: bytes of the model.
        cache: bytes of the keys and values of all tokens.
        step: what else is there at the fullest moment. In prefill these are its activations; the
            cache holds only the prefixes then. Later it is the older cache, while it is copied into
            one with more columns, and the logits.
    """

    hparams: HParams
    precision: str
    batch_size: int
    length: int
    columns: int
    weights: int
    cache: int
    step: int

    @property
    def total(self) -> int:
        """The allocator limit under which this should run: all terms, and the fragmentation."""
        return int((self.weights + self.cache + self.step) * (1 + FRAGMENTATION))

    def __str__(self) -> str:
        rows = [
            (f"weights, {self.precision}", self.weights),
            (f"cache, {self.batch_size} x {self.columns:,} tokens", self.cache),
            ("step", self.step),
            ("total, at the fullest moment", self.total),
        ]
        return megabyte_table(rows)


@settings_function(GenerationMemorySettings)
def generation_memory_plan(settings: GenerationMemorySettings) -> GenerationMemoryPlan:
    """Counts the bytes that generate() needs with these settings; print() shows them as a table.

    On a CPU the process needs about 0.6 GB more, for TensorFlow, and int8 up to twice its plan's
    weights: oneDNN keeps them in an order of its own.

    Args:
        settings: see GenerationMemorySettings; each of them is an argument.

    Returns:
        The plan, in bytes (its table is in MB of 2**20 bytes).

    Raises:
        ValueError: a setting is out of range, or there is no published model of this name.
    """
    hparams = hparams_of(settings.model_name)
    return plan(
        hparams, settings.precision, settings.batch_size, settings.prefix_length, settings.length
    )


def plan(
    hparams: HParams, precision: str, batch_size: int, prefix_length: int, length: int
) -> GenerationMemoryPlan:
    """Counts the bytes for these numbers of tokens; see generation_memory_plan."""
    columns = min(hparams.n_ctx, prefix_length + length)
    cache = cache_bytes(hparams, batch_size, columns)
    given = min(hparams.n_ctx, prefix_length)
    tokens = batch_size * max(1, min(given, MAX_TOKENS_PER_RUN // batch_size))
    n_wide = WIDE_ACTIVATIONS + (WIDE_BESIDE_16_BITS if MATRIX_BYTES[precision] == 2 else 0)
    wide = n_wide * tokens * 4 * hparams.n_embd
    prefill = FLOAT * (wide + ATTENTIONS * hparams.n_head * tokens * given)
    prefill -= cache - cache_bytes(hparams, batch_size, given)
    decoding = cache + FLOAT * LOGITS * batch_size * hparams.n_vocab
    weights = weights_bytes(hparams, precision)
    step = max(prefill, decoding)
    return GenerationMemoryPlan(
        hparams, precision, batch_size, length, columns, weights, cache, step
    )


def cache_bytes(hparams: HParams, rows: int, columns: int) -> int:
    """Bytes of the keys and values of so many texts of so many tokens."""
    return 2 * FLOAT * hparams.n_layer * hparams.n_embd * rows * columns


def weights_bytes(hparams: HParams, precision: str) -> int:
    """Bytes of a model whose blocks' matrices have this precision."""
    embeddings, block, last_norm = variable_shapes(hparams)
    others = [shape for shape in block if len(shape) < 3] * hparams.n_layer
    size = FLOAT * sum(map(math.prod, [*embeddings, *others, *last_norm]))
    matrices = hparams.n_layer * sum(math.prod(shape) for shape in block if len(shape) == 3)
    if precision == "int8":  # the output projection is kept beside the embedding
        matrices += hparams.n_vocab * hparams.n_embd
    return size + MATRIX_BYTES[precision] * matrices


def plans(
    hparams: HParams, batches: list[int], lengths: list[int], prefix_length: int
) -> list[GenerationMemoryPlan]:
    """A plan for each batch size, length and precision."""
    return [
        plan(hparams, precision, batch, prefix_length, length)
        for batch in batches
        for length in lengths
        for precision in GENERATING_PRECISIONS
    ]


def largest_batches(
    hparams: HParams, limit: int, lengths: list[int], prefix_length: int, batch_size: int | None
) -> list[GenerationMemoryPlan]:
    """For each length and precision the plan of the largest batch within `limit` bytes, if any.

    With batch_size, no other one is tried.
    """
    found: list[GenerationMemoryPlan] = []
    tried = range(1, MAX_BATCH + 1) if batch_size is None else [batch_size]
    for length in lengths:
        for precision in GENERATING_PRECISIONS:
            each = (plan(hparams, precision, batch, prefix_length, length) for batch in tried)
            found += list(itertools.takewhile(lambda p: p.total <= limit, each))[-1:]
    return found


def table(found: list[GenerationMemoryPlan]) -> str:
    """Totals of plans() in MB: a line for each batch size and length, a column a precision."""
    n = len(GENERATING_PRECISIONS)
    lines: list[tuple[str, list[str]]] = [("MB of 2**20 bytes", list(GENERATING_PRECISIONS))]
    lines.append(("weights", [f"{p.weights / MEGABYTE:,.0f}" for p in found[:n]]))
    for start in range(0, len(found), n):
        first = found[start]
        name = f"batch {first.batch_size}, length {first.length:,}"
        lines.append((name, [f"{p.total / MEGABYTE:,.0f}" for p in found[start : start + n]]))
    return "\n".join(name.ljust(30) + "".join(f"{c:>10}" for c in cells) for name, cells in lines)


def as_dict(planned: GenerationMemoryPlan, model_name: str) -> dict[str, Any]:
    """A plan for programs: what it is for, and bytes: all, and what they are for."""
    names = ("precision", "batch_size", "length", "total", "weights", "cache", "step")
    return {"model_name": model_name, **{name: getattr(planned, name) for name in names}}


def as_call(planned: GenerationMemoryPlan, model_name: str) -> str:
    """The calls that a plan stands for."""
    return (
        f"gpt2.load_gpt2(sess, model_name={model_name!r}, precision={planned.precision!r})  "
        f"# batch_size={planned.batch_size}, length={planned.length}"
    )
