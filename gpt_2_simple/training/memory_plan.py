"""A model's sizes and a training configuration in, the bytes that training needs out.

The terms are counted from what model.py, step.py and optimizer.py keep at their fullest moments;
`benchmarks/memory.py` holds the sums against the smallest allocator limits that really train.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import math
import os
from collections.abc import Iterator, Sequence
from typing import Any

import tensorflow as tf

from .. import model
from ..common.report import say
from .settings import StepSettings, step_settings
from .step import LOSS_ROWS, trained_variables

PUBLISHED = {
    "124M": (12, 12, 768),
    "355M": (24, 16, 1024),
    "774M": (36, 20, 1280),
    "1558M": (48, 25, 1600),
}
OLDER_NAMES = {"117M": "124M", "345M": "355M"}

FLOAT = 4
MEGABYTE = 2**20

# What a card has for TensorFlow of what it is sold as, about: a T4 of 16 GB has 15.
USABLE = 0.93

# What the allocator loses between tensors, as a share of them: the BFC allocator of a GPU.
FRAGMENTATION = 0.06

# Tensors of [batch, time, n_embd] that one block stores for its gradient, and that its backward
# pass makes on top of them: counted in model.transformer_block.
STORED = 24
TRANSIENT = 12


def published_hparams(model_name: str) -> model.HParams:
    """The sizes of a published model, by name.

    Raises:
        ValueError: no such model; lists those there are.
    """
    name = OLDER_NAMES.get(model_name, model_name)
    if name not in PUBLISHED:
        raise ValueError(f"model_name={model_name!r} must be one of {list(PUBLISHED)}, or HParams")
    n_layer, n_head, n_embd = PUBLISHED[name]
    return model.HParams(n_vocab=50257, n_layer=n_layer, n_head=n_head, n_embd=n_embd)


@dataclasses.dataclass(frozen=True)
class Plan:
    """The bytes that a training configuration needs, at its fullest moment.

    Attributes:
        hparams: the model's sizes.
        settings: the step's settings.
        time: tokens in a window.
        weights: the variables, float32.
        optimizer_state: the optimizer's.
        accumulators: the summed gradients of the micro-batches; 0 without accumulation.
        stored_activations: what the forward pass keeps for the backward pass: checkpoints alone
            with use_memory_saving_gradients, else all.
        block: one block's activations and their gradients, while the backward pass is in it.
        loss: a chunk of logits with its gradient, and the gradient of the output projection.
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

    @property
    def resident(self) -> int:
        """What is there from one step to the next."""
        return self.weights + self.optimizer_state + self.accumulators

    @property
    def total(self) -> int:
        """The limit under which this should train: all of it, and what the allocator loses."""
        moment = self.stored_activations + max(self.block, self.loss)
        return int((self.resident + moment) * (1 + FRAGMENTATION))

    @property
    def floor(self) -> int:
        """What no such training could do without: all but the loss."""
        return self.resident + self.stored_activations + self.block

    def __str__(self) -> str:
        rows = [
            ("weights", self.weights),
            ("optimizer state", self.optimizer_state),
            ("accumulators", self.accumulators),
            ("stored activations", self.stored_activations),
            ("one block, backward", self.block),
            ("loss", self.loss),
            ("total, at the fullest moment", self.total),
        ]
        return "\n".join(f"{name:30}{size / MEGABYTE:10,.0f} MB" for name, size in rows)


