"""A run that is killed at any moment and resumed gives, to the bit, what it would have given."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import PROJECT
from tests.killed_runs import CASES

# What says how long something took, or how much memory one process had.
MEASURED = ("seconds", "samples_per_second", "peak_memory_mb", "resumed_at")


def result_of(out: Path) -> dict[str, Any]:
    """Everything a run leaves that does not depend on the clock."""
    metrics = json.loads((out / "metrics.json").read_text())
    events = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return {
        "adapter": (out / "adapter" / "adapter_model.safetensors").read_bytes(),
        "ranks": (out / "ranks.json").read_bytes(),
        "metrics": {name: value for name, value in metrics.items() if name not in MEASURED},
        "events": [
            {name: value for name, value in event.items() if name not in MEASURED}
            for event in events
            if event["event"] != "resume"
        ],
    }


@pytest.mark.parametrize("method", CASES)
def test_killed_and_resumed_is_uninterrupted(tmp_path: Path, method: str) -> None:
    if method == "nf4":
        pytest.importorskip("bitsandbytes")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    subprocess.run(
        [sys.executable, "-m", "tests.killed_runs", str(tmp_path), method],
        env=environment, cwd=PROJECT, check=True, capture_output=True,
    )  # fmt: skip
    ended = json.loads((tmp_path / "ended.json").read_text())
    said = {name: (tmp_path / f"{name}.txt").read_text() for name in ended}
    assert ended.pop("whole") == [0], said["whole"]
    expected = result_of(tmp_path / "whole")
    steps = [event for event in expected["events"] if event["event"] == "step"]
    assert [event["step"] for event in steps] == list(range(1, 25))
    for name, codes in ended.items():
        assert codes == [-signal.SIGKILL] * (len(codes) - 1) + [0], f"{name}: {codes}\n{said[name]}"
        found = result_of(tmp_path / name)
        for part, value in expected.items():
            assert found[part] == value, f"{name}: {part} differ\n{said[name]}"
        assert not list((tmp_path / name).glob(".*")), "what was half written is gone"
    if method == "nf4":
        assert "13 of 14 linear layers of the base model in nf4 (bitsandbytes)" in said["twice"]
        assert json.loads((tmp_path / "twice" / "metrics.json").read_text())["resumed_at"] == [6, 20]
    if method == "dynamic-dora":
        _check_what_was_said(tmp_path, said)


def _check_what_was_said(folder: Path, said: dict[str, str]) -> None:
    assert "the run starts anew, from step 0" in said["before-the-first-checkpoint"]
    assert "going on from checkpoint-6: 6 of 24 steps are done" in said["at-a-pruning"]
    assert "checkpoint-8 is not whole: trainer_state.json is missing" in said["writing-the-adapter"]
    assert "going on from checkpoint-6: " in said["writing-the-adapter"]
    assert "checkpoint-14 is not whole: trainer_state.json is cut short" in said["writing-the-state"]
    assert "going on from checkpoint-12: " in said["writing-the-state"]
    assert "going on from checkpoint-24: 24 of 24 steps are done" in said["writing-the-result"]
    assert json.loads((folder / "three-times" / "metrics.json").read_text())["resumed_at"] == [4, 8, 18]
