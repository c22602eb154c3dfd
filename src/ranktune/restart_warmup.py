"""Restart warm-up: components that were added late learn as if each had an optimizer group of its own, made that day.

All components of a module share one tensor, one learning rate and one step counter. After the optimizer's step, the
late rows are set to where a fresh optimizer, with a learning-rate schedule of its own, would have put them; rows that
are not trained go back to what they were, bit for bit, whatever weight decay did.

With b and a a row before and after the step, t the optimizer's step count, k the row's age in steps (first = 1), m and
v its moments and lr, wd, beta1, beta2, eps of its group, AdamW's step of a fresh row is

    row = b (1 - rho lr wd) - rho lr m / (1 - beta1^k) / (sqrt(v) / sqrt(1 - beta2^k) + eps)

since a row that had no gradient has no moments, and its first moments are those of a fresh row. rho is the row's own
learning rate relative to the group's. Where there are no moments to read the step that was taken is scaled instead,

    row = b (1 - rho lr wd) + rho c (a - b (1 - lr wd))

with c = 1 for SGD, and for 8-bit moments what c is where eps does not count.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ranktune.growing import GrowingUpdate
from ranktune.row_rates import RowRates

# Late elements that are moved in one go on a CPU: with moments and intermediate results about 1.5 MiB.
_IN_CACHE = 1 << 16


@dataclass(frozen=True, slots=True)
class _Late:
    """The components of one parameter that were not there from the start, as they are before a step.

    Attributes:
        parameter, dim: the parameter, and the dimension that lists its components.
        first: index of the first of them.
        births: the step at which each of the leading n was first there; the others are not trained yet.
        born: those n. waiting: the others, or None where they stay as they are by themselves or nobody will ask.
    """

    parameter: nn.Parameter
    dim: int
    first: int
    births: Sequence[int]
    born: Tensor
    waiting: Tensor | None

    @classmethod
    def of(cls, parameter: nn.Parameter, dim: int, first: int, births: Sequence[int], keep_waiting: bool) -> _Late:
        """Copy them."""
        start = first + len(births)
        born = parameter.narrow(dim, first, len(births)).clone()
        waiting = parameter.narrow(dim, start, parameter.shape[dim] - start).clone() if keep_waiting else None
        return cls(parameter, dim, first, births, born, waiting)

    def born_in(self, tensor: Tensor) -> Tensor:
        """The trained late components of a tensor of the parameter's shape."""
        return tensor.narrow(self.dim, self.first, len(self.births))

    def waiting_in(self, tensor: Tensor) -> Tensor:
        """The untrained late components of a tensor of the parameter's shape."""
        start = self.first + len(self.births)
        return tensor.narrow(self.dim, start, tensor.shape[self.dim] - start)

    def as_multiplier(self, values: Tensor) -> Tensor:
        """One value per trained late component [n], in a shape that multiplies each."""
        return values.unsqueeze(1) if self.dim == 0 and self.parameter.ndim == 2 else values


