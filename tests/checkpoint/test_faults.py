"""Whatever happens to a save or to its files: the last whole checkpoint, bit for bit, or an error that says where."""

from __future__ import annotations

import concurrent.futures
import errno
import os
import pickle
import random
import resource
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_same_bits, message

import lojax
from lojax.checkpoint import adapter_directory as files
from lojax.checkpoint import save_restore
from lojax.files import filesystem
from lojax.files.filesystem import lock_directory
from tests.attacks.attack import forkserver
from tests.checkpoint import checkpoint_cases as cases


def _on_device(tree: Any) -> Any:
    return jax.tree.map(jnp.asarray, tree)


# --- stopped while saving (tests/attacks kills real processes) ---


class Stop(BaseException):
    """Stands for a kill: no handler for ordinary errors may catch it."""


_MOMENTS = ["start_write", "take_inventory", "commit", "replace", "rmtree"]


@pytest.mark.parametrize("moment", _MOMENTS)
@pytest.mark.parametrize("kind", [Stop, OSError])
def test_stopped_at_each_step_of_a_save(tmp_path, monkeypatch, moment, kind):
    lojax.save(tmp_path, cases.at_step(1))
    holder = {"start_write": save_restore, "replace": os, "rmtree": shutil}.get(moment, files)

    def stop(*args, **kwargs):
        raise kind(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(holder, moment, stop)
        with pytest.raises(kind) as caught:
            lojax.save(tmp_path, cases.at_step(2))
    now = 2 if moment == "rmtree" else 1  # by then the new checkpoint is complete
    assert_same_bits(lojax.restore(tmp_path), _on_device(cases.at_step(now)))
    if kind is OSError and moment != "rmtree":
        assert caught.value.errno == errno.ENOSPC
        assert str(tmp_path) in str(caught.value) and "The previous checkpoint there is whole." in str(caught.value)
    lojax.save(tmp_path, cases.at_step(3))
    assert sorted(os.listdir(tmp_path)) == ["adapter.json", cases.arrays_folder(tmp_path).name]
    assert_same_bits(lojax.restore(tmp_path), _on_device(cases.at_step(3)))


def test_litter_is_never_taken_for_a_checkpoint(tmp_path):
    lojax.save(tmp_path / "x", cases.at_step(1))
    folder = cases.arrays_folder(tmp_path / "x")
    (tmp_path / "x" / files.MANIFEST).rename(tmp_path / "x" / f"{files.MANIFEST}.tmp")
    text = message(FileNotFoundError, lojax.restore, tmp_path / "x")
    assert str(tmp_path / "x" / files.MANIFEST) in text and "unfinished save" in text
    lojax.save(tmp_path / "x", cases.at_step(2))
    assert not folder.exists()
    assert_same_bits(lojax.restore(tmp_path / "x"), _on_device(cases.at_step(2)))


def test_a_reader_during_a_save(tmp_path, monkeypatch):
    """The checkpoint is replaced, and its arrays removed, between reading the pointer and the arrays."""
    lojax.save(tmp_path, cases.at_step(1))
    real, calls = files.check_inventory, []

    def slow(folder, files):
        if not calls:
            calls.append(1)
            lojax.save(tmp_path, cases.at_step(2))
        return real(folder, files)

    monkeypatch.setattr(files, "check_inventory", slow)
    assert_same_bits(lojax.restore(tmp_path), _on_device(cases.at_step(2)))


def test_a_reader_whose_arrays_are_removed_between_the_check_and_the_read(tmp_path, monkeypatch):
    """Orbax says "'NoneType' object is not iterable" then, or reads zeros: neither reaches the user."""
    lojax.save(tmp_path, cases.at_step(1))
    real, calls = save_restore.read, []

    def late(folder, *args):
        if not calls:
            calls.append(folder)
            lojax.save(tmp_path, cases.at_step(2))
            assert not folder.exists()
        return real(folder, *args)

    monkeypatch.setattr(save_restore, "read", late)
    assert_same_bits(lojax.restore(tmp_path), _on_device(cases.at_step(2)))


@pytest.mark.parametrize("error", [None, TypeError("'NoneType' object is not iterable"), KeyError("x")])
def test_what_was_read_while_the_checkpoint_was_replaced_is_read_again(tmp_path, monkeypatch, error):
    lojax.save(tmp_path, cases.at_step(1))
    real, calls = save_restore.read, []

    def torn(folder, arrays, shardings):
        calls.append(folder.name)
        if len(calls) > 1:
            return real(folder, arrays, shardings)
        lojax.save(tmp_path, cases.at_step(2))
        if error is not None:
            raise error
        return {name: np.zeros(array.shape, array.dtype) for name, array in arrays.items()}

    monkeypatch.setattr(save_restore, "read", torn)
    assert_same_bits(lojax.restore(tmp_path), _on_device(cases.at_step(2)))
    assert calls == ["arrays-1", "arrays-2"]


# --- two that save to one path ---


def test_threads_take_turns(tmp_path):
    """One save at a time: 31 of 32 failed, each removed the unfinished arrays of the others."""
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda step: lojax.save(tmp_path, cases.at_step(step), metadata={"step": step}), range(12)))
    step = save_restore.read_manifest(tmp_path).metadata["step"]
    assert_same_bits(lojax.restore(tmp_path), _on_device(cases.at_step(step)))
    assert sorted(os.listdir(tmp_path)) == ["adapter.json", "arrays-12"]


