"""Runs and files in, copies of them on a mounted Google Drive out, and the reverse."""

from __future__ import annotations

import glob
import os
import posixpath
import re
import shutil
import tarfile
from collections.abc import Callable
from typing import IO, NoReturn

from ..common.files import restore_replaced, write_folder_whole, write_whole

MOUNT_POINT = "/content/drive"
_DRIVE_NAMES = ("MyDrive", "My Drive")  # today's name first, then that of older mounts
_TAR_ROOT = "checkpoint"  # gpt-2-simple 0.8.1 writes and expects checkpoint/<run> in its archives


def mount_gdrive() -> None:
    """Mounts the user's Google Drive in Colaboratory, at /content/drive.

    Raises:
        RuntimeError: outside Google Colaboratory.
    """
    try:
        from google.colab import drive
    except ImportError as error:
        raise RuntimeError(
            "mount_gdrive() works only in Google Colaboratory, where the module google.colab is"
        ) from error
    drive.mount(MOUNT_POINT)


def is_mounted() -> bool:
    """Checks that a Google Drive is mounted.

    Returns:
        True. Without a Drive it raises, as in gpt-2-simple 0.8.1; it never returns False.

    Raises:
        RuntimeError: no Drive is mounted.
    """
    _drive_path(None)
    return True


def get_tarfile_name(checkpoint_folder: str) -> str:
    """Names the archive of a run: 'checkpoint/run1' gives 'checkpoint_run1.tar'.

    Args:
        checkpoint_folder: path of a run, relative or absolute, with the separators of any system.

    Returns:
        A file name without a folder. The path's root, '.' and '..' are left out.
    """
    return "_".join(_inner_parts(checkpoint_folder)) + ".tar"


def copy_checkpoint_to_gdrive(
    run_name: str = "run1",
    copy_folder: bool = False,
    *,
    checkpoint_dir: str = "checkpoint",
    drive_folder: str | None = None,
) -> str:
    """Copies a run to the mounted Google Drive, in place of an earlier copy of it.

    The earlier copy stays until the new one is complete. Files whose names start with a dot
    (temporary files, locks) are left out.

    Args:
        run_name: folder of the run in `checkpoint_dir`.
        copy_folder: True copies the folder, False packs it into one archive.
        checkpoint_dir: folder that holds the runs.
        drive_folder: folder in My Drive, which is made if it is missing; None is My Drive itself.
            An absolute path reaches a shared drive.

    Returns:
        The path of the copy.

    Raises:
        RuntimeError: no Drive is mounted.
        FileNotFoundError: there is no such run; the message lists the runs.
    """
    source = _run_folder(checkpoint_dir, run_name)
    drive = _drive_path(drive_folder)
    if not os.path.isdir(source):
        raise FileNotFoundError(
            f"There is no run {run_name!r} to copy: {source} is not a folder. "
            f"Runs in {checkpoint_dir}: {_names(checkpoint_dir, '*/')}"
        )
    if copy_folder:
        target = os.path.join(drive, *_inner_parts(source))
        with write_folder_whole(target) as new:
            _copy_folder(source, new, _copy_file, hidden=False)
    else:
        target = os.path.join(drive, get_tarfile_name(source))
        os.makedirs(drive, exist_ok=True)
        with write_whole(target) as file:
            _pack(source, f"{_TAR_ROOT}/{run_name}", file)
    return target