class RestartWarmup:
    """Corrects each step of an optimizer for the components of some updates that were added late.

    Args:
        optimizer: steps the updates' parameters.
        updates: of one adapter.
        ramp: w, the steps over which a late component reaches its learning rate; 0 is at once, on the group's schedule.
        total_steps: N, of the run.
    """

    def __init__(self, optimizer: Optimizer, updates: Sequence[GrowingUpdate], ramp: int, total_steps: int) -> None:
        self.optimizer = optimizer
        self.updates = updates
        self.ramp = ramp
        self.total_steps = total_steps
        self._late: dict[int, _Late] = {}
        self._warn_where_inexact()

    @torch.no_grad()
    def remember(self, step: int, final: bool) -> None:
        """Before the optimizer's step t, counted from 0: keep what the late components are.

        Once growth is final, the vectors of inert components mean nothing any more: only their gates, all zero, do.
        """
        moves = _moves_idle_rows(self.optimizer)
        self._late = {
            id(late.parameter): late
            for update in self.updates
            for late in _late_of(update, step, keep_vectors=moves and not final, keep_gates=moves)
        }

    @torch.no_grad()
    def correct(self, step: int) -> None:
        """After the optimizer's step t, counted from 0: move late components as fresh optimizer groups would."""
        for group in self.optimizer.param_groups:
            late = [self._late[id(parameter)] for parameter in group["params"] if id(parameter) in self._late]
            self._put_back(group, late)
            rates = RowRates.of(group, step, self.ramp, self.total_steps)
            born = [part for part in late if part.births and part.parameter.grad is not None]
            if born:
                self._move(group, born, step, rates)
        self._late = {}

    def _put_back(self, group: dict[str, Any], late: Sequence[_Late]) -> None:
        """Undo the step for components that are not trained; a decay that is part of the gradient left moments too."""
        waiting = [(part.waiting_in(part.parameter), part.waiting) for part in late if part.waiting is not None]
        if waiting:
            torch._foreach_copy_(*map(list, zip(*waiting, strict=True)))  # pyright: ignore
        if float(group.get("weight_decay", 0.0)) != _decoupled_decay(self.optimizer, group):
            for part in late:
                for value in self.optimizer.state.get(part.parameter, {}).values():
                    if isinstance(value, Tensor) and value.shape == part.parameter.shape and value.is_floating_point():
                        part.waiting_in(value).zero_()

    def _move(self, group: dict[str, Any], born: Sequence[_Late], step: int, rates: RowRates) -> None:
        lr, decay = float(group["lr"]), _decoupled_decay(self.optimizer, group)
        ages = torch.tensor([step - birth for late in born for birth in late.births], dtype=torch.float64)
        rho = rates.of_rows(ages)
        # Everything that is one value per component is worked out for all parts at once.
        kept = _columns(1.0 - rho * lr * decay, born) if decay else None
        fresh = _FreshSteps.of(self.optimizer, group, born, ages, rho)
        gain = None if fresh else _columns(rho * _limit_of_gain(self.optimizer, group, born, ages), born)
        for here in _together(born):
            row, now = [late.born for late in born[here]], [late.born_in(late.parameter) for late in born[here]]
            if gain is not None:
                step_taken = torch._foreach_sub(now, row, alpha=1.0 - lr * decay)  # pyright: ignore
            if kept is not None:
                torch._foreach_mul_(row, kept[here])  # pyright: ignore
            if gain is not None:
                torch._foreach_addcmul_(row, gain[here], step_taken)  # pyright: ignore
            elif fresh is not None:
                torch._foreach_addcdiv_(row, *fresh.quotient(here), value=-lr)  # pyright: ignore
            torch._foreach_copy_(now, row)  # pyright: ignore

    def _warn_where_inexact(self) -> None:
        name = type(self.optimizer).__name__
        amsgrad = any(group.get("amsgrad", False) for group in self.optimizer.param_groups)
        if amsgrad or name in ("NAdam", "RAdam"):
            warnings.warn(
                f"the restart warm-up of new components is exact for AdamW and SGD; with "
                f"{'AMSGrad' if amsgrad else name} only its learning-rate ramp is kept.",
                stacklevel=2,
            )


def _moves_idle_rows(optimizer: Optimizer) -> bool:
    """Whether a row without gradients and moments may move: by weight decay, or in an optimizer that is not known."""
    decays = any(float(group.get("weight_decay", 0.0)) for group in optimizer.param_groups)
    return decays or type(optimizer) not in (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD)


def _late_of(update: GrowingUpdate, step: int, keep_vectors: bool, keep_gates: bool) -> Iterator[_Late]:
    vectors, gates = (_before(births, step) for births in update.births())
    if update.capacity > update.start_rank:
        yield _Late.of(update.lora_A, 0, update.start_rank, vectors, keep_vectors)
        yield _Late.of(update.lora_B, 1, update.start_rank, vectors, keep_vectors)
        yield _Late.of(update.required_gate(), 0, update.start_rank, gates, keep_gates)


def _before(births: list[int], step: int) -> list[int]:
    """The births, which ascend, before a step: what was born in that very step has had no gradient yet."""
    return births if not births or births[-1] < step else [birth for birth in births if birth < step]