def test_of_two_that_must_not_overwrite_one_saves(tmp_path):
    def save(step):
        try:
            lojax.save(tmp_path, cases.at_step(step), overwrite=False)
        except FileExistsError as error:
            return str(error)
        return step

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        results = list(pool.map(save, range(4)))
    (step,) = [result for result in results if isinstance(result, int)]
    assert_same_bits(lojax.restore(tmp_path), _on_device(cases.at_step(step)))
    assert all("overwrite=True" in result for result in results if result != step)


def _hold(path: str, out: Any) -> None:
    with lock_directory(Path(path)) as is_locked:
        out.send(is_locked)
        time.sleep(600)


def test_a_path_that_another_process_holds_is_an_error_that_says_who(tmp_path, monkeypatch):
    lojax.save(tmp_path, cases.at_step(1))
    receive, send = (context := forkserver()).Pipe(duplex=False)
    holder = context.Process(target=_hold, args=(str(tmp_path), send))
    holder.start()
    assert receive.poll(120) and receive.recv(), "this file system has no locks"
    monkeypatch.setattr(filesystem, "_BUSY_LIMIT", 0.2)
    text = message(TimeoutError, lojax.save, tmp_path, cases.at_step(2))
    assert f"process {holder.pid} has been writing to {tmp_path}" in text
    assert "previous checkpoint there is whole" in text
    assert_same_bits(lojax.restore(tmp_path), _on_device(cases.at_step(1)))  # readers do not wait
    holder.kill()
    holder.join()
    lojax.save(tmp_path, cases.at_step(3))  # the lock of a killed process is free
    assert_same_bits(lojax.restore(tmp_path), _on_device(cases.at_step(3)))


def test_a_save_in_the_background_holds_up_only_its_own_path(tmp_path, monkeypatch):
    """There was one writer for the whole process."""
    may_go_on, real = threading.Event(), save_restore.start_write

    def slow(folder, arrays):
        if folder.parent.name == "slow":
            assert may_go_on.wait(60)
        return real(folder, arrays)

    monkeypatch.setattr(save_restore, "start_write", slow)
    saving = lojax.save(tmp_path / "slow", cases.at_step(1), wait=False)
    lojax.save(tmp_path / "quick", cases.at_step(2), wait=False).result()
    lojax.save(tmp_path / "quick", cases.at_step(3))
    assert not saving.done()
    may_go_on.set()
    saving.result()
    assert_same_bits(lojax.restore(tmp_path / "slow"), _on_device(cases.at_step(1)))


# --- no room, no right ---


def _save_in_child(path: str, step: int, limit: int | None, user: int | None, out: Any) -> None:
    if limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    if user is not None:
        os.setuid(user)
    try:
        lojax.save(path, cases.at_step(step))
        out.send("saved")
    except Exception as error:
        out.send(f"{type(error).__name__}: {error}")


def _try_in_child(path: Path, step: int, *, limit: int | None = None, user: int | None = None) -> str:
    receive, send = (context := forkserver()).Pipe(duplex=False)
    child = context.Process(target=_save_in_child, args=(str(path), step, limit, user, send))
    child.start()
    assert receive.poll(120), "the child says nothing"
    child.join()
    return receive.recv()


@pytest.mark.parametrize("limit", [0, 100, 1000])
def test_no_room_for_a_file(tmp_path, limit):
    lojax.save(tmp_path, cases.at_step(1))
    text = _try_in_child(tmp_path, 2, limit=limit)
    assert text.startswith("OSError: ") and str(tmp_path) in text
    assert "could not be saved" in text and "The previous checkpoint there is whole." in text
    assert_same_bits(lojax.restore(tmp_path), _on_device(cases.at_step(1)))
    assert sorted(os.listdir(tmp_path)) == ["adapter.json", "arrays-1"]


