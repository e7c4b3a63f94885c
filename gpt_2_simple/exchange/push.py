"""A run or a model in, a repository on the Hugging Face hub out."""

from __future__ import annotations

import os

from ..common.files import temporary_folder
from ..common.report import say
from ..common.settings import settings_function
from ..storage.hub_library import load_library, plain_errors
from . import huggingface
from .settings import PushSettings
from .weights import use_weights

# What an earlier upload may have left that this one does not replace.
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "model-*-of-*.safetensors")


@settings_function(PushSettings)
def push_to_hub(settings: PushSettings) -> str:
    """Exports a run or a model, and uploads it to the Hugging Face hub.

    The export lies in a temporary folder meanwhile; the variable TMPDIR chooses another disk for
    it. Weights of an earlier upload are replaced in the same call.

    Args:
        settings: each of them is an argument.

    Returns:
        The address of the repository.

    Raises:
        ConnectionError: the hub cannot be reached, or broke the connection.
        FileNotFoundError: there is no such run, model or checkpoint.
        ImportError: huggingface_hub is missing: `pip install "gpt_2_simple[hub]"`.
        PermissionError: the hub refuses the token, or the token may not write there.
        ValueError: a setting is out of range, or the weights cannot be exported; see
            export_huggingface().
    """
    library = load_library()
    max_bytes = huggingface.parse_size("max_shard_size", settings.max_shard_size)
    use_weights(settings, lambda weights: None)  # what is missing here is told before the hub acts
    api = library.HfApi(token=settings.token)
    with plain_errors(library, settings.repo_id):
        repository = api.create_repo(settings.repo_id, private=settings.private, exist_ok=True)
    with temporary_folder(prefix="gpt_2_simple-push-") as folder:
        path = os.path.join(folder, "export")
        remedy = "folder for temporary files in the variable TMPDIR"
        huggingface.write_export(path, settings, max_bytes, remedy)
        with plain_errors(library, settings.repo_id):
            api.upload_folder(
                repo_id=repository.repo_id,
                folder_path=path,
                commit_message="Upload a model from gpt_2_simple",
                delete_patterns=list(_WEIGHTS),
            )
    say(f"Pushed to {repository}")
    return str(repository)
