"""`ranktune compare` as processes that share one folder, one of which is interrupted."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import psutil

from ranktune.compare.store import Store
from tests.tiny import write_everything

_SECONDS = 180


def start(recipe: Path, out: Path, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "ranktune", "compare", str(recipe), "--no-search", "--out", str(out), *arguments]
    return subprocess.Popen(
        command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"},
        # Tests that run in the background were told to ignore Ctrl-C, and so would what they start.
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip


def results(output: str) -> list[str]:
    """The runs that a process trained, by what it said of them."""
    return re.findall(r"^\[\d+/\d+\] (.*?): accuracy", output, flags=re.MULTILINE)


def test_two_processes_share_the_work_and_one_goes_on_when_the_other_is_interrupted(tmp_path: Path) -> None:
    recipe, out = write_everything(tmp_path), tmp_path / "comparison"
    asked = ("--methods", "lora,dora", "--seeds", "4", "train.max_steps=150")
    staying, leaving = (start(recipe, out, *asked) for _ in range(2))
    try:
        end = time.monotonic() + _SECONDS
        while not (records := list((out / "runs").glob("*.json"))) or len(locked(out)) < 2:
            assert time.monotonic() < end
            assert leaving.poll() is None, leaving.communicate()
            time.sleep(0.05)
        kept = {path: path.read_bytes() for path in records}
        children = psutil.Process(leaving.pid).children(recursive=True)
        leaving.send_signal(signal.SIGINT)
        first, errors = leaving.communicate(timeout=_SECONDS)
        second, _ = staying.communicate(timeout=_SECONDS)
    finally:
        leaving.kill()
        staying.kill()
    assert (leaving.returncode, staying.returncode) == (130, 0)
    assert f"interrupted; runs that had ended are in {out / 'runs'}. The same command goes on" in errors
    assert "Traceback" not in errors
    assert children
    assert not psutil.wait_procs(children, timeout=20)[1]  # the run it had begun is not trained on by nobody
    trained = results(first) + results(second)
    everything = {f"{method} lr 0.02 seed {seed}" for method in ("dora", "lora") for seed in range(4)}
    # Each once; one may have ended in the moment of the interruption, unannounced.
    assert len(trained) == len(set(trained)) >= len(everything) - 1
    assert set(trained) <= everything
    assert second.count("4 of 4") == 2  # the one that stayed waited for the end, and reports it
    assert all(path.read_bytes() == content for path, content in kept.items())
    ended = Store(out / "runs").records().values()
    assert [record["train_info"]["status"] for record in ended] == ["success"] * len(everything)


def locked(out: Path) -> list[Path]:
    """Runs that a process has taken and not finished."""
    return list((out / "runs").glob(".*.attempts"))
