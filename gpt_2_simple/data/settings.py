"""The settings that tell how a dataset is read or encoded, each stated once; no TensorFlow."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar

from ..common.settings import Setting, Settings
from ..encoder import END_OF_TEXT

SAMPLING = ("random", "epoch")

GROUP = "text, model and run"

COMBINE = Setting(
    group=GROUP, help="Join small files until they hold this many characters", at_least=1
)
ENCODING = Setting(
    group=GROUP,
    help="Encoding of the text files. None for UTF-8, or what a byte order mark tells",
    default_help="UTF-8",
)
COLUMN = Setting(
    group=GROUP,
    help="Column of a table, by name or by number from 0. None for the first",
    default_help="the first",
)
TEMPLATE = Setting(
    group=GROUP,
    help="Several columns of a table, as in '{title}: {body}', instead of `column`",
    default_help="one column",
)
HEADER = Setting(
    group=GROUP,
    help="Whether a table's first row names its columns. None finds out by looking at it",
    default_help="found out by looking at it",
)
DELIMITER = Setting(
    group=GROUP,
    help="Character between the columns of a table. None for a tab in a .tsv, and otherwise a "
    "comma, or `;`, a tab or `|` if all rows agree on it",
    default_help="found out by looking at the rows",
)
PAD_DOCUMENTS = Setting(
    group="training", help="No window reaches from one document (a file, a row) into the next"
)
CACHE_DIR = Setting(
    group=GROUP,
    help="Folder that keeps the tokens of more than 20 MB of text for the next call. None for "
    "$GPT_2_SIMPLE_CACHE, or gpt_2_simple in the user's cache folder",
    default_help="$GPT_2_SIMPLE_CACHE, or ~/.cache/gpt_2_simple",
    per_call=True,
)

START_TOKEN = "<|startoftext|>"

FILES = "files"  # the one heading of `encode --help` and `encode_csv --help`


def _in_files(setting: Setting, **changes: Any) -> Setting:
    return dataclasses.replace(setting, group=FILES, **changes)


@dataclasses.dataclass(frozen=True)
class EncodeSettings(Settings):
    """The settings of encode_dataset(); gpt-2-simple 0.8.1's come first, in its order."""

    GROUPS: ClassVar = (FILES,)

    # fmt: off
    file_path: Annotated[str | Sequence[str], Setting(
        FILES, "Text to encode: a text file, a folder, a glob pattern, a .csv, .tsv, .json or "
        ".jsonl, or several of these")]
    model_dir: Annotated[str, Setting(FILES, "Folder that holds the models")] = "models"
    out_path: Annotated[str | os.PathLike[str], Setting(
        FILES, "File to write: an .npz, which gpt-2-simple 0.8.1 reads too, or a .tokens file, "
        "which is read without being loaded into memory")] = "text_encoded.npz"
    model_name: Annotated[str, Setting(FILES, "Model whose vocabulary is used")] = "124M"
    combine: Annotated[int, _in_files(COMBINE)] = 50000
    _: dataclasses.KW_ONLY
    encoding: Annotated[str | None, _in_files(ENCODING)] = None
    column: Annotated[str | int | None, _in_files(COLUMN)] = None
    template: Annotated[str | None, _in_files(TEMPLATE)] = None
    header: Annotated[bool | None, _in_files(HEADER)] = None
    delimiter: Annotated[str | None, _in_files(DELIMITER)] = None
    pad_documents: Annotated[bool, Setting(
        FILES, "Make each document (a file, a row) a chunk of its own, for "
        "finetune(pad_documents=True)")] = False
    cache_dir: Annotated[str | None, _in_files(CACHE_DIR)] = None
    verbose: Annotated[int | bool, Setting(FILES, "0 prints nothing but errors")] = 1
    # fmt: on


@dataclasses.dataclass(frozen=True)
class EncodeCsvSettings(Settings):
    """The settings of encode_csv(); gpt-2-simple 0.8.1's come first, in its order."""

    GROUPS: ClassVar = (FILES,)

    # fmt: off
    csv_path: Annotated[str | os.PathLike[str], Setting(
        FILES, "Table to read: a .csv, .tsv, .json or .jsonl, or one of these as .gz")]
    out_path: Annotated[str | os.PathLike[str], Setting(
        FILES, "Text file to write, in UTF-8")] = "csv_encoded.txt"
    header: Annotated[bool | None, _in_files(HEADER, default_help=None)] = True
    start_token: Annotated[str, Setting(FILES, "Text to put before each row")] = START_TOKEN
    end_token: Annotated[str, Setting(
        FILES, "Text to put after each row, before a line break")] = END_OF_TEXT
    _: dataclasses.KW_ONLY
    column: Annotated[str | int | None, _in_files(COLUMN)] = None
    template: Annotated[str | None, _in_files(TEMPLATE)] = None
    delimiter: Annotated[str | None, _in_files(DELIMITER)] = None
    encoding: Annotated[str | None, _in_files(
        ENCODING,
        help="Encoding of the table. None for UTF-8, or what a byte order mark tells")] = None
    # fmt: on
