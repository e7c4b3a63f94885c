"""Files land whole or not at all."""

import errno
import os
import stat
import threading
import time

import pytest

from gpt_2_simple.common import files


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_appears_when_the_block_ends(tmp_path):
    path = tmp_path / "a.txt"
    with files.write_whole(path, mark=".new-") as file:
        file.write(b"half")
        assert not path.exists()
        (temporary,) = names(tmp_path)
        assert temporary.startswith(".new-a.txt.")
        file.write(b" and half")
    assert path.read_bytes() == b"half and half"
    assert names(tmp_path) == ["a.txt"]


def test_a_link_stays_and_a_pipe_is_written_to(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"old")
    os.symlink("a.txt", tmp_path / "link")
    files.write_text(tmp_path / "link", "new")
    assert os.path.islink(tmp_path / "link")
    assert (tmp_path / "a.txt").read_bytes() == b"new"
    os.mkfifo(tmp_path / "pipe")
    read = []
    reader = threading.Thread(target=lambda: read.append((tmp_path / "pipe").read_bytes()))
    reader.start()
    files.write_text(tmp_path / "pipe", "through")
    reader.join(60)
    assert read == [b"through"]
    assert names(tmp_path) == ["a.txt", "link", "pipe"]


def test_what_a_killed_process_left_is_removed_in_time(tmp_path):
    for name in ("a.txt", "b.txt"):
        (tmp_path / f".{name}.0123abcd.tmp").write_bytes(b"half")
    (tmp_path / ".a.txt.ffff0000.tmp").write_bytes(b"somebody is writing this")
    long_ago = time.time() - files.STALE - 60
    for name in (".a.txt.0123abcd.tmp", ".b.txt.0123abcd.tmp"):
        os.utime(tmp_path / name, (long_ago, long_ago))
    files.write_text(tmp_path / "a.txt", "whole")
    assert names(tmp_path) == [".a.txt.ffff0000.tmp", ".b.txt.0123abcd.tmp", "a.txt"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, GeneratorExit])
@pytest.mark.parametrize("before", [None, b"old"])
def test_whatever_goes_wrong_leaves_what_was_there(tmp_path, error, before):
    path = tmp_path / "a.txt"
    if before is not None:
        path.write_bytes(before)
    with pytest.raises(error), files.write_whole(path) as file:  # noqa: PT012
        file.write(b"new")
        raise error
    assert names(tmp_path) == ([] if before is None else ["a.txt"])
    assert before is None or path.read_bytes() == before


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch, call):
    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    path = tmp_path / "a.txt"
    path.write_text("old")
    monkeypatch.setattr(os, call, fail)
    with pytest.raises(OSError, match="No space left"):
        files.write_text(path, "new")
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


def test_bytes_are_on_the_disk_before_they_get_the_name(tmp_path, monkeypatch):
    done = []
    fsync, replace = os.fsync, os.replace

    def note_fsync(descriptor):
        done.append(("fsync", os.fstat(descriptor).st_size))
        fsync(descriptor)

    def note_replace(source, target):
        done.append(("replace", os.path.getsize(source)))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(os, "replace", note_replace)
    files.write_text(tmp_path / "a.txt", "12345")
    assert done == [("fsync", 5), ("replace", 5)]


def test_text_is_utf_8_with_its_own_line_ends(tmp_path):
    files.write_text(tmp_path / "a.txt", "\u00e9\r\n\n")
    assert (tmp_path / "a.txt").read_bytes() == b"\xc3\xa9\r\n\n"
    with pytest.raises(UnicodeEncodeError):
        files.write_text(tmp_path / "a.txt", "\udcff")
    assert names(tmp_path) == ["a.txt"]


def test_a_relative_path_means_the_folder_of_the_start(tmp_path, monkeypatch):
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path)
    with files.write_whole("a.txt") as file:
        file.write(b"x")
        os.chdir("other")
    assert names(tmp_path) == ["a.txt", "other"]
    assert names(tmp_path / "other") == []


@pytest.mark.skipif(os.name != "posix", reason="modes are something else there")
def test_rights_are_those_of_any_new_file(tmp_path):
    before = os.umask(0o027)
    try:
        files.write_text(tmp_path / "a.txt", "x")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a.txt").stat().st_mode) == 0o640


def test_a_folder_that_is_missing_is_told(tmp_path):
    with pytest.raises(FileNotFoundError, match="missing"):
        files.write_text(tmp_path / "missing" / "a.txt", "x")


def test_two_writers_do_not_meet(tmp_path):
    path = tmp_path / "a.txt"
    with files.write_whole(path) as first, files.write_whole(path) as second:
        first.write(b"first")
        second.write(b"second")
    assert path.read_bytes() == b"first"
    assert names(tmp_path) == ["a.txt"]
