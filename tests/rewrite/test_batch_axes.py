"""Where the rows are in arguments and outputs, and nets whose rows meet."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

import lojax
from tests.rewrite.test_mixed_batch import near
from tests.test_variants import moved


def made(f, *args, **kwargs):
    model = lojax.wrap(f, "w", rank=1)
    params = {"w": jax.random.normal(jax.random.key(1), (4, 4))}
    frozen, lora = model.init(jax.random.key(0), params, *args, **kwargs)
    return model, frozen, [moved(lora, 0.2), moved(lora, 0.5)]


X = jax.random.normal(jax.random.key(2), (3, 5, 4))
IDS = jnp.array([1, 0, 1])


def test_rows_of_another_axis_and_arguments_that_rows_share():
    def f(params, x, bias, *, mask, scale, mode):
        assert mode == "plain"
        y = (x @ params["w"] + bias) * mask[:, :, None] * scale
        return {"y": y, "pooled": jnp.swapaxes(y.sum(0), 0, 1), "shared": jnp.sum(bias)}

    mask = jax.random.normal(jax.random.key(4), (5, 3))
    kwargs = {"mask": mask, "scale": jnp.float32(2.0), "mode": "plain"}
    x, bias = jnp.swapaxes(X, 0, 1), jnp.arange(4.0)
    model, frozen, loras = made(f, x, bias, **kwargs)
    axes = {0: 1, 1: None, "mask": 1}
    got = model.apply(frozen, lojax.stack(loras), x, bias, adapter=IDS, batch_axes=axes, **kwargs)
    for k, i in enumerate(IDS):
        own = {**kwargs, "mask": mask[:, k : k + 1]}
        one = model.apply(frozen, loras[i], x[:, k : k + 1], bias, **own)
        near(got["y"][:, k : k + 1], one["y"])
        near(got["pooled"][:, k : k + 1], one["pooled"])
        near(got["shared"], one["shared"])


def test_trees_of_axes():
    f = lambda p, inputs: inputs["x"] @ p["w"] + inputs["bias"]
    inputs = {"x": X, "bias": jnp.arange(4.0)}
    model, frozen, loras = made(f, inputs)
    for axes in ([{"x": 0, "bias": None}], {0: {"x": 0, "bias": None}}):
        got = model.apply(frozen, lojax.stack(loras), inputs, adapter=IDS, batch_axes=axes)
        near(got[1:2], model.apply(frozen, loras[0], {**inputs, "x": X[1:2]}))


@pytest.mark.parametrize(
    ("axes", "says"),
    [
        (1, r"has 3 rows, and args/0 \(float32\[3,5,4\]\) has 5 at axis 1"),
        (7, "has no axis 7"),
        ({1: 0}, "batch_axes names the argument 1, and apply got 0"),
        ([0, 0], "one for each of the 1 positional arguments"),
        ("rows", "expected an axis"),
        ([{"x": 0}], "batch_axes of args/0 is no prefix of the argument"),
    ],
)
def test_refuses_axes(axes, says):
    model, frozen, loras = made(lambda p, x: x @ p["w"], X)
    with pytest.raises(ValueError, match=says):
        model.apply(frozen, lojax.stack(loras), X, adapter=IDS, batch_axes=axes)


class Normed(nn.Module):
    @nn.compact
    def __call__(self, x, *, train):
        return nn.BatchNorm(use_running_average=not train)(nn.Dense(4)(x))


MEETING = {
    "a mean over the batch": lambda p, x: x @ p["w"] - jnp.mean(x @ p["w"], 0, keepdims=True),
    "a softmax over the batch": lambda p, x: jax.nn.softmax(x @ p["w"], axis=0),
    "attention over the batch": lambda p, x: jnp.einsum("btd,ctd,cte->bte", x, x @ p["w"], x),
    "a cumulative sum over tokens of all rows": lambda p, x: jnp.cumsum((x @ p["w"]).reshape(-1, 4), 0).reshape(
        x.shape
    ),
    "sorted rows": lambda p, x: jnp.sort(x @ p["w"], 0),
    "the rows in reverse": lambda p, x: (x @ p["w"])[::-1],
    "the first row": lambda p, x: x @ p["w"] + x[:1],
    "in a scan": lambda p, x: jax.lax.scan(lambda c, _: (c - c.mean(0), None), x @ p["w"], None, 2)[0],
    "a loss": lambda p, x: jnp.sum((x @ p["w"]) ** 2),
}


@pytest.mark.parametrize("name", MEETING)
def test_refuses_nets_whose_rows_meet(name):
    model, frozen, loras = made(MEETING[name], X)
    with pytest.raises(ValueError, match=r"lets the rows of a batch meet \(.*test_batch_axes.py"):
        model.apply(frozen, lojax.stack(loras), X, adapter=IDS)


def test_batch_statistics_are_refused_in_training_only():
    net, x = Normed(), X[:, 0]
    variables = net.init(jax.random.key(0), x, train=True)
    model = lojax.wrap(net, "**/kernel", rank=1)
    frozen, lora = model.init(jax.random.key(0), variables, x, train=False)
    bank = lojax.stack([moved(lora), moved(lora, 0.5)])
    near(
        model.apply(frozen, bank, x, train=False, adapter=IDS)[1:2],
        model.apply(frozen, bank[0], x[1:2], train=False),
    )
    with pytest.raises(ValueError, match="batch statistics in training"):
        model.apply(frozen, bank, x, train=True, mutable=["batch_stats"], adapter=IDS)
    with pytest.raises(ValueError, match="no axis for the rows of the batch and yet differs from row to row"):
        model.apply(frozen, bank, x, train=True, mutable=["batch_stats"], adapter=IDS, check_rows=False)


def test_check_rows_may_be_left_out():
    """Experts that take every token sort the tokens of all rows, and each token is by itself all the same."""

    def f(p, x):
        flat = x.reshape(-1, 4)
        order = jnp.argsort(flat[:, 0])
        return (flat[order] @ p["w"])[jnp.argsort(order)].reshape(x.shape)

    model, frozen, loras = made(f, X)
    with pytest.raises(ValueError, match="pass check_rows=False"):
        model.apply(frozen, lojax.stack(loras), X, adapter=IDS)
    got = model.apply(frozen, lojax.stack(loras), X, adapter=IDS, check_rows=False)
    near(got[1:2], model.apply(frozen, loras[0], X[1:2]))


def test_refuses_outputs_that_merge_rows():
    model, frozen, loras = made(lambda p, x: (x @ p["w"]).reshape(-1, 4), X)
    with pytest.raises(ValueError, match=r"The output \(the whole output\) merges the rows of the batch"):
        model.apply(frozen, lojax.stack(loras), X, adapter=IDS)


def test_an_array_of_the_net_with_as_many_rows():
    constant = jnp.ones((3, 1, 1))
    model, frozen, loras = made(lambda p, x: x @ p["w"] + constant, X)
    with pytest.raises(TypeError, match="incompatible shapes for broadcasting") as caught:
        model.apply(frozen, lojax.stack(loras), X, adapter=IDS)
    assert "lojax traced the net with 3027 rows" in "".join(caught.value.__notes__)


def test_refuses_outputs_without_rows_that_depend_on_the_adapter():
    model, frozen, loras = made(lambda p, x: (x @ p["w"], jnp.sum(p["w"])), X)
    with pytest.raises(ValueError, match=r"One of the outputs 1 has no axis for the rows .* differs from row to row"):
        model.apply(frozen, lojax.stack(loras), X, adapter=IDS)
