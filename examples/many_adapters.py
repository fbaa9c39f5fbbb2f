"""Serves a dozen adapters of one base in one batch: from disk, one program, swaps that compile nothing.

    python examples/many_adapters.py                    # a random decoder, a minute on two CPU cores, no download
    python examples/many_adapters.py --requests 640 --batch 32

It writes a dozen adapters (half in the layout of Hugging Face PEFT, half as lojax checkpoints, with several ranks,
alphas and targets), reads them back, and stacks them into a bank. Requests for all of them, and for the base alone,
come in one batch and are answered by one jitted function with a KV cache, while new versions of adapters are swapped
in. It prints requests a second against one adapter at a time and against a merged copy of the base for each adapter,
and checks every answer against its own adapter alone. The adapters are random: they stand for trained ones.

Letters in shapes: B rows, T tokens, S positions of the cache, L layers, D width, H heads, K head width, V vocabulary.
"""

import argparse
import copy
import itertools
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import lojax

Array = jax.Array
Tree = Any
ROOM = 8
"""The rank of every place in the bank: the largest that a new version may have."""


class Sizes(NamedTuple):
    """The decoder, and the lengths of a request."""

    layers: int = 3
    width: int = 512
    heads: int = 8
    inner: int = 1408
    vocabulary: int = 512
    prompt: int = 16
    answer: int = 12

    @property
    def head_width(self) -> int:
        """K."""
        return self.width // self.heads


class Request(NamedTuple):
    """A prompt ``[T]`` for one adapter; None is the base alone."""

    adapter: str | None
    prompt: np.ndarray


# --- the decoder: a pure function of its parameters, with its cache as an argument ---


def make_base(sizes: Sizes) -> Tree:
    """Random parameters with the names of a Llama; the layers are one stack, as `lax.scan` takes them."""
    d, f = sizes.width, sizes.inner
    projections = {"self_attn": dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), (d, d))}
    projections["mlp"] = {"gate_proj": (d, f), "up_proj": (d, f), "down_proj": (f, d)}
    rng = np.random.default_rng(0)

    def draw(shape: tuple[int, ...]) -> Array:
        return jnp.asarray(rng.normal(size=shape) / np.sqrt(shape[-2]), jnp.float32)

    layers = {
        block: {name: {"kernel": draw((sizes.layers, *shape))} for name, shape in names.items()}
        for block, names in projections.items()
    }
    embedding, head = draw((sizes.vocabulary, d)), draw((d, sizes.vocabulary))
    return {"embed_tokens": {"embedding": embedding}, "layers": layers, "lm_head": {"kernel": 4 * head}}


def empty_cache(sizes: Sizes, rows: int) -> Tree:
    """Keys and values of every layer, ``[L, B, S, H, K]``."""
    shape = (sizes.layers, rows, sizes.prompt + sizes.answer, sizes.heads, sizes.head_width)
    return {"k": jnp.zeros(shape), "v": jnp.zeros(shape)}


def normalize(x: Array) -> Array:
    """RMS norm without a scale."""
    return x * lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-6)


def rotate(x: Array, positions: Array) -> Array:
    """Rotary position embedding of ``x [B, T, H, K]``."""
    half = x.shape[-1] // 2
    angles = positions[:, None, None] * 10000.0 ** (-jnp.arange(half) / half)
    left, right = x[..., :half], x[..., half:]
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    return jnp.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1)


def make_decoder(sizes: Sizes) -> Callable[..., Any]:
    """``decode(params, tokens [B, T], cache, start) -> (logits [B, T, V], cache)``.

    The tokens are those at the positions from ``start`` on: a whole prompt, or one token while decoding.
    """

    def layer(x: Array, p: Tree, cache: Tree, start: Array) -> tuple[Array, Tree]:
        y, attention = normalize(x), p["self_attn"]
        q, k, v = ((y @ attention[f"{name}_proj"]["kernel"]).reshape(*x.shape[:2], sizes.heads, -1) for name in "qkv")
        positions = start + jnp.arange(x.shape[1])
        q, k = rotate(q, positions), rotate(k, positions)
        write = lambda old, new: lax.dynamic_update_slice_in_dim(old, new, start, axis=1)
        cache = {"k": write(cache["k"], k), "v": write(cache["v"], v)}
        seen = jnp.arange(cache["k"].shape[1]) <= positions[:, None]
        mixed = jax.nn.dot_product_attention(q, cache["k"], cache["v"], mask=seen[None, None])
        x = x + mixed.reshape(x.shape) @ attention["o_proj"]["kernel"]
        y, mlp = normalize(x), p["mlp"]
        inner = jax.nn.silu(y @ mlp["gate_proj"]["kernel"]) * (y @ mlp["up_proj"]["kernel"])
        return x + inner @ mlp["down_proj"]["kernel"], cache

    def decode(params: Tree, tokens: Array, cache: Tree, start: Array | int) -> tuple[Array, Tree]:
        x = params["embed_tokens"]["embedding"][tokens]
        step = lambda x, layer_and_cache: layer(x, *layer_and_cache, start)
        x, cache = lax.scan(step, x, (params["layers"], cache))
        return normalize(x) @ params["lm_head"]["kernel"], cache

    return decode


