"""The reader of compiled programs; tests/planner/test_collectives.py covers the rest of it."""

import pytest

from lojax.planner.hlo import parse


def test_a_text_that_is_no_program():
    with pytest.raises(ValueError, match="no ENTRY computation"):
        parse("hello")
