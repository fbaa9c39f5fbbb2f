"""Activated LoRA: an adapter that acts on some tokens only. Before them the net is the base, bit for bit."""

import dataclasses
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lojax
from tests.rewrite.test_mixed_batch import Decoder, decoder, near
from tests.test_variants import moved

ACTIVE = np.array([[False, False, True, True], [False] * 4, [True] * 4])


def test_by_hand():
    model = lojax.wrap(lambda p, x: x @ p["w"], "w", rank=2, alpha=6)
    x = jax.random.normal(jax.random.key(0), (3, 4, 5))
    frozen, lora = model.init(jax.random.key(1), {"w": jax.random.normal(jax.random.key(2), (5, 7))}, x)
    lora = moved(lora, 0.5)
    w, a, b = (np.asarray(v, np.float64) for v in (frozen["w"], lora["w"].a, lora["w"].b))
    expected = np.asarray(x, np.float64) @ w + ACTIVE[..., None] * (3.0 * np.asarray(x, np.float64) @ a @ b)
    y, gradient = jax.value_and_grad(lambda t: jnp.sum(jnp.sin(model.apply(frozen, t, x, active=ACTIVE))))(lora)
    np.testing.assert_allclose(model.apply(frozen, lora, x, active=ACTIVE), expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(y, np.sum(np.sin(expected)), rtol=1e-5)
    masked = np.asarray(x, np.float64) * ACTIVE[..., None]
    by_hand = 3.0 * np.einsum("btm,btn,rn->mr", masked, np.cos(expected), b)
    np.testing.assert_allclose(gradient["w"].a, by_hand, rtol=1e-4, atol=1e-4)


def layers(params, x):
    def layer(h, w):
        return jnp.tanh(h @ w), None

    return jax.lax.scan(jax.checkpoint(layer), x, params["w"])[0]


def test_in_a_scan_of_layers_and_over_a_bank():
    model = lojax.wrap(layers, "w", rank=2)
    x = jax.random.normal(jax.random.key(0), (3, 4, 6))
    frozen, lora = model.init(jax.random.key(1), {"w": jax.random.normal(jax.random.key(2), (3, 6, 6))}, x)
    loras = [moved(lora, 0.3), moved(lora, 0.7)]
    y = jax.jit(lambda b: model.apply(frozen, b, x, adapter=[1, 0, 0], active=ACTIVE))(lojax.stack(loras))
    whole = [model.apply(frozen, tree, x) for tree in (loras[1], loras[0], loras[0])]
    base = model.apply(frozen, None, x)
    near(y, jnp.stack([jnp.where(ACTIVE[k][:, None], whole[k][k], base[k]) for k in range(3)]))


def test_before_the_invocation_the_logits_are_those_of_the_base_bit_for_bit():
    model, params, frozen, loras, tokens = decoder()
    tokens = tokens.at[:, 3].set(7).at[:, 4].set(8)
    tokens = tokens.at[3].set(1)
    active = lojax.active_tokens(tokens, [7, 8])
    assert active.tolist() == [[False] * 3 + [True] * 3] * 3 + [[False] * 6]
    with jax.disable_jit():
        y = model.apply(frozen, loras[1], tokens, active=active)
        base = model.apply(params, lojax.stack(loras), tokens, adapter=[-1] * 4)
    np.testing.assert_array_equal(y[:, :3], base[:, :3])
    np.testing.assert_array_equal(y[3], base[3])
    assert np.all(np.any(np.asarray(y[:3, 3:] != base[:3, 3:]), -1))


def test_the_cache_of_the_base_serves_the_adapter():
    model, params, frozen, loras, tokens = decoder()
    active = jnp.arange(6) >= jnp.array([[3], [4], [2], [6]])
    whole = model.apply(frozen, loras[1], tokens, active=active)
    net = Decoder(decode=True)
    cache = net.init(jax.random.key(0), tokens)["cache"]
    step = lojax.wrap(net, "**/{kernel,embedding}", rank=2)
    for t in range(6):
        variables = {**frozen, "cache": cache}
        lora = {**loras[1], "cache": jax.tree.map(lambda _: None, cache)}
        token = tokens[:, t : t + 1]
        logits, new = step.apply(variables, lora, token, active=active[:, t : t + 1], mutable=["cache"])
        cache = new["cache"]
        if t < 2:  # nothing acts yet: what the base writes into the cache is the same
            _, plain = net.apply({**params, "cache": variables["cache"]}, token, mutable=["cache"])
            near(cache, plain["cache"], 1e-7)
        near(logits[:, 0], whole[:, t], 3e-6)


def test_where_an_adapter_acts():
    tokens = jnp.array([[1, 2, 1, 2, 3], [2, 1, 1, 1, 1], [1, 1, 2, 0, 0]])
    expected = [[0, 0, 1, 1, 1], [0, 0, 0, 0, 0], [0, 1, 1, 1, 1]]
    assert jax.jit(lambda t: lojax.active_tokens(t, [1, 2]))(tokens).astype(int).tolist() == expected
    assert not lojax.active_tokens(tokens, [1] * 9).any()
    _, lora = lojax.init(jax.random.key(0), {"w": jnp.ones((4, 3))}, "w", rank=1)
    acting = {"w": dataclasses.replace(lora["w"], invocation_tokens=(1, 2))}
    assert lojax.active_tokens(tokens, lora).all()
    assert lojax.active_tokens(tokens, acting).astype(int).tolist() == expected
    bank = lojax.stack([lora, acting], names=["plain", "acting"])
    assert lojax.unstack(bank)[1]["w"].invocation_tokens == (1, 2)
    got = lojax.active_tokens(tokens, bank, adapter=["acting", "plain", None])
    assert got.astype(int).tolist() == [expected[0], [1] * 5, [0] * 5]


def test_an_adapter_with_invocation_tokens_is_never_used_without_saying_where_they_are(tmp_path):
    f = lambda p, x: x @ p["w"]
    model = lojax.wrap(f, "w", rank=1)
    x = jnp.ones((1, 2, 4))
    frozen, lora = model.init(jax.random.key(0), {"w": jnp.ones((4, 3))}, x)
    acting = {"w": dataclasses.replace(lora["w"], invocation_tokens=(1, 2))}
    for call in (
        lambda: model.apply(frozen, acting, x),
        lambda: model.apply(frozen, lojax.stack([acting]), x, adapter=[0]),
    ):
        with pytest.raises(ValueError, match=r"w: this adapter acts from its invocation tokens \(1, 2\)|\[\(?1, 2"):
            call()
    with pytest.raises(ValueError, match="a merged weight acts on every token"):
        model.merge(frozen, acting)
    lojax.save(tmp_path / "adapter", acting, frozen=frozen)
    assert lojax.restore(tmp_path / "adapter", frozen=frozen)["w"].invocation_tokens == (1, 2)
    with pytest.raises(ValueError, match=r"lora acts from the tokens 1, 2 on, and like from \(none\)"):
        lojax.conform(acting, lora)
    with pytest.raises(ValueError, match="act from different invocation tokens"):
        lojax.combine([acting, lora], [0.5, 0.5])


class Headed(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(2, name="head")(nn.Dense(4, name="body")(x).mean(1))


def test_refuses_uses_that_tell_no_tokens_apart():
    x = jnp.ones((3, 4, 5))
    net = Headed()
    model = lojax.wrap(net, "**/kernel", rank=1)
    frozen, lora = model.init(jax.random.key(0), net.init(jax.random.key(0), x), x)
    with pytest.raises(ValueError, match=r"params/head/kernel: active= .* its activation has no axis of the length"):
        model.apply(frozen, lora, x, active=ACTIVE)
    body = lojax.wrap(net, "**/body/kernel", rank=1)
    frozen, lora = body.init(jax.random.key(0), net.init(jax.random.key(0), x), x)
    assert body.apply(frozen, lora, x, active=ACTIVE).shape == (3, 2)
    dora = lojax.wrap(net, "**/body/kernel", rank=1, variant="dora")
    frozen, lora = dora.init(jax.random.key(0), net.init(jax.random.key(0), x), x)
    with pytest.raises(ValueError, match="params/body/kernel: active= is for updates that add"):
        dora.apply(frozen, lora, x, active=ACTIVE)
    with pytest.raises(ValueError, match=r"adapter= or active= has 2 rows, and args/0"):
        body.apply(*body.init(jax.random.key(0), net.init(jax.random.key(0), x), x), x, active=ACTIVE[:2], adapter=None)


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda t, bank: lojax.active_tokens(t[0], [1]), ValueError, r"tokens is int32\[5\]; expected integers"),
        (lambda t, bank: lojax.active_tokens(t, bank), TypeError, "say which row uses which"),
        (lambda t, bank: lojax.active_tokens(t, [1], adapter=[0, 0]), TypeError, "adapter= picks adapters of a bank"),
    ],
)
def test_active_tokens_refuses(call, error, says):
    _, lora = lojax.init(jax.random.key(0), {"w": jnp.ones((4, 3))}, "w", rank=1)
    with pytest.raises(error, match=says):
        call(jnp.ones((2, 5), jnp.int32), lojax.stack([lora]))


