"""Where models come from: the embedded one is verified, folders are checked, hub names pass through."""

from __future__ import annotations

import subprocess
import sys
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path

import pytest

from ranktune.errors import RecipeError
from ranktune.tasks import models, resolve_model


@pytest.fixture
def fake_package(tmp_path, monkeypatch) -> Path:
    """A package folder like the one that carries the embedded model, with other weights."""
    folder = tmp_path / models.EMBEDDED_PACKAGE / "model"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"tampered")
    spec = ModuleSpec(models.EMBEDDED_PACKAGE, None, is_package=True)
    spec.submodule_search_locations = [str(folder.parent)]
    monkeypatch.setattr(models, "find_spec", lambda name: spec if name == models.EMBEDDED_PACKAGE else None)
    return folder


def test_the_embedded_model_is_found_without_importing_its_package():
    if find_spec(models.EMBEDDED_PACKAGE) is None:
        pytest.skip("the embedded model's package is not installed (the extra 'quickstart')")
    code = (
        "import sys; from ranktune.tasks.models import resolve_model; found = resolve_model('all-minilm'); "
        "assert not any('minilm' in name or name == 'sentence_transformers' for name in sys.modules); "
        "print(found.path)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert (Path(found) / "config.json").is_file()


def test_tampered_weights_are_refused(fake_package):
    with pytest.raises(RecipeError, match=r"are not the known ones.*d121be310300.*expected 53aa51172d14.*Reinstall"):
        resolve_model("all-minilm")
    (fake_package / "model.safetensors").unlink()
    with pytest.raises(RecipeError, match="without its weights"):
        resolve_model("all-minilm")


def test_known_weights_are_hashed_once(fake_package, monkeypatch):
    import hashlib

    monkeypatch.setattr(models, "EMBEDDED_SHA256", hashlib.sha256(b"tampered").hexdigest())
    models._sha256.cache_clear()
    assert resolve_model("all-minilm") == resolve_model("all-minilm")
    assert resolve_model("all-minilm").path == str(fake_package)
    assert models._sha256.cache_info().misses == 1


def test_a_missing_package_tells_what_to_install(monkeypatch):
    monkeypatch.setattr(models, "find_spec", lambda _: None)
    with pytest.raises(RecipeError, match=r"pip install 'ranktune\[quickstart\]'"):
        resolve_model("all-minilm")


def test_local_folders(tmp_path):
    with pytest.raises(RecipeError, match=r"holds no config\.json"):
        resolve_model(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    assert resolve_model(str(tmp_path)) == models.ModelSource(str(tmp_path), str(tmp_path), None)
    with pytest.raises(RecipeError, match="give the folder"):
        resolve_model(str(tmp_path / "config.json"))
    with pytest.raises(RecipeError, match=r"Did you mean 'config\.json'"):
        resolve_model(str(tmp_path / "confg.json"))


def test_hub_names_pass_through_with_their_revision():
    assert resolve_model("gpt2") == models.ModelSource("gpt2", "gpt2", None)
    assert resolve_model("owner/name@v1.0") == models.ModelSource("owner/name@v1.0", "owner/name", "v1.0")


@pytest.mark.parametrize("name", ["./nowhere", "a/b/c", "not a name", "~/no-such-folder-here", ""])
def test_what_is_neither_a_folder_nor_a_hub_name(name):
    with pytest.raises(RecipeError, match="model: "):
        resolve_model(name)


def test_a_misspelt_embedded_name():
    with pytest.raises(RecipeError, match="Did you mean 'all-minilm'"):
        resolve_model("all-minilmm")
