"""An adapter's variables in; how they are saved in peft's format, and restored."""

from __future__ import annotations

from typing import Any

import numpy as np
import tensorflow as tf

from ..adapter import Adapter
from ..common.hparams import HParams
from ..common.lora import LoraConfig
from ..common.published import OLDER_NAMES, PUBLISHED
from . import adapter_base, adapter_files
from .adapter_updates import read_updates

_PREFIX = "base_model.model.transformer."
_HUB_NAMES = dict(zip(PUBLISHED, ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"), strict=True))


class AdapterState:
    """The adapter of a run that is being trained, on disk: `adapter-N/`."""

    def __init__(
        self, sess: tf.compat.v1.Session, adapter: Adapter, base: dict[str, str], dropout: float
    ):
        """Takes the variables.

        Args:
            sess: holds them.
            adapter: the variables.
            base: what is written of the base, see adapter_base.describe_base().
            dropout: the rate that they are trained with.
        """
        self.sess, self.adapter, self.base, self.dropout = sess, adapter, base, dropout

    def write(self, folder: str) -> None:
        """Makes the folder of an adapter, and flushes it to disk."""
        values = self.sess.run(self.adapter.variables)
        tensors = {
            f"{_PREFIX}{layer}.lora_{kind}.weight": value
            for layer, pair in values.items()
            for kind, value in zip("AB", pair, strict=True)
        }
        config = peft_config(self.adapter.config, self.base, self.dropout)
        adapter_files.write_adapter(folder, config, tensors, self.base)

    def restore(self, folder: str, hparams: HParams) -> None:
        """Fills the variables from an adapter's folder.

        Raises:
            FileNotFoundError: it went away.
            ValueError: it is damaged, or of another rank, alpha or targets.
        """
        self.assign(read_matrices(folder, self.adapter.config, hparams))

    def assign(self, values: dict[str, tuple[np.ndarray, np.ndarray]]) -> None:
        """Fills the variables; a and b are by the layer's name, such as 'h.0.attn.c_attn'."""
        for layer, pair in self.adapter.variables.items():
            for variable, value in zip(pair, values[layer], strict=True):
                initializer = variable.initializer
                self.sess.run(initializer, {initializer.inputs[1]: value})


def peft_config(config: LoraConfig, base: dict[str, str], dropout: float) -> dict[str, Any]:
    """What adapter_config.json says, for peft."""
    model = base[adapter_base.BASE_MODEL]
    hub_name = _HUB_NAMES.get(OLDER_NAMES.get(model, model))
    alpha = config.alpha
    return {
        "alpha_pattern": {},
        "base_model_name_or_path": f"openai-community/{hub_name}" if hub_name else model,
        "bias": "none",
        "fan_in_fan_out": True,  # GPT-2's layers in Hugging Face keep their weights as [in, out]
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": dropout,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": config.rank,
        "rank_pattern": {},
        "target_modules": list(config.targets),
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": False,
    }


def read_matrices(
    folder: str, config: LoraConfig, hparams: HParams
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Each layer's a and b, of an adapter that is to be trained on.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: it is damaged, or of another rank, alpha or targets than `config`, or it has
            what finetune() does not train.
    """
    files = adapter_files.read_adapter(folder)
    updates = read_updates(files, hparams)
    found: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for index in range(hparams.n_layer):
        for target in config.targets:
            name = f"model/h{index}/{target.replace('.', '/')}/w"
            update = updates.of_variables.pop(name, None)
            if update is None or update.a is None or update.b is None:
                raise ValueError(_is_other(folder, files.config, f"it has no update of {name}"))
            if len(update.a) != config.rank:
                raise ValueError(_is_other(folder, files.config, f"it has rank {len(update.a)}"))
            if not np.isclose(update.scale, config.scale):
                raise ValueError(
                    _is_other(folder, files.config, f"it scales updates by {update.scale:g}")
                )
            found[f"h.{index}.{target}"] = update.a, update.b
    rest = [*updates.of_variables]
    if updates.embedding is not None or updates.projection is not None:
        rest.append("model/wte")
    if rest:
        raise ValueError(_is_other(folder, files.config, f"it changes {rest[0]}, too"))
    return found


def _is_other(folder: str, config: dict[str, Any], reason: str) -> str:
    return (
        f"{folder} is another adapter than the settings say: {reason}. To train it on, give "
        f"lora_rank={config.get('r')}, lora_alpha={config.get('lora_alpha')}, "
        f"lora_targets={config.get('target_modules')}; to train another one, give another run_name"
    )
