"""A directory is replaced whole, and nothing is left over: after errors, kills, full disks, and onto links."""

from __future__ import annotations

import errno
import multiprocessing
import os
import time
from pathlib import Path

import pytest
from helpers import message

from lojax.files import atomic_directory as module
from lojax.files.atomic_directory import atomic_directory, exchange, refuse_existing


def write(target: Path, text: str, *, overwrite: bool = True) -> None:
    with atomic_directory(target, overwrite=overwrite) as fresh:
        (fresh / "file").write_text(text)


def content(target: Path) -> str:
    """The text in ``target``; nothing else may be in it or beside it."""
    assert os.listdir(target) == ["file"] and os.listdir(target.parent) == [target.name]
    return (target / "file").read_text()


@pytest.fixture(params=["exchange", "two renames"])
def target(request, tmp_path, monkeypatch):
    if request.param == "two renames":
        monkeypatch.setattr(module, "exchange", lambda left, right: False)
    return tmp_path / "parent" / "out"


def test_made_and_replaced(target):
    write(target, "first", overwrite=False)
    assert content(target) == "first"
    write(target, "second")
    assert content(target) == "second"
    text = message(FileExistsError, write, target, "third", overwrite=False)
    assert str(target) in text and "overwrite=True" in text and content(target) == "second"


def test_an_error_changes_nothing(target):
    write(target, "first")
    with pytest.raises(ZeroDivisionError), atomic_directory(target, overwrite=True) as fresh:
        (fresh / "file").write_text("half")
        _ = 1 / 0
    assert content(target) == "first"


def test_what_came_into_being_meanwhile_is_not_replaced(tmp_path):
    with pytest.raises(FileExistsError), atomic_directory(tmp_path / "out"):
        write(tmp_path / "out", "other")
    assert content(tmp_path / "out") == "other"


def test_a_link_stays_and_what_it_points_to_is_replaced(target, tmp_path):
    write(target, "first")
    (tmp_path / "link").symlink_to(target)
    write(tmp_path / "link", "second")
    assert (tmp_path / "link").is_symlink() and content(target) == "second"


def test_a_file_is_replaced_by_a_directory(target):
    target.parent.mkdir()
    target.write_text("a file")
    write(target, "directory")
    assert content(target) == "directory"


def test_the_directory_has_the_usual_permissions(tmp_path):
    (tmp_path / "usual").mkdir()
    write(tmp_path / "out", "x")
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_a_full_disk_names_the_target(target):
    write(target, "first")
    with pytest.raises(OSError) as caught, atomic_directory(target, overwrite=True):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # as write() does
    assert caught.value.errno == errno.ENOSPC and content(target) == "first"
    assert f"{target} could not be written: No space left on device. What was there is unch" in str(caught.value)


def test_an_error_that_names_its_own_file_stays_as_it_is(tmp_path):
    with pytest.raises(FileNotFoundError) as caught, atomic_directory(tmp_path / "out"):
        (tmp_path / "input").read_text()
    assert caught.value.filename == str(tmp_path / "input")


class Kill(BaseException):
    """Stands for a SIGKILL: what would clean up does not run either."""


@pytest.mark.parametrize("moment", ["fresh.rename", "_remove"])
def test_killed_between_the_two_renames(tmp_path, monkeypatch, moment):
    """The old directory is put back by the next call, or the new one stays."""
    target = tmp_path / "out"
    write(target, "first")

    def kill(*args):
        raise Kill

    with monkeypatch.context() as patch:
        patch.setattr(module, "exchange", lambda left, right: False)
        patch.setattr(module, "_remove", lambda path: None)
        if moment == "fresh.rename":
            rename = Path.rename
            patch.setattr(Path, "rename", lambda self, to: kill() if to == target else rename(self, to))
        with pytest.raises(Kill) if moment == "fresh.rename" else pytest.MonkeyPatch.context():
            write(target, "second")
    assert len(os.listdir(tmp_path)) == 2
    with pytest.raises(ZeroDivisionError), atomic_directory(target, overwrite=True):
        _ = 1 / 0
    assert content(target) == ("first" if moment == "fresh.rename" else "second")


def test_exchange_swaps_in_one_step(tmp_path):
    for name in ("left", "right"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).write_text("")
    if not exchange(tmp_path / "left", tmp_path / "right"):
        pytest.skip("this file system cannot")
    assert (os.listdir(tmp_path / "left"), os.listdir(tmp_path / "right")) == (["right"], ["left"])
    assert not exchange(tmp_path / "left", tmp_path / "missing")


def _write_and_wait(target: Path, started) -> None:
    with atomic_directory(target, overwrite=True) as fresh:
        (fresh / "file").write_text("half")
        started.send(fresh)
        time.sleep(600)


def test_leftovers_of_the_dead_are_removed_and_those_of_the_living_kept(tmp_path):
    target = tmp_path / "out"
    write(target, "first")
    (tmp_path / ".out.other").mkdir()  # not ours
    receive, send = (context := multiprocessing.get_context("spawn")).Pipe(duplex=False)
    child = context.Process(target=_write_and_wait, args=(target, send))
    child.start()
    assert receive.poll(60)
    leftover = receive.recv()
    write(target, "second")
    assert leftover.exists()
    child.kill()
    child.join()
    write(target, "third")
    assert sorted(os.listdir(tmp_path)) == [".out.other", "out"] and (target / "file").read_text() == "third"


def test_refuse_existing(tmp_path):
    refuse_existing(tmp_path / "missing", overwrite=False)
    refuse_existing(tmp_path, overwrite=True)
    assert message(FileExistsError, refuse_existing, tmp_path, overwrite=False).startswith(f"{tmp_path} exists.")
