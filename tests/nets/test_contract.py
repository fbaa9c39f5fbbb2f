"""Every net of the zoo keeps the same promises. A new net is one row in the file of its library."""

from __future__ import annotations

import dataclasses
import math
import string
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lojax
from lojax.adapters.adapter import is_adapter
from lojax.adapters.metadata import rebox, unbox
from lojax.adapters.paths import map_paths
from tests.nets.zoo import CASES, Case, Example

FAST_COMPILE: dict[str, Any] = {"xla_backend_optimization_level": 0}
"""Compiler options: time goes to compiling here, not to running."""


def rows() -> list[Any]:
    def marks(case: Case) -> list[Any]:
        return [pytest.mark.slow] * case.slow + [pytest.mark.optimized] * (case.flops is not None)

    return [pytest.param(case, id=f"{case.library}-{case.name}", marks=marks(case)) for case in CASES]


@pytest.mark.parametrize("case", rows())
def test_keeps_the_contract(case: Case) -> None:
    pytest.importorskip(case.requires)
    with jax.numpy_dtype_promotion(case.promotion):
        example = case.build()
        strict = not case.materialized
        model = lojax.wrap(example.net, case.targets, rank=case.rank, alpha=3 * case.rank, init=draw, strict=strict)
        frozen, lora = model.init(jax.random.key(0), example.params, *example.args, **example.kwargs)

        says_how_it_runs(case, model.report(frozen, lora, *example.args, **example.kwargs))
        ours, theirs = steps(example, model, frozen, lora)
        starts_at_the_base(example, model, frozen, lora, ours(lora, frozen)[0][1][0], theirs(lora, frozen)[0][1][0])
        trained = perturb(lora)
        matches_the_materialized_weights(ours(trained, frozen), theirs(trained, frozen))
        merges_as_written(frozen, trained, theirs(trained, frozen)[0][1][1])
        if case.flops is not None:
            share = ours.cost_analysis()["flops"] / theirs.cost_analysis()["flops"]
            assert share <= case.flops


def rows_of_batches() -> list[Any]:
    """Every net with a batch; in the default run the first one of three libraries."""
    cases = [case for case in CASES if case.rows]
    first = {case.library: case for case in reversed(cases) if not case.slow}
    first = {library: first[library] for library in ("flax.linen", "flax.nnx", "functions")}
    return [
        pytest.param(
            case, id=f"{case.library}-{case.name}", marks=[pytest.mark.slow] * (first.get(case.library) is not case)
        )
        for case in cases
    ]


@pytest.mark.parametrize("case", rows_of_batches())
def test_each_row_of_a_batch_has_its_own_adapter(case: Case) -> None:
    """As the first two rows do one by one."""
    pytest.importorskip(case.requires)
    with jax.numpy_dtype_promotion(case.promotion):
        example = case.build()
        model = lojax.wrap(example.net, case.targets, rank=case.rank, alpha=3 * case.rank, init=draw)
        frozen, lora = model.init(jax.random.key(0), example.params, *example.args, **example.kwargs)
        loras = [perturb(lora), jax.tree.map(lambda x: 1.5 * x, perturb(lora))]
        inputs = (example.args, dict(example.kwargs))
        batch = next(x.shape[0] for x in jax.tree.leaves(inputs) if getattr(x, "ndim", 0))

        def first(rows: slice) -> Any:
            return jax.tree.map(lambda x: x[rows] if getattr(x, "ndim", 0) else x, inputs)

        def mixed(frozen: Any, bank: Any, ids: Any) -> Any:
            args, kwargs = first(slice(0, 2))
            return model.apply(frozen, bank, *args, adapter=ids, **kwargs)

        def alone(frozen: Any, lora: Any, row: int) -> Any:
            args, kwargs = first(slice(row, row + 1))
            return model.apply(frozen, lora, *args, **kwargs)

        rows = range(min(batch, 2))
        got = jax.jit(mixed, compiler_options=FAST_COMPILE)(frozen, lojax.stack(loras), jnp.asarray(rows))
        one_by_one = jax.jit(alone, static_argnums=2, compiler_options=FAST_COMPILE)
        each = [one_by_one(frozen, loras[row], row) for row in rows]
        close_trees(got, jax.tree.map(lambda together, *parts: in_one(together, parts), got, *each))


def in_one(together: Any, parts: Any) -> Any:
    """The rows in one array, along the axis that gives it the shape of ``together``."""
    if parts[0].shape == together.shape:
        return parts[0]
    axis = next(d for d, (n, m) in enumerate(zip(together.shape, parts[0].shape, strict=True)) if n != m)
    return jnp.concatenate(parts, axis)


def says_how_it_runs(case: Case, report: Any) -> None:
    """No gradient of a targeted weight's size is computed, or the row knows why."""
    assert len(report.weights) == case.count, [weight.path for weight in report.weights]
    for weight in report.weights:
        reasons = {use.reason for use in weight.uses if use.how == "materialized"}
        if weight.path in case.materialized:
            assert any(case.materialized[weight.path] in reason for reason in reasons), (weight.path, reasons)
        else:
            assert weight.how in ("factored", "fused"), (weight.path, weight.how, reasons)


