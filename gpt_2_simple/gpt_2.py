"""The public functions, for scripts that import `gpt_2_simple.gpt_2`; there is no logic here."""

from __future__ import annotations

# Scripts take these two from here, as 0.8.1 had them.
import os

import tensorflow as tf

from . import distributed, encoder, memory_saving_gradients, model, sample
from .data.dataset import encode_csv, encode_dataset
from .exchange.adapters import merge_adapter
from .exchange.gguf import export_gguf
from .exchange.huggingface import export_huggingface, import_huggingface
from .exchange.push import push_to_hub
from .generation.generate import generate, generate_stream, generate_to_file
from .generation.memory_plan import generation_memory_plan
from .generation.scoring import next_token_probs, score
from .serving.launch import serve
from .serving.play import play
from .session import get_available_gpus, reset_session, start_tf_sess
from .storage.add_tokens import add_tokens
from .storage.create import create_gpt2
from .storage.download import download_gpt2, is_gpt2_downloaded
from .storage.drive import (
    copy_checkpoint_from_gdrive,
    copy_checkpoint_to_gdrive,
    copy_file_from_gdrive,
    copy_file_to_gdrive,
    get_tarfile_name,
    is_mounted,
    mount_gdrive,
)
from .storage.listing import list_models, list_runs
from .storage.load import load_gpt2
from .storage.quantize import quantize
from .training.finetune import finetune
from .training.history import plot_history
from .training.memory_plan import memory_plan

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


def cmd() -> None:
    """Runs the command line, as the console script `gpt_2_simple` does."""
    # The one import that points up: scripts know this name here.
    from .cli.main import main

    raise SystemExit(main())
