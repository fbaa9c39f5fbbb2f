"""What it takes to add a variant: `CHANGES` adds one to a copy of the package, and the copy is put to use.

The toy trains a gate on each rank, ``W = W0 + s A diag(g) B`` (as KaSA does). It must compute, differentiate, merge,
scan, save, restore and be summed up, and touch at most five files.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import lojax

CHANGES = [  # (file, what stands there, what is to stand there)
    (  # its array, with the role of each axis, and its name
        "adapters/adapter.py",
        "    rows: Leaf = dataclasses.field(",
        '    gate: Leaf = dataclasses.field(default=None, metadata={"axes": ("stack", "rank")})\n'
        "    rows: Leaf = dataclasses.field(",
    ),
    (
        "adapters/adapter.py",
        '        return "dora" if',
        '        return "gated" if self.gate is not None else "dora" if',
    ),
    (  # its spelling
        "adapters/rule.py",
        'VARIANTS = ("lora", "dora", "lora-fa")',
        'VARIANTS = ("lora", "dora", "lora-fa", "gated")',
    ),
    (  # its start
        "adapters/create.py",
        '        if rule.variant == "dora":',
        '        if rule.variant == "gated":\n'
        '            gate = jnp.ones(array_shapes(axes, shape, site.rank)["gate"], dtype)\n'
        "            adapter = dataclasses.replace(adapter, gate=gate)\n"
        '        if rule.variant == "dora":',
    ),
    (  # its mathematics
        "lowrank/value.py",
        "        terms.append((NamedArray(a, (*stack, *ins, RANK)),",
        "        if adapter.gate is not None:\n"
        "            gate = NamedArray(adapter.gate, (*stack, RANK))\n"
        "            b = b * gate.broadcastable((*stack, RANK, *outs))\n"
        "        terms.append((NamedArray(a, (*stack, *ins, RANK)),",
    ),
]

USE = """
import sys, jax, jax.numpy as jnp, numpy as np, optax, lojax

def net(params, x):
    layer = lambda x, w: (jnp.tanh(x @ w), None)
    return jax.lax.scan(layer, x, params["layers"])[0] @ params["head"]

rng = np.random.default_rng(0)
normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
params, x = {"layers": normal(3, 8, 8), "head": normal(8, 4)}, normal(5, 8)
model = lojax.wrap(net, "**", rank=2, alpha=4, variant="gated", strict=True)
frozen, lora = model.init(jax.random.key(0), params, x)
assert np.array_equal(model.apply(frozen, lora, x), net(params, x))
lora = jax.tree.map(lambda v: v + 0.1 * normal(*v.shape), lora)

# against NumPy by hand, and the gradient against the materialized form
head = lora["head"]
np.testing.assert_allclose(
    model.merge(frozen, lora)["head"], params["head"] + 2 * (head.a * head.gate) @ head.b, rtol=1e-5, atol=1e-5)
loss = lambda apply: jax.jit(jax.value_and_grad(lambda lora: jnp.sum(apply(lora) ** 2)))(lora)
value, grads = loss(lambda lora: model.apply(frozen, lora, x))
expected, expected_grads = loss(lambda lora: net(lojax.merge(frozen, lora), x))
np.testing.assert_allclose(value, expected, rtol=1e-5)
jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), grads, expected_grads)
assert float(jnp.abs(grads["layers"].gate).max()) > 0

# as any other member of the family
tx = lojax.optimizer(optax.sgd(0.1))
tx.update(grads, tx.init(lora), lora)
lojax.save(sys.argv[1], lora, frozen=frozen)
restored = lojax.restore(sys.argv[1], frozen=frozen)
assert jax.tree.structure(restored) == jax.tree.structure(lora)
assert np.array_equal(restored["layers"].gate, lora["layers"].gate)
assert lojax.summary(frozen, lora).trainable == sum(v.size for v in jax.tree.leaves(lora))
"""


def test_a_new_variant_touches_at_most_five_files(tmp_path):
    shutil.copytree(Path(lojax.__file__).parent, tmp_path / "lojax", ignore=shutil.ignore_patterns("__pycache__"))
    for name, old, new in CHANGES:
        file = tmp_path / "lojax" / name
        text = file.read_text()
        assert text.count(old) == 1, f"{name} no longer holds {old!r} once: mend the change, and CONTRIBUTING.md"
        file.write_text(text.replace(old, new))
    assert len({name for name, *_ in CHANGES}) <= 5
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    run = subprocess.run(
        [sys.executable, "-c", USE, str(tmp_path / "adapter")],
        capture_output=True,
        text=True,
        env=environment,
        cwd=tmp_path,
        check=False,
    )
    assert run.returncode == 0, run.stderr
