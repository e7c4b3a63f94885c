"""The name of a model on the Hugging Face hub in, its folder in the cache out.

The huggingface_hub library does the work: its cache, its token, and its variables HF_ENDPOINT,
HF_HOME and HF_HUB_OFFLINE.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from types import ModuleType

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


def load_library() -> ModuleType:
    """The huggingface_hub library. Raises ImportError, with the pip line, if it is missing."""
    try:
        import huggingface_hub
        import huggingface_hub.errors
    except ImportError as error:
        raise ImportError(
            'models on the hub need the huggingface_hub library: pip install "gpt_2_simple[hub]"'
        ) from error
    return huggingface_hub


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


# Packages whose errors mean that the network failed: of huggingface_hub's releases, old and new.
_NETWORK_PACKAGES = ("requests", "urllib3", "httpx", "httpx2", "httpcore", "httpcore2", "hf_xet")


@contextlib.contextmanager
def plain_errors(library: ModuleType, repo_id: str) -> Iterator[None]:
    """Turns huggingface_hub's errors within the block into Python's, which name the remedy.

    Raises:
        ConnectionError: the hub cannot be reached.
        FileNotFoundError: it has no such repository, revision or file.
        PermissionError: it wants another token.
        ValueError: `repo_id` cannot be a name.
    """
    try:
        yield
    except Exception as error:
        plain = _plain_error(library.errors, repo_id, error)
        if plain is None:
            raise
        raise plain from error


def _plain_error(errors: ModuleType, repo_id: str, error: Exception) -> Exception | None:
    cause = error.__cause__ or error.__context__
    words = [error, cause] if isinstance(error, RuntimeError) and cause else [error]
    reason = " ".join(" ".join(map(str, words)).split()).rstrip(".") + "."
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.HFValidationError):
        return ValueError(
            f"{repo_id!r} is neither a folder nor a name on the hub, which is '<user>/<model>'"
        )
    if isinstance(error, errors.GatedRepoError) or status == 403:
        return PermissionError(
            f"the hub refuses {repo_id}: {reason} Give a token that may use it, in the variable "
            "HF_TOKEN or by `hf auth login`"
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return FileNotFoundError(
            f"{repo_id!r} is no folder here, and no model on the hub that this token may see: "
            "look at the name; a private model needs the variable HF_TOKEN or `hf auth login`"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return FileNotFoundError(f"{repo_id} on the hub has no such revision: {reason}")
    if isinstance(error, errors.LocalEntryNotFoundError):
        return _unreachable(repo_id, reason)
    if isinstance(error, errors.EntryNotFoundError):
        return FileNotFoundError(f"{repo_id} on the hub lacks a file: {reason}")
    if status == 401:
        return PermissionError(
            f"the hub does not accept the token for {repo_id}: {reason} Give another in the "
            "variable HF_TOKEN or by `hf auth login`"
        )
    is_network = type(error).__module__.partition(".")[0] in _NETWORK_PACKAGES
    if is_network or status is not None or isinstance(error, (ConnectionError, RuntimeError)):
        return _unreachable(repo_id, f"{type(error).__name__}: {reason}")
    return None


def _unreachable(repo_id: str, reason: str) -> ConnectionError:
    return ConnectionError(
        f"the hub failed for {repo_id}: {reason} Call it again to go on: what has been transferred "
        "is kept. Models can also be read from, and written to, a folder"
    )