def generate(decode: Callable[..., Any], sizes: Sizes, prompts: Array) -> Array:
    """The most likely tokens ``[B, answer]`` after prompts ``[B, T]``; ``decode(tokens, cache, start)``."""
    logits, cache = decode(prompts, empty_cache(sizes, len(prompts)), 0)

    def step(carry: tuple[Array, Tree], position: Array) -> tuple[tuple[Array, Tree], Array]:
        token, cache = carry
        logits, cache = decode(token[:, None], cache, position)
        return (jnp.argmax(logits[:, -1], axis=-1), cache), token

    first = jnp.argmax(logits[:, -1], axis=-1)
    _, tokens = lax.scan(step, (first, cache), sizes.prompt + jnp.arange(sizes.answer))
    return tokens.T


# --- adapters on disk ---

TARGETS = {"attention": ("layers/self_attn/*/kernel",), "all": ("layers/*/*/kernel",)}


def make_adapter(decode: Callable[..., Any], frozen: Tree, number: int) -> Tree:
    """An adapter of one of several ranks, alphas and targets, random as no fresh one is."""
    rank, alpha = (2, 3, 4, 8)[number % 4], (4, 8, 16, 24, 32)[number % 5]
    targets = TARGETS["all" if number % 3 else "attention"]
    model = lojax.wrap(decode, targets, rank=rank, alpha=alpha, axes=("stack", "in", "out"))
    _, lora = model.init(jax.random.key(number), frozen)
    rng = np.random.default_rng(number)
    return jax.tree.map(lambda x: x + jnp.asarray(0.15 * rng.normal(size=x.shape), x.dtype), lora)


def write_adapter(folder: Path, lora: Tree, frozen: Tree, *, as_peft: bool) -> None:
    """Writes an adapter as Hugging Face PEFT reads it, or as a lojax checkpoint."""
    if as_peft:
        lojax.peft.save(folder, lora, frozen, "llama")
    else:
        lojax.save(folder, lora, frozen=frozen)


def read_adapter(folder: Path, frozen: Tree) -> Tree:
    """Reads an adapter of either layout; that of PEFT has an ``adapter_config.json``."""
    if (folder / "adapter_config.json").exists():
        return lojax.peft.load(folder, frozen, "llama")
    return lojax.restore(folder, frozen=frozen)


# --- serving ---


class Server:
    """One base and a bank on the device, and one jitted function that answers a batch of mixed requests."""

    def __init__(self, sizes: Sizes, frozen: Tree, adapters: dict[str, Tree]):
        self.frozen = frozen
        self.bank = lojax.stack(list(adapters.values()), names=list(adapters), rank=ROOM)
        self.compilations = 0
        model = lojax.wrap(make_decoder(sizes), TARGETS["all"])

        def answer(frozen: Tree, bank: lojax.Bank, prompts: Array, ids: Array) -> Array:
            self.compilations += 1  # a jitted function runs in Python once for each compilation

            def decode(tokens: Array, cache: Tree, start: Array | int) -> tuple[Array, Tree]:
                # Rows are the first axis of the tokens and the second of the cache, and all have the same start.
                return model.apply(frozen, bank, tokens, cache, start, adapter=ids, batch_axes=(0, 1, None))

            return generate(decode, sizes, prompts)

        self._answer = jax.jit(answer)

    def answer(self, requests: list[Request]) -> np.ndarray:
        """The tokens ``[B, answer]`` for a batch of requests."""
        prompts = jnp.asarray(np.stack([request.prompt for request in requests]))
        ids = self.bank.ids([request.adapter for request in requests])
        return np.asarray(self._answer(self.frozen, self.bank, prompts, ids))

    def swap(self, name: str, lora: Tree) -> None:
        """Puts a new version of an adapter in the place of the old one, between two batches."""
        self.bank = self.bank.replace(name, lora)


