"""How an adapter starts. An initialization maps a key and a `Site` to ``(a, b, weight)``: both factors, and the frozen
weight that goes with them.

`INITIALIZERS` has them by name. Those that draw ``a`` at random set ``b`` to zero; those that factorize the weight
take what the update starts with out of it. Either way the net starts exactly at the pretrained model, or, where the
weight is then quantized, at the quantized weight plus the update.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
import re
import zlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from lojax.adapters.adapter import array_shapes
from lojax.adapters.axes import Axes, size
from lojax.adapters.leaves import check_finite
from lojax.adapters.loftq import STEPS, alternate, share_singular_values, truncated_svd
from lojax.adapters.matrices import as_matrices, subtract_update, zero_above_rank
from lojax.quantized.formats import Format
from lojax.quantized.quantized import Quantized, dense
from lojax.text import spec, suggest
from lojax.types import Array, Dtype, Key, Leaf, Path, Shape

OVERSAMPLES = 10
"""Columns beyond the rank that the randomized SVD works with (Halko et al. 2011, §4.2: 5 to 10 are enough)."""


DrawA = Callable[..., Array]
"""``(key, shape, dtype, *, fan_in, rank) -> a``: what a user's own ``init=`` function is."""


@dataclasses.dataclass(frozen=True)
class Site:
    """A weight to adapt: all that an initialization may look at.

    Attributes:
        path: Where it is, for errors.
        weight: The weight itself, out of its box.
        axes: The role of each of its axes.
        ranks: The rank of each entry of its stack; one number for a weight without a stack.
        requested_rank: The largest rank that was asked for; above that of ``ranks`` where it was lowered.
        scale: The factor on the update, or one for each entry of the stack.
        dtype: The dtype of the factors.
        init: The initialization that was asked for, for errors.
        format: How the weight will be quantized; None where it stays as it is.
    """

    path: Path
    weight: Array
    axes: Axes
    ranks: tuple[int, ...]
    requested_rank: int
    scale: float | tuple[float, ...]
    dtype: Dtype
    init: str | DrawA | None
    format: Format | None = None

    @property
    def rank(self) -> int:
        """The largest rank of the stack, ``r``."""
        return max(self.ranks)

    @property
    def uneven(self) -> bool:
        """Whether the ranks differ."""
        return len(set(self.ranks)) > 1

    @property
    def one_scale(self) -> float:
        """The scale, where it is the same for every entry of the stack."""
        assert not isinstance(self.scale, tuple)  # a rule gives equal ranks equal scales
        return self.scale

    @property
    def shapes(self) -> dict[str, Shape]:
        """The shapes of the arrays of the adapter, by field."""
        return array_shapes(self.axes, self.weight.shape, self.rank)


Initializer = Callable[[Key, Site], tuple[Array, Array, Leaf]]
"""``(key, site) -> (a, b, weight)``. The key is consumed."""
Factorize = Callable[[Key, Array, Site], tuple[Array, Array]]
"""``(key, w [m, n], site) -> (a [m, r], b [r, n])`` for one matrix, in the dtype of ``w``."""


# --- a random a, and b = 0 ---


def kaiming(key: Key, shape: Shape, dtype: Dtype, *, fan_in: int, rank: int) -> Array:
    """Uniform in ``±1/sqrt(fan_in)``: Kaiming uniform with slope sqrt(5), PEFT's default for A.

    He et al. 2015, arXiv:1502.01852, eq. 14, with gain ``sqrt(2 / (1 + 5))``.

    Args:
        key: Consumed.
        shape: ``[*stack, *in, r]``.
        dtype: The dtype of the result.
        fan_in: The product of the in axes, ``m``.
        rank: Unused.
    """
    del rank
    bound = 1 / math.sqrt(fan_in)
    return jax.random.uniform(key, shape, dtype, -bound, bound)


def gaussian(key: Key, shape: Shape, dtype: Dtype, *, fan_in: int, rank: int) -> Array:
    """Normal with standard deviation ``1/r``: PEFT's ``init_lora_weights="gaussian"``.

    Args:
        key: Consumed.
        shape: ``[*stack, *in, r]``.
        dtype: The dtype of the result.
        fan_in: Unused.
        rank: The rank ``r``.
    """
    del fan_in
    return jax.random.normal(key, shape, dtype) / rank


def initialize_at_zero(draw: DrawA) -> Initializer:
    """The initialization with ``a`` from ``draw`` and ``b = 0``, so that the update is zero."""

    def initialize(key: Key, site: Site) -> tuple[Array, Array, Leaf]:
        fan_in = size(site.axes, site.weight.shape, "in")
        a = draw(key, site.shapes["a"], site.dtype, fan_in=fan_in, rank=site.rank)
        _check_drawn(a, site)
        if site.uneven:
            a = zero_above_rank(a, site.ranks, site.axes)
        return a, jnp.zeros(site.shapes["b"], site.dtype), site.weight

    return initialize


