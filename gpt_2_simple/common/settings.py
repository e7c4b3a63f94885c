"""Settings that are stated once in; their checks, signatures, docstrings and records out.

A settings class is a frozen dataclass. Each field states its type, its default and, in a `Setting`,
what it means and which values it may have:

    batch_size: Annotated[int, Setting("training", "Windows in a batch", at_least=1)] = 1

`Settings` converts and checks the values. `settings_function` and `session_function` give the
signature and the docstring to the public function. `cli.parser` makes the flag.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import math
import numbers
import os
import re
import sys
import textwrap
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar, Concatenate, NamedTuple, ParamSpec, TypeVar, cast

import numpy as np

LINE_LENGTH = 100


@dataclasses.dataclass(frozen=True)
class Setting:
    """What a setting means, and which values it may have.

    Attributes:
        group: the heading under which `--help` lists the flag; None for no flag.
        help: one or more sentences without the last full stop. Other settings stand in backticks.
            Sentences that start with "In Python" or "None" are left out of --help, those that
            start with "On the command line" are left out of docstrings.
        at_least: the smallest number that it may be.
        at_most: the largest.
        above: every number that it may be is larger than this.
        below: every number that it may be is smaller than this.
        special: a value outside of that range with a meaning of its own: (value, meaning).
        choices: the words that it may be.
        default_help: the default in words, where its value does not tell.
        none_word: what stands for None on the command line.
        repeatable: whether the flag may be given several times, which makes a list.
        recorded: whether the run's settings.json keeps it.
        per_call: whether it may change without a notice when a run is resumed.
    """

    group: str | None
    help: str
    _: dataclasses.KW_ONLY
    at_least: float | None = None
    at_most: float | None = None
    above: float | None = None
    below: float | None = None
    special: tuple[Any, str] | None = None
    choices: Sequence[str] = ()
    default_help: str | None = None
    none_word: str | None = None
    repeatable: bool = False
    recorded: bool = True
    per_call: bool = False

    @property
    def python_help(self) -> str:
        """The help for a docstring."""
        return _without_sentences(self.help, "On the command line")

    @property
    def shell_help(self) -> str:
        """The help for --help: other settings are named as flags."""
        text = _without_sentences(self.help, "In Python", "None")
        return re.sub(r"`(\w+)`", r"--\1", text)


def _without_sentences(text: str, *starts: str) -> str:
    sentences = re.split(r"(?<=\.) (?=[A-Z'])", text)
    kept = [sentence for sentence in sentences if not sentence.startswith(starts)]
    return " ".join(kept).removesuffix(".")


class Field(NamedTuple):
    """A field of a settings class, read from its annotation.

    Attributes:
        name: the setting's name.
        kinds: those of int, float, bool, str and NoneType that its type names.
        is_open: whether its type names others too, which are not checked here.
        annotation: its type, without the Setting.
        default: its default; dataclasses.MISSING if it has to be given.
        keyword_only: whether it must be given by name.
        setting: what it means.
    """

    name: str
    kinds: tuple[type, ...]
    is_open: bool
    annotation: Any
    default: Any
    keyword_only: bool
    setting: Setting


@dataclasses.dataclass(frozen=True)
class Settings:
    """Base of the settings classes: converts each value to Python's own type and checks it.

    Attributes:
        GROUPS: the headings of --help, in order.
    """

    GROUPS: ClassVar[Sequence[str]] = ()

    def __post_init__(self) -> None:
        """Raises ValueError for a value of a wrong type or out of its range."""
        for field in fields_of(type(self)).values():
            value = convert(field, getattr(self, field.name))
            object.__setattr__(self, field.name, value)

    def recorded(self) -> dict[str, Any]:
        """The settings that a run's settings.json keeps, by name."""
        fields = fields_of(type(self)).values()
        return {f.name: getattr(self, f.name) for f in fields if f.setting.recorded}


# By class: reading annotations takes milliseconds, and each call of a public function needs them.
_fields: dict[type[Settings], dict[str, Field]] = {}


def fields_of(cls: type[Settings]) -> dict[str, Field]:
    """The fields of a settings class, by name, in the order of its signature."""
    if cls not in _fields:
        # Not typing.get_type_hints(): Python 3.10's refuses a class with dataclasses.KW_ONLY.
        names: dict[str, Any] = {}
        for base in reversed(cls.__mro__):
            names |= {**vars(sys.modules[base.__module__]), **vars(base)}
        # Annotations are strings only in modules that import them from __future__.
        hints = {
            f.name: eval(f.type, names) if isinstance(f.type, str) else f.type
            for f in dataclasses.fields(cls)
        }
        _fields[cls] = {f.name: _read_field(f, hints[f.name]) for f in dataclasses.fields(cls)}
    return _fields[cls]


