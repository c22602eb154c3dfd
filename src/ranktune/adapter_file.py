"""Reading the folder of an adapter as data from a stranger: everything is checked before anything is allocated.

A folder holds ``adapter_config.json`` and ``adapter_model.safetensors``. The header of the second says what tensors
there are, where they lie and how large they are; it has to account for every byte of the file. Nothing here runs
anything from the folder: pickled files are refused unread. Whatever is wrong is an `AdapterFileError` that names the
file and the reason.
"""

from __future__ import annotations

import json
import math
import os
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from ranktune.errors import AdapterFileError

if TYPE_CHECKING:
    from torch import Tensor

CONFIG_FILE, TENSOR_FILE = "adapter_config.json", "adapter_model.safetensors"

# Far above what any adapter needs (a header line is about 150 bytes a tensor), far below what hurts.
_MAX_CONFIG_BYTES = 8 << 20
_MAX_HEADER_BYTES = 32 << 20
_MAX_NAME = 512
_MAX_RANK = 1 << 16
_ITEM_BYTES = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "I16": 2,
    "U16": 2,
    "F16": 2,
    "BF16": 2,
    "I32": 4,
    "U32": 4,
    "F32": 4,
    "I64": 8,
    "U64": 8,
    "F64": 8,
}
# Dotted names of Python attributes, with the dashes and slashes that some libraries' modules have in theirs.
_NAME = re.compile(r"[\w-]+(\.[\w-]+)*")


