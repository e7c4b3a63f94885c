"""A run that trained an adapter in, a run with a whole model out."""

from __future__ import annotations

import contextlib
import functools
import os
from pathlib import Path

import tensorflow as tf

from .. import session
from ..common.report import say
from ..common.settings import settings_function
from ..storage import checkpoint, checkpoint_ops, runs
from ..storage.load import Source, find_source, load_source
from ..storage.settings import LoadSettings
from .adapter_settings import MergeSettings
from .weights import check_new, new_folder


@settings_function(MergeSettings)
def merge_adapter(settings: MergeSettings) -> str:
    """Merges a run's adapter into the model that it was trained on, and writes that as a new run.

    The new run holds a whole model, as finetune() without `lora_rank` writes it: gpt-2-simple 0.8.1
    and export read it.

    Args:
        settings: each of them is an argument.

    Returns:
        The prefix of the new run's checkpoint.

    Raises:
        FileExistsError: there is a run of the new name.
        FileNotFoundError: there is no such run, checkpoint, adapter or model.
        OSError: the disk is full, or the folder cannot be written; nothing is left of it.
        ValueError: the run trained a whole model; or the adapter does not fit the model.
    """
    target = os.path.join(settings.checkpoint_dir, settings.target)
    check_new(target, "merged_name")
    named = LoadSettings(
        settings.checkpoint, settings.run_name, settings.checkpoint_dir, settings.model_name,
        settings.model_dir, adapter=settings.adapter, precision="float32",
    )  # fmt: skip
    if find_source(named).adapter is None:
        raise ValueError(
            f"run {settings.run_name!r} holds a whole model: there is no adapter to merge"
        )
    with contextlib.closing(session.start_tf_sess()) as sess:
        source = load_source(sess, named)
        with new_folder(target, "merged_name") as new:
            name = _write_merged(sess, source, new)
        say("Merged into", os.path.join(target, name))
        return os.path.join(target, name)


def _write_merged(sess: tf.compat.v1.Session, source: Source, folder: str) -> str:
    """Writes the session's weights as a run into an empty folder; returns the checkpoint's name."""
    for name in (*checkpoint.VOCABULARY_FILES, "hparams.json"):
        Path(folder, name).write_bytes(Path(source.folder, name).read_bytes())
    adapter = source.adapter or ""
    with contextlib.suppress(FileNotFoundError):  # A run's: it names the model.
        text = Path(os.path.dirname(os.path.abspath(adapter)), runs.SETTINGS).read_bytes()
        Path(folder, runs.SETTINGS).write_bytes(text)
    state = session.graph_state(sess)
    step = runs.step_of(adapter)
    base = f"{runs.MODEL}-{step}"
    save = state.build_once(checkpoint_ops.build_save, *session.named_variables(state).values())
    texts = {checkpoint.COUNTER: f"{step}\n", checkpoint.LIST_FILE: checkpoint.list_text([base])}
    write = functools.partial(checkpoint_ops.write_checkpoint, sess, save)
    checkpoint_ops.save_model(folder, base, state.hparams, {base: write}, texts)
    return base
