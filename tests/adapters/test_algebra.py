"""Adapters made of adapters: against the updates themselves, and against PEFT's own numbers."""

from __future__ import annotations

import dataclasses
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from helpers import message

import lojax
from lojax.adapters import task_vectors
from lojax.adapters.algebra import METHODS, combine, rescale, resize, subtract

SHAPES = {
    "dense": ((6, 5), ("in", "out")),
    "heads": ((6, 2, 3), ("in", "out", "out")),
    "scanned": ((3, 6, 2, 2), ("stack", "in", "out", "out")),
    "out first": ((5, 6), ("out", "in")),
    "conv": ((3, 3, 2, 5), ("in", "in", "in", "out")),
}


def adapter(kind: str, seed: int, rank: int = 3, scale: float = 1.5, dtype=jnp.float32) -> lojax.Adapter:
    shape, axes = SHAPES[kind]
    rng = np.random.default_rng(seed)
    stack, ins, outs = (
        [n for n, role in zip(shape, axes, strict=True) if role == want] for want in ("stack", "in", "out")
    )
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)
    return lojax.Adapter(draw(*stack, *ins, rank), draw(*stack, rank, *outs), scale, axes)


def update(kind: str, one: lojax.Adapter) -> np.ndarray:
    frozen = {"w": jnp.zeros(SHAPES[kind][0])}
    return np.asarray(lojax.merge(frozen, {"w": one})["w"])


def as_matrices(kind: str, x: np.ndarray) -> np.ndarray:
    """An update as ``[stack, in, out]``."""
    shape, axes = SHAPES[kind]
    order = [i for role in ("stack", "in", "out") for i, r in enumerate(axes) if r == role]
    stack = int(np.prod([n for n, r in zip(shape, axes, strict=True) if r == "stack"]))
    rows = int(np.prod([n for n, r in zip(shape, axes, strict=True) if r == "in"]))
    return x.transpose(order).reshape(stack, rows, -1)


# --- exact methods ---


