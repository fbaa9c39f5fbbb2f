"""From rows of text to arrays of one static shape.

The one idea: every row becomes exactly `length` tokens, so one compiled step serves every batch.
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
    """Tokenises texts, cut or padded to one length.

    Args:
        texts: N strings.
        tokenizer: a ``tokenizer.json``.
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
    """Tokenises labelled rows; a label becomes its index in `classes`."""
    tokens, mask = encode([row.text for row in rows], tokenizer, length)
    labels = np.array([classes.index(row.label) for row in rows], np.int32)
    return Split(tokens, mask, labels)


FOLDS = 5


def hold_out(rows: list[Row], fold: int = 0) -> tuple[list[Row], list[Row]]:
    """Splits training rows once more, by module: ``(to train on, to choose settings by)``, about 4 to 1.

    Settings chosen on the test rows would flatter the result; these rows stand in for them.

    Args:
        rows: the training rows.
        fold: which fifth of the modules is held out, modulo `FOLDS`.
    """
    digests = [hashlib.sha256(f"hold out {row.module}".encode()).digest()[0] for row in rows]
    held = [digest // 51 == fold % FOLDS for digest in digests]
    return [row for row, out in zip(rows, held, strict=True) if not out], [
        row for row, out in zip(rows, held, strict=True) if out
    ]


def fingerprint(*splits: Split) -> str:
    """A short hash of everything in the splits."""
    digest = hashlib.sha256()
    for split in splits:
        for array in split:
            digest.update(f"{array.shape} {array.dtype}".encode())
            digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()[:16]