def steps(example: Example, model: Any, frozen: Any, lora: Any) -> tuple[Any, Any]:
    """Two compiled gradient steps: lojax's, and the net's own on parameters materialized without lojax."""

    def ours(lora: Any, frozen: Any) -> Any:
        outputs = model.apply(frozen, lora, *example.args, **example.kwargs)
        return loss(outputs), (outputs, None)

    def theirs(lora: Any, frozen: Any) -> Any:
        outputs = example.native(map_paths(lambda _, *leaf: materialize(*leaf), frozen, lora))
        return loss(outputs), (outputs, model.merge(frozen, lora))

    return tuple(  # type: ignore[return-value]
        jax.jit(jax.value_and_grad(f, has_aux=True)).lower(lora, frozen).compile(compiler_options=FAST_COMPILE)
        for f in (ours, theirs)
    )


def loss(outputs: Any) -> Any:
    """A fixed functional that weighs every number of the output differently."""
    floats = [x for x in jax.tree.leaves(outputs) if jnp.issubdtype(x.dtype, jnp.floating)]
    return sum(jnp.sum(x * np.cos(np.arange(x.size)).astype(x.dtype).reshape(x.shape)) for x in floats)


def starts_at_the_base(example: Example, model: Any, frozen: Any, lora: Any, outputs: Any, base: Any) -> None:
    """B = 0 gives the base output, bit for bit.

    Where the compiler treats the two programs differently, so that they round apart, they are compared
    operation by operation, which takes longer.
    """
    close_trees(outputs, base, 2e-6)
    if not all(map(np.array_equal, jax.tree.leaves(outputs), jax.tree.leaves(base))):
        with jax.disable_jit():
            outputs = model.apply(frozen, lora, *example.args, **example.kwargs)
            base = example.native(example.params)
        close_trees(outputs, base, 0)


def matches_the_materialized_weights(ours: Any, theirs: Any) -> None:
    """The same outputs and gradients as the net on ``W0 + scale * a b``."""
    ((_, (outputs, _)), gradient), ((_, (true_outputs, _)), true_gradient) = ours, theirs
    close_trees(outputs, true_outputs)
    close_trees(gradient, true_gradient)
    for keys, leaf in jax.tree_util.tree_leaves_with_path(true_gradient):
        assert np.linalg.norm(leaf) > 0, f"{jax.tree_util.keystr(keys)} gets no gradient: nothing was compared"


def merges_as_written(frozen: Any, lora: Any, merged: Any) -> None:
    """``merge`` is ``W0 + scale * a b``, and leaves all else as it is."""

    def check(path: str, weight: Any, trained: Any, leaf: Any) -> None:
        if weight is None and trained is None:
            assert leaf is None, path
        else:
            close(path, unbox(leaf), unbox(materialize(weight, trained)), 1e-6 if is_adapter(trained) else 0)

    map_paths(check, frozen, lora, merged)


def materialize(weight: Any, trained: Any) -> Any:
    """``W0 + scale * a b`` as one einsum that has nothing of lojax in it; alpha is three times the rank."""
    if not is_adapter(trained):
        return weight if trained is None else trained
    whole = string.ascii_letters[: len(trained.axes)]
    stack, ins, outs = (
        "".join(x for x, axis in zip(whole, trained.axes, strict=True) if axis == role)
        for role in ("stack", "in", "out")
    )
    product = jnp.einsum(
        f"{stack}{ins}Z,{stack}Z{outs}->{whole}", unbox(trained.a), unbox(trained.b), precision="highest"
    )
    return rebox(weight, unbox(weight) + 3 * product)


def draw(key: Any, shape: Any, dtype: Any, **_: Any) -> Any:
    """An initializer by NumPy: nothing to compile."""
    return jnp.asarray(0.1 * np.random.default_rng(math.prod(shape)).standard_normal(shape), dtype)


def perturb(lora: Any) -> Any:
    """Adapters as training would leave them: b away from zero."""

    def move(_: str, leaf: Any) -> Any:
        if not is_adapter(leaf):
            return leaf
        return dataclasses.replace(leaf, b=rebox(leaf.b, draw(None, unbox(leaf.b).shape, jnp.float32)))

    return map_paths(move, lora)


def close_trees(got: Any, expected: Any, tolerance: float = 1e-5) -> None:
    left, right = jax.tree_util.tree_flatten_with_path(got), jax.tree_util.tree_flatten_with_path(expected)
    assert left[1] == right[1]
    for (keys, x), (_, y) in zip(left[0], right[0], strict=True):
        close(jax.tree_util.keystr(keys), x, y, tolerance)


def close(where: str, got: Any, expected: Any, tolerance: float = 1e-5) -> None:
    """Equal to ``tolerance`` of the norm."""
    got, expected = np.asarray(got), np.asarray(expected)
    assert got.shape == expected.shape and got.dtype == expected.dtype, where
    if not np.issubdtype(expected.dtype, np.floating):
        np.testing.assert_array_equal(got, expected, where)
        return
    error, norm = (np.linalg.norm(np.float64(x)) for x in (np.float64(got) - expected, expected))
    assert math.isfinite(norm) and error <= tolerance * norm, f"{where}: off by {error / norm:.1e} of its norm"
