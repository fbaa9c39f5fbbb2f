"""The step that a plan compiles, and what a sharded one sends between devices."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.extend.core import Literal
from jax.sharding import AxisType

import lojax
from lojax.planner.aot import has_compiler, topology_mesh
from lojax.planner.chips import parse_topology
from lojax.planner.collectives import traffic
from lojax.planner.decoder import TARGETS, Decoder
from lojax.planner.decoder_config import PRESETS
from lojax.planner.train_step import full_step, lora_step, value_then_grad
from tests.planner.frozen_step import frozen_step

pytestmark = pytest.mark.optimized(False)  # collectives are placed before the optimizations that this leaves out


def grouped_loss(w):
    """A loss that is computed again for its gradient, as the decoder's is."""

    @jax.checkpoint
    def group(total, x):
        return total + jnp.sin(x @ w).sum(), None

    return jax.lax.scan(group, jnp.zeros(()), jnp.arange(24.0).reshape(4, 2, 3))[0]


def test_value_and_gradient_are_those_of_jax():
    w = jax.random.normal(jax.random.key(0), (3, 5))
    got, want = jax.jit(value_then_grad, static_argnums=0)(grouped_loss, w), jax.value_and_grad(grouped_loss)(w)
    np.testing.assert_allclose(got[0], want[0], rtol=1e-5)
    np.testing.assert_allclose(got[1], want[1], rtol=1e-5)


def test_the_backward_pass_waits_for_the_value():
    eqns = jax.make_jaxpr(lambda w: value_then_grad(grouped_loss, w))(jnp.ones((3, 5))).jaxpr.eqns
    forward, backward = (i for i, eqn in enumerate(eqns) if eqn.primitive.name == "scan")
    (barrier,) = (eqn for eqn in eqns if eqn.primitive.name == "optimization_barrier")
    assert barrier.invars[0] in eqns[forward].outvars, "it takes the value"
    waiting = {barrier.outvars[1]}
    for eqn in eqns[eqns.index(barrier) + 1 : backward + 1]:
        if waiting & {v for v in eqn.invars if not isinstance(v, Literal)}:
            waiting |= set(eqn.outvars)
    assert waiting & set(eqns[backward].outvars), "the backward loop starts from what it gives"


RANK, BATCH, SEQ = 4, 8, 32
MESHES = {"data": (8, 1, 1), "fsdp": (1, 8, 1), "tensor": (1, 1, 8), "all three": (2, 2, 2)}


