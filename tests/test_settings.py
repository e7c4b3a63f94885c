"""Settings: each value becomes Python's own type, and is in its range, before it is used."""

import dataclasses
import json
import math
from fractions import Fraction
from pathlib import Path
from typing import Annotated

import numpy as np
import pytest

from gpt_2_simple.common.settings import Setting, Settings, fields_of
from gpt_2_simple.training.settings import TrainingSettings


@dataclasses.dataclass(frozen=True)
class Example(Settings):
    count: Annotated[int, Setting("g", "Count", at_least=1, special=(-1, "all"))] = 1
    rate: Annotated[float, Setting("g", "Rate", at_least=0, below=1)] = 0.0
    flag: Annotated[bool, Setting("g", "Flag")] = False
    name: Annotated[str | None, Setting("g", "Name")] = None
    verbose: Annotated[int | bool, Setting("g", "Verbose")] = 1


@pytest.mark.parametrize(
    ("name", "given", "expected"),
    [
        ("count", np.int64(7), 7),
        ("count", np.uint8(7), 7),
        ("count", np.int8(-1), -1),
        ("count", 1e3, 1000),
        ("count", np.float32(20.0), 20),
        ("count", np.array(3), 3),
        ("count", Fraction(4, 2), 2),
        ("rate", np.float16(0.5), 0.5),
        ("rate", np.longdouble(0.5), 0.5),
        ("rate", np.int64(0), 0.0),
        ("flag", np.bool_(True), True),
        ("flag", 1, True),
        ("flag", np.float64(0.0), False),
        ("name", np.str_("run"), "run"),
        ("name", Path("a/b"), "a/b"),
        ("name", None, None),
        ("verbose", np.bool_(False), False),
        ("verbose", np.uint8(2), 2),
    ],
)
def test_numpy_scalars_and_integral_floats_become_python_values(name, given, expected):
    value = getattr(Example(**{name: given}), name)
    assert value == expected
    assert type(value) is type(expected)


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("count", 1.5),
        ("count", np.float32(math.nan)),
        ("count", math.inf),
        ("count", True),
        ("count", np.bool_(True)),
        ("count", "3"),
        ("count", np.array([1, 2])),
        ("count", np.uint8(0)),
        ("rate", np.complex64(0.5)),
        ("rate", 10**400),
        ("rate", np.float64(math.nan)),
        ("flag", 2),
        ("flag", np.array([1, 0])),
        ("name", 3),
    ],
)
def test_values_of_another_type_or_out_of_range_raise_value_error(name, given):
    with pytest.raises(ValueError, match=rf"^{name}=.* must be "):
        Example(**{name: given})


def test_every_finetune_setting_takes_numpy_scalars_and_is_recorded_as_json():
    """NumPy's equal of each default; a run's settings.json then holds the same text."""
    scalars = {bool: np.bool_, int: np.int32, float: np.float64, str: np.str_}
    defaults = TrainingSettings("text.txt")
    values = {name: getattr(defaults, name) for name in fields_of(TrainingSettings)}
    given = {
        name: scalars[type(value)](value) if type(value) in scalars else value
        for name, value in values.items()
    }
    converted = TrainingSettings(**given)
    for name, value in values.items():
        assert getattr(converted, name) == value
        assert type(getattr(converted, name)) is type(value), name
    assert json.dumps(converted.recorded()) == json.dumps(defaults.recorded())
