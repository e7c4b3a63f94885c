"""What the user sees: lines, warnings and progress bars."""

import warnings

import pytest

import gpt_2_simple
from gpt_2_simple.common import report

CALL = "def call(function):\n    return function('careful')\n"


def call_from(path, function):
    """Calls `function` as code in the file `path` would, and returns the warning's file."""
    names = {}
    exec(compile(CALL, path, "exec"), names)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        names["call"](function)
    (warning,) = caught
    assert str(warning.message) == "careful"
    return warning.filename


@pytest.mark.parametrize("inside", ["gpt_2.py", "data/tables.py", "data/deeper/more.py"])
def test_warning_points_to_the_caller_of_the_package(inside):
    package = gpt_2_simple.__path__[0]
    assert call_from(f"{package}/{inside}", report.warn) == __file__


def test_warning_points_to_a_package_whose_name_starts_alike():
    path = f"{gpt_2_simple.__path__[0]}_of_mine/script.py"
    assert call_from(path, report.warn) == path


def test_verbosity_0_silences_lines_and_bars_but_no_complaints(capsys):
    with report.verbosity(0):
        report.say("a line")
        report.complain("an error")
        with report.progress(total=2, desc="Reading", unit="B") as bar:
            bar.update(2)
    report.say("another", "line")
    assert capsys.readouterr() == ("another line\n", "an error\n")
