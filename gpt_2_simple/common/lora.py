"""Names of layers and a rank in, the shape of a LoRA adapter out.

LoRA (Hu et al. 2021, arXiv:2106.09685) leaves a matrix w [in, out] as it is and trains a [r, in]
and b [out, r]; the layer then computes with w + (b a)^T * scale. Names are those of peft.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from typing import Any

# A block's linear layers by their names in Hugging Face's GPT-2, with how often n_embd goes into
# their inputs and outputs. A variable's name has '/' in place of '.'.
LINEAR_LAYERS = {
    "attn.c_attn": (1, 3),
    "attn.c_proj": (1, 1),
    "mlp.c_fc": (1, 4),
    "mlp.c_proj": (4, 1),
}

ALL = "all"


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """The adapter that finetune() trains: of one rank, in the same layers of each block.

    Attributes:
        rank: of each update.
        alpha: an update is scaled by alpha / rank.
        targets: names in LINEAR_LAYERS, in their order.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...]

    @property
    def scale(self) -> float:
        """The factor of an update."""
        return self.alpha / self.rank


def resolve_targets(targets: str | Iterable[str]) -> tuple[str, ...]:
    """The linear layers that peft's `target_modules` of these names means.

    A name means each layer whose full name is it, or ends in it after a dot: 'c_proj' is both
    projections, 'attn.c_proj' is one. 'all' is every linear layer.

    Raises:
        ValueError: a name means no layer, or there is none.
    """
    names: list[Any] = [targets]
    if not isinstance(targets, str) and isinstance(targets, Iterable):
        names = list(targets)
    for name in names:
        if not isinstance(name, str) or not (name == ALL or _layers_of(name)):
            known = ", ".join(map(repr, ("c_attn", "attn.c_proj", "c_fc", "mlp.c_proj", ALL)))
            raise ValueError(f"lora_targets={targets!r}: {name!r} is none of {known}")
    if not names:
        raise ValueError(f"lora_targets={targets!r} names no layer: give 'c_attn', or 'all'")
    found = {layer for name in names for layer in _layers_of(name)}
    return tuple(layer for layer in LINEAR_LAYERS if layer in found or ALL in names)


def _layers_of(name: str) -> list[str]:
    return [layer for layer in LINEAR_LAYERS if layer == name or layer.endswith(f".{name}")]


def adapter_shapes(layer: str, n_embd: int, rank: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """The shapes of a layer's a [rank, in] and b [out, rank]."""
    n_in, n_out = (factor * n_embd for factor in LINEAR_LAYERS[layer])
    return (rank, n_in), (n_out, rank)


def adapter_size(config: LoraConfig, n_embd: int, n_layer: int) -> int:
    """How many numbers an adapter has."""
    shapes = (s for t in config.targets for s in adapter_shapes(t, n_embd, config.rank))
    return n_layer * sum(map(math.prod, shapes))
