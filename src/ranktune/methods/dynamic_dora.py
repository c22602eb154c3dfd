"""Dynamic DoRA: Dynamic Low-Rank Adaptation (Mao et al., ACL 2024, arXiv 2405.17357).

Not to be confused with weight-decomposed DoRA (Liu et al. 2024), which here is ``dora``.

The update is a sum of gated rank-1 components (equation 6), all present from the start and pruned by importance:

    dW = s * sum_i c_i b_i a_i^T,    s = lora_alpha / R,    R = the starting rank, never rescaled

Every module starts with R = ceil(1.5 r) components, c = 0 and Kaiming-uniform A and B, so the model is unchanged at
first. After each optimizer step the components' shares of their module's update are averaged; inside a
window of the run the least important ones of all modules together are set to zero, ever more of them, and after it for
good. A component zeroed inside the window may come back: its gate is trained on.

What differs from the authors' code: exactly as many components are pruned as the schedule says (its threshold takes
all ties); budgets are counted in integers; norms come from factors, never from a [R, out, in] tensor; the optimizer's
moments of finally pruned components are cleared.
"""

from __future__ import annotations

import logging
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from ranktune.allocation import keep_best
from ranktune.config import RankConfig, register_method, require_count, require_share
from ranktune.errors import ConfigError
from ranktune.policy import Layout, RankPolicy, RankState
from ranktune.schedule import CubicPruning
from ranktune.update import LowRankUpdate

logger = logging.getLogger("ranktune")

_EPSILON = 1e-8  # of the share's denominator, as in the authors' code


@register_method
@dataclass
class DynamicDoraConfig(RankConfig):
    """Start wide, prune rank-1 components by importance until the mean rank is ``r``."""

    method_name: ClassVar[str] = "dynamic-dora"
    gated: ClassVar[bool] = True

    target_params: int | None = field(
        default=None,
        metadata={"help": "Budget in parameters instead of r: the pruned adapter has at most so many."},
    )
    init_r: int | None = field(default=None, metadata={"help": "Starting rank; None is ceil(1.5 r), as in the paper."})
    warmup_ratio: float = field(default=0.15, metadata={"help": "Share of the run before pruning may begin."})
    final_ratio: float = field(default=0.5, metadata={"help": "Share of the run after pruning is complete."})
    prune_interval: int = field(default=10, metadata={"help": "Optimizer steps between two prunings."})
    beta: float = field(default=0.9, metadata={"help": "Memory of the importance average."})
    dem_weight: float = field(
        default=0.1, metadata={"help": "Weight of the dimensional equilibrium penalty (DEM); the paper's eta."}
    )

    def _check(self) -> None:
        super()._check()
        require_count(self, "prune_interval", at_least=1)
        if self.target_params is not None:
            require_count(self, "target_params", at_least=1)
        if self.init_r is not None:
            require_count(self, "init_r", at_least=self.r)
        for name in ("warmup_ratio", "final_ratio", "beta"):
            require_share(self, name)
        if self.warmup_ratio + self.final_ratio >= 1.0:
            raise ConfigError(
                f"warmup_ratio={self.warmup_ratio} and final_ratio={self.final_ratio} leave no steps to prune in: "
                "their sum must be below 1."
            )
        weight = self.dem_weight
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0.0 <= weight < math.inf:
            raise ConfigError(f"dem_weight={weight!r} must be a finite number, at least 0.")
        if self.rank_pattern:
            raise ConfigError(
                "rank_pattern cannot be used with dynamic-dora, which chooses every module's rank itself: set r "
                "(the mean rank), or leave modules out with exclude_modules."
            )

    @property
    def start_rank(self) -> int:
        """R = ceil(1.5 r), or ``init_r``: the same in every module."""
        return math.ceil(1.5 * self.r) if self.init_r is None else self.init_r

    def reset_parameters(self, update: LowRankUpdate) -> None:
        """Kaiming-uniform A and B with the framework's own a = 0, and c = 0 (appendix D)."""
        nn.init.kaiming_uniform_(update.lora_A)
        nn.init.kaiming_uniform_(update.lora_B)
        if self.init_weights:
            nn.init.zeros_(update.required_gate())
        else:
            nn.init.normal_(update.required_gate())

    def policy(self, layout: Layout, total_steps: int) -> RankPolicy:
        """The pruning rule over a run of so many optimizer steps."""
        return DynamicDoraPolicy(self, layout, total_steps)


