"""A model's sizes and training settings in, the bytes of memory that training needs out.

The terms count what model.py, step.py and optimizer.py hold when they hold most.
`benchmarks/memory.py` compares the sums with the smallest allocator limits that really train.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import os
from collections.abc import Iterator, Sequence
from typing import Any

import tensorflow as tf

from .. import model
from ..common.device_memory import FRAGMENTATION, MEGABYTE, megabyte_table
from ..common.hparams import Shape, variable_shapes
from ..common.lora import ALL, LINEAR_LAYERS, adapter_shapes, adapter_size
from ..common.published import hparams_of
from ..common.report import say
from ..common.settings import settings_function
from ..distributed.collectives import PIECE_BYTES, PIECES_AT_ONCE
from .settings import MemoryPlanSettings, StepSettings, step_settings
from .sharded_optimizer import assign_owners
from .step import LOSS_ROWS

FLOAT = 4
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}

# The rank of the adapters that are planned where nobody names one.
LORA_RANK = 8

# How many tensors [batch, time, n_embd] one block stores for its gradient, and how many more its
# backward pass makes: counted in model.transformer_block, and fitted to peaks measured on a GPU.
STORED_IN_BLOCK = 26
MADE_IN_BACKWARD = 12

# How many more of their size it stores in 16 bits: the float32 tensors of its layer norms.
STORED_BESIDE_16_BITS = 13

# How many float32 tensors [rows, n_vocab] the loss of a chunk holds at once, by the same peaks.
CHUNK_TENSORS = 5


@dataclasses.dataclass(frozen=True)
class MemoryPlan:
    """The bytes that training needs when it needs most.

    Attributes:
        hparams: the model's sizes.
        settings: the step's settings.
        time: tokens in a window.
        weights: bytes of the model's variables, and of the adapter's if one is trained.
        optimizer_state: bytes of the optimizer's variables.
        accumulators: bytes of the micro-batches' summed gradients; 0 without accumulation.
        stored_activations: bytes that the forward pass keeps for the backward pass: only the
            blocks' outputs with use_memory_saving_gradients, all activations without. In 16 bits
            also the blocks' weights, cast.
        block: bytes of one block's activations and their gradients in the backward pass.
        loss: bytes of a chunk of logits with its gradient, and of the output projection's gradient.
        workers: how many processes train together; the plan is of the one that needs most.
        exchange: bytes of a sum with other workers, while it travels and when it is there.
    """

    hparams: model.HParams
    settings: StepSettings
    time: int
    weights: int
    optimizer_state: int
    accumulators: int
    stored_activations: int
    block: int
    loss: int
    workers: int = 1
    exchange: int = 0

    @property
    def resident(self) -> int:
        """Bytes that are held from one step to the next."""
        return self.weights + self.optimizer_state + self.accumulators

    @property
    def total(self) -> int:
        """The allocator limit under which this should train: all terms, and the fragmentation."""
        in_step = self.stored_activations + max(self.block, self.loss) + self.exchange
        return int((self.resident + in_step) * (1 + FRAGMENTATION))

    @property
    def floor(self) -> int:
        """Bytes that any such training needs: all but the loss."""
        return self.resident + self.stored_activations + self.block

    def __str__(self) -> str:
        rows = [
            ("weights", self.weights),
            ("optimizer state", self.optimizer_state),
            ("accumulators", self.accumulators),
            ("stored activations", self.stored_activations),
            ("one block, backward", self.block),
            ("loss", self.loss),
            *([("sum with other workers", self.exchange)] if self.workers > 1 else []),
            ("total, at the fullest moment", self.total),
        ]
        return megabyte_table(rows)


@settings_function(MemoryPlanSettings)
def memory_plan(settings: MemoryPlanSettings) -> MemoryPlan:
    """Counts the bytes that finetune() needs with these settings; print() shows them as a table.

    Args:
        settings: see MemoryPlanSettings; each of them is an argument.

    Returns:
        The plan, in bytes (its table is in MB of 2**20 bytes).

    Raises:
        ValueError: a setting is out of range, or there is no published model of this name.
    """
    return plan(hparams_of(settings.model_name), settings.step, settings.workers)


def plan(hparams: model.HParams, settings: StepSettings, workers: int = 1) -> MemoryPlan:
    """Counts the bytes that a step's settings need; see memory_plan."""
    time = min(settings.sequence_length or hparams.n_ctx, hparams.n_ctx)
    trained = _trained_shapes(hparams, settings)
    trained_size = FLOAT * sum(map(math.prod, trained))
    width = BYTES[settings.precision]
    block_output = width * settings.batch_size * time * hparams.n_embd
    in_16_bits = width < FLOAT
    tensors = STORED_IN_BLOCK + (STORED_BESIDE_16_BITS if in_16_bits else 0)
    attention = _attention_weights(hparams, settings.batch_size, time, width)
    stored = tensors * block_output + attention + _cast_size(hparams, settings)
    layers = settings.train_last_blocks or hparams.n_layer
    keeps_all = not settings.use_memory_saving_gradients
    gradients = trained_size if keeps_all and not settings.accumulates else 0
    return MemoryPlan(
        hparams=hparams,
        settings=settings,
        time=time,
        weights=_weights_size(hparams, settings),
        optimizer_state=_largest_share(settings, trained, workers),
        accumulators=trained_size if settings.accumulates or workers > 1 else 0,
        stored_activations=layers * (stored if keeps_all else block_output) + gradients,
        block=MADE_IN_BACKWARD * block_output + (0 if keeps_all else stored),
        loss=_loss_size(hparams, settings, time, width),
        workers=workers,
        exchange=PIECES_AT_ONCE * min(PIECE_BYTES, trained_size) if workers > 1 else 0,
    )