def _read_field(field: dataclasses.Field[Any], hint: Any) -> Field:
    annotation, setting = typing.get_args(hint)
    is_union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    members = typing.get_args(annotation) if is_union else (annotation,)
    kinds = tuple(t for t in members if t in (int, float, bool, str, type(None)))
    is_open = len(kinds) < len(members)
    by_name = bool(field.kw_only)
    return Field(field.name, kinds, is_open, annotation, field.default, by_name, setting)


# --- values ---------------------------------------------------------------------------------------


def convert(field: Field, value: Any) -> Any:
    """A value as Python's own type, in the field's range.

    NumPy's scalars become Python's, paths become strings, and floats without a fraction whole
    numbers where a whole number is wanted.

    Raises:
        ValueError: it is of another type, or out of range; says what is wanted.
    """
    if value is None and type(None) in field.kinds:
        return None
    if isinstance(value, np.ndarray) and value.ndim == 0:
        value = value[()]
    for kind in field.kinds:
        converted = _as_kind(kind, value)
        if converted is not None and _is_in_range(field.setting, converted):
            return converted
    if field.is_open:
        return value
    raise ValueError(f"{field.name}={value!r} must be {_wanted(field)}")


def _as_kind(kind: type, value: Any) -> Any:
    """The value as int, float, bool or str; None if it is none."""
    is_bool = isinstance(value, (bool, np.bool_))
    # NumPy's float64 is one of Python's numbers, and its float32 is not.
    is_number = isinstance(value, (numbers.Real, np.integer, np.floating)) and not is_bool
    if kind is bool:
        return bool(value) if is_bool or (is_number and value in (0, 1)) else None
    if kind is str:
        return str(os.fsdecode(value)) if isinstance(value, (str, os.PathLike)) else None
    if kind not in (int, float) or not is_number:
        return None
    with contextlib.suppress(OverflowError):  # an infinite number, or a whole one that is too large
        if kind is float:
            return float(value)
        return int(value) if not math.isnan(value) and int(value) == value else None
    return None


def _is_in_range(setting: Setting, value: Any) -> bool:
    if isinstance(value, bool) or (setting.special and value == setting.special[0]):
        return True
    if isinstance(value, str):
        return not setting.choices or value in setting.choices
    return (
        (isinstance(value, int) or math.isfinite(value))
        and (setting.at_least is None or value >= setting.at_least)
        and (setting.at_most is None or value <= setting.at_most)
        and (setting.above is None or value > setting.above)
        and (setting.below is None or value < setting.below)
    )


def _wanted(field: Field) -> str:
    """What a value has to be, in words."""
    setting = field.setting
    words = ", ".join(map(repr, setting.choices))
    numeric = int in field.kinds or float in field.kinds
    if words and not numeric:
        return f"one of {words}"
    if bool in field.kinds:
        return "True or False"
    if not numeric:
        return "a string"
    noun = "a whole number" if int in field.kinds else "a number"
    limits = []
    if setting.at_least is not None and setting.at_most is not None:
        limits.append(f"from {setting.at_least} to {setting.at_most}")
    elif setting.at_least is not None:
        limits.append(f"{setting.at_least} or above")
    if setting.above is not None:
        limits.append(f"above {setting.above}")
    if setting.below is not None:
        limits.append(f"below {setting.below}")
    limit = " and ".join(limits)
    wanted = f"{noun}{', ' if limit[:1].isdigit() else ' '}{limit}".strip()
    if setting.special is not None:
        wanted += f" (or {setting.special[0]}: {setting.special[1]})"
    return f"{wanted}, or {words}" if words else wanted


# --- public functions -----------------------------------------------------------------------------

P = ParamSpec("P")
S = TypeVar("S", bound=Settings)
R = TypeVar("R")


