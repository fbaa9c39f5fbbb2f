"""The names of the package itself."""

import pytest

import lojax


def test_dir_shows_the_public_names_only():
    names = [name for name in dir(lojax) if not name.startswith("__")]
    assert sorted(names) == lojax.__all__


def test_sharding_is_an_attribute():
    assert "sharding" in lojax.__all__ and callable(lojax.sharding.init_sharded)


def test_an_old_name_says_where_it_is_now():
    with pytest.raises(AttributeError, match=r"no attribute 'scale'.*lojax\.sharding.*lojax\.planner"):
        _ = lojax.scale
    with pytest.raises(AttributeError, match=r"has no attribute 'nothing'\.$"):
        _ = lojax.nothing
