"""Commands and command line arguments in; the command that is meant, and its options by name, out.

Flags are made from settings classes. Nothing here imports TensorFlow.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import os
import re
import shlex
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from ..common.report import complain
from ..common.settings import Field, Settings, fields_of

PROGRAM = "gpt_2_simple"
DEBUG_VARIABLE = "GPT2_DEBUG"

# What was given on the command line, by the settings' names.
Options = dict[str, Any]


class Command(NamedTuple):
    """A subcommand.

    Attributes:
        run: takes the given options, returns the exit status.
        summary: one sentence.
        examples: command lines to paste.
        settings: the settings classes whose fields are its flags; of fields of one name, the first
            class's counts.
        own_settings: the command line's own; they are checked here, and wrong ones are wrong usage.
        own_defaults: defaults that differ from the settings'.
        positional: the flag that may be given without its name.
    """

    run: Callable[[Options], int]
    summary: str
    examples: Sequence[str]
    settings: Sequence[type[Settings]]
    own_settings: type[Settings] | None = None
    own_defaults: Mapping[str, Any] = {}
    positional: str | None = None

    @property
    def flags(self) -> dict[str, Field]:
        """The fields that are flags, by name."""
        found: dict[str, Field] = {}
        for cls in self.classes:
            for name, field in fields_of(cls).items():
                if field.setting.group is not None:
                    found.setdefault(name, field)
        return found

    @property
    def classes(self) -> list[type[Settings]]:
        """All of its settings classes."""
        return [*self.settings, *([self.own_settings] if self.own_settings else [])]

    @property
    def groups(self) -> dict[str, list[Field]]:
        """The flags by the heading under which --help lists them."""
        titles = dict.fromkeys(title for cls in self.classes for title in cls.GROUPS)
        flags = self.flags.values()
        return {title: [f for f in flags if f.setting.group == title] for title in titles}

    def default(self, field: Field) -> Any:
        """What counts if the flag is not given; MISSING if it has to be given."""
        return self.own_defaults.get(field.name, field.default)

    def is_required(self, name: str) -> bool:
        """Whether the command needs this flag."""
        return self.flags[name].default is dataclasses.MISSING


# gpt-2-simple 0.8.1 had one list of flags for both its modes: each command accepts the other's, and
# says that it makes no use of them.
SHARED_BY_0_8_1 = ("finetune", "generate")


def parse(
    commands: Mapping[str, Command],
    argv: Sequence[str],
    legacy_flags: Sequence[str],
    complete: Callable[[argparse.ArgumentParser, Mapping[str, Command]], object] = lambda *_: None,
) -> tuple[Command, Options]:
    """Reads a command line.

    Args:
        commands: by name.
        argv: the arguments after the program's name.
        legacy_flags: the flags that finetune and generate both accept, though only one uses them.
        complete: is called with the parser first, and ends the process if the shell asked for
            completions.

    Returns:
        The command, and what was given for it by name.

    Raises:
        SystemExit: after --help or --version (0), or wrong usage (2), which is then told.
    """
    argument_parser = _parser(commands, legacy_flags)
    complete(argument_parser, commands)
    given = vars(argument_parser.parse_args(_command_first(argv)))
    name, parser, words = given.pop("name"), given.pop("subparser"), given.pop("words")
    del given["debug"]
    command = commands[name]
    if words:
        # gpt-2-simple 0.8.1 took a dataset for generate too, and ignored it.
        if name == "generate" and not os.path.exists(words[0]):
            parser.error(
                f"generate takes no {words[0]!r}, which is no file either; "
                f"for a run of that name give --run_name {shlex.quote(words[0])}"
            )
        taker = "dataset" if name == "generate" else command.positional
        is_repeatable = taker in command.flags and command.flags[taker].setting.repeatable
        _take_words(parser, taker, words, given, taker == "dataset" or is_repeatable)
    wanted = command.positional
    if wanted is not None and command.is_required(wanted) and wanted not in given:
        parser.error(f"{name} needs {wanted.upper()}; see '{parser.prog} --help'")
    for flag in [flag for flag in given if flag not in command.flags]:
        complain(f"{PROGRAM}: note: {name} makes no use of {flag} {given.pop(flag)!r}")
    if command.own_settings is not None:
        own = fields_of(command.own_settings)
        try:
            command.own_settings(**{flag: given[flag] for flag in given if flag in own})
        except ValueError as error:
            parser.error(in_shell_words(str(error), commands, command.flags))
    return command, given


def in_shell_words(message: str, commands: Collection[str], flags: Iterable[str]) -> str:
    """An error's message in the words of the command line.

    Args:
        message: it names settings as Python does, `overwrite=True` or `steps=0`.
        commands: the commands' names. A call such as `gpt2.create_gpt2()` becomes its command.
        flags: the names of the flags; `--overwrite` and `--steps 0` stand for them.
    """

    def as_flag(match: re.Match[str]) -> str:
        return f"--{match[1]}" if match[2] == "True" else f"--{match[1]} {match[2]}"

    def as_command(match: re.Match[str]) -> str:
        name = match[1].removesuffix("_gpt2")
        if name not in commands:
            return match[0]
        arguments = [word for word in match[2].split(", ") if word not in ("", "sess")]
        words = [re.sub(r"^(\w+)=(.*)$", as_flag, word) for word in arguments]
        return " ".join([PROGRAM, name, *words])

    message = re.sub(r"gpt2\.(\w+)\(((?:[^()']|'[^']*')*)\)", as_command, message)
    value = r"""('[^']*'|"[^"]*"|[^\s,;:()]*[^\s,;:().])"""
    return re.sub(rf"(?<![\w./-])({'|'.join(flags)})={value}", as_flag, message)


