"""Packed sequences by index: row ``n`` of a shuffled endless stream is the same on every mesh.

So the batch of a step depends only on the number of the step, a process reads only the rows of its own devices, and a
run that is resumed on other machines sees the same data. S positions a row.
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
    """Token lists: the paragraphs of a text, or random walks that can be learned where there is no text.

    The text is tokenized with the model's ``tokenizer.json``, or into bytes where there is none.
    """
    if file is None:
        rng = np.random.default_rng(0)
        walks = (np.cumsum(rng.integers(1, 3, rng.integers(8, 48))) % min(vocab, 97) for _ in range(512))
        return [list(map(int, walk)) for walk in walks]
    texts = [text.strip() for text in file.read_text(encoding="utf-8").split("\n\n") if text.strip()]
    if folder is not None and (folder / "tokenizer.json").exists():
        from tokenizers import Tokenizer

        return [encoding.ids for encoding in Tokenizer.from_file(str(folder / "tokenizer.json")).encode_batch(texts)]
    return [[byte % vocab for byte in text.encode()] for text in texts]


@dataclasses.dataclass(frozen=True)
class Packed:
    """Rows of several documents each, as a grain data source.

    Attributes:
        rows: For each row, its documents (or chunks of long ones).
        length: ``S``.
    """

    rows: Sequence[Sequence[Sequence[int]]]
    length: int

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """``tokens``, ``targets``, ``segments``, ``positions`` ``[S]``; ``weights`` are 0 at padding."""
        row = {name: np.zeros(self.length, np.float32 if name == "weights" else np.int32) for name in NAMES}
        start = 0
        for segment, document in enumerate(self.rows[index], 1):
            span = slice(start, start + len(document) - 1)
            row["tokens"][span], row["targets"][span] = document[:-1], document[1:]
            row["segments"][span], row["weights"][span] = segment, 1
            row["positions"][span] = np.arange(len(document) - 1)
            start = span.stop
        return row


def pack(documents: Sequence[Sequence[int]], length: int) -> Packed:
    """First fit: each document goes into the first row with enough room; long ones are split."""
    # Each chunk repeats the last token of the one before it, so that every next token is a target once.
    chunks = [d[i : i + length + 1] for d in documents for i in range(0, len(d) - 1, length)]
    rows: list[list[Sequence[int]]] = []
    room: list[int] = []
    for chunk in chunks:
        need = len(chunk) - 1
        # Only the last 64 rows are searched, so that packing takes linear time.
        fit = next((i for i, free in enumerate(room[-64:], max(0, len(room) - 64)) if free >= need), None)
        if fit is None:
            rows.append([])
            room.append(length)
            fit = len(rows) - 1
        rows[fit].append(chunk)
        room[fit] -= need
    if not rows:
        raise ValueError("The data has no document of two or more tokens.")
    return Packed(rows, length)


def batches(
    source: Packed, sharding: NamedSharding, *, batch: int, accumulation_steps: int, seed: int, start: int, stop: int
) -> Iterator[dict[str, jax.Array]]:
    """The batches of steps ``start`` to ``stop``, each array ``[A, batch/A, S]``, or ``[batch, S]`` for A = 1.

    Args:
        source: The rows.
        sharding: The sharding of such an array.
        batch: Rows in a step, over all processes.
        accumulation_steps: The number A of microbatches.
        seed: The seed of the shuffling.
        start: The first step.
        stop: The step after the last.
    """
    rows = grain.MapDataset.source(source).shuffle(seed=seed).repeat()
    shape = (batch, source.length)
    if accumulation_steps > 1:
        shape = (accumulation_steps, batch // accumulation_steps, source.length)
    numbers = np.arange(batch).reshape(shape[:-1])
    indices = sharding.addressable_devices_indices_map(shape).values()
    local_rows = sorted({int(n) for index in indices for n in numbers[index[:-1]].ravel()})

    def read(step: int) -> dict[int, dict[str, np.ndarray]]:
        return {n: rows[step * batch + n] for n in local_rows}

    steps = grain.MapDataset.range(start, stop).map(read)
    for row_by_number in steps.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)):

        def make_array(name: str, row_by_number: dict = row_by_number) -> jax.Array:
            def read_shard(index: tuple[slice, ...]) -> np.ndarray:
                shard_rows = numbers[index[:-1]]
                values = np.stack([row_by_number[int(n)][name] for n in shard_rows.ravel()])
                return values.reshape(*shard_rows.shape, -1)[..., index[-1]]

            return jax.make_array_from_callback(shape, sharding, read_shard)

        yield {name: make_array(name) for name in NAMES}
