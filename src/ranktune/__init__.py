"""ranktune: low-rank fine-tuning that chooses its own rank, inside Hugging Face PEFT.

Importing this package is light: public names load on first use, and its adapters become known to PEFT as soon as PEFT
itself is imported, before or after.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

import wrapt

if TYPE_CHECKING:
    from ranktune.adapters import active_parameters, parameter_groups, ranks, total_rank
    from ranktune.compaction import compact
    from ranktune.config import RankConfig
    from ranktune.controller import RankController
    from ranktune.errors import AdapterFileError, ConfigError, DataError, ExportError, RanktuneError, RecipeError
    from ranktune.export import export_lora
    from ranktune.foreign_start import start_from
    from ranktune.gradients import ControllerError
    from ranktune.inspection import inspect
    from ranktune.integrations.trainer import RankCallback
    from ranktune.methods import DoraConfig, DyLoraConfig, DynamicDoraConfig, IncreLoraConfig, MorConfig
    from ranktune.rank_setting import set_rank
    from ranktune.squeezing import Squeezed, squeeze
    from ranktune.static_mixture import MeanGate, mean_gate

__version__ = "0.1.0"

_HOME = {
    "AdapterFileError": "ranktune.errors",
    "ConfigError": "ranktune.errors",
    "ControllerError": "ranktune.gradients",
    "DataError": "ranktune.errors",
    "DoraConfig": "ranktune.methods",
    "DyLoraConfig": "ranktune.methods",
    "DynamicDoraConfig": "ranktune.methods",
    "ExportError": "ranktune.errors",
    "IncreLoraConfig": "ranktune.methods",
    "MeanGate": "ranktune.static_mixture",
    "MorConfig": "ranktune.methods",
    "RankCallback": "ranktune.integrations.trainer",
    "RankConfig": "ranktune.config",
    "RankController": "ranktune.controller",
    "RanktuneError": "ranktune.errors",
    "RecipeError": "ranktune.errors",
    "Squeezed": "ranktune.squeezing",
    "active_parameters": "ranktune.adapters",
    "compact": "ranktune.compaction",
    "export_lora": "ranktune.export",
    "inspect": "ranktune.inspection",
    "mean_gate": "ranktune.static_mixture",
    "parameter_groups": "ranktune.adapters",
    "ranks": "ranktune.adapters",
    "set_rank": "ranktune.rank_setting",
    "squeeze": "ranktune.squeezing",
    "start_from": "ranktune.foreign_start",
    "total_rank": "ranktune.adapters",
}

__all__ = [
    "AdapterFileError",
    "ConfigError",
    "ControllerError",
    "DataError",
    "DoraConfig",
    "DyLoraConfig",
    "DynamicDoraConfig",
    "ExportError",
    "IncreLoraConfig",
    "MeanGate",
    "MorConfig",
    "RankCallback",
    "RankConfig",
    "RankController",
    "RanktuneError",
    "RecipeError",
    "Squeezed",
    "active_parameters",
    "compact",
    "export_lora",
    "inspect",
    "mean_gate",
    "parameter_groups",
    "ranks",
    "set_rank",
    "squeeze",
    "start_from",
    "total_rank",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'ranktune' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


# Registration needs PEFT and everything that the tuner imports. PEFT's import is the moment, unless it is one of these
# modules of ours that brings PEFT in, or one of them brings in another: each has to finish first.
_UNDER_THE_TUNER = {f"ranktune.{name}" for name in ("config", "layer", "peft_compat", "quantised_weight", "unmatched")}
_finished: set[str] = set()


def _register(finished: ModuleType) -> None:
    _finished.add(finished.__name__)
    if not (_UNDER_THE_TUNER & sys.modules.keys()) - _finished:
        importlib.import_module("ranktune.tuner")


for _name in ("peft", *_UNDER_THE_TUNER):
    wrapt.register_post_import_hook(_register, _name)