def copy_checkpoint_from_gdrive(
    run_name: str = "run1",
    copy_folder: bool = False,
    *,
    checkpoint_dir: str = "checkpoint",
    drive_folder: str | None = None,
) -> str:
    """Copies a run back from the mounted Google Drive.

    The run appears whole or not at all. If there is a run of this name already, the copy's files
    replace its files, and files that only it has (such as later checkpoints) stay.

    Args:
        run_name: name of the run; its folder in `checkpoint_dir` is made or updated.
        copy_folder: whether the copy on the Drive is a folder, and not an archive.
        checkpoint_dir: folder that holds the runs. If the Drive has no copy from this folder, a
            copy from 'checkpoint' is taken, the only folder that gpt-2-simple 0.8.1 copied.
        drive_folder: folder in My Drive; None is My Drive itself. An absolute path reaches a
            shared drive.

    Returns:
        The path of the run's folder.

    Raises:
        RuntimeError: no Drive is mounted.
        FileNotFoundError: the Drive has no such copy; the message lists its copies.
        ValueError: the archive is damaged, holds something else, or would write outside of the
            run's folder. Nothing was written.
    """
    target = _run_folder(checkpoint_dir, run_name)
    drive = _drive_path(drive_folder)
    source = _find_copy(drive, checkpoint_dir, run_name, copy_folder)
    with write_folder_whole(target) as new:
        if copy_folder:
            _copy_folder(source, new, _copy_file)
        else:
            _unpack(source, f"{_TAR_ROOT}/{run_name}", new)
        if os.path.isdir(target):
            _copy_folder(target, new, _link_missing)
    return target


def copy_file_to_gdrive(file_path: str, *, drive_folder: str | None = None) -> str:
    """Copies a file to the mounted Google Drive, in place of an earlier copy of it.

    Args:
        file_path: the file. The copy has the same folders on the Drive. The root of an absolute
            path, and '..', are left out.
        drive_folder: folder in My Drive, which is made if it is missing; None is My Drive itself.

    Returns:
        The path of the copy.

    Raises:
        RuntimeError: no Drive is mounted.
        FileNotFoundError: there is no such file.
    """
    target = os.path.join(_drive_path(drive_folder), *_inner_parts(file_path))
    _copy_file(file_path, target)
    return target


def copy_file_from_gdrive(file_path: str, *, drive_folder: str | None = None) -> str:
    """Copies a file from the mounted Google Drive, in place of a local one.

    Args:
        file_path: the local file to write. Its copy is looked for where copy_file_to_gdrive()
            puts it.
        drive_folder: folder in My Drive; None is My Drive itself.

    Returns:
        `file_path`.

    Raises:
        RuntimeError: no Drive is mounted.
        FileNotFoundError: the Drive has no such file.
    """
    source = os.path.join(_drive_path(drive_folder), *_inner_parts(file_path))
    _copy_file(source, file_path)
    return file_path


def _drive_path(drive_folder: str | None) -> str:
    for name in _DRIVE_NAMES:
        path = os.path.join(MOUNT_POINT, name)
        if os.path.isdir(path):
            return os.path.join(path, drive_folder or "")
    raise RuntimeError(
        f"No Google Drive is mounted at {MOUNT_POINT}: call mount_gdrive() first, in Colaboratory"
    )


def _inner_parts(path: str) -> list[str]:
    """The names in a path, without its root, '.' and '..': joined to a folder, they stay in it."""
    parts = [part for part in re.split(r"[/\\:]", path) if part not in ("", ".", "..")]
    if not parts:
        raise ValueError(f"The path {path!r} names no file or folder")
    return parts


def _run_folder(checkpoint_dir: str, run_name: str) -> str:
    if "/".join(_inner_parts(run_name)) != run_name:
        raise ValueError(f"run_name={run_name!r} must be the name of a folder in {checkpoint_dir}")
    return os.path.join(checkpoint_dir, run_name)


def _names(folder: str, pattern: str) -> str:
    """What a folder holds of a pattern, for an error message; '*/' matches folders."""
    # glob leaves out names that start with a dot.
    names = glob.glob(pattern, root_dir=folder)
    return ", ".join(sorted(name.rstrip("/\\") for name in names)) or "none"