def settings_function(
    settings: Callable[P, S],
) -> Callable[[Callable[[S], R]], Callable[P, R]]:
    """Makes a function (settings) into one that takes each setting as an argument.

    The public function has the settings' names, order and defaults in its signature. In its
    docstring, the line `settings: ...` becomes an entry for each of them.
    """
    signature = _signature(settings)

    def decorate(function: Callable[[S], R]) -> Callable[P, R]:
        @functools.wraps(function)
        def public(*args: P.args, **kwargs: P.kwargs) -> R:
            arguments = _bind(function, signature, args, kwargs)
            return function(settings(**arguments))  # type: ignore[call-arg]

        return _published(public, function, signature, settings)

    return decorate


def session_function(
    settings: Callable[P, S],
    *,
    omit: Sequence[str] = (),
    positional: Sequence[str] | None = None,
    defaults: Mapping[str, Any] = MappingProxyType({}),
) -> Callable[[Callable[[Any, S], R]], Callable[Concatenate[Any, P], R]]:
    """Makes a function (sess, settings) into one that takes each setting as an argument.

    Args:
        settings: the settings class; see settings_function.
        omit: settings that this function does not take.
        positional: the only settings that may be given without their names, in this order; None
            for those that the class says.
        defaults: defaults that differ from the class's.
    """
    signature = _signature(settings, omit, positional, defaults)
    sess = inspect.Parameter("sess", inspect.Parameter.POSITIONAL_OR_KEYWORD)

    def decorate(function: Callable[[Any, S], R]) -> Callable[Concatenate[Any, P], R]:
        annotated = sess.replace(annotation=function.__annotations__["sess"])
        whole = signature.replace(parameters=[annotated, *signature.parameters.values()])

        @functools.wraps(function)
        def public(sess: Any, *args: P.args, **kwargs: P.kwargs) -> R:
            arguments = _bind(function, whole, (sess, *args), kwargs)
            return function(arguments.pop("sess"), settings(**arguments))  # type: ignore[call-arg]

        return _published(public, function, whole, settings)

    return decorate


def _signature(
    settings: Callable[..., Settings],
    omit: Sequence[str] = (),
    positional: Sequence[str] | None = None,
    defaults: Mapping[str, Any] = MappingProxyType({}),
) -> inspect.Signature:
    fields = fields_of(cast("type[Settings]", settings))
    if positional is None:
        positional = [field.name for field in fields.values() if not field.keyword_only]
    by_name = [name for name in fields if name not in positional]
    parameters = [
        inspect.Parameter(
            name,
            kind,
            default=_default(defaults.get(name, fields[name].default)),
            annotation=fields[name].annotation,
        )
        for names, kind in (
            (positional, inspect.Parameter.POSITIONAL_OR_KEYWORD),
            (by_name, inspect.Parameter.KEYWORD_ONLY),
        )
        for name in names
        if name not in omit
    ]
    return inspect.Signature(parameters)


def _default(value: Any) -> Any:
    return inspect.Parameter.empty if value is dataclasses.MISSING else value


def _bind(
    function: Callable[..., Any], signature: inspect.Signature, args: Any, kwargs: Any
) -> dict[str, Any]:
    """All arguments by name, the function's defaults included."""
    try:
        bound = signature.bind(*args, **kwargs)
    except TypeError as error:
        raise TypeError(f"{function.__name__}() {error}") from None
    bound.apply_defaults()
    return bound.arguments


def _published(
    public: Any,
    function: Callable[..., Any],
    signature: inspect.Signature,
    settings: Callable[..., Settings],
) -> Any:
    """The public function, with its signature and docstring."""
    fields = fields_of(cast("type[Settings]", settings))
    taken = [fields[name] for name in signature.parameters if name in fields]
    returned = function.__annotations__.get("return", inspect.Signature.empty)
    public.__signature__ = signature.replace(return_annotation=returned)
    public.__doc__ = _documented(function.__doc__ or "", taken)
    del public.__wrapped__
    return public


def _documented(docstring: str, fields: Sequence[Field]) -> str:
    """The docstring, with an entry for each setting in place of the line `settings: ...`."""
    found = re.search(r"^( *)settings:.*\n(?:\1 +.*\n)*", docstring, re.MULTILINE)
    if found is None:
        return docstring
    indent = found[1]
    entries = [
        textwrap.fill(
            f"{field.name}: {field.setting.python_help}.",
            LINE_LENGTH,
            initial_indent=indent,
            subsequent_indent=indent + " " * 4,
            break_on_hyphens=False,
            break_long_words=False,
        )
        for field in fields
    ]
    return docstring[: found.start()] + "\n".join(entries) + "\n" + docstring[found.end() :]
