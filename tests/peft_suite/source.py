"""Fetch PEFT's tests from its source archive into an ignored folder, ready for pytest.

The tests are never copied into the project: they are downloaded for the installed version of PEFT the first time
the suite runs, and reused while every file still has the hash that was noted then.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from . import hub

PACKAGE = "peft_tests"
TEST_MODULES = (
    "test_custom_models.py",
    "test_tuners_utils.py",
    "test_low_level_api.py",
    "test_lora_conversion.py",
    "test_mapping.py",
    "test_other.py",
    "test_decoder_models.py",
    "test_encoder_decoder_models.py",
    "test_feature_extraction_models.py",
    "test_seq_classifier.py",
)
SHARED_MODULES = ("testing_common.py", "testing_utils.py")
# The tests import these at the top for cases that we do not run; an empty stand-in saves the dependency.
STUBS = {
    "diffusers": '__version__ = "0.0.0"\n\n\nclass StableDiffusionPipeline:\n    pass\n',
    "parameterized": "class parameterized:\n    @staticmethod\n    def expand(cases):\n"
    "        return lambda function: function\n",
}
PYTEST_INI = "[pytest]\nmarkers =\n    single_gpu_tests\n    multi_gpu_tests\n    regression\n    bitsandbytes\n"
MANIFEST = "manifest.json"


class SourceError(Exception):
    """PEFT's tests could not be fetched; the message says what to do."""


def prepare(folder: Path, version: str) -> Path:
    """Return the folder of PEFT `version`'s tests below `folder`, laying it out first where it is missing or torn."""
    target = folder / f"peft-{version}"
    if _is_complete(target):
        return target
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix="unfinished-") as scratch:
        archive = _download(Path(scratch) / "download", version)
        layout = Path(scratch) / "layout"
        _lay_out(archive, layout, version)
        _write_manifest(layout)
        if target.exists():
            shutil.rmtree(target)
        layout.rename(target)
    return target


def _download(folder: Path, version: str) -> Path:
    command = [sys.executable, "-m", "pip", "download", f"peft=={version}", "--no-binary", "peft", "--no-deps"]
    outcome = subprocess.run([*command, "--quiet", "--dest", str(folder)], capture_output=True, text=True, check=False)
    archives = sorted(folder.glob("peft-*.tar.gz"))
    if outcome.returncode != 0 or len(archives) != 1:
        raise SourceError(
            f"could not download the source archive of peft {version}: the suite needs a package index once.\n"
            f"{outcome.stderr.strip()}"
        )
    return archives[0]


def _lay_out(archive: Path, layout: Path, version: str) -> None:
    tests = layout / PACKAGE
    tests.mkdir(parents=True)
    (tests / "__init__.py").touch()
    with tarfile.open(archive, "r:gz") as source:
        for name in TEST_MODULES + SHARED_MODULES:
            (tests / name).write_bytes(_read_member(source, f"peft-{version}/tests/{name}"))
    for name, text in STUBS.items():
        stub = layout / "stubs" / name / "__init__.py"
        stub.parent.mkdir(parents=True)
        stub.write_text(text)
    (layout / "pytest.ini").write_text(PYTEST_INI)
    hub.build(layout / "hub")


def _read_member(source: tarfile.TarFile, name: str) -> bytes:
    """The bytes of one plain file of the archive: nothing else in it is written to disk, whatever its path."""
    try:
        stream = source.extractfile(name)
    except KeyError:
        stream = None
    if stream is None:
        raise SourceError(f"the archive holds no file {name}: this version of PEFT has moved its tests")
    return stream.read()


def _write_manifest(layout: Path) -> None:
    files = sorted(path for path in layout.rglob("*") if path.is_file())
    hashes = {path.relative_to(layout).as_posix(): _hash(path.read_bytes()) for path in files}
    (layout / MANIFEST).write_text(json.dumps({"recipe": _recipe(), "files": hashes}, indent=1))


def _is_complete(layout: Path) -> bool:
    manifest = layout / MANIFEST
    if not manifest.is_file():
        return False
    noted = json.loads(manifest.read_text())
    return noted["recipe"] == _recipe() and all(
        (layout / name).is_file() and _hash((layout / name).read_bytes()) == digest
        for name, digest in noted["files"].items()
    )


def _recipe() -> str:
    """A change to what is laid out, or to how, makes an older folder incomplete."""
    return _hash(Path(__file__).read_bytes() + Path(os.fspath(hub.__file__)).read_bytes())


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