def _command_first(argv: Sequence[str]) -> list[str]:
    """Puts the command before the words and these before the flags, as argparse needs them.

    It also turns gpt-2-simple 0.8.1's `--mode finetune` into the command.
    """
    command: list[str] = []
    words: list[str] = []
    flags: list[str] = []
    rest = list(argv)
    while rest:
        token = rest.pop(0)
        if not _is_flag(token):
            words.append(token)
            continue
        name, equals, value = token.partition("=")
        if name.startswith("--"):  # --run-name is --run_name
            name = "--" + name[2:].replace("-", "_")
            token = name + equals + value
        takes_value = not equals and name not in ("-h", "--help", "--version", "--debug")
        values = [rest.pop(0)] if takes_value and rest and not _is_flag(rest[0]) else []
        if name == "--mode":
            command = [value] if equals else values
        else:
            flags += [token, *values]
    return command + words + flags


def _is_flag(token: str) -> bool:
    return re.match(r"-[A-Za-z-]", token) is not None and " " not in token.partition("=")[0]


def _take_words(
    parser: argparse.ArgumentParser,
    name: str | None,
    words: list[str],
    given: Options,
    takes_several: bool,
) -> None:
    """Gives the words that stand without a flag to the flag that they stand for."""
    if name is None:
        parser.error(f"unrecognized: {' '.join(words)!r}")
    if name in given:
        parser.error(f"--{name} {given[name]!r} was given, and {' '.join(words)!r} beside it")
    if len(words) > 1 and not takes_several:
        parser.error(f"{' '.join(words[1:])!r} is more than one {name}")
    given[name] = words if len(words) > 1 else words[0]


# --- argparse -------------------------------------------------------------------------------------