def memory_plan(
    model_name: str | model.HParams = "124M",
    batch_size: int = 1,
    sequence_length: int | None = None,
    optimizer: str = "adam",
    accumulate_gradients: int = 5,
    use_memory_saving_gradients: bool = True,
    only_train_transformer_layers: bool = False,
    train_last_blocks: int | None = None,
    precision: str = "float32",
    gradient_clip: float = 0.0,
) -> Plan:
    """Counts the bytes that finetune() needs with these settings; print() shows them as a table.

    Args:
        model_name: a published model's name, or HParams.
        batch_size: windows in a micro-batch.
        sequence_length: tokens in a window; None means n_ctx.
        optimizer: 'adam', 'adafactor' or 'sgd'.
        accumulate_gradients: micro-batches in a step.
        use_memory_saving_gradients: recompute activations in the backward pass.
        only_train_transformer_layers: leave the embeddings as they are.
        train_last_blocks: train only so many blocks; None for all.
        precision: 'float32', 'bfloat16' or 'float16'.
        gradient_clip: above 0, all gradients are kept until their norm is known.

    Returns:
        The plan, in bytes (its table is in MB of 2**20 bytes).

    Raises:
        ValueError: an argument is out of range.
    """
    hparams = published_hparams(model_name) if isinstance(model_name, str) else model_name
    settings = step_settings(
        batch_size=batch_size,
        accumulate_gradients=accumulate_gradients,
        use_memory_saving_gradients=use_memory_saving_gradients,
        only_train_transformer_layers=only_train_transformer_layers,
        optimizer=optimizer,
        sequence_length=sequence_length,
        train_last_blocks=train_last_blocks,
        precision=precision,
        gradient_clip=gradient_clip,
    )
    return plan(hparams, settings)


def plan(hparams: model.HParams, settings: StepSettings) -> Plan:
    """The plan of a step's settings; see memory_plan."""
    time = min(settings.sequence_length or hparams.n_ctx, hparams.n_ctx)
    weights = _shapes(dataclasses.astuple(hparams))
    trained = trained_variables(weights, settings)
    total = sum(map(math.prod, model.flatten(weights)))
    trained_size = FLOAT * sum(map(math.prod, trained))
    width = model.PRECISIONS[settings.precision].size
    stream = width * settings.batch_size * time * hparams.n_embd
    stored = STORED * stream + _attention_weights(hparams, settings.batch_size, time, width)
    layers = settings.train_last_blocks or hparams.n_layer
    keeps_all = not settings.use_memory_saving_gradients
    gradients = trained_size if keeps_all and not settings.accumulates else 0
    return Plan(
        hparams=hparams,
        settings=settings,
        time=time,
        weights=FLOAT * total,
        optimizer_state=sum(_state_size(settings.optimizer, shape) for shape in trained),
        accumulators=trained_size if settings.accumulates else 0,
        stored_activations=layers * (stored if keeps_all else stream) + gradients,
        block=TRANSIENT * stream + (0 if keeps_all else stored),
        loss=_loss_size(hparams, settings, time, width),
    )


@functools.lru_cache(maxsize=8)
def _shapes(sizes: tuple[int, ...]) -> model.Weights:
    """The shapes of a model's variables, each where the variable would be."""
    n_vocab, n_ctx, width, _, n_layer = sizes

    def affine(nx: int, nf: int) -> model.Affine:
        return model.Affine((1, nx, nf), (nf,))

    norm = model.Norm((width,), (width,))
    block = model.Block(
        ln_1=norm,
        c_attn=affine(width, 3 * width),
        c_proj=affine(width, width),
        ln_2=norm,
        mlp_c_fc=affine(width, 4 * width),
        mlp_c_proj=affine(4 * width, width),
    )
    return model.Weights((n_vocab, width), (n_ctx, width), (block,) * n_layer, norm)


def _state_size(optimizer: str, shape: Sequence[int]) -> int:
    long_axes = [size for size in shape if size > 1]
    if optimizer == "adam":
        return 2 * FLOAT * math.prod(shape)
    if optimizer == "adafactor":
        return FLOAT * (sum(long_axes) if len(long_axes) > 1 else math.prod(shape))
    return 0


def _attention_weights(hparams: model.HParams, batch_size: int, time: int, width: int) -> int:
    """The softmax of one block: for each chunk of queries, the keys that its last may see."""
    starts = range(0, time, model.QUERY_CHUNK)
    ends = [min(start + model.QUERY_CHUNK, time) for start in starts]
    seen = sum((end - start) * end for start, end in zip(starts, ends, strict=True))
    return width * batch_size * hparams.n_head * seen


