"""What the algebra asks of a frozen weight ``W`` [out, in] that is no ordinary tensor: its product, and its rows.

A quantised layer keeps W in a few bits and multiplies by it in a kernel of its own. Forward goes through that kernel;
the way back to the input, and the row norms of a weight-decomposed update, take W's rows a block at a time and drop
them again, so that W is never whole in a wider dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class FrozenRows:
    """A frozen weight [out, in] in blocks of rows.

    Attributes:
        shape: [out, in]. dtype: of its rows, once they are made.
        stored: the tensor that W is kept in, whose storage and version tell whether W has changed.
        block: how many rows are made at a time.
        rows: from the first row, a multiple of ``block``, and the one after the last to these rows [k, in].
        linear: ``x W^T + bias`` [..., out] for x [..., in], as the layer itself computes it.
    """

    shape: torch.Size
    dtype: torch.dtype
    stored: Tensor
    block: int
    rows: Callable[[int, int], Tensor]
    linear: Callable[[Tensor], Tensor]

    @property
    def is_meta(self) -> bool:
        """Whether there are no values yet."""
        return self.stored.is_meta

    def blocks(self) -> Iterator[Tensor]:
        """The rows in order, a block at a time."""
        for first in range(0, self.shape[0], self.block):
            yield self.rows(first, min(first + self.block, self.shape[0]))

    def __getitem__(self, index: Tensor) -> Tensor:
        """The rows at the indices [k], in ascending order."""
        found = []
        for first, rows in zip(range(0, self.shape[0], self.block), self.blocks(), strict=True):
            inside = index[(index >= first) & (index < first + len(rows))]
            found.append(rows.index_select(0, inside - first))
        return torch.cat(found)

    def dense(self) -> Tensor:
        """The whole weight [out, in]: for what is done once, never in training."""
        return self.rows(0, self.shape[0])


Weight = Tensor | FrozenRows
"""A frozen weight [out, in]: an ordinary tensor of any strides, or one that comes in blocks."""


def dense(weight: Weight) -> Tensor:
    """The whole weight [out, in]."""
    return weight if isinstance(weight, Tensor) else weight.dense()


def linear(x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
    """``x W^T + bias`` [..., out] in x's dtype, for x [..., in] and the layer's own bias."""
    if isinstance(weight, Tensor):
        return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
    return weight.linear(x)


def product(x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
    """``x W^T`` [..., out] in x's dtype; ``bias`` is the layer's own, which its kernel may have added."""
    if isinstance(weight, Tensor):
        return F.linear(x, weight.to(x.dtype))
    y = weight.linear(x)
    return y if bias is None else y - bias.to(y.dtype)


def input_gradient(dy: Tensor, weight: Weight) -> Tensor:
    """``dy W`` [n, in] in dy's dtype, for dy [n, out]."""
    if isinstance(weight, Tensor):
        return dy @ weight.to(dy.dtype)
    dx = dy.new_zeros(dy.shape[0], weight.shape[1])
    for dy_rows, rows in zip(dy.split(weight.block, dim=1), weight.blocks(), strict=True):
        dx.addmm_(dy_rows, rows.to(dy.dtype))
    return dx


def keep_weight(ctx: Any, weight: Weight) -> Tensor | None:
    """What an autograd node has to save of the weight for `kept_weight`, which gives it back in backward."""
    ctx.frozen_rows = None if isinstance(weight, Tensor) else weight
    return weight if isinstance(weight, Tensor) else None


def kept_weight(ctx: Any, saved: Tensor | None) -> Weight:
    """The weight of an autograd node, from what `keep_weight` had it save."""
    return ctx.frozen_rows if saved is None else saved
