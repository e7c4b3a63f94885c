"""The flag --json: what a command has made or found in, JSON on standard output out."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable
from typing import Annotated, Any, ClassVar

from ..common.report import say, verbosity
from ..common.settings import Setting, Settings
from .parser import Options

OUTPUT = "output"


@dataclasses.dataclass(frozen=True)
class JsonSettings(Settings):
    """Whether a program reads what the command prints."""

    GROUPS: ClassVar[tuple[str, ...]] = (OUTPUT,)

    # fmt: off
    json: Annotated[bool, Setting(OUTPUT, "Print JSON and nothing else, for programs")] = False
    # fmt: on


def print_json(value: Any) -> None:
    """Prints a value for programs."""
    say(json.dumps(value, indent=2))


def tells(
    name: str, make: Callable[[Options], object], says_anyway: bool = False
) -> Callable[[Options], int]:
    """What runs a command that makes something; it returns the exit status 0.

    Args:
        name: what `make` returns, such as the path of what was made; with --json an object with
            this name is all that is printed.
        make: takes the other options.
        says_anyway: whether what was made is also printed without --json.
    """

    def run(options: Options) -> int:
        options = dict(options)
        as_json = options.pop("json", False)
        with verbosity(0) if as_json else contextlib.nullcontext():
            made = make(options)
        if as_json:
            print_json({name: made})
        elif says_anyway:
            say(made)
        return 0

    return run