@pytest.mark.skipif(os.name == "nt", reason="permissions of POSIX")
def test_read_only_directory(tmp_path):
    path = tmp_path / "adapter"
    lojax.save(path, cases.at_step(1))
    for parent in (tmp_path, *tmp_path.parents):
        if parent.stat().st_uid == os.getuid() and parent != Path("/"):
            parent.chmod(0o755)
        if parent.name.startswith("pytest-of"):
            break
    path.chmod(0o555)
    text = _try_in_child(path, 2, user=65534 if os.getuid() == 0 else None)
    path.chmod(0o755)
    assert text.startswith("PermissionError: ") and str(path) in text
    assert "previous checkpoint there is whole" in text
    assert_same_bits(lojax.restore(path), _on_device(cases.at_step(1)))


def test_a_file_where_the_directory_should_be(tmp_path):
    (tmp_path / "x").write_text("mine")
    text = message(FileExistsError, lojax.save, tmp_path / "x", cases.at_step(1))
    assert str(tmp_path / "x") in text and "could not be saved" in text
    assert (tmp_path / "x").read_text() == "mine"


def test_a_failure_in_the_background_is_told(tmp_path, caplog):
    (tmp_path / "x").write_text("mine")
    saving = lojax.save(tmp_path / "x", cases.at_step(1), wait=False)
    assert "could not be saved" in message(FileExistsError, saving.result)
    assert "Saving in the background failed." in caplog.text
    lojax.save(tmp_path / "y", cases.at_step(1))  # the next one does not suffer


# --- damaged files ---


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "adapter"
    lojax.save(path, cases.at_step(1))
    return path


def _files(path: Path) -> list[Path]:
    return sorted(file for file in path.rglob("*") if file.is_file())


def test_every_file_cut_short_flipped_or_missing(saved):
    """Each damage to each file, one at a time: an error that names the file; whole again: no error."""
    for file in _files(saved):
        data = file.read_bytes()
        for damage in (data[:-1], data[: len(data) // 2], b"", data + b"\0", None):
            file.unlink() if damage is None else file.write_bytes(damage)
            text = message(FileNotFoundError if damage is None else ValueError, lojax.restore, saved)
            assert str(file) in text
            file.write_bytes(data)
    assert_same_bits(lojax.restore(saved), _on_device(cases.at_step(1)))


def test_a_flipped_bit_anywhere(saved):
    rng = random.Random(0)
    for file in _files(saved):
        data = file.read_bytes()
        for place in {0, len(data) - 1, *(rng.randrange(len(data)) for _ in range(12))}:
            damaged = bytearray(data)
            damaged[place] ^= 1 << rng.randrange(8)
            file.write_bytes(damaged)
            assert str(file) in message(ValueError, lojax.restore, saved)
        file.write_bytes(data)
    assert_same_bits(lojax.restore(saved), _on_device(cases.at_step(1)))


def test_arrays_of_another_checkpoint(saved, tmp_path):
    """The arrays are whole, of the same names and shapes, but those of another save."""
    lojax.save(tmp_path / "other", cases.at_step(2))
    shutil.rmtree(saved / "arrays-1")
    shutil.copytree(tmp_path / "other" / "arrays-1", saved / "arrays-1")
    assert str(saved / "arrays-1") in message(ValueError, lojax.restore, saved)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "null",
        "[]",
        "{",
        "{}",
        '{"format": 1}',
        '{"a": 1, "a": 2}',
        '{"a": NaN}',
        "[" * 100_000,
        "\x80\xff",
        '{"format":',
    ],
)
def test_wrong_json(saved, text):
    (saved / files.MANIFEST).write_bytes(text.encode("latin-1"))
    assert str(saved / files.MANIFEST) in message(ValueError, lojax.restore, saved)


def test_damaged_pointer_does_not_cost_the_arrays(saved):
    """While nobody can tell what the pointer named, a save that fails must not sweep it away."""
    whole = (saved / files.MANIFEST).read_bytes()
    (saved / files.MANIFEST).write_bytes(whole[:-9])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "take_inventory", lambda folder: 1 / 0)
        with pytest.raises(OSError, match="could not be saved"):
            lojax.save(saved, cases.at_step(2))
    (saved / files.MANIFEST).write_bytes(whole)
    assert_same_bits(lojax.restore(saved), _on_device(cases.at_step(1)))


# --- made to harm ---


def _set(*keys: Any, to: Any) -> Any:
    def change(record: dict[str, Any]) -> None:
        node = record
        for key in keys[:-1]:
            node = node[key]
        node[keys[-1]] = to

    return change


