"""Plans for GPUs: by formula everywhere, compiled where JAX's CUDA plugin is installed."""

import dataclasses
import json
import sys

import jax
import jax.numpy as jnp
import optax
import pytest

import lojax
from lojax.cli.main import main
from lojax.planner.decoder import TARGETS, Decoder
from lojax.planner.decoder_config import PRESETS, DecoderConfig
from lojax.planner.gpu_aot import compiler_options, gpu_mesh, has_gpu_compiler
from lojax.planner.gpu_plan import cost_on_gpu, plan_gpus
from lojax.planner.gpus import GPUS
from lojax.planner.train_step import full_step, lora_step

SMALL = DecoderConfig(4096, 512, 1024, 4, 8, 8, 64)
compiles = pytest.mark.skipif(not has_gpu_compiler(), reason="JAX's CUDA plugin is not installed")


@pytest.fixture(scope="module")
def on_one():
    """An 8B model on one card, by formulas."""
    return plan_gpus("8B", gpu="h100", seq=2048, compiled=False)


def test_held_bytes_are_exact(on_one):
    lora, quantized, full = (step.cost for step in on_one.steps.values())
    n = PRESETS["8B"].parameters
    assert abs(lora.weights - 2 * n) < 1e6 and full.weights == lora.weights  # the rest are norms
    rest = 2 * 128256 * 4096
    assert abs(quantized.weights - 2 * rest - (n - rest) / 2 * (1 + 2 / 64)) / quantized.weights < 0.02  # codes, scales
    assert abs(full.optimizer - 8 * n) / full.optimizer < 0.001
    assert (lora.adapters, lora.optimizer) == (quantized.adapters, quantized.optimizer)
    assert lora.optimizer - 2 * lora.adapters == 4  # Adam's counter


def test_hosts_share_the_batch_and_the_gpus_of_a_host_the_weights(on_one):
    many = plan_gpus("8B", gpu="h100", count=4, hosts=2, seq=2048, compiled=False)
    assert dict(many.mesh) == {"data": 2, "fsdp": 4, "tensor": 1} and many.batch == 8
    for one, each in zip(on_one.steps.values(), many.steps.values(), strict=True):
        assert each.cost.weights == pytest.approx(one.cost.weights / 4, rel=0.01)
        assert each.cost.flops == pytest.approx(one.cost.flops, rel=1e-6)  # each has one sequence


def test_the_smallest_card_is_the_first_that_fits(on_one):
    for method, step in on_one.steps.items():
        card = on_one.smallest_card(method)
        assert step.cost.memory <= card.memory * 0.95
        assert all(step.cost.memory > gpu.usable_memory for gpu in GPUS.values() if gpu.memory < card.memory)
    lora, quantized, full = on_one.steps
    sizes = [on_one.smallest_card(method).gigabytes for method in (lora, quantized, full)]
    assert sizes == [24, 16, 141]
    assert on_one.fits(lora) and not on_one.fits(full)


def test_nothing_holds_a_model_that_is_too_large(on_one):
    cost = dataclasses.replace(on_one.steps["LoRA"].cost, weights=10**12)
    huge = dataclasses.replace(on_one, steps={"LoRA": dataclasses.replace(on_one.steps["LoRA"], cost=cost)})
    assert huge.smallest_card("LoRA") is None and huge.as_dict()["steps"]["LoRA"]["smallest_card"] is None


def test_a_card_without_bfloat16_needs_more(on_one):
    def at(memory):
        cost = dataclasses.replace(on_one.steps["LoRA"].cost, weights=0, adapters=0, optimizer=0, saved_activations=0)
        step = dataclasses.replace(on_one.steps["LoRA"], cost=dataclasses.replace(cost, temporaries=memory))
        return dataclasses.replace(on_one, steps={"LoRA": step})

    assert at(7 * 10**9).fits("LoRA", GPUS["t4"]) and not at(8 * 10**9).fits("LoRA", GPUS["t4"])
    assert at(8 * 10**9).fits("LoRA", GPUS["rtx5080"])


def test_without_the_plugin_the_table_by_formulas_and_a_hint(tmp_path, monkeypatch, capsys):
    for module in ("gpu_plan", "gpu_aot"):
        monkeypatch.setattr(sys.modules[f"lojax.planner.{module}"], "has_gpu_compiler", lambda: False)
    out = tmp_path / "plan.json"
    arguments = ["--preset", "tiny", "--gpu", "h100", "--count", "2", "--seq", "256"]
    assert main(["plan", *arguments, "--json", str(out)]) == 0
    shown = capsys.readouterr().out
    for word in ("QLoRA (nf4)", "full fine-tuning", "2 × NVIDIA H100", "fits in 80.70 GB", "b200", "MEM_FRACTION=0.95"):
        assert word in shown
    assert 'pip install "lojax[gpu-plan]"' in shown
    kept = json.loads(out.read_text())
    assert kept["gpu"] == "h100" and kept["batch"] == 2 and kept["steps"]["LoRA"]["smallest_card"]
    assert kept["steps"]["LoRA"]["roofline_seconds"] is None  # which only compiled programs have
    with pytest.raises(RuntimeError, match="CUDA plugin, the GPU compiler, is not installed"):
        plan_gpus("tiny", gpu="l4", seq=64, compiled=True)


