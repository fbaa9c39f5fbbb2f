"""How adapters and the optimizer's state lie on a mesh: derived from how the weights lie.

An axis of a factor lies where the axis of the weight lies that it stands for: in axes and stack axes for ``a``, out
axes and stack axes for ``b``. The rank is whole everywhere. So a product with a factor needs no more traffic than
the product with the weight, but for values of the size of the rank.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
from jax.extend.core import jaxpr_as_fun
from jax.sharding import NamedSharding, PartitionSpec

from lojax.adapters.adapter import Adapter, array_axes, is_adapter
from lojax.adapters.metadata import rebox, unbox
from lojax.adapters.paths import is_leaf, map_paths, path_of
from lojax.adapters.trees import check_pair
from lojax.compat import opened
from lojax.sharding.weight_specs import check_divides, find_mesh, weight_specs


class Shardings(NamedTuple):
    """Trees of `NamedSharding`, one for every array of the tree of the same name; for ``in_shardings=`` and the like.

    Attributes:
        frozen: For ``frozen``.
        lora: For ``lora``.
        opt_state: For the optimizer's state; None where none was given.
    """

    frozen: Any
    lora: Any
    opt_state: Any = None


def shardings(
    frozen: Any,
    lora: Any,
    opt_state: Any = None,
    *,
    mesh: Any = None,
    specs: Any = None,
    rules: Sequence[tuple[str, Any]] | None = None,
    spread: bool = False,
    memory_kind: str | None = None,
) -> Shardings:
    """The shardings of the frozen weights, of the adapters, and of the optimizer's state.

    Works on arrays and on shapes (`jax.eval_shape`); nothing is moved.

    Args:
        frozen: The frozen tree. How a weight lies is read off ``specs``, else its box (`nn.Partitioned`, logical
            axes), else its own sharding; a weight of which nothing is known is whole on every chip.
        lora: The trained tree.
        opt_state: The state of any optax optimizer over ``lora``, or over a tree that holds it. Moments lie like
            what they are moments of, factored ones likewise; counters are whole.
        mesh: The mesh; found on the arrays where it is not given.
        specs: A tree of `PartitionSpec` or `NamedSharding` of the structure of the parameters, or of its upper
            levels; or an NNX module or state whose variables carry their sharding.
        rules: What Flax's logical axis names mean on this mesh.
        spread: Lay each factor over the mesh axes that its weight's axes leave unused as well, where they divide
            it. Memory for adapters and moments falls by their size; a step gathers the factors, which are small.
        memory_kind: Where the frozen weights live, such as ``"pinned_host"``; None for the device.

    Returns:
        The `Shardings`.

    Raises:
        ValueError: There is no mesh, or it does not divide a weight; the message names the weight.

    >>> from lojax import init
    >>> mesh = jax.make_mesh((1,), ("tensor",))
    >>> frozen, lora = init(jax.random.key(0), {"w": jax.numpy.ones((4, 6))}, "w", rank=2)
    >>> found = shardings(frozen, lora, mesh=mesh, specs={"w": PartitionSpec(None, "tensor")})
    >>> found.lora["w"].a.spec, found.lora["w"].b.spec
    (P(None, None), P(None, 'tensor'))
    """
    check_pair(frozen, lora)
    mesh = find_mesh(frozen, lora, specs) if mesh is None else mesh
    if mesh is None:
        raise ValueError("No mesh: no weight lies on one. Give mesh=, or put the weights on a mesh first.")
    whole = map_paths(lambda _, f, t: t if f is None and not is_adapter(t) else f, frozen, lora)
    by_path = weight_specs(whole, specs, rules)
    for path, leaf in _flat(whole).items():
        if leaf is not None:
            check_divides(mesh, by_path[path], unbox(leaf).shape, path)
    place = Placement(mesh, by_path, spread)
    frozen_tree = map_paths(
        lambda path, f: _boxed(f, NamedSharding(mesh, by_path[path], memory_kind=memory_kind)), frozen
    )
    lora_tree = map_paths(place.trained, lora)
    state = None if opt_state is None else state_shardings(opt_state, lora, lora_tree, mesh)
    return Shardings(frozen_tree, lora_tree, state)


def _flat(tree: Any) -> dict[str, Any]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)
    return {path_of(keys): leaf for keys, leaf in leaves}


def _boxed(leaf: Any, sharding: NamedSharding) -> Any:
    return None if leaf is None else rebox(leaf, sharding)


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where what trains lies.

    Attributes:
        mesh: The mesh.
        specs: The spec of every weight by path.
        spread: Whether factors lie over unused mesh axes as well.
    """

    mesh: Any
    specs: Mapping[str, PartitionSpec]
    spread: bool

    def trained(self, path: str, leaf: Any) -> Any:
        """The shardings of an adapter, or of a parameter trained in full."""
        if leaf is None:
            return None
        if not is_adapter(leaf):
            return rebox(leaf, NamedSharding(self.mesh, self.specs[path]))
        arrays = {
            f.name: getattr(leaf, f.name) for f in dataclasses.fields(Adapter) if not f.metadata.get("static", False)
        }
        placed = {
            name: rebox(array, self.factor(unbox(array).shape, self.factor_entries(leaf, name, path)))
            for name, array in arrays.items()
            if array is not None
        }
        return dataclasses.replace(leaf, **placed)

    def factor_entries(self, adapter: Adapter, name: str, path: str) -> list[Any]:
        """The spec of one array of an adapter: stack axes, then the factor's own, the rank between or behind."""
        spec = self.specs[path]
        entries = [None if d is None else spec[d] for d in array_axes(adapter.axes)[name]]
        extra = len(unbox(getattr(adapter, name)).shape) - len(entries)  # several adapters are a leading axis
        return [None] * extra + entries

    def factor(self, shape: Sequence[int], entries: Sequence[Any]) -> NamedSharding:
        """The sharding of one array of an adapter."""
        return NamedSharding(self.mesh, PartitionSpec(*(self._spread(shape, entries) if self.spread else entries)))

    def _spread(self, shape: Sequence[int], entries: Sequence[Any]) -> list[Any]:
        """``entries`` with each unused mesh axis, the largest first, on the longest axis that it divides."""
        found = [() if e is None else e if isinstance(e, tuple) else (e,) for e in entries]
        used = {name for names in found for name in names}
        for name in sorted(self.mesh.shape, key=lambda n: -self.mesh.shape[n]):
            left = [n // math.prod(self.mesh.shape[m] for m in names) for n, names in zip(shape, found, strict=True)]
            fits = [i for i, n in enumerate(left) if n % self.mesh.shape[name] == 0]
            if name in used or self.mesh.shape[name] == 1 or not fits:
                continue
            best = max(fits, key=lambda i: left[i])
            found[best] = (*found[best], name)
        return [None if not names else names[0] if len(names) == 1 else names for names in found]


def state_shardings(opt_state: Any, lora: Any, lora_shardings: Any, mesh: Any) -> Any:
    """The sharding of every leaf of an optimizer's state.

    A leaf whose path ends like that of a trained array is a moment of it, and lies like it. One of fewer axes
    (a factored moment) lies like the axes that it kept.
    """
    arrays, _ = jax.tree_util.tree_flatten_with_path(lora)
    placed = jax.tree.leaves(lora_shardings)
    trained = {_keys(keys): (tuple(x.shape), s) for (keys, x), s in zip(arrays, placed, strict=True)}
    whole = NamedSharding(mesh, PartitionSpec())

    def place(keys: Any, leaf: Any) -> NamedSharding:
        names = _keys(keys)
        owner = next((trained[names[i:]] for i in range(len(names) + 1) if names[i:] in trained), None)
        if owner is None:
            return whole
        shape, sharding = owner
        kept = _kept(shape, tuple(leaf.shape), sharding.spec)
        return whole if kept is None else NamedSharding(mesh, kept)

    return jax.tree_util.tree_map_with_path(place, opt_state)


def _keys(keys: Any) -> tuple[str, ...]:
    return tuple(path_of((key,)) for key in keys)


def _kept(shape: tuple[int, ...], part: tuple[int, ...], spec: PartitionSpec) -> PartitionSpec | None:
    """The spec of an array whose axes are some of those of ``shape``, in order; None where that is ambiguous."""
    entries = (*spec, *[None] * (len(shape) - len(spec)))
    axes = itertools.combinations(range(len(shape)), len(part))
    options = {tuple(entries[i] for i in kept) for kept in axes if tuple(shape[i] for i in kept) == part}
    return PartitionSpec(*options.pop()) if len(options) == 1 else None


def init_sharded(
    model: Any,
    key: jax.Array,
    params: Any,
    *args: Any,
    mesh: Any = None,
    specs: Any = None,
    rules: Sequence[tuple[str, Any]] | None = None,
    spread: bool = False,
    **kwargs: Any,
) -> tuple[Any, Any]:
    """``model.init`` with every adapter made where it belongs: no chip ever holds a whole one, and no weight moves.

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
    start = lambda key, params: model.init(key, params, *args, **kwargs)
    mesh = find_mesh(params, specs) if mesh is None else mesh
    specs = specs if specs is not None else _specs_of(params, rules)
    traced, shapes = jax.make_jaxpr(start, return_shape=True)(key, params)
    found = shardings(*shapes, mesh=mesh, specs=specs, rules=rules, spread=spread)
    wanted, tree = jax.tree.flatten((found.frozen, found.lora))
    inputs = jax.tree.leaves((key, params))
    given = _passed_on(traced, inputs)
    made = [i for i in range(len(wanted)) if i not in given]

    @functools.partial(jax.jit, out_shardings=[wanted[i] for i in made])
    def make(*inputs: Any) -> list[Any]:
        outputs = jaxpr_as_fun(traced)(*inputs)
        return [outputs[i] for i in made]

    results = given | dict(zip(made, make(*inputs), strict=True))
    return jax.tree.unflatten(tree, [results[i] for i in range(len(wanted))])


def _passed_on(traced: Any, inputs: Sequence[Any]) -> dict[int, Any]:
    """The outputs of a traced function that are inputs as they came, by position."""
    body, _ = opened(traced)
    places = {id(var): x for var, x in zip(body.invars, inputs, strict=True)}
    return {i: places[id(var)] for i, var in enumerate(body.outvars) if id(var) in places}


def _specs_of(params: Any, rules: Any) -> Any:
    """The specs of arrays as a tree, since `jax.eval_shape` forgets how arrays lie."""
    found = weight_specs(params, None, rules)
    return map_paths(lambda path, leaf: None if leaf is None else found[path], params)
