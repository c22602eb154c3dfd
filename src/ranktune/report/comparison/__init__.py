"""The report of a comparison: table.csv, report.md, pictures, and report.html, which needs nothing but itself."""

from __future__ import annotations

import csv
import io
from pathlib import Path

from ranktune.compare.store import Store
from ranktune.compare.summary import Summary
from ranktune.report.comparison.details import MethodDetails, read_details
from ranktune.report.comparison.page import page
from ranktune.report.comparison.pictures import draw
from ranktune.report.comparison.rows import COLUMNS, rows
from ranktune.report.comparison.text import markdown
from ranktune.run import atomic


def write_report(out: Path, summary: Summary, store: Store) -> list[Path]:
    """Write every file of the report into `out`, and return their paths."""
    details = {
        method.label: read_details(store.folder / next(iter(method.runs.values())), next(iter(method.runs)))
        for method in summary.methods
        if method.runs
    }
    written = [out / name for name in ("table.csv", "report.md", "report.html")]
    atomic.write_text(written[0], _csv(summary))
    pictures = draw(out, summary)
    atomic.write_text(written[1], markdown(summary, [path.name for path in pictures]))
    atomic.write_text(written[2], page(summary, details))
    return [*written, *pictures]


def _csv(summary: Summary) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, [name for name, _ in COLUMNS], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows(summary))
    return text.getvalue()


__all__ = ["MethodDetails", "write_report"]