def decoder_on(shape):
    mesh = jax.make_mesh(shape, ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    config = dataclasses.replace(
        PRESETS["tiny"], width=48, mlp=160, layers=2, heads=8, kv_heads=8, head_dim=8, vocab=320
    )
    return Decoder(config, mesh, chunk=16)


@functools.cache
def step_traffic(decoder):
    model = lojax.wrap(decoder.total_loss, TARGETS, rank=RANK, strict=True)
    work = lora_step(model, decoder, optax.adam(1e-3), batch=BATCH, seq=SEQ, spread=False, dtype=jnp.float32)
    frozen = frozen_step(decoder, batch=BATCH, seq=SEQ, dtype=jnp.float32)
    return tuple(traffic(w.lower().compile().as_text()) for w in (work, frozen))


def sizes_of(decoder):
    """The sizes of the kernels of a layer."""
    kernels = [x for x in jax.tree.leaves(decoder.shapes()["layers"]) if x.ndim == 3]
    return [math.prod(x.shape[1:]) for x in kernels]


@pytest.mark.parametrize("name", MESHES)
def test_no_collective_carries_a_gradient_of_a_weight(name):
    decoder = decoder_on(MESHES[name])
    lora, frozen = step_traffic(decoder)
    added = lora.minus(frozen)
    d, f = decoder.config.width, decoder.config.mlp
    largest_factor = RANK * max(d, f)
    rank_activation = RANK * BATCH * SEQ
    allowed = max(largest_factor, rank_activation)
    assert added.collectives, "an adapted step must at least reduce the adapters' gradients"
    for c in added.collectives:
        for _, shape in c.arrays:
            assert math.prod(shape) <= allowed, c
            assert math.prod(shape) <= 1 or RANK in shape or math.prod(shape) % RANK == 0, c
    weight_sized = set(sizes_of(decoder))
    for c in added.collectives:
        assert not (c.reduces and {math.prod(s) for _, s in c.arrays} & weight_sized), c


def test_full_fine_tuning_does_carry_them():
    """The control: the same reading finds the gradients of the weights where there are any."""
    decoder = decoder_on(MESHES["fsdp"])
    full = full_step(decoder, optax.adam(1e-3), batch=BATCH, seq=SEQ, dtype=jnp.float32)
    added = traffic(full.lower().compile().as_text()).minus(step_traffic(decoder)[1])
    carried = {math.prod(shape) for c in added.collectives if c.reduces for _, shape in c.arrays}
    assert set(sizes_of(decoder)) <= carried


@pytest.mark.parametrize("name", MESHES)
def test_lora_adds_only_its_gradients_and_rank_sized_values(name):
    decoder = decoder_on(MESHES[name])
    lora, frozen = step_traffic(decoder)
    assert 0 < lora.bytes_received - frozen.bytes_received <= allowed(decoder)


def allowed(decoder):
    """The bytes that a chip may receive on top of the frozen step."""
    layers = decoder.config.layers
    kernels = [x.shape[1:] for x in jax.tree.leaves(decoder.shapes()["layers"]) if x.ndim == 3]
    adapters = 4 * RANK * sum(m + n for m, n in kernels)  # bytes a layer
    rows = BATCH // math.prod(decoder.mesh.shape[a] for a in ("data", "fsdp"))
    activations = 4 * RANK * rows * SEQ * len(kernels)
    # Each factor: gathered for forward and for backward, its gradient reduced once (an all-reduce moves it twice).
    # Each rank-sized value: summed over tensor forward, again when recomputed, and backward, and gathered.
    return layers * (4 * adapters + 2 * 4 * activations) + 16 * 64


@pytest.mark.slow
@pytest.mark.skipif(not has_compiler(), reason="libtpu is not installed")
@pytest.mark.parametrize("axes", [{"data": 1, "fsdp": 8, "tensor": 1}, {"data": 2, "fsdp": 2, "tensor": 2}])
def test_the_same_of_a_tpu_ahead_of_time(axes):
    mesh = topology_mesh(parse_topology("v5e:2x4"), axes)
    config = dataclasses.replace(PRESETS["tiny"], width=512, mlp=1024, heads=8, kv_heads=8, head_dim=64, vocab=640)
    decoder = Decoder(config, mesh, chunk=16)
    lora, frozen = step_traffic(decoder)
    whole = set(sizes_of(decoder))
    gradients = whole | {size // parts for size in whole for parts in (2, 4, 8)}
    added = lora.minus(frozen)
    assert any(c.reduces for c in added.collectives)
    for c in added.collectives:
        assert not (c.reduces and {math.prod(s) for _, s in c.arrays} & gradients), c
    full = full_step(decoder, optax.adam(1e-3), batch=BATCH, seq=SEQ, dtype=jnp.float32)
    carried = traffic(full.lower().compile().as_text()).minus(frozen)
    assert {math.prod(s) for c in carried.collectives if c.reduces for _, s in c.arrays} & gradients
    assert 0 < lora.bytes_received - frozen.bytes_received <= allowed(decoder)


def test_added_traffic_does_not_grow_with_the_weights():
    """Twice the depth of the feed-forward weights, frozen and adapted: the difference grows with r, not with m·n."""
    decoder = decoder_on(MESHES["fsdp"])
    wide = dataclasses.replace(decoder, config=dataclasses.replace(decoder.config, mlp=320))
    extra = [lora.bytes_received - frozen.bytes_received for lora, frozen in map(step_traffic, (decoder, wide))]
    factors = 4 * RANK * 3 * 160 * decoder.config.layers  # bytes that the factors grow by
    assert extra[1] - extra[0] <= 4 * factors
