"""report.html: one file with plotly, the figures and the tables in it; it asks nothing of any network."""

from __future__ import annotations

import html
from collections.abc import Mapping
from pathlib import Path
from string import Template

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from ranktune.compare.summary import Summary
from ranktune.report.comparison import figures, text
from ranktune.report.comparison.details import MethodDetails

_FRAME = Path(__file__).with_name("page.html")


def page(summary: Summary, details: Mapping[str, MethodDetails]) -> str:
    """The whole document.

    Args:
        details: of one run of each method that has any.
    """
    builder = _Builder()
    sections = {
        "Scores": _scores(builder, summary),
        "Parameters": _parameters(builder, summary),
        "Against lora": _tests(summary),
        "Time and memory": _costs(builder, summary),
        "Learning rates": _rates(builder, summary),
        "Ranks": _ranks(builder, summary, details),
        "Runs": _runs(summary),
    }
    tabs = "".join(
        f'<button role="tab" data-section="s{number}" aria-selected="{str(not number).lower()}">{name}</button>'
        for number, name in enumerate(sections)
    )
    body = "".join(
        f'<section id="s{number}"{"" if not number else " hidden"}><h2>{name}</h2>{content}</section>'
        for number, (name, content) in enumerate(sections.items())
    )
    return Template(_FRAME.read_text(encoding="utf-8")).substitute(
        title=html.escape(f"Comparison: {summary.metric.replace('_', ' ')} on {Path(summary.model).name}"),
        tabs=tabs,
        sections=body,
        figures=builder.script(),
        plotly=get_plotlyjs(),
    )


class _Builder:
    """Numbers the figures; the page draws each when its tab is first opened."""

    def __init__(self) -> None:
        self._figures: dict[str, str] = {}

    def place(self, figure: go.Figure, description: str) -> str:
        """The place of a figure in the page."""
        name = f"f{len(self._figures)}"
        self._figures[name] = figure.to_json()  # pyright: ignore[reportArgumentType]
        label = html.escape(description, quote=True)
        return f'<div class="figure" id="{name}" role="img" aria-label="{label}"></div>'

    def script(self) -> str:
        """All figures as one object; no text in them can end the script element."""
        return "{" + ",".join(f'"{name}":{text}' for name, text in self._figures.items()).replace("</", "<\\/") + "}"


def _paragraphs(lines: list[str]) -> str:
    return "".join(f"<p>{html.escape(line)}</p>" for line in lines if line)


def _table(table: text.Table) -> str:
    head, body = table
    row = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
    rows = "".join("<tr>" + "".join(f"<td>{_cell(cell)}</td>" for cell in line) + "</tr>" for line in body)
    named = f"<thead><tr>{row}</tr></thead>" if any(head) else ""
    return f'<div class="wide"><table>{named}<tbody>{rows}</tbody></table></div>'


def _cell(text: str) -> str:
    """Names of variants may break between their fields, intervals nowhere."""
    return html.escape(text).replace(",", ",<wbr>").replace("[", "[<wbr>").replace(" to ", "&nbsp;to&nbsp;")


def _scores(builder: _Builder, summary: Summary) -> str:
    if not any(method.scores for method in summary.methods):
        return "<p>No run ended well, so there are no scores.</p>"
    figure = builder.place(figures.scores(summary), "scores with intervals, one line a method")
    return figure + _table(text.score_table(summary)) + _paragraphs(text.what_was_done(summary))


def _parameters(builder: _Builder, summary: Summary) -> str:
    drawn = builder.place(figures.pareto(summary), "score against trained parameters") if _any(summary) else ""
    return drawn + _table(text.parameter_table(summary)) + _paragraphs([text.about_front(summary)])


def _tests(summary: Summary) -> str:
    table = text.test_table(summary)
    return _paragraphs(text.verdict(summary)) + (_table(table) if table[1] else "")


def _costs(builder: _Builder, summary: Summary) -> str:
    shown = ""
    for field, scale, name in (
        ("train_time", 1.0, "training, seconds"),
        ("accelerator_memory_max", 2**20, "peak memory, MiB"),
    ):
        if _any(summary):
            shown += f"<h3>{name[0].upper()}{name[1:]}</h3>" + builder.place(
                figures.cost(summary, field, scale, name), name
            )
    return shown + _table(text.cost_table(summary)) + _paragraphs([text.about_costs(summary)])


def _rates(builder: _Builder, summary: Summary) -> str:
    if not any(method.trials for method in summary.methods):
        return "<p>Learning rates were not searched.</p>"
    return builder.place(figures.rates(summary), "score against learning rate") + (
        "<p>The large marker is the rate that was chosen. Rates that diverged or failed are not drawn; they are in the "
        "list of runs.</p>"
    )


def _ranks(builder: _Builder, summary: Summary, details: Mapping[str, MethodDetails]) -> str:
    shown = {label: _one_method(builder, summary, found) for label, found in details.items()}
    shown = {label: content for label, content in shown.items() if content}
    if not shown:
        return "<p>No run directory with ranks is left to show.</p>"
    options = "".join(f'<option value="m{number}">{html.escape(label)}</option>' for number, label in enumerate(shown))
    panels = "".join(
        f'<div class="method" id="m{number}"{"" if not number else " hidden"}>{content}</div>'
        for number, content in enumerate(shown.values())
    )
    return f'<label>Method <select id="method">{options}</select></label>{panels}'


def _one_method(builder: _Builder, summary: Summary, found: MethodDetails) -> str:
    parts = []
    if found.history is not None:
        parts += ["<h3>Rank of every module</h3>", builder.place(figures.rank_map(found.history), "rank heat map")]
        if len(found.history.steps) > 2:
            parts += ["<h3>Total rank and budget</h3>", builder.place(figures.budget(found), "total rank over steps")]
    if found.kept:
        parts += ["<h3>Importance at the end</h3>", builder.place(figures.importance(found), "importance")]
    if found.curve and summary.metric in found.curve[0]:
        parts += [
            "<h3>Score at every rank</h3>",
            builder.place(figures.rank_curve(found, summary.metric), "rank curve"),
        ]
    if found.experts:
        parts += ["<h3>Use of the experts</h3>", builder.place(figures.experts(found), "use of experts")]
    return "".join([f"<p>Of the run with seed {found.seed}.</p>", *parts]) if parts else ""


def _runs(summary: Summary) -> str:
    trouble = text.troubles(summary)
    items = "".join(f"<li>{html.escape(line)}</li>" for line in trouble)
    listed = f"<ul>{items}</ul>" if trouble else "<p>Every run ended well.</p>"
    facts = [[name, value] for name, value in text.machine(summary).items()]
    recipe = f"<h3>Recipe</h3>{_paragraphs([text.WHAT_THE_RECIPE_IS])}<pre>{html.escape(summary.recipe)}</pre>"
    return listed + "<h3>Machine and versions</h3>" + _table((["", ""], facts)) + recipe


def _any(summary: Summary) -> bool:
    return any(method.interval is not None for method in summary.methods)
