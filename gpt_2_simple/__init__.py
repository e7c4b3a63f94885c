"""Fine-tune GPT-2 on your own text, and generate from it, on TensorFlow graph sessions.

    import gpt_2_simple as gpt2

    gpt2.download_gpt2(model_name="124M")            # models/124M/
    sess = gpt2.start_tf_sess()
    gpt2.finetune(sess, "shakespeare.txt", model_name="124M", steps=1000)   # checkpoint/run1/
    gpt2.generate(sess)

In a later session, `gpt2.load_gpt2(sess)` loads the run again. Without a download,
`gpt2.create_gpt2()` makes a small model to train from nothing.
"""

from __future__ import annotations

import importlib
import os
import sys
from typing import TYPE_CHECKING, Any

# On many CPUs TensorFlow leaves oneDNN off, though it halves a training step there. The variable is
# read when TensorFlow is imported.
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")

if TYPE_CHECKING:
    from .gpt_2 import *  # noqa: F403

__all__ = [
    "add_tokens",
    "cmd",
    "copy_checkpoint_from_gdrive",
    "copy_checkpoint_to_gdrive",
    "copy_file_from_gdrive",
    "copy_file_to_gdrive",
    "create_gpt2",
    "distributed",
    "download_gpt2",
    "encode_csv",
    "encode_dataset",
    "encoder",
    "export_gguf",
    "export_huggingface",
    "finetune",
    "generate",
    "generate_stream",
    "generate_to_file",
    "generation_memory_plan",
    "get_available_gpus",
    "get_tarfile_name",
    "import_huggingface",
    "is_gpt2_downloaded",
    "is_mounted",
    "list_models",
    "list_runs",
    "load_gpt2",
    "memory_plan",
    "memory_saving_gradients",
    "merge_adapter",
    "model",
    "mount_gdrive",
    "next_token_probs",
    "os",
    "play",
    "plot_history",
    "push_to_hub",
    "quantize",
    "reset_session",
    "sample",
    "score",
    "serve",
    "start_tf_sess",
    "tf",
]


_MODULES = {"distributed", "encoder", "gpt_2", "memory_saving_gradients", "model", "sample"}


def __getattr__(name: str) -> Any:
    """Imports the public functions, and TensorFlow with them, when one is first asked for."""
    if name not in __all__ and name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if "ipykernel" in sys.modules and "tensorflow" not in sys.modules:
        _filter_notebook()
    if name in _MODULES:
        return importlib.import_module(f".{name}", __name__)
    return getattr(importlib.import_module(".gpt_2", __name__), name)


def _filter_notebook() -> None:
    """Keeps TensorFlow's notes, which no setting turns off, out of the notebook's cells."""
    from .common import report, stderr_filter

    if report.in_notebook():
        stderr_filter.filter_notebook()


def __dir__() -> list[str]:
    """Lists the public names."""
    return sorted({*globals(), *__all__})