@pytest.mark.parametrize("kind", SHAPES)
def test_cat_is_the_weighted_sum_exactly(kind):
    parts = [adapter(kind, 0, 3, 1.5), adapter(kind, 1, 2, 0.5), adapter(kind, 2, 1, 2.0)]
    weights = [0.7, -1.3, 0.0]
    one = combine([{"w": part} for part in parts], weights, method="cat")["w"]
    assert (one.rank, one.scale, one.axes) == (6, 1.0, SHAPES[kind][1])
    expected = sum(weight * update(kind, part) for weight, part in zip(weights, parts, strict=True))
    np.testing.assert_allclose(update(kind, one), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", SHAPES)
def test_svd_of_enough_rank_is_exact_and_of_less_is_nearest(kind):
    parts = [{"w": adapter(kind, seed, 2)} for seed in range(2)]
    total = as_matrices(kind, sum(update(kind, part["w"]) for part in parts))
    u, s, vt = np.linalg.svd(total, full_matrices=False)
    for rank in (1, 3, None):
        one = combine(parts, [1.0, 1.0], method="svd", rank=rank)["w"]
        k = rank or 2
        assert one.rank == k
        nearest = (u[:, :, :k] * s[:, None, :k]) @ vt[:, :k]
        np.testing.assert_allclose(as_matrices(kind, update(kind, one)), nearest, atol=2e-5)


@pytest.mark.parametrize("kind", SHAPES)
def test_resize_is_the_nearest_of_the_rank_and_keeps_the_scale(kind):
    one = adapter(kind, 0, 4)
    whole = as_matrices(kind, update(kind, one))
    u, s, vt = np.linalg.svd(whole, full_matrices=False)
    for rank in (1, 3, 6):
        small = resize({"w": one}, rank)["w"]
        assert (small.rank, small.scale, small.axes) == (rank, one.scale, one.axes)
        nearest = (u[:, :, :rank] * s[:, None, :rank]) @ vt[:, :rank]
        np.testing.assert_allclose(as_matrices(kind, update(kind, small)), nearest, atol=5e-5)


def test_resize_never_forms_the_weight():
    m, n = 97, 101
    one = lojax.Adapter(jnp.ones((m, 4)), jnp.ones((4, n)), 1.0, ("in", "out"))
    shapes = [
        v.aval.shape for eqn in jax.make_jaxpr(lambda x: resize({"w": x}, 2))(one).jaxpr.eqns for v in eqn.outvars
    ]
    assert shapes and (m, n) not in shapes and (1, m, n) not in shapes


@pytest.mark.parametrize("kind", ["heads", "scanned"])
def test_rescale_and_subtract(kind):
    one, other = adapter(kind, 0), adapter(kind, 1, 2)
    np.testing.assert_allclose(update(kind, rescale({"w": one}, -0.5)["w"]), -0.5 * update(kind, one), atol=1e-6)
    difference = subtract({"w": one}, {"w": other})["w"]
    np.testing.assert_allclose(update(kind, difference), update(kind, one) - update(kind, other), atol=1e-5)
    assert difference.rank == 5


def test_one_adapter_is_scaled_whatever_the_method():
    one = {"w": adapter("dense", 0)}
    for method in METHODS:
        out = combine([one], [-0.3], method=method, density=0.5, key=jax.random.key(0))["w"]
        np.testing.assert_allclose(update("dense", out), -0.3 * update("dense", one["w"]), atol=1e-5, err_msg=method)


@pytest.mark.parametrize("method", ["svd", "ties_svd", "dare_linear_svd"])
def test_one_adapter_takes_the_rank_that_is_asked_for(method):
    one = {"w": adapter("dense", 0)}
    out = combine([one], [-0.3], method=method, rank=2, density=0.5, key=jax.random.key(0))["w"]
    assert (out.rank, out.scale) == (2, 1.0)
    expected = update("dense", resize(rescale(one, -0.3), 2)["w"])
    np.testing.assert_allclose(update("dense", out), expected, atol=1e-5)


@pytest.mark.parametrize("method", ["magnitude_prune"])
def test_each_weight_of_a_stack_is_combined_on_its_own(method):
    """Pruning and elections of one layer do not depend on the others."""
    parts = [adapter("scanned", seed) for seed in range(3)]
    settings = {"method": method, "density": 0.4}
    whole = combine([{"w": part} for part in parts], [1.0, 2.0, -0.5], **settings)["w"]
    for layer in range(3):
        alone = [dataclasses.replace(p, a=p.a[layer], b=p.b[layer], axes=p.axes[1:]) for p in parts]
        one = combine([{"w": part} for part in alone], [1.0, 2.0, -0.5], **settings)["w"]
        expected = np.tensordot(one.a, one.b, 1)
        np.testing.assert_allclose(np.tensordot(whole.a[layer], whole.b[layer], 1), expected, atol=1e-4)


# --- ranks and scales of a stack ---


def uneven(seed: int) -> lojax.Adapter:
    """Ranks 3, 1 and 0, and a scale each, in a stack of three."""
    full = adapter("scanned", seed)
    within = (np.arange(3) < np.array([[3], [1], [0]])).astype(np.float32)
    a, b = full.a * within[:, None, :], full.b * within[:, :, None, None]
    return dataclasses.replace(full, a=a, b=b, scale=(0.5, 1.5, 0.0), ranks=(3, 1, 0))


def test_ranks_and_scales_by_layer_are_composed():
    one, two = uneven(0), adapter("scanned", 1, 2)
    left, right = update("scanned", one), update("scanned", two)
    x = np.asarray(one.a)[1] @ np.asarray(one.b)[1].reshape(3, -1)
    np.testing.assert_allclose(left[1].reshape(6, -1), 1.5 * x, rtol=1e-5, atol=1e-6)
    for found, want in (
        (combine([{"w": one}, {"w": two}], [0.5, 2.0])["w"], 0.5 * left + 2 * right),
        (combine([{"w": one}], [3.0])["w"], 3 * left),
        (subtract({"w": two}, {"w": one})["w"], right - left),
        (resize({"w": one}, 4)["w"], left),
        (rescale({"w": one}, -2.0)["w"], -2 * left),
        (combine([{"w": one}, {"w": two}], [1.0, 1.0], method="svd", rank=4)["w"], left + right),
    ):
        np.testing.assert_allclose(update("scanned", found), want, rtol=1e-4, atol=1e-5)
    assert resize({"w": one}, 1)["w"].a.shape == (3, 6, 1)


# --- trees ---


def test_trees_with_none_full_parameters_and_boxes():
    boxed = adapter("dense", 0)
    boxed = dataclasses.replace(boxed, a=nn.Partitioned(boxed.a, ("x", None)), b=nn.Partitioned(boxed.b, (None, "y")))
    left = {"w": boxed, "only": adapter("dense", 1), "head": jnp.ones(3), "none": None}
    right = {"w": boxed, "only": None, "head": None, "none": None}
    out = combine([left, right], [1.0, 1.0])
    assert out["w"].a.names == ("x", None) and out["w"].rank == 6
    assert out["only"].rank == 3 and out["none"] is None
    assert (out["head"] == 1).all()


def test_the_dtype_stays():
    half = adapter("dense", 0, dtype=jnp.bfloat16)
    for method in ("linear", "svd"):
        out = combine([{"w": half}] * 2, [1.0, 1.0], method=method, density=0.5, key=jax.random.key(0))["w"]
        assert out.a.dtype == out.b.dtype == jnp.bfloat16, method


ONE = {"w": adapter("dense", 0), "h": None}
REFUSED = [
    (([ONE, ONE], [1.0]), {}, "2 adapters, but 1 weights"),
    (([], []), {}, "at least one lora tree"),
    ((ONE, [1.0, 1.0]), {}, "adapters must be a sequence"),
    (([ONE], [1.0]), {"method": "mean"}, "method='mean'; expected one of linear, ties"),
    (
        ([ONE], [1.0]),
        {"method": "ties"},
        "method='ties' needs density, the share of entries to keep, in (0, 1]; got None",
    ),
    (([ONE], [1.0]), {"method": "ties", "density": 1.5}, "got 1.5"),
    (([ONE], [1.0]), {"method": "ties", "density": 0.5, "majority": "most"}, "majority='most'"),
    (([ONE], [1.0]), {"method": "dare_linear", "density": 0.5}, "pass key=jax.random.key(...)"),
    (([ONE], [1.0]), {"rank": 2}, "rank=2 with method='cat'; it is for the svd methods"),
    (([ONE, {"w": None}], [1.0, 1.0]), {}, "different trees: h is in one of them"),
    (([ONE, {"w": adapter("out first", 0), "h": None}], [1.0, 1.0]), {}, "w: the adapters are of different weights"),
    (([ONE, {"w": jnp.ones(2), "h": None}], [1.0, 1.0]), {}, "an array trained in full"),
    (([{"h": jnp.ones(2)}] * 2, [1.0, 1.0]), {}, "h is trained in full in 2 of the adapters"),
    (([{"w": adapter("dense", 0, r)} for r in (2, 3)], [1.0, 1.0]), {"method": "linear"}, "w: ranks [2, 3] differ"),
]


@pytest.mark.parametrize(("args", "settings", "reason"), REFUSED, ids=[reason[:20] for *_, reason in REFUSED])
def test_bad_input_is_refused(args, settings, reason):
    assert reason in message(ValueError, combine, *args, **settings)


def test_other_bad_input_is_refused():
    assert "rank=0; expected an integer of at least 1" in message(ValueError, resize, ONE, 0)
    full = {"h": jnp.ones(2)}
    assert "h: trained in full, not as an update, so it cannot be scaled" in message(ValueError, rescale, full, 2.0)
    assert "cannot be subtracted" in message(ValueError, subtract, full, full)


@dataclasses.dataclass(frozen=True)
class WithMagnitude(lojax.Adapter):
    """What an adapter of another variant may look like."""

    magnitude: object = None


def test_variants_are_refused_by_name():
    one = adapter("dense", 0)
    other = WithMagnitude(one.a, one.b, one.scale, one.axes, magnitude=jnp.ones(5))
    assert "w: the adapter holds magnitude; only plain" in message(ValueError, combine, [{"w": other}], [1.0])
    assert "w: the adapter holds magnitude; only plain" in message(ValueError, resize, {"w": other}, 1)


# --- PEFT ---


@pytest.fixture(scope="module")
def peers():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
        yield torch, peft


@pytest.mark.peer
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("method", "majority"), [*((m, "total") for m in METHODS), ("ties", "frequency"), ("dare_ties_svd", "frequency")]
)
@pytest.mark.parametrize("layer", ["linear", "conv"])
def test_the_numbers_are_those_of_peft(layer, method, majority, peers, monkeypatch):
    torch, peft = peers
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(7, 6, bias=False) if layer == "linear" else torch.nn.Conv2d(2, 6, 3))
    config = lambda alpha: peft.LoraConfig(r=3, lora_alpha=alpha, target_modules=["0"], init_lora_weights=False)
    model = peft.get_peft_model(net, config(5), adapter_name="x")
    model.add_adapter("y", config(2))
    model.add_adapter("z", config(3))
    module = model.base_model.model[0]
    axes = ("in", "out") if layer == "linear" else ("in", "in", "in", "out")

    def ours(name):
        a, b = (getattr(module, f"lora_{side}")[name].weight.detach().numpy() for side in "AB")
        if layer == "conv":
            a, b = a.transpose(2, 3, 1, 0), b[:, :, 0, 0]
        return {
            "w": lojax.Adapter(jnp.asarray(a if layer == "conv" else a.T), jnp.asarray(b.T), module.scaling[name], axes)
        }

    weights, rng = [0.7, -1.2, 2.0], np.random.default_rng(0)
    kept = []  # DARE draws at random: both sides get the same coins

    def coins(size):
        kept.append(rng.random(size) < 0.6)
        return kept[-1]

    density = 0.6 if method not in ("linear", "cat", "svd") else None
    trees = [ours(name) for name in "xyz"]
    monkeypatch.setattr(torch, "bernoulli", lambda p: torch.tensor(coins(p.shape)).to(p.dtype))
    model.base_model.add_weighted_adapter(
        list("xyz"), weights, "out", combination_type=method, density=density, majority_sign_method=majority
    )
    theirs = module.get_delta_weight("out").detach().numpy()
    if method.startswith("dare"):
        turn = lambda k: k.T if k.ndim == 2 else k.transpose(2, 3, 1, 0).reshape(-1, k.shape[0])
        turned = iter([np.stack([turn(k) for k in kept[i : i + 3]])[:, None] for i in range(0, len(kept), 3)])
        dropped = lambda x, density, key: jnp.where(jnp.asarray(next(turned)), x / jnp.asarray(density, x.dtype), 0.0)
        monkeypatch.setattr(task_vectors, "drop_and_rescale", dropped)
    out = combine(trees, weights, method=method, density=density, majority=majority, key=jax.random.key(0))["w"]
    update = np.tensordot(out.a, out.b, 1)
    update = update.T if layer == "linear" else update.transpose(3, 2, 0, 1)
    np.testing.assert_allclose(update, theirs, rtol=1e-4, atol=1e-5 * np.abs(theirs).max())
