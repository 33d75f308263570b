"""Files and folders are replaced whole, and nothing of others is."""

import json
import os
import signal
from concurrent.futures import ThreadPoolExecutor

import pytest

import hf_iai.files
from hf_iai.files import (
    LOCK,
    MARK,
    MARK_FORMAT,
    TEMPORARY,
    _locked_folder,
    check_replaceable,
    clear_litter,
    replace_file,
    replace_folder,
    temporary_beside,
)


def write(text, name="a.txt"):
    return lambda folder: (folder / name).write_text(text)


def names(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def test_a_file_is_replaced_whole(tmp_path):
    folder = tmp_path / "very" / "deep"
    replace_file(folder / "a.txt", lambda path: path.write_text("one"))
    replace_file(folder / "a.txt", lambda path: path.write_text("two"))
    assert (folder / "a.txt").read_text() == "two" and names(folder) == ["a.txt"]

    def half(path):
        path.write_text("hal")
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        replace_file(folder / "a.txt", half)
    assert (folder / "a.txt").read_text() == "two" and names(folder) == ["a.txt"]


@pytest.mark.parametrize("exchange", [True, False], ids=["exchange", "rename"])
def test_a_folder_is_replaced_whole(tmp_path, monkeypatch, exchange):
    if not exchange:
        monkeypatch.setattr(hf_iai.files, "_exchanged", lambda a, b: False)
    replace_folder(tmp_path / "x", write("one"))
    replace_folder(tmp_path / "x", write("two", "b.txt"))
    assert names(tmp_path) == ["x", "x/b.txt", f"x/{MARK}"]

    def half(folder):
        write("hal")(folder)
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        replace_folder(tmp_path / "x", half)
    assert (tmp_path / "x" / "b.txt").read_text() == "two" and names(tmp_path) == ["x", "x/b.txt", f"x/{MARK}"]


def test_where_folders_cannot_be_exchanged_the_earlier_one_comes_back(tmp_path, monkeypatch):
    replace_folder(tmp_path / "x", write("one"))
    rename = type(tmp_path).rename

    def fails(self, target):
        if self.name == "new":
            raise OSError("busy")
        return rename(self, target)

    monkeypatch.setattr(hf_iai.files, "_exchanged", lambda a, b: False)
    monkeypatch.setattr(type(tmp_path), "rename", fails)
    with pytest.raises(OSError, match="busy"):
        replace_folder(tmp_path / "x", write("two"))
    assert (tmp_path / "x" / "a.txt").read_text() == "one" and [p.name for p in tmp_path.iterdir()] == ["x"]


def test_this_system_exchanges_folders(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    if hf_iai.files._exchanged(tmp_path / "a", tmp_path / "b"):
        assert names(tmp_path) == ["a", "a/b", "b", "b/a"]
    else:
        assert names(tmp_path) == ["a", "a/a", "b", "b/b"]


class Library:
    """A C library that can exchange folders, or not."""

    def __init__(self, **functions):
        self.__dict__.update(functions)


@pytest.mark.parametrize("result", [0, -1])
def test_macos_exchanges_folders_with_its_own_function(tmp_path, monkeypatch, result):
    called = []
    library = Library(renamex_np=lambda *arguments: called.append(arguments) or result)
    monkeypatch.setattr(hf_iai.files.ctypes, "CDLL", lambda name: library)
    monkeypatch.setattr(hf_iai.files.sys, "platform", "darwin")
    assert hf_iai.files._exchanged(tmp_path / "a", tmp_path / "b") == (result == 0)
    assert called == [(os.fsencode(tmp_path / "a"), os.fsencode(tmp_path / "b"), 2)]  # RENAME_SWAP of <stdio.h>


@pytest.mark.parametrize("system", ["Linux", "FreeBSD", "Windows"])
def test_a_system_that_cannot_exchange_folders(tmp_path, monkeypatch, system):
    """An old C library of Linux, another system with a function of that name, a system without `CDLL(None)`."""

    def library(name):
        assert system != "Windows", "a Windows system has no library without a name"
        return Library(renameat2=lambda *arguments: 0) if system == "FreeBSD" else Library()

    a, b = tmp_path / "a", tmp_path / "b"
    monkeypatch.setattr(hf_iai.files.ctypes, "CDLL", library)
    monkeypatch.setattr(hf_iai.files.platform, "system", lambda: system)
    with monkeypatch.context() as patched:
        patched.setattr(os, "name", "nt" if system == "Windows" else "posix")
        found = hf_iai.files._exchanged(a, b)
    assert found is False


def marked_with(values):
    return lambda path: (replace_folder(path, write("x")), (path / MARK).write_text(json.dumps(values)))


@pytest.mark.parametrize(
    ("make", "found"),
    [
        (lambda path: path.write_text("mine"), "is a file"),
        (lambda path: path.symlink_to(path.parent), "is a link to"),
        (lambda path: path.symlink_to(path.parent / "nowhere"), "is a link to"),
        (lambda path: (path.mkdir(), (path / "mine.txt").touch()), "holds 'mine.txt'"),
        (lambda path: (path.mkdir(), (path / "2024").mkdir()), "holds '2024'"),
        (lambda path: (replace_folder(path, write("x")), (path / "7").touch()), "holds '7'"),
        (lambda path: (replace_folder(path, write("x")), (path / "d").mkdir()), "holds 'd'"),
        (lambda path: (replace_folder(path, write("x")), (path / "d").symlink_to("/")), "holds 'd'"),
        (lambda path: (replace_folder(path, write("x")), (path / MARK).write_text("[]")), "holds 'a.txt'"),
        (lambda path: (replace_folder(path, write("x")), (path / MARK).write_text("{")), "holds 'a.txt'"),
        (lambda path: (replace_folder(path, write("x")), (path / MARK).write_text('{"files": 3}')), "holds 'a.txt'"),
        *((marked_with(values), "holds 'a.txt'") for values in (
            {"format": MARK_FORMAT, "files": "a.txt"}, {"format": MARK_FORMAT}, {"files": ["a.txt"]},
            {"format": "another", "files": ["a.txt"]}, {"format": "x", "files": ["a.txt"]},
        )),
    ],
)  # fmt: skip
def test_what_is_not_ours_is_refused_by_name(tmp_path, make, found):
    path = tmp_path / "x"
    make(path)
    before = names(tmp_path)
    with pytest.raises(FileExistsError, match=found):
        replace_folder(path, write("two"))
    assert names(tmp_path) == before


def test_what_appears_while_a_folder_is_written_is_kept(tmp_path):
    replace_folder(tmp_path / "x", write("one"))

    def slow(folder):
        (tmp_path / "x" / "mine.txt").write_text("mine")
        write("two")(folder)

    with pytest.raises(FileExistsError, match="mine.txt"):
        replace_folder(tmp_path / "x", slow)
    assert (tmp_path / "x" / "mine.txt").read_text() == "mine"


def test_nothing_empty_and_ours_may_be_replaced(tmp_path):
    check_replaceable(tmp_path / "missing")
    (tmp_path / "empty").mkdir()
    for name in ("empty", "missing"):
        replace_folder(tmp_path / name, write("one"))
        check_replaceable(tmp_path / name)


def test_litter_of_dead_writers_is_cleared_and_that_of_living_ones_stays(tmp_path):
    for name in ("a", f"{TEMPORARY}left", ".hf_iai", "tmp1234"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
    (tmp_path / f"{TEMPORARY}link").symlink_to(tmp_path / "a")
    with temporary_beside(tmp_path / "x") as mine:
        with temporary_beside(tmp_path / "x") as other:  # of another thread, say
            clear_litter(tmp_path)
            assert mine.is_dir() and other.is_dir()
        process = os.fork()
        if process == 0:
            _, lock = _locked_folder(tmp_path)
            os.kill(os.getpid(), signal.SIGKILL)
        os.waitpid(process, 0)
        assert len(list(tmp_path.glob(f"{TEMPORARY}*"))) == 3
        clear_litter(tmp_path)
        assert set(tmp_path.glob(f"{TEMPORARY}*")) == {mine, tmp_path / f"{TEMPORARY}link"}
    assert {path.name for path in tmp_path.iterdir()} == {"a", ".hf_iai", "tmp1234", f"{TEMPORARY}link"}
    assert names(tmp_path / "a") == ["file"]  # nothing is written behind a link


def test_without_locks_litter_is_cleared_after_a_day(tmp_path, monkeypatch):
    monkeypatch.setattr(hf_iai.files, "_lock", lambda file: None)
    for name in ("new", "old"):
        (tmp_path / f"{TEMPORARY}{name}").mkdir()
        (tmp_path / f"{TEMPORARY}{name}" / LOCK).touch()
    os.utime(tmp_path / f"{TEMPORARY}old", (0, 0))
    replace_file(tmp_path / "a.txt", lambda path: path.write_text("x"))
    assert {path.name for path in tmp_path.iterdir()} == {"a.txt", f"{TEMPORARY}new"}


def test_many_threads_save_to_one_place(tmp_path):
    def work(number):
        for _ in range(30):
            replace_file(tmp_path / "a.txt", lambda path: path.write_text(f"{number}" * 100))
            assert len(set((tmp_path / "a.txt").read_text())) == 1

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(work, range(6)))
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        replace_file(tmp_path / "file" / "a.txt", lambda path: path.write_text("x"))
