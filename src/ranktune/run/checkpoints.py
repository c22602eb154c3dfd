"""The Trainer's checkpoints in a run's directory: which of them are whole, and the newest one to go on from.

Trainer writes a checkpoint in place, file by file, `trainer_state.json` last, and removes old ones file by file: a run
that was killed can leave both torn. A manifest, written after everything else, tells which bytes changed since then.
None of these files is unpickled here.
"""

from __future__ import annotations

import json
import re
import shutil
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ranktune.errors import AdapterFileError
from ranktune.run.manifest import NAME as MANIFEST
from ranktune.run.manifest import altered, has_manifest

_NAME = re.compile(r"checkpoint-(\d+)")
_STATE = "trainer_state.json"
# Written with an adapter, or with a model that is trained as a whole.
_WEIGHTS = {"adapter_config.json": "adapter_model.safetensors", "config.json": "model*.safetensors"}
# What torch.save wrote: a zip archive, whose table of contents is at its end.
_ARCHIVES = ("optimizer.pt", "scheduler.pt")
_RANDOM_STATE = "rng_state*.pth"


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint: its folder, the optimizer steps behind it, and the content of its `trainer_state.json`.

    `verified`: its files have the sizes and hashes with which they were written. Without a manifest (from an earlier
    version) they are only known to be complete.
    """

    path: Path
    step: int
    state: dict[str, Any]
    verified: bool

    def record_of(self, callback: str) -> dict[str, Any]:
        """What the run's callback of that class has left in it."""
        return self.state.get("stateful_callbacks", {}).get(callback, {}).get("attributes", {})


@dataclass(frozen=True)
class Found:
    """The newest whole checkpoint, if there is one, and for every newer folder why it is not."""

    newest: Checkpoint | None
    torn: dict[Path, str]

    def remove_torn(self) -> None:
        """Remove the newer folders: training writes them again."""
        for path in self.torn:
            shutil.rmtree(path)


def find_checkpoint(folder: Path) -> Found:
    """Look for the newest whole checkpoint in a folder, which need not exist.

    One without a manifest is taken where the older ones have none either: they are an earlier version's. Where an older
    one has it, this one's writing did not come to its end.
    """
    torn: dict[Path, str] = {}
    numbered = sorted(_numbered(folder), reverse=True)
    for place, (step, path) in enumerate(numbered):
        fault = damage(path, step)
        if not fault and not has_manifest(path) and any(has_manifest(older) for _, older in numbered[place + 1 :]):
            fault = f"{MANIFEST} is missing"
        if fault:
            torn[path] = fault
        else:
            state = json.loads((path / _STATE).read_text(encoding="utf-8"))
            return Found(Checkpoint(path, step, state, has_manifest(path)), torn)
    return Found(None, torn)


def damage(path: Path, step: int) -> str | None:
    """What in the checkpoint of that step is missing, cut short or not as it was written, or None."""
    return altered(path) or _fault(path, step)


def refuse_damaged_best(folder: Path, step: int) -> None:
    """Check the best checkpoint of a run, which the run ends with.

    Raises:
        AdapterFileError: it is not as it was written; telling what can be done.
    """
    path = folder / f"{PREFIX_CHECKPOINT_DIR}-{step}"
    if path.is_dir() and (fault := damage(path, step)):
        raise AdapterFileError(
            f"{path} is the best checkpoint, which the run is to end with, and it is not as it was written: {fault}. "
            "Put its files back, or remove the folder to end with the last step instead; then ranktune train --resume."
        )


def _numbered(folder: Path) -> list[tuple[int, Path]]:
    paths = folder.iterdir() if folder.is_dir() else ()
    return [(int(name[1]), path) for path in paths if path.is_dir() and (name := _NAME.fullmatch(path.name))]


def _fault(path: Path, step: int) -> str | None:
    """What is missing or cut short in a checkpoint, or None where it is whole."""
    config = "config.json" if (path / "config.json").exists() else "adapter_config.json"
    weights, random_states = list(path.glob(_WEIGHTS[config])), list(path.glob(_RANDOM_STATE))
    for name in (config, _STATE, *_ARCHIVES):
        if not (path / name).is_file():
            return f"{name} is missing"
    for name, files in ((_WEIGHTS[config], weights), (_RANDOM_STATE, random_states)):
        if not files:
            return f"{name} is missing"
    for file in (*(path / name for name in _ARCHIVES), *random_states, *path.glob("scaler.pt")):
        if not zipfile.is_zipfile(file):
            return f"{file.name} is cut short"
    for file in weights:
        try:
            # Compares the length of the file with what its header lists.
            with safe_open(file, framework="pt"):
                pass
        except SafetensorError as error:
            return f"{file.name} is cut short ({error})"
    contents: dict[str, Any] = {}
    for name in (config, _STATE):
        try:
            contents[name] = json.loads((path / name).read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError):
            return f"{name} is cut short"
    if contents[_STATE].get("global_step") != step:
        return f"{_STATE} is that of step {contents[_STATE].get('global_step')}"
    return None
