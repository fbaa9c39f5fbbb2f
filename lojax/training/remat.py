"""Policies for `jax.checkpoint`: what a block keeps of its products with adapted weights.

Letters: T tokens, n out, r rank; K bytes a number of the activation takes.

| policy                                             | kept of an adapted product    | computed again        |
|----------------------------------------------------|-------------------------------|-----------------------|
| none (`nothing_saveable`)                          | nothing                       | all of it             |
| `dots_saveable`, `dots_with_no_batch_dims_saveable`| x W0: TnK, and x A: TrK       | the update: 2Tr(m + n)|
| `save_products()`                                  | the sum: TnK                  | nothing but x A       |

The two policies of JAX keep for an adapted net what they keep for the frozen one, and the T·r numbers; it needs
nothing from here. `save_products` keeps the sum, and of the rest of the block nothing: no attention scores and
no product with a weight that is not adapted.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from lojax.lowrank.factored import PRODUCT

Policy = Callable[..., Any]


def save_products(*names: str) -> Policy:
    """A policy that keeps every product with an adapted weight, update included, once and in its own dtype.

    Args:
        *names: Further values to keep, by the names that `jax.ad_checkpoint.checkpoint_name` gave them in the net.

    Returns:
        A policy for `jax.checkpoint`, `flax.linen.remat`, `flax.nnx.remat` or `haiku.remat`.

    >>> import jax.numpy as jnp, lojax
    >>> block = jax.checkpoint(lambda p, x: jnp.tanh(x @ p["kernel"]), policy=save_products())
    >>> model = lojax.wrap(block, "kernel", rank=2)
    >>> frozen, lora = model.init(jax.random.key(0), {"kernel": jnp.ones((4, 3))}, jnp.ones((5, 4)))
    >>> model.apply(frozen, lora, jnp.ones((5, 4))).shape
    (5, 3)
    """
    return jax.checkpoint_policies.save_only_these_names(PRODUCT, *names)


def offload_products(*names: str, source: str = "device", destination: str = "pinned_host") -> Policy:
    """`save_products`, kept in the memory of the host until the backward pass.

    Args:
        *names: As in `save_products`; they are moved too.
        source: The kind of memory the values are in.
        destination: The kind of memory they wait in.

    Returns:
        A policy, as `save_products` does. It needs a device that has both kinds of memory.
    """
    return jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=[PRODUCT, *names],
        offload_src=source,
        offload_dst=destination,
    )
