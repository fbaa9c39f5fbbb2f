"""Packed sequences, found by number: row ``n`` of a shuffled endless stream is the same on every mesh.

So a step's batch depends on the step alone, a process reads only the rows of its own devices, and a run that is
taken up again on other machines sees the data it would have seen. S positions a row.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

import grain
import jax
import numpy as np
from jax.sharding import NamedSharding

NAMES = ("tokens", "targets", "segments", "positions", "weights")


def documents(file: Path | None, folder: Path | None, vocab: int) -> list[list[int]]:
    """Token lists: the blank-line-separated parts of a text, or else random walks that can be learned.

    The text is read with the model's ``tokenizer.json`` where it has one, and byte by byte where it has none.
    """
    if file is None:
        rng = np.random.default_rng(0)
        walks = (np.cumsum(rng.integers(1, 3, rng.integers(8, 48))) % min(vocab, 97) for _ in range(512))
        return [list(map(int, walk)) for walk in walks]
    texts = [text.strip() for text in file.read_text(encoding="utf-8").split("\n\n") if text.strip()]
    if folder is not None and (folder / "tokenizer.json").exists():
        from tokenizers import Tokenizer

        return [found.ids for found in Tokenizer.from_file(str(folder / "tokenizer.json")).encode_batch(texts)]
    return [[byte % vocab for byte in text.encode()] for text in texts]


@dataclasses.dataclass(frozen=True)
class Packed:
    """Rows of several documents each, as a source that grain can read in any order.

    Attributes:
        rows: For each row, the documents (or parts of long ones) that fill it.
        length: ``S``.
    """

    rows: Sequence[Sequence[Sequence[int]]]
    length: int

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """``tokens``, ``targets``, ``segments``, ``positions`` ``[S]``; ``weights`` are 0 where nothing follows."""
        row = {name: np.zeros(self.length, np.float32 if name == "weights" else np.int32) for name in NAMES}
        start = 0
        for segment, document in enumerate(self.rows[index], 1):
            here = slice(start, start + len(document) - 1)
            row["tokens"][here], row["targets"][here] = document[:-1], document[1:]
            row["segments"][here], row["weights"][here] = segment, 1
            row["positions"][here] = np.arange(len(document) - 1)
            start = here.stop
        return row


def pack(found: Sequence[Sequence[int]], length: int) -> Packed:
    """First fit: each document goes into the first row with room; long ones are cut."""
    parts = [d[i : i + length + 1] for d in found for i in range(0, len(d) - 1, length)]
    rows: list[list[Sequence[int]]] = []
    room: list[int] = []
    for part in parts:
        need = len(part) - 1
        place = next((i for i, free in enumerate(room[-64:], max(0, len(room) - 64)) if free >= need), None)
        if place is None:
            rows.append([])
            room.append(length)
            place = len(rows) - 1
        rows[place].append(part)
        room[place] -= need
    if not rows:
        raise ValueError("The data holds no document of two tokens or more.")
    return Packed(rows, length)


def batches(
    source: Packed, sharding: NamedSharding, *, batch: int, micro: int, seed: int, start: int, stop: int
) -> Iterator[dict[str, jax.Array]]:
    """The batches of steps ``start`` to ``stop``, each array ``[micro, batch/micro, S]`` (no first axis for one part).

    Args:
        source: The rows.
        sharding: How such an array lies on the mesh.
        batch: Rows in a step, over all processes.
        micro: Parts that the batch is cut into.
        seed: Of the shuffling.
        start: The first step.
        stop: The step after the last.
    """
    rows = grain.MapDataset.source(source).shuffle(seed=seed).repeat()
    shape = (batch, source.length) if micro == 1 else (micro, batch // micro, source.length)
    numbers = np.arange(batch).reshape(shape[:-1])
    indices = sharding.addressable_devices_indices_map(shape).values()
    mine = sorted({int(n) for index in indices for n in numbers[index[:-1]].ravel()})

    def read(step: int) -> dict[int, dict[str, np.ndarray]]:
        return {n: rows[step * batch + n] for n in mine}

    steps = grain.MapDataset.range(start, stop).map(read)
    for found in steps.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)):

        def placed(name: str, found: dict = found) -> jax.Array:
            def part(index: tuple[slice, ...]) -> np.ndarray:
                here = numbers[index[:-1]]
                chosen = np.stack([found[int(n)][name] for n in here.ravel()])
                return chosen.reshape(*here.shape, -1)[..., index[-1]]

            return jax.make_array_from_callback(shape, sharding, part)

        yield {name: placed(name) for name in NAMES}
