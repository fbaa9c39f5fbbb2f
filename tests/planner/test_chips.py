"""Chips, topologies and meshes."""

from lojax.planner.chips import CHIPS, parse_mesh, parse_topology


def test_chips_and_meshes():
    assert parse_topology("v5p:4x4x4").devices == 64 and parse_mesh({"tensor": 4}, 4) == {
        "data": 1,
        "fsdp": 1,
        "tensor": 4,
    }
    for chip in CHIPS.values():
        sizes = [parse_topology(f"{chip.name}:{shape}").devices for shape in chip.slices]
        assert sizes == sorted(sizes)
