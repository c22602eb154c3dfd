"""Every place where ranktune leans on PEFT's internals rather than on its documented interface.

PEFT knows its methods through a closed enum and four tables; a method from outside has to be added to both. When a
new PEFT release moves something, this is the file to look at.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from peft.config import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, _get_in_out_features
from peft.utils import PeftType, register_peft_method
from peft.utils.error import NoMatchingPeftModuleError
from peft.utils.other import get_pattern_key
from torch import Tensor, nn

from ranktune.adapter_file import check_folder
from ranktune.config import PEFT_TYPE, RankConfig, config_from_fields
from ranktune.errors import AdapterFileError, ConfigError
from ranktune.update import LowRankUpdate

# Every name of ours in a model or a file begins with this, and PEFT tells our tensors by it.
PREFIX = PEFT_TYPE.lower() + "_"

# Before every name in an adapter file of PEFT's.
FILE_PREFIX = "base_model.model."

Value = TypeVar("Value")


def add_peft_type() -> None:
    """Add our member to PEFT's enum of adapter types, once."""
    if PEFT_TYPE in PeftType.__members__:
        return
    member = str.__new__(PeftType, PEFT_TYPE)
    member._name_ = PEFT_TYPE
    member._value_ = PEFT_TYPE
    PeftType._member_map_[PEFT_TYPE] = member
    PeftType._member_names_.append(PEFT_TYPE)
    PeftType._value2member_map_[PEFT_TYPE] = member


class UnmatchedTargetError(ConfigError, NoMatchingPeftModuleError):
    """A name in ``target_modules`` is not in the model. PEFT's own error of that meaning, so that callers catch it."""


class SavedConfig(PeftConfig):
    """What PEFT constructs from an ``adapter_config.json`` of ours: the config class that its ``method`` names."""

    def __new__(cls, **fields: Any) -> RankConfig:  # pyright: ignore[reportInconsistentConstructor]
        config = config_from_fields(fields)
        vars(config)["saved"] = True
        return config

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any
    ) -> PeftConfig:
        """Read a configuration of ours; PEFT calls this before it loads an adapter.

        Raises:
            AdapterFileError: a local folder is torn, contradictory, or holds pickled tensors.
        """
        folder = Path(pretrained_model_name_or_path, subfolder or "")
        if folder.is_dir():
            check_folder(folder)
        return super().from_pretrained(pretrained_model_name_or_path, subfolder, **kwargs)


class CheckedLoading(BaseTuner):
    """Saved tensors are compared with the model as a whole before the first of them is loaded."""

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """PEFT's hook between reading an adapter's tensors and loading them.

        Raises:
            AdapterFileError: those of some module are not all there, or have shapes that do not belong to it.
        """
        saved: dict[str, dict[str, tuple[int, ...]]] = {}
        for name, tensor in state_dict.items():
            module, found, own = name.rpartition(f".{PREFIX}update.")
            if found:
                saved.setdefault(module.removeprefix(FILE_PREFIX), {})[own] = tuple(tensor.shape)
        for name, module in model.named_modules():
            update = _updates_of(module).get(adapter_name)
            shapes = saved.get(name.removeprefix(FILE_PREFIX))
            if isinstance(update, LowRankUpdate) and shapes and (misfit := update.misfit(shapes)) is not None:
                raise AdapterFileError(f"module {name} of the saved adapter {misfit}. Nothing was loaded.")
        return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)


def _updates_of(module: nn.Module) -> dict[str, nn.Module]:
    """Adapter name to update, of a layer of ours; empty for any other module."""
    updates = getattr(module, f"{PREFIX}update", None)
    return dict(updates.items()) if isinstance(updates, nn.ModuleDict) else {}


def register(tuner: type[BaseTuner]) -> None:
    """Make PEFT know our adapters: `get_peft_model`, `PeftModel.from_pretrained`, `AutoPeftModel`, transformers."""
    add_peft_type()
    register_peft_method(name=PEFT_TYPE.lower(), config_cls=SavedConfig, model_cls=tuner, prefix=PREFIX)


def feature_counts(layer: nn.Module) -> tuple[int, int]:
    """The (in, out) features of a linear layer of any kind PEFT knows, ``Conv1D`` and quantised ones included.

    Raises:
        ConfigError: PEFT cannot tell them.
    """
    inputs, outputs = _get_in_out_features(layer)
    if inputs is None or outputs is None:
        raise ConfigError(f"{type(layer).__name__} does not say how many features it maps to how many.")
    return inputs, outputs


def pattern_value(pattern: Mapping[str, Value], key: str, default: Value) -> Value:
    """The value of the first ``rank_pattern`` or ``alpha_pattern`` entry that matches a module's name."""
    return pattern.get(get_pattern_key(list(pattern), key), default)
