"""Optimizer moments that bitsandbytes keeps in 8 bits: codes of the parameter's shape, and a scale for every block.

A number is ``map[code] * absmax[block]``, the blocks being runs of 256 (formerly 2048) numbers of the flat parameter. A
component can be cleared exactly, by the code of zero. Dropping components moves the others into other blocks: exact
where every component has blocks of its own (rows of A whose length is a multiple of the block's); otherwise what is
kept is quantised again, which costs at most half a step of the map relative to the largest number of the new block.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# The codes of each moment, with its map of 256 numbers, ascending, and its scales.
MOMENTS = {"state1": ("qmap1", "absmax1"), "state2": ("qmap2", "absmax2")}


def is_quantised(name: str, value: Tensor) -> bool:
    """Whether a tensor of an optimizer's state holds codes; moments of small parameters are kept as they are."""
    return name in MOMENTS and value.dtype == torch.uint8


def clear_codes(state: dict[str, Any], name: str, dim: int, index: Tensor) -> None:
    """Set the numbers at the indices ``index`` [k] of dimension ``dim`` to zero; all others stay, to the bit."""
    state[name].index_fill_(dim, index, int(state[MOMENTS[name][0]].abs().argmin()))


def keep_codes(state: dict[str, Any], name: str, dim: int, index: Tensor) -> None:
    """Keep the numbers at the indices ``index`` [k] of dimension ``dim``, in new blocks."""
    codes, (map_name, scale_name) = state[name], MOMENTS[name]
    scales = state[scale_name]
    block = _block_size(codes.numel(), scales.numel())
    blocks_each, rest = divmod(codes[0].numel(), block)
    if dim == 0 and rest == 0:
        state[scale_name] = scales.view(-1, blocks_each).index_select(0, index).flatten()
        state[name] = codes.index_select(0, index)
        return
    numbers = state[map_name][codes.int()] * _spread(scales, block, codes.numel()).view(codes.shape)
    kept = numbers.index_select(dim, index).contiguous()
    state[name], state[scale_name] = _quantise(kept, state[map_name], block)


def _quantise(numbers: Tensor, code_map: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """The nearest codes [*numbers] and the scales [blocks]."""
    flat = numbers.flatten()
    blocks = torch.nn.functional.pad(flat, (0, -len(flat) % block)).view(-1, block)
    scales = blocks.abs().amax(1)
    shares = flat / _spread(scales.clamp_min(torch.finfo(scales.dtype).tiny), block, len(flat))
    codes = torch.bucketize(shares, (code_map[1:] + code_map[:-1]) / 2)
    return codes.to(torch.uint8).view(numbers.shape), scales


def _spread(scales: Tensor, block: int, count: int) -> Tensor:
    """The scale of each of so many numbers."""
    return scales.repeat_interleave(block)[:count]


def _block_size(count: int, blocks: int) -> int:
    """How many numbers share a scale: what bitsandbytes has used, or else what would give so many blocks."""
    return next((size for size in (256, 2048) if -(-count // size) == blocks), -(-count // blocks))
