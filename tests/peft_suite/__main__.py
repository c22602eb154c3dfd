"""Fetch PEFT's tests, run them on our config classes, and fail on any failure that explained.toml does not list.

Usage, in the project's root: `python -m tests.peft_suite [--against stock] [arguments of pytest, such as -k merge]`.
WORKERS in the environment sets the number of test processes (default 2; 0 runs in one, without pytest-xdist). The
tests run on the CPU; set CUDA_VISIBLE_DEVICES to let them have a GPU.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console

from . import source, subjects, verdict
from .plugin import RESULTS
from .selection import SELECTIONS

PROJECT = Path(__file__).resolve().parents[2]
FOLDER = PROJECT / ".peft-suite"
_OK, _TESTS_FAILED = 0, 1  # pytest's exit codes for a run that finished


def main() -> int:
    console = Console()
    choices, pytest_arguments = _parse(sys.argv[1:])
    try:
        layout = source.prepare(FOLDER, importlib.metadata.version("peft"))
    except source.SourceError as error:
        console.print(f"[red]{error}[/red]")
        return 2
    with tempfile.TemporaryDirectory() as scratch:
        results = Path(scratch) / "results.json"
        code = _run_pytest(layout, results, choices.against, pytest_arguments)
        if code not in (_OK, _TESTS_FAILED) or not results.is_file():
            return code or 1
        outcomes = json.loads(results.read_text())
    return _report(console, outcomes, choices.against, complete=not pytest_arguments)


def _parse(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(prog="python -m tests.peft_suite", description=__doc__)
    parser.add_argument(
        "--against", choices=("ours", "stock"), default="ours", help="stock: PEFT's own LoRA and DoRA, to compare"
    )
    return parser.parse_known_args(arguments)


def _run_pytest(layout: Path, results: Path, against: str, extra: list[str]) -> int:
    tests = [str(layout / source.PACKAGE / f"{module}.py") for module in SELECTIONS]
    workers = os.environ.get("WORKERS", "2")
    parallel = [] if workers == "0" else ["-n", workers]
    # our own pytest settings (warnings are errors) are not PEFT's: its folder is the root, with its own file
    settings = ["-c", str(layout / "pytest.ini"), "--rootdir", str(layout), "-q", "--disable-warnings"]
    plugins = ["-p", "no:cacheprovider", "-p", "tests.peft_suite.plugin"]
    command = [sys.executable, "-m", "pytest", *settings, *plugins, *parallel, *extra, *tests]
    paths = [PROJECT, layout, layout / "stubs", *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join(map(str, paths)),
        subjects.AGAINST: against,
        RESULTS: str(results),
    }
    return subprocess.run(command, cwd=layout / "hub", env=environment, check=False).returncode


def _report(console: Console, outcomes: verdict.Outcomes, against: str, complete: bool) -> int:
    console.print(verdict.tabulate(outcomes))
    explanations = verdict.read_explanations() if against == "ours" else []
    complaints = verdict.complaints(outcomes, explanations, complete)
    for complaint in complaints:
        console.print(complaint, style="red", markup=False, highlight=False, soft_wrap=True)
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main())
