"""Adapted weights that the program makes of codes by itself: where the update joins them.

The update belongs to the floating-point weight that the program makes of the codes. So it waits (`Pending`) while the
program casts, unpacks, looks up and scales them, and joins at the first use of the result. Some programs multiply with
the codes themselves and scale the output, which is the same as scaling the weight: there the update waits beside the
product (`Unscaled`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Literal

from lojax.compat import var_type
from lojax.lowrank import code_layout
from lojax.lowrank.attach import attach, resize_probe
from lojax.lowrank.code_layout import Layout, Pending
from lojax.lowrank.dot import Dot
from lojax.lowrank.frozen import FrozenWeight, is_frozen
from lojax.lowrank.value import LowRank
from lojax.rewrite.frozen_chains import Value, constant_weight, evaluate_chained
from lojax.rewrite.primitives import ARITHMETIC, CASTS, MOVES, MULTIPLICATIONS
from lojax.types import Array, Eqn, Path, Shape, Var

CARRIED = ("transpose", "squeeze", "slice", "dynamic_slice", "stop_gradient", "copy")
"""Moves along which the update goes at once, as long as it is on the axes of the codes."""


@dataclasses.dataclass(frozen=True)
class Findings:
    """What probes find out about weights that the program makes of codes.

    Attributes:
        lengths: The lengths of unpacked axes, by the path of the parameter and the number of its axis.
        scaled: The paths of parameters that the program multiplies by a frozen scale.
    """

    lengths: dict[Path, dict[int, int]] = dataclasses.field(default_factory=dict)
    scaled: set[Path] = dataclasses.field(default_factory=set)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Unscaled:
    """The product of an activation with codes that the program has yet to scale, and that with the update.

    Attributes:
        product: The product with the codes.
        update: The product with the update.
    """

    product: Array
    update: Array

    def dense(self) -> Array:
        """The sum."""
        return self.product + self.update.astype(self.product.dtype)


def is_unsettled(value: Value) -> bool:
    """Whether an update waits in or beside ``value``."""
    return isinstance(value, Unscaled) or (isinstance(value, LowRank) and value.pending is not None)


def is_constant(eqn: Eqn) -> bool:
    """Whether an equation makes an array of numbers in the program alone, such as the shifts that unpack codes."""
    return eqn.primitive.name in ("iota", "broadcast_in_dim") and all(isinstance(v, Literal) for v in eqn.invars)


def evaluate_unsettled(
    eqn: Eqn, operands: Sequence[Value], bind: Callable[..., Array], frozen_factor: Callable[[Var], FrozenWeight | None]
) -> Value | None:
    """The result of a step from codes to their values, with the update still waiting; None for any other equation.

    Args:
        eqn: The equation.
        operands: The values of its operands.
        bind: Computes it from arrays.
        frozen_factor: The frozen factor of a variable that is a product, or None.
    """
    if any(isinstance(v, Unscaled) for v in operands):
        return _evaluate_unscaled(eqn, operands, bind, frozen_factor)
    adapted = [v for v in operands if isinstance(v, LowRank)]
    first = adapted[0]
    if first.pending is None or any(not _same_update(first, v) for v in adapted):
        return None
    if first.pending.layout is None and eqn.primitive.name in CARRIED:
        return None
    layout = _next_layout(eqn, first.pending.layout or code_layout.initial_layout(first.shape), first.shape, operands)
    weight = None
    if layout is not None:
        weight = evaluate_chained(eqn, [v.frozen if isinstance(v, LowRank) else v for v in operands])
    if weight is None or layout is None:
        return None
    is_initial = layout == code_layout.initial_layout(weight.shape)
    pending = Pending(None if is_initial else layout, first.pending.scaled or _scales(eqn, operands))
    return dataclasses.replace(first, frozen=weight, pending=pending)


def _same_update(value: LowRank, other: LowRank) -> bool:
    """Whether two values were made of the same codes, and the update is on the same axes of both."""
    axes, other_axes = ([x.dims for x in v.named_arrays] for v in (value, other))
    layout, other_layout = (v.pending and v.pending.layout for v in (value, other))
    return (value.path, axes, layout) == (other.path, other_axes, other_layout) and value.shape == other.shape


def _scales(eqn: Eqn, operands: Sequence[Value]) -> bool:
    """Whether an equation multiplies codes by a frozen scale."""
    return eqn.primitive.name in ("mul", "div") and any(_is_stored(v) for v in operands)


def _is_stored(value: Value) -> bool:
    """Whether ``value`` is made of frozen leaves, and not of numbers in the program alone."""
    return is_frozen(value) and bool(jax.tree.leaves(value))


def with_constants(eqn: Eqn, operands: Sequence[Value]) -> list[Value]:
    """The operands of a call, with numbers as frozen weights: its body may use them on codes."""
    if not any(isinstance(v, LowRank) and v.pending for v in operands):
        return list(operands)
    return [
        constant_weight(v, var_type(var).dtype) if isinstance(var, Literal) else v
        for var, v in zip(eqn.invars, operands, strict=True)
    ]


def _next_layout(eqn: Eqn, layout: Layout, shape: Shape, operands: Sequence[Value]) -> Layout | None:
    """The layout of the result of an equation; None if it is none of the steps that are followed."""
    name, p, new = eqn.primitive.name, eqn.params, var_type(eqn.outvars[0]).shape
    if name in (*CASTS, *ARITHMETIC):
        if len(new) == len(shape) + 1:  # a bitcast to narrower codes adds an axis of those in each
            return (*layout, ((None, new[-1], 1),))
        return code_layout.broadcast(layout, shape, new, range(len(shape))) if len(new) == len(shape) else None
    if name == "transpose":
        return tuple(layout[d] for d in p["permutation"])
    if name == "squeeze":
        removed = {int(d) % len(shape) for d in p["dimensions"]}
        return tuple(axis for d, axis in enumerate(layout) if d not in removed)
    if name == "reshape" and p["dimensions"] is None:
        return code_layout.reshape(layout, new)
    if name == "broadcast_in_dim" and len(operands) == 1:
        return code_layout.broadcast(layout, shape, new, [int(d) for d in p["broadcast_dimensions"]])
    if name == "slice" and not any(p["start_indices"]) and p["strides"] is None:
        return code_layout.take_first(layout, new, shape)
    if name in ("concatenate", "stack") and all(isinstance(v, LowRank) for v in operands):
        join = code_layout.concatenate if name == "concatenate" else code_layout.stack
        return join(layout, p["dimension" if name == "concatenate" else "axis"], len(operands))
    return _looked_up(eqn, layout) if name == "gather" and isinstance(operands[1], LowRank) else None


def _looked_up(eqn: Eqn, layout: Layout) -> Layout | None:
    """The layout of what codes are looked up in a code book of one axis; None for another look-up."""
    if len(var_type(eqn.invars[0]).shape) != 1 or tuple(eqn.params["slice_sizes"]) != (1,):
        return None
    codes = iter(layout[:-1])  # the last axis numbers the axes of the book
    offset = eqn.params["dimension_numbers"].offset_dims
    return tuple(() if d in offset else next(codes) for d in range(len(var_type(eqn.outvars[0]).shape)))


# --- uses of the result ---


def settle(
    eqn: Eqn, value: Value, others: Sequence[Value], findings: Findings, *, straight_through: bool = False
) -> Value:
    """``value`` with its update on the axes that it has now, and added unless the equation only moves it.

    Args:
        eqn: The equation that uses the value.
        value: Any operand of it.
        others: All operands.
        findings: Where it is noted what a probe finds.
        straight_through: Whether the user's derivative passes an activation that the program quantizes.

    Raises:
        ValueError: The value is still codes, to which no update can be added, or mixes the axes of the weight.
    """
    if isinstance(value, Unscaled):
        return value.dense()
    if not isinstance(value, LowRank) or value.pending is None:
        return value
    name = eqn.primitive.name
    if name in CARRIED and value.pending.layout is None:
        return value
    value = on_own_axes(value, repr(name), findings, is_last=name not in CARRIED)
    if name in CARRIED:
        return value
    assert value.pending is not None
    if name in MULTIPLICATIONS and name != "gather" and not value.pending.scaled:
        activations = [v for v in others if v is not value and not isinstance(v, LowRank)]
        passes = straight_through and name == "dot_general"
        if passes or all(jnp.issubdtype(v.dtype, jnp.floating) for v in activations[:1]):
            return value
        raise ValueError(
            f"{value.path}: the net multiplies the codes ({value.frozen.dtype}) with an activation that it quantized "
            f"to {activations[0].dtype}, in {name!r} before they become floating-point numbers, so there is no weight "
            "that an update could be added to, and no gradient passes the activation. Quantize the weights alone "
            "(act_qtype=None in qwix)."
        )
    if jnp.issubdtype(value.frozen.dtype, jnp.floating):
        return dataclasses.replace(value, pending=None)
    if value.probe:
        return value
    raise ValueError(
        f"{value.path}: holds codes of dtype {value.frozen.dtype}, and the net uses them in {name!r} "
        "before they become floating-point numbers, so there is nothing that an update could be added to. Take the "
        "weight out of targets, or let the net dequantize it first."
    )


def on_own_axes(value: Value, use: str, findings: Findings, *, is_last: bool = False) -> Value:
    """``value``, its waiting update on the axes that it has now.

    Args:
        value: Any value.
        use: What uses it, for errors.
        findings: Where it is noted what a probe finds.
        is_last: Whether codes are unpacked by now.

    Raises:
        ValueError: The value mixes the axes of the weight, or is not of the shape that the adapter was made for.
    """
    if isinstance(value, Unscaled):
        return value.dense()
    if not isinstance(value, LowRank) or value.pending is None:
        return value
    pending = value.pending
    layout = pending.layout or code_layout.initial_layout(value.shape)
    if value.probe:
        value, found = resize_probe(value, code_layout.lengths(layout, value.shape))
        findings.lengths.setdefault(value.path, {}).update(found)
        findings.scaled.update([value.path] if pending.scaled else [])
    elif pending.layout is None and not is_last:
        return value
    attached = attach(value, layout)
    if attached is None:
        raise ValueError(
            f"{value.path}: the net uses what it makes of the codes in {use} in the shape {value.shape}, in which the "
            "axes of the weight are mixed, or not as long as those of the adapter. Take the weight out of targets, or "
            "let the net bring its values back into the shape of the weight first."
        )
    return dataclasses.replace(attached, pending=Pending(None, pending.scaled))


def _evaluate_unscaled(
    eqn: Eqn, operands: Sequence[Value], bind: Callable[..., Array], frozen_factor: Callable[[Var], FrozenWeight | None]
) -> Value | None:
    """A step between a product with codes and its scaling; None for another equation."""
    name = eqn.primitive.name
    position = next(i for i, v in enumerate(operands) if isinstance(v, Unscaled))
    value: Any = operands[position]

    def of(part: Array, others: Sequence[Value] = operands) -> Array:
        return bind(*others[:position], part, *others[position + 1 :])

    if name == "convert_element_type" and jnp.issubdtype(eqn.params["new_dtype"], jnp.floating):
        return Unscaled(of(value.product), value.update)
    if name in MOVES and len(operands) == 1:
        return Unscaled(of(value.product), of(value.update.astype(value.product.dtype)))
    if name == "mul" or (name == "div" and position == 0):
        (other,) = (v for i, v in enumerate(operands) if i != position)
        if _is_stored(other):  # the scale, after which the sum is the product with the weight
            return Unscaled(of(value.product, [other.dense()] * 2), value.update).dense()
        other = other.dense() if is_frozen(other) else other
        scale = frozen_factor(eqn.invars[1 - position])
        if scale is not None:  # the other is the scale times one of the activation, and the latter is for the update
            relative = other / scale.dense() if name == "mul" else scale.dense() / other
            return Unscaled(of(value.product), value.update * relative).dense()
        if not isinstance(other, (LowRank, Unscaled)):
            return Unscaled(of(value.product), of(value.update.astype(value.product.dtype)))
    return None


def in_floats(product: Any, eqn: Eqn) -> Any:
    """A product for the update alone, where the program multiplies codes with an activation that it quantized."""
    if not isinstance(product, Dot) or jnp.issubdtype(product.x.dtype, jnp.floating):
        return product
    shape = var_type(eqn.outvars[0]).shape
    settings: dict[str, Any] = {"factor_input": None, "precision": None, "dtype": jnp.float32}
    return dataclasses.replace(
        product, x=product.x.astype(jnp.float32), bind=lambda w, x: jnp.zeros(shape, jnp.float32), **settings
    )
