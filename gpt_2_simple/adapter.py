"""A LoRA configuration in, its variables out; weights in, weights with their updates out."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from . import model
from .common.hparams import HParams
from .common.lora import LINEAR_LAYERS, LoraConfig, adapter_shapes

_FIELDS = {
    "attn.c_attn": "c_attn",
    "attn.c_proj": "c_proj",
    "mlp.c_fc": "mlp_c_fc",
    "mlp.c_proj": "mlp_c_proj",
}
"""The fields of model.Block by the names of the linear layers."""


@dataclasses.dataclass(eq=False)
class Adapter:
    """The variables of an adapter in a graph.

    Attributes:
        config: its rank, alpha and targets.
        variables: a [r, nx] and b [nf, r], float32, by the layer's name, such as 'h.0.attn.c_attn'.
    """

    config: LoraConfig
    variables: dict[str, tuple[tf.Variable, tf.Variable]]

    def flatten(self) -> list[tf.Variable]:
        """All of its variables."""
        return [variable for pair in self.variables.values() for variable in pair]


def build_adapter(hparams: HParams, gpus: Sequence[str], config: LoraConfig) -> Adapter:
    """Makes an adapter's variables, or finds those of another one of its rank.

    Args:
        hparams: the model's sizes.
        gpus: the devices that its blocks are spread over; may be empty.
        config: rank, alpha and targets.

    Returns:
        The adapter, of resource variables in the default graph.
    """
    variables = {}
    root = tf.compat.v1.VariableScope(tf.compat.v1.AUTO_REUSE, use_resource=True)
    for index in range(hparams.n_layer):
        for layer in config.targets:
            scope = f"lora_{config.rank}/h{index}/{layer.replace('.', '/')}"
            a_shape, b_shape = adapter_shapes(layer, hparams.n_embd, config.rank)
            with (
                tf.device(model.block_device(index, hparams.n_layer, gpus)),
                tf.compat.v1.variable_scope(root, auxiliary_name_scope=False),
            ):
                variables[f"h.{index}.{layer}"] = (
                    model.get_variable(f"{scope}/lora_A", a_shape, initializer=_zeros),
                    model.get_variable(f"{scope}/lora_B", b_shape, initializer=_zeros),
                )
    return Adapter(config, variables)


_zeros = tf.compat.v1.zeros_initializer()


def read_adapted(
    weights: model.Weights, adapter: Adapter, dropout: model.Dropout | None = None
) -> model.Weights:
    """Weights whose linear layers are frozen, and get the adapter's updates where it has some.

    Args:
        weights: the base's, as tensors.
        adapter: its variables are read once.
        dropout: of the updates' inputs, for training.
    """
    blocks = []
    for index, block in enumerate(weights.blocks):
        frozen: dict[str, Any] = {}
        for layer in LINEAR_LAYERS:
            w, b = getattr(block, _FIELDS[layer])
            pair = adapter.variables.get(f"h.{index}.{layer}")
            update = None
            if pair is not None:
                lora_a, lora_b = (variable.read_value() for variable in pair)
                update = model.LowRank(lora_a, lora_b, adapter.config.scale, dropout)
            frozen[_FIELDS[layer]] = model.FrozenLinear(w, b, update)
        blocks.append(block._replace(**frozen))
    return weights._replace(blocks=tuple(blocks))
