"""Components that a step of the optimizer must not move: they, and what it remembers of them, are put back after it.

A component without a gradient has a gradient of zero, since it shares its tensor with others: Adam moves it all the
same, by its momentum and by weight decay, and lets its moments decay.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from ranktune.lowrank import Span
from ranktune.nested import NestedUpdate


class Standstill:
    """Undoes a step for the components that were not drawn for it.

    The optimizer's step count is that of the whole tensor: a component's bias correction counts steps that it stood
    still in.

    Args:
        optimizer: steps the updates' parameters.
        updates: of one adapter, following a draw.
    """

    def __init__(self, optimizer: Optimizer, updates: Sequence[NestedUpdate]) -> None:
        self.optimizer = optimizer
        self.updates = updates
        self._copies: dict[tuple[int, str], list[Tensor]] = {}
        self._warned = False

    @torch.no_grad()
    def remember(self) -> None:
        """Before a step: copy what must not move."""
        self._copies = {key: [part.clone() for part in parts] for key, parts in self._still()}

    @torch.no_grad()
    def put_back(self) -> None:
        """After it: write the copies back. What the step created starts at zero."""
        for key, parts in self._still():
            copies = self._copies.get(key)
            for place, part in enumerate(parts):
                part.zero_() if copies is None else part.copy_(copies[place])
        self._copies = {}
        if not self._warned:
            self._warn_where_shared()

    def _still(self) -> Iterator[tuple[tuple[int, str], tuple[Tensor, Tensor]]]:
        """The components before and after those that are trained: of every parameter, and of its moments by name."""
        for update in self.updates:
            if update.draw is None:
                continue
            for parameter, dim in ((update.lora_A, 0), (update.lora_B, 1)):
                yield (id(parameter), ""), _around(parameter.detach(), dim, update.draw.span)
                for name, value in self.optimizer.state.get(parameter, {}).items():
                    if isinstance(value, Tensor) and value.shape == parameter.shape and value.is_floating_point():
                        yield (id(parameter), name), _around(value, dim, update.draw.span)

    def _warn_where_shared(self) -> None:
        self._warned = True
        shared = {
            name
            for update in self.updates
            for parameter in (update.lora_A, update.lora_B)
            for name, value in self.optimizer.state.get(parameter, {}).items()
            if isinstance(value, Tensor) and value.numel() > 1 and value.shape != parameter.shape
        }
        if shared:
            warnings.warn(
                f"{type(self.optimizer).__name__} keeps state that components share ({', '.join(sorted(shared))}): "
                'with optimizer_semantics="strict" the components that are not drawn keep their values, but this state '
                "goes on changing for all of them. AdamW and SGD keep none.",
                stacklevel=2,
            )


def _around(tensor: Tensor, dim: int, span: Span) -> tuple[Tensor, Tensor]:
    """What is before and after the span."""
    return tensor.narrow(dim, 0, span.first), tensor.narrow(dim, span.end, tensor.shape[dim] - span.end)
