"""Several processes for real: killed in mid-run, taken up again on another mesh, the same losses as one device."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("grain")

SCRIPT = Path(__file__).parents[2] / "examples" / "pod.py"
STEPS, RTOL = 10, 1e-5
COMMON = [
    "--batch",
    "8",
    "--accumulation-steps",
    "2",
    "--seq",
    "32",
    "--steps",
    str(STEPS),
    "--save-every",
    "2",
    "--rate",
    "1e-3",
]
COMMON += ["--dtype", "float32"]


def start(out, mesh, devices, *extra):
    env = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_PLATFORMS")} | {"PYTHONUNBUFFERED": "1"}
    command = [
        sys.executable,
        str(SCRIPT),
        *COMMON,
        "--out",
        str(out),
        "--mesh",
        mesh,
        "--devices",
        str(devices),
    ]
    log = out.parent / f"{out.name}-{time.monotonic_ns()}.log"
    with log.open("w") as stream:
        return subprocess.Popen([*command, *extra], env=env, stdout=stream, stderr=subprocess.STDOUT), log


def finish(process, log, timeout=900):
    code = process.wait(timeout)
    text = log.read_text()
    assert code == 0, text[-3000:]
    return text


def losses(out):
    lines = (out / "losses.jsonl").read_text().splitlines() if (out / "losses.jsonl").exists() else []
    return [(found["step"], found["loss"]) for found in map(json.loads, lines)]


def pair(out):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    common = ["--coordinator", f"localhost:{port}", "--processes", "2"]
    return [start(out, "data=2,fsdp=2,tensor=2", 4, *common, "--process", str(i)) for i in (0, 1)]


def wait_for(out, step, processes, timeout=900):
    until = time.monotonic() + timeout
    while not losses(out) or losses(out)[-1][0] < step:
        for process, log in processes:
            if process.poll() is not None:
                pytest.fail(log.read_text()[-3000:])
        assert time.monotonic() < until, "no progress"
        time.sleep(0.05)


@pytest.mark.slow
def test_killed_and_taken_up_on_another_mesh(tmp_path):
    finish(*start(tmp_path / "whole", "fsdp=1", 1))
    want = dict(losses(tmp_path / "whole"))
    assert sorted(want) == list(range(1, STEPS + 1)) and want[STEPS] < want[1]

    out = tmp_path / "pod"
    processes = pair(out)
    try:
        wait_for(out, 5, processes)
    finally:
        for process, _ in processes:
            process.send_signal(signal.SIGKILL)
            process.wait()
    before = losses(out)
    text = finish(*start(out, "fsdp=4,tensor=2", 8))
    assert "1 processes, 8" in text
    begun = int(text.partition("from step ")[2].split()[0])
    assert begun >= 2
    after = losses(out)[len(before) :]
    assert [step for step, _ in after] == list(range(begun + 1, STEPS + 1))
    for step, loss in (*before, *after):
        np.testing.assert_allclose(loss, want[step], rtol=RTOL, err_msg=f"step {step}")


@pytest.mark.slow
def test_processes_with_other_adapters_are_told(tmp_path):
    (tmp_path / "agree.py").write_text(AGREE)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {"JAX_PLATFORMS": "cpu"}
    command = [sys.executable, str(tmp_path / "agree.py"), str(port)]
    both = [
        subprocess.Popen([*command, str(i)], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for i in (0, 1)
    ]
    for process in both:
        text, _ = process.communicate(timeout=600)
        assert "the same: fine" in text and "w differs between processes: process 0: " in text, text[-3000:]


AGREE = """
import sys
import jax, jax.numpy as jnp
jax.distributed.initialize(f"localhost:{sys.argv[1]}", 2, int(sys.argv[2]))
import lojax
from lojax.sharding.consistency import check_agreement
start = lambda seed: lojax.init(jax.random.key(seed), {"w": jnp.ones((8, 4))}, "w", rank=2)[1]
check_agreement(start(0))
print("the same: fine")
try:
    check_agreement(start(jax.process_index()))
except ValueError as error:
    print(error)
"""
