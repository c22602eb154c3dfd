"""`NestedUpdate`: an update whose leading components are an update of their own, at every rank.

In training a controller draws the rank b for each optimizer step; in evaluation, and without a controller, it is the
rank that was set, at first the highest. The scale follows the rank in both.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ranktune.errors import ConfigError
from ranktune.lowrank import Components, Span
from ranktune.magnitude import norm_dtype
from ranktune.update import LowRankUpdate


class Draw:
    """What the modules of one capacity train in the coming optimizer step. They share it.

    Args:
        spans: from the optimizer steps done to what the next one trains.
        device: where the modules are.

    Attributes:
        span: for eager mode, which slices. bounds: the same as [2] int64, for compiled graphs: a new number in them
            needs no new graph.
    """

    def __init__(self, spans: Callable[[int], Span], device: torch.device) -> None:
        self.spans = spans
        self.bounds = torch.zeros(2, dtype=torch.int64, device=device)
        self.at(0)

    def at(self, step: int) -> None:
        """Draw for the optimizer step that has so many steps before it."""
        self.span = self.spans(step)
        for place, bound in zip(self.bounds, self.span, strict=True):
            place.fill_(bound)


class NestedUpdate(LowRankUpdate):
    """``s (R / b)^p B[:, :b] A[:b]`` for one b from 1 to R, with s meant for all R components.

    Args:
        in_features, out_features, capacity: see `LowRankUpdate`; R is the capacity at the start.
        scale_power: p, 1 or, with ``use_rslora``, 0.5.
        options: of `LowRankUpdate`.

    Attributes:
        rank_active: [R] bool, the leading components in use where nothing is drawn; saved with the weights.
        rank_step: [1] int64, optimizer steps done; saved with the weights.
        draw: set by a controller, what to train in the coming step.
    """

    rank_active: Tensor  # pyright: ignore[reportIncompatibleVariableOverride]  (this kind always has them)
    rank_step: Tensor  # pyright: ignore[reportIncompatibleVariableOverride]

    def __init__(
        self, in_features: int, out_features: int, capacity: int, *, scale_power: float, **options: Any
    ) -> None:
        super().__init__(in_features, out_features, capacity, **options)
        self.register_buffer("rank_active", torch.ones(capacity, dtype=torch.bool))
        self.register_buffer("rank_step", torch.zeros(1, dtype=torch.int64))
        self.full_rank = capacity
        self.scale_power = scale_power
        self.needs_controller = True
        self.draw: Draw | None = None
        self._rank = capacity

    @property
    def rank(self) -> int:
        """The number of components in use where nothing is drawn, known without storage too."""
        return self._rank

    @property
    def parameters_in_use(self) -> int:
        """See `LowRankUpdate.parameters_in_use`."""
        unused = self.capacity - self._rank
        return super().parameters_in_use - unused * (self.lora_A.shape[1] + self.lora_B.shape[0])

    def set_rank(self, b: int) -> None:
        """Use the first b components from now on, 1 <= b <= R; training with a controller goes on drawing its own."""
        self.rank_active[:b] = True
        self.rank_active[b:] = False
        self._rank = b

    def follow(self, draw: Draw | None) -> None:
        """Train what is drawn from now on, beginning at this update's own step; None is everything in use."""
        self.draw = draw
        self._read_state()

    def factors(self, scale: float) -> tuple[Tensor, Tensor, float]:
        """See `LowRankUpdate.factors`: of the rank that was set."""
        if torch.compiler.is_compiling():
            B = torch.where(self.rank_active, self.lora_B, 0.0) * self._growth_of(self.rank_active.sum())
            return torch.where(self.rank_active.unsqueeze(1), self.lora_A, 0.0), B, scale
        if self._rank == self.capacity:
            return self.lora_A, self.lora_B, scale * self._growth(self._rank)
        return self.plain_factors(scale)

    def plain_factors(self, scale: float, rank: int | None = None) -> tuple[Tensor, Tensor, float]:
        """See `LowRankUpdate.plain_factors`: cut at a rank, or at the one that was set."""
        b = self._rank if rank is None else min(rank, self.capacity)
        return self.lora_A[:b], self.lora_B[:, :b], scale * self._growth(b)

    def components_now(self, scale: float) -> Components:
        """See `LowRankUpdate.components_now`: in training, of the rank that was drawn."""
        if not self.training or self.draw is None:
            return Components(*self.factors(scale))
        if torch.compiler.is_compiling():
            return Components(*self._masked(self.draw.bounds), scale)
        span = self.draw.span
        return Components(self.lora_A, self.lora_B, scale * self._growth(span.end), span=span)

    def _masked(self, bounds: Tensor) -> tuple[Tensor, Tensor]:
        """A and the scaled B, whole: zero beyond what takes part, without gradient where not trained."""
        first, end = bounds.unbind()
        place = torch.arange(self.capacity, device=bounds.device)
        present, trained = place < end, (place >= first) & (place < end)
        A = torch.where(trained.unsqueeze(1), self.lora_A, self.lora_A.detach())
        B = torch.where(trained, self.lora_B, self.lora_B.detach())
        A = torch.where(present.unsqueeze(1), A, 0.0)
        return A, torch.where(present, B, 0.0) * self._growth_of(end)

    def _growth(self, rank: int) -> float:
        """How much larger the scale is at a rank than at the full one."""
        return (self.full_rank / rank) ** self.scale_power

    def _growth_of(self, rank: Tensor) -> Tensor:
        """The same for a rank that only a compiled graph knows."""
        return (self.full_rank / rank.to(norm_dtype(self.lora_B.dtype))) ** self.scale_power

    def _read_state(self) -> None:
        """Take the plain numbers from the buffers, after these were written."""
        if self.rank_active.is_meta or self.rank_step.is_meta:
            return
        self._rank = int(self.rank_active.sum())
        if self.draw is not None:
            self.draw.at(int(self.rank_step))

    def keep_components(self, kept: Tensor) -> None:
        """See `LowRankUpdate.keep_components`.

        Raises:
            ConfigError: a controller is drawing ranks up to the present capacity.
        """
        if self.draw is not None and len(kept) < self.capacity:
            raise ConfigError(
                f"a controller is training ranks up to {self.capacity}, and {len(kept)} components would be left: "
                "finish or close it first."
            )
        super().keep_components(kept)
        self._read_state()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self._read_state()
