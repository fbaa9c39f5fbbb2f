"""The safetensors files of a model: one, or several with an index."""

from __future__ import annotations

import json
from pathlib import Path, PurePath

from lojax.text import printable

INDEX = "model.safetensors.index.json"


def weight_files(base: Path) -> list[Path]:
    """The safetensors files of a model.

    Raises:
        FileNotFoundError: There are none, or one that the index names is missing.
        ValueError: The index is not of the right form, or names a file outside its directory.
    """
    if base.is_file():
        return [base]
    index = base / INDEX
    if not index.is_file():
        files = sorted(base.glob("model.safetensors")) or sorted(base.glob("*.safetensors"))
        if len(files) == 1:
            return files
        what = "several .safetensors files and no index" if files else "no .safetensors file"
        raise FileNotFoundError(f"{base} holds {what}; pass the file itself.")
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{index} is not an index of safetensors files: {printable(repr(error))}.") from None
    for name in names:
        if not isinstance(name, str) or PurePath(name).name != name or "\\" in name or name in (".", ".."):
            raise ValueError(
                f"{index} names {printable(repr(name))}, which is not a plain file name. It could lead out of {base}."
            )
        if not (base / name).is_file():
            raise FileNotFoundError(f"{index} names {name}, which is not in {base}.")
    return [base / name for name in names]