def _find_copy(drive: str, checkpoint_dir: str, run_name: str, copy_folder: bool) -> str:
    """The copy of a run that is on the Drive: from this folder, or else from 'checkpoint'."""
    runs = [_run_folder(folder, run_name) for folder in (checkpoint_dir, "checkpoint")]
    parts = [_inner_parts(run) if copy_folder else [get_tarfile_name(run)] for run in runs]
    paths = [os.path.join(drive, *names) for names in parts]
    for path in paths:
        restore_replaced(path)
        if os.path.exists(path):
            return path
    folder = os.path.join(drive, *_inner_parts(checkpoint_dir))
    raise FileNotFoundError(
        f"There is no {paths[0]}. Archives in {drive}: {_names(drive, '*.tar')}. "
        f"Runs in {folder} (for copy_folder=True): {_names(folder, '*/')}"
    )


def _copy_folder(
    source: str, target: str, copy: Callable[[str, str], None], hidden: bool = True
) -> None:
    """Copies each file of a folder, at any depth; with or without hidden ones.

    shutil.copytree() copies the folders' times and modes too, and fails where a Drive refuses that.
    """
    for folder, subfolders, names in os.walk(source, onerror=_raise, followlinks=True):
        if not hidden:
            subfolders[:] = [name for name in subfolders if not name.startswith(".")]
            names = [name for name in names if not name.startswith(".")]
        inner = os.path.normpath(os.path.join(target, os.path.relpath(folder, source)))
        os.makedirs(inner, exist_ok=True)
        for name in names:
            copy(os.path.join(folder, name), os.path.join(inner, name))


def _raise(error: OSError) -> NoReturn:
    raise error


def _copy_file(source: str, target: str) -> None:
    """Copies a file whole, and makes the folder if it is missing."""
    if not os.path.isfile(source):
        folder = os.path.dirname(source) or "."
        raise FileNotFoundError(
            f"There is no file {source}. The folder {folder} holds: {_names(folder, '*')}"
        )
    os.makedirs(os.path.dirname(target) or ".", exist_ok=True)
    with open(source, "rb") as original, write_whole(target) as copy:
        shutil.copyfileobj(original, copy, 1 << 20)


def _link_missing(source: str, target: str) -> None:
    if os.path.exists(target):
        return
    try:
        os.link(source, target)  # A link costs no space; some file systems have none.
    except OSError:
        _copy_file(source, target)


def _pack(source: str, name: str, file: IO[bytes]) -> None:
    def visible(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
        hidden = member.name != name and posixpath.basename(member.name).startswith(".")
        return member if (member.isreg() or member.isdir()) and not hidden else None

    # Links are followed, because _unpack takes none.
    with tarfile.open(fileobj=file, mode="w", dereference=True) as tar:
        tar.add(source, arcname=name, filter=visible)


def _unpack(archive: str, root: str, target: str) -> None:
    """Extracts what lies under `root` in the archive into the folder `target`."""
    try:
        with tarfile.open(archive, "r") as tar:
            checked = [_checked(member, root, archive) for member in tar.getmembers()]
            members = [member for member in checked if member is not None]
            if not members:
                raise ValueError(f"{archive} does not hold the run {root}")
            if hasattr(tarfile, "data_filter"):  # Some releases of Python 3.10 and 3.11 lack it.
                tar.extraction_filter = tarfile.data_filter  # Drops foreign owners and modes.
            tar.extractall(target, members=members)
    except (tarfile.TarError, EOFError) as error:
        raise ValueError(f"{archive} is damaged or no tar archive: {error}") from error


def _checked(member: tarfile.TarInfo, root: str, archive: str) -> tarfile.TarInfo | None:
    """The member with its name relative to `root`; None for `root` and the folders above it."""
    if not (member.isreg() or member.isdir()):
        raise ValueError(f"{archive} holds {member.name!r}, which is a link or a device")
    name = posixpath.normpath(member.name)
    if member.isdir() and (name == "." or f"{root}/".startswith(f"{name}/")):
        return None
    inner = name.removeprefix(f"{root}/")
    if inner == name:
        raise ValueError(f"{archive} holds {member.name!r}, which is not in the run {root}")
    if re.match(r"\\|[A-Za-z]:", inner) or ".." in re.split(r"[/\\]", member.name):
        raise ValueError(f"{archive} holds {member.name!r}, which would leave the run's folder")
    member.name = inner
    return member
