"""What the starts from data share: batches that are read again, sums over them, and random columns."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lojax
from lojax.training.subspace_iteration import check_batches, draw_columns, sum_over_batches

PARAMS = {"w": jnp.ones((3, 40, 6)), "bias": jnp.ones(6)}


def make():
    return lojax.init(jax.random.key(0), PARAMS, lojax.Rule("w", rank=2, axes=("stack", "in", "out")))


def test_an_iterator_is_kept_and_a_list_is_not_copied():
    batches = [1, 2, 3]
    assert check_batches("eva", *make(), batches, 1)[0] is batches
    once, adapters = check_batches("eva", *make(), iter(batches), 1)
    assert [*once, *once] == batches * 2
    assert list(adapters) == ["w"]


def test_an_endless_source_that_can_be_read_again_is_not_read_to_its_end():
    class Endless:
        def __iter__(self):
            return itertools.count()

    check_batches("eva", *make(), Endless(), 1)


def test_no_adapter_is_an_error():
    frozen, lora = lojax.init(jax.random.key(0), PARAMS, None, train="bias")
    with pytest.raises(ValueError, match="eva: lora holds no low-rank adapter"):
        check_batches("eva", frozen, lora, [1], 1)


def test_the_sum_over_batches():
    products = ({"w": jnp.full(2, float(i))} for i in range(4))
    np.testing.assert_array_equal(sum_over_batches(products)["w"], [6, 6])


@pytest.mark.parametrize(
    ("role", "rank", "shape"), [("in", 2, (3, 40, 12)), ("in", 39, (3, 40, 40)), ("out", 2, (3, 6, 6))]
)
def test_there_are_a_few_more_columns_than_the_rank_where_they_fit(role, rank, shape):
    _, adapters = check_batches("eva", *make(), [1], 1)
    columns = draw_columns(None, adapters, PARAMS, role, {"w": rank})
    assert columns["w"].shape == shape
    other = draw_columns(jax.random.key(1), adapters, PARAMS, role, {"w": rank})
    assert not np.array_equal(columns["w"], other["w"])
