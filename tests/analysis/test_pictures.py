"""Pictures: what is drawn where, and the grid of layers and kinds."""

from __future__ import annotations

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import message, trained

import lojax
from lojax.analysis.layers import layer_grid

PARAMS = {
    f"layer_{i}": {"attention": {"key": jnp.eye(6) * (i + 1), "query": jnp.eye(6)}, "output": jnp.ones((6, 4))}
    for i in range(11)
}


@pytest.fixture(scope="module")
def pair():
    frozen, lora = lojax.init(jax.random.key(0), PARAMS, "**", rank=2)
    return frozen, trained(lora)


def texts(axes) -> list[str]:
    return [label.get_text() for label in axes.texts]


def test_an_analysis_is_drawn_by_layer_and_kind(pair, tmp_path):
    analysis = lojax.analyze(*pair)
    figure = analysis.plot(tmp_path / "view.png")
    assert (tmp_path / "view.png").read_bytes().startswith(b"\x89PNG")
    ratios, intruders, spectra = figure.axes
    assert [label.get_text() for label in ratios.get_yticklabels()] == ["query", "key", "output"]
    assert [label.get_text() for label in ratios.get_xticklabels()] == [*map(str, range(11))]
    rows = {row.path: row for row in analysis.rows}
    drawn = ratios.images[0].get_array()
    assert drawn[1, 10] == pytest.approx(100 * rows["layer_10/attention/key"].ratio)
    counts = [rows[f"layer_{i}/attention/query"].intruders for i in range(11)]
    assert intruders.images[0].get_array()[0].tolist() == counts and texts(intruders)[:11] == [*map(str, counts)]
    (line,) = (line for line in spectra.lines if line.get_label() == "output")
    own = [row.spectrum / row.spectrum[0] for path, row in rows.items() if path.endswith("output")]
    np.testing.assert_allclose(line.get_ydata(), np.median(own, 0))


def test_without_a_base_the_norm_is_drawn_and_no_intruders(pair):
    norms, spectra = lojax.analyze(None, pair[1]).plot().axes
    assert norms.get_title(loc="left") == "Size of the update, ‖ΔW‖" and len(spectra.lines) == 3


def test_a_net_without_layers_has_bars():
    frozen, lora = lojax.init(jax.random.key(0), {"fc1": jnp.eye(4), "fc2": jnp.ones((4, 3))}, "*", rank=1)
    bars = lojax.analyze(frozen, trained(lora)).plot().axes[0]
    assert len(bars.patches) == 2 and not bars.images


def test_many_layers_have_a_color_bar_instead_of_numbers():
    params = {"blocks": jnp.ones((40, 4, 3))}
    _, lora = lojax.init(jax.random.key(0), params, "*", rank=1, axes=("stack", "in", "out"))
    figure = lojax.analyze(None, trained(lora)).plot()
    assert not texts(figure.axes[0]) and len(figure.axes) == 3
    assert figure.axes[0].get_xticklabels()[1].get_text() == "2"


def test_a_similarity_is_drawn(pair, tmp_path):
    other = trained(lojax.init(jax.random.key(1), PARAMS, "**", rank=3)[1], 1)
    similarity = lojax.similarity(pair[1], other)
    phi, diagonal, _, cosines = similarity.plot(tmp_path / "phi.pdf").axes
    assert (tmp_path / "phi.pdf").read_bytes().startswith(b"%PDF")
    mean = np.mean([row.phi for row in similarity.rows], 0)
    np.testing.assert_allclose(phi.images[0].get_array(), mean.T)
    np.testing.assert_allclose(diagonal.lines[0].get_ydata(), np.diag(mean))
    assert cosines.images[0].get_array().shape == (3, 11) and cosines.images[0].get_clim() == (-1, 1)


def test_nothing_to_draw_and_no_matplotlib(pair, monkeypatch):
    params = {"head": jnp.ones((2, 2))}
    analysis = lojax.analyze(*lojax.init(jax.random.key(0), params, (), train="head"))
    assert "There is no adapter to draw" in message(ValueError, analysis.plot)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "pip install matplotlib" in message(ModuleNotFoundError, lojax.analyze(None, pair[1]).plot)


def test_names_become_layers_and_kinds():
    grid = layer_grid(["params/bert/EncoderBlock_2/attn/out/kernel", "params/bert/EncoderBlock_10/mlp/out/kernel"])
    assert grid == (("2", "10"), ("attn/out", "mlp/out"), ((0, 0), (1, 1)))
    assert layer_grid(["down.0.blocks.1.attn1.to_q", "down.0.blocks.2.attn1.to_q"]).layers == ("0.1", "0.2")
    experts = layer_grid(["layers.3.experts[0]", "layers.3.experts[1]", "layers.4.experts[0]"])
    assert (experts.layers, experts.cells) == (("3", "4"), ((0, 0), (0, 0), (0, 1)))
    np.testing.assert_array_equal(experts.fill([1.0, 3.0, None]), [[2.0, np.nan]])
    np.testing.assert_array_equal(experts.fill([1, 3, None], total=True), [[4.0, np.nan]])
    scanned = layer_grid(["blocks/w[0, 1]", "blocks/w[1, 0]"])
    assert (scanned.layers, scanned.kinds) == (("0", "1"), ("blocks",))
    assert layer_grid(["fc1/kernel", "fc2/kernel"]).layers == ("",)
