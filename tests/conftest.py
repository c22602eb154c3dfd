"""What every test shares: no network, and the place of the optional real data."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

# Before transformers or datasets are imported anywhere: a test that would reach a hub fails at once.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

PROJECT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real data sets and small pretrained models; skips where the machine has none."""
    folder = Path(os.environ.get("RANKTUNE_DATA", PROJECT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder} (set RANKTUNE_DATA)")
    return folder


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The other process's work of `ranktune.verification`, done in this one: seconds faster, and no proof.

    A list of the jobs.
    """
    from ranktune.verification import in_stock_peft, proof

    jobs: list[dict[str, Any]] = []

    def do(file: Path) -> None:
        jobs.append(json.loads(file.read_text()))
        in_stock_peft.do(jobs[-1])

    monkeypatch.setattr(proof, "run_elsewhere", do)
    return jobs


@pytest.fixture(scope="module")
def nested_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of `tests.tiny.write_nested_recipe` with the finished run in `out`."""
    from tests.command_line import command
    from tests.tiny import write_nested_recipe

    folder = tmp_path_factory.mktemp("nested")
    done = command("train", write_nested_recipe(folder), "--quiet")
    assert done.exit_code == 0, done.output
    return folder
