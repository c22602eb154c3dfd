"""Adapter configuration: `RankConfig`, its strict validation, and the registry of methods.

A method is a subclass of `RankConfig` with its own ``method`` name, registered with `register_method`. Files carry that
name, so that `config_from_fields` finds the class again without knowing module paths.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, TypeVar

from peft.config import PeftConfig
from peft.utils import PeftType

from ranktune.errors import ConfigError, did_you_mean
from ranktune.policy import Layout, RankPolicy
from ranktune.update import LowRankUpdate

# The name under which PEFT knows every method of ours: one type, one tuner, the config's `method` tells them apart.
PEFT_TYPE = "RANKTUNE"


@dataclass
class RankConfig(PeftConfig):
    """A low-rank adapter of fixed rank (LoRA, Hu 2021), and the fields every other method shares.

    Words and defaults are PEFT's. The layer computes ``y = W x + bias + s B A dropout(x)`` with ``s = lora_alpha / r``.

    Raises:
        ConfigError: a field has a value that cannot work; the message names it.
    """

    method_name: ClassVar[str] = "lora"
    # Whether components have trained gates, with a policy that moves ranks by them.
    gated: ClassVar[bool] = False
    # Set on configs that were read from a saved adapter: what they name was resolved on the model they were saved from.
    saved: ClassVar[bool] = False

    method: str = field(default="", metadata={"help": "Set by the class: which method this is."})
    r: int = field(default=8, metadata={"help": "Rank: the number of rank-1 components per module."})
    lora_alpha: float = field(default=8, metadata={"help": "The update is scaled by lora_alpha / r."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout probability on the update's input."})
    target_modules: list[str] | set[str] | str | None = field(
        default=None,
        metadata={
            "help": "Names (or their ends) of the modules to adapt, a regular expression, or 'all-linear'. "
            "None takes PEFT's choice for the architecture."
        },
    )
    exclude_modules: list[str] | set[str] | str | None = field(
        default=None, metadata={"help": "Names (or a regular expression) of modules to leave alone."}
    )
    modules_to_save: list[str] | None = field(
        default=None,
        metadata={"help": "Modules outside the adapter to train and save in full, such as a new head."},
    )
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "Adapt only the layers with these indices."}
    )
    layers_pattern: list[str] | str | None = field(
        default=None, metadata={"help": "Name of the layer list that layers_to_transform counts in."}
    )
    rank_pattern: dict[str, int] = field(
        default_factory=dict, metadata={"help": "Module name (or regular expression) to its own rank."}
    )
    alpha_pattern: dict[str, float] = field(
        default_factory=dict, metadata={"help": "Module name (or regular expression) to its own lora_alpha."}
    )
    use_dora: bool = field(
        default=False, metadata={"help": "Weight decomposition: train each row's magnitude apart (Liu 2024)."}
    )
    detach_norm: bool = field(
        default=True,
        metadata={
            "help": "With use_dora: treat the row norm as a constant in backward (the paper's section 4.3 and all "
            "its results). False gives the exact gradient."
        },
    )
    dora_dropout: Literal["both_paths", "low_rank_path"] = field(
        default="both_paths",
        metadata={
            "help": "With use_dora and dropout: 'both_paths' is the reference, with a second product with the base "
            "weight; 'low_rank_path' drops only the update's input and is cheaper."
        },
    )
    use_rslora: bool = field(default=False, metadata={"help": "Scale by lora_alpha / sqrt(r) (Kalajdzievski 2023)."})
    init_weights: bool = field(
        default=True, metadata={"help": "Start as the identity. False starts from random factors, for tests."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType(PEFT_TYPE)
        if self.method not in ("", self.method_name):
            raise ConfigError(
                f"method={self.method!r} does not belong to {type(self).__name__} (method "
                f"{self.method_name!r}).{_class_for(self.method)}"
            )
        self.method = self.method_name
        for name in ("target_modules", "exclude_modules"):
            if isinstance(getattr(self, name), list):
                setattr(self, name, set(getattr(self, name)))
        self._check()

    def _check(self) -> None:
        """Refuse values that cannot work. Subclasses call super()."""
        require_count(self, "r", at_least=1)
        for key, rank in self.rank_pattern.items():
            if not is_count(rank) or rank < 1:
                raise ConfigError(f"rank_pattern[{key!r}]={rank!r} must be a whole number, at least 1.")
        for name, alpha in [("lora_alpha", self.lora_alpha)] + [
            (f"alpha_pattern[{key!r}]", value) for key, value in self.alpha_pattern.items()
        ]:
            if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not 0 < alpha < float("inf"):
                raise ConfigError(f"{name}={alpha!r} must be a finite number above 0.")
        if not isinstance(self.lora_dropout, (int, float)) or not 0.0 <= self.lora_dropout < 1.0:
            raise ConfigError(f"lora_dropout={self.lora_dropout!r} must be a probability in [0, 1).")
        if self.dora_dropout not in ("both_paths", "low_rank_path"):
            raise ConfigError(f"dora_dropout={self.dora_dropout!r} must be 'both_paths' or 'low_rank_path'.")
        for name in ("use_dora", "detach_norm", "use_rslora", "init_weights"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name}={getattr(self, name)!r} must be true or false.")
        if isinstance(self.target_modules, set) and not self.target_modules:
            raise ConfigError("target_modules is an empty list: name at least one module, or use 'all-linear'.")
        if self.layers_pattern is not None and self.layers_to_transform is None:
            raise ConfigError("layers_pattern has no effect without layers_to_transform: set both or neither.")
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            raise ConfigError(
                "layers_to_transform needs target_modules as a list of names; a regular expression can name the "
                "layers itself."
            )

    @property
    def start_rank(self) -> int:
        """How many components a module gets at the start, where ``rank_pattern`` does not say otherwise."""
        return self.r

    @property
    def capacity(self) -> int:
        """How many components a module has room for, where ``rank_pattern`` does not say otherwise."""
        return self.start_rank

    @property
    def needs_controller(self) -> bool:
        """Whether a `RankController` has to act while it trains."""
        return self.gated

    def scaling(self, alpha: float, capacity: int) -> float:
        """The factor on ``B A`` at the start."""
        return alpha / (capacity**0.5 if self.use_rslora else capacity)

    def comparable_parameters(self, in_features: int, out_features: int, rank: int) -> dict[str, int]:  # noqa: ARG002
        """What adapters of other methods would have on a module at the same rank, for those who compare sizes."""
        return {}

    def make_update(self, in_features: int, out_features: int, capacity: int) -> LowRankUpdate:
        """The tensors for one module, without values."""
        return LowRankUpdate(in_features, out_features, capacity, gated=self.gated, **self.update_options())

    def update_options(self) -> dict[str, Any]:
        """What every kind of update takes from the config."""
        return {"dropout": self.lora_dropout, "detach_norm": self.detach_norm, "dora_dropout": self.dora_dropout}

    def reset_parameters(self, update: LowRankUpdate) -> None:
        """Give a fresh update its starting values."""
        update.reset_parameters(identity=self.init_weights)

    def advice(self, total_steps: int) -> str | None:  # noqa: ARG002
        """What is worth knowing before a run of so many optimizer steps begins, in words, or None."""
        return None

    def connect(self, updates: Mapping[str, LowRankUpdate]) -> None:
        """Let a model's updates know of one another, where they have something to share.

        Args:
            updates: of one adapter, module name to update, in the model's order.
        """

    def as_saved(self, update: LowRankUpdate, tensors: Collection[str]) -> None:
        """Give an update that stands alone the form of one whose tensors of these names were saved."""

    def policy(self, layout: Layout, total_steps: int) -> RankPolicy | None:  # noqa: ARG002
        """The rule that moves ranks over a run of so many optimizer steps, or None where they are fixed."""
        return None

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain data, sets as sorted lists, so that saved files do not change from run to run."""
        return {key: sorted(value) if isinstance(value, set) else value for key, value in super().to_dict().items()}


