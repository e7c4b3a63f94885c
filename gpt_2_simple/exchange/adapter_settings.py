"""The settings of merge_adapter(), each stated once; no TensorFlow."""

from __future__ import annotations

import dataclasses
from typing import Annotated, ClassVar

from ..common.settings import Setting, Settings, fields_of
from ..storage.settings import MODEL_OR_RUN, LoadSettings

_LOAD = fields_of(LoadSettings)


@dataclasses.dataclass(frozen=True)
class MergeSettings(Settings):
    """What merge_adapter() can be told."""

    GROUPS: ClassVar = (MODEL_OR_RUN,)

    # fmt: off
    run_name: Annotated[str, Setting(
        MODEL_OR_RUN, "Run whose adapter is merged: a folder in `checkpoint_dir`"
        )] = LoadSettings.run_name
    merged_name: Annotated[str | None, Setting(
        MODEL_OR_RUN, "Run to write: a new folder in `checkpoint_dir`",
        default_help="the run's name, or the adapter's, and -merged")] = None
    checkpoint: Annotated[str | int, _LOAD["checkpoint"].setting] = LoadSettings.checkpoint
    checkpoint_dir: Annotated[
        str, _LOAD["checkpoint_dir"].setting] = LoadSettings.checkpoint_dir
    model_dir: Annotated[str, _LOAD["model_dir"].setting] = LoadSettings.model_dir
    _: dataclasses.KW_ONLY
    adapter: Annotated[str | None, Setting(
        MODEL_OR_RUN, "Adapter to merge instead of a run's: a folder in peft's format, or a name "
        "on the Hugging Face hub", default_help="none: that of the run")] = None
    model_name: Annotated[str | None, Setting(
        MODEL_OR_RUN, "Model that `adapter` was trained on, if that does not tell it",
        default_help="none")] = None
    # fmt: on

    def __post_init__(self) -> None:
        """Raises ValueError for a wrong value, or a model without an adapter."""
        super().__post_init__()
        if self.model_name is not None and self.adapter is None:
            raise ValueError(f"model_name={self.model_name!r} is for an adapter: give adapter, too")

    @property
    def target(self) -> str:
        """The name of the run to write."""
        if self.merged_name is not None:
            return self.merged_name
        name = self.run_name if self.adapter is None else self.adapter.replace("\\", "/")
        return f"{name.rstrip('/').rpartition('/')[2]}-merged"