def _trained_shapes(hparams: model.HParams, settings: StepSettings) -> list[Shape]:
    """The shapes of the variables that are trained."""
    lora = settings.lora
    if lora is not None:
        of_block: list[Shape] = []
        for layer in lora.targets:
            of_block += adapter_shapes(layer, hparams.n_embd, lora.rank)
        return of_block * hparams.n_layer
    embeddings, block, last_norm = variable_shapes(hparams)
    count = settings.trained_blocks(hparams.n_layer)
    if count is not None:
        return block * count
    return [*embeddings, *block * hparams.n_layer, *last_norm]


def _weights_size(hparams: model.HParams, settings: StepSettings) -> int:
    """Bytes of the model, whose blocks' matrices may be held in 16 bits, and of an adapter."""
    embeddings, block, last_norm = variable_shapes(hparams)
    size = FLOAT * sum(map(math.prod, [*embeddings, *block * hparams.n_layer, *last_norm]))
    if settings.lora is not None:
        size += FLOAT * adapter_size(settings.lora, hparams.n_embd, hparams.n_layer)
        narrower = FLOAT - BYTES[settings.base_precision]
        size -= narrower * hparams.n_layer * _matrices_of_block(hparams)
    return size


def _matrices_of_block(hparams: model.HParams) -> int:
    """How many numbers a block's matrices have."""
    _, block, _ = variable_shapes(hparams)
    return sum(math.prod(shape) for shape in block if len(shape) > 1)


def _cast_size(hparams: model.HParams, settings: StepSettings) -> int:
    """Bytes of a block's matrices in the activations' type, if they are held in another."""
    held = "float32" if settings.lora is None else settings.base_precision
    if held == settings.precision:
        return 0
    return BYTES[settings.precision] * _matrices_of_block(hparams)


def _largest_share(settings: StepSettings, trained: Sequence[Shape], workers: int) -> int:
    """Bytes of the optimizer's state on the worker that has most of it."""
    shares = [0] * (workers if settings.shard_optimizer else 1)
    owners = assign_owners([math.prod(shape) for shape in trained], len(shares))
    for owner, shape in zip(owners, trained, strict=True):
        shares[owner] += _state_size(settings.optimizer, shape)
    return max(shares)


def _state_size(optimizer: str, shape: Sequence[int]) -> int:
    long_axes = [size for size in shape if size > 1]
    if optimizer == "adam":
        return 2 * FLOAT * math.prod(shape)
    if optimizer == "adafactor":
        return FLOAT * (sum(long_axes) if len(long_axes) > 1 else math.prod(shape))
    return 0