_STAMP = {"bytes": 3, "blake2b": "00"}
_FORGED = {
    "newer version": (_set("version", to=3), "version 3"),
    "no version": (_set("version", to="1"), "version '1'"),
    "another format": (_set("format", to="pickle"), "format 'pickle'"),
    "no adapters": (lambda record: record.pop("adapters"), "'adapters' is missing"),
    "folder above": (_set("arrays", to="../arrays-1"), "'arrays'"),
    "absolute folder": (_set("arrays", to="/etc"), "'arrays'"),
    "file above": (_set("files", to={"../../secret": _STAMP}), "'../../secret'"),
    "absolute file": (_set("files", to={"/etc/passwd": _STAMP}), "'/etc/passwd'"),
    "file with NUL": (_set("files", to={"a\0b": _STAMP}), "inside the folder"),
    "file with backslash": (_set("files", to={"..\\x": _STAMP}), "inside the folder"),
    "file without size": (_set("files", to={"x": {"blake2b": "0"}}), "'x'"),
    "negative size": (_set("full", "head", "shape", to=[-1, 3]), "'head'"),
    "shape of text": (_set("full", "head", "shape", to=["3"]), "'head'"),
    "object dtype": (_set("full", "head", "dtype", to="O"), "'head'"),
    "unknown dtype": (_set("full", "head", "dtype", to="float33"), "'head'"),
    "huge shape": (_set("full", "head", "shape", to=[1 << 20, 1 << 20]), "4,398,046,5"),
    "other shape": (_set("full", "head", "shape", to=[3, 32]), "float32[32,3] at 'head'"),
    "unknown axis": (_set("adapters", "query", "axes", to=["in", "up"]), "'up'"),
    "rank": (_set("adapters", "query", "rank", to=4), "'query'"),
    "scale of text": (_set("adapters", "query", "scale", to="__import__('os')"), "'query'"),
    "empty but wide": (_set("full", "more", to={"shape": [0, 1 << 70], "dtype": "int8", "digest": "0" * 16}), "'more'"),
    "dropout of text": (_set("adapters", "query", "dropout", to="0.1"), "'query'"),
    "unknown field": (_set("adapters", "query", "exec", to="x"), "exec"),
    "unknown array": (_set("adapters", "query", "c", to={"shape": [1], "dtype": "float32", "digest": ""}), "'c'"),
    "path twice": (_set("other", to=["query"]), "twice"),
    "a leaf below a leaf": (_set("other", to=["head/more"]), "'head/more' is below 'head', which is a leaf"),
    "keys": (_set("keys", to={"head": [{}]}), "'keys'"),
    "base": (_set("base", to=[1]), "'base'"),
    "base entry": (_set("base", to={"head": {"spec": 1}}), "'base'"),
    "an array that is not there": (lambda r: r["full"].update(more=r["full"]["head"]), "'more'"),
    "an array that is not said": (lambda r: r["full"].pop("head"), "'head'"),
}


@pytest.mark.parametrize("name", _FORGED)
def test_forged(saved, name):
    change, expected = _FORGED[name]
    cases.forge(saved, change)
    text = message(ValueError, lojax.restore, saved)
    assert expected in text and str(saved) in text


def test_forged_box_is_only_a_name(saved):
    cases.forge(saved, _set("full", "head", "box", to={"kind": "os.system", "names": ["echo"]}))
    assert isinstance(lojax.restore(saved)["head"], jax.Array)


def test_links_out_of_the_folder_are_not_followed(saved, tmp_path):
    file = next((saved / "arrays-1").glob("d/*"))
    (tmp_path / "elsewhere").write_bytes(file.read_bytes())
    file.unlink()
    file.symlink_to(tmp_path / "elsewhere")
    assert str(file) in message(FileNotFoundError, lojax.restore, saved)


def test_nothing_is_unpickled(saved, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("unpickled")

    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    assert_same_bits(lojax.restore(saved), _on_device(cases.at_step(1)))


def test_names_never_leave_the_directory(tmp_path):
    evil = {
        "../../up": np.ones(2, np.float32),
        "/absolute": np.ones(3, np.float32),
        "..": {"..": np.ones(4, np.float32)},
    }
    cases.save_full(tmp_path / "a" / "b", evil)
    assert_same_bits(lojax.restore(tmp_path / "a" / "b"), _on_device(evil))
    assert [*os.listdir(tmp_path), *os.listdir(tmp_path / "a")] == ["a", "b"]


def test_no_checkpoint(tmp_path):
    text = message(FileNotFoundError, lojax.restore, tmp_path / "nowhere")
    assert str(tmp_path / "nowhere" / files.MANIFEST) in text
