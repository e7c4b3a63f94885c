"""Copies to and from a Drive: whole or not at all, and nothing of the user's lost on the way."""

import errno
import io
import os
import sys
import tarfile
import types

import pytest

from gpt_2_simple.storage import drive as colab


@pytest.fixture(autouse=True)
def workplace(tmp_path, monkeypatch):
    work = tmp_path / "content"
    work.mkdir()
    monkeypatch.chdir(work)
    monkeypatch.setattr(colab, "MOUNT_POINT", str(tmp_path / "drive"))
    return work


@pytest.fixture
def drive(tmp_path):
    folder = tmp_path / "drive" / "MyDrive"
    folder.mkdir(parents=True)
    return folder


def make_run(folder, step=10, **extra):
    folder.mkdir(parents=True, exist_ok=True)
    files = {
        "checkpoint": f'model_checkpoint_path: "model-{step}"\n',
        "counter": f"{step}\n",
        f"model-{step}.index": "index",
        f"model-{step}.data-00000-of-00001": "weights" * 1000,
        **extra,
    }
    for name, text in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    return files


def contents(folder):
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_text() for path in files}


def make_tar(path, *members):
    with tarfile.open(path, "w") as tar:
        for member in members:
            data = b"text" if member.isreg() else b""
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def member(name, kind=tarfile.REGTYPE, linkname=""):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, linkname
    return info


def no_leftovers(*folders):
    return [p for folder in folders for p in folder.rglob(".*")] == []


# Mounting


def test_mount_gdrive_calls_google_colab(monkeypatch):
    calls = []
    module = types.ModuleType("google.colab")
    module.drive = types.SimpleNamespace(mount=calls.append)
    monkeypatch.setitem(sys.modules, "google.colab", module)
    colab.mount_gdrive()
    assert calls == [colab.MOUNT_POINT]


def test_mount_gdrive_outside_colab_is_a_clear_error():
    with pytest.raises(RuntimeError, match=r"mount_gdrive\(\) works only in Google Colaboratory"):
        colab.mount_gdrive()


@pytest.mark.parametrize(
    "call",
    [
        colab.is_mounted,
        lambda: colab.copy_file_to_gdrive("a.txt"),
        lambda: colab.copy_file_from_gdrive("a.txt"),
        colab.copy_checkpoint_to_gdrive,
        colab.copy_checkpoint_from_gdrive,
    ],
)
@pytest.mark.parametrize("mount_point_exists", [False, True])
def test_missing_drive_error_names_mount_gdrive(call, mount_point_exists):
    if mount_point_exists:  # what an unmounted Drive leaves
        os.mkdir(colab.MOUNT_POINT)
    with pytest.raises(RuntimeError, match=r"mount_gdrive\(\)"):
        call()


def test_mydrive_comes_before_my_drive(tmp_path, workplace):
    (workplace / "a.txt").write_text("a")
    older = tmp_path / "drive" / "My Drive"
    older.mkdir(parents=True)
    assert colab.is_mounted() is True
    assert colab.copy_file_to_gdrive("a.txt") == str(older / "a.txt")
    today = tmp_path / "drive" / "MyDrive"
    today.mkdir()
    assert colab.copy_file_to_gdrive("a.txt") == str(today / "a.txt")
    assert (today / "a.txt").read_text() == "a"


# Names


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("checkpoint/run1", "checkpoint_run1.tar"),
        ("checkpoint/run1/", "checkpoint_run1.tar"),
        ("./checkpoint//run1", "checkpoint_run1.tar"),
        ("/content/checkpoint/run1", "content_checkpoint_run1.tar"),
        ("../checkpoint/run1", "checkpoint_run1.tar"),
        ("C:\\work\\checkpoint\\run1", "C_work_checkpoint_run1.tar"),
        ("_mine/run.v2", "_mine_run.v2.tar"),
    ],
)
def test_get_tarfile_name(folder, name):
    assert colab.get_tarfile_name(folder) == name


@pytest.mark.parametrize("folder", ["", "/", ".", ".."])
def test_get_tarfile_name_refuses_a_path_without_names(folder):
    with pytest.raises(ValueError, match="names no file or folder"):
        colab.get_tarfile_name(folder)


@pytest.mark.parametrize("run_name", ["", "..", "../run1", "/run1", "run1/", "a/../b"])
@pytest.mark.parametrize(
    "copy", [colab.copy_checkpoint_to_gdrive, colab.copy_checkpoint_from_gdrive]
)
def test_run_name_outside_of_the_checkpoint_folder_is_refused(drive, copy, run_name):
    with pytest.raises(ValueError, match="run_name|names no file"):
        copy(run_name)