class OneAtATime:
    """The same answers with one set of parameters for each adapter: the rows of a batch are grouped by adapter."""

    def __init__(self, sizes: Sizes, answer: Callable[..., Any], params: dict[str | None, Tree]):
        self.params, self._answer = params, jax.jit(answer)

    def answer(self, requests: list[Request]) -> np.ndarray:
        """The tokens ``[B, answer]`` for a batch of requests."""
        found: list[Any] = [None] * len(requests)
        groups: dict[str | None, list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault(request.adapter, []).append(i)
        for name, rows in groups.items():
            # Each number of rows is another program, so groups are padded to a power of two.
            padded = rows + rows[:1] * (2 ** (len(rows) - 1).bit_length() - len(rows))
            prompts = jnp.asarray(np.stack([requests[i].prompt for i in padded]))
            for i, tokens in zip(rows, np.asarray(self._answer(self.params[name], prompts)), strict=False):
                found[i] = tokens
        return np.stack(found)


def make_peers(sizes: Sizes, frozen: Tree, adapters: dict[str, Tree]) -> dict[str, OneAtATime]:
    """The two other ways: adapters conformed to each other and one at a time, and a merged copy for each."""
    decode = make_decoder(sizes)
    model = lojax.wrap(decode, TARGETS["all"], rank=ROOM, axes=("stack", "in", "out"))
    # A fresh adapter of the largest rank and of all targets: every other can be written in its form.
    like = model.init(jax.random.key(0), frozen)[1]

    def with_lora(lora: Tree, prompts: Array) -> Array:
        return generate(lambda *args: model.apply(frozen, lora, *args), sizes, prompts)

    def merged(params: Tree, prompts: Array) -> Array:
        return generate(lambda *args: decode(params, *args), sizes, prompts)

    loras: dict[str | None, Tree] = {name: lojax.conform(lora, like) for name, lora in adapters.items()}
    copies: dict[str | None, Tree] = {name: lojax.merge(frozen, lora) for name, lora in adapters.items()}
    return {
        "one adapter at a time": OneAtATime(sizes, with_lora, {**loras, None: like}),
        "merged copies": OneAtATime(sizes, merged, {**copies, None: frozen}),
    }


def make_requests(sizes: Sizes, names: list[str], count: int) -> list[Request]:
    """Requests for all adapters and for the base alone, in random order."""
    rng = np.random.default_rng(1)
    tasks: list[str | None] = [*names, None]
    prompts = rng.integers(0, sizes.vocabulary, (count, sizes.prompt), dtype=np.int32)
    return [Request(tasks[i], prompt) for i, prompt in zip(rng.integers(0, len(tasks), count), prompts, strict=True)]


def batches(requests: list[Request], size: int) -> Iterator[list[Request]]:
    """The requests in batches of one size."""
    return (requests[i : i + size] for i in range(0, len(requests) - size + 1, size))


def serve(
    servers: dict[str, Callable[..., Any]], requests: list[Request], size: int
) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """The answers of each server, and its requests a second once it has compiled.

    The servers take turns batch by batch, so that a busy machine slows all of them.
    """
    answers = {name: np.concatenate([f(rows) for rows in batches(requests, size)]) for name, f in servers.items()}
    seconds = dict.fromkeys(servers, 0.0)
    for rows in batches(requests, size):
        for name, answer in servers.items():
            start = time.perf_counter()
            answer(rows)
            seconds[name] += time.perf_counter() - start
    return answers, {name: len(answers[name]) / total for name, total in seconds.items()}


def largest_gap(sizes: Sizes, frozen: Tree, lora: Tree | None, prompts: np.ndarray, answers: np.ndarray) -> float:
    """How far the logit of any token of the answers is below the largest, by the merged net on whole texts.

    One pass over prompt and answer, and no token by token: 0 but for rounding if every answer is that of its adapter.
    """
    texts = np.concatenate([prompts, answers], axis=1)
    params = frozen if lora is None else lojax.merge(frozen, lora)
    logits, _ = make_decoder(sizes)(params, jnp.asarray(texts), empty_cache(sizes, len(texts)), 0)
    predictions = np.asarray(logits)[:, sizes.prompt - 1 : -1]
    own = np.take_along_axis(predictions, answers[..., None], axis=-1)[..., 0]
    return float(np.max(predictions.max(axis=-1) - own))


def check_answers(
    sizes: Sizes, frozen: Tree, adapters: dict[str, Tree], requests: list[Request], answers: np.ndarray
) -> float:
    """The `largest_gap` over all adapters, each on the requests that name it."""
    gaps = [0.0]
    for name in [*adapters, None]:
        rows = [i for i in range(len(answers)) if requests[i].adapter == name]
        if rows:
            prompts = np.stack([requests[i].prompt for i in rows])
            gaps.append(largest_gap(sizes, frozen, adapters.get(name or ""), prompts, answers[rows]))
    return max(gaps)


def megabytes(tree: Tree) -> float:
    """The size of all arrays, each counted once."""
    return sum({id(x): x.nbytes for x in jax.tree.leaves(tree)}.values()) / 1e6


def with_swaps(server: Server, files: list[Path], seconds: list[float]) -> Callable[..., Any]:
    """`Server.answer`, where before each batch a new version of an adapter is read and swapped in."""
    following = itertools.cycle(files)

    def answer(requests: list[Request]) -> np.ndarray:
        file = next(following)
        lora = read_adapter(file, server.frozen)
        start = time.perf_counter()
        server.swap(file.name, lora)
        jax.block_until_ready(server.bank)
        seconds.append(time.perf_counter() - start)
        return server.answer(requests)

    return answer


def write_and_read(folder: Path, decode: Callable[..., Any], frozen: Tree, numbers: range) -> dict[str, Tree]:
    """Adapters on disk, the even ones as PEFT and the odd ones as checkpoints, and what is read from there."""
    found = {}
    for place, number in enumerate(numbers):
        name = f"task-{place:02d}"
        write_adapter(folder / name, make_adapter(decode, frozen, number), frozen, as_peft=place % 2 == 0)
        found[name] = read_adapter(folder / name, frozen)
    return found


def run(sizes: Sizes, folder: Path, *, adapters: int, requests: int, batch: int) -> dict[str, float]:
    """Serves, swaps, compares and checks; what it measured, by name."""
    frozen, decode = make_base(sizes), make_decoder(sizes)
    loaded = write_and_read(folder / "first", decode, frozen, range(adapters))
    newer = write_and_read(folder / "second", decode, frozen, range(adapters, 2 * adapters))
    ranks = sorted({leaf.rank for lora in loaded.values() for leaf in jax.tree.leaves(lora, is_leaf=is_adapter)})
    print(f"{2 * adapters} adapters read from disk, half of them PEFT's, ranks {ranks}.", flush=True)

    queue = make_requests(sizes, list(loaded), requests)
    server = Server(sizes, frozen, loaded)
    swapped = copy.copy(server)  # another bank, the same jitted function
    peers, swaps = make_peers(sizes, frozen, loaded), []
    servers = {
        "one batch of mixed adapters": server.answer,
        "the same, a swap before each batch": with_swaps(swapped, [folder / "second" / name for name in newer], swaps),
        **{name: peer.answer for name, peer in peers.items()},
    }
    answers, rates = serve(servers, queue, batch)
    del answers["the same, a swap before each batch"]  # some of the old versions and some of the new
    gap = max(check_answers(sizes, frozen, loaded, queue, found) for found in answers.values())
    for name, lora in newer.items():
        swapped.swap(name, lora)
    after = np.concatenate([swapped.answer(rows) for rows in batches(queue, batch)])
    gap = max(gap, check_answers(sizes, frozen, newer, queue, after))

    banked = megabytes((frozen, server.bank))
    conformed, copies = (megabytes([frozen, *peer.params.values()]) for peer in peers.values())
    print(f"\n{'':36}requests/s   MB on the device")
    for (name, rate), size in zip(rates.items(), (banked, banked, conformed, copies), strict=True):
        print(f"{name:36}{rate:10.1f}{size:19.1f}")
    print(f"\nA swap takes {1e3 * np.median(swaps):.1f} ms once its file is read.")
    print(f"Compilations for {2 * adapters} adapters: {server.compilations}.")
    print(f"The logit of no token of an answer is more than {gap:.1e} below the largest of its own merged net.")
    if server.compilations != 1 or not gap < 1e-3:
        raise SystemExit("An answer is not that of its adapter, or a swap compiled.")
    return {**rates, "compilations": server.compilations, "gap": gap}


def is_adapter(leaf: Any) -> bool:
    """Whether a leaf of a ``lora`` tree is a low-rank update."""
    return isinstance(leaf, lojax.Adapter)


SMOKE = Sizes(layers=2, width=32, heads=2, inner=48, vocabulary=64, prompt=4, answer=4)


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Reads the command line and runs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", type=int, default=12)
    parser.add_argument("--requests", type=int, default=48)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--out", type=Path, help="where adapters are written; default: a directory that goes away")
    parser.add_argument("--smoke", action="store_true", help="a tiny net and few requests")
    args = parser.parse_args(argv)
    sizes, requests, batch = (SMOKE, 12, 4) if args.smoke else (Sizes(), args.requests, args.batch)
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.out or Path(temporary)
        return run(sizes, folder, adapters=args.adapters, requests=requests, batch=batch)


if __name__ == "__main__":
    main()