class DynamicDoraPolicy(RankPolicy):
    """Prune by averaged share-of-norm under a cubic budget.

    Raises:
        ConfigError: the budget or the window cannot be met; the message shows the arithmetic.
    """

    def __init__(self, config: DynamicDoraConfig, layout: Layout, total_steps: int) -> None:
        self.beta = config.beta
        self.dem_weight = config.dem_weight
        count = len(layout.modules)
        if config.target_params is None:
            self.costs = torch.ones(count, dtype=torch.int64)
            target = count * config.r
        else:
            self.costs = layout.costs
            target = config.target_params
        ranks = layout.ranks_from(config.start_rank)
        start = int((self.costs * ranks).sum())
        if start <= target and int(ranks.sum()) < count * config.start_rank:
            # Begun anew after it had been pruned for good: there is nothing to do, and that has been done.
            self.schedule = CubicPruning(start, start, 0, 0, config.prune_interval)
            return
        unit = "components" if config.target_params is None else "parameters"
        if target < int(self.costs.min()):
            raise ConfigError(
                f"the budget of {target:,} {unit} keeps nothing: the smallest of the {count} modules' components has "
                f"{int(self.costs.min()):,} {unit}. Raise the budget."
            )
        if target > start:
            raise ConfigError(
                f"the budget of {target:,} {unit} is above the start: {count} modules x {config.start_rank} components "
                f"= {start:,} {unit}. Raise init_r or lower the budget."
            )
        self.schedule = CubicPruning.over_run(
            start, target, total_steps, config.warmup_ratio, config.final_ratio, config.prune_interval
        )
        if self.schedule.end <= self.schedule.begin:
            raise ConfigError(
                f"total_steps={total_steps} is too short to prune in: with warmup_ratio={config.warmup_ratio} and "
                f"final_ratio={config.final_ratio} the window is steps {self.schedule.begin} to {self.schedule.end}. "
                "Train longer or lower the ratios."
            )
        if start > target and self.schedule.end - self.schedule.begin < config.prune_interval:
            logger.warning(
                "the window of steps %d to %d is shorter than prune_interval=%d: %s %s go at once at its end. Train "
                "longer, or lower prune_interval or the ratios.",
                self.schedule.begin, self.schedule.end, config.prune_interval, f"{start - target:,}", unit,
            )  # fmt: skip

    def measures(self, step: int) -> bool:
        return step <= self.schedule.end

    def measure(self, updates: Sequence[LowRankUpdate]) -> Tensor:
        """Share of each component in its module's update [M, R]: ``||c_i b_i a_i^T|| / ||dW||``."""
        return _by_shape(updates, component_shares)

    def observe(self, state: RankState, measured: Tensor) -> RankState:
        """``S_i <- beta S_i + (1 - beta) s_i`` from S = 0, without bias correction."""
        average = self.beta * state.average + (1.0 - self.beta) * measured.to(state.average)
        return RankState(state.step, state.active, average)

    def decide(self, state: RankState) -> Tensor | None:
        """Keep the best-scored components of all modules together that the budget allows."""
        if not self.schedule.is_event(state.step):
            return None
        return keep_best(state.average, self.costs, self.schedule.budget(state.step))

    def importance(self, state: RankState) -> Tensor:
        return state.average

    def is_final(self, step: int) -> bool:
        """Whether pruning is complete: inactive components then stay at zero for good."""
        return step >= self.schedule.end

    def has_ended(self, step: int, ranks: Sequence[int]) -> bool:  # noqa: ARG002
        return self.is_final(step)

    def budget(self, step: int) -> int:
        return self.schedule.budget(step)

    def penalises(self, step: int) -> bool:
        return self.dem_weight > 0.0 and step < self.schedule.end

    def penalty(self, updates: Sequence[LowRankUpdate]) -> Tensor:
        """``eta R``: the mean of the unbiased variances of all 2 n vectors a_i, b_i (2 n is the authors' code)."""
        vectors = 2 * sum(update.capacity for update in updates)
        device = updates[0].lora_A.device
        spread = [(u.lora_A.var(1).sum() + u.lora_B.var(0).sum()).to(device) for u in updates]
        return torch.stack(spread).sum() * (self.dem_weight / vectors)

    @torch.no_grad()
    def add_penalty_gradients(self, updates: Sequence[LowRankUpdate], scale: Tensor | float = 1.0) -> None:
        """``d Var(a) / da = 2 (a - mean a) / (length - 1)``, times eta / 2 n."""
        weight = self.dem_weight / sum(update.capacity for update in updates) * scale
        for update in updates:
            for vectors, dim in ((update.lora_A, 1), (update.lora_B, 0)):
                if vectors.grad is not None:
                    centred = vectors - vectors.mean(dim, keepdim=True)
                    vectors.grad.add_(centred.mul_(weight / (vectors.shape[dim] - 1)))


def component_shares(A: Tensor, B: Tensor, c: Tensor) -> Tensor:
    """``|c_i| ||b_i|| ||a_i|| / (||B diag(c) A||_F + eps)``, batched over modules of one shape.

    Args:
        A: [m, R, in]. B: [m, out, R]. c: [m, R].

    Returns:
        [m, R]. The squared norm of the sum is c^T ((B^T B) o (A A^T)) c: no [out, in] tensor is formed.
    """
    single = c.abs() * A.norm(dim=2) * B.norm(dim=1)
    gram = (B.mT @ B) * (A @ A.mT)
    total = torch.einsum("mi,mij,mj->m", c, gram, c).clamp_min(0.0).sqrt()
    return single / (total.unsqueeze(1) + _EPSILON)


def _by_shape(updates: Sequence[LowRankUpdate], score: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
    """Score the modules of each shape in one batch; rows come back in the given order, in float32."""
    rows: list[Tensor] = [torch.empty(0)] * len(updates)
    for positions in _groups(updates):
        group = [updates[position] for position in positions]
        A = torch.stack([update.lora_A for update in group]).float()
        B = torch.stack([update.lora_B for update in group]).float()
        c = torch.stack([update.required_gate() for update in group]).float()
        for position, row in zip(positions, score(A, B, c), strict=True):
            rows[position] = row
    return torch.stack([row.to(rows[0].device) for row in rows])


def _groups(updates: Sequence[LowRankUpdate]) -> Iterator[list[int]]:
    shapes: dict[tuple[object, ...], list[int]] = defaultdict(list)
    for position, update in enumerate(updates):
        shapes[(*update.lora_A.shape, *update.lora_B.shape, update.lora_A.device)].append(position)
    yield from shapes.values()
