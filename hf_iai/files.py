"""Files and folders that are replaced whole: at any moment a reader finds the earlier one or the new one.

A writer works in a temporary folder beside its target. What a killed writer leaves there, the next writer clears.
"""

import ctypes
import json
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

TEMPORARY, LOCK = ".hf_iai-", "lock"  # a temporary folder, then a random name; the file in it that its writer locks
STALE_SECONDS = 24 * 3600  # after which a temporary folder is litter also where there are no locks
MARK, MARK_FORMAT = "hf_iai_files.json", "hf_iai.files.v1"
RENAME_EXCHANGE, RENAME_SWAP, HERE = 2, 2, -100  # of Linux; of macOS; the working directory


@contextmanager
def temporary_beside(path: Path) -> Iterator[Path]:
    """A new folder beside `path`, which is removed with all its files at the end.

    Args:
        path: what will be replaced. Its folder is made if it is missing.

    Raises:
        OSError: if nothing can be written there.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    clear_litter(path.parent)
    folder, lock = _locked_folder(path.parent)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        lock.close()


def _locked_folder(parent: Path) -> tuple[Path, IO]:
    """A temporary folder with a lock that ends with this process, however it ends."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=TEMPORARY, dir=parent))
        try:
            lock = open(folder / LOCK, "w")  # noqa: SIM115, it stays open as long as the folder is needed
        except FileNotFoundError:  # somebody has cleared it before it was locked
            continue
        if _lock(lock) is not False and _is_at(lock, folder / LOCK):
            return folder, lock
        lock.close()


def clear_litter(folder: Path) -> None:
    """Remove the temporary folders that killed writers left in a folder; those of living writers stay."""
    for left in folder.glob(f"{TEMPORARY}*"):
        if left.is_symlink() or not left.is_dir():
            continue
        try:
            with open(left / LOCK, "w") as lock:
                free = _lock(lock)
                if not _is_at(lock, left / LOCK):  # cleared, and made anew, since it was opened
                    continue
                if free or (free is None and _is_old(left)):  # under the lock, so that nobody else takes it meanwhile
                    shutil.rmtree(left, ignore_errors=True)
        except OSError:  # it is gone, or of another user
            continue


def _lock(file: IO) -> bool | None:
    """Lock a file. False if another process or thread has locked it, None where there are no such locks."""
    try:
        import fcntl  # not on Windows

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except (ImportError, OSError):
        return None
    return True


def _is_at(file: IO, path: Path) -> bool:
    """Whether an open file is the one that lies at a path."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` make a file, and rename it to `path` once it is complete.

    Args:
        path: the file to make or replace.
        write: gets the path where it has to write.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     replace_file(Path(folder, "a.txt"), lambda path: path.write_text("whole"))
        ...     [(path.name, path.read_text()) for path in Path(folder).iterdir()]
        [('a.txt', 'whole')]
    """
    with temporary_beside(path) as temporary:
        write(temporary / path.name)
        with open(temporary / path.name, "rb+") as file:
            os.fsync(file.fileno())  # so that a loss of power does not leave an empty file either
        os.replace(temporary / path.name, path)


def replace_folder(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a folder, and put it at `path` once it is complete, in place of an earlier one of ours.

    The folder gets a file that names all files in it. By this mark a later call knows what it may replace.

    Args:
        path: the folder to make or replace.
        write: gets an empty folder.

    Raises:
        FileExistsError: as `check_replaceable`.
    """
    check_replaceable(path)
    with temporary_beside(path) as temporary:
        new = temporary / "new"
        new.mkdir()
        write(new)
        files = {"format": MARK_FORMAT, "files": _files_in(new)}
        (new / MARK).write_text(json.dumps(files, indent=1) + "\n", encoding="utf-8")
        check_replaceable(path)  # again, since writing takes a while
        put_folder(new, path)


def check_replaceable(path: Path) -> None:
    """Refuse to replace anything that we have not written.

    Raises:
        FileExistsError: if `path` is a link or a file, or a folder with a file in it that our mark does not name. The
            message names it.
    """
    if path.is_symlink():
        raise FileExistsError(f"{path} is a link to {os.readlink(path)}: give that path itself, or remove the link")
    if not path.exists():
        return
    if not path.is_dir():
        raise FileExistsError(f"{path} is a file: choose another path, or remove it")
    known = _marked_files(path)
    foreign = [name for name in _files_in(path) if name not in known]
    if foreign:
        raise FileExistsError(
            f"{path} holds {foreign[0]!r}, which hf_iai has not written: choose another path, or move it away"
        )


def put_folder(new: Path, path: Path) -> None:
    """Put the folder `new` at `path`, in one step. What was at `path` is at `new` afterwards.

    Where the system cannot exchange two folders, there is a moment at which nothing is at `path`.
    """
    if not path.exists():
        new.rename(path)
    elif not _exchanged(new, path):
        old = new.with_name("old")
        path.rename(old)
        try:
            new.rename(path)
        except BaseException:
            old.rename(path)
            raise


def _marked_files(folder: Path) -> set[str]:
    """The files that our mark in a folder names, the mark itself included; none if there is no mark."""
    try:
        mark = json.loads((folder / MARK).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return set()
    if not isinstance(mark, dict) or mark.get("format") != MARK_FORMAT or not isinstance(mark.get("files"), list):
        return set()
    return {MARK, *(name for name in mark["files"] if isinstance(name, str))}


def _files_in(folder: Path) -> list[str]:
    """Relative paths of all files and empty folders in a folder."""
    found = (p for p in folder.rglob("*") if p.is_symlink() or not p.is_dir() or not any(p.iterdir()))
    return sorted(path.relative_to(folder).as_posix() for path in found)


def _exchanged(a: Path, b: Path) -> bool:
    """Exchange what two paths name, in one step. False if the system or the file system cannot."""
    libc = ctypes.CDLL(None) if os.name == "posix" else None
    if sys.platform == "darwin":
        return libc.renamex_np(os.fsencode(a), os.fsencode(b), RENAME_SWAP) == 0
    if platform.system() != "Linux" or not hasattr(libc, "renameat2"):
        return False
    return libc.renameat2(HERE, os.fsencode(a), HERE, os.fsencode(b), RENAME_EXCHANGE) == 0


def _is_old(path: Path) -> bool:
    try:
        return time.time() - path.stat().st_mtime > STALE_SECONDS
    except OSError:
        return False
