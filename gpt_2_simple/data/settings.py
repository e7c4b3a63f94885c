"""The settings that tell how a dataset is read, each stated once for all that read one."""

from __future__ import annotations

from ..common.settings import Setting

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
