"""DyLoRA: Dynamic Search-Free Low-Rank Adaptation (Valipour et al., EACL 2023, arXiv 2210.07558).

One run trains an update that can be cut to any rank afterwards. A [r, in] and B [out, r] are those of a LoRA of the
highest rank r; every optimizer step draws one rank b ~ p_B for all modules, and truncates them to it (equation 7):

    h = W0 x + bias + (alpha / b) B[:, :b] A[:b] dropout(x)

so that a leading part of the components learns to work alone. The scale is that of b, in training and in evaluation: a
cut update is a plain LoRA of rank b with the same alpha. In a step of rank b

    update="frozen"   only what b has more than the rank below it is trained: component b where all ranks are drawn
    update="all"      all b components are trained

The gradient that reaches x is that of all b components in both.

What differs from the authors' code: b depends on seed and step alone, where theirs is drawn by each process from a
generator that resuming does not restore; ranks count from 1; evaluation is never at a rank that happened to be drawn
last; backward forms the gradient of the trained components only. As in their code, a component without a gradient is
still moved by Adam's momentum and by weight decay; ``optimizer_semantics="strict"`` (ours) holds it fast. ``ranks`` is
QDyLoRA's (arXiv 2402.10462) predefined set; ``use_dora``, ``use_rslora`` (alpha / sqrt(b)) and blocks are ours.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from bisect import bisect_right
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from ranktune.config import RankConfig, is_count, register_method, require_count
from ranktune.errors import ConfigError, did_you_mean
from ranktune.lowrank import Span
from ranktune.nested import NestedUpdate
from ranktune.policy import Layout, NestedPolicy
from ranktune.update import LowRankUpdate

_DISTRIBUTIONS = ("uniform", "geometric")
# The released runs train each component in thousands of steps.
_FEW_STEPS = 500


@register_method
@dataclass
class DyLoraConfig(RankConfig):
    """Train all ranks up to ``r`` at once, and choose one later with `ranktune.set_rank`."""

    method_name: ClassVar[str] = "dylora"

    min_r: int = field(default=1, metadata={"help": "Lowest rank that is trained."})
    ranks: list[int] | None = field(
        default=None, metadata={"help": "The ranks that are trained, the last one r; None is all from min_r to r."}
    )
    block_size: int = field(default=1, metadata={"help": "Train only ranks that are multiples of this."})
    rank_distribution: str | list[float] = field(
        default="uniform",
        metadata={"help": "How often each rank is drawn: 'uniform', 'geometric', or a weight for each rank."},
    )
    geometric_p: float = field(
        default=0.15, metadata={"help": "With 'geometric': the k-th rank is drawn in proportion to (1 - p)^k."}
    )
    update: Literal["frozen", "all"] = field(
        default="frozen",
        metadata={"help": "Components a step trains: those above the next lower rank (authors' default), or all b."},
    )
    optimizer_semantics: Literal["reference", "strict"] = field(
        default="reference",
        metadata={
            "help": "'reference' lets momentum and weight decay move components that a step does not train; 'strict' "
            "holds them and their optimizer state fast."
        },
    )

    def _check(self) -> None:
        super()._check()
        require_count(self, "min_r", at_least=1)
        require_count(self, "block_size", at_least=1)
        for name, choices in (("update", ("frozen", "all")), ("optimizer_semantics", ("reference", "strict"))):
            if getattr(self, name) not in choices:
                raise ConfigError(f"{name}={getattr(self, name)!r} must be one of {', '.join(map(repr, choices))}.")
        self._check_ranks()
        self._check_distribution()
        for key, rank in self.rank_pattern.items():
            if rank > self.r:
                raise ConfigError(
                    f"rank_pattern[{key!r}]={rank} is above r={self.r}, the highest rank that is drawn: the rest would "
                    "never be trained. Raise r."
                )

    def _check_ranks(self) -> None:
        if self.ranks is None:
            if self.r % self.block_size:
                raise ConfigError(
                    f"r={self.r} is not a multiple of block_size={self.block_size}: {self.r % self.block_size} "
                    f"components would never be trained. Set r to {self.r + -self.r % self.block_size}."
                )
            if self.min_r > self.r:
                raise ConfigError(f"min_r={self.min_r} is above r={self.r}, the highest rank.")
            return
        self.ranks = list(self.ranks) if isinstance(self.ranks, (list, tuple)) else self.ranks
        if not isinstance(self.ranks, list) or not self.ranks or not all(is_count(b) and b >= 1 for b in self.ranks):
            raise ConfigError(f"ranks={self.ranks!r} must be a list of whole numbers from 1, such as [1, 2, 4, 8].")
        if any(low >= high for low, high in itertools.pairwise(self.ranks)):
            raise ConfigError(f"ranks={self.ranks!r} must ascend, each rank once.")
        if self.ranks[-1] != self.r:
            raise ConfigError(
                f"ranks={self.ranks!r} must end with r={self.r}, the highest rank: set r to {self.ranks[-1]}."
            )
        if self.ranks[0] < self.min_r:
            raise ConfigError(f"ranks={self.ranks!r} begins below min_r={self.min_r}: leave min_r out, or the rank.")
        if off := [b for b in self.ranks if b % self.block_size]:
            raise ConfigError(f"ranks={self.ranks!r}: {off[0]} is not a multiple of block_size={self.block_size}.")

    def _check_distribution(self) -> None:
        if not _is_weight(self.geometric_p) or self.geometric_p >= 1.0:
            raise ConfigError(f"geometric_p={self.geometric_p!r} must be a number between 0 and 1.")
        weights = self.rank_distribution
        if isinstance(weights, str):
            if weights not in _DISTRIBUTIONS:
                raise ConfigError(
                    f"rank_distribution={weights!r} must be 'uniform', 'geometric' or a list of weights."
                    f"{did_you_mean(weights, _DISTRIBUTIONS)}"
                )
            return
        if not isinstance(weights, (list, tuple)) or not all(map(_is_weight, weights)):
            raise ConfigError(
                f"rank_distribution={weights!r} must be 'uniform', 'geometric' or a list of finite numbers above 0 (a "
                "rank that is never to be drawn is left out with ranks=[...])."
            )
        self.rank_distribution = list(weights)
        if len(weights) != len(self.nested_ranks):
            raise ConfigError(
                f"rank_distribution has {len(weights)} weights for {len(self.nested_ranks)} ranks "
                f"({_listed(self.nested_ranks)}): give one for each."
            )

    @property
    def needs_controller(self) -> bool:
        """A controller draws the ranks."""
        return True

    @property
    def nested_ranks(self) -> list[int]:
        """The ranks that are trained, ascending, the last one r."""
        if self.ranks is not None:
            return self.ranks
        return [b for b in range(self.min_r, self.r + 1) if b % self.block_size == 0]

    def advice(self, total_steps: int) -> str | None:
        """Whether a step trains so little of the adapter that the run is short for it."""
        if self.update == "all":
            return None
        weights = rank_weights(self)
        rarest = min(weights) / sum(weights) * total_steps
        if rarest >= _FEW_STEPS:
            return None
        fewer = [b for b in self.nested_ranks if b & (b - 1) == 0 or b == self.r]
        ways = f"train fewer ranks (method.ranks={fewer}), " if len(fewer) < len(self.nested_ranks) else ""
        return (
            f"dylora, update=frozen: some components are trained in about {rarest:,.0f} of the {total_steps:,} steps "
            f"only. Unless that is enough, train for longer (train.epochs), {ways}"
            "or set method.update=all, which trains every component below the rank that is drawn."
        )

    def make_update(self, in_features: int, out_features: int, capacity: int) -> LowRankUpdate:
        """See `RankConfig.make_update`."""
        scale_power = 0.5 if self.use_rslora else 1.0
        return NestedUpdate(in_features, out_features, capacity, scale_power=scale_power, **self.update_options())

    def policy(self, layout: Layout, total_steps: int) -> NestedPolicy:  # noqa: ARG002
        """What is drawn for each step, whatever the run's length."""
        return DyLoraPolicy(self, layout)


