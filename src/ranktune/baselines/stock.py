"""Stock PEFT's LoRA, DoRA and AdaLoRA as methods of a recipe: the fields that decide a comparison, in PEFT's words."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass, field
from typing import Any, ClassVar, cast

import peft
from torch import nn
from transformers import PreTrainedModel

from ranktune.baselines.base import Baseline, register_baseline
from ranktune.baselines.callback import AdaLoraAllocation, FixedRanks
from ranktune.baselines.penalty import penalise_training_only
from ranktune.config import require_count, require_share
from ranktune.errors import ConfigError
from ranktune.policy import Layout


@dataclass
class StockAdapter(Baseline):
    """The fields that all of stock PEFT's low-rank adapters share."""

    r: int = field(default=8, metadata={"help": "Rank: the number of rank-1 components per module."})
    lora_alpha: float = field(default=8, metadata={"help": "The update is scaled by lora_alpha / r."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout probability on the update's input."})
    target_modules: list[str] | str | None = field(default=None, metadata={"help": "As in `RankConfig`."})
    exclude_modules: list[str] | str | None = field(default=None, metadata={"help": "As in `RankConfig`."})
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "As in `RankConfig`."})
    layers_to_transform: list[int] | int | None = field(default=None, metadata={"help": "As in `RankConfig`."})
    layers_pattern: list[str] | str | None = field(default=None, metadata={"help": "As in `RankConfig`."})

    def __post_init__(self) -> None:
        require_count(self, "r", at_least=1)

    def shared(self) -> dict[str, Any]:
        """What every stock configuration takes; a copy of its own, since PEFT extends lists in place."""
        names = ("target_modules", "exclude_modules", "modules_to_save", "layers_pattern")
        lists = {name: getattr(self, name) for name in names}
        return {
            "task_type": self.task_type,
            "lora_alpha": self.lora_alpha,
            "lora_dropout": self.lora_dropout,
            "layers_to_transform": self.layers_to_transform,
            **{name: list(value) if isinstance(value, list) else value for name, value in lists.items()},
        }

    @abstractmethod
    def stock_config(self) -> peft.PeftConfig:
        """PEFT's own configuration."""

    def put_on(self, base: nn.Module) -> Any:
        """See `Baseline.put_on`."""
        return peft.get_peft_model(cast(PreTrainedModel, base), self.stock_config())

    def callback(self) -> FixedRanks:
        """Ranks stay as they are."""
        return FixedRanks()


@register_baseline
@dataclass
class PeftLora(StockAdapter):
    """PEFT's `LoraConfig`."""

    method_name: ClassVar[str] = "peft-lora"
    peft_type: ClassVar[str | None] = "LORA"
    use_dora: ClassVar[bool] = False

    rank_pattern: dict[str, int] = field(
        default_factory=dict, metadata={"help": "Module name (or regular expression) to its own rank."}
    )
    alpha_pattern: dict[str, float] = field(
        default_factory=dict, metadata={"help": "Module name (or regular expression) to its own lora_alpha."}
    )
    use_rslora: bool = field(default=False, metadata={"help": "Scale by lora_alpha / sqrt(r)."})

    def stock_config(self) -> peft.LoraConfig:
        """PEFT's `LoraConfig`."""
        return peft.LoraConfig(
            **self.shared(),
            r=self.r,
            rank_pattern=dict(self.rank_pattern),
            alpha_pattern=dict(self.alpha_pattern),
            use_rslora=self.use_rslora,
            use_dora=self.use_dora,
        )


@register_baseline
@dataclass
class PeftDora(PeftLora):
    """PEFT's `LoraConfig(use_dora=True)`."""

    method_name: ClassVar[str] = "peft-dora"
    use_dora: ClassVar[bool] = True


@register_baseline
@dataclass
class PeftAdaLora(StockAdapter):
    """PEFT's `AdaLoraConfig` with the schedule in shares of the run, as its authors' settings come out.

    Trainer never calls its allocator, and the number of steps must be told to it: `AdaLoraAllocation` does both.
    """

    method_name: ClassVar[str] = "peft-adalora"
    peft_type: ClassVar[str | None] = "ADALORA"
    resumable: ClassVar[bool] = False  # the allocator's averages are plain attributes

    init_r: int | None = field(
        default=None, metadata={"help": "Starting rank; None is ceil(1.5 r), as in the AdaLoRA paper."}
    )
    warmup_ratio: float = field(default=0.15, metadata={"help": "Share of the run before ranks fall (tinit)."})
    final_ratio: float = field(default=0.5, metadata={"help": "Share of the run after ranks have fallen (tfinal)."})
    interval: int = field(default=10, metadata={"help": "Optimizer steps between two allocations (deltaT)."})
    beta1: float = field(default=0.85, metadata={"help": "Memory of the sensitivity's average."})
    beta2: float = field(default=0.85, metadata={"help": "Memory of the uncertainty's average."})
    orth_reg_weight: float = field(default=0.5, metadata={"help": "Weight of the orthogonality penalty; PEFT's 0.5."})

    def __post_init__(self) -> None:
        super().__post_init__()
        require_count(self, "interval", at_least=1)
        if self.init_r is not None:
            # With nothing to prune PEFT's allocator asks for the 0-th smallest score, and torch raises.
            require_count(self, "init_r", at_least=self.r + 1)
        for name in ("warmup_ratio", "final_ratio", "beta1", "beta2"):
            require_share(self, name)
        for name in ("beta1", "beta2"):
            if getattr(self, name) == 0:
                raise ConfigError(f"{name}=0 is refused by PEFT's allocator: it must be above 0.")

    @property
    def start_rank(self) -> int:
        """The rank of every module before the first allocation; above r, or there would be nothing to allocate."""
        return max(math.ceil(1.5 * self.r), self.r + 1) if self.init_r is None else self.init_r

    def stages(self, total_steps: int) -> dict[str, int]:
        """PEFT's fields of the schedule for a run of so many optimizer steps.

        Raises:
            ConfigError: no step is left between warm-up and the final phase.
        """
        first, last = round(self.warmup_ratio * total_steps), round(self.final_ratio * total_steps)
        if first >= total_steps - last:
            raise ConfigError(
                f"total_steps={total_steps} is too short for AdaLoRA: with warmup_ratio={self.warmup_ratio} and "
                f"final_ratio={self.final_ratio} its ranks would fall from step {first} to {total_steps - last}. Train "
                "longer or lower the ratios."
            )
        return {"total_step": total_steps, "tinit": first, "tfinal": last, "deltaT": self.interval}

    def policy(self, layout: Layout, total_steps: int) -> None:  # noqa: ARG002
        """See `Baseline.policy`."""
        self.stages(total_steps)

    def stock_config(self) -> peft.AdaLoraConfig:
        """PEFT's `AdaLoraConfig`; it insists on a length, and gets the true one when training begins."""
        return peft.AdaLoraConfig(
            **self.shared(),
            target_r=self.r,
            init_r=self.start_rank,
            total_step=1,
            beta1=self.beta1,
            beta2=self.beta2,
            orth_reg_weight=self.orth_reg_weight,
        )

    def put_on(self, base: nn.Module) -> Any:
        """See `Baseline.put_on`."""
        model = super().put_on(base)
        penalise_training_only(model)
        return model

    def callback(self) -> AdaLoraAllocation:
        """See `Baseline.callback`."""
        return AdaLoraAllocation(self.stages)
