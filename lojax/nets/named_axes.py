"""Named axes over which a net reduces, such as the batch axis of a synchronized batch norm."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import jax

from lojax.types import PyTree


def bind_named_axes(f: Callable[..., PyTree]) -> Callable[..., PyTree]:
    """``f`` with every named axis that it reduces over, and that no caller binds, bound to an axis of length one.

    A net with ``lax.pmean(x, "batch")`` in it runs under `jax.vmap` or `jax.shard_map` only. To see how such a net uses
    its weights, one example is enough, and it needs no name from the caller.

    >>> bind_named_axes(lambda x: jax.lax.psum(x, "batch"))(2.0).item()
    2.0
    """

    def bound(*args: object, **kwargs: object) -> PyTree:
        names: list[str] = []
        while True:
            try:
                return _call(f, names, args, kwargs)
            except NameError as error:
                # JAX names the axis in the text alone.
                unbound = re.search(r"unbound axis name: (\w+)", str(error))
                if unbound is None or unbound[1] in names:
                    raise
                names.append(unbound[1])

    return bound


def _call(f: Callable[..., PyTree], names: Sequence[str], args: Sequence[object], kwargs: dict[str, object]) -> PyTree:
    run = lambda: f(*args, **kwargs)
    for name in names:
        run = _under(run, name)
    return run()


def _under(f: Callable[[], PyTree], name: str) -> Callable[[], PyTree]:
    run = jax.vmap(lambda _: f(), axis_name=name, axis_size=1, in_axes=None)
    return lambda: jax.tree.map(lambda y: y[0], run(None))
