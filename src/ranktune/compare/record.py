"""The JSON of one run, with the fields of PEFT's method comparison: run_info, train_info, meta_info; and ranks."""

from __future__ import annotations

import math
import platform
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from typing import Any

import torch

from ranktune.compare.grid import Run
from ranktune.compare.measuring import CostCallback
from ranktune.config import PEFT_TYPE, RankConfig
from ranktune.recipe.choices import method_class

Event = dict[str, Any]


def finished(
    run: Run,
    metrics: dict[str, Any],
    events: Sequence[Event],
    ranks: dict[str, int],
    cost: CostCallback,
    seconds: float,
) -> dict[str, Any]:
    """The record of a run that came to its end, well or not: scores that are not finite mean that it diverged."""
    score, loss = _finite(metrics["after"]), _finite(metrics["scores"]["after"].get("loss"))
    diverged = score is None or ("loss" in metrics["scores"]["after"] and loss is None)
    split = "valid" if run.phase == "search" else "test"
    last = [event for event in events if event["event"] == "step"][-1:]
    return {
        "run_info": {**_run_info(run, seconds), "error_msg": "scores are not finite" if diverged else ""},
        "train_info": {
            **cost.memory(),
            "memory_kind": cost.kind,
            "train_time": cost.seconds,
            "tokens_per_second": cost.tokens / cost.seconds if cost.seconds else None,
            "file_size": metrics["adapter_bytes"],
            "num_trainable_params": metrics["trainable_params"],
            "num_total_params": metrics["total_params"],
            "num_adapter_params": metrics["active_params"],
            "num_training_params": metrics["training_params"],
            "status": "diverged" if diverged else "success",
            "metrics": [
                *_curve(events, metrics["metric"], split),
                {
                    "step": metrics["steps"],
                    f"{split} {metrics['metric']}": score,
                    f"{split} loss": loss,
                    "train loss": last[0]["loss"] if last else None,
                    "train samples": round(metrics["samples_per_second"] * metrics["seconds"]),
                    "train total tokens": cost.tokens,
                },
            ],
        },
        "meta_info": {
            "model_info": {"name": metrics["model"]},
            "dataset_info": metrics["data"],
            "package_info": {f"{name}-version": version for name, version in metrics["versions"].items()},
            **_machine(),
        },
        "comparison": {
            **_comparison(run),
            "metric": metrics["metric"],
            "greater_is_better": metrics["greater_is_better"],
            "score": None if diverged else score,
            "loss": loss,
            "before": metrics["before"],
        },
        "ranks": {"total": metrics["total_rank"], "final": ranks},
    }


def failed(run: Run, reason: str, seconds: float) -> dict[str, Any]:
    """The record of a run that did not come to its end."""
    return {
        "run_info": {**_run_info(run, seconds), "error_msg": reason},
        "train_info": {"status": "failed", "metrics": []},
        "meta_info": _machine(),
        "comparison": {
            **_comparison(run),
            "metric": None,
            "greater_is_better": None,
            "score": None,
            "loss": None,
            "before": None,
        },
        "ranks": {"total": None, "final": {}},
    }


def _run_info(run: Run, seconds: float) -> dict[str, Any]:
    recipe = run.recipe.resolved()
    return {
        "created_at": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "total_time": seconds,
        "experiment_name": f"{run.label}/lr-{run.rate:g}/seed-{run.seed}",
        "peft_branch": None,  # an installed release; see meta_info.package_info
        "train_config": {
            "model_id": recipe["model"],
            **{key: value for key, value in recipe.items() if key not in ("method", "output")},
        },
        "peft_config": _peft_config(recipe["method"]),
    }


def settings(record: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe that a record was made with, as far as it decides the result; of full fine-tuning without `method`."""
    info = record["run_info"]
    found = {key: value for key, value in info["train_config"].items() if key != "model_id"}
    if info["peft_config"] is not None:
        found["method"] = {key: value for key, value in info["peft_config"].items() if key != "peft_type"}
    return found


# What a comparison reads of every record, and of those of runs that came to their end.
_ALWAYS = {
    "run_info": ("total_time", "error_msg", "train_config", "peft_config"),
    "train_info": ("status",),
    "comparison": ("label", "phase", "learning_rate", "seed", "fingerprint", "score", "loss"),
}
_ENDED = {
    "train_info": (
        *("accelerator_memory_reserved_avg", "accelerator_memory_max", "accelerator_memory_reserved_99th"),
        *("memory_kind", "train_time", "tokens_per_second", "file_size", "metrics"),
        *("num_trainable_params", "num_total_params", "num_adapter_params", "num_training_params"),
    ),
    "meta_info": ("model_info", "dataset_info", "package_info", "system_info"),
    "comparison": ("metric", "greater_is_better"),
}


def missing_field(record: Any) -> str | None:
    """The first field that a comparison needs and the record has not, None where it has all."""
    if not isinstance(record, dict):
        return "run_info"
    if missing := _first_missing(record, _ALWAYS):
        return missing
    ended = record["train_info"]["status"] in ("success", "diverged")
    return _first_missing(record, _ENDED) if ended else None


def _first_missing(record: dict[str, Any], wanted: Mapping[str, Sequence[str]]) -> str | None:
    for section, names in wanted.items():
        found = record.get(section)
        for name in names:
            if not isinstance(found, dict) or name not in found:
                return f"{section}.{name}"
    return None


def _peft_config(method: dict[str, Any]) -> dict[str, Any] | None:
    """The method with PEFT's name of it; None for full fine-tuning, as PEFT writes it."""
    kind = method_class(method, "a run of a comparison")
    name = PEFT_TYPE if issubclass(kind, RankConfig) else kind.peft_type
    return None if name is None else {"peft_type": name, **method}


def _comparison(run: Run) -> dict[str, Any]:
    return {
        "label": run.label,
        "phase": run.phase,
        "learning_rate": run.rate,
        "seed": run.seed,
        "budget": run.budget,
        "fingerprint": run.fingerprint,
    }


def _curve(events: Sequence[Event], metric: str, split: str) -> list[dict[str, Any]]:
    """One entry per evaluation on the way, with the training loss last logged before it."""
    entries, loss = [], None
    for event in events:
        if event["event"] == "step":
            loss = event.get("loss")
        elif event["event"] == "evaluation" and event["step"] > 0:
            entries.append({"step": event["step"], f"{split} {metric}": event.get(metric), "train loss": loss})
    return entries[:-1]  # the last one is the result, and has its own entry


def _machine() -> dict[str, Any]:
    system = platform.uname()
    return {
        "system_info": {
            "system": system.system,
            "release": system.release,
            "machine": system.machine,
            "processor": platform.processor() or system.machine,
            "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
            "threads": torch.get_num_threads(),
        },
        "pytorch_info": torch.__config__.show(),
    }


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
