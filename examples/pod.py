"""LoRA on a Llama, the same script on a laptop, eight GPUs, or a TPU pod.

    python examples/pod.py --devices 8 --mesh data=2,fsdp=2,tensor=2            # a tiny random model, eight CPU devices
    python examples/pod.py --model ~/Llama-3-8B --mesh fsdp=16 --text data.txt  # on every host of a v5e:4x4

Every process reads only its own slices of the weights; adapters and optimizer state lie as the weights do. A run
that is killed, or told to go (SIGTERM), goes on from its last checkpoint when it is started again, on any mesh.
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
    parser.add_argument("--model", type=Path, help="a Hugging Face model directory; a tiny random model without")
    parser.add_argument("--text", type=Path, help="training text, documents parted by blank lines; made up without")
    parser.add_argument("--out", type=Path, default=Path("pod_run"), help="checkpoints and losses (%(default)s)")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--batch", type=int, default=16, help="rows a step, over all processes (%(default)s)")
    parser.add_argument("--micro", type=int, default=2, help="parts of a batch, worked off in turn (%(default)s)")
    parser.add_argument("--seq", type=int, default=64, help="positions a row (%(default)s)")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--alpha", type=float, default=16)
    parser.add_argument("--rate", type=float, default=1e-2, help="the learning rate (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save-every", type=int, default=10, help="steps between checkpoints (%(default)s)")
    parser.add_argument("--dtype", default="bfloat16", help="of the frozen weights (%(default)s)")
    parser.add_argument("--peak", type=float, help="TFLOP/s of one chip, for the MFU; known for TPUs")
    parser.add_argument("--devices", type=int, help="virtual CPU devices, to try it on a laptop")
    parser.add_argument("--coordinator", help="HOST:PORT of process 0, where JAX cannot find out by itself")
    parser.add_argument("--processes", type=int, help="their number; with --coordinator")
    parser.add_argument("--process", type=int, help="the number of this one; with --coordinator")
    parser.add_argument("--distributed", action="store_true", help="several processes that find each other (TPU pods)")
    return parser.parse_args(argv)


def start_jax(args: argparse.Namespace) -> None:
    """Before JAX is first used: virtual devices, and the other processes."""
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
    """Trains, and returns the losses of the steps that this call took."""
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
    from lojax.planner.decoder_config import preset, read_config
    from lojax.planner.plan import check_batch
    from lojax.planner.train_step import train_step
    from lojax.sharding.consistency import check_agreement
    from lojax.sharding.shardings import init_sharded, shardings

    axes = parse_mesh(args.mesh, jax.device_count())
    if args.batch % args.micro:
        raise ValueError(f"batch={args.batch} does not divide into micro={args.micro} parts.")
    check_batch(axes, args.batch // args.micro, args.seq)
    mesh = jax.make_mesh(tuple(axes.values()), AXES, axis_types=(AxisType.Auto,) * 3)
    config = read_config(args.model) if args.model else preset("tiny")
    decoder = Decoder(config, mesh)
    dtype = jnp.dtype(args.dtype)
    chief = jax.process_index() == 0

    if args.model:
        params = load(args.model, decoder, dtype)
    else:
        params = jax.jit(lambda key: decoder.init(key, dtype))(jax.random.key(args.seed))
    model = lojax.wrap(decoder.total_loss, TARGETS, rank=args.rank, alpha=args.alpha, strict=True)
    example = {name: jnp.ones((args.batch // args.micro, args.seq), jnp.int32) for name in ("tokens", "targets")}
    example["weights"] = jnp.ones((args.batch // args.micro, args.seq))
    frozen, lora = init_sharded(model, jax.random.key(args.seed), params, example)
    check_agreement(lora)

    tx = optax.adamw(args.rate, weight_decay=0.0)
    placed = shardings(frozen, lora, jax.eval_shape(tx.init, lora))
    opt_state = jax.jit(tx.init, out_shardings=placed.opt_state)(lora)
    checkpoints = Checkpoints(args.out / "checkpoints", every=args.save_every)
    begin, (lora, opt_state) = checkpoints.latest((lora, opt_state), (placed.lora, placed.opt_state))
    if chief:
        print(lojax.summary(frozen, lora).line)
        print(f"{jax.process_count()} processes, {jax.device_count()} {jax.devices()[0].device_kind}; mesh {axes}")
        print(f"from step {begin}" if begin else "from the start")

    source = pack(documents(args.text, args.model, config.vocab), args.seq)
    data_sharding = NamedSharding(mesh, decoder.spec(*([BATCH] if args.micro == 1 else [None, BATCH])))
    stream = batches(
        source, data_sharding, batch=args.batch, micro=args.micro, seed=args.seed, start=begin, stop=args.steps
    )
    step = train_step(model.apply, tx, micro=args.micro)
    jitted = jax.jit(step, donate_argnums=(1, 2), out_shardings=(placed.lora, placed.opt_state, None))
    meter = Meter(args, step)

    asked_to_go = []
    before = signal.signal(signal.SIGTERM, lambda *_: asked_to_go.append(True))
    losses: list[float] = []
    bar = tqdm(stream, total=args.steps, initial=begin, disable=not chief, desc="steps")
    for number, batch in enumerate(bar, begin + 1):
        meter.start(frozen, lora, opt_state, batch)
        lora, opt_state, loss = jitted(frozen, lora, opt_state, batch)
        losses.append(float(loss))
        bar.set_postfix_str(meter.stop(losses[-1]))
        if chief:
            with open(args.out / "losses.jsonl", "a") as log:
                log.write(json.dumps({"step": number, "loss": losses[-1]}) + "\n")
        leaving = checkpoints.told_to_go(number, bool(asked_to_go))
        checkpoints.save(number, (lora, opt_state), force=leaving or number == args.steps)
        if leaving:
            if chief:
                print(f"told to go: saved step {number}")
            break
    checkpoints.close()
    signal.signal(signal.SIGTERM, before)
    return losses


class Meter:
    """Tokens a second, and the share of the chips' peak that the step's operations come to."""

    def __init__(self, args: argparse.Namespace, step: Any):
        """Counts the operations of ``step`` once, at the first batch."""
        self.args, self.step, self.flops, self.began = args, step, 0, 0.0

    def start(self, *trees: Any) -> None:
        """Before a step."""
        import jax

        from lojax.planner.flops import count_flops

        if not self.flops:
            shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), trees)
            self.flops = count_flops(self.step, *shapes)
        self.began = time.perf_counter()

    def stop(self, loss: float) -> str:
        """After a step whose loss has arrived: what to show."""
        seconds = time.perf_counter() - self.began
        text = f"loss {loss:.4f}, {self.args.batch * self.args.seq / seconds:,.0f} tokens/s"
        rate, peak = self.flops / seconds, peak_flops(self.args)
        return f"{text}, MFU {rate / peak:.1%}" if peak else f"{text}, {rate / 1e9:,.1f} GFLOP/s"


def peak_flops(args: argparse.Namespace) -> float:
    """The operations a second that all chips could do; 0 where that is not known."""
    import jax

    from lojax.planner.chips import CHIPS

    if args.peak:
        return args.peak * 1e12 * jax.device_count()
    names = {"TPU v4": "v4", "TPU v5 lite": "v5e", "TPU v5": "v5p", "TPU v5p": "v5p", "TPU v6 lite": "v6e"}
    name = names.get(jax.devices()[0].device_kind)
    return CHIPS[name].flops * jax.device_count() if name else 0.0


def main(argv: list[str] | None = None) -> list[float]:
    """Runs one process of the job."""
    args = arguments(argv)
    start_jax(args)
    args.out.mkdir(parents=True, exist_ok=True)
    losses = run(args)
    if len(losses) >= 10:
        first, last = sum(losses[:3]) / 3, sum(losses[-3:]) / 3
        print(f"loss {first:.4f} -> {last:.4f}")
        assert last < first, "The loss did not fall."
    return losses


if __name__ == "__main__":
    main()
