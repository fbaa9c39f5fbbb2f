"""LoRA on a Llama, the same script on a laptop, eight GPUs, or a TPU pod.

    python examples/pod.py --devices 8 --mesh data=2,fsdp=2,tensor=2            # a tiny random model, eight CPU devices
    python examples/pod.py --model ~/Llama-3-8B --mesh fsdp=16 --text data.txt  # on every host of a v5e:4x4

Every process reads only its own slices of the weights; adapters and optimizer state are sharded like the weights. A
run that is killed or preempted (SIGTERM) resumes from its last checkpoint when it is started again, on any mesh.
"""

import argparse
import json
import os
import signal
import time
from pathlib import Path
from typing import Any

AXES = ("data", "fsdp", "tensor")


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mesh", default="fsdp=8", help="data=..,fsdp=..,tensor=.. (%(default)s)")
    parser.add_argument("--model", type=Path, help="a Hugging Face model directory; default: a tiny random model")
    parser.add_argument("--text", type=Path, help="training text, documents separated by blank lines; default: made up")
    parser.add_argument("--out", type=Path, default=Path("pod_run"), help="checkpoints and losses (%(default)s)")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--batch", type=int, default=16, help="rows a step, over all processes (%(default)s)")
    parser.add_argument("--accumulation-steps", type=int, default=2, help="microbatches a step (%(default)s)")
    parser.add_argument("--seq", type=int, default=64, help="positions a row (%(default)s)")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--alpha", type=float, default=16)
    parser.add_argument("--rate", type=float, default=1e-2, help="the learning rate (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save-every", type=int, default=10, help="steps between checkpoints (%(default)s)")
    parser.add_argument("--dtype", default="bfloat16", help="dtype of the frozen weights (%(default)s)")
    parser.add_argument("--peak", type=float, help="peak TFLOP/s of one device, for the MFU; known for TPUs")
    parser.add_argument("--devices", type=int, help="virtual CPU devices, to try it on a laptop")
    parser.add_argument("--coordinator", help="HOST:PORT of process 0, where JAX cannot detect it")
    parser.add_argument("--processes", type=int, help="the number of processes; with --coordinator")
    parser.add_argument("--process", type=int, help="the index of this process; with --coordinator")
    parser.add_argument("--distributed", action="store_true", help="several processes that JAX detects (TPU pods)")
    return parser.parse_args(argv)


def start_jax(args: argparse.Namespace) -> None:
    """Sets up virtual devices and the other processes, before JAX is first used."""
    if args.devices:
        flag = f"--xla_force_host_platform_device_count={args.devices}"
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}"
        os.environ["JAX_PLATFORMS"] = "cpu"
    import jax

    if args.coordinator:
        jax.distributed.initialize(args.coordinator, args.processes, args.process)
    elif args.distributed:
        jax.distributed.initialize()


