"""Two processes under torchrun: the same ranks and the same parameters, and both skip when one has a bad gradient."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tests.conftest import PROJECT


@pytest.mark.parametrize("method", ["dynamic-dora", "increlora", "dylora"])
def test_two_processes_agree_on_everything(method):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{PROJECT}/src:{PROJECT}"}
    done = subprocess.run(
        [*command, "-m", "tests.distributed.ddp_ranks", method],
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
    assert first["digest"] == second["digest"]
    assert first["ranks"] == second["ranks"]
    assert sum(first["ranks"].values()) == 12
    assert first["skipped"] == second["skipped"] == 1
    assert first["step"] == 30
    assert first["drawn"] == second["drawn"]
    assert len(first["drawn"]) == (3 * 31 if method == "dylora" else 0)
