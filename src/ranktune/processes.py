"""What the processes of a distributed run have to agree on, beside the gradients that their wrapper averages."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def mean_over_processes(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The mean of the processes' tensors, in one message; a value that is not finite in one of them is not in any.

    Args:
        tensors: of one dtype and device, and the same shapes in every process. They are not changed.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return list(tensors)
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    torch.distributed.all_reduce(flat)
    flat /= torch.distributed.get_world_size()
    parts = flat.split([tensor.numel() for tensor in tensors])
    return [part.view_as(tensor) for part, tensor in zip(parts, tensors, strict=True)]
