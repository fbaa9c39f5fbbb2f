"""Shardings of adapters and optimizer state on a mesh, derived from those of the weights.

Each axis of a factor is sharded like the axis of the weight that it stands for: the stack and in axes for ``a``, the
stack and out axes for ``b``. The rank axis is replicated. So a product with a factor communicates no more than the
product with the weight, apart from rank-sized values.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
from flax.core import meta
from jax.extend.core import jaxpr_as_fun
from jax.sharding import NamedSharding, PartitionSpec
from jax.tree_util import KeyPath

from lojax.adapters.adapter import Adapter, array_axes, is_adapter
from lojax.adapters.bank import Bank
from lojax.adapters.bank_shapes import check_bank_pair
from lojax.adapters.metadata import rebox, unbox
from lojax.adapters.paths import flatten, map_paths, path_of
from lojax.adapters.trees import check_pair
from lojax.compat import opened
from lojax.quantized.quantized import is_quantized
from lojax.sharding.weight_specs import (
    AnyMesh,
    Rules,
    check_divides,
    find_mesh,
    is_spec,
    mesh_axes,
    stored_specs,
    weight_specs,
)
from lojax.types import Array, Jaxpr, Key, Leaf, Params, Path, PyTree, Shape


class Shardings(NamedTuple):
    """Trees with one `NamedSharding` for every array, for ``in_shardings=``, `jax.device_put` and the like.

    Attributes:
        frozen: For ``frozen``.
        lora: For ``lora``.
        opt_state: For the optimizer's state; None where none was given.
    """

    frozen: PyTree
    lora: PyTree
    opt_state: PyTree = None


def shardings(
    frozen: Params,
    lora: Params | Bank,
    opt_state: PyTree = None,
    *,
    mesh: AnyMesh | None = None,
    specs: PyTree = None,
    rules: Rules | None = None,
    spread: bool = False,
    memory_kind: str | None = None,
    bank_axis: str | tuple[str, ...] | None = None,
) -> Shardings:
    """The shardings of the frozen weights, of the adapters, and of the optimizer's state.

    Works on arrays and on shapes (`jax.eval_shape`); nothing is moved.

    Args:
        frozen: The frozen tree. The sharding of a weight comes from ``specs``, else from its box (`nn.Partitioned`,
            logical axes), else from the array itself. A weight without any of these is replicated.
        lora: The trained tree, or a bank.
        opt_state: The state of any optax optimizer over ``lora``, or over a tree that holds it. Moments are sharded
            like their parameters, factored moments along the axes that they have; counters are replicated.
        mesh: The mesh; by default that of the arrays.
        specs: A tree of `PartitionSpec` or `NamedSharding` with the structure of the parameters, or of its upper
            levels; or an NNX module or state whose variables carry their sharding.
        rules: What Flax's logical axis names mean on this mesh.
        spread: Shard each factor over the mesh axes that its weight does not use as well, where they divide it.
            Each device then holds a smaller part of adapters and moments; a step gathers the factors, which are small.
        memory_kind: The memory of the frozen weights, such as ``"pinned_host"``; None for the device.
        bank_axis: The mesh axes that the adapters of a bank are sharded over, each device then holding some of them; by
            default every device holds all. Weights must not be sharded over them.

    Returns:
        The `Shardings`.

    Raises:
        ValueError: There is no mesh, or it does not divide a weight or the bank; the message names the weight.

    >>> from lojax import init
    >>> mesh = jax.make_mesh((1,), ("tensor",))
    >>> frozen, lora = init(jax.random.key(0), {"w": jax.numpy.ones((4, 6))}, "w", rank=2)
    >>> adapter = shardings(frozen, lora, mesh=mesh, specs={"w": PartitionSpec(None, "tensor")}).lora["w"]
    >>> adapter.a.spec, adapter.b.spec
    (P(None, None), P(None, 'tensor'))
    """
    tree = _check_trained(frozen, lora, bank_axis)
    mesh = find_mesh(frozen, lora, specs) if mesh is None else mesh
    if mesh is None:
        raise ValueError("No mesh: no weight is sharded over one. Pass mesh=, or put the weights on a mesh first.")
    weights = map_paths(lambda _, f, t: t if f is None and not is_adapter(t) else f, frozen, tree)
    spec_by_path = weight_specs(weights, specs, rules)
    for path, leaf in flatten(weights).items():
        if leaf is not None:
            check_divides(mesh, spec_by_path[path], unbox(leaf).shape, path)
    if isinstance(lora, Bank):
        _check_bank_axis(mesh, bank_axis, lora, spec_by_path)

    def shard_frozen(path: Path, leaf: Leaf) -> Leaf:
        if leaf is None:
            return None
        weight, spec = unbox(leaf), spec_by_path[path]
        specs = stored_specs(weight, spec, mesh) if is_quantized(weight) else spec
        place = functools.partial(NamedSharding, mesh, memory_kind=memory_kind)
        return rebox(leaf, jax.tree.map(place, specs, is_leaf=is_spec))

    placement = Placement(mesh, spec_by_path, spread, isinstance(lora, Bank), bank_axis)
    lora_shardings: PyTree = map_paths(placement.shard_leaf, lora.lora if isinstance(lora, Bank) else lora)
    if isinstance(lora, Bank):
        lora_shardings = dataclasses.replace(lora, lora=lora_shardings)
    state = None if opt_state is None else state_shardings(opt_state, lora, lora_shardings, mesh)
    return Shardings(map_paths(shard_frozen, frozen), lora_shardings, state)


def _check_trained(frozen: Params, lora: Params | Bank, bank_axis: str | tuple[str, ...] | None) -> Params:
    """The trained tree; for a bank that of one adapter, as far as it tells how a parameter trained in full is sharded.

    Raises:
        ValueError: The trees do not fit together.
    """
    if not isinstance(lora, Bank):
        if bank_axis is not None:
            raise ValueError(f"bank_axis={bank_axis!r} is for a bank, and lora is one adapter. Leave it out.")
        check_pair(frozen, lora)
        return lora
    check_bank_pair(frozen, lora)
    return map_paths(lambda _, leaf: leaf if leaf is None or is_adapter(leaf) else _one_full(leaf), lora.lora)


def _one_full(leaf: Leaf) -> Leaf:
    """The shape and sharding of a parameter that a bank trains in full, without the axis of the bank."""
    x = unbox(leaf)
    sharding = getattr(x, "sharding", None)
    if isinstance(sharding, NamedSharding):
        sharding = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))
    else:
        sharding = None
    one = jax.ShapeDtypeStruct(x.shape[1:], x.dtype, sharding=sharding)
    return leaf.replace(value=one, names=leaf.names[1:]) if isinstance(leaf, meta.Partitioned) else rebox(leaf, one)


def _check_bank_axis(
    mesh: AnyMesh, bank_axis: str | tuple[str, ...] | None, bank: Bank, specs: Mapping[Path, PartitionSpec]
) -> None:
    """Raises unless the mesh can hold the adapters of a bank along ``bank_axis``."""
    check_divides(mesh, PartitionSpec(bank_axis), (len(bank),), "The bank")
    own = set(mesh_axes(bank_axis))
    for path, leaf in flatten(bank.lora).items():
        taken = [name for entry in specs[path] for name in mesh_axes(entry) if name in own] if leaf is not None else []
        if taken:
            raise ValueError(
                f"{path} is sharded over the mesh axis {taken[0]!r}, and so is the bank by bank_axis={bank_axis!r}. "
                "Choose an axis that no adapted weight is sharded over, or leave bank_axis out."
            )


@dataclasses.dataclass(frozen=True)
class Placement:
    """How trained leaves are sharded.

    Attributes:
        mesh: The mesh.
        specs: The spec of every weight by path.
        spread: Whether factors are sharded over unused mesh axes as well.
        is_bank: Whether every leaf has a first axis along which the adapters of a bank lie.
        bank_axis: The mesh axes that this axis is sharded over.
    """

    mesh: AnyMesh
    specs: Mapping[Path, PartitionSpec]
    spread: bool
    is_bank: bool = False
    bank_axis: str | tuple[str, ...] | None = None

    def shard_leaf(self, path: Path, leaf: Leaf) -> Leaf:
        """The shardings of an adapter, or of a parameter trained in full."""
        if not is_adapter(leaf):
            first = [self.bank_axis] if self.is_bank else []
            spec = PartitionSpec(*first, *self.specs[path])
            return None if leaf is None else rebox(leaf, NamedSharding(self.mesh, spec))
        return dataclasses.replace(leaf, **{
            name: rebox(getattr(leaf, name), self.shard_array(x.shape, self.array_entries(leaf, name, path)))
            for name, x in leaf.arrays.items()
        })  # fmt: skip

    def array_entries(self, adapter: Adapter, name: str, path: Path) -> list[Any]:
        """The entries of the spec of one array of an adapter: those of the weight axes that it stands for."""
        weight_spec = self.specs[path]
        entries = [None if d is None else weight_spec[d] for d in array_axes(adapter.axes)[name]]
        leading = len(unbox(getattr(adapter, name)).shape) - len(entries)  # several adapters are stacked along it
        return [self.bank_axis] * self.is_bank + [None] * (leading - self.is_bank) + entries

    def shard_array(self, shape: Shape, entries: Sequence[Any]) -> NamedSharding:
        """The sharding of one array of an adapter."""
        return NamedSharding(self.mesh, PartitionSpec(*(self._spread(shape, entries) if self.spread else entries)))

    def _spread(self, shape: Shape, entries: Sequence[Any]) -> list[Any]:
        """``entries`` with each unused mesh axis, the largest first, on the longest axis that it divides."""
        sizes = self.mesh.shape
        names_by_axis = [mesh_axes(entry) for entry in entries]
        # Never the axis of a bank: which adapter is where is for `bank_axis` to say.
        may_spread = range(self.is_bank, len(shape))
        used = {name for names in names_by_axis for name in names}
        # The largest mesh axis first, as it saves the most memory. A smaller one may still divide what remains.
        for name in sorted(sizes, key=lambda n: -sizes[n]):
            lengths = [n // math.prod(sizes[m] for m in names) for n, names in zip(shape, names_by_axis, strict=True)]
            divisible = [axis for axis in may_spread if lengths[axis] % sizes[name] == 0]
            if name in used or sizes[name] == 1 or not divisible:
                continue
            longest = max(divisible, key=lambda axis: lengths[axis])
            names_by_axis[longest] = (*names_by_axis[longest], name)
        # P('x') and P(('x',)) shard alike but do not compare equal, so single names stay bare.
        return [None if not names else names[0] if len(names) == 1 else names for names in names_by_axis]


def state_shardings(opt_state: PyTree, lora: Params, lora_shardings: PyTree, mesh: AnyMesh) -> PyTree:
    """The sharding of every leaf of an optimizer's state.

    A leaf whose path ends with that of a trained array is a moment of it, and is sharded like it. One with fewer axes
    (a factored moment) is sharded like the axes that it has.
    """
    arrays, _ = jax.tree_util.tree_flatten_with_path(lora)
    trained = {_names(keys): (x.shape, s) for (keys, x), s in zip(arrays, jax.tree.leaves(lora_shardings), strict=True)}
    replicated = NamedSharding(mesh, PartitionSpec())

    def shard_leaf(keys: KeyPath, leaf: Array) -> NamedSharding:
        # No optax state says which parameter a leaf belongs to, but all of them hold trees like the parameters', so
        # the longest suffix of the path that is a parameter's path names it, whatever wraps the tree.
        names = _names(keys)
        parameter = next((trained[names[i:]] for i in range(len(names) + 1) if names[i:] in trained), None)
        if parameter is None:
            return replicated
        shape, sharding = parameter
        spec = _reduced_spec(shape, leaf.shape, sharding.spec)
        return replicated if spec is None else NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(shard_leaf, opt_state)


def _names(keys: KeyPath) -> tuple[str, ...]:
    return tuple(path_of((key,)) for key in keys)


def _reduced_spec(shape: Shape, reduced: Shape, spec: PartitionSpec) -> PartitionSpec | None:
    """The spec of an array that has some of the axes of ``shape``, in order; None where it is ambiguous."""
    entries = (*spec, *[None] * (len(shape) - len(spec)))
    subsets = itertools.combinations(range(len(shape)), len(reduced))
    # Shapes alone do not tell which axes a factored moment has: a square weight has two answers. They are one if both
    # are sharded alike, and otherwise the moment, which is small, is replicated.
    candidates = {tuple(entries[i] for i in axes) for axes in subsets if tuple(shape[i] for i in axes) == reduced}
    return PartitionSpec(*candidates.pop()) if len(candidates) == 1 else None


class Initializable(Protocol):
    """The part of `lojax.Model` that `init_sharded` uses."""

    def init(self, key: Key, params: Params, *args: Any, **kwargs: Any) -> tuple[Params, Params]:
        """As `lojax.Model.init`."""
        ...


def init_sharded(
    model: Initializable,
    key: Key,
    params: Params,
    *args: Any,
    mesh: AnyMesh | None = None,
    specs: PyTree = None,
    rules: Rules | None = None,
    spread: bool = False,
    **kwargs: Any,
) -> tuple[Params, Params]:
    """``model.init`` that creates every adapter in its shards: no device ever has all of one, and no weight moves.

    Args:
        model: What `lojax.wrap` returned.
        key: A PRNG key; consumed.
        params: The parameters, on the mesh.
        *args: Example inputs, as for ``model.init``.
        mesh: As for `shardings`.
        specs: As for `shardings`.
        rules: As for `shardings`.
        spread: As for `shardings`.
        **kwargs: Further example inputs.

    Returns:
        ``(frozen, lora)``. The frozen weights are the arrays of ``params``, not copies.
    """
    init = lambda key, params: model.init(key, params, *args, **kwargs)
    mesh = find_mesh(params, specs) if mesh is None else mesh
    if specs is None:  # the shapes that tracing returns no longer know the shardings of the arrays
        spec_by_path = weight_specs(params, None, rules)
        specs = map_paths(lambda path, leaf: None if leaf is None else spec_by_path[path], params)
    jaxpr, shapes = jax.make_jaxpr(init, return_shape=True)(key, params)
    placed = shardings(*shapes, mesh=mesh, specs=specs, rules=rules, spread=spread)
    out_shardings, treedef = jax.tree.flatten((placed.frozen, placed.lora))
    inputs = jax.tree.leaves((key, params))
    # A jit copies an input that it returns, here the frozen weights. So outputs that are inputs bypass it.
    unchanged = _unchanged_inputs(jaxpr, inputs)
    computed = [i for i in range(len(out_shardings)) if i not in unchanged]

    @functools.partial(jax.jit, out_shardings=[out_shardings[i] for i in computed])
    def compute(*inputs: Array) -> list[Array]:
        outputs = jaxpr_as_fun(jaxpr)(*inputs)
        return [outputs[i] for i in computed]

    outputs = unchanged | dict(zip(computed, compute(*inputs), strict=True))
    return jax.tree.unflatten(treedef, [outputs[i] for i in range(len(out_shardings))])


def _unchanged_inputs(jaxpr: Jaxpr, inputs: Sequence[Array]) -> dict[int, Array]:
    """The inputs that are outputs of a traced function, by position among the outputs."""
    body, _ = opened(jaxpr)
    by_variable = {id(var): x for var, x in zip(body.invars, inputs, strict=True)}
    return {i: by_variable[id(var)] for i, var in enumerate(body.outvars) if id(var) in by_variable}
