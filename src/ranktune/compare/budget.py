"""Equal final parameters: what every method gets, so that each ends with as many as LoRA has at the recipe's rank."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from ranktune.baselines import PeftAdaLora
from ranktune.compare.methods import Variant
from ranktune.errors import ConfigError
from ranktune.recipe.choices import complete_method, method_class, method_fields
from ranktune.run.targets import Plan

Planner = Callable[[dict[str, Any]], Plan]


@dataclass(frozen=True)
class Share:
    """What a method trains with.

    Attributes:
        method: its complete section of the recipe.
        budget: adapter parameters it was given, None where it has none to keep.
        planned: adapter parameters it is expected to end with, None for the whole model and where that is not known.
        note: how that came about, in words.
        at_most: whether `planned` is a bound, below which the method ends by less than a component.
    """

    method: dict[str, Any]
    budget: int | None
    planned: int | None
    note: str
    at_most: bool = False


def reference_budget(method: dict[str, Any], planner: Planner, file: str) -> int:
    """Adapter parameters of plain LoRA at the recipe's rank on the recipe's modules."""
    return planner(complete_method(Variant("lora", "lora", {}).section(method, file), file)).adapter


def fit(variant: Variant, method: dict[str, Any], budget: int, planner: Planner, file: str) -> Share:
    """Choose the variant's rank or parameter budget so that it ends with `budget` adapter parameters, or just below.

    Args:
        variant: the method and the fields that were set for it by hand.
        method: the recipe's method section.
        budget: adapter parameters.
        planner: counts what a complete method section would train, on a model without weights.
        file: where the fields come from, for messages.

    Raises:
        RecipeError, ConfigError: the method refuses its fields.
    """
    section = complete_method(variant.section(method, file), file)
    known = method_fields(method_class(section, file))
    if "r" not in known:
        return Share(section, None, None, "trains the whole model")
    adalora = method_class(section, file) is PeftAdaLora
    if variant.fields.keys() & {"r", "target_params", "rank_pattern"}:
        # Where ranks move, what is planned is the start.
        planned = None if adalora or "target_params" in known else planner(section).adapter
        return Share(section, None, planned, "its rank was set by hand")
    if "target_params" in known:
        return _by_parameters(section, budget, planner, file)
    if adalora:
        return _adalora(section, budget, planner, file)
    by_hand = variant.fields.keys() | (method.keys() if variant.name == method["name"] else set())
    if "num_experts" in known and "num_experts" not in by_hand:
        section = _with_fewer_experts(section, budget, planner, file)
    return _by_rank(section, budget, planner, file, may_differ=_ranks_may_differ(section, known))


def _by_parameters(section: dict[str, Any], budget: int, planner: Planner, file: str) -> Share:
    """Methods that choose the ranks themselves keep a budget in parameters; magnitudes and the like come off it."""
    plan = planner(section)
    fixed = sum(module.shape[0] for module in plan.modules) if section.get("use_dora") else 0
    complete = complete_method({**section, "target_params": budget - fixed}, file)
    return Share(complete, budget, budget, f"target_params={budget - fixed:,}, kept by the method itself", at_most=True)


def _adalora(section: dict[str, Any], budget: int, planner: Planner, file: str) -> Share:
    plan = planner(section)
    start = plan.rank // len(plan.modules)
    planned = plan.adapter * section["r"] // start
    note = f"mean rank {section['r']}; AdaLoRA counts ranks, not parameters"
    return Share(complete_method(section, file), budget, planned, note)


def _by_rank(section: dict[str, Any], budget: int, planner: Planner, file: str, may_differ: bool) -> Share:
    """The largest rank that fits, and one more on some modules for what is left; the scale stays the recipe's."""
    if planner(section).adapter == budget:
        return Share(section, budget, budget, f"r={section['r']}{_experts(section)}")
    one, two = (planner(_at_rank(section, rank, {}, file)) for rank in (1, 2))
    slope = two.adapter - one.adapter
    rank = max(1, (budget - one.adapter) // slope + 1)
    costs = {b.name: b.parameters - a.parameters for a, b in zip(one.modules, two.modules, strict=True)}
    left = budget - (one.adapter + (rank - 1) * slope)
    wider = _spread(costs, left) if may_differ and left > 0 else []
    complete = _at_rank(section, rank, dict.fromkeys(wider, rank + 1), file)
    planned = planner(complete).adapter
    extra = f" on {len(costs) - len(wider)} modules and {rank + 1} on {len(wider)}" if wider else ""
    return Share(complete, budget, planned, f"r={rank}{extra}{_experts(complete)}")


def _experts(section: dict[str, Any]) -> str:
    return f", num_experts={section['num_experts']}" if "num_experts" in section else ""


def _with_fewer_experts(section: dict[str, Any], budget: int, planner: Planner, file: str) -> dict[str, Any]:
    """Half as many experts, and half again, down to two, while their vectors leave no room for even one rank."""
    while planner(_at_rank(section, 1, {}, file)).adapter > budget and section["num_experts"] >= 4:
        section = complete_method({**section, "num_experts": section["num_experts"] // 2}, file)
    return section


def _ranks_may_differ(section: dict[str, Any], known: Iterable[str]) -> bool:
    """DyLoRA draws one rank for all modules, and none may be above it."""
    return "rank_pattern" in known and section["name"] != "dylora"


def _at_rank(section: dict[str, Any], rank: int, wider: dict[str, int], file: str) -> dict[str, Any]:
    """The section at another rank, with lora_alpha moved along, so that the update's scale is the recipe's."""
    if rank == section["r"] and not wider:
        return section
    root = bool(section.get("use_rslora"))

    def alpha(to: int) -> float:
        ratio = to / section["r"]
        return section["lora_alpha"] * (math.sqrt(ratio) if root else ratio)

    # DyLoRA's list of ranks ends with the highest.
    nested = {"ranks": [*(b for b in section["ranks"] if b < rank), rank]} if section.get("ranks") else {}
    patterns = {"rank_pattern": wider, "alpha_pattern": {name: alpha(to) for name, to in wider.items()}}
    changed = {**section, "r": rank, "lora_alpha": alpha(rank), **nested, **(patterns if wider else {})}
    return complete_method(changed, file)


def _spread(costs: dict[str, int], left: int) -> list[str]:
    """Modules, evenly over the model, whose costs together come as close to `left` as taking them in turn does."""
    if not costs or min(costs.values()) <= 0:
        raise ConfigError("a component without parameters cannot be budgeted.")
    names = list(costs)
    # Steps of the golden ratio visit any stretch of the model about equally often, however many are taken.
    in_turn = sorted(range(len(names)), key=lambda place: ((place + 1) * 0.6180339887498949) % 1.0)
    taken: set[str] = set()
    for place in in_turn:
        if costs[names[place]] <= left:
            taken.add(names[place])
            left -= costs[names[place]]
    return [name for name in names if name in taken]


def residual_words(shares: Iterable[tuple[str, Share]]) -> list[str]:
    """One line a method: what it gets, and by how much it is expected to miss the budget."""
    lines = []
    for label, share in shares:
        if share.planned is None or share.budget is None:
            count = "" if share.planned is None else f"{share.planned:,} adapter parameters, "
            lines.append(f"{label}: {count}{share.note}")
            continue
        if share.at_most:
            lines.append(f"{label}: at most {share.planned:,} adapter parameters; {share.note}")
            continue
        miss = share.planned - share.budget
        residual = "exactly the budget" if miss == 0 else f"{miss:+,} ({miss / share.budget:+.2%}) beside the budget"
        lines.append(f"{label}: {share.planned:,} adapter parameters, {residual}; {share.note}")
    return lines
