"""What a sharded LoRA step sends between chips, read off the compiled program."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import AxisType, PartitionSpec

import lojax
from lojax.planner.aot import has_compiler, topology_mesh
from lojax.planner.chips import parse_topology
from lojax.planner.collectives import Collective, Traffic, traffic
from lojax.planner.decoder import TARGETS, Decoder
from lojax.planner.decoder_config import PRESETS
from lojax.planner.flops import count_flops
from lojax.planner.hlo import parse
from lojax.planner.train_step import full_step, lora_step
from tests.planner.frozen_step import frozen_step

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


def test_loops_count_their_trips():
    def f(x):
        return jax.lax.scan(lambda c, _: (jax.lax.psum(c, "i") / 2, None), x, length=5)[0]

    mesh = jax.make_mesh((8,), ("i",), axis_types=(AxisType.Auto,))
    mapped = jax.jit(
        jax.shard_map(f, mesh=mesh, in_specs=PartitionSpec("i"), out_specs=PartitionSpec("i"), check_vma=False)
    )
    found = traffic(mapped.lower(jnp.ones((16,))).compile().as_text())
    (only,) = found.collectives
    assert (only.kind, only.group, only.count, only.payload) == ("all-reduce", 8, 5, 8)
    assert only.bytes_received == 2 * 8 * 7 // 8 and found.bytes_received == 5 * only.bytes_received


@pytest.mark.parametrize(
    ("f", "kind", "shape", "group"),
    [
        (lambda x: jax.lax.all_gather(x, "i", tiled=True), "all-gather", (16, 6), 8),
        (lambda x: jax.lax.psum_scatter(jnp.tile(x, (8, 1)), "i", tiled=True), "reduce-scatter", (16, 6), 8),
        (lambda x: jax.lax.ppermute(x, "i", [(j, (j + 1) % 8) for j in range(8)]), "collective-permute", (2, 6), 8),
    ],
)
def test_kinds_and_payloads(f, kind, shape, group):
    mesh = jax.make_mesh((8,), ("i",), axis_types=(AxisType.Auto,))
    spec = PartitionSpec("i")
    mapped = jax.jit(jax.shard_map(f, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False))
    (only,) = traffic(mapped.lower(jnp.ones((16, 6))).compile().as_text()).collectives
    assert (only.kind, only.payload) == (kind, 4 * math.prod(shape))
    assert kind == "collective-permute" or only.group == group


TPU = """HloModule jit_step, num_partitions=16

%cond (p.1: (u32[], bf16[4,8])) -> pred[] {
  %limit = u32[]{:T(128)} constant(8)
  %p.1 = (u32[]{:T(128)}, bf16[4,8]{1,0:T(8,128)(2,1)S(1)}) parameter(0)
  %i.1 = u32[]{:T(128)} get-tuple-element(%p.1), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i.1, %limit), direction=LT
}

%body (p.2: (u32[], bf16[4,8])) -> (u32[], bf16[4,8]) {
  %p.2 = (u32[], bf16[4,8]) parameter(0)
  %i.2 = u32[] get-tuple-element(%p.2), index=0
  %x.2 = bf16[4,8]{1,0:T(8,128)} get-tuple-element(%p.2), index=1
  %two = u32[] constant(2)
  %next = u32[] add(%i.2, %two)
  %step = bf16[64,8] fusion(%x.2), kind=kCustom, calls=%progress
  %hop = bf16[4,8]{1,0} collective-permute(%x.2), channel_id=3, source_target_pairs={{0,1},{1,0}}
  ROOT %out = (u32[], bf16[4,8]) tuple(%next, %hop)
}

%progress (q: bf16[4,8]) -> bf16[64,8] {
  %q = bf16[4,8] parameter(0)
  ROOT %g.2 = bf16[64,8] all-gather(%q), channel_id=9, replica_groups=mesh['a'=4,'b'=4] {'a','b'}, a={chain_id="0"}
}

