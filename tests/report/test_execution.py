"""`Model.report`: how each weight is executed, why one is materialized, and what each update costs."""

from __future__ import annotations

import html

import jax
import jax.numpy as jnp
import numpy as np

import lojax

T = 5
PARAMS = {
    "factored": np.ones((8, 6), np.float32),
    "formed": np.ones((6, 4), np.float32),
    "both": np.ones((6, 6), np.float32),
    "unused": np.ones((3, 3), np.float32),
    "frozen": np.ones((7, 7), np.float32),
}
X = jax.ShapeDtypeStruct((T, 8), jnp.float32)


def net(params, x, *, use_formed=True):
    x = x @ params["factored"]
    x = x @ params["both"] + jnp.sum(jnp.abs(params["both"]))
    return x @ jnp.sin(params["formed"]) if use_formed else x


def make(*args, **kwargs):
    model = lojax.wrap(net, lambda path, leaf: path != "frozen", rank=2)
    frozen, lora = model.init(jax.random.key(0), PARAMS)
    return model.report(frozen, lora, *args, **kwargs)


def test_the_data():
    weights = {weight.path: weight for weight in make(X).weights}
    assert list(weights) == ["both", "factored", "formed", "unused"]
    assert {path: weight.how for path, weight in weights.items()} == {
        "factored": "factored",
        "formed": "materialized",
        "both": "both",
        "unused": "unused",
    }
    weight = weights["factored"]
    assert (weight.shape, weight.axes, weight.rank, weight.parameters) == ((8, 6), ("in", "out"), 2, 2 * (8 + 6))
    (use,) = weight.uses
    assert (use.primitive, use.how, use.reason) == ("dot_general", "factored", "")
    assert use.flops == 2 * T * 8 * 6
    assert use.extra_flops == 2 * T * 2 * (8 + 6)
    assert use.extra_bytes == 4 * (T * 2 + T * 6)
    (use,) = weights["formed"].uses
    assert (use.primitive, use.how, use.reason) == ("sin", "materialized", "sin is not linear in the weight")
    assert use.extra_flops == 2 * 2 * 6 * 4
    assert use.extra_bytes == 4 * 6 * 4
    assert [use.primitive for use in weights["both"].uses] == ["dot_general", "abs"]


def test_a_lowered_rank_is_shown_as_in_the_summary():
    model = lojax.wrap(lambda params, x: x @ params["w"], "*", rank=8)
    report = model.report(*model.init(jax.random.key(0), {"w": np.ones((6, 3), np.float32)}), np.ones((1, 6)))
    assert (report.weights[0].rank, report.weights[0].requested_rank) == (3, 8)
    assert "in out  8 → 3          27" in str(report)


def test_the_totals():
    report = make(X)
    assert report.factored == 1
    assert report.extra_flops == sum(use.extra_flops for weight in report.weights for use in weight.uses)
    assert report.extra_flops == 2 * T * 2 * (8 + 6) + 2 * 2 * 6 * 4 + 2 * T * 2 * (6 + 6) + 2 * 2 * 6 * 6
    assert report.extra_bytes == 4 * (2 * (T * 2 + T * 6) + 6 * 4 + 6 * 6)


def test_the_text():
    lines = str(make(X)).splitlines()
    words = [" ".join(line.split()) for line in lines]
    assert words[0] == "weight shape axes rank parameters uses execution extra FLOPs of frozen extra bytes"
    assert set(lines[1]) == {"-"}
    assert len(lines[1]) == max(map(len, lines[:6]))
    assert words[2] == "both (6, 6) in out 2 24 2 dot_general, abs both 384 106.7% 304"
    assert words[3] == "factored (8, 6) in out 2 28 1 dot_general factored 280 58.3% 160"
    assert words[4] == "formed (6, 4) in out 2 20 1 sin materialized 96 96"
    assert words[5] == "unused (3, 3) in out 2 12 0 unused 0 0"
    assert lines[-1] == "1 of 4 adapted weights fully factored"


