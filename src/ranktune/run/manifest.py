"""A checkpoint's manifest: size and hash of each of its files, written last, so that what was altered later is noticed.

The other checks look at structure: they see a file that ends too early, not one in which some bytes are others.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ranktune.run import atomic

NAME = "manifest.json"
_BLOCK = 1 << 20


def write_manifest(checkpoint: Path) -> None:
    """List the files of a checkpoint with their sizes and BLAKE2b hashes; the list is there whole or not at all."""
    files = {name: {"bytes": path.stat().st_size, "blake2b": _hash(path)} for name, path in _files(checkpoint)}
    atomic.write_json(checkpoint / NAME, {"version": 1, "files": files})


def has_manifest(checkpoint: Path) -> bool:
    """Whether the writing of a checkpoint came to its end, as far as ranktune writes manifests."""
    return (checkpoint / NAME).exists()


def altered(checkpoint: Path) -> str | None:
    """What in a checkpoint is not as it was written, or None; a folder without manifest is not judged."""
    if not has_manifest(checkpoint):
        return None
    try:
        listed: dict[str, Any] = json.loads((checkpoint / NAME).read_text(encoding="utf-8"))["files"]
        written = {name: (entry["bytes"], entry["blake2b"]) for name, entry in listed.items()}
    except (ValueError, LookupError, TypeError, AttributeError):
        return f"{NAME} was altered"
    for name, (size, digest) in written.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if (found := path.stat().st_size) < size:
            return f"{name} is cut short: it has {found:,} of {size:,} bytes"
        if found > size or _hash(path) != digest:
            return f"{name} was altered"
    return None


def _files(checkpoint: Path) -> Iterator[tuple[str, Path]]:
    """Name within the folder, and path, of what training goes on from; the card is for people."""
    for path in sorted(checkpoint.rglob("*")):
        if path.is_file() and path.name not in (NAME, "README.md") and not path.name.endswith(".tmp"):
            yield path.relative_to(checkpoint).as_posix(), path


def _hash(path: Path) -> str:
    digest = hashlib.blake2b(digest_size=32)
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()