def _parser(
    commands: Mapping[str, Command], legacy_flags: Sequence[str]
) -> argparse.ArgumentParser:
    layout: dict[str, Any] = {
        "add_help": False,
        "formatter_class": argparse.RawDescriptionHelpFormatter,
    }
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        usage=f"{PROGRAM} COMMAND [flags]",
        description="Fine-tune GPT-2 on your own text and generate from it.",
        epilog=_examples([command.examples[0] for command in commands.values()])
        + f"\n\n'{PROGRAM} COMMAND --help' lists the flags of a command.\n"
        "Exit status: 0 done, 1 error, 2 wrong usage, 130 stopped by Ctrl-C.",
        **layout,
    )
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, command in commands.items():
        subparser = subparsers.add_parser(
            name,
            help=command.summary,
            description=command.summary,
            epilog=_examples(command.examples),
            prog=f"{PROGRAM} {name}",
            usage=" ".join([PROGRAM, name, *_positional(command), "[flags]"]),
            **layout,
        )
        subparser.set_defaults(name=name, subparser=subparser)
        _add_flags(subparser, command)
        if name in SHARED_BY_0_8_1:
            _add_hidden_flags(subparser, command, commands, legacy_flags)
        _add_general(subparser)
    _add_general(parser).add_argument(
        "--version", action="version", version=f"{PROGRAM} {_version()}", help="Show the version"
    )
    return parser


def _version() -> str:
    try:
        return importlib.metadata.version(PROGRAM)
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"


def _examples(lines: Sequence[str]) -> str:
    return "\n  ".join(["examples:", *lines])


def _positional(command: Command) -> Iterator[str]:
    if command.positional is not None:
        name = command.positional.upper()
        yield name if command.is_required(command.positional) else f"[{name}]"


def _add_general(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    group = parser.add_argument_group("general")
    group.add_argument("-h", "--help", action="help", help="Show this help")
    group.add_argument(
        "--debug",
        action="store_true",
        help=f"Show an error's traceback; so does the variable {DEBUG_VARIABLE}=1",
    )
    return group


def _add_flags(parser: argparse.ArgumentParser, command: Command) -> None:
    parser.add_argument("words", nargs="*", help=argparse.SUPPRESS)
    for title, fields in command.groups.items():
        group = parser.add_argument_group(title)
        for field in fields:
            _add_flag(group, field, help_text(command, field))


def _add_hidden_flags(
    parser: argparse.ArgumentParser,
    command: Command,
    commands: Mapping[str, Command],
    legacy_flags: Sequence[str],
) -> None:
    for other in SHARED_BY_0_8_1:
        flags = commands[other].flags
        for name in legacy_flags:
            if name in flags and name not in command.flags:
                _add_flag(parser, flags[name], argparse.SUPPRESS)


def help_text(command: Command, field: Field) -> str:
    """What --help says of a flag: its meaning and its default."""
    return f"{field.setting.shell_help} (default: {_default_text(command, field)})"


def _default_text(command: Command, field: Field) -> str:
    default = command.default(field)
    if default is dataclasses.MISSING:
        return "none; required"
    text = field.setting.default_help or repr(default)
    return text if default == field.default else f"{default!r}; in Python {field.default!r}"


def _add_flag(group: Any, field: Field, text: str) -> None:
    kind, metavar = _kind(field)
    options: dict[str, Any] = {"type": kind, "metavar": metavar}
    if kind is _boolean:
        options |= {"nargs": "?", "const": True}
    if field.setting.repeatable:
        options["action"] = "append"
    group.add_argument(f"--{field.name}", default=argparse.SUPPRESS, help=text, **options)


def _kind(field: Field) -> tuple[Callable[[str], Any], str]:
    """What makes the flag's value from its text, and how --help names the value."""
    kinds = set(field.kinds)
    if {int, str} <= kinds:
        return _text_or_number, "TEXT"
    if int in kinds:
        return _number(int, field.setting.none_word), "N"
    if bool in kinds:
        return _boolean, "True|False"
    if float in kinds:
        return _number(float, field.setting.none_word), "X"
    return str, "TEXT"


def _number(kind: type, none_word: str | None) -> Callable[[str], Any]:
    if none_word is None:
        return kind

    def number(text: str) -> Any:
        return None if text == none_word else kind(text)

    number.__name__ = kind.__name__  # argparse says "invalid int value"
    return number


def _boolean(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither True nor False")
    return text.lower() == "true"


def _text_or_number(text: str) -> str | int:
    return int(text) if re.fullmatch(r"\d+", text) else text
