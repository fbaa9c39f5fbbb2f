"""Claim: of a quantized or cast base, only what is stored is kept for the backward pass.

Eight scanned Dense layers of 512, 256 tokens, rank 8, the gradient of the adapters: XLA's own bytes of arguments and of
temporaries, its FLOPs, and the time of a step as a ratio to LoRA on float32 weights in the same rounds. The same net in
qwix, where that is installed, through its (Q)LoRA provider.

    python benchmarks/quantized_base.py [--rounds 15]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from measure import Array, PyTree, alternated, ratio, table, write

import lojax

LAYERS, WIDTH, TOKENS, RANK = 8, 512, 256, 8
KINDS = ("nf4", "int4", "int8", "float8_e4m3fn")
MIB = 2**20
Step = tuple[Callable[..., PyTree], tuple[PyTree, ...]]


class Layer(nn.Module):
    """One layer, as `nn.scan` takes it."""

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array, _: None) -> tuple[Array, None]:
        return jnp.tanh(nn.Dense(WIDTH, use_bias=False, dtype=self.dtype)(x)), None


class Net(nn.Module):
    """The layers, scanned; with remat, each of them under `jax.checkpoint`."""

    remat: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        layer = nn.remat(Layer) if self.remat else Layer
        scan = nn.scan(layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=LAYERS)
        return scan(self.dtype)(x.astype(self.dtype), None)[0]


def lojax_step(net: nn.Module, x: Array, kind: str | None) -> tuple[Step, float]:
    """The gradient of the adapters in lojax, and the relative error of the stored weights."""
    params = net.init(jax.random.key(0), x)
    base = params if kind is None else lojax.quantize(params, kind)
    model = lojax.wrap(net, "**/kernel", rank=RANK, strict=True)
    frozen, lora = model.init(jax.random.key(1), base, x)
    merged = lojax.merge(frozen, lora)  # without an update: the dequantized weights
    weights, originals = (np.asarray(jax.tree.leaves(tree)[0]) for tree in (merged, params))
    error = float(np.linalg.norm(weights - originals) / np.linalg.norm(originals))
    return (lambda lora, frozen, x: jax.grad(lambda v: loss(model.apply(frozen, v, x)))(lora), (lora, frozen, x)), error


def qwix_step(net: nn.Module, x: Array, kind: str | None) -> tuple[Step, float]:
    """The same in qwix: LoRA, or with a kind QLoRA."""
    import qwix

    options = {} if kind is None else {"weight_qtype": kind, "tile_size": 64}
    module = qwix.apply_lora_to_model(net, qwix.LoraProvider(module_path=".*", rank=RANK, alpha=RANK, **options))
    params = jax.jit(module.init)(jax.random.key(0), x)["params"]
    leaves, tree = jax.tree_util.tree_flatten_with_path(params)
    is_lora = ["lora" in jax.tree_util.keystr(keys) for keys, _ in leaves]
    trained = [leaf for (_, leaf), flag in zip(leaves, is_lora, strict=True) if flag]
    frozen = [leaf for (_, leaf), flag in zip(leaves, is_lora, strict=True) if not flag]

    def step(trained: list[Array], frozen: list[Array], x: Array) -> PyTree:
        def value(trained: list[Array]) -> Array:
            lora, rest = iter(trained), iter(frozen)
            merged = jax.tree.unflatten(tree, [next(lora if flag else rest) for flag in is_lora])
            return loss(module.apply({"params": merged}, x))

        return jax.grad(value)(trained)

    return (step, (trained, frozen, x)), float("nan")


def loss(y: Array) -> Array:
    """A number of the output."""
    return jnp.sum(jnp.square(y.astype(jnp.float32)))


def programs(x: Array) -> dict[tuple[str, str], tuple[Step, float]]:
    """The steps by method and net."""
    methods: dict[str, Callable[[nn.Module], tuple[Step, float]]] = {
        "lojax float32": lambda net: lojax_step(net, x, None),
        **{f"lojax {kind}": (lambda net, kind=kind: lojax_step(net, x, kind)) for kind in KINDS},
    }
    try:
        import qwix  # noqa: F401

        methods["qwix float32"] = lambda net: qwix_step(net, x, None)
        methods["qwix nf4"] = lambda net: qwix_step(net, x, "nf4")
    except ImportError:
        print("qwix is not installed")
    keeps = {"all kept": False, "remat": True}
    steps = {(name, label): make(Net(remat)) for name, make in methods.items() for label, remat in keeps.items()}
    steps["lojax float32, bfloat16 compute", "all kept"] = lojax_step(Net(False, jnp.bfloat16), x, None)
    steps["lojax nf4, bfloat16 compute", "all kept"] = lojax_step(Net(False, jnp.bfloat16), x, "nf4")
    return steps


def main() -> None:
    """Measures and writes."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    x = jnp.asarray(np.random.default_rng(0).normal(size=(TOKENS, WIDTH)), jnp.float32)
    steps = programs(x)
    compiled = {key: jax.jit(step).lower(*args).compile() for key, ((step, args), _) in steps.items()}

    def clock(key: tuple[str, str]) -> Callable[[], PyTree]:
        return lambda: jax.block_until_ready(compiled[key](*steps[key][0][1]))

    clocks = {", ".join(key): clock(key) for key in steps}
    seconds = alternated(clocks, rounds=options.rounds)
    rows = []
    for (name, keeps), program in compiled.items():
        stats = program.memory_analysis()
        arguments, temporaries = stats.argument_size_in_bytes / MIB, stats.temp_size_in_bytes / MIB
        error = steps[name, keeps][1]
        rows.append(
            {
                "method": name,
                "activations": keeps,
                "arguments MiB": arguments,
                "temporaries MiB": temporaries,
                "sum MiB": arguments + temporaries,
                "GFLOP": program.cost_analysis()["flops"] / 1e9,
                "error of the weights": "" if np.isnan(error) else f"{error:.4f}",
                "time / float32": ratio(seconds, f"{name}, {keeps}", f"lojax float32, {keeps}"),
            }
        )
    text = (
        f"{LAYERS} scanned Dense layers of {WIDTH}, {TOKENS} tokens, rank {RANK}, gradient of the adapters. "
        "XLA:CPU, which counts the operations of one layer of a scan. Times are medians of ratios within "
        f"{options.rounds} alternated rounds.\n\n"
        f"{table(rows)}\n\n"
        "The error is that of the net's Gaussian start, relative, in the Frobenius norm. XLA:CPU computes with "
        "float8 and bfloat16 in wider types, which takes temporaries that other devices do not need."
    )
    write("quantized_base", "A quantized base is kept as it is stored", text, {"rows": rows, "seconds": seconds})


if __name__ == "__main__":
    main()
