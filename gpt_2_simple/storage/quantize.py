"""A run's or a model's name in, the file of its int8 weights out."""

from __future__ import annotations

from ..common.folders import read_hparams, run_folder
from ..common.report import say
from ..common.settings import settings_function
from . import runs
from .adapter_merge import MergedAdapter
from .load import find_source, quantized_weights
from .settings import LoadSettings, QuantizeSettings


@settings_function(QuantizeSettings)
def quantize(settings: QuantizeSettings) -> str:
    """Makes the int8 weights of a run or a model, which load_gpt2(precision="int8") reads.

    Without this, the first such load makes them. They lie beside the checkpoint, or in the user's
    cache folder if that place is read-only. Weights that are trained further get new ones.

    Args:
        settings: each of them is an argument.

    Returns:
        The file's absolute path.

    Raises:
        FileNotFoundError: there is no such run, model, checkpoint or adapter; lists those there
            are.
        OSError: the file can be written nowhere.
        ValueError: a setting is out of range, or the files do not fit together, or a weight is not
            a finite number.
    """
    load = LoadSettings(
        settings.checkpoint, settings.run_name, settings.checkpoint_dir, settings.model_name,
        settings.model_dir, adapter=settings.adapter,
    )  # fmt: skip
    run = None
    if not load.model_name and load.adapter is None:
        run = run_folder(load.checkpoint_dir, load.run_name, or_model=True)
    path = runs.retry_while_trained(run, lambda: _quantize(load))
    say(f"The int8 weights are in {path}")
    return path


def _quantize(load: LoadSettings) -> str:
    source = find_source(load)
    hparams = read_hparams(source.folder)
    changes = None
    if source.adapter is not None:
        changes = MergedAdapter(source.adapter, source.prefix, hparams)
    return quantized_weights(source.prefix, hparams, source.adapter, changes).path