def _attention_weights(hparams: model.HParams, batch_size: int, time: int, width: int) -> int:
    """Bytes of one block's softmax: each chunk of queries has the keys that its last one sees."""
    starts = range(0, time, model.QUERY_CHUNK)
    ends = [min(start + model.QUERY_CHUNK, time) for start in starts]
    seen = sum((end - start) * end for start, end in zip(starts, ends, strict=True))
    return width * batch_size * hparams.n_head * seen


def _loss_size(hparams: model.HParams, settings: StepSettings, time: int, width: int) -> int:
    """Bytes of a chunk of logits, of their gradient and of the output projection's gradient."""
    rows = min(LOSS_ROWS, settings.batch_size * time)
    chunks = math.ceil(settings.batch_size * time / LOSS_ROWS)
    projection = hparams.n_vocab * hparams.n_embd
    trained = not settings.only_train_transformer_layers and settings.train_last_blocks is None
    trained = trained and settings.lora is None
    # Parts are added to the accumulator one by one, or else to each other.
    copies = trained * (1 if settings.accumulates else min(chunks, 2))
    # In 16 bits: the projection, and a part of its gradient before that becomes float32.
    cast = (1 + trained) * width * projection if width < FLOAT else 0
    return CHUNK_TENSORS * FLOAT * rows * hparams.n_vocab + FLOAT * copies * projection + cast


def device_limit(sess: tf.compat.v1.Session) -> int | None:
    """The bytes that a session may use: its first GPU's memory, or the CPU's BFC limit.

    Returns:
        None where the machine's memory is the only limit.
    """
    gpus = [d for d in sess.list_devices() if d.device_type == "GPU"]
    if gpus:
        return gpus[0].memory_limit_bytes
    bounded = os.environ.get("TF_CPU_ALLOCATOR_USE_BFC", "").lower() in ("true", "1")
    limit = os.environ.get("TF_CPU_BFC_MEM_LIMIT_IN_MB", "")
    return int(limit) * MEGABYTE if bounded and limit.isdigit() else None