# Runs, there and back


@pytest.mark.parametrize("copy_folder", [False, True])
@pytest.mark.parametrize("drive_folder", [None, "backups/gpt2"])
def test_run_is_the_same_after_copying_there_and_back(workplace, drive, copy_folder, drive_folder):
    files = make_run(workplace / "checkpoint" / "run1", **{"deep/notes.txt": "notes"})
    options = {"copy_folder": copy_folder, "drive_folder": drive_folder}
    copy = colab.copy_checkpoint_to_gdrive("run1", **options)
    name = "checkpoint/run1" if copy_folder else "checkpoint_run1.tar"
    assert copy == str(drive / (drive_folder or "") / name)
    os.rename("checkpoint", "gone")
    assert colab.copy_checkpoint_from_gdrive("run1", **options) == "checkpoint/run1"
    assert contents(workplace / "checkpoint") == {f"run1/{n}": t for n, t in files.items()}
    assert no_leftovers(workplace, drive)


@pytest.mark.parametrize("copy_folder", [False, True])
def test_runs_of_one_name_in_two_folders_have_two_copies(workplace, drive, copy_folder):
    absolute = str(workplace / "elsewhere")
    make_run(workplace / "checkpoint" / "run1", step=1)
    make_run(workplace / "elsewhere" / "run1", step=2)
    colab.copy_checkpoint_to_gdrive("run1", copy_folder)
    colab.copy_checkpoint_to_gdrive("run1", copy_folder, checkpoint_dir=absolute)
    os.rename("checkpoint", "gone")
    os.rename("elsewhere", "gone2")
    colab.copy_checkpoint_from_gdrive("run1", copy_folder)
    colab.copy_checkpoint_from_gdrive("run1", copy_folder, checkpoint_dir=absolute)
    assert (workplace / "checkpoint" / "run1" / "counter").read_text() == "1\n"
    assert (workplace / "elsewhere" / "run1" / "counter").read_text() == "2\n"


def pack_like_0_8_1(workplace, drive, name="checkpoint"):
    files = make_run(workplace / "checkpoint" / "run1")
    with tarfile.open(drive / "checkpoint_run1.tar", "w") as tar:
        if name.startswith("."):
            tar.add(".", recursive=False)
        tar.add("checkpoint/run1", arcname=name + "/run1")
    os.rename("checkpoint", "gone")
    return files


@pytest.mark.parametrize("checkpoint_dir", ["checkpoint", "runs/mine"])
@pytest.mark.parametrize("name", ["checkpoint", "./checkpoint"])  # './' by other tools
def test_archive_of_0_8_1_is_read(workplace, drive, checkpoint_dir, name):
    files = pack_like_0_8_1(workplace, drive, name)
    colab.copy_checkpoint_from_gdrive("run1", checkpoint_dir=checkpoint_dir)
    assert contents(workplace / checkpoint_dir / "run1") == files


def test_folder_of_0_8_1_is_read_into_another_folder(workplace, drive):
    files = make_run(drive / "checkpoint" / "run1")
    colab.copy_checkpoint_from_gdrive("run1", copy_folder=True, checkpoint_dir="runs/mine")
    assert contents(workplace / "runs" / "mine" / "run1") == files


def test_archive_has_the_names_that_0_8_1_extracts(workplace, drive):
    make_run(workplace / "other" / "run1")
    archive = colab.copy_checkpoint_to_gdrive("run1", checkpoint_dir="other")
    with tarfile.open(archive) as tar:
        assert "checkpoint/run1/counter" in tar.getnames()
        assert all(n.startswith("checkpoint/run1") for n in tar.getnames())


@pytest.mark.parametrize("copy_folder", [False, True])
def test_second_copy_replaces_the_first(workplace, drive, copy_folder):
    make_run(workplace / "checkpoint" / "run1", step=1)
    colab.copy_checkpoint_to_gdrive("run1", copy_folder)
    (workplace / "checkpoint" / "run1" / "model-1.index").unlink()
    files = make_run(workplace / "checkpoint" / "run1", step=2)
    colab.copy_checkpoint_to_gdrive("run1", copy_folder)
    os.rename("checkpoint", "gone")
    colab.copy_checkpoint_from_gdrive("run1", copy_folder)
    back = contents(workplace / "checkpoint" / "run1")
    assert back == files | {"model-1.data-00000-of-00001": "weights" * 1000}
    assert no_leftovers(workplace, drive)


