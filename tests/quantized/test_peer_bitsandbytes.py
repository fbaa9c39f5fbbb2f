"""Against bitsandbytes: the same codes, scales and values."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from lojax.quantized.code_books import NF4, dynamic_map
from lojax.quantized.formats import make_format
from lojax.quantized.quantized import quantize_weight

pytestmark = pytest.mark.peer
torch = pytest.importorskip("torch")
functional = pytest.importorskip("bitsandbytes.functional")

RNG = np.random.default_rng(0)
WEIGHTS = {
    "gaussian": RNG.normal(size=(256, 512)),
    "small": RNG.normal(size=(64, 64)) * 1e-3,
    "heavy tails": RNG.standard_t(2, size=(128, 256)),
    "with zeros": np.where(RNG.random((64, 128)) < 0.5, 0, RNG.normal(size=(64, 128))),
}


def test_the_code_books_are_the_same():
    np.testing.assert_array_equal(functional.get_4bit_type("nf4", device="cpu").numpy(), NF4)
    np.testing.assert_array_equal(functional.create_dynamic_map().numpy(), dynamic_map())


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("double", [True, False])
def test_codes_scales_and_values_are_the_same(name, double):
    w = WEIGHTS[name].astype(np.float32)
    codes, state = functional.quantize_4bit(
        torch.from_numpy(w), blocksize=64, compress_statistics=double, quant_type="nf4"
    )
    q = quantize_weight(jnp.asarray(w), make_format("nf4", double=double))
    np.testing.assert_array_equal(np.asarray(q.arrays["codes"]).reshape(-1), codes.numpy().reshape(-1))
    scales, their_scales = np.asarray(q.arrays["scales"]).reshape(-1), state.absmax.numpy()
    if double:
        # The mean of the scales is a sum, and torch sums in an order of its own: it agrees to the last bits. A scale
        # that is as near to one code as to the next may then take the other.
        np.testing.assert_allclose(np.unique(q.arrays["offset"]), [state.offset.item()], rtol=1e-6)
        groups = np.asarray(q.arrays["group_scales"]).reshape(-1)
        np.testing.assert_allclose(groups, state.state2.absmax.numpy(), rtol=1e-5)
        other = scales != their_scales
        assert other.mean() < 0.01
        assert np.abs(scales.astype(int) - their_scales).max() <= 1
        scales, their_scales = scales[~other], their_scales[~other]
    np.testing.assert_array_equal(scales, their_scales)
    theirs = functional.dequantize_4bit(codes, state).numpy()
    np.testing.assert_allclose(q.dense(), theirs, rtol=2e-2 if double else 1e-6, atol=1e-8)