def test_a_materialized_weight_says_why_where_and_what_to_do():
    (line,) = [line for line in str(make(X)).splitlines() if line.startswith("formed is materialized")]
    start, end = (
        "formed is materialized for 'sin' at ",
        ": sin is not linear in the weight. This costs a temporary and a gradient of the weight's size; take it out of "
        "targets if that matters.",
    )
    assert line.startswith(start)
    assert line.endswith(end)
    where = line.removeprefix(start).removesuffix(end)
    assert "test_execution.py:" in where
    assert where.endswith("(net)")


def test_an_unused_weight_says_so_and_what_to_do():
    text = str(make(X, use_formed=False))
    for path in ("unused", "formed"):
        assert (
            f"{path} is never used by this program: its adapter gets no gradient. "
            "Take it out of targets, or report on the inputs that use it."
        ) in text.splitlines()
    assert "formed is materialized" not in text


def test_it_computes_nothing_and_takes_arrays_and_shapes_alike():
    assert make(X) == make(np.ones(X.shape, X.dtype))
    frozen, lora = jax.eval_shape(lambda p: lojax.init(jax.random.key(0), p, "factored", rank=2), PARAMS)
    (weight,) = lojax.wrap(net, "factored", rank=2).report(frozen, lora, X).weights
    assert weight.how == "factored"


def test_the_trips_of_a_scan_are_counted():
    def scanned(params, x):
        return jax.lax.scan(lambda x, w: (x @ w, None), x, params["layers"])[0]

    model = lojax.wrap(scanned, "layers", rank=2)
    x = jax.ShapeDtypeStruct((T, 6), jnp.float32)
    frozen, lora = model.init(jax.random.key(0), {"layers": np.ones((9, 6, 6), np.float32)}, x)
    (weight,) = model.report(frozen, lora, x).weights
    assert weight.axes == ("stack", "in", "out")
    assert sum(use.extra_flops for use in weight.uses) == 9 * 2 * T * 2 * (6 + 6)


def test_the_bytes_are_those_of_the_arrays_that_are_made():
    """Every kind of product, against the shapes in the traced program."""

    def net(p, x):
        kernel = {"dimension_numbers": ("NWC", "WIO", "NWC"), "window_strides": (1,), "padding": "SAME"}
        y = jax.lax.conv_general_dilated(p["table"][x], p["conv"], **kernel)
        return jax.lax.ragged_dot(y.reshape(-1, 5), p["experts"], jnp.array([10, 2]))

    params = {"table": jnp.ones((9, 6)), "conv": jnp.ones((3, 6, 5)), "experts": jnp.ones((2, 5, 7))}
    x = jax.ShapeDtypeStruct((3, 4), jnp.int32)
    model = lojax.wrap(net, "*", rank=2, strict=True)
    frozen, lora = model.init(jax.random.key(0), params, x)
    found = {weight.path: weight.uses[0].extra_bytes for weight in model.report(frozen, lora, x).weights}
    tokens = 3 * 4
    assert found == {name: 4 * tokens * (2 + out) for name, out in {"table": 6, "conv": 5, "experts": 7}.items()}
    fused = lojax.wrap(lambda p, x: x @ p["w"], "w", rank=2, execution="fused")
    frozen, lora = fused.init(jax.random.key(0), {"w": jnp.ones((8, 6))}, X)
    assert fused.report(frozen, lora, X).extra_bytes == 4 * 8 * 6


def test_it_shows_as_a_table_in_a_repl_and_in_a_notebook():
    report = make(X)
    assert repr(report) == str(report)
    lines = report._repr_html_().splitlines()
    assert lines[0] == "<table>" and lines.index("</table>") == 2 + len(report.weights)
    notes = str(report).splitlines()[2 + len(report.weights) :]
    assert lines[3 + len(report.weights) :] == [f"<p>{html.escape(note)}</p>" for note in notes]
    assert "&#x27;sin&#x27;" in report._repr_html_()