def test_through_peft_files(tmp_path):
    params = {"model": {"q_proj": {"kernel": jnp.ones((4, 3))}}}
    _, lora = lojax.init(jax.random.key(0), params, "**/kernel", rank=1)
    lora = moved(lora)
    acting = jax.tree.map(
        lambda leaf: dataclasses.replace(leaf, invocation_tokens=(5, 9)), lora, is_leaf=lambda x: hasattr(x, "axes")
    )
    names = lojax.peft.NameMap.parse("model/q_proj/kernel <-> model.q_proj.weight [in out]")
    frozen = jax.tree.map(lambda x: x, params)
    lojax.peft.save(tmp_path / "adapter", acting, frozen, names)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["alora_invocation_tokens"] == [5, 9]
    loaded = lojax.peft.load(tmp_path / "adapter", params, names)
    assert loaded["model"]["q_proj"]["kernel"].invocation_tokens == (5, 9)


@pytest.mark.peer
def test_as_peft_computes_it():
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    from peft.tuners.lora.variants import calculate_alora_offsets

    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 3, (50, 12))
    config = peft.LoraConfig(
        r=2, lora_alpha=6, target_modules=["lin"], alora_invocation_tokens=[1, 2], task_type="CAUSAL_LM"
    )
    offsets = calculate_alora_offsets({"default": config}, "default", torch.tensor(tokens))
    theirs = np.arange(12) >= 12 - np.array([offset or 0 for offset in offsets])[:, None]
    np.testing.assert_array_equal(lojax.active_tokens(jnp.asarray(tokens), [1, 2]), theirs)

    net = peft.inject_adapter_in_model(config, torch.nn.ModuleDict({"lin": torch.nn.Linear(5, 7, bias=False)}))
    layer = net["lin"]
    torch.nn.init.normal_(layer.lora_B["default"].weight)
    x = rng.standard_normal((50, 12, 5)).astype(np.float32)
    expected = layer(torch.tensor(x), alora_offsets=offsets).detach().numpy()
    arrays = [layer.base_layer.weight, layer.lora_A["default"].weight, layer.lora_B["default"].weight]
    w, a, b = (jnp.asarray(v.detach().numpy().T) for v in arrays)
    lora = {"w": lojax.Adapter(a, b, 3.0, ("in", "out"), invocation_tokens=(1, 2))}
    model = lojax.wrap(lambda p, x: x @ p["w"], "w")
    active = lojax.active_tokens(jnp.asarray(tokens), lora)
    np.testing.assert_allclose(model.apply({"w": w}, lora, x, active=active), expected, rtol=1e-5, atol=1e-5)
