"""Files of texts: when they get their names, and their formats."""

import pytest

from gpt_2_simple.generation import output


def test_file_gets_its_name_when_it_is_whole(tmp_path):
    path = tmp_path / "out.txt"
    with output.open_output(str(path)) as append:
        append("a\n")
        assert not path.exists()
    assert path.read_text() == "a\n"


def test_folder_as_destination_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="is a folder"), output.open_output(str(tmp_path)):
        raise AssertionError("nothing must be generated")


def _interrupted_writer(path):
    with output.open_output(str(path)) as append:
        append("kept")
        raise KeyboardInterrupt


def test_file_keeps_what_was_written_before_an_interruption(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        _interrupted_writer(tmp_path / "out.txt")
    assert (tmp_path / "out.txt").read_text() == "kept"


def test_json_lines_hold_prefix_and_text_and_escape_lone_surrogates(tmp_path):
    path = tmp_path / "out.jsonl"
    with output.open_output(str(path)) as append:
        append(output.json_line("a", 'é "b"\n'))
        append(output.json_line("", "\udcff"))
    assert path.read_bytes() == (
        b'{"prefix": "a", "text": "\xc3\xa9 \\"b\\"\\n"}\n{"prefix": "", "text": "\\udcff"}\n'
    )
