"""`stack`, `unstack` and `Bank`: what goes in comes out, and what does not fit is refused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax.core import meta

import lojax

PARAMS = {"layer": {"kernel": jnp.ones((6, 4)), "bias": jnp.ones(4)}, "stack": jnp.ones((3, 5, 5)), "head": jnp.ones(2)}
AXES = {"stack": ("stack", "in", "out")}


def adapter(seed, rank, alpha, targets=("layer/kernel", "stack"), **settings):
    rules = [lojax.Rule(t, axes=AXES.get(t)) for t in targets]
    _, lora = lojax.init(jax.random.key(seed), PARAMS, rules, rank=rank, alpha=alpha, **settings)
    leaves, tree = jax.tree.flatten(lora)
    keys = jax.random.split(jax.random.key(seed + 100), len(leaves))
    noise = [jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(tree, [x + n for x, n in zip(leaves, noise, strict=True)])


def same(got, expected):
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, got, expected)


LORAS = [adapter(0, 2, 4), adapter(1, 4, 4, ("stack",)), adapter(2, 1, 9, ("layer/kernel",))]


def test_unstack_gives_back_what_stack_took():
    bank = lojax.stack(LORAS, names=["french", "german", "code"])
    assert len(bank) == 3 and bank.lora["stack"].a.shape == (3, 3, 5, 4)
    for got, lora in zip(lojax.unstack(bank), LORAS, strict=True):
        same(got, lora)
    same(bank["german"], LORAS[1])
    same(bank[-1], LORAS[2])
    assert "3 adapters of 2 weights" in repr(bank) and "french" in repr(bank)


@pytest.mark.parametrize(
    "settings", [{"variant": "dora"}, {"variant": "lora-fa"}, {"train": "head"}, {"dropout": 0.1}], ids=str
)
def test_every_kind_of_entry_comes_back(settings):
    loras = [adapter(i, rank, 3, **settings) for i, rank in enumerate((3, 1))]
    for got, lora in zip(lojax.unstack(lojax.stack(loras)), loras, strict=True):
        same(got, lora)


def test_ranks_of_a_stack_and_token_rows_come_back():
    rules = [lojax.Rule("stack", rank=[2, 0, 1], alpha=6, axes=AXES["stack"])]
    _, varied = lojax.init(jax.random.key(0), PARAMS, rules)
    _, plain = lojax.init(jax.random.key(1), PARAMS, [lojax.Rule("stack", axes=AXES["stack"])], rank=3, alpha=6)
    for got, lora in zip(lojax.unstack(lojax.stack([varied, plain])), (varied, plain), strict=True):
        same(got, lora)
    scaled = lojax.stack([varied, plain]).for_vmap()["stack"]
    np.testing.assert_allclose(scaled.b[0, 0], 3.0 * np.pad(varied["stack"].b[0], ((0, 1), (0, 0))))
    embedding = {"embed": jnp.ones((9, 4))}
    rule = lojax.Rule("embed", tokens=[1, 5])
    loras = [lojax.init(jax.random.key(i), embedding, rule, rank=i + 1)[1] for i in range(2)]
    rule = lojax.Rule("embed", train="tokens", tokens=[1, 5])
    loras_of_rows = [lojax.init(jax.random.key(i), embedding, rule)[1] for i in range(2)]
    for got, lora in zip(lojax.unstack(lojax.stack(loras_of_rows)), loras_of_rows, strict=True):
        same(got, lora)
    for got, lora in zip(lojax.unstack(lojax.stack(loras)), loras, strict=True):
        same(got, lora)


def test_boxes_keep_their_names():
    params = {"w": meta.Partitioned(jnp.ones((4, 6)), ("embed", "mlp"))}
    loras = [lojax.init(jax.random.key(i), params, "w", rank=i + 1)[1] for i in range(2)]
    bank = lojax.stack(loras)
    assert nn.get_partition_spec(bank.lora)["w"].b == jax.sharding.PartitionSpec(None, None, "mlp")
    for got, lora in zip(lojax.unstack(bank), loras, strict=True):
        same(got, lora)


def test_a_bank_is_a_pytree():
    bank = lojax.stack(LORAS)
    doubled = jax.tree.map(lambda x: 2 * x, bank)
    same(doubled[1], jax.tree.map(lambda x: 2 * x, LORAS[1]))
    gradient = jax.grad(lambda bank: sum(jnp.sum(x**2) for x in jax.tree.leaves(bank)))(bank)
    same(gradient, doubled)


def test_for_vmap_holds_the_scales():
    bank = lojax.stack(LORAS)
    loras = bank.for_vmap()
    np.testing.assert_array_equal(loras["stack"].b[1], LORAS[1]["stack"].b * 1.0)
    np.testing.assert_array_equal(loras["layer"]["kernel"].b[2, :1], LORAS[2]["layer"]["kernel"].b * 9.0)
    assert loras["stack"].scale == 1.0 and not loras["layer"]["kernel"].b[1].any()


def test_replace_puts_another_adapter_into_a_place():
    bank = lojax.stack(LORAS, names=["a", "b", "c"])
    new = adapter(7, 2, 40, ("stack",))
    swapped = bank.replace("b", new)
    assert jax.tree.structure(swapped) == jax.tree.structure(bank)
    same(swapped[0], LORAS[0])
    got = swapped["b"]["stack"]
    assert got.scale == 1.0 and got.rank == 4
    np.testing.assert_allclose(got.a @ got.b, 20 * (new["stack"].a @ new["stack"].b), rtol=1e-5, atol=1e-4)


def test_room_for_larger_adapters():
    bank = lojax.stack(LORAS, rank=8)
    large = adapter(5, 8, 8)
    got = bank.replace(2, large)[2]
    np.testing.assert_allclose(
        got["stack"].scale * got["stack"].a @ got["stack"].b, large["stack"].a @ large["stack"].b, rtol=1e-4, atol=1e-4
    )
    with pytest.raises(ValueError, match=r"rank 4 does not fit into the rank 2.*makes a bank with room"):
        lojax.stack(LORAS).replace(0, large)
    with pytest.raises(ValueError, match=r"layer/kernel: lora adapts this parameter and like leaves it alone"):
        lojax.stack(LORAS).replace(1, adapter(5, 2, 2))


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (lambda: lojax.stack([]), ValueError, "no adapters"),
        (lambda: lojax.stack(LORAS[0]), TypeError, "takes a list of lora trees, got dict"),
        (lambda: lojax.stack([lojax.stack(LORAS)]), TypeError, r"adapters\[0\] is a bank itself"),
        (lambda: lojax.stack(LORAS, names=["a"]), ValueError, "expected 3 different names"),
        (lambda: lojax.stack(LORAS, names=["a", "b", "a"]), ValueError, "expected 3 different names"),
        (lambda: lojax.stack(LORAS, rank=2), ValueError, r"adapters\[1\] has rank 4, above rank=2"),
        (lambda: lojax.stack(LORAS, rank=0), ValueError, "expected an integer of at least 1"),
        (lambda: lojax.unstack(LORAS), TypeError, "takes the Bank"),
        (
            lambda: lojax.stack(LORAS)[3],
            IndexError,
            "The number 3 is out of range: the bank holds 3 adapters, numbered 0 to 2",
        ),
        (lambda: lojax.stack(LORAS, names=["a", "b", "c"])["B"], KeyError, "Did you mean|has no adapter 'B'"),
        (lambda: lojax.stack(LORAS)["a"], KeyError, "it has no names"),
        (
            lambda: lojax.stack([LORAS[0], adapter(1, 2, 2, variant="dora")]),
            ValueError,
            r"adapters\[1\] is of the variant 'dora'",
        ),
        (
            lambda: lojax.stack([adapter(0, 2, 2, variant="dora"), adapter(1, 2, 2, ("stack",), variant="dora")]),
            ValueError,
            "layer/kernel: lora does not adapt this weight, and like does so with a DoRA magnitude",
        ),
        (lambda: lojax.stack([adapter(0, 2, 2, train="head"), LORAS[0]]), ValueError, r"head: adapters\[0\] trains"),
        (
            lambda: lojax.stack([adapter(0, 2, 2, train="stack", targets=("layer/kernel",)), LORAS[0]]),
            ValueError,
            r"stack: adapters\[0\] trains this parameter in full and adapters\[1\] adapts it",
        ),
        (
            lambda: lojax.stack([LORAS[0], adapter(0, 2, 2, init="pissa")]),
            ValueError,
            r"adapters\[1\] belongs to a base moved by 'pissa', and adapters\[0\] to the pretrained base",
        ),
        (lambda: lojax.stack([LORAS[0], other_base()]), ValueError, "They are for different bases"),
        (lambda: lojax.stack([LORAS[0], {"layer": None}]), ValueError, "different structure"),
    ],
)
def test_refuses(make, error, says):
    with pytest.raises(error, match=says):
        make()


def other_base():
    wide = dataclasses.replace(LORAS[0]["stack"], a=jnp.ones((3, 7, 2)))
    return {**LORAS[0], "stack": wide}