@pytest.mark.parametrize("copy_folder", [False, True])
def test_copying_back_keeps_later_checkpoints_of_the_local_run(workplace, drive, copy_folder):
    make_run(workplace / "checkpoint" / "run1", step=1)
    colab.copy_checkpoint_to_gdrive("run1", copy_folder)
    make_run(workplace / "checkpoint" / "run1", step=2)
    colab.copy_checkpoint_from_gdrive("run1", copy_folder)
    back = contents(workplace / "checkpoint" / "run1")
    assert back["counter"] == "1\n"
    assert back["model-2.data-00000-of-00001"] == "weights" * 1000
    assert no_leftovers(workplace, drive)


@pytest.mark.parametrize("copy_folder", [False, True])
def test_copy_leaves_out_hidden_files_and_follows_links(workplace, drive, copy_folder):
    run = workplace / "checkpoint" / "run1"
    files = make_run(run)
    (run / ".model-10.index.part").write_text("half")
    (run / ".locks").mkdir()
    (run / ".locks" / "lock").write_text("")
    os.symlink(run / "counter", run / "link")
    os.link(run / "counter", run / "second_name")
    colab.copy_checkpoint_to_gdrive("run1", copy_folder)
    os.rename("checkpoint", "gone")
    colab.copy_checkpoint_from_gdrive("run1", copy_folder)
    expected = files | {"link": "10\n", "second_name": "10\n"}
    assert contents(workplace / "checkpoint" / "run1") == expected


@pytest.mark.parametrize("copy_folder", [False, True])
def test_missing_run_error_lists_the_runs(workplace, drive, copy_folder):
    make_run(workplace / "checkpoint" / "poems")
    with pytest.raises(FileNotFoundError, match=r"no run 'run1'.*checkpoint: poems"):
        colab.copy_checkpoint_to_gdrive(copy_folder=copy_folder)
    with pytest.raises(FileNotFoundError, match=r"Runs in nowhere: none"):
        colab.copy_checkpoint_to_gdrive(checkpoint_dir="nowhere")
    colab.copy_checkpoint_to_gdrive("poems", copy_folder)
    listed = r"none\. Runs .*: poems" if copy_folder else r"checkpoint_poems\.tar"
    with pytest.raises(FileNotFoundError, match=listed):
        colab.copy_checkpoint_from_gdrive("run1", copy_folder)
    assert contents(workplace / "checkpoint").keys() == {
        f"poems/{name}" for name in contents(workplace / "checkpoint" / "poems")
    }


# What can go wrong half-way