def fitting_plans(hparams: model.HParams, limit: int) -> list[MemoryPlan]:
    """Lists the settings that fit, the best first.

    The best change training least: long windows, then Adam, then accumulation. Of two that are
    equal in these, the quicker one comes first. Last come those that train an adapter.

    Args:
        hparams: the model's sizes.
        limit: bytes.

    Returns:
        Plans whose totals are within the limit.
    """
    lengths = [hparams.n_ctx // share for share in (1, 2, 4) if hparams.n_ctx // share > 1]
    found = []
    for length, optimizer, accumulate, save_memory in itertools.product(
        lengths, ("adam", "adafactor"), (5, 1), (False, True)
    ):
        settings = step_settings(
            accumulate_gradients=accumulate,
            use_memory_saving_gradients=save_memory,
            optimizer=optimizer,
            sequence_length=length,
        )
        found.append(plan(hparams, settings))
    for precision, save_memory in itertools.product(("float32", "bfloat16"), (False, True)):
        settings = step_settings(
            lora_rank=LORA_RANK,
            lora_targets="all",
            base_precision=precision,
            use_memory_saving_gradients=save_memory,
        )
        found.append(plan(hparams, settings))
    return [candidate for candidate in found if candidate.total <= limit]


def _as_arguments(candidate: MemoryPlan, model_name: str) -> dict[str, Any]:
    """The arguments of finetune() that a plan stands for."""
    default = step_settings()
    arguments: dict[str, Any] = {"model_name": model_name}
    for field in dataclasses.fields(StepSettings):
        value = getattr(candidate.settings, field.name)
        always = field.name in ("accumulate_gradients", "use_memory_saving_gradients")
        if always or value != getattr(default, field.name):
            arguments[field.name] = value
    if arguments.get("lora_targets") == tuple(LINEAR_LAYERS):
        arguments["lora_targets"] = ALL
    if candidate.time == candidate.hparams.n_ctx:
        arguments.pop("sequence_length", None)
    return arguments


def as_dict(candidate: MemoryPlan, model_name: str) -> dict[str, Any]:
    """A plan for programs: the arguments of finetune(), and bytes: all, and what they are for."""
    parts = (
        *("weights", "optimizer_state", "accumulators", "stored_activations", "block", "loss"),
        "exchange",
    )
    return {
        "arguments": _as_arguments(candidate, model_name),
        "total": candidate.total,
        **{part: getattr(candidate, part) for part in parts},
    }


def as_call(candidate: MemoryPlan, model_name: str) -> str:
    """The finetune() call that a plan stands for."""
    arguments = _as_arguments(candidate, model_name)
    given = ", ".join(f"{name}={value!r}" for name, value in arguments.items())
    return f'gpt2.finetune(sess, "your.txt", {given})'


def choose_recomputing(
    sess: tf.compat.v1.Session,
    hparams: model.HParams,
    settings: StepSettings,
    model_name: str,
    workers: int = 1,
) -> bool:
    """Decides whether to recompute activations, and says why.

    Args:
        sess: its device has the limit.
        hparams: the model's sizes.
        settings: the other settings.
        model_name: for the advice.
        workers: how many processes train together.

    Returns:
        use_memory_saving_gradients: False if training fits without it, since that is quicker.

    Raises:
        MemoryError: training fits in neither way; says what would fit.
    """
    limit = device_limit(sess)
    if limit is None:
        return False
    plans = {
        recompute: plan(
            hparams, dataclasses.replace(settings, use_memory_saving_gradients=recompute), workers
        )
        for recompute in (False, True)
    }
    for recompute, candidate in plans.items():
        if candidate.total <= limit:
            say(
                f"use_memory_saving_gradients={recompute}: training needs about "
                f"{candidate.total / MEGABYTE:,.0f} MB of the device's {limit / MEGABYTE:,.0f}"
                + (f", and {plans[False].total / MEGABYTE:,.0f} without" if recompute else "")
            )
            return recompute
    raise MemoryError(
        f"training needs about {plans[True].total / MEGABYTE:,.0f} MB, and the device has "
        f"{limit / MEGABYTE:,.0f}. {_what_fits(hparams, limit, model_name)}"
    )


def _what_fits(hparams: model.HParams, limit: int, model_name: str) -> str:
    fitting = fitting_plans(hparams, limit)
    if fitting:
        return f"This fits: {as_call(fitting[0], model_name)}"
    least = plan(
        hparams,
        step_settings(
            accumulate_gradients=1,
            use_memory_saving_gradients=True,
            optimizer="adafactor",
            sequence_length=max(2, hparams.n_ctx // 4),
            lora_rank=LORA_RANK,
            base_precision="bfloat16",
        ),
    )
    return (
        f"Nothing fits: the least, {least.total / MEGABYTE:,.0f} MB, is that of "
        f"{as_call(least, model_name)}; take a smaller model"
    )


@contextlib.contextmanager
def explain_out_of_memory(
    hparams: model.HParams, settings: StepSettings, workers: int = 1
) -> Iterator[None]:
    """Turns TensorFlow's error about too little memory into one that says which setting to change.

    Raises:
        MemoryError: within the block the device's memory was too small.
    """
    try:
        yield
    except tf.errors.ResourceExhaustedError as error:
        raise MemoryError(
            "the device's memory is too small for this training: "
            f"{advice(plan(hparams, settings, workers))}. The run's last checkpoint is intact"
        ) from error


def advice(current: MemoryPlan) -> str:
    """What to change after the device ran out of memory, and what that would save."""
    changes: list[dict[str, Any]] = [
        {"use_memory_saving_gradients": True},
        {"batch_size": 1},
        *([{"shard_optimizer": True}] if current.workers > 1 else []),
        {"optimizer": "adafactor"},
        {"accumulate_gradients": 1, "gradient_clip": 0.0},
        *([{"base_precision": "bfloat16"}] if current.settings.lora else []),
        {"sequence_length": max(2, current.time // 2)},
    ]
    for change in changes:
        changed = dataclasses.replace(current.settings, **change)
        saved = current.total - plan(current.hparams, changed, current.workers).total
        if saved > 0:
            name, value = next(iter(change.items()))
            return f"try {name}={value!r}, which saves about {saved / MEGABYTE:,.0f} MB"
    return "take a smaller model"