METHODS: dict[str, type[RankConfig]] = {}
"""Method name, as in a recipe or a saved file, to its config class."""

Config = TypeVar("Config", bound=RankConfig)


def register_method(config_class: type[Config]) -> type[Config]:
    """Class decorator: make a method known by its ``method_name``.

    Raises:
        ConfigError: another class already has that name.
    """
    known = METHODS.setdefault(config_class.method_name, config_class)
    if known is not config_class:
        raise ConfigError(f"method {config_class.method_name!r} is already {known.__name__}.")
    return config_class


register_method(RankConfig)


def config_from_fields(fields: Mapping[str, Any]) -> RankConfig:
    """Build the config of whatever method the ``method`` field names, as read from an ``adapter_config.json``.

    A field this version does not know is ignored with a warning, as PEFT does for files of newer versions.

    Raises:
        ConfigError: the method is unknown, or a value cannot work.
    """
    method = fields.get("method") or RankConfig.method_name
    if method not in METHODS:
        raise ConfigError(
            f"method={method!r} is not one of {', '.join(sorted(METHODS))}.{did_you_mean(str(method), METHODS)}"
        )
    config_class = METHODS[method]
    known = {item.name for item in dataclasses.fields(config_class)}
    if unknown := sorted(set(fields) - known):
        warnings.warn(
            f"{config_class.__name__} has no fields {unknown}: ignored. The file was probably written by a newer "
            "version of ranktune or peft.",
            stacklevel=2,
        )
    return config_class(**{name: value for name, value in fields.items() if name in known})


def require_count(config: object, name: str, at_least: int) -> None:
    """Refuse a field that is not a whole number of at least ``at_least``."""
    value = getattr(config, name)
    if not is_count(value) or value < at_least:
        raise ConfigError(f"{name}={value!r} must be a whole number, at least {at_least}.")


def require_share(config: object, name: str) -> None:
    """Refuse a field that is not a number in [0, 1)."""
    value = getattr(config, name)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0.0 <= value < 1.0:
        raise ConfigError(f"{name}={value!r} must be a number in [0, 1).")


def is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _class_for(method: str) -> str:
    """Name the class to use for a method, or the closest known method."""
    if method in METHODS:
        return f" Use {METHODS[method].__name__}."
    return did_you_mean(method, METHODS) or f" Known methods: {', '.join(sorted(METHODS))}."
