"""The end of a comparison on the terminal: one row a method, and what the tests say."""

from __future__ import annotations

from rich.table import Table

from ranktune.compare.summary import Summary
from ranktune.report.comparison.text import parameter_table, score_table, troubles, unfinished, verdict


def outcome_table(summary: Summary) -> Table:
    """Score with interval, seeds, learning rate and parameters; every seed is in the report."""
    head, rows = score_table(summary)
    shown = [place for place, name in enumerate(head) if name != "every seed"]
    table = Table()
    for place in shown:
        table.add_column(head[place], justify="left" if place == 0 else "right", overflow="fold")
    table.add_column("adapter parameters", justify="right")
    for row, (_, adapter, *_) in zip(rows, parameter_table(summary)[1], strict=True):
        table.add_row(*(row[place].replace("[", "\\[") for place in shown), adapter)
    return table


def outcome_lines(summary: Summary) -> list[str]:
    """What a reader must not miss: the tests' verdict, runs that are missing, runs that did not end well."""
    lines = [*unfinished(summary), *verdict(summary)]
    if trouble := troubles(summary):
        count = len(trouble) - 1
        more = f" ({count} more {'note' if count == 1 else 'notes'} in report.md)" if count else ""
        lines.append(f"Not every run ended well: {trouble[0]}{more}")
    return lines
