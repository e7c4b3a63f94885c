"""Settings and a run in, the adapter that is trained in a session out."""

from __future__ import annotations

import math

import numpy as np
import tensorflow as tf

from .. import session
from ..adapter import Adapter, build_adapter
from ..common.hparams import HParams
from ..common.lora import LoraConfig
from ..storage import adapter_base, adapter_files
from ..storage.adapter_state import AdapterState, read_matrices
from ..storage.checkpoint import restore_path
from .settings import TrainingSettings

# The stream of a run's random numbers that an adapter's first values come from.
_STREAM = 2**31


def check_start(
    settings: TrainingSettings, checkpoint: str, resumes: bool, hparams: HParams
) -> None:
    """Raises ValueError if training cannot start as the settings say from what is there.

    Args:
        settings: whether an adapter is trained.
        checkpoint: where training starts: a whole model's checkpoint, or an adapter's folder.
        resumes: whether that is the run's own latest.
        hparams: the model's sizes.
    """
    is_adapter = adapter_files.is_adapter(checkpoint)
    if is_adapter and settings.lora is not None:
        read_matrices(checkpoint, settings.lora, hparams)
    if is_adapter and settings.lora is None:
        config = adapter_files.read_config(checkpoint)
        raise ValueError(
            f"{checkpoint} is an adapter: to train it on, give lora_rank={config.get('r')}, "
            f"lora_alpha={config.get('lora_alpha')}, lora_targets={config.get('target_modules')}; "
            "to train the whole model, merge it by gpt2.merge_adapter(), or give another run_name"
        )
    if resumes and not is_adapter and settings.lora is not None:
        raise ValueError(
            f"{checkpoint} is a whole model that this run has trained: give another run_name. "
            f"With restore_from={checkpoint!r} that run's adapter is trained on top of it"
        )


def find_base(settings: TrainingSettings, checkpoint: str, model: str) -> str:
    """The checkpoint of the model to train, or to train an adapter for.

    Args:
        settings: where the models are.
        checkpoint: where training starts.
        model: the folder of the model that the settings name, for adapters that name none.
    """
    if not adapter_files.is_adapter(checkpoint):
        return checkpoint
    if adapter_base.BASE_DIGEST in adapter_files.read_metadata(checkpoint):
        return adapter_base.find_base(checkpoint, settings.model_dir)
    return restore_path(model)


def attach_adapter(
    sess: tf.compat.v1.Session,
    state: session.GraphState,
    settings: TrainingSettings,
    run: str,
    base: str,
) -> AdapterState | None:
    """Adds the adapter that the settings ask for to the session's model; None if they ask for none.

    Args:
        sess: holds the base.
        state: what its graph remembers.
        settings: rank, alpha, targets.
        run: the run's folder.
        base: the base's checkpoint.
    """
    config = settings.lora
    if config is None:
        return None
    state.adapter = state.build_once(_build, state, config)
    described = adapter_base.describe_base(base, run, settings.model_name)
    adapter = AdapterState(sess, state.adapter, described, settings.lora_dropout)
    # Whatever fails before the run's own values are there, the session can be used.
    adapter.assign(first_values(state.adapter, 0))
    return adapter


def _build(state: session.GraphState, config: LoraConfig) -> Adapter:
    return build_adapter(state.hparams, state.gpus, config)


def first_values(adapter: Adapter, seed: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """An adapter that changes nothing yet, as peft starts it: a is uniform, b is 0.

    Args:
        adapter: gives the shapes.
        seed: the run's.
    """
    rng = np.random.default_rng([seed, _STREAM])
    values = {}
    for layer, (a, b) in adapter.variables.items():
        bound = 1 / math.sqrt(a.shape.as_list()[1])
        drawn = rng.uniform(-bound, bound, a.shape.as_list()).astype(np.float32)
        values[layer] = drawn, np.zeros(b.shape.as_list(), np.float32)
    return values


def restore_adapter(
    state: session.GraphState, adapter: AdapterState, checkpoint: str, seed: int
) -> None:
    """Fills an adapter from its checkpoint, or with first values if that is a whole model's.

    Raises:
        FileNotFoundError: the checkpoint went away.
        ValueError: it is damaged, or another adapter than the settings say.
    """
    if adapter_files.is_adapter(checkpoint):
        adapter.restore(checkpoint, state.hparams)
    else:
        adapter.assign(first_values(adapter.adapter, seed))