def full_disk_after(monkeypatch, files):
    written = []

    def copyfileobj(source, target, *length, **options):
        written.append(target)
        if len(written) > files:
            target.write(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        target.write(source.read())

    for module in (colab.shutil, tarfile):
        monkeypatch.setattr(module, "copyfileobj", copyfileobj)


@pytest.mark.parametrize("copy_folder", [False, True])
def test_full_drive_leaves_the_earlier_copy(workplace, drive, copy_folder, monkeypatch):
    files = make_run(workplace / "checkpoint" / "run1", step=1)
    colab.copy_checkpoint_to_gdrive("run1", copy_folder)
    make_run(workplace / "checkpoint" / "run1", step=2)
    with monkeypatch.context() as patch:
        full_disk_after(patch, files=2)
        with pytest.raises(OSError, match="No space left"):
            colab.copy_checkpoint_to_gdrive("run1", copy_folder)
    os.rename("checkpoint", "gone")
    colab.copy_checkpoint_from_gdrive("run1", copy_folder)
    assert contents(workplace / "checkpoint" / "run1") == files
    assert no_leftovers(workplace, drive)


@pytest.mark.parametrize("copy_folder", [False, True])
@pytest.mark.parametrize("run_exists", [False, True])
def test_full_disk_leaves_the_local_run(workplace, drive, copy_folder, run_exists, monkeypatch):
    make_run(workplace / "checkpoint" / "run1", step=1)
    colab.copy_checkpoint_to_gdrive("run1", copy_folder)
    os.rename("checkpoint", "gone")
    files = make_run(workplace / "checkpoint" / "run1", step=2) if run_exists else {}
    with monkeypatch.context() as patch:
        full_disk_after(patch, files=2)
        with pytest.raises(OSError, match="No space left"):
            colab.copy_checkpoint_from_gdrive("run1", copy_folder)
    assert contents(workplace / "checkpoint") == {f"run1/{n}": t for n, t in files.items()}
    assert no_leftovers(workplace)


def fail_rename(monkeypatch, number, error):
    real, calls = os.rename, []

    def rename(source, target):
        calls.append(source)
        if len(calls) == number:
            raise error
        real(source, target)

    monkeypatch.setattr(colab.os, "rename", rename)


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("error", [OSError("lost the mount"), KeyboardInterrupt()])
def test_failed_rename_leaves_the_earlier_copy(workplace, drive, monkeypatch, number, error):
    files = make_run(workplace / "checkpoint" / "run1", step=1)
    colab.copy_checkpoint_to_gdrive("run1", copy_folder=True)
    make_run(workplace / "checkpoint" / "run1", step=2)
    with monkeypatch.context() as patch:
        fail_rename(patch, number, error)
        with pytest.raises(type(error)):
            colab.copy_checkpoint_to_gdrive("run1", copy_folder=True)
    assert contents(drive / "checkpoint" / "run1") == files
    assert no_leftovers(drive)


@pytest.fixture
def killed_in_the_swap(workplace, drive):
    files = make_run(workplace / "checkpoint" / "run1", step=1)
    colab.copy_checkpoint_to_gdrive("run1", copy_folder=True)
    folder = drive / "checkpoint"
    os.rename(folder / "run1", folder / ".run1.old")
    make_run(folder / ".run1.new", step=2)
    return files


def test_earlier_copy_is_restored_after_a_kill_between_renames(
    workplace, drive, killed_in_the_swap
):
    colab.copy_checkpoint_from_gdrive("run1", copy_folder=True)
    assert contents(workplace / "checkpoint" / "run1").items() >= killed_in_the_swap.items()
    colab.copy_checkpoint_to_gdrive("run1", copy_folder=True)
    assert no_leftovers(drive)


def test_full_drive_after_a_kill_between_renames_leaves_the_earlier_copy(
    drive, killed_in_the_swap, monkeypatch
):
    full_disk_after(monkeypatch, files=2)
    with pytest.raises(OSError, match="No space left"):
        colab.copy_checkpoint_to_gdrive("run1", copy_folder=True)
    assert contents(drive / "checkpoint" / "run1") == killed_in_the_swap


# Archives that are not to be trusted

RUN = "checkpoint/run1"


@pytest.mark.parametrize(
    "bad",
    [
        member("/tmp/evil"),
        member("//checkpoint/run1/evil"),
        member("../evil"),
        member(f"{RUN}/../../../evil"),
        member(f"{RUN}/..\\..\\evil"),
        member("C:\\evil"),
        member("\\evil"),
        member(f"{RUN}/C:\\evil"),
        member(f"{RUN}/\\evil"),
        member("checkpoint/run2/evil"),
        member("evil"),
        member(RUN),
        member(f"{RUN}/link", tarfile.SYMTYPE, "/etc"),
        member(f"{RUN}/link", tarfile.SYMTYPE, "counter"),
        member(f"{RUN}/link", tarfile.LNKTYPE, f"{RUN}/counter"),
        member(f"{RUN}/pipe", tarfile.FIFOTYPE),
        member(f"{RUN}/device", tarfile.CHRTYPE),
        member(f"{RUN}/device", tarfile.BLKTYPE),
    ],
    ids=lambda m: f"{m.name}-{m.type.decode()}",
)
@pytest.mark.parametrize("with_filter", [True, False])
def test_archive_that_writes_outside_of_the_run_is_refused(
    workplace, drive, tmp_path, bad, with_filter, monkeypatch
):
    if not with_filter:  # as before Python 3.10.12
        monkeypatch.delattr(tarfile, "data_filter", raising=False)
    files = make_run(workplace / "checkpoint" / "run1")
    make_tar(drive / "checkpoint_run1.tar", member(f"{RUN}/counter"), bad)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match="link or a device|would leave|is not in the run"):
        colab.copy_checkpoint_from_gdrive("run1")
    assert contents(workplace / "checkpoint" / "run1") == files
    assert sorted(tmp_path.rglob("*")) == before


def test_archive_without_the_run_is_refused(workplace, drive):
    make_tar(drive / "checkpoint_run1.tar", member("checkpoint", tarfile.DIRTYPE))
    with pytest.raises(ValueError, match="does not hold the run checkpoint/run1"):
        colab.copy_checkpoint_from_gdrive("run1")
    assert not (workplace / "checkpoint" / "run1").exists()


