"""Which directory a subcommand may replace."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers import message

from lojax.cli.paths import check_target, user_path


def test_the_home_of_the_user(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert user_path("~/x") == Path("/home/me/x") and user_path("a/~") == Path("a/~")


def check(target, *inputs, overwrite=True, foreign=None):
    check_target(target, inputs, overwrite=overwrite, foreign=lambda directory: foreign)


def test_what_does_not_exist_may_be_made(tmp_path):
    check(tmp_path / "out", tmp_path, overwrite=False)


def test_what_exists_is_replaced_where_lojax_wrote_all_of_it(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "in").mkdir()
    check(tmp_path / "out", tmp_path / "in")
    refused = lambda **settings: message(FileExistsError, check, tmp_path / "out", tmp_path / "in", **settings)
    assert "or pass --overwrite to replace it" in refused(overwrite=False)
    assert "holds mine, which lojax did not write" in refused(foreign="mine")


@pytest.mark.parametrize("link", [False, True])
def test_an_input_is_known_under_every_name(link, tmp_path):
    (tmp_path / "a" / "in").mkdir(parents=True)
    target = tmp_path / "a"
    if link:
        (tmp_path / "link").symlink_to("a")
        target = tmp_path / "link"
    for source in (tmp_path / "a" / "in", tmp_path / "a", tmp_path / "a" / ".." / "a" / "in"):
        assert "is or holds" in message(ValueError, check, target, source)
