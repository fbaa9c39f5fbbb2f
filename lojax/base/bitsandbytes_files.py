"""4-bit weights in safetensors, as bitsandbytes writes them and the Hugging Face hub holds them.

Beside the codes of a weight, ``W.weight``, lie its scales, its code books and a small JSON, each a tensor whose name
starts with that of the weight. A `Quantized` of kind NF4 holds the same numbers, so both directions keep every bit.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping

import jax.numpy as jnp
import numpy as np

from lojax.files.filesystem import parse_json
from lojax.quantized.code_books import NF4, dynamic_map
from lojax.quantized.formats import BlockFormat
from lojax.quantized.quantized import Quantized
from lojax.text import printable, spec
from lojax.types import Shape

STATE = ".quant_state.bitsandbytes__"
"""What stands between the name of a weight and its kind in the name of the tensor that describes it."""
BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
"""The sizes of blocks that bitsandbytes knows."""
DTYPES = {name: np.dtype(jnp.dtype(name)) for name in ("float16", "bfloat16", "float32")}
"""The dtypes of weights that bitsandbytes quantizes."""

_SINGLE = (".absmax", ".quant_map")
_NESTED = (".nested_absmax", ".nested_quant_map")
_JSON_LIMIT = 200
"""More bytes than the JSON has without its shape."""


@dataclasses.dataclass(frozen=True)
class State:
    """What the JSON of a weight says.

    Attributes:
        shape: The shape of the weight, as torch has it: ``[out, in]`` for a linear map.
        dtype: The dtype of the weight.
        format: NF4, with its block.
        offset: What is added to the scales that are quantized themselves; None where they are not.
    """

    shape: Shape
    dtype: np.dtype
    format: BlockFormat
    offset: float | None

    def to_json(self) -> np.ndarray:
        """The bytes that bitsandbytes writes, uint8."""
        fields: dict[str, object] = {
            "quant_type": self.format.kind,
            "blocksize": self.format.block,
            "dtype": self.dtype.name,
            "shape": list(self.shape),
        }
        if self.offset is not None:
            fields |= {"nested_blocksize": self.format.scales_per_block, "nested_dtype": "float32"}
            fields["nested_offset"] = self.offset
        return np.frombuffer(json.dumps(fields).encode(), np.uint8)


def weight_names(names: Iterable[str]) -> list[str]:
    """The names of the 4-bit weights among the tensors of a checkpoint.

    >>> weight_names(["w", "w.absmax", "w.quant_map", "w.quant_state.bitsandbytes__nf4", "b"])
    ['w']
    """
    return [weight for weight, found, _ in (name.rpartition(STATE) for name in names) if found]


def part_names(weight: str, names: Iterable[str]) -> list[str]:
    """Those of ``names`` that bitsandbytes would store for ``weight``, the codes among them."""
    exact = {weight, *(weight + suffix for suffix in (*_SINGLE, *_NESTED))}
    return [name for name in names if name in exact or name.rpartition(STATE)[0] == weight]


def largest_specs(weight: str, shape: Shape, format: BlockFormat) -> dict[str, tuple[np.dtype, Shape]]:
    """The dtypes and shapes of what `to_tensors` returns, in its order; its JSON may be shorter."""
    blocks = _divide_up(math.prod(shape), format.block)
    byte, wide = np.dtype(np.uint8), np.dtype(np.float32)
    specs = {
        "": (byte, (_divide_up(math.prod(shape), 2), 1)),
        ".absmax": (byte if format.double else wide, (blocks,)),
        ".quant_map": (wide, (len(NF4),)),
    }
    if format.double:
        specs[".nested_absmax"] = (wide, (_divide_up(blocks, format.scales_per_block),))
        specs[".nested_quant_map"] = (wide, (256,))
    specs[STATE + format.kind] = (byte, (_JSON_LIMIT + len(str(list(shape))),))
    return {weight + suffix: value for suffix, value in specs.items()}


def to_tensors(name: str, weight: Quantized) -> dict[str, np.ndarray]:
    """The tensors that bitsandbytes stores for a weight.

    Args:
        name: The name of the weight in the checkpoint, such as ``model.layers.0.mlp.up_proj.weight``.
        weight: A weight of kind NF4, in torch's orientation.

    Returns:
        Tensors by name, the codes ``[bytes, 1]`` first.

    Raises:
        ValueError: bitsandbytes does not know the kind, the block or the dtype.

    >>> from lojax.quantized.quantized import quantize_weight
    >>> weight = quantize_weight(jnp.ones((64, 64)), BlockFormat("nf4", double=False))
    >>> {name: array.shape for name, array in to_tensors("w", weight).items()}
    {'w': (2048, 1), 'w.absmax': (64,), 'w.quant_map': (16,), 'w.quant_state.bitsandbytes__nf4': (77,)}
    """
    format, dtype = weight.format, np.dtype(jnp.dtype(weight.dtype))
    check_kind(format.kind, where=f"{name}: ")
    assert isinstance(format, BlockFormat)
    if format.block not in BLOCKS:
        raise ValueError(f"{name}: has blocks of {format.block}; bitsandbytes knows blocks of {_listed(BLOCKS)}.")
    if dtype.name not in DTYPES:
        raise ValueError(f"{name}: is a weight of {dtype}; bitsandbytes quantizes {_listed(DTYPES)}. Cast it first.")
    arrays = {key: np.asarray(array).reshape(-1) for key, array in weight.arrays.items()}
    offset = float(arrays["offset"][0]) if format.double else None
    if format.double and not (arrays["offset"] == arrays["offset"][0]).all():
        raise ValueError(
            f"{name}: is a stack of weights that were quantized each on its own, with offsets from "
            f"{arrays['offset'].min()} to {arrays['offset'].max()}; bitsandbytes stores one. Write them one by one."
        )
    tensors = {"": arrays["codes"].reshape(-1, 1), ".absmax": arrays["scales"], ".quant_map": NF4}
    if format.double:
        tensors |= {".nested_absmax": arrays["group_scales"], ".nested_quant_map": dynamic_map()}
    tensors[STATE + format.kind] = State(tuple(weight.shape), dtype, format, offset).to_json()
    return {name + suffix: array for suffix, array in tensors.items()}


def check_kind(kind: str, where: str = "") -> None:
    """Raises unless files of bitsandbytes can hold a kind that lojax has.

    >>> check_kind("int8")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
        ...
    ValueError: kind='int8' is one that files of bitsandbytes do not hold; they hold 'nf4'. Quantize to ...
    """
    if kind != "nf4":
        raise ValueError(
            f"{where}kind={kind!r} is one that files of bitsandbytes do not hold; they hold 'nf4'. Quantize to it, or "
            f"quantize to {kind!r} after loading, with lojax.quantize."
        )


def from_tensors(name: str, tensors: Mapping[str, np.ndarray], *, where: object = "checkpoint") -> Quantized:
    """The weight that bitsandbytes stored.

    Args:
        name: The name of the weight in the checkpoint.
        tensors: Its tensors by name (`part_names`); others are not looked at.
        where: The file, for errors.

    Returns:
        The weight in the shape that it had in torch: ``[out, in]`` for a linear map.

    Raises:
        ValueError: A tensor is missing, or they contradict each other; the message names the file and the tensor.
    """
    state = read_state(name, tensors, where=where)
    format, shape = state.format, state.shape
    parts = {}
    for key, (dtype, expected) in largest_specs(name, shape, format).items():
        if key.rpartition(STATE)[1]:
            continue
        if key not in tensors:
            raise _error(where, key, "is missing from a 4-bit weight")
        part = tensors[key]
        if key == name:  # FSDP has the codes stored in a wider dtype, which stands for the same bytes
            part = np.ascontiguousarray(part).reshape(-1).view(np.uint8).reshape(-1, 1)
        if part.dtype != dtype or part.size != math.prod(expected):
            wanted = f"{dtype}[{','.join(map(str, expected))}]"
            raise _error(
                where, key, f"is {spec(part)}; a weight of shape {shape} in blocks of {format.block} has {wanted}"
            )
        if dtype == np.float32 and not np.isfinite(part).all():
            raise _error(where, key, "holds NaN or infinity")
        parts[key.removeprefix(name)] = part.reshape(expected)
    for suffix, book in ((".quant_map", NF4), (".nested_quant_map", dynamic_map())):
        # Releases of torch differ in the last bit of a step.
        if suffix in parts and not np.allclose(parts[suffix], book, rtol=1e-6, atol=1e-12):
            raise _error(where, name + suffix, "is not the code book of bitsandbytes, which lojax dequantizes with")
    leading = shape[: format.leading(shape)]
    arrays = {
        "codes": parts[""].reshape(*leading, -1),
        "scales": parts[".absmax"].reshape(*leading, -1),
    }
    if state.offset is not None:
        leading = shape[: format.leading_of_scales(shape)]
        arrays["group_scales"] = parts[".nested_absmax"].reshape(*leading, -1)
        arrays["offset"] = np.full(leading, state.offset, np.float32)
    return Quantized({key: jnp.asarray(x) for key, x in arrays.items()}, format, shape, state.dtype)


def read_state(name: str, tensors: Mapping[str, np.ndarray], *, where: object = "checkpoint") -> State:
    """What the JSON of a weight says, of which nothing else is read.

    Raises:
        ValueError: There is none, it is damaged, or of a kind that lojax does not read.
    """
    keys = sorted(key for key in tensors if key.rpartition(STATE)[0] == name and STATE in key)
    if len(keys) != 1:
        raise _error(where, name, f"has {len(keys)} tensors {STATE[1:]}*; a 4-bit weight has one")
    key = keys[0]
    kind = key.rpartition(STATE)[2]
    if kind != "nf4":
        raise _error(where, key, f"is of type {printable(repr(kind))}; lojax reads 'nf4'")
    if tensors[key].dtype != np.uint8:
        raise _error(where, key, f"is {spec(tensors[key])}; expected the bytes of a JSON, uint8")
    try:
        fields = parse_json(tensors[key].tobytes())
    except ValueError as error:
        raise _error(where, key, f"is not JSON ({printable(error)})") from None
    if not isinstance(fields, dict):
        raise _error(where, key, f"is not a JSON object: {printable(repr(fields))}")
    double = any(name + suffix in tensors for suffix in _NESTED) or any(f.startswith("nested_") for f in fields)
    expected = {"quant_type": (kind,), "blocksize": BLOCKS, "dtype": tuple(DTYPES)}
    if double:
        expected |= {"nested_blocksize": (BlockFormat.scales_per_block,), "nested_dtype": ("float32",)}
    for field, values in expected.items():
        value = fields.get(field)
        if type(value) is not type(values[0]) or value not in values:  # JSON's 64.0 is not 64, nor is true 1
            raise _error(where, key, f"has {field} {printable(repr(value))}; expected {_listed(values)}")
    shape, offset = fields.get("shape"), fields.get("nested_offset")
    if not isinstance(shape, list) or not shape or not all(type(n) is int and n > 0 for n in shape) or len(shape) > 64:
        raise _error(where, key, f"has shape {printable(repr(shape))}; expected the sizes of a weight")
    if double and (not isinstance(offset, float) or not abs(offset) <= float(np.finfo(np.float32).max)):
        raise _error(where, key, f"has nested_offset {printable(repr(offset))}; expected a float32")
    format = BlockFormat(kind, fields["blocksize"], double)
    return State(tuple(shape), DTYPES[fields["dtype"]], format, offset if double else None)


def _divide_up(n: int, k: int) -> int:
    return -(-n // k)  # exact: a damaged file may claim any size


def _listed(values: Iterable[object]) -> str:
    return ", ".join(map(repr, values))


def _error(where: object, name: str, reason: str) -> ValueError:
    return ValueError(f"{where}: tensor {printable(repr(name))} {reason}. Fetch the file or quantize the weight again.")