@pytest.mark.parametrize("keep", [0, 100, 3000, 9000])
def test_damaged_archive_leaves_the_local_run(workplace, drive, keep):
    files = make_run(workplace / "checkpoint" / "run1")
    archive = drive / "checkpoint_run1.tar"
    colab.copy_checkpoint_to_gdrive("run1")
    archive.write_bytes(archive.read_bytes()[:keep])
    with pytest.raises(ValueError, match="damaged|does not hold"):
        colab.copy_checkpoint_from_gdrive("run1")
    assert contents(workplace / "checkpoint" / "run1") == files
    assert no_leftovers(workplace)


def test_damaged_compressed_archive_is_refused(workplace, drive):
    make_run(workplace / "checkpoint" / "run1", noise="".join(map(chr, range(20000))))
    archive = drive / "checkpoint_run1.tar"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add("checkpoint/run1")
    archive.write_bytes(archive.read_bytes()[:-2000])
    with pytest.raises(ValueError, match="damaged"):
        colab.copy_checkpoint_from_gdrive("run1")


# Files


def test_file_is_the_same_after_copying_there_and_back(workplace, drive):
    (workplace / "a.txt").write_text("one")
    assert colab.copy_file_to_gdrive("a.txt") == str(drive / "a.txt")
    (workplace / "a.txt").write_text("two")
    colab.copy_file_to_gdrive("a.txt")
    (workplace / "a.txt").unlink()
    assert colab.copy_file_from_gdrive("a.txt") == "a.txt"
    assert (workplace / "a.txt").read_text() == "two"


@pytest.mark.parametrize("drive_folder", [None, "backups", "absolute"])
def test_file_keeps_its_folders_on_the_drive(workplace, drive, tmp_path, drive_folder):
    if drive_folder == "absolute":
        drive_folder = str(tmp_path / "drive" / "Shareddrives" / "team")
    (workplace / "gen").mkdir()
    (workplace / "gen" / "a.txt").write_text("a")
    path = colab.copy_file_to_gdrive("gen/a.txt", drive_folder=drive_folder)
    assert path == str(drive / (drive_folder or "") / "gen" / "a.txt")
    os.rename("gen", "gone")
    colab.copy_file_from_gdrive("gen/a.txt", drive_folder=drive_folder)
    assert contents(workplace / "gen") == {"a.txt": "a"}


def test_absolute_and_parent_paths_stay_on_the_drive(workplace, drive):
    (workplace / "a.txt").write_text("a")
    absolute = str(workplace / "a.txt")
    assert colab.copy_file_to_gdrive(absolute) == str(drive) + absolute
    (workplace / "sub").mkdir()
    os.chdir("sub")
    assert colab.copy_file_to_gdrive("../a.txt") == str(drive / "a.txt")


def test_missing_file_error_lists_the_files(workplace, drive):
    (workplace / "here.txt").write_text("")
    (drive / "there.txt").write_text("")
    with pytest.raises(FileNotFoundError, match=r"no file a\.txt.*here\.txt"):
        colab.copy_file_to_gdrive("a.txt")
    with pytest.raises(FileNotFoundError, match=r"a\.txt.*there\.txt"):
        colab.copy_file_from_gdrive("a.txt")


def test_full_drive_leaves_the_earlier_file(workplace, drive, monkeypatch):
    (workplace / "a.txt").write_text("new")
    (drive / "a.txt").write_text("old")
    full_disk_after(monkeypatch, files=0)
    with pytest.raises(OSError, match="No space left"):
        colab.copy_file_to_gdrive("a.txt")
    assert contents(drive) == {"a.txt": "old"}


def test_failed_fsync_leaves_the_earlier_file(workplace, drive, monkeypatch):
    (workplace / "a.txt").write_text("new")
    (drive / "a.txt").write_text("old")

    def fsync(number):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(colab.os, "fsync", fsync)
    with pytest.raises(OSError, match="Input/output error"):
        colab.copy_file_to_gdrive("a.txt")
    assert contents(drive) == {"a.txt": "old"}


def test_folder_is_copied_where_modes_and_times_are_refused(workplace, drive, monkeypatch):
    files = make_run(workplace / "checkpoint" / "run1", **{"deep/note.txt": "kept"})
    (workplace / "checkpoint" / "run1" / ".lock").write_text("held")

    def refuse(*args, **options):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    for name in ("utime", "chmod"):
        monkeypatch.setattr(os, name, refuse)
    for copy_folder in (True, False):
        colab.copy_checkpoint_to_gdrive("run1", copy_folder)
        os.rename("checkpoint", f"moved-{copy_folder}")
        colab.copy_checkpoint_from_gdrive("run1", copy_folder)
        assert contents(workplace / "checkpoint" / "run1") == files
