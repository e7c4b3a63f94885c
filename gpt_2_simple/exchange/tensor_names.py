"""GPT-2's sizes in, the names and shapes of its tensors out: in our checkpoints, in transformers'.

transformers keeps OpenAI's layout: the matrices of linear layers are [inputs, outputs]. OpenAI's
have one more axis of size 1 before these two.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from ..common.hparams import HParams


class TensorName(NamedTuple):
    """A tensor of GPT-2.

    Attributes:
        ours: its name in our checkpoints, 'model/h0/attn/c_attn/w'.
        theirs: its name in GPT2LMHeadModel of transformers, 'transformer.h.0.attn.c_attn.weight'.
        shape: its shape there.
    """

    ours: str
    theirs: str
    shape: tuple[int, ...]

    @property
    def our_shape(self) -> tuple[int, ...]:
        """Its shape in our checkpoints."""
        is_matrix = len(self.shape) == 2 and self.ours.endswith("/w")
        return (1, *self.shape) if is_matrix else self.shape


PREFIX = "transformer."

# A layer norm's gain and a linear layer's matrix are both 'weight' in transformers.
_PARAMETERS = {"g": "weight", "w": "weight", "b": "bias"}


def tensors_of(hparams: HParams) -> list[TensorName]:
    """The tensors of a model: embeddings, the blocks from the first to the last, the last norm."""
    width = hparams.n_embd
    return [
        TensorName("model/wte", f"{PREFIX}wte.weight", (hparams.n_vocab, width)),
        TensorName("model/wpe", f"{PREFIX}wpe.weight", (hparams.n_ctx, width)),
        *(name for layer in range(hparams.n_layer) for name in _block(layer, width)),
        *_parameters("", "ln_f", {"g": (width,), "b": (width,)}),
    ]


def _block(layer: int, width: int) -> Iterator[TensorName]:
    norm: dict[str, tuple[int, ...]] = {"g": (width,), "b": (width,)}
    parts: dict[str, dict[str, tuple[int, ...]]] = {
        "ln_1": norm,
        "attn/c_attn": {"w": (width, 3 * width), "b": (3 * width,)},
        "attn/c_proj": {"w": (width, width), "b": (width,)},
        "ln_2": norm,
        "mlp/c_fc": {"w": (width, 4 * width), "b": (4 * width,)},
        "mlp/c_proj": {"w": (4 * width, width), "b": (width,)},
    }
    for part, shapes in parts.items():
        yield from _parameters(f"h{layer}/", part, shapes)


def _parameters(block: str, part: str, shapes: dict[str, tuple[int, ...]]) -> Iterator[TensorName]:
    path = block.replace("h", "h.", 1) + part
    for parameter, shape in shapes.items():
        theirs = f"{PREFIX}{path.replace('/', '.')}.{_PARAMETERS[parameter]}"
        yield TensorName(f"model/{block}{part}/{parameter}", theirs, shape)
