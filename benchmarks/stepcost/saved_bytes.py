"""Exact count of the bytes that a forward pass keeps for backward.

Counted: the whole storage of every tensor that autograd holds when forward is over, each storage once however many
views of it are held. Not counted: storages that existed before forward (weights, adapters, the input), and what was
held by a graph that was freed before forward ended.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .machine import Machine


@dataclass(frozen=True)
class SavedBytes:
    """What backward needs kept.

    Attributes:
        per_token: bytes that grow with the batch, for each token of it.
        constant: bytes that do not (norms, position tables, products of the factors).
    """

    per_token: float
    constant: float


class _Held:
    """A tensor in the autograd graph; lives as long as the graph holds it."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def saved_bytes(model: nn.Module, width: int, tokens: int, machine: Machine) -> SavedBytes:
    """Count for one sequence of ``tokens`` tokens and for two, and split the count into its two parts.

    Args:
        model: from [batch, tokens, width] to any tensor; in training mode.
    """
    one, two = (kept_for_backward(model, _input(n, tokens, width, machine), machine) for n in (1, 2))
    return SavedBytes((two - one) / tokens, 2 * one - two)


def _input(batch: int, tokens: int, width: int, machine: Machine) -> Tensor:
    """A random input that gets a gradient, as in the middle of a network."""
    return torch.randn(batch, tokens, width, dtype=machine.dtype, device=machine.device, requires_grad=True)


def kept_for_backward(model: nn.Module, x: Tensor, machine: Machine) -> int:
    """Bytes that ``model(x)`` keeps for backward."""
    before = {tensor.untyped_storage().data_ptr() for tensor in (x, *model.parameters(), *model.buffers())}
    held: weakref.WeakSet[_Held] = weakref.WeakSet()

    def pack(tensor: Tensor) -> _Held:
        item = _Held(tensor)
        held.add(item)
        return item

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda item: item.tensor), machine.autocast():
        output = model(x)
    storages = [item.tensor.untyped_storage() for item in held]
    sizes = {storage.data_ptr(): storage.nbytes() for storage in storages}
    # A real backward, so that an op which cannot use what it kept fails here.
    output.float().sum().backward()
    return sum(size for pointer, size in sizes.items() if pointer not in before)
