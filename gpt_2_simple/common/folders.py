"""Names of models and runs in, their folders and hyper-parameters out."""

from __future__ import annotations

import dataclasses
import json
import os
from glob import glob

from .hparams import HParams, default_hparams
from .published import MODEL_NAMES


def model_folder(model_dir: str, model_name: str) -> str:
    """The folder of a model. Raises FileNotFoundError if there is none; lists the models."""
    folder = os.path.join(model_dir, model_name)
    if not os.path.isfile(os.path.join(folder, "hparams.json")):
        meant = model_name.upper()
        if meant != model_name and meant in MODEL_NAMES:
            raise FileNotFoundError(f"no model in {folder}; did you mean model_name={meant!r}?")
        raise FileNotFoundError(
            f"no model in {folder}{_listing(model_dir, 'models')}; get it by "
            f"gpt2.download_gpt2(model_dir={model_dir!r}, model_name={model_name!r}), "
            "or make a small one by gpt2.create_gpt2()"
        )
    return folder


def run_folder(checkpoint_dir: str, run_name: str, or_model: bool = False) -> str:
    """The folder of a run. Raises FileNotFoundError if there is none; lists the runs.

    With or_model=True, the error says that a model can be named, too.
    """
    folder = os.path.join(checkpoint_dir, run_name)
    if not os.path.isfile(os.path.join(folder, "hparams.json")):
        lacking = ": it has no hparams.json" if os.path.isdir(folder) else ""
        raise FileNotFoundError(
            f"no run in {folder}{lacking}{_listing(checkpoint_dir, 'runs')}; make it by "
            f"gpt2.finetune(sess, dataset, run_name={run_name!r})"
            + (", or name a model instead of a run, such as model_name='124M'" * or_model)
        )
    return folder


def _listing(parent: str, kind: str) -> str:
    """The models or runs in `parent`, for an error message."""
    # glob leaves out names that start with a dot: models that are being made.
    found = sorted(map(os.path.dirname, glob("*/hparams.json", root_dir=parent)))
    return f" ({kind} there: {', '.join(found)})" if found else f" ({parent} holds no {kind})"


def read_hparams(folder: str) -> HParams:
    """A folder's hyper-parameters.

    Raises:
        FileNotFoundError: the folder has no hparams.json.
        ValueError: it is not JSON, or a key is missing or unknown, or a value is wrong.
    """
    path = os.path.join(folder, "hparams.json")
    with open(path, encoding="utf-8-sig") as file:
        try:
            values = json.load(file)
        except ValueError as error:
            raise ValueError(f"{path} is not JSON ({error}); download or copy it again") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds {values!r} where an object of hyper-parameters should be")
    missing = sorted({f.name for f in dataclasses.fields(HParams)} - set(values))
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)}")
    hparams = default_hparams()
    try:
        hparams.override_from_dict(values)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if hparams.n_vocab < 1:
        raise ValueError(f"{path}: n_vocab={hparams.n_vocab} must be above 0")
    return hparams


def hparams_text(hparams: HParams) -> str:
    """The content of hparams.json."""
    return json.dumps(dataclasses.asdict(hparams), indent=2) + "\n"