def _loss_size(hparams: model.HParams, settings: StepSettings, time: int, width: int) -> int:
    """A chunk of logits and their gradient, and the output projection's gradient."""
    rows = min(LOSS_ROWS, settings.batch_size * time)
    chunks = math.ceil(settings.batch_size * time / LOSS_ROWS)
    projection = hparams.n_vocab * hparams.n_embd
    trained = not settings.only_train_transformer_layers and settings.train_last_blocks is None
    # Parts are added to the accumulator one by one, or else to each other.
    copies = trained * (1 if settings.accumulates else min(chunks, 2))
    cast = width * projection if width < FLOAT else 0
    return 2 * FLOAT * rows * hparams.n_vocab + FLOAT * copies * projection + cast


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


def fitting_plans(hparams: model.HParams, limit: int) -> list[Plan]:
    """The configurations that fit, best first.

    Best is what changes training least (long windows, then Adam, then accumulation), and among
    these the quickest.

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
    return [candidate for candidate in found if candidate.total <= limit]


def as_call(candidate: Plan, model_name: str) -> str:
    """The finetune() call that a plan stands for."""
    default, arguments = step_settings(), {"model_name": model_name}
    for field in dataclasses.fields(StepSettings):
        value = getattr(candidate.settings, field.name)
        always = field.name in ("accumulate_gradients", "use_memory_saving_gradients")
        if always or value != getattr(default, field.name):
            arguments[field.name] = value
    if candidate.time == candidate.hparams.n_ctx:
        arguments.pop("sequence_length", None)
    given = ", ".join(f"{name}={value!r}" for name, value in arguments.items())
    return f'gpt2.finetune(sess, "your.txt", {given})'


def choose(
    sess: tf.compat.v1.Session, hparams: model.HParams, settings: StepSettings, model_name: str
) -> bool:
    """Decides whether to recompute activations, and says why.

    Args:
        sess: its device has the limit.
        hparams: the model's sizes.
        settings: the other settings.
        model_name: for the advice.

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
            hparams, dataclasses.replace(settings, use_memory_saving_gradients=recompute)
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
        f"{limit / MEGABYTE:,.0f}. {_closest(hparams, limit, model_name)}"
    )


def _closest(hparams: model.HParams, limit: int, model_name: str) -> str:
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
        ),
    )
    return (
        f"Nothing fits: the least, {least.total / MEGABYTE:,.0f} MB, is that of "
        f"{as_call(least, model_name)}; take a smaller model"
    )


@contextlib.contextmanager
def explained(hparams: model.HParams, settings: StepSettings) -> Iterator[None]:
    """TensorFlow's error about too little memory, as one that says which setting to change.

    Raises:
        MemoryError: within the block the device's memory was too small.
    """
    try:
        yield
    except tf.errors.ResourceExhaustedError as error:
        raise MemoryError(
            "the device's memory is too small for this training: "
            f"{advice(plan(hparams, settings))}. The run's last checkpoint is intact"
        ) from error


def advice(current: Plan) -> str:
    """What to change after the device ran out of memory, and what that would save."""
    changes: list[dict[str, Any]] = [
        {"use_memory_saving_gradients": True},
        {"batch_size": 1},
        {"optimizer": "adafactor"},
        {"accumulate_gradients": 1, "gradient_clip": 0.0},
        {"sequence_length": max(2, current.time // 2)},
    ]
    for change in changes:
        saved = (
            current.total
            - plan(current.hparams, dataclasses.replace(current.settings, **change)).total
        )
        if saved > 0:
            name, value = next(iter(change.items()))
            return f"try {name}={value!r}, which saves about {saved / MEGABYTE:,.0f} MB"
    return "take a smaller model"
