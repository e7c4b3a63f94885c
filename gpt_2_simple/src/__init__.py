"""Names that scripts import from gpt-2-simple 0.8.1's inner modules in, today's objects out.

`gpt_2_simple.src.model` and its like are modules without a file: an attribute is looked up, and
TensorFlow imported, when it is first asked for.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_BLOCK = "gpt_2_simple.model.transformer_block"
_GRADIENTS = "gpt_2_simple.memory_saving_gradients.gradients"

# Old module: its names, and where they are today. The others have their old names, too.
_MOVED = {
    "load_dataset": {
        "load_dataset": ("data.dataset", "load_dataset"),
        "Sampler": ("data.windows", "WindowSampler"),
    },
    "accumulate": {"AccumulatingOptimizer": ("training.optimizer", "AccumulatingOptimizer")},
}

# Old module: the names that are gone, and what to use instead.
_REPLACED = {
    "model": {
        "shape_list": "gpt_2_simple.model.dimensions",
        "softmax": "tf.nn.softmax",
        "norm": "gpt_2_simple.model.layer_norm",
        "split_states": "gpt_2_simple.model.split_heads",
        "merge_states": "gpt_2_simple.model.merge_heads",
        "conv1d": "gpt_2_simple.model.linear",
        "attention_mask": "gpt_2_simple.model.causal_mask",
        "attn": "gpt_2_simple.model.attention",
        "mlp": _BLOCK,
        "block": _BLOCK,
        "expand_tile": "tf.tile",
        "positions_for": "gpt_2_simple.model.hidden_states, which adds the positions",
        "get_value": "the value itself",
    },
    "sample": {
        "top_k_logits": "gpt_2_simple.sample.SamplingParams(top_k=...)",
        "top_p_logits": "gpt_2_simple.sample.SamplingParams(top_p=...)",
        "sample_sequence": "gpt_2_simple.generate, or gpt_2_simple.sample.generate_tokens",
    },
    "encoder": {"get_pairs": "gpt_2_simple.encoder.Encoder"},
    "load_dataset": {"binary_search": "gpt_2_simple.data.windows.WindowSampler"},
    "accumulate": {},
    "memory_saving_gradients": {
        "gradients_speed": f"{_GRADIENTS}(..., checkpoints=a list of tensors)",
        "gradients_memory": f"{_GRADIENTS}(..., checkpoints='memory')",
        "gradients_collection": f"{_GRADIENTS}(..., checkpoints='collection')",
        "tf_toposort": "toposort.toposort",
    }
    | dict.fromkeys(
        ("fast_backward_ops", "capture_ops", "debug_print", "format_ops", "my_add_control_inputs"),
        _GRADIENTS,
    ),
}


class _OldModule(ModuleType):
    """A module of 0.8.1."""

    def __init__(self, name: str, replaced: Mapping[str, str]):
        super().__init__(f"{__name__}.{name}")
        self.__spec__ = ModuleSpec(self.__name__, None)
        self._name, self._replaced = name, replaced

    def __getattr__(self, name: str) -> Any:
        if name in self._replaced:
            raise ImportError(
                f"{self.__name__}.{name} is no longer there; use {self._replaced[name]}"
            )
        if name == "__all__":  # for `from ... import *`
            return [name for name in dir(self) if not name.startswith("_")]
        if not name.startswith("_") and name in dir(self):
            module, today = _MOVED.get(self._name, {}).get(name, (self._name, name))
            return getattr(importlib.import_module(f"gpt_2_simple.{module}"), today)
        raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")

    def __dir__(self) -> list[str]:
        if self._name in _MOVED:
            return list(_MOVED[self._name])
        return dir(importlib.import_module(f"gpt_2_simple.{self._name}"))


for _old, _gone in _REPLACED.items():
    globals()[_old] = sys.modules[f"{__name__}.{_old}"] = _OldModule(_old, _gone)
