"""Named sizes in, GPT-2's checked hyper-parameters out."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

PRECISIONS = ("float32", "bfloat16", "float16")
"""The types that activations, or the blocks' matrices, can have."""

GENERATING_PRECISIONS = (*PRECISIONS, "int8")
"""The types that the blocks' matrices can have in a session that only generates."""


@dataclasses.dataclass
class HParams:
    """GPT-2's hyper-parameters, named as in `hparams.json`."""

    n_vocab: int = 0  # tokens in the vocabulary
    n_ctx: int = 1024  # longest context, in tokens
    n_embd: int = 768  # width of the residual stream
    n_head: int = 12  # attention heads in a block; divides n_embd
    n_layer: int = 12  # transformer blocks

    def override_from_dict(self, param_dict: Mapping[str, int]) -> None:
        """Replaces the named values and keeps the others.

        Raises:
            ValueError: a name is unknown, a value is not a whole number above 0, or n_head does
                not divide n_embd. Nothing is changed then.
        """
        names = [field.name for field in dataclasses.fields(self)]
        unknown = sorted(set(param_dict) - set(names))
        if unknown:
            raise ValueError(f"unknown hyper-parameters {unknown}; GPT-2 has {names}")
        dataclasses.replace(self, **param_dict).check()
        for name, value in param_dict.items():
            setattr(self, name, value)

    def check(self) -> None:
        """Raises ValueError for sizes that no GPT-2 can have; n_vocab may be 0: not known yet."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            least = 0 if field.name == "n_vocab" else 1
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{field.name}={value!r} must be a whole number above 0")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd={self.n_embd} must be a multiple of n_head={self.n_head}")

    def check_complete(self) -> None:
        """As check(), and n_vocab must be known."""
        self.check()
        if self.n_vocab < 1:
            raise ValueError("n_vocab=0: set it to the size of the vocabulary")


Shape = tuple[int, ...]


def variable_shapes(hparams: HParams) -> tuple[list[Shape], list[Shape], list[Shape]]:
    """The variables' shapes: of the embeddings, of one block, and of the last layer norm."""
    width = hparams.n_embd
    norm: list[Shape] = [(width,), (width,)]

    def affine(nx: int, nf: int) -> list[Shape]:
        return [(1, nx, nf), (nf,)]

    attention = affine(width, 3 * width) + affine(width, width)
    mlp = affine(width, 4 * width) + affine(4 * width, width)
    embeddings: list[Shape] = [(hparams.n_vocab, width), (hparams.n_ctx, width)]
    return embeddings, norm + attention + norm + mlp, norm


def default_hparams() -> HParams:
    """The 124M model's hyper-parameters, except that n_vocab is 0: the vocabulary decides it."""
    return HParams()
