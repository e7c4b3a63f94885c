"""A run's or a model's folder in, the model card for the Hugging Face hub out."""

from __future__ import annotations

import importlib.metadata
import json
import os
from pathlib import Path
from typing import Any

from ..common.published import OLDER_NAMES, PUBLISHED
from ..storage import runs
from ..training.history import read_history, smoothed
from .weights import StoredWeights

# OpenAI's models on the hub, by the names that they have here.
_ON_THE_HUB = {
    "124M": "openai-community/gpt2",
    "355M": "openai-community/gpt2-medium",
    "774M": "openai-community/gpt2-large",
    "1558M": "openai-community/gpt2-xl",
}

# Settings that say where files lie on the machine that trained, or how often something is printed.
_LEFT_OUT = {
    *("dataset", "val_dataset", "model_name", "model_dir", "run_name", "checkpoint_dir"),
    *("restore_from", "overwrite", "cache_dir", "max_checkpoints", "save_every", "print_every"),
    *("sample_every", "sample_length", "sample_num", "verbose", "steps"),
}


def model_card(weights: StoredWeights, precision: str) -> str:
    """The content of README.md: what the model is, how it was trained, how it is used."""
    settings = _read_settings(weights.folder) if weights.is_run else {}
    base = str(settings["model_name"]) if settings.get("model_name") else None
    sections = [
        _front_matter(_name_on_the_hub(base, weights)),
        f"# {weights.name}",
        _description(weights, settings, base, precision),
        *([_training(weights, settings)] if weights.is_run else []),
        _USE,
    ]
    return "\n\n".join(sections) + "\n"


def _read_settings(folder: str) -> dict[str, Any]:
    """A run's settings.json; {} for runs of gpt-2-simple 0.8.1."""
    try:
        settings = json.loads(Path(folder, runs.SETTINGS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return settings if isinstance(settings, dict) else {}


def _name_on_the_hub(base: str | None, weights: StoredWeights) -> str | None:
    """The name of the published model that a run was trained from, None if it was another."""
    name = OLDER_NAMES.get(base or "", base or "")
    return _ON_THE_HUB[name] if PUBLISHED.get(name) == weights.hparams else None


def _front_matter(base: str | None) -> str:
    lines = ["---", "library_name: transformers", "pipeline_tag: text-generation"]
    lines += [f"base_model: {base}"] if base else []
    return "\n".join([*lines, "tags:", "- gpt2", "- gpt_2_simple", "---"])


def _description(
    weights: StoredWeights, settings: dict[str, Any], base: str | None, precision: str
) -> str:
    hparams = weights.hparams
    origin = "A GPT-2 language model"
    if base and settings.get("dataset"):
        origin = f"GPT-2 `{base}`, trained on {_names(settings['dataset'])}"
    elif base:
        origin = f"GPT-2 `{base}`, trained further"
    return (
        f"{origin}. It has {hparams.n_layer} blocks, {hparams.n_head} heads, a width of "
        f"{hparams.n_embd}, a context of {hparams.n_ctx:,} tokens and a vocabulary of "
        f"{hparams.n_vocab:,}. Its weights are {precision}, from the checkpoint "
        f"`{os.path.basename(weights.prefix)}`, written by gpt_2_simple {_version()}."
    )


def _version() -> str:
    try:
        return importlib.metadata.version("gpt_2_simple")
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"


def _names(dataset: Any) -> str:
    """The names of the files, without their folders."""
    paths = [dataset] if isinstance(dataset, str) else list(dataset)
    return ", ".join(f"`{os.path.basename(os.path.normpath(str(path)))}`" for path in paths)


def _training(weights: StoredWeights, settings: dict[str, Any]) -> str:
    rows = _results(weights)
    rows += [
        (name, value)
        for name, value in settings.items()
        if name not in _LEFT_OUT and value is not None
    ]
    table = [f"| {name} | {_cell(value)} |" for name, value in rows]
    return "\n".join(["## Training", "", "| | |", "|---|---|", *table])


def _results(weights: StoredWeights) -> list[tuple[str, Any]]:
    """Steps and losses up to the checkpoint, as far as the run's files tell them."""
    step = runs.step_of(weights.prefix)
    try:
        entries = read_history(weights.folder)
    except FileNotFoundError:
        entries = []
    if step:
        entries = [entry for entry in entries if entry.step <= step]
    rows: list[tuple[str, Any]] = [("steps", step)] if step else []
    if entries and step:
        average = smoothed([entry.loss for entry in entries])[-1]
        rows.append(("training loss, averaged", f"{average:.4f}"))
    losses = [e.validation_loss for e in entries if e.validation_loss is not None]
    if losses:
        rows.append(("validation loss", f"{losses[-1]:.4f}" if step else f"{min(losses):.4f}"))
    return rows


def _cell(value: Any) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")


_USE = """\
## Use

With transformers:

```python
from transformers import pipeline

generate = pipeline("text-generation", model="<this repository or folder>")
print(generate("The", max_new_tokens=50)[0]["generated_text"])
```

With gpt_2_simple:

```python
import gpt_2_simple as gpt2

gpt2.import_huggingface("<this repository or folder>", model_name="mine")
sess = gpt2.start_tf_sess()
gpt2.generate(sess, model_name="mine", length=50)
```"""