def _check_drawn(a: object, site: Site) -> None:
    """Raises unless a user's function returned what it was asked for: a wrong shape would fail only in `apply`."""
    expected = jax.ShapeDtypeStruct(site.shapes["a"], site.dtype)
    is_array = isinstance(a, (jax.Array, np.ndarray))
    if not is_array or (a.shape, a.dtype) != (expected.shape, expected.dtype):
        got = spec(a) if is_array else f"a {type(a).__name__}"
        raise ValueError(
            f"{site.path}: init={_name(site.init)} returned {got}; expected {spec(expected)}. Return an array of the "
            "shape and dtype that the function is given: init(key, shape, dtype, *, fan_in, rank)."
        )


def _name(init: object) -> str:
    return getattr(init, "__name__", repr(init))


# --- both factors from the weight ---


def orthogonal(key: Key, w: Array, site: Site) -> tuple[Array, Array]:
    """Random factors, both nonzero, with ``a @ b = 0``: PEFT's ``init_lora_weights="orthogonal"``.

    One half of the rows of a random orthogonal ``[r, r]`` matrix is used for ``a``, the other half for ``b``, so the
    rank must be even.
    """
    rank = site.rank
    if rank % 2:
        even = rank + 1 if rank < min(w.shape) else rank - 1
        raise ValueError(f'{site.path}: init="orthogonal" needs an even rank, got {rank}. Choose {even}, or "kaiming".')
    basis_key, a_key, b_key = jax.random.split(key, 3)
    basis = jnp.linalg.qr(jax.random.normal(basis_key, (rank, rank), w.dtype))[0]
    a = jax.random.normal(a_key, (w.shape[0], rank // 2), w.dtype) @ basis[0::2] / 10
    b = basis[1::2].T @ jax.random.normal(b_key, (rank // 2, w.shape[1]), w.dtype) / 10
    return a, b


def pissa(key: Key, w: Array, site: Site) -> tuple[Array, Array]:
    """The largest singular values and vectors of the weight (PiSSA, Meng et al. 2024, arXiv:2404.02948, eq. 2 to 4)."""
    del key
    return truncated_svd(w, site.rank, site.one_scale)


def fast_pissa(key: Key, w: Array, site: Site, *, steps: int) -> tuple[Array, Array]:
    """PiSSA by a randomized SVD with ``steps`` steps of subspace iteration (Halko et al. 2011, arXiv:0909.4061).

    PEFT's ``"pissa_niter_<steps>"``; the weight is only multiplied, with ``rank`` columns and a few more.
    """
    width = min(site.rank + OVERSAMPLES, *w.shape)
    basis = jnp.linalg.qr(w @ jax.random.normal(key, (w.shape[1], width), w.dtype))[0]
    for _ in range(steps):
        # A QR after each half step: the plain power (w w^T)^q would lose all but the largest direction to rounding.
        basis = jnp.linalg.qr(w @ jnp.linalg.qr(w.T @ basis)[0])[0]
    u, s, vt = jnp.linalg.svd(basis.T @ w, full_matrices=False)
    return share_singular_values((basis @ u)[:, : site.rank], s[: site.rank], vt[: site.rank], site.one_scale)


def milora(key: Key, w: Array, site: Site) -> tuple[Array, Array]:
    """The smallest singular values and vectors of the weight (MiLoRA, Wang et al. 2024, arXiv:2406.09044, eq. 4)."""
    del key
    u, s, vt = jnp.linalg.svd(w, full_matrices=False)
    return share_singular_values(u[:, -site.rank :], s[-site.rank :], vt[-site.rank :], site.one_scale)


def olora(key: Key, w: Array, site: Site) -> tuple[Array, Array]:
    """The start of the QR decomposition of the weight's transpose (OLoRA, Büyükakyüz 2024, arXiv:2406.01775)."""
    del key
    q, r = jnp.linalg.qr(w.T)
    return r[: site.rank].T, q[:, : site.rank].T


def initialize_from_weight(factorize: Factorize, *, subtract: bool = True) -> Initializer:
    """The initialization with both factors from ``factorize``, for every matrix of a stack.

    Args:
        factorize: For one matrix.
        subtract: Whether ``scale * a @ b`` is nonzero, and so is taken out of the frozen weight.
    """

    def initialize(key: Key, site: Site) -> tuple[Array, Array, Leaf]:
        _check_even(site)
        if subtract and isinstance(site.weight, Quantized):
            raise ValueError(
                f"{site.path}: init={site.init!r} takes its start out of the weight, and this one is quantized: "
                f'{site.weight}. Use init="kaiming" or another start from zero, or init on the weights before '
                f'lojax.quantize, with base="{site.weight.kind}" to quantize what is left of each.'
            )
        if subtract:
            remedy = 'Repair the weight, or use init="kaiming".'
            check_finite(site.path, site.weight, f"init={site.init!r} factorizes it", remedy)
        matrices = as_matrices(dense(site.weight), site.axes)
        keys = jax.random.split(key, matrices.shape[0])
        with jax.default_matmul_precision("highest"):
            a, b = jax.vmap(lambda key, w: factorize(key, w, site))(keys, matrices)
        a = a.reshape(site.shapes["a"]).astype(site.dtype)
        b = b.reshape(site.shapes["b"]).astype(site.dtype)
        # Subtracted after the cast: the frozen weight makes up for the rounding of the stored factors.
        if not subtract:
            return a, b, site.weight
        return a, b, subtract_update(site.weight, a, b, site.one_scale, site.axes)

    return initialize


def loftq(steps: int) -> Initializer:
    """The initialization with a quantized weight and the factors that make up for it, see `lojax.adapters.loftq`."""

    def initialize(key: Key, site: Site) -> tuple[Array, Array, Leaf]:
        del key
        assert site.format is not None  # a rule with this start has a base
        _check_even(site)
        with jax.default_matmul_precision("highest"):
            a, b, weight = alternate(
                jnp.asarray(site.weight),
                steps,
                format=site.format,
                axes=site.axes,
                rank=site.rank,
                scale=site.one_scale,
                dtype=jnp.dtype(site.dtype),
            )
        return a.reshape(site.shapes["a"]), b.reshape(site.shapes["b"]), weight

    return initialize


def _check_even(site: Site) -> None:
    if site.uneven or isinstance(site.scale, tuple):
        raise ValueError(
            f"{site.path}: init={site.init!r} gives every entry of a stack the same rank, got {site.ranks}."
        )


# --- by name ---


INITIALIZERS: dict[str, Initializer] = {
    "kaiming": initialize_at_zero(kaiming),
    "gaussian": initialize_at_zero(gaussian),
    "orthogonal": initialize_from_weight(orthogonal, subtract=False),
    "pissa": initialize_from_weight(pissa),
    "milora": initialize_from_weight(milora),
    "olora": initialize_from_weight(olora),
    "loftq": loftq(STEPS),
}
"""The initializations by name, besides ``"pissa_niter_<steps>"`` and ``"loftq_niter_<steps>"``."""

STARTS_AT_ZERO = ("kaiming", "gaussian")
"""Those that need no more of a weight than its shape."""

FROM_DATA = {
    "eva": "lora = lojax.eva(model.apply, frozen, lora, batches)",
    "lora_ga": "frozen, lora = lojax.lora_ga(loss, frozen, lora, batches)",
}
"""Initializations that need data, and what gives them (see `lojax.training`)."""


def initializer(init: str | DrawA | None) -> Initializer:
    """The initialization called ``init``, or the one that draws ``a`` with ``init`` where that is a function.

    Raises:
        TypeError: It is a function of other arguments.
        ValueError: There is no initialization of this name.
    """
    if callable(init):
        _check_signature(init)
        return initialize_at_zero(init)
    name = str(init)
    if call := FROM_DATA.get(name.lower()):
        raise ValueError(f"init={init!r} needs batches: init with another start, then call {call}.")
    if steps := re.fullmatch(r"pissa_niter_(\d{1,3})", name):
        return initialize_from_weight(functools.partial(fast_pissa, steps=int(steps[1])))
    if steps := re.fullmatch(r"loftq_niter_([1-9]\d{0,2})", name):
        return loftq(int(steps[1]))
    if name not in INITIALIZERS:
        names = sorted({*INITIALIZERS, "pissa_niter_4", "loftq_niter_1"})
        raise ValueError(f"init={init!r} is unknown; expected one of {names}.{suggest(init, names)}")
    return INITIALIZERS[name]


def _check_signature(init: DrawA) -> None:
    try:
        signature = inspect.signature(init)
    except (TypeError, ValueError):  # written in C: it may well take them
        return
    try:
        signature.bind("key", "shape", "dtype", fan_in=1, rank=1)
    except TypeError as error:
        raise TypeError(
            f"init={_name(init)} has the signature {signature}: {error}. Expected a function (key, shape, dtype, *, "
            "fan_in, rank) -> array, such as "
            "init=lambda key, shape, dtype, *, fan_in, rank: jax.random.normal(key, shape, dtype)."
        ) from None


def key_for(key: Key, path: Path) -> Key:
    """The key of the weight at ``path``: the same whatever else is adapted, and in any order."""
    # Two checksums of 32 bits each, since fold_in takes 32 bits: one alone would let two paths of a large net collide.
    data = path.encode()
    return jax.random.fold_in(jax.random.fold_in(key, zlib.crc32(data)), zlib.adler32(data))
