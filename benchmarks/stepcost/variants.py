"""The table of what is compared: one row per way to adapt a model. A new method is one new row."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

from peft import AdaLoraConfig, AdaLoraModel, LoraConfig, PeftConfig, PeftModel
from torch import nn
from torch.optim import Optimizer

from ranktune import (
    DoraConfig,
    DyLoraConfig,
    DynamicDoraConfig,
    IncreLoraConfig,
    MorConfig,
    RankConfig,
    RankController,
    compact,
)
from ranktune.adapters import updates
from ranktune.growing import GrowingUpdate

from .naive_mor import NaiveMorConfig

# From rank, adapter dropout and target modules.
MakeConfig = Callable[[int, float, list[str]], PeftConfig]
AfterStep = Callable[[int], Any]


def _nothing(model: nn.Module, optimizer: Optimizer) -> None:
    """Nothing moves ranks."""


@dataclass(frozen=True)
class Variant:
    """One row of the comparison.

    Attributes:
        name: its word on the command line and in the JSON.
        label: its name in tables and charts.
        config: makes its PEFT config; None is the model without an adapter.
        attach: called once with the adapted model and its optimizer, to set up whatever moves ranks. If it returns a
            function, that is called with the step number (from 1) after every optimizer step, inside the timed part.
        stock: PEFT's own adapter of the same kind, if it has one and this is ours.
        timed, counted: whether the default run times it, and counts its bytes.
    """

    name: str
    label: str
    config: MakeConfig | None
    attach: Callable[[nn.Module, Optimizer], AfterStep | None] = _nothing
    stock: str | None = None
    timed: bool = True
    counted: bool = True


def _peft_lora(share: float = 1.0, **options: Any) -> MakeConfig:
    return lambda r, dropout, targets: LoraConfig(
        r=math.ceil(share * r), lora_alpha=2 * r, lora_dropout=dropout, target_modules=targets, **options
    )


def _peft_adalora(r: int, dropout: float, targets: list[str]) -> PeftConfig:
    """Start at 1.5 r and allocate every 10 steps, as its authors do; long enough that every step is in that phase."""
    return AdaLoraConfig(
        init_r=round(1.5 * r),
        target_r=r,
        deltaT=10,
        total_step=1_000_000,
        lora_alpha=2 * r,
        lora_dropout=dropout,
        target_modules=targets,
    )


def _attach_adalora(model: nn.Module, optimizer: Optimizer) -> AfterStep:  # noqa: ARG001  (every row's signature)
    return cast(AdaLoraModel, model.base_model).update_and_allocate


def _attach_controller(model: nn.Module, optimizer: Optimizer) -> None:
    """A run so long that every timed step is in the phase that costs most: all components there, scored every step.

    A nested method's steps are of the ranks it draws, up to r.
    """
    RankController(model, optimizer, total_steps=1_000_000)


def _attach_pruned(model: nn.Module, optimizer: Optimizer) -> None:
    """The end of a run: steps without gradients take the schedule to its end, and what was pruned goes."""
    steps = 100
    controller = RankController(model, optimizer, total_steps=steps)
    for _ in range(steps):
        optimizer.step()
    controller.finish()
    compact(model, optimizer)


def _growing(**options: Any) -> MakeConfig:
    """The first round is too far away for any timed step to be in its score window, unless every step is."""
    return _ours(IncreLoraConfig, grow_interval=100_000, **options)


def _attach_grown(model: nn.Module, optimizer: Optimizer) -> None:
    """The last moment of growth: one component a module is missing.

    As many components as ever take part in forward, the reserve among them, and all but the first came late.
    """
    config = cast(IncreLoraConfig, cast(PeftModel, model).peft_config["default"])
    reserve = config.r // 2
    RankController(model, optimizer, total_steps=1_000_000)
    for _, update in cast(Iterator[tuple[str, GrowingUpdate]], updates(model)):
        update.stock(config.r - 1 - update.rank + reserve, step=0, gate=1e-5)
        update.promote(config.r - 1 - update.rank, step=0, keep_output=False)


def _ours(config_class: type[RankConfig], **options: Any) -> MakeConfig:
    return lambda r, dropout, targets: config_class(
        r=r, lora_alpha=2 * r, lora_dropout=dropout, target_modules=targets, **options
    )


FROZEN = "frozen"
REFERENCE = "peft-lora"
STOCK_DORA = "peft-dora"

VARIANTS = {
    variant.name: variant
    for variant in (
        Variant(FROZEN, "frozen model", None),
        Variant(REFERENCE, "PEFT LoRA", _peft_lora()),
        Variant(STOCK_DORA, "PEFT DoRA", _peft_lora(use_dora=True)),
        Variant("peft-adalora", "PEFT AdaLoRA", _peft_adalora, _attach_adalora),
        Variant("lora", "ranktune lora", _ours(RankConfig), stock=REFERENCE),
        Variant("dora", "ranktune dora", _ours(DoraConfig), stock=STOCK_DORA),
        Variant("dynamic-dora", "ranktune dynamic-dora", _ours(DynamicDoraConfig), _attach_controller, stock=REFERENCE),
        Variant("peft-lora-1.5r", "PEFT LoRA, 1.5 r", _peft_lora(1.5)),
        Variant(
            "dynamic-dora-compacted",
            "dynamic compacted",
            # Random factors from the start: among zeros, ties would leave some modules nothing and others all.
            _ours(DynamicDoraConfig, init_weights=False),
            _attach_pruned,
            stock="peft-lora-1.5r",
            counted=False,
        ),
        # Bytes are counted without a controller, so of a single component.
        Variant("increlora", "ranktune increlora", _growing(), _attach_grown, stock=REFERENCE, counted=False),
        Variant(
            "increlora-scored",
            "increlora scoring",
            _growing(score_window="all"),
            _attach_grown,
            stock=REFERENCE,
            counted=False,
        ),
        Variant("mor", "ranktune mor (8 experts)", _ours(MorConfig), stock=REFERENCE),
        Variant("mor-naive", "mor, naive formula", _ours(NaiveMorConfig), stock=REFERENCE, timed=False),
        Variant("dylora", "ranktune dylora", _ours(DyLoraConfig), _attach_controller, stock=REFERENCE),
        Variant(
            "dora-exact", "ranktune dora exact", _ours(DoraConfig, detach_norm=False), stock=STOCK_DORA, timed=False
        ),
    )
}
