"""One tiny net in the layouts that JAX code has it in, with the name map of each.

The torch net is ``Net`` of ``nets_torch.py``: two layers ``x + o(q(x) * v(x))`` of width 6, and a head.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lojax.adapters.paths import flatten, map_paths
from lojax.files import safetensors
from lojax.peft import NameMap
from lojax.peft.full_parameters import full_from_torch, full_index

GOLDEN = Path(__file__).parent / "golden"
HEAD = "\nhead/* <-> head"


@dataclasses.dataclass(frozen=True)
class Layout:
    """A net in JAX: its map, the shapes of its tree, and what it computes."""

    names: NameMap
    shapes: Any
    apply: Callable[[Any, Any], Any]

    def base(self, tensors: dict[str, np.ndarray]) -> Any:
        """The tree with the weights of the torch net; every torch weight must have found its place."""
        table = self.names.table(shaped(self.shapes))
        assert not table.unmapped
        assert set(table.parameters) == set(tensors), set(table.parameters) ^ set(tensors)
        leaves = {path: np.zeros(leaf.shape, np.float32) for path, leaf in flatten(shaped(self.shapes)).items()}
        for name, parameter in table.parameters.items():
            leaves[parameter.path][full_index(parameter)] = full_from_torch(parameter, tensors[name])
        return map_paths(lambda path, _: jnp.asarray(leaves[path]), shaped(self.shapes))


def shaped(shapes: Any) -> Any:
    """The tree of `jax.ShapeDtypeStruct` of a tree of tuples."""
    is_shape = lambda node: isinstance(node, tuple)
    return jax.tree.map(lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32), shapes, is_leaf=is_shape)


def golden(case: str) -> tuple[Path, dict[str, np.ndarray], np.ndarray, np.ndarray]:
    """The directory of a golden adapter, the torch base weights, an input and the output real PEFT gave."""
    file = safetensors.open_file(GOLDEN / case / "golden.safetensors")
    tensors = {name: file.read(name) for name in file.entries}
    base = {name.removeprefix("base."): value for name, value in tensors.items() if name.startswith("base.")}
    return GOLDEN / case, base, tensors["x"], tensors["y"]


def _net(layer: Callable[[Any, Any], Any], embed: bool = False) -> Callable[[Any, Any], Any]:
    def apply(params: Any, x: Any) -> Any:
        x = params["embed"]["embedding"][x] if embed else x
        for i in range(2):
            x = layer(params["layers"][str(i)], x)
        return x @ params["head"]["kernel"] + params["head"]["bias"]

    return apply


def _dense(p: Any, x: Any, spec: str = "...m,mn->...n", name: str = "kernel") -> Any:
    return jnp.einsum(spec, x, p[name]) + p["bias"]


def _layers(layer: Any) -> Any:
    return {"layers": {"0": layer, "1": layer}, "head": {"kernel": (6, 3), "bias": (3,)}}


_D = {"kernel": (6, 6), "bias": (6,)}
_HEADS = {"kernel": (6, 2, 3), "bias": (2, 3)}
_OUT = {"kernel": (2, 3, 6), "bias": (6,)}
_TORCH = {"weight": (6, 6), "bias": (6,)}


def _flat(p: Any, x: Any) -> Any:
    return x + _dense(p["o"], _dense(p["q"], x) * _dense(p["v"], x))


def _heads(p: Any, x: Any) -> Any:
    q, v = (_dense(p[m], x, "...m,mhk->...hk") for m in "qv")
    return x + _dense(p["o"], q * v, "...hk,hkn->...n")


def _fused(p: Any, x: Any) -> Any:
    both = _dense(p["qv"], x, "...m,mpn->...pn")
    return x + _dense(p["o"], both[..., 0, :] * both[..., 1, :])


def _side_by_side(p: Any, x: Any) -> Any:
    q, v = jnp.split(_dense(p["qv"], x), 2, axis=-1)
    return x + _dense(p["o"], q * v)


def _torch_like(p: Any, x: Any) -> Any:
    q, v = (_dense(p[m], x, "...m,nm->...n", "weight") for m in "qv")
    return x + _dense(p["o"], q * v, "...m,nm->...n", "weight")


def _scan(params: Any, x: Any) -> Any:
    x, _ = jax.lax.scan(lambda x, p: (_heads(p, x), None), x, params["layers"])
    return _dense(params["head"], x)


def _scan_fused(params: Any, x: Any) -> Any:
    def layer(x: Any, p: Any) -> Any:
        both = _dense(p["qv"], x, "...m,mphk->...phk")
        return x + _dense(p["o"], both[..., 0, :, :] * both[..., 1, :, :], "...hk,hkn->...n"), None

    return _dense(params["head"], jax.lax.scan(layer, x, params["layers"])[0])


def _conv(params: Any, x: Any) -> Any:
    x = jnp.asarray(x).transpose(0, 2, 3, 1)
    for name, stride in (("wide", 2), ("point", 1)):
        kernel = params[name]["kernel"]
        dims = jax.lax.conv_dimension_numbers(x.shape, kernel.shape, ("NHWC", "HWIO", "NHWC"))
        x = jax.lax.conv_general_dilated(x, kernel, (stride, stride), "VALID", dimension_numbers=dims)
        x = x + params[name]["bias"]
    return x.transpose(0, 3, 1, 2)


def _moe(params: Any, x: Any) -> Any:
    hidden = jnp.tanh(jnp.einsum("ti,eio->teo", x, params["experts"]["up"]))
    return jnp.einsum("teo,eoi->ti", hidden, params["experts"]["down"])


def _parse(text: str, head: str = HEAD) -> NameMap:
    return NameMap.parse(text + head)


LAYOUTS = {
    "flat": Layout(
        _parse("layers/{i}/{m:q,v,o}/* <-> layers.{i}.{m}"), _layers({"q": _D, "v": _D, "o": _D}), _net(_flat)
    ),
    "heads": Layout(
        _parse("layers/{i}/{m:q,v}/*[in, out, out] <-> layers.{i}.{m}\nlayers/{i}/o/*[in, in, out] <-> layers.{i}.o"),
        _layers({"q": _HEADS, "v": _HEADS, "o": _OUT}),
        _net(_heads),
    ),
    "fused": Layout(
        _parse("layers/{i}/qv/*[in, {m:q,v}, out] <-> layers.{i}.{m}\nlayers/{i}/o/* <-> layers.{i}.o"),
        _layers({"qv": {"kernel": (6, 2, 6), "bias": (2, 6)}, "o": _D}),
        _net(_fused),
    ),
    "side by side": Layout(
        _parse("layers/{i}/qv/*[in, {m:q=6,v=6}*out] <-> layers.{i}.{m}\nlayers/{i}/o/* <-> layers.{i}.o"),
        _layers({"qv": {"kernel": (6, 12), "bias": (12,)}, "o": _D}),
        _net(_side_by_side),
    ),
    "torch-like": Layout(
        _parse("layers/{i}/{m:q,v,o}/*[out, in] <-> layers.{i}.{m}"),
        _layers({"q": _TORCH, "v": _TORCH, "o": _TORCH}),
        _net(_torch_like),
    ),
    "scanned": Layout(
        _parse("layers/{m:q,v}/*[{i}, in, out, out] <-> layers.{i}.{m}\nlayers/o/*[{i}, in, in, out] <-> layers.{i}.o"),
        {
            "layers": {
                "q": {"kernel": (2, 6, 2, 3), "bias": (2, 2, 3)},
                "v": {"kernel": (2, 6, 2, 3), "bias": (2, 2, 3)},
                "o": {"kernel": (2, 2, 3, 6), "bias": (2, 6)},
            },
            "head": {"kernel": (6, 3), "bias": (3,)},
        },
        _scan,
    ),
    "scanned fused": Layout(
        _parse(
            "layers/qv/*[{i}, in, {m:q,v}, out, out] <-> layers.{i}.{m}\nlayers/o/*[{i}, in, in, out] <-> layers.{i}.o"
        ),
        {
            "layers": {
                "qv": {"kernel": (2, 6, 2, 2, 3), "bias": (2, 2, 2, 3)},
                "o": {"kernel": (2, 2, 3, 6), "bias": (2, 6)},
            },
            "head": {"kernel": (6, 3), "bias": (3,)},
        },
        _scan_fused,
    ),
}
"""The layouts of ``Net``: what they compute is the same."""

CONV1D = Layout(
    _parse("layers/{i}/{m:q,v,o}/* <-> layers.{i}.{m} : conv1d"), _layers({"q": _D, "v": _D, "o": _D}), _net(_flat)
)
EMBEDDING = Layout(
    _parse("layers/{i}/{m:q,v,o}/* <-> layers.{i}.{m}\nembed/embedding <-> embed"),
    _layers({"q": _D, "v": _D, "o": _D}) | {"embed": {"embedding": (9, 6)}},
    _net(_flat, embed=True),
)
CONV2D = Layout(
    NameMap.parse("{m:wide,point}/kernel <-> {m} : conv\n{m:wide,point}/bias <-> {m}"),
    {"wide": {"kernel": (3, 3, 2, 4), "bias": (4,)}, "point": {"kernel": (1, 1, 4, 3), "bias": (3,)}},
    _conv,
)
EXPERTS = Layout(
    NameMap.parse(
        "experts/up[expert, in, out] <-> mlp.experts.up : experts\n"
        "experts/down[expert, in, out] <-> mlp.experts.down : experts"
    ),
    {"experts": {"up": (3, 4, 6), "down": (3, 6, 4)}},
    _moe,
)
ROWS = [
    *(
        (case, name, layout)
        for case in ("linear", "patterns", "some_layers", "dora")
        for name, layout in LAYOUTS.items()
    ),
    ("conv1d", "conv1d", CONV1D),
    ("embedding", "embedding", EMBEDDING),
    ("conv2d", "conv2d", CONV2D),
    ("dora_conv1d", "conv1d", CONV1D),
    ("dora_embedding", "embedding", EMBEDDING),
    ("dora_conv2d", "conv2d", CONV2D),
    ("tokens", "embedding", EMBEDDING),
    ("experts", "experts", EXPERTS),
]
"""Golden adapter, layout name, layout."""
