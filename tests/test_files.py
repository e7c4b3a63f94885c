"""Files are written whole or not at all."""

import contextlib
import errno
import os
import shutil
import stat
import threading
import time

import pytest

from gpt_2_simple.common import files


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_write_whole_shows_the_file_when_the_block_ends(tmp_path):
    path = tmp_path / "a.txt"
    with files.write_whole(path) as file:
        file.write(b"half")
        assert not path.exists()
        (temporary,) = names(tmp_path)
        assert temporary.startswith(".a.txt.")
        assert files.is_temporary(temporary)
        file.write(b" and half")
    assert path.read_bytes() == b"half and half"
    assert names(tmp_path) == ["a.txt"]


def test_write_whole_keeps_links_and_writes_to_pipes(tmp_path):
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


def test_stale_temporary_files_are_removed(tmp_path):
    for name in ("a.txt", "b.txt"):
        (tmp_path / f".{name}.0123abcd.tmp").write_bytes(b"half")
    (tmp_path / ".a.txt.ffff0000.tmp").write_bytes(b"somebody is writing this")
    long_ago = time.time() - files.STALE_SECONDS - 60
    for name in (".a.txt.0123abcd.tmp", ".b.txt.0123abcd.tmp"):
        os.utime(tmp_path / name, (long_ago, long_ago))
    files.write_text(tmp_path / "a.txt", "whole")
    assert names(tmp_path) == [".a.txt.ffff0000.tmp", ".b.txt.0123abcd.tmp", "a.txt"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, GeneratorExit])
@pytest.mark.parametrize("before", [None, b"old"])
def test_failed_block_leaves_the_old_file(tmp_path, error, before):
    path = tmp_path / "a.txt"
    if before is not None:
        path.write_bytes(before)
    with pytest.raises(error), files.write_whole(path) as file:  # noqa: PT012
        file.write(b"new")
        raise error
    assert names(tmp_path) == ([] if before is None else ["a.txt"])
    assert before is None or path.read_bytes() == before


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_full_disk_leaves_the_old_file(tmp_path, monkeypatch, call):
    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    path = tmp_path / "a.txt"
    path.write_text("old")
    monkeypatch.setattr(os, call, fail)
    with pytest.raises(OSError, match="No space left"):
        files.write_text(path, "new")
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


def test_write_whole_flushes_before_it_renames(tmp_path, monkeypatch):
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


def test_write_text_is_utf_8_and_keeps_line_ends(tmp_path):
    files.write_text(tmp_path / "a.txt", "\u00e9\r\n\n")
    assert (tmp_path / "a.txt").read_bytes() == b"\xc3\xa9\r\n\n"
    with pytest.raises(UnicodeEncodeError):
        files.write_text(tmp_path / "a.txt", "\udcff")
    assert names(tmp_path) == ["a.txt"]


def test_relative_path_survives_a_change_of_folder(tmp_path, monkeypatch):
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path)
    with files.write_whole("a.txt") as file:
        file.write(b"x")
        os.chdir("other")
    assert names(tmp_path) == ["a.txt", "other"]
    assert names(tmp_path / "other") == []


@pytest.mark.skipif(os.name != "posix", reason="modes are something else there")
def test_new_file_has_the_usual_permissions(tmp_path):
    before = os.umask(0o027)
    try:
        files.write_text(tmp_path / "a.txt", "x")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a.txt").stat().st_mode) == 0o640


def test_missing_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="missing"):
        files.write_text(tmp_path / "missing" / "a.txt", "x")


def test_two_writers_of_one_file_do_not_mix(tmp_path):
    path = tmp_path / "a.txt"
    with files.write_whole(path) as first, files.write_whole(path) as second:
        first.write(b"first")
        second.write(b"second")
    assert path.read_bytes() == b"first"
    assert names(tmp_path) == ["a.txt"]


@pytest.fixture
def nothing_said(monkeypatch):
    monkeypatch.setattr(files, "_is_flush_failure_said", False)


def test_sync_opens_files_for_writing_as_windows_needs(tmp_path, monkeypatch, nothing_said, capsys):
    import fcntl

    def fsync(descriptor):
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, "Bad file descriptor")
        synced.append(os.fstat(descriptor).st_size)

    synced = []
    monkeypatch.setattr(os, "fsync", fsync)
    (tmp_path / "a").write_text("12345")
    files.sync(str(tmp_path / "a"))
    assert synced == [5]
    assert capsys.readouterr().out == ""
    files.sync(str(tmp_path))
    assert "cannot be flushed" in capsys.readouterr().out


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EIO, errno.EBADF, errno.ENOTSUP])
def test_file_system_that_cannot_flush_folders_is_said_once(
    tmp_path, monkeypatch, nothing_said, capsys, number
):
    def fsync(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fsync)
    for _ in range(3):
        files.sync(str(tmp_path))
    assert capsys.readouterr().out.count("may lose the latest ones") == 1


def test_file_that_cannot_be_flushed_is_written_but_not_if_data_are_lost(
    tmp_path, monkeypatch, nothing_said, capsys
):
    def fsync(_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fsync)
    number = errno.EINVAL
    files.write_text(tmp_path / "a", "new")
    files.sync(str(tmp_path / "a"))
    assert capsys.readouterr().out.count("may lose the latest ones") == 1
    number = errno.EIO
    with pytest.raises(OSError, match="Input/output error"):
        files.write_text(tmp_path / "a", "newer")
    assert (tmp_path / "a").read_text() == "new"


def test_rename_that_refuses_an_existing_target(tmp_path, monkeypatch):
    rename = os.replace

    def refuse(source, target):
        if os.path.exists(target):
            raise FileExistsError(errno.EEXIST, "File exists")
        rename(source, target)

    monkeypatch.setattr(os, "replace", refuse)
    for text in ("old", "new"):
        files.write_text(tmp_path / "a", text)
        assert (tmp_path / "a").read_text() == text
    assert names(tmp_path) == ["a"]


def test_folder_is_removed_where_inode_numbers_change(tmp_path, monkeypatch):
    monkeypatch.setattr(os.path, "samestat", lambda one, other: False)
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "file").write_text("mine")
    folder = tmp_path / "folder"
    (folder / "sub" / "deep").mkdir(parents=True)
    (folder / "sub" / "file").write_text("x")
    (folder / "link").symlink_to(kept, target_is_directory=True)
    with contextlib.suppress(OSError):
        shutil.rmtree(folder)
    assert folder.exists()  # why shutil alone is not enough
    files.remove_folder(str(folder))
    assert not folder.exists()
    assert (kept / "file").read_text() == "mine"
    files.remove_folder(str(folder))  # no error
