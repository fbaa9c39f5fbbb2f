"""A parameter saved in full, as torch has it and as a part of its leaf."""

from __future__ import annotations

import math

import numpy as np

from lojax.peft.name_map import TorchParameter
from lojax.types import Shape


def _order(parameter: TorchParameter) -> tuple[int, ...]:
    """The order in which torch has a parameter's own axes."""
    own = parameter.own_axes()
    if parameter.kind == "param" or len(own) < 2:
        return tuple(range(len(own)))
    experts, ins, outs = ([own.index(i) for i in parameter.own_axes(role)] for role in ("expert", "in", "out"))
    if parameter.kind == "conv":
        return (*outs, ins[-1], *ins[:-1])
    return (*experts, *ins, *outs) if _is_in_first(parameter) else (*experts, *outs, *ins)


def _is_in_first(parameter: TorchParameter) -> bool:
    return parameter.kind in ("conv1d", "embedding", "experts_t")


def full_shape(parameter: TorchParameter) -> Shape:
    """The shape that torch has."""
    if parameter.kind in ("param", "conv") or parameter.axes is None:
        own = parameter.own_axes()
        return tuple(parameter.shape[own[k]] for k in _order(parameter))
    experts, ins, outs = (parameter.sizes(role) for role in ("expert", "in", "out"))
    matrix = [math.prod(group) for group in (ins, outs) if group]
    return (*experts, *(matrix if _is_in_first(parameter) else matrix[::-1]))


def full_index(parameter: TorchParameter) -> tuple[int | slice, ...]:
    """The index of the parameter in its leaf."""
    return parameter.at(range(len(parameter.shape)))


def full_to_torch(parameter: TorchParameter, leaf: np.ndarray) -> np.ndarray:
    """The torch parameter out of its whole leaf."""
    return leaf[full_index(parameter)].transpose(_order(parameter)).reshape(full_shape(parameter))


def full_from_torch(parameter: TorchParameter, tensor: np.ndarray) -> np.ndarray:
    """A parameter's part of its leaf, from the torch tensor, of checked shape."""
    order = _order(parameter)
    part_shape = np.empty(parameter.shape, np.bool_)[full_index(parameter)].shape
    return tensor.reshape([part_shape[k] for k in order]).transpose(np.argsort(order))
