"""Files of 4-bit weights against bitsandbytes: each reads what the other wrote."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from lojax.base.bitsandbytes_files import from_tensors, to_tensors
from lojax.quantized.formats import make_format
from lojax.quantized.quantized import quantize_weight

pytestmark = pytest.mark.peer
torch = pytest.importorskip("torch")
functional = pytest.importorskip("bitsandbytes.functional")

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("shape", [(64, 64), (7, 5), (3, 129), (256, 512), (1, 1)])
@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("block", [64, 128])
def test_what_bitsandbytes_wrote(shape, double, dtype, block):
    w = torch.from_numpy(RNG.normal(size=shape)).to(getattr(torch, dtype))
    codes, state = functional.quantize_4bit(w, blocksize=block, compress_statistics=double, quant_type="nf4")
    theirs = {f"w.{key}": value.numpy() for key, value in state.as_dict(packed=True).items()} | {"w": codes.numpy()}
    weight = from_tensors("w", theirs)
    np.testing.assert_array_equal(
        np.asarray(weight.dense(), np.float32), functional.dequantize_4bit(codes, state).float().numpy()
    )
    ours = to_tensors("w", weight)
    assert sorted(ours) == sorted(theirs)
    for key, value in theirs.items():
        assert (ours[key].dtype, ours[key].shape) == (value.dtype, value.shape), key
        assert ours[key].tobytes() == value.tobytes(), key


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_what_lojax_wrote(double, dtype):
    weight = quantize_weight(jnp.asarray(RNG.normal(size=(256, 128)), dtype), make_format("nf4", double=double))
    tensors = {key: torch.from_numpy(value.copy()) for key, value in to_tensors("w", weight).items()}
    codes = tensors.pop("w")
    parts = {key.removeprefix("w."): value for key, value in tensors.items()}
    state = functional.QuantState.from_dict(parts, device=torch.device("cpu"))
    theirs = functional.dequantize_4bit(codes, state)
    assert tuple(theirs.shape) == weight.shape
    np.testing.assert_array_equal(np.asarray(weight.dense(), np.float32), theirs.float().numpy())
