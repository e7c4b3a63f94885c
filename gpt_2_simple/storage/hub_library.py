"""The huggingface_hub library in; its errors as Python's, which name the remedy, out."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import ModuleType


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