def run(args: argparse.Namespace) -> list[float]:
    """Trains, and returns the losses of the steps of this call."""
    import jax
    import jax.numpy as jnp
    import optax
    from jax.sharding import AxisType, NamedSharding
    from pod_checkpoint import Checkpoints
    from pod_data import batches, documents, pack
    from pod_weights import load
    from tqdm import tqdm

    import lojax
    from lojax.planner.chips import parse_mesh
    from lojax.planner.decoder import BATCH, TARGETS, Decoder
    from lojax.planner.decoder_config import open_config
    from lojax.planner.plan import check_batch
    from lojax.planner.train_step import train_step
    from lojax.sharding.consistency import check_agreement
    from lojax.sharding.shardings import init_sharded, shardings

    axes = parse_mesh(args.mesh, jax.device_count())
    if args.batch % args.accumulation_steps:
        raise ValueError(f"batch={args.batch} is not a multiple of accumulation_steps={args.accumulation_steps}.")
    microbatch = args.batch // args.accumulation_steps
    check_batch(axes, microbatch, args.seq)
    mesh = jax.make_mesh(tuple(axes.values()), AXES, axis_types=(AxisType.Auto,) * 3)
    config = open_config(args.model or "tiny")
    decoder = Decoder(config, mesh)
    dtype = jnp.dtype(args.dtype)
    is_main = jax.process_index() == 0

    if args.model:
        params = load(args.model, decoder, dtype)
    else:
        params = jax.jit(lambda key: decoder.init(key, dtype))(jax.random.key(args.seed))
    model = lojax.wrap(decoder.total_loss, TARGETS, rank=args.rank, alpha=args.alpha, strict=True)
    example = {name: jnp.ones((microbatch, args.seq), jnp.int32) for name in ("tokens", "targets")}
    example["weights"] = jnp.ones((microbatch, args.seq))
    frozen, lora = init_sharded(model, jax.random.key(args.seed), params, example)
    check_agreement(lora)

    tx = optax.adamw(args.rate, weight_decay=0.0)
    placed = shardings(frozen, lora, jax.eval_shape(tx.init, lora))
    opt_state = jax.jit(tx.init, out_shardings=placed.opt_state)(lora)
    checkpoints = Checkpoints(args.out / "checkpoints", every=args.save_every)
    first, (lora, opt_state) = checkpoints.latest((lora, opt_state), (placed.lora, placed.opt_state))
    if is_main:
        print(lojax.summary(frozen, lora).line)
        print(f"{jax.process_count()} processes, {jax.device_count()} {jax.devices()[0].device_kind}; mesh {axes}")
        print(f"resuming from step {first}" if first else "starting at step 0")

    source = pack(documents(args.text, args.model, config.vocab), args.seq)
    data_sharding = NamedSharding(mesh, decoder.spec(*([BATCH] if args.accumulation_steps == 1 else [None, BATCH])))
    stream = batches(
        source,
        data_sharding,
        batch=args.batch,
        accumulation_steps=args.accumulation_steps,
        seed=args.seed,
        start=first,
        stop=args.steps,
    )
    step = train_step(model.apply, tx, accumulation_steps=args.accumulation_steps)
    jitted = jax.jit(step, donate_argnums=(1, 2), out_shardings=(placed.lora, placed.opt_state, None))
    meter = Meter(args, step)

    signals = []
    previous_handler = signal.signal(signal.SIGTERM, lambda number, _: signals.append(number))
    losses: list[float] = []
    bar = tqdm(stream, total=args.steps, initial=first, disable=not is_main, desc="steps")
    for number, batch in enumerate(bar, first + 1):
        meter.start(frozen, lora, opt_state, batch)
        lora, opt_state, loss = jitted(frozen, lora, opt_state, batch)
        losses.append(float(loss))
        bar.set_postfix_str(meter.stop(losses[-1]))
        if is_main:
            with open(args.out / "losses.jsonl", "a") as log:
                log.write(json.dumps({"step": number, "loss": losses[-1]}) + "\n")
        preempted = checkpoints.is_preempted(number, bool(signals))
        checkpoints.save(number, (lora, opt_state), force=preempted or number == args.steps)
        if preempted:
            if is_main:
                print(f"preempted: saved step {number}")
            break
    checkpoints.close()
    signal.signal(signal.SIGTERM, previous_handler)
    return losses


class Meter:
    """Tokens a second, and the operations of the step as a fraction of the devices' peak."""

    def __init__(self, args: argparse.Namespace, step: Any):
        """Counts the operations of ``step`` once, at the first batch."""
        self.args, self.step, self.flops, self.started = args, step, 0, 0.0

    def start(self, *trees: Any) -> None:
        """Before a step."""
        import jax

        from lojax.planner.flops import count_flops

        if not self.flops:
            shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), trees)
            self.flops = count_flops(self.step, *shapes)
        self.started = time.perf_counter()

    def stop(self, loss: float) -> str:
        """After a step: the text for the progress bar. ``loss`` is a number, so the step has finished."""
        seconds = time.perf_counter() - self.started
        text = f"loss {loss:.4f}, {self.args.batch * self.args.seq / seconds:,.0f} tokens/s"
        rate, peak = self.flops / seconds, peak_flops(self.args)
        return f"{text}, MFU {rate / peak:.1%}" if peak else f"{text}, {rate / 1e9:,.1f} GFLOP/s"


def peak_flops(args: argparse.Namespace) -> float:
    """The peak FLOP/s of all devices; 0 where it is unknown."""
    import jax

    from lojax.planner.chips import CHIPS

    if args.peak:
        return args.peak * 1e12 * jax.device_count()
    chips = {"TPU v4": "v4", "TPU v5 lite": "v5e", "TPU v5": "v5p", "TPU v5p": "v5p", "TPU v6 lite": "v6e"}
    chip = chips.get(jax.devices()[0].device_kind)
    return CHIPS[chip].flops * jax.device_count() if chip else 0.0


def main(argv: list[str] | None = None) -> list[float]:
    """Runs one process of the job, and checks that the loss fell."""
    args = arguments(argv)
    start_jax(args)
    args.out.mkdir(parents=True, exist_ok=True)
    losses = run(args)
    if len(losses) >= 10:
        before, after = sum(losses[:3]) / 3, sum(losses[-3:]) / 3
        print(f"loss {before:.4f} -> {after:.4f}")
        assert after < before, "The loss did not fall."
    return losses


if __name__ == "__main__":
    main()