BAD = {
    "no such card": (["--gpu", "h10"], "gpu='h10' is not a known card; expected one of t4 (16 GB)"),
    "more than a host has": (["--gpu", "h100", "--count", "9"], "count=9; a host has 1 to 8 GPUs. For more, give"),
    "none": (["--gpu", "h100", "--count", "0"], "count=0; a host has 1 to 8 GPUs"),
    "no host": (["--gpu", "h100", "--hosts", "0"], "hosts=0; expected a whole number of at least 1"),
    "a slice as well": (["--gpu", "h100", "--topology", "v5e:2x2"], "leave out --topology and --search"),
    "a count of TPUs": (
        ["--topology", "v5e:2x2", "--mesh", "fsdp=4", "--count", "4"],
        "--count and --hosts are for GPUs",
    ),
    "another mesh": (["--gpu", "h100", "--mesh", "fsdp=4"], "needs 4 devices, but there are 1"),
    "batch": (["--gpu", "h100", "--count", "4", "--batch", "6"], "batch=6 is not a multiple of data × fsdp = 4"),
    "a count that does not divide": (["--gpu", "h100", "--count", "3"], "is not a multiple of 3"),
    "no such quantization": (["--gpu", "h100", "--quantize", "nf5"], "nf5"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments(name, capsys):
    arguments, message = BAD[name]
    assert main(["plan", "--preset", "tiny", *arguments, "--seq", "64", "--estimate"]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.slow
@compiles
def test_the_peak_is_what_the_compiled_step_takes():
    """Arguments, results and temporaries of the same steps, compiled here by hand."""
    found = plan_gpus(SMALL, gpu="l4", count=2, batch=4, seq=1024, compiled=True)
    decoder = Decoder(SMALL, gpu_mesh(GPUS["l4"], {"data": 1, "fsdp": 2, "tensor": 1}))
    model = lojax.wrap(decoder.total_loss, TARGETS, rank=16, alpha=32)
    tx, shape = optax.adam(1e-4), {"batch": 4, "seq": 1024}
    programs = (
        lora_step(model, decoder, tx, **shape),
        lora_step(model, decoder, tx, quantized="nf4", **shape),
        full_step(decoder, tx, **shape),
    )
    for step, program in zip(found.steps.values(), programs, strict=True):
        memory = program.lower().compile(compiler_options()).memory_analysis()
        total = memory.argument_size_in_bytes + memory.temp_size_in_bytes
        total += memory.output_size_in_bytes - memory.alias_size_in_bytes
        assert step.cost.memory == pytest.approx(total, rel=0.02)
        assert step.cost.collectives and step.cost.bytes_received and step.network == 0
        assert step.seconds > step.cost.flops / GPUS["l4"].flops


@pytest.mark.slow
@compiles
def test_between_hosts_only_gradients_travel():
    """Weights are gathered within a host; the gradients of what trains are summed over both."""
    found = plan_gpus(SMALL, gpu="a100", count=2, hosts=2, batch=4, seq=1024, compiled=True)
    lora, quantized, full = found.steps.values()
    kernels = SMALL.layers * (4 * 512 * 512 + 3 * 512 * 1024)
    factors = SMALL.layers * 16 * (4 * (512 + 512) + 3 * (512 + 1024))
    # The gradients of the factors, bfloat16, are summed over all four GPUs: of the sums of its own host, each GPU sends
    # a quarter and gets back a quarter.
    assert lora.network == pytest.approx(2 * 2 * factors / 4, rel=0.01)
    assert quantized.network == pytest.approx(lora.network, rel=0.05)
    assert 2 * kernels / 4 < full.network < 4 * (kernels + 2 * 4096 * 512)  # between one way and both, part float32


@compiles
def test_the_step_of_your_own_net():
    x, w = (jax.ShapeDtypeStruct((4096, 4096), jnp.bfloat16) for _ in range(2))
    cost = cost_on_gpu(lambda x, w: x @ w, x, w, gpu="a100")
    assert cost.bytes == 3 * 2 * 4096**2 and cost.flops == 2 * 4096**3
    assert cost.seconds == pytest.approx(2 * 4096**3 / 312e12)
