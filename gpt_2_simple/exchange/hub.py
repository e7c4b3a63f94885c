"""The name of a model on the Hugging Face hub in, its folder in the cache out.

The huggingface_hub library does the work: its cache, its token, and its variables HF_ENDPOINT,
HF_HOME and HF_HUB_OFFLINE.
"""

from __future__ import annotations

import os

from ..storage.hub_library import load_library, plain_errors
from .config_file import CONFIG_FILE, read_config

# What an import reads. Other files of a repository may be as large as its weights.
_WANTED = (
    "model.safetensors",
    "model.safetensors.index.json",
    "model-*-of-*.safetensors",
    "tokenizer.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "tokenizer_config.json",
)


def download(repo_id: str, revision: str | None) -> str:
    """Downloads a model of the hub, or what the cache lacks of it; returns its folder there.

    Its config.json comes first: what is not GPT-2 is refused before its weights are downloaded.

    Raises:
        ConnectionError: the hub cannot be reached, and the cache lacks the model.
        FileNotFoundError: there is no such model or revision, or it has no safetensors.
        PermissionError: the hub asks for a token that may read it.
        ValueError: it is not GPT-2, or `repo_id` cannot be a name.
    """
    library = load_library()
    with plain_errors(library, repo_id):
        config = library.hf_hub_download(repo_id, CONFIG_FILE, revision=revision)
    read_config(os.path.dirname(config))
    with plain_errors(library, repo_id):
        folder: str = library.snapshot_download(
            repo_id, revision=revision, allow_patterns=[CONFIG_FILE, *_WANTED]
        )
    if not any(name.endswith(".safetensors") for name in os.listdir(folder)):
        raise FileNotFoundError(pickle_message(repo_id, "no .safetensors"))
    return folder


def pickle_message(source: str, has: str) -> str:
    """What to do with a model that has its weights in pickles only."""
    return (
        f"{source} has {has}: its weights are pickles, which can run any program when they are "
        "read, so they are not. Where you trust them, make safetensors of them by transformers: "
        f"AutoModelForCausalLM.from_pretrained({source!r}).save_pretrained('converted'), and "
        "AutoTokenizer likewise; then import 'converted'"
    )
