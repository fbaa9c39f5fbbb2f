"""Programs that use a weight in every way the engine knows. A new way is a new row of `PROGRAMS`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, PartitionSpec


def normal(*shape: int, seed: int = 0, dtype: Any = jnp.float32) -> jax.Array:
    """Numbers that depend on the shape and the seed alone."""
    return jnp.asarray(np.random.default_rng((seed, *shape)).normal(size=shape), dtype)


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """A function of params and inputs, with what lojax must find out about it.

    Attributes:
        f: ``f(params, *inputs)``.
        weights: The shape of each parameter; all are adapted.
        inputs: The other arguments.
        axes: The axes that must be inferred for ``w``, one letter each: in, out, stack.
        materialized: How many uses have no factored form.
        uses: How many uses there are in all.
    """

    f: Callable[..., Any]
    weights: dict[str, tuple[int, ...]]
    inputs: tuple[Any, ...]
    axes: str
    materialized: int = 0
    uses: int = 1

    @property
    def params(self) -> dict[str, jax.Array]:
        return {
            name: normal(*shape, seed=1) / np.sqrt(shape[-2]).astype(np.float32) for name, shape in self.weights.items()
        }


X = normal(5, 8)
IMAGE = normal(2, 9, 9, 4)
NHWC = ("NHWC", "HWIO", "NHWC")


def _scan(body: Callable[..., Any], init: Any, xs: Any, **settings: Any) -> Any:
    return lax.scan(lambda c, x: (body(c, x), None), init, xs, **settings)[0]


@jax.custom_jvp
def doubled_jvp(x: Any, w: Any, n: Any) -> Any:
    """Its derivative is twice the true one: whoever ignores the rule gets other gradients."""
    return jnp.tanh(x @ w) * n


doubled_jvp.defjvp(lambda p, t: (doubled_jvp(*p), 2 * (t[0] @ p[1] + p[0] @ t[1])))


@jax.custom_vjp
def tripled_vjp(x: Any, w: Any, n: Any) -> Any:
    """Its cotangents are three and two times those of a plain product."""
    return jnp.tanh(x @ w) * n


tripled_vjp.defvjp(
    lambda x, w, n: (tripled_vjp(x, w, n), (x, w)),
    lambda r, g: (3 * g @ r[1].T, 2 * r[0].T @ g, None),
)


def _shard_map(p: Any, x: Any) -> Any:
    mesh = jax.make_mesh((1, 4), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    spec = PartitionSpec

    def rows(x: Any, w: Any) -> Any:
        return lax.psum(x @ w, "tensor")

    def gathered(x: Any, w: Any) -> Any:
        return x @ lax.all_gather(w, "tensor", axis=0, tiled=True)

    a = jax.shard_map(rows, mesh=mesh, in_specs=(spec("data", "tensor"), spec("tensor")), out_specs=spec("data"))
    b = jax.shard_map(
        gathered, mesh=mesh, in_specs=(spec("data"), spec("tensor")), out_specs=spec("data"), check_vma=False
    )
    return a(x, p["w"]) + b(x, p["w"])


def _attention(p: Any, x: Any) -> Any:
    q, k, v = (jnp.einsum("td,dhk->thk", x, p[name]) for name in "wkv")
    scores = jax.nn.softmax(jnp.einsum("shk,thk->hst", q, k) / 2)
    return jnp.einsum("hst,thk,hkd->sd", scores, v, p["o"])


PROGRAMS: dict[str, Program] = {
    # products
    "dense": Program(lambda p, x: x @ p["w"], {"w": (8, 6)}, (X,), "io"),
    "dense_transposed": Program(lambda p, x: x @ p["w"].T, {"w": (6, 8)}, (X,), "oi"),
    "weight_on_left": Program(lambda p, x: p["w"] @ x.T, {"w": (6, 8)}, (X,), "oi"),
    "weight_on_left_batched": Program(
        lambda p, x: jnp.einsum("hkd,thd->htk", p["w"], x.reshape(5, 2, 4)), {"w": (2, 6, 4)}, (X,), "soi"
    ),
    "heads_out": Program(lambda p, x: jnp.einsum("td,dhk->thk", x, p["w"]), {"w": (8, 2, 3)}, (X,), "ioo"),
    "heads_in": Program(
        lambda p, x: jnp.einsum("thk,hkd->td", x.reshape(5, 2, 4), p["w"]), {"w": (2, 4, 6)}, (X,), "iio"
    ),
    "batch_axis_of_out": Program(
        lambda p, x: jnp.einsum("thd,dhk->thk", x.reshape(5, 2, 4), p["w"]), {"w": (4, 2, 6)}, (X,), "iso"
    ),
    "attention": Program(
        _attention, {"w": (8, 2, 4), "k": (8, 2, 4), "v": (8, 2, 4), "o": (2, 4, 8)}, (X,), "ioo", uses=4
    ),
    "embedding": Program(lambda p, i: p["w"][i], {"w": (11, 8)}, (jnp.arange(6).reshape(2, 3),), "io"),
    "embedding_scalar": Program(
        lambda p, i: p["w"][i], {"w": (11, 8)}, (jnp.asarray(3),), "io", uses=1, materialized=1
    ),
    "embedding_tied": Program(
        lambda p, i: jnp.tanh(p["w"][i]) @ p["w"].T, {"w": (11, 8)}, (jnp.arange(4),), "io", uses=2
    ),
    "embedding_of_layer": Program(lambda p, i: p["w"][1, i], {"w": (3, 11, 8)}, (jnp.arange(4),), "sio"),
    "embedding_of_each": Program(
        lambda p, i: jax.vmap(lambda w, i: w[i])(p["w"], i),
        {"w": (3, 11, 8)},
        (jnp.arange(12).reshape(3, 4) % 11,),
        "sio",
    ),
    "embedding_of_each_last": Program(
        lambda p, i: jax.vmap(lambda w, i: w[:, i], (2, 1), -1)(p["w"], i),
        {"w": (11, 8, 3)},
        (jnp.arange(12).reshape(4, 3) % 8,),
        "ois",
    ),
    "embedding_of_each_out_of_bounds": Program(
        lambda p, i: jax.vmap(lambda w, i: w.at[i].get(mode="fill", fill_value=2.0))(p["w"], i),
        {"w": (3, 11, 8)},
        (jnp.arange(12).reshape(3, 4) * 2,),
        "sio",
    ),
    "embedding_filled": Program(
        lambda p, i: jnp.take(p["w"], i, axis=0, mode="fill", fill_value=2.0),
        {"w": (11, 8)},
        (jnp.arange(6) * 3,),
        "io",
    ),
    "embedding_of_unit_axis_filled": Program(
        lambda p, i: X @ jnp.take(p["w"][:, None], i, axis=1, mode="fill", fill_value=2.0)[:, 1],
        {"w": (8, 6)},
        (jnp.arange(3),),
        "io",
    ),
    "one_entry_taken_often": Program(
        lambda p, i: jnp.take(p["w"][1:2].T, i, axis=1, mode="clip") @ X, {"w": (8, 6)}, (jnp.arange(5),), "io"
    ),
    "layer_of_each": Program(
        lambda p, i: jax.vmap(lambda w, i, x: x @ w[i])(p["w"], i, normal(2, 5, 8)),
        {"w": (2, 3, 8, 6)},
        (jnp.asarray([2, 0]),),
        "ssio",
    ),
    "embedding_by_vmapped_cond": Program(
        lambda p, i: jax.vmap(lambda i: lax.cond(i[0] > 1, lambda i, w: w[i], lambda i, w: jnp.sin(w[i]), i, p["w"]))(
            i
        ),
        {"w": (11, 8)},
        (jnp.arange(6).reshape(2, 3),),
        "io",
        uses=2,
    ),
    "layers_by_vmapped_cond": Program(
        lambda p, x: jax.vmap(
            lambda x: lax.cond(
                x.sum() > 0,
                lambda x, w: jnp.einsum("xi,sio->sxo", x, w[jnp.asarray([2, 0])]),
                lambda x, w: jnp.sin(jnp.einsum("xi,sio->sxo", x, w[jnp.asarray([1, 1])])),
                x,
                p["w"],
            )
        )(normal(2, 5, 8)),
        {"w": (3, 8, 6)},
        (X,),
        "oio",
        uses=2,
    ),
    "conv": Program(
        lambda p, x: lax.conv_general_dilated(x, p["w"], (2, 1), "SAME", rhs_dilation=(1, 2), dimension_numbers=NHWC),
        {"w": (3, 3, 4, 6)},
        (IMAGE,),
        "iiio",
    ),
    "conv_to_other_layout": Program(
        lambda p, x: lax.conv_general_dilated(
            x, p["w"], (1, 1), "SAME", feature_group_count=2, dimension_numbers=("NHWC", "HWIO", "NCHW")
        ),
        {"w": (3, 3, 2, 6)},
        (IMAGE,),
        "iiio",
    ),
    "conv_of_each": Program(
        lambda p, x: jax.vmap(
            lambda x, w: lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=NHWC), (0, None)
        )(x.reshape(2, 1, 9, 9, 4), p["w"]),
        {"w": (3, 3, 4, 6)},
        (IMAGE,),
        "iiio",
    ),
    "conv_by_vmapped_cond": Program(
        lambda p, x: jax.vmap(
            lambda x: lax.cond(
                x.sum() > 0,
                lambda x, w: lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=NHWC),
                lambda x, w: jnp.sin(lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=NHWC)),
                x,
                p["w"],
            )
        )(x.reshape(2, 1, 9, 9, 4)),
        {"w": (3, 3, 4, 6)},
        (IMAGE,),
        "iiio",
        uses=2,
    ),
    "conv_grouped": Program(
        lambda p, x: lax.conv_general_dilated(
            x, p["w"], (1, 1), "VALID", feature_group_count=2, dimension_numbers=NHWC
        ),
        {"w": (3, 3, 2, 6)},
        (IMAGE,),
        "iiio",
    ),
    "conv_depthwise": Program(
        lambda p, x: lax.conv_general_dilated(
            x, p["w"], (1, 1), "VALID", feature_group_count=4, dimension_numbers=NHWC
        ),
        {"w": (3, 3, 1, 8)},
        (IMAGE,),
        "iiio",
    ),
    "conv_transposed": Program(
        lambda p, x: lax.conv_transpose(x, p["w"], (2, 2), "SAME", dimension_numbers=NHWC),
        {"w": (3, 3, 4, 6)},
        (IMAGE,),
        "iiio",
    ),
    "conv_transposed_kernel": Program(
        lambda p, x: lax.conv_transpose(x, p["w"], (2, 2), "SAME", dimension_numbers=NHWC, transpose_kernel=True),
        {"w": (3, 3, 6, 4)},
        (IMAGE,),
        "iioi",
    ),
    "experts": Program(lambda p, x: jnp.einsum("td,edf->tef", x, p["w"]), {"w": (3, 8, 6)}, (X,), "oio"),
    "experts_apart": Program(
        lambda p, x: jnp.einsum("ted,edf->tef", x, p["w"]), {"w": (3, 8, 6)}, (normal(5, 3, 8),), "sio"
    ),
    "experts_picked": Program(
        lambda p, x, i: jnp.einsum("td,tdf->tf", x, p["w"][i]), {"w": (3, 8, 6)}, (X, jnp.array([0, 1, 2, 0, 1])), "sio"
    ),
    "experts_ragged": Program(
        lambda p, x, g: lax.ragged_dot(x, p["w"], g), {"w": (3, 8, 6)}, (X, jnp.array([2, 2, 1])), "sio"
    ),
    # carriers
    "fused_qkv_split": Program(
        lambda p, x: [x @ w for w in jnp.split(p["w"], 3, -1)], {"w": (8, 18)}, (X,), "io", uses=3
    ),
    "fused_qkv_sliced": Program(
        lambda p, x: x @ p["w"][:, 6:12] + x @ p["w"][:, ::3], {"w": (8, 18)}, (X,), "io", uses=2
    ),
    "heads_by_reshape": Program(
        lambda p, x: jnp.einsum("td,dhk->thk", x, p["w"].reshape(8, 3, 6)), {"w": (8, 18)}, (X,), "io"
    ),
    "heads_merged": Program(lambda p, x: x @ p["w"].reshape(8, 6), {"w": (8, 3, 2)}, (X,), "ioo"),
    "absorbed_heads": Program(
        lambda p, q: jnp.einsum("bhk,dhk->bhd", q, p["w"].reshape(8, 3, 6)), {"w": (8, 18)}, (normal(5, 3, 6),), "oi"
    ),
    "transposed_twice": Program(
        lambda p, x: x @ p["w"].transpose(2, 0, 1).reshape(8, 6), {"w": (2, 3, 8)}, (X,), "ooi"
    ),
    "reversed": Program(lambda p, x: x @ p["w"][::-1], {"w": (8, 6)}, (X,), "io"),
    "cast": Program(lambda p, x: x.astype(jnp.bfloat16) @ p["w"].astype(jnp.bfloat16), {"w": (8, 6)}, (X,), "io"),
    "scaled": Program(lambda p, x: x @ (-p["w"] * 2.0 / x[0, 0]), {"w": (8, 6)}, (X,), "io"),
    "shifted": Program(
        lambda p, x: x @ (p["w"] + 1.0 * jnp.ones((8, 6)) - p["w"] * 0),
        {"w": (8, 6)},
        (X,),
        "io",
    ),
    "barrier": Program(lambda p, x: x @ lax.optimization_barrier(p["w"]), {"w": (8, 6)}, (X,), "io"),
    "units": Program(lambda p, x: x @ p["w"][None, :, None].squeeze((0, 2)), {"w": (8, 6)}, (X,), "io"),
    "layer_constant": Program(lambda p, x: x @ p["w"][0] @ p["w"][2], {"w": (3, 8, 8)}, (X,), "sio", uses=2),
    "layer_in_the_middle": Program(lambda p, x: x @ p["w"][:, 1] @ p["w"][:, 2], {"w": (8, 3, 8)}, (X,), "iso", uses=2),
    "layer_traced": Program(lambda p, x, i: x @ p["w"][i], {"w": (3, 8, 8)}, (X, jnp.asarray(1)), "sio"),
    "layer_dynamic": Program(
        lambda p, x, i: x @ lax.dynamic_index_in_dim(p["w"], i, 0, keepdims=False),
        {"w": (3, 8, 8)},
        (X, jnp.asarray(1)),
        "sio",
    ),
    "layer_unstacked": Program(
        lambda p, x: [x := jnp.tanh(x @ w) for w in p["w"]][-1], {"w": (3, 8, 8)}, (X,), "sio", uses=3
    ),
    "concatenated_out": Program(
        lambda p, x: x @ jnp.concatenate([p["w"], jnp.ones((8, 3)), 2 * p["v"]], 1),
        {"w": (8, 6), "v": (8, 4)},
        (X,),
        "io",
        uses=2,
    ),
    "concatenated_turned": Program(
        lambda p, x: x @ jnp.concatenate([p["w"].T, p["v"].T], 1),
        {"w": (6, 8), "v": (4, 8)},
        (X,),
        "oi",
        uses=2,
    ),
    "concatenated_in": Program(
        lambda p, x: x @ jnp.concatenate([p["w"], p["v"], jnp.ones((2, 6))]),
        {"w": (4, 6), "v": (2, 6)},
        (X,),
        "io",
        uses=2,
    ),
    "stacked_layers": Program(
        lambda p, x: _scan(lambda c, w: jnp.tanh(c @ w), x, jnp.stack([p["w"], p["v"]])),
        {"w": (8, 8), "v": (8, 8)},
        (X,),
        "io",
        uses=2,
    ),
    "chosen_by_flag": Program(
        lambda p, x, i: x @ jnp.where(i > 0, p["w"], p["v"]),
        {"w": (8, 6), "v": (8, 6)},
        (X, jnp.asarray(1)),
        "io",
        uses=2,
    ),
    "chosen_from_itself": Program(
        lambda p, x, i: x @ lax.select_n(i > 0, p["w"], p["w"]), {"w": (8, 6)}, (X, jnp.asarray(1)), "io"
    ),
    "chosen_columns": Program(
        lambda p, x: x @ jnp.where(jnp.arange(6) % 2 > 0, p["w"], 0.5), {"w": (8, 6)}, (X,), "io"
    ),
    "chosen_rows": Program(
        lambda p, x: x @ jnp.where((jnp.arange(8) % 3 > 0)[:, None], p["w"], p["v"]),
        {"w": (8, 6), "v": (8, 6)},
        (X,),
        "io",
        uses=2,
    ),
    "chosen_elements": Program(
        lambda p, x: x @ jnp.where(jnp.arange(48).reshape(8, 6) % 5 > 0, p["w"], 0.0),
        {"w": (8, 6)},
        (X,),
        "io",
        materialized=1,
    ),
    "chosen_by_vmapped_cond": Program(
        lambda p, x: jax.vmap(lambda i, x: lax.cond(i > 1, lambda: x @ p["w"], lambda: jnp.sin(x @ p["w"])))(
            jnp.arange(5), x
        ),
        {"w": (8, 6)},
        (X,),
        "io",
        uses=2,
    ),
    "summed_whole_by_vmapped_cond": Program(
        lambda p, x: jax.vmap(
            lambda x: lax.cond(
                x.sum() > 0,
                lambda x, w: jnp.einsum("xab,ab->x", x, w),
                lambda x, w: 2.0 * jnp.einsum("xab,ab->x", x, w),
                x,
                p["w"],
            )
        )(normal(2, 3, 8, 6)),
        {"w": (8, 6)},
        (X,),
        "io",
        uses=2,
    ),
    # scale by channel, padding
    "scaled_columns": Program(lambda p, x: x @ (p["w"] * jnp.arange(6.0)), {"w": (8, 6)}, (X,), "io"),
    "scaled_rows": Program(lambda p, x: x @ (p["w"] / jnp.arange(1.0, 9.0)[:, None]), {"w": (8, 6)}, (X,), "io"),
    "scaled_copies": Program(
        lambda p, x: jnp.einsum("xi,sio->sxo", x, lax.mul(p["w"][None], jnp.arange(1.0, 4.0)[:, None, None])),
        {"w": (8, 6)},
        (X,),
        "io",
    ),
    "scaled_layers": Program(
        lambda p, x: jnp.einsum("sxi,sio->sxo", normal(3, 5, 8), jnp.arange(1.0, 4.0)[:, None, None] * p["w"]),
        {"w": (3, 8, 6)},
        (X,),
        "sio",
    ),
    "scaled_elements": Program(
        lambda p, x: x @ (p["w"] * jnp.arange(48.0).reshape(8, 6)), {"w": (8, 6)}, (X,), "io", materialized=1
    ),
    "scaled_table": Program(
        lambda p, i: (p["w"] * jnp.arange(8.0))[i], {"w": (11, 8)}, (jnp.arange(6).reshape(2, 3),), "io"
    ),
    "padded_columns": Program(
        lambda p, x: x @ jnp.pad(p["w"], ((0, 0), (1, 2)), constant_values=3.0), {"w": (8, 6)}, (X,), "io"
    ),
    "padded_rows": Program(
        lambda p, x: x @ lax.pad(p["w"], 0.5, ((2, -1, 0), (0, 0, 1)))[1:], {"w": (8, 6)}, (X,), "io"
    ),
    "padded_layers": Program(
        lambda p, x: jnp.einsum("sxi,sio->sxo", normal(4, 5, 8), jnp.pad(p["w"], ((1, 0), (0, 0), (0, 0)))),
        {"w": (3, 8, 6)},
        (X,),
        "sio",
    ),
    "padded_copies": Program(
        lambda p, x: jnp.einsum(
            "xi,sio->sxo",
            x,
            jnp.pad(jnp.broadcast_to(p["w"], (2, 8, 6)), ((1, 1), (0, 0), (0, 0)), constant_values=2.0),
        ),
        {"w": (8, 6)},
        (X,),
        "io",
    ),
    # sums
    "summed_rows": Program(lambda p, x: jnp.sum(p["w"], 0) * x[0, 0], {"w": (8, 6)}, (X,), "io"),
    "summed_whole": Program(lambda p, x: x @ p["w"] + jnp.sum(p["w"]), {"w": (8, 6)}, (X,), "io", uses=2),
    "centred": Program(
        lambda p, x: x @ (0.125 * jnp.sum(p["w"], 0, keepdims=True) - p["w"]), {"w": (8, 6)}, (X,), "io", uses=2
    ),
    "copies_added": Program(
        lambda p, x: jnp.einsum("xi,sio->sxo", x, lax.add(p["w"][None], jnp.ones((3, 8, 6)))), {"w": (8, 6)}, (X,), "io"
    ),
    # structure
    "jit": Program(lambda p, x: jax.jit(lambda w, x: jnp.tanh(x @ w))(p["w"], x), {"w": (8, 8)}, (X,), "io"),
    "jit_returns_weight": Program(lambda p, x: x @ jax.jit(lambda w: w.T * 2)(p["w"]), {"w": (6, 8)}, (X,), "oi"),
    "scan_constant": Program(
        lambda p, x: _scan(lambda c, _: jnp.tanh(c @ p["w"]), x, None, length=3), {"w": (8, 8)}, (X,), "io"
    ),
    "scan_layers": Program(lambda p, x: _scan(lambda c, w: jnp.tanh(c @ w), x, p["w"]), {"w": (3, 8, 8)}, (X,), "sio"),
    "scan_layers_reversed": Program(
        lambda p, x: _scan(lambda c, w: jnp.tanh(c @ w), x, p["w"], reverse=True, unroll=2),
        {"w": (3, 8, 8)},
        (X,),
        "sio",
    ),
    "scan_nested": Program(
        lambda p, x: _scan(lambda c, ws: _scan(lambda c, w: jnp.tanh(c @ w), c, ws), x, p["w"]),
        {"w": (2, 3, 8, 8)},
        (X,),
        "ssio",
    ),
    "scan_carry": Program(
        lambda p, x: _scan(lambda c, _: (jnp.tanh(c[0] @ c[1]), c[1]), (x, p["w"]), None, length=3)[0],
        {"w": (8, 8)},
        (X,),
        "io",
    ),
    "scan_carry_changed": Program(
        lambda p, x: _scan(lambda c, _: (jnp.tanh(c[0] @ c[1]), c[1] * 0.5), (x, p["w"]), None, length=3)[0],
        {"w": (8, 8)},
        (X,),
        "io",
    ),
    "scan_carry_unstable": Program(
        lambda p, x: _scan(lambda c, _: (jnp.tanh(c[0] @ c[1]), jnp.sin(c[1])), (x, p["w"]), None, length=3)[0],
        {"w": (8, 8)},
        (X,),
        "io",
        materialized=1,
    ),
    "scan_outputs_weights": Program(
        lambda p, x: _scan(lambda c, w: jnp.tanh(c @ w), x, lax.map(lambda w: w.T * 2, p["w"])),
        {"w": (3, 8, 8)},
        (X,),
        "soi",
    ),
    "rnn": Program(
        lambda p, x: _scan(lambda h, t: jnp.tanh(t @ p["w"] + h @ p["u"]), jnp.zeros((2, 8)), normal(4, 2, 8)),
        {"w": (8, 8), "u": (8, 8)},
        (X,),
        "io",
        uses=2,
    ),
    "fori_loop": Program(
        lambda p, x: lax.fori_loop(0, 3, lambda _, c: (jnp.tanh(c[0] @ c[1]), c[1]), (x, p["w"]))[0],
        {"w": (8, 8)},
        (X,),
        "io",
    ),
    "cond": Program(
        lambda p, x: lax.cond(x.sum() > 0, lambda w: x @ w, lambda w: x @ w.T, p["w"]),
        {"w": (8, 8)},
        (X,),
        "oi",
        uses=2,
    ),
    "cond_returns_weight": Program(
        lambda p, x: x @ lax.cond(x.sum() > 0, lambda w: w * 2, lambda w: w * 3.0, p["w"]), {"w": (8, 8)}, (X,), "io"
    ),
    "switch_between_weights": Program(
        lambda p, x: x @ lax.switch(1, [lambda a, b: a, lambda a, b: b], p["w"], p["v"]),
        {"w": (8, 8), "v": (8, 8)},
        (X,),
        "io",
        materialized=2,
        uses=2,
    ),
    "remat": Program(
        lambda p, x: jax.checkpoint(
            lambda w, x: jnp.sin(jnp.sin(x @ w) @ w), policy=jax.checkpoint_policies.dots_saveable
        )(p["w"], x),
        {"w": (8, 8)},
        (X,),
        "io",
        uses=2,
    ),
    "custom_jvp": Program(lambda p, x: doubled_jvp(x, p["w"], 2), {"w": (8, 8)}, (X,), "io"),
    "custom_vjp": Program(lambda p, x: tripled_vjp(x, p["w"], 2), {"w": (8, 8)}, (X,), "io"),
    "vmap_over_examples": Program(lambda p, x: jax.vmap(lambda t: t @ p["w"])(x), {"w": (8, 6)}, (X,), "io"),
    "map_over_weights": Program(lambda p, x: lax.map(lambda w: x @ w, p["w"]), {"w": (3, 8, 6)}, (X,), "sio"),
    "associative_scan": Program(
        lambda p, x: lax.associative_scan(lambda a, b: a * 0.9 + b, x @ p["w"]), {"w": (8, 6)}, (X,), "io"
    ),
    "shard_map": Program(_shard_map, {"w": (8, 6)}, (X,), "io", uses=2),
    "inner_gradient": Program(
        lambda p, x: (lambda w: x @ (w - 0.1 * jax.grad(lambda w: ((x @ w) ** 2).sum())(w)))(p["w"]),
        {"w": (8, 6)},
        (X,),
        "io",
        uses=2,
    ),
    "dead_code": Program(lambda p, x: (x @ p["w"], jnp.sin(p["w"]))[0], {"w": (8, 6)}, (X,), "io"),
    # no factored form
    "unused": Program(lambda p, x: x, {"w": (8, 6)}, (X,), "io", uses=0),
    "inverse": Program(
        lambda p, x: x @ jnp.linalg.inv(p["w"] + jnp.eye(8) * 3), {"w": (8, 8)}, (X,), "io", materialized=3, uses=3
    ),
    "two_weights": Program(
        lambda p, x: x @ (p["w"] @ p["v"]), {"w": (8, 8), "v": (8, 8)}, (X,), "io", materialized=1, uses=2
    ),
    "elementwise": Program(lambda p, x: x @ jnp.tanh(p["w"]), {"w": (8, 6)}, (X,), "io", materialized=1),
    "returned": Program(lambda p, x: (x @ p["w"], p["w"]), {"w": (8, 6)}, (X,), "io", materialized=1, uses=2),
}