class DyLoraPolicy(NestedPolicy):
    """Draw b ~ p_B, and train component b or all up to it.

    In a module whose own highest rank (``rank_pattern``) is below b, its highest is drawn.
    """

    def __init__(self, config: DyLoraConfig, layout: Layout) -> None:
        self.ranks = config.nested_ranks
        self.strict = config.optimizer_semantics == "strict"
        self.frozen = config.update == "frozen"
        self.total = len(layout.modules) * config.r
        weights = rank_weights(config)
        self.probabilities = [weight / sum(weights) for weight in weights]
        self._cumulative = list(itertools.accumulate(self.probabilities))

    def draw(self, seed: int, step: int) -> int:
        """b ~ p_B, from a hash of seed and step: no generator is read or advanced."""
        digest = hashlib.blake2b(f"{seed} {step}".encode(), digest_size=8).digest()
        place = bisect_right(self._cumulative, int.from_bytes(digest, "little") / 2**64)
        return self.ranks[min(place, len(self.ranks) - 1)]

    def span(self, b: int, capacity: int) -> Span:
        """What b has more than the next lower rank is trained, or all of it."""
        b = min(b, capacity)
        lower = max((rank for rank in self.ranks if rank < b), default=0)
        return Span(lower if self.frozen else 0, b)

    def budget(self, step: int) -> int:  # noqa: ARG002
        return self.total


def rank_weights(config: DyLoraConfig) -> list[float]:
    """How often each of the nested ranks is drawn, relative to the others."""
    if isinstance(config.rank_distribution, list):
        return config.rank_distribution
    ratio = 1.0 - config.geometric_p if config.rank_distribution == "geometric" else 1.0
    return [ratio**k for k in range(len(config.nested_ranks))]


def _is_weight(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0.0 < value < math.inf


def _listed(ranks: list[int]) -> str:
    return ", ".join(map(str, ranks)) if len(ranks) <= 8 else f"{ranks[0]}, {ranks[1]}, ..., {ranks[-1]}"
