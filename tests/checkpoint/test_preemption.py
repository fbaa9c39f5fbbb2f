"""A machine that is taken away: SIGTERM in the middle of a loop, the adapter saved, the run taken up elsewhere."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

LOOP = """
import sys, time
from pathlib import Path
import jax, jax.numpy as jnp, optax, orbax.checkpoint as ocp
import lojax

folder, port, steps, pace = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), float(sys.argv[4])
jax.distributed.initialize(f"localhost:{port}", num_processes=1, process_id=0)  # JAX hears SIGTERM, orbax asks JAX
net = lambda p, x: jnp.tanh(x @ p["up"]) @ p["down"]
params = {"up": jnp.sin(jnp.arange(48.0)).reshape(6, 8), "down": jnp.cos(jnp.arange(32.0)).reshape(8, 4)}
model = lojax.wrap(net, "*", rank=2)
frozen, lora = model.init(jax.random.key(0), params, jnp.ones((1, 6)))
tx = optax.adamw(1e-2)

@jax.jit
def step(state):
    x = jax.random.normal(jax.random.fold_in(jax.random.key(5), state["step"]), (4, 6))
    grads = jax.grad(lambda lora: jnp.mean(model.apply(frozen, lora, x) ** 2))(state["lora"])
    updates, opt = tx.update(grads, state["opt"], state["lora"])
    return {"lora": optax.apply_updates(state["lora"], updates), "opt": opt, "step": state["step"] + 1}

state = {"lora": lora, "opt": tx.init(lora), "step": jnp.int32(0)}
options = ocp.CheckpointManagerOptions(max_to_keep=2, save_interval_steps=1000)
with ocp.CheckpointManager(folder / "run", options=options) as manager:
    if manager.latest_step() is not None:
        state = manager.restore(manager.latest_step(), args=ocp.args.StandardRestore(jax.eval_shape(lambda: state)))
        print("from", int(state["step"]), flush=True)
    while int(state["step"]) < steps:
        state = step(state)
        at = int(state["step"])
        print("step", at, flush=True)
        if manager.reached_preemption(at):
            manager.save(at, args=ocp.args.StandardSave(state), force=True)
            manager.wait_until_finished()
            print("saved", at, flush=True)
            sys.exit(0)
        time.sleep(pace)
lojax.save(folder / "adapter", state["lora"], frozen=frozen)
"""


def _started(folder: Path, steps: int, pace: float) -> subprocess.Popen[str]:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-c", LOOP, str(folder), str(port), str(steps), str(pace)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def _finished(process: subprocess.Popen[str]) -> str:
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return out


@pytest.mark.slow
def test_a_preempted_run_saves_itself_and_goes_on_to_the_same_adapter(tmp_path):
    whole = _started(tmp_path / "whole", 60, 0.0)
    process = _started(tmp_path / "cut", 60, 0.3)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step 3"):
            break
    process.send_signal(signal.SIGTERM)
    before = time.monotonic()
    said = _finished(process).split()
    assert "saved" in said and time.monotonic() - before < 60
    at = int(said[said.index("saved") + 1])
    assert 3 <= at < 60
    assert f"from {at}" in _finished(_started(tmp_path / "cut", 60, 0.0))
    _finished(whole)
    reader = "import sys, lojax, numpy as np; a = lojax.restore(sys.argv[1]); "
    reader += "np.savez(sys.argv[2], *[x for n in sorted(a) for x in (a[n].a, a[n].b)])"
    for name in ("whole", "cut"):
        subprocess.run(
            [sys.executable, "-c", reader, tmp_path / name / "adapter", tmp_path / f"{name}.npz"], check=True
        )
    whole_arrays, cut_arrays = (np.load(tmp_path / f"{name}.npz") for name in ("whole", "cut"))
    assert len(whole_arrays.files) == 4
    for name in whole_arrays.files:
        np.testing.assert_array_equal(cut_arrays[name], whole_arrays[name])
