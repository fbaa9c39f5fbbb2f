"""What is saved comes back: every structure, dtype, box and sharding, bit for bit."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import flax.core
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import linen as nn
from helpers import assert_same_bits, message
from jax.sharding import NamedSharding, PartitionSpec

import lojax
from lojax.adapters.adapter import is_adapter
from lojax.checkpoint import adapter_directory as files
from lojax.checkpoint.save_restore import read_manifest
from tests.checkpoint import checkpoint_cases as cases


@pytest.mark.parametrize("how", ["alone", "frozen", "like", "shapes"])
def test_round_trip(tmp_path, how):
    frozen, lora = cases.pair()
    lojax.save(tmp_path / "new" / "adapter", lora, frozen=frozen)
    given = {
        "alone": {},
        "frozen": {"frozen": frozen},
        "like": {"like": lora},
        "shapes": {"frozen": jax.eval_shape(lambda: frozen), "like": jax.eval_shape(lambda: lora)},
    }[how]
    restored = lojax.restore(tmp_path / "new" / "adapter", **given)
    assert_same_bits(restored, lora)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(restored))
    adapter = restored["params"]["layer_0"]["query"]["kernel"]
    assert (adapter.scale, adapter.axes, adapter.dropout) == (2.0, ("in", "out"), 0.1)


def test_base_without_fingerprint(tmp_path):
    _, lora = cases.pair()
    lojax.save(tmp_path, lora)
    assert_same_bits(lojax.restore(tmp_path), lora)
    assert read_manifest(tmp_path).base is None
    assert read_manifest(tmp_path).other == ("params/embed/table",)


@pytest.mark.parametrize(
    "dtype", ["float32", "bfloat16", "float16", "float8_e4m3fn", "int8", "uint32", "bool", "complex64"]
)
def test_dtypes(tmp_path, dtype):
    values = (np.arange(12).reshape(3, 4) % 5).astype(jnp.dtype(dtype))
    cases.save_full(tmp_path, {"x": jnp.asarray(values)})
    assert_same_bits(lojax.restore(tmp_path), {"x": jnp.asarray(values)})


def test_special_values_keep_their_bits(tmp_path):
    bits = np.array([0x7FC00001, 0xFFC12345, 0x7F800000, 0x80000000, 0x00000001], np.uint32)  # nan, -nan, inf, -0, tiny
    cases.save_full(tmp_path, {"x": bits.view(np.float32)})
    assert np.asarray(lojax.restore(tmp_path)["x"]).view(np.uint32).tolist() == bits.tolist()


def test_wide_scalar_and_empty_arrays(tmp_path):
    lora = {"wide": np.arange(3, dtype=np.float64), "scalar": np.float32(2.5), "empty": np.zeros((0, 4), np.float32)}
    cases.save_full(tmp_path, lora)
    restored = lojax.restore(tmp_path)
    assert restored["wide"].dtype == np.float64 and restored["wide"].tolist() == [0, 1, 2]
    assert restored["scalar"].shape == () and float(restored["scalar"]) == 2.5
    assert restored["empty"].shape == (0, 4)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Block:
    kernel: Any
    bias: Any


def _adapter(shift: float = 0.0) -> lojax.Adapter:
    return lojax.Adapter(jnp.ones((4, 2)) + shift, jnp.ones((2, 3)), 1.5, ("in", "out"))


@pytest.mark.parametrize(
    "lora",
    [
        (_adapter(), [None, jnp.ones(2)], {"x": jnp.zeros(1)}),
        [_adapter(i) for i in range(11)],
        Block(kernel=_adapter(), bias=None),
        flax.core.freeze({"a": {"kernel": _adapter()}, "b": None}),
        {0: _adapter(), 1: {"2": None}},
        {"linear/~/inner": {"w": _adapter()}, "linear": {"w": jnp.ones(2)}},
        {"..": {"/": jnp.ones(1), ".": jnp.ones(2), "é 'x\" %2E\\": jnp.ones(3)}, "": {"": jnp.ones(4)}},
        _adapter(),
    ],
    ids=["tuple", "list", "dataclass", "frozen dict", "numbers", "haiku", "odd names", "bare"],
)
def test_structures(tmp_path, lora):
    save = lojax.save if any(map(is_adapter, jax.tree.leaves(lora, is_leaf=is_adapter))) else cases.save_full
    save(tmp_path / "x", lora)
    assert_same_bits(lojax.restore(tmp_path / "x", like=lora), lora)
    nested = lojax.restore(tmp_path / "x")
    assert_same_bits(jax.tree.leaves(lojax.restore(tmp_path / "x", like=lora)), jax.tree.leaves(lora))
    if type(lora) is dict:
        assert_same_bits(nested, lora)
    assert [entry.name for entry in tmp_path.iterdir()] == ["x"]


def test_lists_become_dicts_by_number_without_like(tmp_path):
    lojax.save(tmp_path, {"layers": [_adapter(), None]})
    assert lojax.restore(tmp_path)["layers"].keys() == {0, 1}


def test_boxes_survive(tmp_path):
    boxed = {
        "w": nn.Partitioned(jnp.ones((4, 6)), names=("data", "model")),
        "b": nn.Partitioned(jnp.ones(6), (("x", "y"),)),
    }
    frozen, lora = lojax.init(jax.random.key(0), boxed, "w", rank=2, train="b")
    lojax.save(tmp_path, lora, frozen=frozen)
    for given in ({}, {"frozen": frozen}, {"like": lora}):
        restored = lojax.restore(tmp_path, **given)
        assert_same_bits(restored, lora)
        assert restored["w"].a.names == ("data", None) and restored["w"].b.names == (None, "model")
        assert restored["b"].names == (("x", "y"),)


def test_restored_arrays_are_uncommitted(tmp_path):
    frozen, lora = cases.pair()
    lojax.save(tmp_path, lora)
    mesh = jax.make_mesh((8,), ("x",))
    spread = jax.device_put(frozen["params"]["layer_0"]["query"]["kernel"], NamedSharding(mesh, PartitionSpec("x")))
    a = lojax.restore(tmp_path)["params"]["layer_0"]["query"]["kernel"].a
    assert len((spread.T @ a).sharding.device_set) == 8  # a committed array would be refused here


@pytest.mark.parametrize("spec", [("x", None), (None, "x"), (("x", "y"), None), (None, None)])
def test_restore_to_another_mesh(tmp_path, spec):
    first = NamedSharding(jax.make_mesh((8,), ("x",)), PartitionSpec("x"))
    lora = {"w": jax.device_put(jnp.arange(128.0).reshape(16, 8), first), "rest": None}
    cases.save_full(tmp_path, lora)
    mesh = jax.make_mesh((4, 2), ("x", "y"))
    second = NamedSharding(mesh, PartitionSpec(*spec))
    like = {"w": jax.ShapeDtypeStruct((16, 8), jnp.float32, sharding=second), "rest": None}
    for given in ({"sharding": second}, {"sharding": {"w": second, "rest": None}}, {"like": like}):
        restored = lojax.restore(tmp_path, **given)
        assert restored["w"].sharding.is_equivalent_to(second, 2)
        assert_same_bits(restored, lora)
    assert len(lojax.restore(tmp_path)["w"].devices()) == 1


def test_plain_orbax_reads_the_arrays(tmp_path):
    _, lora = cases.pair()
    lojax.save(tmp_path, lora)
    with ocp.PyTreeCheckpointer() as checkpointer:
        found = checkpointer.restore(cases.arrays_folder(tmp_path))
    assert_same_bits(found["params/layer_0/query/kernel/a"], lora["params"]["layer_0"]["query"]["kernel"].a)
    assert_same_bits(found["params/head/bias"], lora["params"]["head"]["bias"])
    assert len(found) == 6


def test_the_json_is_for_people(tmp_path):
    frozen, lora = cases.pair()
    lojax.save(tmp_path, lora, frozen=frozen, metadata={"step": 7, "note": "é"})
    text = (tmp_path / files.MANIFEST).read_text()
    (line,) = [line for line in text.splitlines() if '"params/layer_0/query/kernel": {"rank"' in line]
    assert '"rank": 4, "alpha": 8.0, "scaling": "scale = alpha / rank", "scale": 2.0, ' in line
    assert '"axes": ["in", "out"], "dropout": 0.1, "weight": [16, 8]' in line
    assert '"note": "é"' in text
    record = json.loads(text)
    assert record["format"] == "lojax-adapter" and record["version"] == 2
    assert record["software"].keys() == {"lojax", "jax", "jaxlib", "flax", "orbax-checkpoint", "numpy"}
    assert record["software"]["jax"] == jax.__version__
    assert read_manifest(tmp_path).metadata == {"step": 7, "note": "é"}


def test_overwrite(tmp_path):
    (_, first), (_, second) = cases.pair(1), cases.pair(2)
    lojax.save(tmp_path, first)
    lojax.save(tmp_path, second)
    assert_same_bits(lojax.restore(tmp_path), second)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["adapter.json", "arrays-2"]
    text = message(FileExistsError, lojax.save, tmp_path, first, overwrite=False)
    assert str(tmp_path) in text and "overwrite=True" in text
    assert_same_bits(lojax.restore(tmp_path), second)


def test_other_files_in_the_directory_are_left_alone(tmp_path):
    (tmp_path / "arrays-of-mine").mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    for seed in range(2):
        lojax.save(tmp_path, cases.pair(seed)[1])
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [
        "adapter.json",
        "arrays-2",
        "arrays-of-mine",
        "notes.txt",
    ]


def test_several_adapters_beside_one_base(tmp_path):
    loras = {name: cases.pair(i)[1] for i, name in enumerate(["french", "german"])}
    for name, lora in loras.items():
        lojax.save(tmp_path / name, lora)
    for name, lora in loras.items():
        assert_same_bits(lojax.restore(tmp_path / name), lora)
    text = message(FileNotFoundError, lojax.restore, tmp_path)
    assert str(tmp_path / "french") in text and str(tmp_path / "german") in text


def test_background_save_survives_donation(tmp_path):
    _, lora = cases.pair()
    expected = jax.tree.map(np.array, lora)
    step = jax.jit(lambda tree: jax.tree.map(lambda x: x * 0, tree), donate_argnums=0)
    saving = [lojax.save(tmp_path, lora, wait=False)]
    step(lora)
    saving += [lojax.save(tmp_path / f"{i}", cases.pair(i)[1], wait=False) for i in range(2)]
    for future in saving:
        future.result()
    assert_same_bits(lojax.restore(tmp_path), jax.tree.map(jnp.asarray, expected))
    assert_same_bits(lojax.restore(tmp_path / "1"), cases.pair(1)[1])


def test_background_save_of_a_numpy_array_written_to_afterwards(tmp_path):
    lora = {"x": np.ones(1000, np.float32)}
    saving = cases.save_full(tmp_path, lora, wait=False)
    lora["x"][:] = 7
    saving.result()
    assert float(lojax.restore(tmp_path)["x"].max()) == 1


def test_restore_waits_for_a_background_save(tmp_path):
    for step in range(3):
        lojax.save(tmp_path, cases.at_step(step), wait=False)
        assert_same_bits(lojax.restore(tmp_path), jax.tree.map(jnp.asarray, cases.at_step(step)))


def test_like_must_match(tmp_path):
    _, lora = cases.pair()
    lojax.save(tmp_path, lora)
    layer, head = lora["params"]["layer_0"], lora["params"]["head"]

    def text(**changed):
        return message(ValueError, lojax.restore, tmp_path, like={"params": {**lora["params"], **changed}})

    query = layer["query"]["kernel"]

    def with_query(node):
        return text(layer_0={**layer, "query": {"kernel": node}})

    assert "params/layer_0/query/kernel: " in with_query(dataclasses.replace(query, scale=1.0))
    assert "has scale=2.0, but like has 1.0" in with_query(dataclasses.replace(query, scale=1.0))
    assert "has axes=" in with_query(dataclasses.replace(query, axes=("out", "in")))
    assert "holds an adapter, but like holds nothing" in with_query(None)
    assert "query/kernel/a: " in with_query(dataclasses.replace(query, a=jnp.ones((16, 5))))
    assert "float32[16,4], but like holds float32[16,5]" in with_query(dataclasses.replace(query, a=jnp.ones((16, 5))))
    assert "float32[3], but like holds bfloat16[3]" in text(head={**head, "bias": jnp.ones(3, jnp.bfloat16)})
    assert "params/head/bias: is in" in text(head={"kernel": head["kernel"]})
    assert "params/extra: is in like, but not in" in text(extra=None)


def test_what_cannot_be_saved(tmp_path):
    x = jnp.ones(3)
    save = cases.save_full
    assert "adapter.json" not in message(ValueError, save, tmp_path, {"x": None})
    assert "x is a ShapeDtypeStruct" in message(TypeError, save, tmp_path, {"x": jax.ShapeDtypeStruct((1,), x.dtype)})
    assert "x is a " in message(TypeError, jax.jit(lambda v: save(tmp_path, {"x": v})), x)
    assert "jax.random.key_data" in message(TypeError, save, tmp_path, {"x": jax.random.key(0)})
    assert "two leaves at the path a/b" in message(ValueError, save, tmp_path, {"a/b": x, "a": {"b": x}})
    assert "metadata must be JSON" in message(TypeError, save, tmp_path, {"x": x}, metadata={"a": x})
    assert "metadata must be JSON" in message(TypeError, save, tmp_path, {"x": x}, metadata={"a": float("nan")})
    for metadata in ({"a": 10**50}, {1: 1, "1": 2}):  # which JSON holds, and `restore` refuses
        assert "metadata must be JSON" in message(TypeError, lojax.save, tmp_path, cases.at_step(1), metadata=metadata)
    assert "local path" in message(ValueError, lojax.save, "gs://bucket/x", {"x": x})
    frozen, lora = cases.pair()
    assert "different structure" in message(ValueError, lojax.save, tmp_path, lora["params"], frozen=frozen)
    assert list(tmp_path.iterdir()) == []


def test_the_base_is_not_saved_in_place_of_the_adapter(tmp_path):
    """It was written whole, without a word."""
    frozen, lora = cases.pair()
    for tree in (cases.params(), frozen):
        text = message(ValueError, lojax.save, tmp_path, tree)
        assert "would save the parameters of the base" in text and "frozen, lora = model.init(...)" in text
    assert "save(path, lora, frozen=frozen)" in message(TypeError, lojax.save, tmp_path, (frozen, lora))
    assert list(tmp_path.iterdir()) == []
    cases.save_full(tmp_path, lora["params"]["head"])  # trained in full, as frozen says
    assert_same_bits(lojax.restore(tmp_path), lora["params"]["head"])


def test_metadata_can_be_read_back(tmp_path):
    metadata = {"step": 7, "note": "é", "scores": (0.5, None)}
    lojax.save(tmp_path, cases.at_step(1), metadata=metadata, wait=False)
    assert lojax.read_metadata(tmp_path) == {"step": 7, "note": "é", "scores": [0.5, None]}
    lojax.save(tmp_path, cases.at_step(2))
    assert lojax.read_metadata(tmp_path) == {}
    assert str(tmp_path / "x") in message(FileNotFoundError, lojax.read_metadata, tmp_path / "x")


def test_opt_state_over_a_restored_lora_fits(tmp_path):
    """A restored tree has the very structure of the fresh one, static fields included."""
    frozen, lora = cases.pair()
    lojax.save(tmp_path, lora, frozen=frozen)
    moments = jax.tree.map(jnp.zeros_like, lora)
    jax.tree.map(jnp.add, lojax.restore(tmp_path, frozen=frozen), moments)


PROGRAM = """
import sys, jax, numpy as np
process, port, path = int(sys.argv[1]), sys.argv[2], sys.argv[3]
jax.distributed.initialize(f"localhost:{port}", 2, process)
import lojax
from jax.sharding import NamedSharding, PartitionSpec
mesh = jax.make_mesh((4,), ("x",))
rows, whole = NamedSharding(mesh, PartitionSpec("x")), NamedSharding(mesh, PartitionSpec())
values = np.arange(256, dtype=np.float32).reshape(64, 4)
def spread(x): return jax.make_array_from_callback(x.shape, rows, lambda index: x[index])
frozen = {"q": spread(np.ones((64, 8), np.float32)), "h": None}
adapter = lojax.Adapter(spread(values), np.ones((4, 8), np.float32), 2.0, ("in", "out"))
lora = {"q": adapter, "h": np.ones(3, np.float32)}
for wait in (True, False):
    lojax.save(path, lora, frozen=frozen, wait=wait).result()
for given in ({}, {"sharding": whole}):
    restored = lojax.restore(path, frozen=frozen, **given)
    assert (np.asarray(restored["q"].a) == values).all()
restored = lojax.restore(path, frozen=frozen, like=lora)
assert restored["q"].a.sharding == rows
"""


@pytest.mark.slow
def test_two_processes(tmp_path):
    cases.run_in_two_processes(PROGRAM, tmp_path)
    restored = lojax.restore(tmp_path, frozen={"q": jnp.ones((64, 8)), "h": None})  # one process, another sharding
    assert np.asarray(restored["q"].a).ravel().tolist() == list(range(256))
