"""What the user sees: lines, warnings and progress bars."""

import errno
import io
import sys
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


@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "utf-8"])
def test_say_replaces_characters_that_the_console_cannot_encode(monkeypatch, encoding):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding))
    report.say("a \ufffd b \ud800 c")
    expected = "a \ufffd b ? c" if encoding == "utf-8" else "a ? b ? c"
    assert raw.getvalue().decode(encoding) == expected + "\n"


class FailingOutput(io.StringIO):
    """A standard output whose writes fail."""

    def __init__(self, error):
        super().__init__()
        self.error = error

    def write(self, text):
        raise self.error


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), ValueError("closed file")]
)
def test_say_drops_a_dead_output_after_one_note(monkeypatch, capsys, error):
    monkeypatch.setattr(sys, "stdout", FailingOutput(error))
    report.say("one")
    report.say("two")
    err = capsys.readouterr().err
    assert err == f"gpt_2_simple: note: output cannot be printed ({error}); the work goes on\n"
    monkeypatch.setattr(sys, "stderr", FailingOutput(error))
    report.complain("three")
    monkeypatch.setattr(sys, "stdout", FailingOutput(error))
    report.say("four")


def test_say_raises_broken_pipe(monkeypatch):
    monkeypatch.setattr(sys, "stdout", FailingOutput(BrokenPipeError()))
    with pytest.raises(BrokenPipeError):
        report.say("one")


def test_say_without_standard_output(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    report.say("one")
    report.complain("two")
