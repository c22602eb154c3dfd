"""Two processes under torchrun: the same ranks and the same parameters, and both skip when one has a bad gradient."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tests.conftest import PROJECT
from tests.distributed.ddp_balance import train_alone


def in_two_processes(module: str, *arguments: str) -> tuple[dict, dict]:
    """What the two processes of a program print as their results."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{PROJECT}/src:{PROJECT}"}
    done = subprocess.run(
        [*command, "-m", f"tests.distributed.{module}", *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=PROJECT,
        env=environment,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line.partition("RESULT ")[2] for line in done.stdout.splitlines() if "RESULT " in line]
    first, second = sorted((json.loads(line) for line in lines), key=lambda result: result["rank"])
    return first, second


@pytest.mark.parametrize("method", ["dynamic-dora", "increlora", "dylora"])
def test_two_processes_agree_on_everything(method):
    first, second = in_two_processes("ddp_ranks", method)
    assert first["digest"] == second["digest"]
    assert first["ranks"] == second["ranks"]
    assert sum(first["ranks"].values()) == 12
    assert first["skipped"] == second["skipped"] == 1
    assert first["step"] == 30
    assert first["drawn"] == second["drawn"]
    assert len(first["drawn"]) == (3 * 31 if method == "dylora" else 0)


@pytest.mark.parametrize("shared", [False, True])
def test_two_processes_balance_as_one_with_two_micro_batches(shared):
    """The load-balancing term, which no wrapper reduces, is the mean of the processes' terms."""
    first, second = in_two_processes("ddp_balance", *(["shared"] if shared else []))
    assert first["adapter"] == second["adapter"]
    alone = train_alone(shared)
    assert sum(name.endswith(".router") for name in alone) == (1 if shared else 3)
    assert first["adapter"].keys() == alone.keys()
    for name, values in alone.items():
        assert first["adapter"][name] == pytest.approx(values, rel=1e-4, abs=1e-6), name