%start (q.1: bf16[4,8]) -> bf16[64,8] {
  %q.1 = bf16[4,8] parameter(0)
  ROOT %g.1 = bf16[64,8] all-gather(%q.1), channel_id=9, replica_groups=mesh['a'=4,'b'=4] {'a','b'}, a={chain_id="0"}
}

%all-reduce-scatter.1 (r: bf16[16,8]) -> bf16[1,8] {
  %r = bf16[16,8] parameter(0)
  %sum = bf16[16,8] all-reduce(%r), channel_id=5, replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
  ROOT %mine = bf16[1,8] dynamic-slice(%sum, %sum), dynamic_slice_sizes={1,8}
}

ENTRY %main (x: bf16[4,8]) -> bf16[4,8] {
  %x = bf16[4,8] parameter(0)
  %zero = u32[] constant(0)
  %begin = bf16[64,8] fusion(%x), kind=kCustom, calls=%start
  %state = (u32[], bf16[4,8]) tuple(%zero, %x)
  %loop = (u32[], bf16[4,8]) while(%state), condition=%cond, body=%body
  %sized = bf16[1,8] fusion(%x), kind=kCustom, calls=%all-reduce-scatter.1
  ROOT %y = bf16[4,8] get-tuple-element(%loop), index=1
}
"""


def test_what_the_tpu_compiler_writes():
    """Counters that step by two, collectives cut into pieces of one channel, and fused reduce-scatters."""
    found = {c.kind: c for c in traffic(TPU).collectives}
    assert found["collective-permute"].count == 4
    assert (found["all-gather"].count, found["all-gather"].group) == (1, 16)
    assert (found["reduce-scatter"].count, found["reduce-scatter"].group) == (1, 4)
    assert found["reduce-scatter"].bytes_received == 16 * 8 * 2 * 3 // 4
    assert "all-gather" in str(traffic(TPU))


def test_a_text_that_is_no_program():
    with pytest.raises(ValueError, match="no ENTRY computation"):
        parse("hello")


def test_minus_counts_what_the_other_lacks():
    one = Collective("all-gather", (("f32", (8,)),), 4, 3)
    big = Collective("all-reduce", (("f32", (16,)),), 4, 1)
    left = Traffic((dataclasses.replace(one, count=5), big)).minus(Traffic((one,)))
    assert [(c.kind, c.count) for c in left.collectives] == [("all-gather", 2), ("all-reduce", 1)]
    twice = Traffic((one, one)).minus(Traffic((one, one)))
    assert twice.collectives == ()


def test_flops_of_loops_and_recomputation():
    w = jnp.ones((4, 4))

    def f(x):
        return jax.lax.scan(lambda c, _: (jax.checkpoint(lambda y: jnp.sin(y @ w))(c), None), x, length=6)[0].sum()

    one = 2 * 2 * 4 * 4
    assert count_flops(f, jnp.ones((2, 4))) == 6 * one
    assert count_flops(jax.grad(f), jnp.ones((2, 4))) == 6 * 3 * one  # forward, again, and backward
    conv = lambda x, k: jax.lax.conv_general_dilated(x, k, (1, 1), "VALID")
    assert count_flops(conv, jnp.ones((1, 3, 8, 8)), jnp.ones((5, 3, 3, 3))) == 2 * 5 * 36 * 27
    model = lojax.wrap(lambda p, x: x @ p["w"], "w", rank=2, execution="factored")
    frozen, lora = model.init(jax.random.key(0), {"w": jnp.ones((8, 6))})
    step = jax.grad(lambda lora, x: jnp.sum(jnp.sin(model.apply(frozen, lora, x))), (0, 1))
    twice = 2 * 32 * 8 * 2  # x A, which XLA makes one of
    assert count_flops(step, lora, jnp.ones((32, 8))) == 32 * (4 * 8 * 6 + 6 * 2 * (8 + 6)) + twice
    branch = lambda x: jax.lax.cond(x[0, 0] > 0, lambda x: x @ w @ w, lambda x: x @ w, x)
    assert count_flops(branch, jnp.ones((2, 4))) == 2 * one
