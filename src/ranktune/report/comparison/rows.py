"""One row of plain numbers per method: the content of table.csv, and of the tables of the other reports."""

from __future__ import annotations

from typing import Any

from ranktune.compare.summary import MethodSummary, Summary

COLUMNS = (
    ("method", "as it was asked for"),
    ("metric", "what the scores are"),
    ("score_mean", "mean over seeds, on the evaluation data"),
    ("score_low", "lower bound of the 95 % t-interval"),
    ("score_high", "upper bound"),
    ("seeds", "runs that ended well"),
    ("seeds_asked", "runs that were asked for"),
    ("scores", "every seed's score"),
    ("learning_rate", "chosen on the validation part"),
    ("learning_rate_at_edge", "whether a better one may lie beyond those tried"),
    ("adapter_params", "adapter parameters at the end"),
    ("budget_residual", "those above (below) the budget"),
    ("trainable_params", "all trained parameters at the end, a new head included"),
    ("training_params", "trained parameters at the start of training"),
    ("total_params", "the model's"),
    ("difference", "mean difference to lora over common seeds"),
    ("difference_low", "lower bound of its 95 % t-interval"),
    ("difference_high", "upper bound"),
    ("p_t", "paired t-test, two-sided"),
    ("p_t_holm", "corrected for the number of methods"),
    ("p_wilcoxon", "exact signed-rank test, two-sided"),
    ("pareto", "whether nothing as small, to one percent, is better"),
    ("train_seconds", "mean time of training"),
    ("tokens_per_second", "mean"),
    ("memory_max_mib", "mean of the runs' peaks"),
    ("memory_avg_mib", "mean of the runs' averages"),
    ("memory_99th_mib", "mean of the runs' 99th percentiles"),
    ("file_mib", "size of the saved adapter"),
    ("troubles", "runs that failed or diverged"),
)


def rows(summary: Summary) -> list[dict[str, Any]]:
    """The rows, in the order in which the methods were asked for; what is not known is empty."""
    return [_row(method, summary) for method in summary.methods]


def _row(method: MethodSummary, summary: Summary) -> dict[str, Any]:
    interval, test, costs = method.interval, method.test, method.costs
    return {
        "method": method.label,
        "metric": summary.metric,
        "score_mean": interval and interval.mean,
        "score_low": interval and interval.low,
        "score_high": interval and interval.high,
        "seeds": len(method.scores),
        "seeds_asked": len(summary.seeds),
        "scores": " ".join(f"{score:.6g}" for score in method.scores.values()),
        "learning_rate": method.rate,
        "learning_rate_at_edge": method.edge,
        "adapter_params": method.adapter,
        "budget_residual": method.residual,
        "trainable_params": method.trainable,
        "training_params": method.training,
        "total_params": method.total,
        "difference": test and test.difference.mean,
        "difference_low": test and test.difference.low,
        "difference_high": test and test.difference.high,
        "p_t": test and test.p_t,
        "p_t_holm": method.p_corrected,
        "p_wilcoxon": test and test.p_wilcoxon,
        "pareto": method.on_front,
        "train_seconds": costs.get("train_time"),
        "tokens_per_second": costs.get("tokens_per_second"),
        "memory_max_mib": _mib(costs.get("accelerator_memory_max")),
        "memory_avg_mib": _mib(costs.get("accelerator_memory_reserved_avg")),
        "memory_99th_mib": _mib(costs.get("accelerator_memory_reserved_99th")),
        "file_mib": _mib(costs.get("file_size")),
        "troubles": "; ".join(method.troubles),
    }


def _mib(value: float | None) -> float | None:
    return None if value is None else round(value / 2**20, 3)