def _is_plain_adam(optimizer: Optimizer, group: dict[str, Any]) -> bool:
    return isinstance(optimizer, (torch.optim.Adam, torch.optim.AdamW)) and not group.get("amsgrad", False)


def _is_eight_bit_adam(optimizer: Optimizer) -> bool:
    return type(optimizer).__module__.startswith("bitsandbytes") and "Adam" in type(optimizer).__name__


def _decoupled_decay(optimizer: Optimizer, group: dict[str, Any]) -> float:
    """The weight decay that is applied to the parameter itself rather than added to its gradient."""
    decoupled = group.get("decoupled_weight_decay", "AdamW" in type(optimizer).__name__)
    return float(group.get("weight_decay", 0.0)) if decoupled else 0.0


def _together(born: Sequence[_Late]) -> Iterator[slice]:
    """Which parts are moved in one go: on a GPU all, on the CPU few enough to stay in the cache from pass to pass."""
    first, size = 0, 0
    for place, late in enumerate(born):
        elements = late.born.numel() if late.born.device.type == "cpu" else 0
        if first < place and size + elements > _IN_CACHE:
            yield slice(first, place)
            first, size = place, 0
        size += elements
    yield slice(first, len(born))


@dataclass(frozen=True)
class _FreshSteps:
    """What a fresh Adam divides by what, with numerator and denominator times sqrt(1 - beta2^k).

    Attributes:
        first, second: the moments of each part. above, below: what its rows are multiplied with in the numerator (but
            for the learning rate), and what is added in the denominator.
    """

    first: list[Tensor]
    second: list[Tensor]
    above: list[Tensor]
    below: list[Tensor]

    @classmethod
    def of(
        cls, optimizer: Optimizer, group: dict[str, Any], born: Sequence[_Late], ages: Tensor, rho: Tensor
    ) -> _FreshSteps | None:
        """Of all parts, or None where it is not Adam or does not keep its moments as they are."""
        states = [optimizer.state[late.parameter] for late in born]
        if not _is_plain_adam(optimizer, group) or not all("exp_avg_sq" in state for state in states):
            return None
        beta1, beta2, eps = (float(value) for value in (*group["betas"], group["eps"]))
        root_k = (1.0 - beta2**ages).sqrt()
        first, second = (
            [late.born_in(state[name]) for late, state in zip(born, states, strict=True)]
            for name in ("exp_avg", "exp_avg_sq")
        )
        return cls(first, second, _columns(rho * root_k / (1.0 - beta1**ages), born), _columns(eps * root_k, born))

    def quotient(self, here: slice) -> tuple[list[Tensor], list[Tensor]]:
        """Numerators and denominators of those parts."""
        above = torch._foreach_mul(self.first[here], self.above[here])  # pyright: ignore
        below = torch._foreach_sqrt(self.second[here])  # pyright: ignore
        torch._foreach_add_(below, self.below[here])  # pyright: ignore
        return list(above), list(below)


def _limit_of_gain(optimizer: Optimizer, group: dict[str, Any], parts: Sequence[_Late], ages: Tensor) -> Tensor | float:
    """c where eps does not count, for an Adam whose moments cannot be read; else 1."""
    if not _is_plain_adam(optimizer, group) and not _is_eight_bit_adam(optimizer):
        return 1.0
    beta1, beta2 = (float(beta) for beta in group["betas"])
    # The parameters of an adapter are stepped together.
    t = int(optimizer.state[parts[0].parameter]["step"])
    return (1.0 - beta1**t) / (1.0 - beta1**ages) * ((1.0 - beta2**ages) / (1.0 - beta2**t)).sqrt()


def _columns(values: Tensor, parts: Sequence[_Late]) -> list[Tensor]:
    """One float64 value per component of all parts together, as one tensor per part that goes with its rows."""
    like = parts[0].born
    split = values.to(like.device, torch.promote_types(like.dtype, torch.float32)).split([len(p.births) for p in parts])
    return [late.as_multiplier(part).to(late.born.device) for late, part in zip(parts, split, strict=True)]
