"""IncreLoRA: Incremental Parameter Allocation (Zhang et al. 2023, arXiv 2308.12043).

The update is a sum of gated rank-1 components; modules start with one each, and more are added where they matter:

    dW_k = s_k B diag(e) A,    s_k = lora_alpha / r_k,    r_k = the module's active components

a_i and b_i start as N(0, 0.02^2), e_i as 0. Beside its active components a module keeps ``grow_by`` in reserve with
e = 1e-5 held fast, whose a and b already learn ("advance learning"). Between backward and the optimizer's step t,
counted from 0, with G_k = dL/d(dW_k), a module is scored by

    S_k = sum |dW_k o G_k| / sqrt(out in)                                    sensitivity
    I_k <- beta1 I_k + (1 - beta1) S_k
    U_k <- beta2 U_k + (1 - beta2) |S_k - I_k|    with the new I_k           uncertainty
    score_k = I_k U_k                                                        from 0, never corrected nor reset

and at t > warmup with t divisible by the interval the reserve of the ``top_h`` best modules becomes active, and is
filled up again. New components have a learning-rate ramp of their own ("restart warmup": `ranktune.restart_warmup`).
All along, A and B are drawn towards orthonormal rows and columns by

    gamma / 2M sum_k (||A A^T - I||_F + ||B^T B - I||_F)                     over active components and reserve

until the total reaches the target; then what is in reserve is dropped, and nothing is scored any more.

What differs from the authors' code: the target is met exactly (theirs overshoots in two of its own runs, and then
never stops scoring) and ties admit no extra module; scores that are not finite are left out; all components live in
tensors of a fixed capacity ``max_r``, so that DDP, compilation and resuming work; s_k has no 1e-5 in its denominator;
G is reduced inside backward, by default only in the last ``score_window`` steps before each round, which the averages
cannot tell from all steps (0.85^40 = 0.15 %); a micro-batch's scores add up.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from ranktune.allocation import grow_best
from ranktune.config import RankConfig, register_method, require_count, require_share
from ranktune.errors import ConfigError
from ranktune.growing import GrowingUpdate
from ranktune.orthogonality import add_slopes, from_orthonormal
from ranktune.policy import GrowthPolicy, Layout, RankPolicy, RankState
from ranktune.schedule import GrowthSchedule
from ranktune.update import LowRankUpdate

_RESERVE_GATE = 1e-5
_INIT_STD = 0.02


@register_method
@dataclass
class IncreLoraConfig(RankConfig):
    """Start at rank 1, grow where it matters, until the mean rank is ``r``.

    What is None is set from the run's length: a round every 1 % of its steps, growth complete at half of them.
    """

    method_name: ClassVar[str] = "increlora"
    gated: ClassVar[bool] = True

    target_params: int | None = field(
        default=None, metadata={"help": "Budget in parameters instead of r: the grown adapter has at most so many."}
    )
    init_r: int = field(default=1, metadata={"help": "Starting rank of every module."})
    max_r: int | None = field(
        default=None, metadata={"help": "Largest rank of a module, for which memory is set aside; None is 4 r."}
    )
    warmup_ratio: float | None = field(
        default=None, metadata={"help": "Share of the run before the first round; None is one interval."}
    )
    grow_interval: int | None = field(
        default=None, metadata={"help": "Optimizer steps between two rounds; None is 1 % of the run, at least 5."}
    )
    top_h: int | None = field(
        default=None, metadata={"help": "Modules that grow in a round; None lets growth end at half of the run."}
    )
    grow_by: int | None = field(
        default=None, metadata={"help": "Components a module grows by, and keeps in reserve; None is r // 2."}
    )
    beta1: float = field(default=0.85, metadata={"help": "Memory of the sensitivity's average."})
    beta2: float = field(default=0.85, metadata={"help": "Memory of the uncertainty's average."})
    orth_weight: float = field(
        default=0.1, metadata={"help": "Weight of the orthogonality penalty; the paper's gamma."}
    )
    score_norm: Literal["sqrt", "mean"] = field(
        default="sqrt",
        metadata={"help": "Divide a module's sensitivity by the root of its size, as the authors' code, or by it."},
    )
    score_window: int | Literal["all"] = field(
        default=40, metadata={"help": "Steps before each round in which modules are scored, or 'all'."}
    )
    advance_learning: bool = field(default=True, metadata={"help": "Train the vectors of the reserve."})
    restart_warmup: bool = field(
        default=True, metadata={"help": "Give new components a learning-rate ramp of their own, one interval long."}
    )
    preserve_on_grow: bool = field(
        default=False,
        metadata={"help": "Make up for the fall of lora_alpha / r_k when a module grows, so that its output stays."},
    )

    def _check(self) -> None:
        super()._check()
        require_count(self, "init_r", at_least=1)
        for name in ("target_params", "grow_interval", "top_h", "grow_by"):
            if getattr(self, name) is not None:
                require_count(self, name, at_least=1)
        if self.target_params is None and self.r < self.init_r:
            raise ConfigError(f"r={self.r} is below init_r={self.init_r}: ranks only grow. Raise r or lower init_r.")
        if self.max_r is not None:
            require_count(self, "max_r", at_least=self.r if self.target_params is None else self.init_r)
        for name in ("beta1", "beta2") if self.warmup_ratio is None else ("beta1", "beta2", "warmup_ratio"):
            require_share(self, name)
        for name in ("advance_learning", "restart_warmup", "preserve_on_grow"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name}={getattr(self, name)!r} must be true or false.")
        if self.orth_weight < 0.0:
            raise ConfigError(f"orth_weight={self.orth_weight} must not be negative.")
        if self.score_norm not in ("sqrt", "mean"):
            raise ConfigError(f"score_norm={self.score_norm!r} must be 'sqrt' or 'mean'.")
        if self.score_window != "all":
            require_count(self, "score_window", at_least=1)
        if self.rank_pattern:
            raise ConfigError(
                "rank_pattern cannot be used with increlora, which chooses every module's rank itself: set r (the "
                "mean rank), or leave modules out with exclude_modules."
            )

    @property
    def start_rank(self) -> int:
        """``init_r``: the same in every module."""
        return self.init_r

    @property
    def capacity(self) -> int:
        """``max_r``: active components and reserve together."""
        return max(4 * self.r, self.init_r) if self.max_r is None else self.max_r

    def scaling(self, alpha: float, capacity: int) -> float:  # noqa: ARG002
        """s at the start rank; the update follows the active rank from there."""
        return super().scaling(alpha, self.init_r)

    def make_update(self, in_features: int, out_features: int, capacity: int) -> LowRankUpdate:
        """See `RankConfig.make_update`; two averages a module, I and U."""
        return GrowingUpdate(
            in_features,
            out_features,
            capacity,
            start_rank=min(self.init_r, capacity),
            scale_power=0.5 if self.use_rslora else 1.0,
            reserve_learns=self.advance_learning,
            averages=2,
            **self.update_options(),
        )

    def reset_parameters(self, update: LowRankUpdate) -> None:
        """a, b ~ N(0, 0.02^2) and e = 0, for all that may ever be there."""
        std = _INIT_STD if self.init_weights else 0.5
        nn.init.normal_(update.lora_A, std=std)
        nn.init.normal_(update.lora_B, std=std)
        if self.init_weights:
            nn.init.zeros_(update.required_gate())
        else:
            nn.init.normal_(update.required_gate())

    def policy(self, layout: Layout, total_steps: int) -> RankPolicy:
        """The growth rule over a run of so many optimizer steps."""
        return IncreLoraPolicy(self, layout, total_steps)


class IncreLoraPolicy(GrowthPolicy):
    """Grow the modules of highest sensitivity x uncertainty, in rounds, until the target is met exactly.

    A round grows ``top_h`` modules, or all of them where fewer could leave more than later rounds can give (when most
    modules are full, or the run is about to end).

    Raises:
        ConfigError: the target cannot be met; the message shows the arithmetic.
    """

    def __init__(self, config: IncreLoraConfig, layout: Layout, total_steps: int) -> None:
        self.beta1, self.beta2 = config.beta1, config.beta2
        self.score_norm = config.score_norm
        self.orth_weight = config.orth_weight
        self.keep_output = config.preserve_on_grow
        self.reserve_gate = _RESERVE_GATE if config.advance_learning else 0.0
        self.capacity = config.capacity
        self.count = len(layout.modules)
        in_ranks = config.target_params is None
        self.unit = "components" if in_ranks else "parameters"
        self.costs = torch.ones(self.count, dtype=torch.int64) if in_ranks else layout.costs
        self.target = self.count * config.r if config.target_params is None else config.target_params
        self.ranks = layout.ranks_from(config.init_r)
        self.start = int((self.costs * self.ranks).sum())
        self._refuse_without_room(config)
        self.grow_by = max(1, config.r // 2) if config.grow_by is None else config.grow_by
        interval = max(5, total_steps // 100) if config.grow_interval is None else config.grow_interval
        self.schedule = GrowthSchedule(
            warmup=interval if config.warmup_ratio is None else round(config.warmup_ratio * total_steps),
            interval=interval,
            total_steps=total_steps,
            window=None if config.score_window == "all" else config.score_window,
        )
        self.ramp = interval if config.restart_warmup else 0
        self.top_h = self._default_top_h() if config.top_h is None else min(config.top_h, self.count)
        self._refuse_if_too_short()

    def measures(self, step: int) -> bool:
        return self.schedule.is_scored(step)

    def measure(self, updates: Sequence[LowRankUpdate]) -> Tensor:
        """S of every module [M], from what backward left at the score leaves."""
        device = updates[0].lora_A.device
        return torch.cat([_sensitivity_of(update, self.score_norm).to(device) for update in updates])

    def observe(self, state: RankState, measured: Tensor) -> RankState:
        """``I`` and ``U``, in this order: U takes the new I."""
        S = measured.to(state.average)
        I, U = state.average.unbind(1)  # noqa: E741
        I = self.beta1 * I + (1.0 - self.beta1) * S  # noqa: E741
        U = self.beta2 * U + (1.0 - self.beta2) * (S - I).abs()
        return RankState(state.step, state.active, torch.stack([I, U], 1))

    def decide(self, state: RankState) -> Tensor | None:
        """The reserve of the best modules becomes active."""
        if not self.schedule.is_event(state.step):
            return None
        ranks = state.active.sum(1).cpu()
        left = self.target - int((ranks * self.costs).sum())
        room = self.capacity - ranks
        later = self._in_reach(room, self.schedule.rounds_from(state.step + 1))
        grown = grow_best(
            self.importance(state).squeeze(1),
            room.clamp(max=self.grow_by),
            self.costs,
            left,
            self.top_h if left <= later else self.count,
        )
        if not grown.any():
            return None
        return torch.arange(state.active.shape[1]) < (ranks + grown).unsqueeze(1)

    def importance(self, state: RankState) -> Tensor:
        """``I U`` [M, 1]."""
        return state.average.prod(1, keepdim=True)

    def has_ended(self, step: int, ranks: Sequence[int]) -> bool:  # noqa: ARG002
        """Whether no module that has room costs as little as what is left."""
        costs = self.costs.tolist()
        left = self.target - sum(cost * rank for cost, rank in zip(costs, ranks, strict=True))
        return not any(rank < self.capacity and cost <= left for cost, rank in zip(costs, ranks, strict=True))

    def reserve(self, rank: int) -> int:
        return min(self.grow_by, self.capacity - rank)

    def budget(self, step: int) -> int:
        """The most that rounds of ``top_h`` modules can have made of the start."""
        rounds = self.schedule.rounds_before(step)
        return min(self.target, self.start + rounds * self.top_h * self.grow_by * int(self.costs.max()))

    def penalises(self, step: int) -> bool:  # noqa: ARG002
        return self.orth_weight > 0.0

    def penalty(self, updates: Sequence[LowRankUpdate]) -> Tensor:
        """``gamma / 2M sum_k (||A A^T - I||_F + ||B^T B - I||_F)`` over active components and reserve."""
        device = updates[0].lora_A.device
        distances = [
            from_orthonormal(vectors).to(device)
            for update in updates
            for vectors in (update.lora_A[: update.window], update.lora_B[:, : update.window].T)
        ]
        return torch.stack(distances).sum() * (self.orth_weight / (2 * len(updates)))

    def add_penalty_gradients(self, updates: Sequence[LowRankUpdate], scale: Tensor | float = 1.0) -> None:
        """The same for each parameter; nothing for a reserve that does not learn."""
        terms = [term for update in updates for term in _rows_and_gradients(update)]
        add_slopes(terms, self.orth_weight / (2 * len(updates)) * scale)

    def _in_reach(self, room: Tensor, rounds: int) -> int:
        """What so many rounds can give if every module takes part."""
        return int((room.clamp(max=self.grow_by * rounds) * self.costs).sum())

    def _default_top_h(self) -> int:
        """Few enough that growth goes on until half of the run."""
        rounds = self.schedule.rounds_before(self.schedule.total_steps // 2 + 1) or 1
        components = (self.target - self.start) // int(self.costs.min())
        return max(1, min(self.count, math.ceil(components / (rounds * self.grow_by))))

    def _refuse_without_room(self, config: IncreLoraConfig) -> None:
        if self.target < self.start:
            raise ConfigError(
                f"the budget of {self.target:,} {self.unit} is below the start: {self.count} modules x init_r="
                f"{config.init_r} = {self.start:,} {self.unit}. Raise the budget or adapt fewer modules."
            )
        room = int(self.costs.sum()) * self.capacity
        if room <= self.target - int(self.costs.min()):
            raise ConfigError(
                f"the budget of {self.target:,} {self.unit} is above what there is room for: {self.count} modules x "
                f"max_r={self.capacity} = {room:,} {self.unit}. Raise max_r or lower the budget."
            )

    def _refuse_if_too_short(self) -> None:
        rounds = self.schedule.rounds_from(0)
        wanted = self.target - self.start
        room = self.capacity - self.ranks
        planned = rounds * self.top_h * self.grow_by * int(self.costs.max())
        if wanted >= int(self.costs.min()) and min(planned, self._in_reach(room, rounds)) < wanted:
            raise ConfigError(
                f"total_steps={self.schedule.total_steps} is too short to grow in: {rounds} rounds (every "
                f"{self.schedule.interval} steps after step {self.schedule.warmup}) x {self.top_h} modules x "
                f"{self.grow_by} = {rounds * self.top_h * self.grow_by:,} components, where {wanted:,} {self.unit} are "
                "to be added. Train longer, raise top_h or grow_by, or lower grow_interval or warmup_ratio."
            )


def _sensitivity_of(update: LowRankUpdate, norm: str) -> Tensor:
    """S [1]; zero where backward did not come by."""
    if update.score is None or update.score.grad is None:
        return torch.zeros(1, device=update.lora_A.device)
    size = update.lora_A.shape[1] * update.lora_B.shape[0]
    return update.score.grad / (size**0.5 if norm == "sqrt" else size)


def _rows_and_gradients(update: LowRankUpdate) -> Iterator[tuple[Tensor, Tensor]]:
    """The vectors that are drawn towards orthonormal ones, as rows, and the gradient of those that are trained."""
    window, trained = update.window, update.trained
    if update.lora_A.grad is not None:
        yield update.lora_A.detach()[:window], update.lora_A.grad[:trained]
    if update.lora_B.grad is not None:
        yield update.lora_B.detach()[:, :window].T, update.lora_B.grad[:, :trained].T