@dataclass(frozen=True)
class StoredTensor:
    """What the header says of one tensor: its safetensors dtype (``F32``), its shape, its size in the file."""

    dtype: str
    shape: tuple[int, ...]
    nbytes: int

    @property
    def count(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class AdapterFile:
    """A folder that passed the checks.

    Attributes:
        path: the folder. config: its ``adapter_config.json``. tensors: the header of its tensor file, by name.
    """

    path: Path
    config: dict[str, Any]
    tensors: dict[str, StoredTensor]

    @property
    def tensor_file(self) -> Path:
        return self.path / TENSOR_FILE

    @property
    def nbytes(self) -> int:
        """The size of the tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def load(self) -> dict[str, Tensor]:
        """Every tensor, on the CPU.

        Raises:
            AdapterFileError: the file changed since it was checked.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(self.tensor_file)
        except (SafetensorError, OSError) as error:
            raise AdapterFileError(f"{self.tensor_file} cannot be read: {error}") from error


def read_adapter(path: str | Path) -> AdapterFile:
    """Check a folder and read its configuration and the header of its tensors; no tensor is read.

    Raises:
        AdapterFileError: something in it is missing, torn, too large, contradictory or not data.
    """
    folder = Path(path)
    if not folder.is_dir():
        what = "is a file: name the folder that holds it" if folder.exists() else "does not exist"
        raise AdapterFileError(f"{folder} {what}.")
    config = _read_config(_plain_file(folder, CONFIG_FILE))
    _refuse_pickles(folder)
    tensors = _read_header(_plain_file(folder, TENSOR_FILE))
    return AdapterFile(folder, config, tensors)


def adapter_folder(path: str | Path) -> Path:
    """The folder of an adapter: itself, or that of the run whose output directory is given."""
    folder = Path(path)
    inside = folder / "adapter"
    return inside if not (folder / CONFIG_FILE).exists() and inside.is_dir() else folder


def check_folder(folder: Path) -> None:
    """Check what PEFT is about to read: the files that are there, and that no pickle stands in for one.

    Raises:
        AdapterFileError: as `read_adapter`.
    """
    if (folder / CONFIG_FILE).exists():
        _read_config(_plain_file(folder, CONFIG_FILE))
    _refuse_pickles(folder)
    if (folder / TENSOR_FILE).exists():
        _read_header(_plain_file(folder, TENSOR_FILE))


def _plain_file(folder: Path, name: str) -> Path:
    """A regular file of the folder, or one of a hub cache that its link leads to."""
    path = folder / name
    if not path.exists():
        what = "an adapter folder holds adapter_config.json and adapter_model.safetensors"
        if (folder / "config.json").exists():
            what += ", and this one a whole model"
        elif runs := sorted(path.name for path in folder.iterdir() if (path / "adapter" / CONFIG_FILE).exists()):
            what += f"; in it are runs, such as {folder / runs[0]}"
        _refuse(path, f"does not exist; {what}")
    target = path.resolve()
    # A hub cache keeps <model>/snapshots/<revision>/<file> as links to <model>/blobs/<hash>.
    homes = (folder.resolve(), folder.resolve().parent.parent / "blobs")
    if not any(target.is_relative_to(home) for home in homes):
        _refuse(path, f"is a link that leaves the folder, to {target}")
    if not target.is_file():
        _refuse(path, "is not a regular file")
    return path


def _refuse_pickles(folder: Path) -> None:
    if (folder / TENSOR_FILE).exists():
        return
    for file in sorted(folder.iterdir()):
        if file.suffix in (".bin", ".pt", ".pth", ".pkl", ".ckpt"):
            _refuse(
                file,
                "is a pickle, which can run any code when it is read, and is not read here. If you trust where it "
                "comes from, load it with PEFT and save it again: that writes adapter_model.safetensors",
            )


def _read_config(path: Path) -> dict[str, Any]:
    size = path.stat().st_size
    if size > _MAX_CONFIG_BYTES:
        _refuse(path, f"has {size:,} bytes, more than the {_MAX_CONFIG_BYTES:,} that a configuration may have")
    config = _json_object(path, path.read_bytes(), "is no valid JSON", "is truncated or altered")
    if not isinstance(config.get("peft_type"), str):
        _refuse(path, f"has peft_type={config.get('peft_type')!r}, which should name an adapter type")
    for key, kind in (("rank_pattern", "ranks"), ("alpha_pattern", "alphas")):
        pattern = config.get(key)
        if pattern is not None and not isinstance(pattern, dict):
            _refuse(path, f"has {key}={pattern!r}, which should map module names to {kind}")
    ranks = {"r": config.get("r"), **_entries(config, "rank_pattern")}
    for key, rank in ranks.items():
        if config["peft_type"] == "ADALORA" and isinstance(rank, list) and all(type(kept) is bool for kept in rank):
            continue  # which components its allocator kept; the others are not in the file
        if rank is not None and (type(rank) is not int or not 1 <= rank <= _MAX_RANK):
            _refuse(path, f"has {key}={rank!r}, which should be a whole number from 1 to {_MAX_RANK}")
    alphas = {"lora_alpha": config.get("lora_alpha"), **_entries(config, "alpha_pattern")}
    for key, alpha in alphas.items():
        if alpha is not None and (type(alpha) not in (int, float) or not math.isfinite(alpha)):
            _refuse(path, f"has {key}={alpha!r}, which should be a finite number")
    for key in ("target_modules", "exclude_modules", "modules_to_save"):
        value = config.get(key)
        if not (value is None or isinstance(value, str) or _is_texts(value)):
            _refuse(path, f"has {key}={_short(value)}, which should be a list of names")
    for key in ("base_model_name_or_path", "revision", "task_type", "method"):
        value = config.get(key)
        if value is not None and (not isinstance(value, str) or "\0" in value):
            _refuse(path, f"has {key}={_short(value)}, which should be text")
    return config


def _entries(config: dict[str, Any], key: str) -> dict[str, Any]:
    return {f"{key}[{name!r}]": value for name, value in (config.get(key) or {}).items()}


def _is_texts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _read_header(path: Path) -> dict[str, StoredTensor]:
    size = path.stat().st_size
    with path.open("rb") as file:
        length_bytes = file.read(8)
        if len(length_bytes) < 8:
            _refuse(path, f"has {size} bytes: it is torn, or no safetensors file")
        (length,) = struct.unpack("<Q", length_bytes)
        if length > min(size - 8, _MAX_HEADER_BYTES):
            _refuse(
                path,
                f"announces a header of {length:,} bytes in a file of {size:,}: it is torn, or no safetensors file",
            )
        header = _json_object(
            path,
            file.read(length),
            "has a header that is no valid JSON",
            "is truncated or altered, or no safetensors file",
        )
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        _refuse(path, "has metadata that is not text")
    tensors, spans = {}, []
    for name, entry in header.items():
        if len(name) > _MAX_NAME or not _NAME.fullmatch(name):
            _refuse(path, f"holds a tensor named {_short(name)}, which is no module's name")
        tensors[name], span = _stored_tensor(path, name, entry)
        spans.append((*span, name))
    _refuse_gaps(path, sorted(spans), size - 8 - length)
    return tensors


def _stored_tensor(path: Path, name: str, entry: Any) -> tuple[StoredTensor, tuple[int, int]]:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        _refuse(path, f"describes tensor {name} by {_short(entry)}")
    dtype, shape, span = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _ITEM_BYTES:
        _refuse(path, f"holds tensor {name} of the unknown type {_short(dtype)}")
    if not _is_counts(shape) or len(shape) > 8:
        _refuse(path, f"holds tensor {name} of the impossible shape {_short(shape)}")
    if not _is_counts(span) or len(span) != 2:
        _refuse(path, f"places tensor {name} at {_short(span)}")
    nbytes = math.prod(shape) * _ITEM_BYTES[dtype]
    if span[1] - span[0] != nbytes:
        _refuse(
            path, f"gives tensor {name} {span[1] - span[0]:,} bytes where its shape {_short(shape)} needs {nbytes:,}"
        )
    return StoredTensor(dtype, tuple(shape), nbytes), (span[0], span[1])


def _refuse_gaps(path: Path, spans: list[tuple[int, int, str]], size: int) -> None:
    """Tensors must follow each other without gap or overlap, to the last byte of the file."""
    end = 0
    for start, stop, name in spans:
        if start != end:
            _refuse(path, f"places tensor {name} at byte {start:,} where the one before it ends at {end:,}")
        end = stop
    if end != size:
        _refuse(path, f"describes {end:,} bytes of tensors and has {size:,}: it is torn, or has something hidden in it")


def _is_counts(value: object) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 1 << 48 for item in value)


def _json_object(path: Path, content: bytes, fault: str, cause: str) -> dict[str, Any]:
    """The object that a file, or its header, holds. `fault` and `cause`: what is said where it does not parse."""
    try:
        value = json.loads(content.decode(), object_pairs_hook=_without_duplicates, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:  # JSON and UTF-8 errors are ValueErrors
        _refuse(path, f"{fault} ({_short(str(error))}): it {cause}", error)
    if not isinstance(value, dict):
        _refuse(path, f"holds {_short(value)} where a JSON object belongs")
    return value


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError("a key appears twice")
    return value


def _no_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is no number")


def _short(value: object) -> str:
    """A value for a message, however large it is."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _refuse(path: Path, reason: str, cause: Exception | None = None) -> NoReturn:
    raise AdapterFileError(f"{os.fspath(path)} {reason}.") from cause
