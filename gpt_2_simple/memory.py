"""A model's sizes and a training configuration in, the bytes that training needs out.

The terms are counted from what model.py, step.py and optimizer.py keep at their fullest moments;
`benchmarks/memory.py` holds the sums against the smallest allocator limits that really train.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
from collections.abc import Iterator
from typing import Any

import tensorflow as tf

from . import model
from .step import LOSS_ROWS, StepConfig

PUBLISHED = {
    "124M": (12, 12, 768),
    "355M": (24, 16, 1024),
    "774M": (36, 20, 1280),
    "1558M": (48, 25, 1600),
}
OLDER_NAMES = {"117M": "124M", "345M": "355M"}

FLOAT = 4
MEGABYTE = 2**20

# What the allocator loses between tensors, as a share of them: the BFC allocator of a GPU.
FRAGMENTATION = 0.03

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
        config: the step's settings.
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
    config: StepConfig
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

    Returns:
        The plan, in bytes (its table is in MB of 2**20 bytes).

    Raises:
        ValueError: an argument is out of range.
    """
    hparams = published_hparams(model_name) if isinstance(model_name, str) else model_name
    config = StepConfig(
        batch_size=batch_size,
        accumulate_gradients=accumulate_gradients,
        use_memory_saving_gradients=use_memory_saving_gradients,
        only_train_transformer_layers=only_train_transformer_layers,
        optimizer=optimizer,
        sequence_length=sequence_length,
    )
    return plan(hparams, config)


def plan(hparams: model.HParams, config: StepConfig) -> Plan:
    """The plan of a step's settings; see memory_plan."""
    time = min(config.sequence_length or hparams.n_ctx, hparams.n_ctx)
    shapes = list(variable_shapes(hparams))
    trained = [
        shape
        for name, shape in shapes
        if not config.only_train_transformer_layers or name.startswith("h")
    ]
    trained_size = FLOAT * sum(map(math.prod, trained))
    accumulate = config.accumulate_gradients > 1
    stream = FLOAT * config.batch_size * time * hparams.n_embd
    stored = STORED * stream + _attention_weights(hparams, config.batch_size, time)
    keeps_all = not config.use_memory_saving_gradients
    gradients = 0 if accumulate or not keeps_all else trained_size
    return Plan(
        hparams=hparams,
        config=config,
        time=time,
        weights=FLOAT * sum(math.prod(shape) for _, shape in shapes),
        optimizer_state=sum(_state_size(config.optimizer, shape) for shape in trained),
        accumulators=trained_size if accumulate else 0,
        stored_activations=hparams.n_layer * (stored if keeps_all else stream) + gradients,
        block=TRANSIENT * stream + (0 if keeps_all else stored),
        loss=_loss_size(hparams, config, time),
    )


def variable_shapes(hparams: model.HParams) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Each variable's name, without its scope, and shape."""
    with tf.Graph().as_default():
        for variable in model.flatten(model.variables(hparams)):
            yield variable.op.name.partition("/")[2], tuple(variable.shape.as_list())


def _state_size(optimizer: str, shape: tuple[int, ...]) -> int:
    long_axes = [size for size in shape if size > 1]
    if optimizer == "adam":
        return 2 * FLOAT * math.prod(shape)
    if optimizer == "adafactor":
        return FLOAT * (sum(long_axes) if len(long_axes) > 1 else math.prod(shape))
    return 0


def _attention_weights(hparams: model.HParams, batch_size: int, time: int) -> int:
    """The softmax of one block: for each chunk of queries, the keys that its last may see."""
    starts = range(0, time, model.QUERY_CHUNK)
    ends = [min(start + model.QUERY_CHUNK, time) for start in starts]
    seen = sum((end - start) * end for start, end in zip(starts, ends, strict=True))
    return FLOAT * batch_size * hparams.n_head * seen


def _loss_size(hparams: model.HParams, config: StepConfig, time: int) -> int:
    """Logits and their gradient, and the projection's gradient with the part that is added."""
    rows = min(LOSS_ROWS, config.batch_size * time)
    chunks = math.ceil(config.batch_size * time / LOSS_ROWS)
    projection = FLOAT * hparams.n_vocab * hparams.n_embd
    copies = 0 if config.only_train_transformer_layers else min(chunks, 2)
    return 2 * FLOAT * rows * hparams.n_vocab + copies * projection


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
        config = StepConfig(
            accumulate_gradients=accumulate,
            use_memory_saving_gradients=save_memory,
            optimizer=optimizer,
            sequence_length=length,
        )
        found.append(plan(hparams, config))
    return [candidate for candidate in found if candidate.total <= limit]


def as_call(candidate: Plan, model_name: str) -> str:
    """The finetune() call that a plan stands for."""
    config = candidate.config
    arguments: dict[str, Any] = {
        "model_name": model_name,
        "optimizer": config.optimizer,
        "accumulate_gradients": config.accumulate_gradients,
        "use_memory_saving_gradients": config.use_memory_saving_gradients,
    }
    if candidate.time < candidate.hparams.n_ctx:
        arguments["sequence_length"] = candidate.time
    if config.batch_size > 1:
        arguments["batch_size"] = config.batch_size
    if config.only_train_transformer_layers:
        arguments["only_train_transformer_layers"] = True
    given = ", ".join(f"{name}={value!r}" for name, value in arguments.items())
    return f'gpt2.finetune(sess, "your.txt", {given})'
