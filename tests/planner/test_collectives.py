"""Collectives as compiled programs have them."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, PartitionSpec

from lojax.planner.collectives import Collective, Traffic, traffic

pytestmark = pytest.mark.optimized(False)  # collectives are placed before the optimizations that this leaves out


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


def test_minus_counts_what_the_other_lacks():
    one = Collective("all-gather", (("f32", (8,)),), 4, 3)
    big = Collective("all-reduce", (("f32", (16,)),), 4, 1)
    left = Traffic((dataclasses.replace(one, count=5), big)).minus(Traffic((one,)))
    assert [(c.kind, c.count) for c in left.collectives] == [("all-gather", 2), ("all-reduce", 1)]
    twice = Traffic((one, one)).minus(Traffic((one, one)))
    assert twice.collectives == ()


@pytest.mark.parametrize(
    "groups, members",
    {
        "replica_groups={{0,2},{1,3}}": (0, 2),
        "replica_groups=[2,2]<=[4]": (0, 1),
        "replica_groups=[2,2]<=[2,2]T(1,0)": (0, 2),
        "replica_groups=mesh['a'=2,'b'=2] {'a'}": (0, 2),
        "replica_groups=mesh['a'=2,'b'=2] {'b'}": (0, 1),
        "replica_groups=mesh['a'=4] {'a':(2)2}": (0, 1),
        "replica_groups=mesh['a'=4] {'a':(1)2}": (0, 2),
        "replica_groups=mesh['a'=2,'b'=1,'c'=2], device_ids=([2,2]T(1,0)) {'a'}": (0, 1),
        "replica_groups=mesh['a'=2,'b'=1,'c'=2], device_ids=([2,2]T(1,0)) {'c','b'}": (0, 2),
        "replica_groups=mesh['a'=2,'b'=2], device_ids=(0,3,1,2) {'b'}": (0, 3),
        "replica_groups={}": (0, 1, 2, 3),
    }.items(),
)
def test_who_takes_part(groups, members):
    text = f"""HloModule m, num_partitions=4

ENTRY %main (x: f32[4]) -> f32[4] {{
  %x = f32[4]{{0}} parameter(0)
  ROOT %y = f32[4]{{0}} all-reduce(%x), channel_id=1, {groups}, to_apply=%add
}}
"""
    (found,) = traffic(text).collectives
    assert (found.members, found.group) == (members, len(members))


@pytest.mark.parametrize("kind", ["all-gather", "reduce-scatter", "all-reduce", "all-to-all"])
def test_what_comes_from_other_hosts(kind):
    """Four devices of two hosts, counted by hand for arrays of 64 bytes, 16 for each device."""
    one = Collective(kind, (("f32", (16,)),), 4, 1, (0, 1, 2, 3))
    # Of 64 bytes a host lacks 32 (or sums 32 of its own): each of its two devices fetches 16. What all devices exchange
    # is 16 from each of two devices elsewhere. A sum is scattered and gathered: twice.
    assert one.bytes_from_other_hosts(2) == {"all-to-all": 32, "all-reduce": 32}.get(kind, 16)
    assert one.bytes_from_other_hosts(4) == 0  # all in one host
    inside = Collective(kind, (("f32", (16,)),), 2, 1, (2, 3))
    assert inside.bytes_from_other_hosts(2) == 0
