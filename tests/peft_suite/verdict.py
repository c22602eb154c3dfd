"""The list of explained failures, and what a run's outcomes come to."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10, where pytest brings this
    import tomli as tomllib  # pyright: ignore[reportMissingImports]

EXPLAINED = Path(__file__).with_name("explained.toml")
COLUMNS = ("passed", "failed", "skipped", "explained")
# test id -> {"config": the config class under test, "outcome": one of COLUMNS}
Outcomes = dict[str, dict[str, str]]


@dataclass(frozen=True)
class Explanation:
    """Tests that must fail: a regular expression over the whole test id, and the reason."""

    tests: str
    reason: str

    def covers(self, test: str) -> bool:
        return re.fullmatch(self.tests, test) is not None


def read_explanations(path: Path = EXPLAINED) -> list[Explanation]:
    return [Explanation(**entry) for entry in tomllib.loads(path.read_text()).get("explained", [])]


def complaints(outcomes: Outcomes, explanations: list[Explanation], complete: bool) -> list[str]:
    """What keeps a run from success: failures, and in a `complete` run explanations that cover no test.

    An explained test that passes is among the failures already: pytest counts it as one.
    """
    found = [f"failed: {test}" for test, result in sorted(outcomes.items()) if result["outcome"] == "failed"]
    if complete:
        idle = [entry for entry in explanations if not any(entry.covers(test) for test in outcomes)]
        found += [f"explained.toml covers no test with {entry.tests!r}" for entry in idle]
    return found


def tabulate(outcomes: Outcomes) -> Table:
    """How many tests of each config class passed, failed, were skipped, or failed as explained."""
    counts = Counter((result["config"], result["outcome"]) for result in outcomes.values())
    table = Table("config", *COLUMNS)
    for config in sorted({config for config, _ in counts}):
        table.add_row(config, *(str(counts[config, column]) for column in COLUMNS))
    return table
