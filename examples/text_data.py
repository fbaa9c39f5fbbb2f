"""From rows of text to arrays of one static shape.

Every row becomes exactly `length` tokens, so one compiled step serves every batch.
N rows, T = `length` tokens.
"""

import hashlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
from docstring_data import Row
from tokenizers import Tokenizer


class Split(NamedTuple):
    """Encoded rows: `tokens` and `mask` ``[N, T]`` int32, `labels` ``[N]`` int32."""

    tokens: np.ndarray
    mask: np.ndarray
    labels: np.ndarray


def encode(texts: list[str], tokenizer: str | Path, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokenizes texts, truncated or padded to one length.

    Args:
        texts: N strings.
        tokenizer: The path of a ``tokenizer.json``.
        length: T.

    Returns:
        ``(tokens, mask)``, both ``[N, T]`` int32; the mask is 1 at real tokens.
    """
    encoder = Tokenizer.from_file(str(tokenizer))
    padding = encoder.padding or {"pad_id": encoder.token_to_id("[PAD]") or 0, "pad_token": "[PAD]"}
    encoder.enable_truncation(length)
    encoder.enable_padding(length=length, pad_id=padding["pad_id"], pad_token=padding["pad_token"])
    rows = encoder.encode_batch(list(texts))
    tokens = np.array([row.ids for row in rows], np.int32).reshape(len(rows), length)
    mask = np.array([row.attention_mask for row in rows], np.int32).reshape(len(rows), length)
    return tokens, mask


def encode_rows(rows: list[Row], classes: list[str], tokenizer: str | Path, length: int) -> Split:
    """Tokenizes labelled rows; a label becomes its index in `classes`."""
    tokens, mask = encode([row.text for row in rows], tokenizer, length)
    labels = np.array([classes.index(row.label) for row in rows], np.int32)
    return Split(tokens, mask, labels)


FOLDS = 5


def hold_out(rows: list[Row], fold: int = 0) -> tuple[list[Row], list[Row]]:
    """Splits training rows by module into ``(training, validation)``, about 4 to 1.

    Settings chosen on the test rows would overstate the result, so they are chosen on the validation rows.

    Args:
        rows: The training rows.
        fold: Which fifth of the modules is held out, modulo `FOLDS`.
    """
    digests = [hashlib.sha256(f"hold out {row.module}".encode()).digest()[0] for row in rows]
    is_held_out = [digest // 51 == fold % FOLDS for digest in digests]  # 256 // 51 == 5 folds
    pairs = list(zip(rows, is_held_out, strict=True))
    return [row for row, held_out in pairs if not held_out], [row for row, held_out in pairs if held_out]


def fingerprint(*splits: Split) -> str:
    """A short hash of everything in the splits."""
    digest = hashlib.sha256()
    for split in splits:
        for array in split:
            digest.update(f"{array.shape} {array.dtype}".encode())
            digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()[:16]
