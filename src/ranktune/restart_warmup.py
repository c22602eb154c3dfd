"""Restart warm-up: components that were added late learn as if each had an optimizer group of its own, made that day.

All components of a module share one tensor, one learning rate and one step counter. After the optimizer's step, the
late rows are set to where a fresh optimizer, with a learning-rate schedule of its own, would have put them; rows that
are not trained go back to what they were, bit for bit, whatever weight decay did.

With b and a a row before and after the step, t the optimizer's step count, k the row's age in steps (first = 1), v its
second moment and lr, wd, beta1, beta2, eps of its group, AdamW's step of a fresh row is

    row = b (1 - rho lr wd) + rho c (a - b (1 - lr wd))
    c = (1 - beta1^t) / (1 - beta1^k) * (sqrt(v) / sqrt(1 - beta2^t) + eps) / (sqrt(v) / sqrt(1 - beta2^k) + eps)

since a row that had no gradient has no moments, and its first moments are those of a fresh row. rho is the row's own
learning rate relative to the group's. SGD has c = 1.
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


@dataclass(frozen=True)
class _Late:
    """The components of one parameter that were not there from the start, as they are before a step.

    Attributes:
        parameter, dim: the parameter, and the dimension that lists its components.
        first: index of the first of them.
        births: [n] the step at which each of the leading n was first there; the others are not trained yet.
        born: those n, components first. waiting: the others, or None where they stay as they are by themselves or
            nobody will ever ask for them.
    """

    parameter: nn.Parameter
    dim: int
    first: int
    births: Tensor
    born: Tensor
    waiting: Tensor | None

    @classmethod
    def of(cls, parameter: nn.Parameter, dim: int, first: int, births: Tensor, keep_waiting: bool) -> _Late:
        """Copy them."""
        born = _born(parameter, dim, first, births).clone(memory_format=torch.contiguous_format)
        waiting = _waiting(parameter, dim, first, births).clone() if keep_waiting else None
        return cls(parameter, dim, first, births, born, waiting)

    def born_in(self, tensor: Tensor) -> Tensor:
        """The trained late components of a tensor of the parameter's shape, components first."""
        return _born(tensor, self.dim, self.first, self.births)

    def waiting_in(self, tensor: Tensor) -> Tensor:
        """The untrained late components of a tensor of the parameter's shape."""
        return _waiting(tensor, self.dim, self.first, self.births)


def _born(tensor: Tensor, dim: int, first: int, births: Tensor) -> Tensor:
    return tensor.detach().narrow(dim, first, len(births)).movedim(dim, 0)


def _waiting(tensor: Tensor, dim: int, first: int, births: Tensor) -> Tensor:
    start = first + len(births)
    return tensor.detach().narrow(dim, start, tensor.shape[dim] - start)


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
        self._moves_idle_rows = _moves_idle_rows(optimizer)
        self._warn_where_inexact()

    @torch.no_grad()
    def remember(self, step: int, final: bool) -> None:
        """Before the optimizer's step t, counted from 0: keep what the late components are.

        Once growth is final, the vectors of inert components mean nothing any more: only their gates, all zero, do.
        """
        self._late = {
            id(late.parameter): late
            for update in self.updates
            for late in _late_of(update, step, keep_vectors=self._moves_idle_rows and not final)
        }

    @torch.no_grad()
    def correct(self, step: int) -> None:
        """After the optimizer's step t, counted from 0: move late components as fresh optimizer groups would."""
        for group in self.optimizer.param_groups:
            late = [self._late[id(parameter)] for parameter in group["params"] if id(parameter) in self._late]
            self._put_back(group, late)
            rates = RowRates.of(group, step, self.ramp, self.total_steps)
            born = [part for part in late if len(part.births) and part.parameter.grad is not None]
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
        ages = (step - torch.cat([late.births for late in born])).double()
        rho = rates.of_rows(ages)
        lr, decay = float(group["lr"]), _decoupled_decay(self.optimizer, group)
        if _is_adam(self.optimizer, group):
            gain = _adam_gain(self.optimizer, group, born, ages, rho)
        else:
            gain = _columns(rho, born)
        now = [late.born_in(late.parameter) for late in born]
        row = [late.born for late in born]
        step_taken = torch._foreach_sub([part.contiguous() for part in now], row, alpha=1.0 - lr * decay)  # pyright: ignore
        if decay:
            torch._foreach_mul_(row, _columns(1.0 - rho * lr * decay, born))  # pyright: ignore
        torch._foreach_addcmul_(row, gain, step_taken)  # pyright: ignore
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


def _late_of(update: GrowingUpdate, step: int, keep_vectors: bool) -> Iterator[_Late]:
    # Births ascend. What was born in this very step has had no gradient yet.
    vectors, gates = (births[births < step] for births in update.births())
    if update.capacity > update.start_rank:
        yield _Late.of(update.lora_A, 0, update.start_rank, vectors, keep_vectors)
        yield _Late.of(update.lora_B, 1, update.start_rank, vectors, keep_vectors)
        yield _Late.of(update.required_gate(), 0, update.start_rank, gates, True)


def _is_adam(optimizer: Optimizer, group: dict[str, Any]) -> bool:
    plain = isinstance(optimizer, (torch.optim.Adam, torch.optim.AdamW)) and not group.get("amsgrad", False)
    return plain or _is_eight_bit_adam(optimizer)


def _is_eight_bit_adam(optimizer: Optimizer) -> bool:
    return type(optimizer).__module__.startswith("bitsandbytes") and "Adam" in type(optimizer).__name__


def _decoupled_decay(optimizer: Optimizer, group: dict[str, Any]) -> float:
    """The weight decay that is applied to the parameter itself rather than added to its gradient."""
    decoupled = group.get("decoupled_weight_decay", "AdamW" in type(optimizer).__name__)
    return float(group.get("weight_decay", 0.0)) if decoupled else 0.0


def _adam_gain(
    optimizer: Optimizer, group: dict[str, Any], born: Sequence[_Late], ages: Tensor, rho: Tensor
) -> list[Tensor]:
    """``rho c`` of every late part, elementwise; for 8-bit moments c's limit where eps does not count."""
    beta1, beta2, eps = (float(value) for value in (*group["betas"], group["eps"]))
    # The parameters of an adapter are stepped together.
    t = int(optimizer.state[born[0].parameter]["step"])
    root_t, root_k = (1.0 - beta2**t) ** 0.5, (1.0 - beta2**ages).sqrt()
    limit = _columns(rho * (1.0 - beta1**t) / (1.0 - beta1**ages) * root_k / root_t, born)
    seconds = [optimizer.state[late.parameter].get("exp_avg_sq") for late in born]
    if any(second is None for second in seconds):
        return limit
    roots = torch._foreach_sqrt([late.born_in(v).contiguous() for late, v in zip(born, seconds, strict=True)])  # pyright: ignore
    below = torch._foreach_add(roots, _columns(eps * root_k, born))  # pyright: ignore
    torch._foreach_add_(roots, eps * root_t)  # pyright: ignore
    torch._foreach_div_(roots, below)  # pyright: ignore
    torch._foreach_mul_(roots, limit)  # pyright: ignore
    return list(roots)


def _columns(values: Tensor, born: Sequence[_Late]) -> list[Tensor]:
    """One float64 value per component of all parts together, as one tensor per part that multiplies it."""
    like = born[0].born
    parts = values.to(like.device, torch.promote_types(like.dtype, torch.float32)).split([len(b.births) for b in born])
    return [
        (part if late.born.ndim == 1 else part.unsqueeze(1)).to(late.born.device)
        for late, part in zip(born, parts, strict=True)
    ]
