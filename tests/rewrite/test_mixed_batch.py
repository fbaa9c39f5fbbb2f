"""Rows with adapters of their own equal a Python loop over the rows: outputs and gradients, every variant and net."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lojax
from tests.test_variants import CHANGES_WEIGHT, FAMILY, WEIGHTS, computes, moved, started


def three(member, weight="dense"):
    """A model, its base, and three adapters of the member; of different ranks and scales where one base serves them."""
    model, frozen, lora, x = started(member, weight)
    loras = [moved(lora, size) for size in (0.1, 0.2, 0.3)]
    if member not in CHANGES_WEIGHT and "start" not in FAMILY[member]:
        rank = 2 if member == "orthogonal" else 1  # which needs an even one
        small = lojax.wrap(WEIGHTS[weight][0], "w", rank=rank, alpha=5, **FAMILY[member])
        loras[1] = moved(small.init(jax.random.key(5), {"w": frozen["w"]}, x)[1], 0.2)
    return model, frozen, loras, x


def by_hand(model, frozen, loras, ids, x, **kwargs):
    """Each row as a batch of one."""
    rows = [model.apply(frozen, None if i < 0 else loras[i], x[k : k + 1], **kwargs) for k, i in enumerate(ids)]
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *rows)


def near(got, expected, tolerance=1e-6):
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert x.shape == y.shape
        assert float(jnp.linalg.norm(jnp.ravel(x - y))) <= tolerance * max(float(jnp.linalg.norm(jnp.ravel(y))), 1.0)


def rows(chosen, members=tuple(FAMILY)):
    """Members on weights; those for which ``chosen(member, weight)`` is false run in .ci/thorough alone."""
    return [
        pytest.param(member, weight, marks=() if chosen(member, weight) else pytest.mark.slow)
        for member in members
        for weight in WEIGHTS
        if not ("eva" in member and weight in ("embedding", "tied"))
    ]


@pytest.mark.parametrize(
    ("member", "weight"),
    rows(lambda m, w: (m == "lora" and w not in ("heads", "conv")) or (w in ("stack", "tied") and computes(m))),
)
def test_each_row_has_its_own_adapter(member, weight):
    model, frozen, loras, x = three(member, weight)
    bank = lojax.stack(loras)
    ids = [2, 0, 1][: x.shape[0]]
    if member not in CHANGES_WEIGHT:
        ids[1] = -1

    @jax.jit
    def mixed(bank, ids):
        return jax.value_and_grad(lambda b: _loss(y := model.apply(frozen, b, x, adapter=ids), y), has_aux=True)(bank)

    (_, y), gradient = mixed(bank, jnp.array(ids))
    near(y, by_hand(model, frozen, loras, ids, x))
    expected = jax.grad(lambda loras: _loss(by_hand(model, frozen, loras, ids, x))[0])(loras)
    near(lojax.unstack(gradient), expected, 1.5e-6)  # 1.2e-6 for two of the 92 rows, 1e-6 for the others
    assert any(jnp.any(leaf) for leaf in jax.tree.leaves(expected))


def _loss(y, aux=None):
    return jnp.sum(jnp.sin(y)), aux


@pytest.mark.parametrize(
    ("member", "weight"),
    rows(lambda m, w: (m, w) in {("lora", "conv"), ("lora", "stack"), ("dora", "tied")}, ("lora", "dora")),
)
def test_weights_over_adapters_add_their_updates(member, weight):
    model, frozen, loras, x = three(member, weight)
    weights = jnp.array([[0.3, -0.5, 1.2], [0.0, 0.0, 0.0], [1.0, 0.0, 0.0]])[: x.shape[0]]
    y = jax.jit(lambda w: model.apply(frozen, lojax.stack(loras), x, adapter=w))(weights)

    def row(k):
        merged = [model.merge(frozen, lora)["w"] for lora in loras]
        total = frozen["w"] + sum(w * (m - frozen["w"]) for w, m in zip(weights[k], merged, strict=True))
        return WEIGHTS[weight][0]({"w": total}, x[k : k + 1])

    near(y, jnp.concatenate([row(k) for k in range(x.shape[0])]), 1e-5)


@pytest.mark.parametrize(
    ("member", "weight"),
    rows(lambda m, w: (m, w) in {("lora", "stack"), ("lora", "conv"), ("dora", "tied")}, ("lora", "dora", "lora-fa")),
)
def test_the_wide_form_is_the_same(member, weight, monkeypatch):
    model, frozen, loras, x = three(member, weight)
    ids = jnp.array([1, -1, 2][: x.shape[0]])
    run = jax.value_and_grad(lambda b: _loss(model.apply(frozen, b, x, adapter=ids))[0])
    gathered = run(lojax.stack(loras))
    monkeypatch.setattr("lojax.rewrite.mixed_batch.prefers_wide", lambda *_: True)
    near(run(lojax.stack(loras)), gathered, 3e-6)


class Decoder(nn.Module):
    """Attention with a cache, and dropout."""

    decode: bool = False

    @nn.compact
    def __call__(self, tokens, *, train=False):
        x = nn.Embed(20, 16)(tokens)
        mask = None if self.decode else nn.make_causal_mask(tokens)
        x = x + nn.MultiHeadDotProductAttention(2, decode=self.decode)(x, mask=mask)
        x = nn.Dropout(0.5, deterministic=not train)(x)
        return nn.Dense(20)(nn.gelu(nn.Dense(32)(x)))


def decoder():
    tokens = jax.random.randint(jax.random.key(1), (4, 6), 0, 20)
    model = lojax.wrap(Decoder(), "**/{kernel,embedding}", rank=2)
    params = Decoder().init(jax.random.key(0), tokens)
    frozen, lora = model.init(jax.random.key(1), params, tokens)
    return model, params, frozen, [moved(lora, size) for size in (0.1, 0.3)], tokens


def test_decoding_with_a_cache_is_the_whole_sequence():
    model, _, frozen, loras, tokens = decoder()
    bank, ids = lojax.stack(loras), jnp.array([1, 0, -1, 1])
    whole = model.apply(frozen, bank, tokens, adapter=ids)
    near(whole, by_hand(model, frozen, loras, [1, 0, -1, 1], tokens))
    step = lojax.wrap(Decoder(decode=True), "**/{kernel,embedding}", rank=2)
    cache = Decoder(decode=True).init(jax.random.key(0), tokens)["cache"]

    @jax.jit
    def decode(cache, token):
        state = {**frozen, "cache": cache}
        return step.apply(state, with_cache(bank, cache), token, adapter=ids, mutable=["cache"])

    for t in range(tokens.shape[1]):
        logits, variables = decode(cache, tokens[:, t : t + 1])
        assert jax.tree.structure(variables["cache"]) == jax.tree.structure(cache)
        cache = variables["cache"]
        near(logits[:, 0], whole[:, t], 3e-6)


def test_the_axis_of_a_cache_is_asked_for_where_it_is_not_plain():
    model, _, frozen, loras, tokens = decoder()
    bank, tokens = lojax.stack(loras), tokens[:2]  # two rows, two heads
    cache = Decoder(decode=True).init(jax.random.key(0), tokens)["cache"]
    step = lojax.wrap(Decoder(decode=True), "**/{kernel,embedding}", rank=2)
    call = lambda **kwargs: step.apply(
        {**frozen, "cache": cache}, with_cache(bank, cache), tokens[:, :1], adapter=[0, 1], mutable=["cache"], **kwargs
    )
    with pytest.raises(ValueError, match=r"cache/.*/cached_key .* has 2 axes of the length of the batch, 2"):
        call()
    axes = jax.tree.map(lambda x: 0 if x.ndim else None, cache)
    logits, _ = call(batch_axes={"cache": axes})
    near(logits[:, 0], by_hand(model, frozen, loras, [0, 1], tokens)[:, 0], 3e-6)


def with_cache(bank, cache):
    return dataclasses.replace(bank, lora={**bank.lora, "cache": jax.tree.map(lambda _: None, cache)})


def test_rows_draw_their_own_dropout():
    model, _, frozen, loras, tokens = decoder()
    same_rows = jnp.broadcast_to(tokens[:1], tokens.shape)
    for key in (jax.random.key(3), jax.random.PRNGKey(3)):
        y = model.apply(frozen, lojax.stack(loras), same_rows, adapter=[0] * 4, train=True, rngs={"dropout": key})
        assert len({float(jnp.sum(row)) for row in y}) == 4


def test_dropout_on_the_adapters_inputs():
    f = lambda p, x: x @ p["w"]
    model = lojax.wrap(f, "w", rank=2, dropout=0.5)
    frozen, lora = model.init(jax.random.key(0), {"w": jnp.zeros((16, 4))}, jnp.ones((1, 16)))
    bank = lojax.stack([moved(lora), moved(lora)])
    x = jnp.ones((3, 16))
    y = model.apply(frozen, bank, x, adapter=[0, 1, -1], dropout_key=jax.random.key(1))
    assert not jnp.allclose(y[0], y[1]) and not y[2].any()
    mean = jnp.mean(
        jax.vmap(lambda k: model.apply(frozen, bank, x, adapter=[0, 1, -1], dropout_key=k))(
            jax.random.split(jax.random.key(2), 4000)
        ),
        0,
    )
    np.testing.assert_allclose(mean, model.apply(frozen, bank, x, adapter=[0, 1, -1]), atol=0.05)
    other = lojax.stack([lora, {"w": dataclasses.replace(lora["w"], dropout=0.1)}])
    with pytest.raises(ValueError, match=r"w: the adapters of the bank have the dropout rates \[0.1, 0.5\]"):
        model.apply(frozen, other, x, adapter=[0, 1, 0], dropout_key=jax.random.key(1))


def test_one_adapter_for_the_whole_batch():
    model, frozen, loras, x = three("dora")
    bank = lojax.stack(loras, names=["a", "b", "c"])
    near(model.apply(frozen, bank, x, adapter="b"), model.apply(frozen, loras[1], x))
    near(jax.jit(lambda i: model.apply(frozen, bank, x, adapter=i))(2), model.apply(frozen, loras[2], x))
    near(model.apply(frozen, bank, x, adapter=-1), x @ frozen["w"])
    near(model.apply(frozen, bank, x, adapter=["c", None, "a"]), by_hand(model, frozen, loras, [2, -1, 0], x))


def test_numbers_out_of_range_give_nan_under_jit():
    model, frozen, loras, x = three("lora")
    run = jax.jit(lambda ids: model.apply(frozen, lojax.stack(loras), x, adapter=ids))
    y = run(jnp.array([3, -2, 1]))
    assert jnp.isnan(y[:2]).all() and jnp.isfinite(y[2]).all()


def test_the_base_alone_is_the_base_bit_for_bit():
    model, params, frozen, loras, tokens = decoder()
    base = Decoder().apply(params, tokens)
    np.testing.assert_array_equal(model.apply(frozen, None, tokens), base)
    near(model.apply(params, lojax.stack(loras), tokens, adapter=[-1] * 4), base)
    with jax.disable_jit():
        rows = [Decoder().apply(params, tokens[k : k + 1]) for k in range(4)]
        mixed = model.apply(frozen, lojax.stack(loras), tokens, adapter=[-1] * 4)
    near(mixed, jnp.concatenate(rows), 3e-7)


def test_parameters_trained_in_full():
    f = lambda p, x: x @ p["w"] + p["head"]
    params = {"w": jnp.ones((4, 3)), "head": jnp.array([1.0, 2.0, 3.0])}
    model = lojax.wrap(f, "w", rank=1, train="head")
    x = jax.random.normal(jax.random.key(0), (3, 4))
    frozen, lora = model.init(jax.random.key(0), params, x)
    loras = [moved(lora, size) for size in (0.1, 0.4)]
    bank = lojax.stack(loras)
    near(model.apply(frozen, bank, x, adapter=[0, 1, 1]), by_hand(model, frozen, loras, [0, 1, 1], x))
    with pytest.raises(ValueError, match=r"-1 is the base alone, and head is trained in full: frozen holds None there"):
        model.apply(frozen, bank, x, adapter=[0, -1, 1])
    assert jnp.isnan(jax.jit(lambda i: model.apply(frozen, bank, x, adapter=i))(jnp.array([0, -1, 1]))[1]).all()
    y = model.apply(params, bank, x, adapter=[0, -1, 1])
    near(y[1], f(params, x)[1])
    near(y[::2], by_hand(model, frozen, loras, [0, 1], x[::2]))
    weighted = model.apply(params, bank, x, adapter=jnp.array([[0.5, 0.5], [0.0, 0.0], [0.0, 1.0]]))
    near(weighted[1:], jnp.stack([f(params, x)[1], model.apply(frozen, loras[1], x)[2]]))
    near(weighted[0], (model.apply(frozen, loras[0], x)[0] + model.apply(frozen, loras[1], x)[0]) / 2)
    with pytest.raises(ValueError, match="head is trained in full, and weights over adapters add to the value"):
        model.apply(frozen, bank, x, adapter=jnp.ones((3, 2)))


def test_training_a_mixed_batch_trains_each_adapter_alone():
    model, frozen, loras, x = three("lora")
    target, tx = jax.random.normal(jax.random.key(9), (3, 8)), optax.adam(0.05)
    bank, ids = lojax.stack(loras), jnp.array([0, 1, 2])

    def train(tree, loss, steps=5):
        state = tx.init(tree)
        for _ in range(steps):
            with jax.numpy_dtype_promotion("standard"):
                updates, state = tx.update(jax.grad(loss)(tree), state, tree)
            tree = optax.apply_updates(tree, updates)
        return tree

    together = train(bank, lambda b: jnp.sum((model.apply(frozen, b, x, adapter=ids) - target) ** 2))
    for k, lora in enumerate(loras):
        alone = train(lora, lambda t, k=k: jnp.sum((model.apply(frozen, t, x[k : k + 1]) - target[k : k + 1]) ** 2))
        near(together[k], alone, 2e-6)


def test_token_rows_of_an_adapter_that_has_none_do_not_train():
    params = {"w": jnp.ones((4, 3)), "embed": jax.random.normal(jax.random.key(0), (9, 4))}
    f = lambda p, tokens: p["embed"][tokens] @ p["w"]
    model = lojax.wrap(f, ["w", lojax.Rule("embed", train="tokens", tokens=[1, 5])], rank=1)
    tokens = jnp.array([[1, 5], [5, 2]])
    frozen, with_rows = model.init(jax.random.key(1), params, tokens)
    bank = lojax.stack([moved(with_rows), {**moved(with_rows, 0.3), "embed": None}])
    run = lambda b: jnp.sum(jnp.sin(model.apply(frozen, b, tokens, adapter=[0, 1])))
    gradient = jax.grad(run)(bank).lora["embed"].rows
    assert gradient[0].any() and not gradient[1].any()
    every = jax.grad(lambda b: jnp.sum(jax.vmap(lambda t: model.apply(frozen, t, tokens))(b.for_vmap())))(bank)
    assert every.lora["embed"].rows[0].any() and not every.lora["embed"].rows[1].any()
    base = jax.random.normal(jax.random.key(0), (9, 4))
    near(model.apply(frozen, bank, tokens, adapter=[0, 1])[1], base[tokens[1]] @ model.merge(frozen, bank[1])["w"])


def test_the_report_counts_all_rows():
    model, frozen, loras, x = three("lora")
    bank = lojax.stack(loras)
    report = model.report(frozen, bank, jax.ShapeDtypeStruct(x.shape, x.dtype), adapter=jnp.array([0, 1, 2]))
    assert report.factored == 1
    assert report.weights[0].flops == 2 * 3 * 6 * 8 and report.extra_flops == 2 * 3 * 2 * (6 + 8)


def test_a_quantized_base():
    w = jax.random.normal(jax.random.key(0), (64, 64))
    frozen = lojax.quantize({"w": w}, "nf4")
    model = lojax.wrap(lambda p, x: x @ p["w"], "w", rank=2)
    x = jax.random.normal(jax.random.key(1), (3, 64))
    frozen, lora = model.init(jax.random.key(0), frozen, x)
    loras = [moved(lora), moved(lora, 0.3)]
    near(model.apply(frozen, lojax.stack(loras), x, adapter=[1, 0, -1]), by_hand(model, frozen, loras, [1, 0, -1], x))


@pytest.mark.parametrize(
    ("adapter", "error", "says"),
    [
        ([0, 1, 3], ValueError, "adapter= holds 3, and the bank 3 adapters; expected integers"),
        ([0, 1, -2], ValueError, "adapter= holds -2"),
        ([0, 1], ValueError, r"adapter= or active= has 2 rows, and args/0 \(float32\[3,6\]\) has 3 at axis 0"),
        ([0.0, 1.0, 2.0], ValueError, r"adapter= is float32\[3\]; expected integers"),
        ([], ValueError, "adapter= is empty"),
        ([[0, 1, 2]], ValueError, r"adapter= is int32\[1,3\]"),
        (np.ones((3, 2), np.float32), ValueError, r"adapter= is float32\[3,2\]; .*floats \[batch, 3\]"),
        ([True, False, True], TypeError, r"adapter= is bool\[3\]"),
        (["a", "b", "d"], KeyError, "has no adapter 'd'; its names: a, b, c"),
    ],
)
def test_refuses_what_names_no_adapters(adapter, error, says):
    model, frozen, loras, x = three("lora")
    with pytest.raises(error, match=says):
        model.apply(frozen, lojax.stack(loras, names=["a", "b", "c"]), x, adapter=adapter)


def test_refuses_one_for_the_other():
    model, frozen, loras, x = three("lora")
    bank = lojax.stack(loras)
    with pytest.raises(ValueError, match=r"lora is a stack of 3 adapters: index one, as bank\[0\], or .*adapter=ids"):
        model.apply(frozen, bank, x)
    with pytest.raises(ValueError, match="lora is a stack of 3 adapters"):
        model.merge(frozen, bank)
    with pytest.raises(TypeError, match="adapter= picks adapters of a bank, and lora is one adapter"):
        model.apply(frozen, loras[0], x, adapter=[0, 0, 0])
    with pytest.raises(TypeError, match="and lora is None"):
        model.apply(frozen, None, x, adapter=[0, 0, 0])
    with pytest.raises(ValueError, match=r"w: this is one adapter of a bank whose adapters have different scales"):
        jax.vmap(lambda lora, row: model.apply(frozen, lora, row[None]))(bank.lora, x)
    equal = lojax.stack([moved(loras[0]), loras[0]])
    near(
        jax.vmap(lambda lora, row: model.apply(frozen, lora, row))(equal.lora, x[:2]),
        jnp.stack([model.apply(frozen, equal[k], x[k : k + 1])[0] for k in range(2)]),
    )
    with pytest.raises(ValueError, match="-1 is the base alone, and the start of w was taken out of its weight"):
        pissa, frozen, loras, x = three("pissa")
        pissa.apply(frozen, lojax.stack(loras), x, adapter=[0, -1, 1])
