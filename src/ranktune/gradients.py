"""What a controller asks of the gradients before a step: whether all are finite, and how they are scaled."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ranktune.errors import RanktuneError

logger = logging.getLogger("ranktune")

# After so many bad steps in a row the run is stopped.
PATIENCE = 20


class ControllerError(RanktuneError, RuntimeError):
    """Training went on without the controller, or cannot go on with it."""


class FiniteGradients:
    """Makes the optimizer skip the steps in which a gradient is not finite, in any process.

    Attributes:
        skipped: how many were.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.skipped = 0
        self._in_a_row = 0

    def drop_step(self, optimizer: Optimizer, step: int) -> bool:
        """Set every gradient to None where one is not finite, which makes the step do nothing; whether it was so.

        Args:
            step: its number, counted from 1, for messages.

        Raises:
            ControllerError: it has been so too many times in a row.
        """
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if _all_finite([parameter.grad for parameter in parameters]):
            self._in_a_row = 0
            return False
        culprit = self._first_non_finite()
        for parameter in parameters:
            parameter.grad = None
        self.skipped += 1
        self._in_a_row += 1
        logger.warning("step %d skipped: a gradient is not finite (%s)", step, culprit)
        if self._in_a_row >= PATIENCE:
            raise ControllerError(
                f"{PATIENCE} optimizer steps in a row had gradients that are not finite, first in {culprit}. Lower "
                "the learning rate, clip gradients, or train in float32 or bfloat16."
            )
        return True

    def _first_non_finite(self) -> str:
        for name, parameter in self.model.named_parameters():
            if parameter.grad is not None and not torch.isfinite(parameter.grad).all():
                return name
        return "another process"


def amp_found_inf(optimizer: Optimizer) -> bool:
    """Whether a gradient scaler found an overflow and hands the step to a fused optimizer that will not take it."""
    found = getattr(optimizer, "found_inf", None)
    return found is not None and bool(found > 0)


def loss_scale(optimizer: Optimizer, scaler: Any) -> float:
    """The factor on the loss, and so on whatever backward left outside of the optimizer's own gradients.

    Args:
        scaler: a ``torch.amp.GradScaler`` or None; a fused optimizer is told the factor for its step.
    """
    if scaler is not None and scaler.is_enabled():
        return float(scaler.get_scale())
    return float(getattr(optimizer, "grad_scale", None) or 1.0)


def _all_finite(gradients: Sequence[Tensor | None]) -> bool:
    """Whether every gradient is finite in every process."""
    present = [gradient for gradient in gradients if gradient is not None]
    norms = torch._foreach_norm(present) if present else []  # pyright: ignore[reportPrivateImportUsage]
    device = present[0].device if present else torch.device("cpu")
    flag = torch.zeros(1, device=device)
    if norms:
        flag += (~torch.isfinite(torch.stack([norm.to(device) for norm in norms]))).any()
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
    return not bool(flag)
