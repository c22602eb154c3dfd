"""What an optimizer remembers about single components of an adapter, and how to make it forget them.

A pruned component's old moments would revive it, and an old second moment under a component that wakes up again makes
it step at several times the learning rate.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from ranktune.quantised_state import MOMENTS, clear_codes, is_quantised, keep_codes
from ranktune.update import LowRankUpdate

# State that torch's and transformers' optimizers keep per element of a parameter.
_PER_ELEMENT = {
    *("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "exp_inf"),  # the Adam family
    *("momentum_buffer", "square_avg", "grad_avg", "acc_delta", "sum"),  # SGD, RMSprop, Adadelta, Adagrad
    "variance",  # torch's Adafactor, of a gate
}
# Adafactor keeps one number per row and one per column; only the one indexed by components can be cleared.
_FACTORED = {"exp_avg_sq_row": 0, "exp_avg_sq_col": 1, "row_var": 0, "col_var": 1}
# Not moments of anything.
_OTHER = {"step", "RMS", "absmax1", "absmax2", "qmap1", "qmap2", "prev"}


def forget_components(optimizer: Optimizer, update: LowRankUpdate, forgotten: Tensor) -> None:
    """Clear the optimizer's moments of the components at the indices ``forgotten`` [k], and of no others."""
    for parameter, dim in _indexed_parameters(update):
        for name, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                _forget(name, value, parameter, dim, forgotten.to(value.device), optimizer.state[parameter])


def keep_components(optimizer: Optimizer, update: LowRankUpdate, kept: Tensor) -> None:
    """Slice the optimizer's state to the components at the indices ``kept`` [k], before the parameters are sliced."""
    for parameter, dim in _indexed_parameters(update):
        state = optimizer.state.get(parameter, {})
        for name, value in list(state.items()):
            if not isinstance(value, Tensor):
                continue
            index = kept.to(value.device)
            if is_quantised(name, value):
                keep_codes(state, name, dim, index)
            elif value.shape == parameter.shape:
                state[name] = value.index_select(dim, index).contiguous()
            elif _FACTORED.get(name) == dim and parameter.ndim > 1:
                state[name] = value.index_select(_component_dim(value, dim), index).contiguous()


def warn_if_unknown(optimizer: Optimizer) -> None:
    """Warn once where an optimizer keeps state of a kind that is not known here."""
    known = _PER_ELEMENT | set(MOMENTS) | set(_FACTORED) | _OTHER
    unknown = {
        name
        for state in optimizer.state.values()
        for name, value in state.items()
        if isinstance(value, Tensor) and value.numel() > 1 and name not in known
    }
    if unknown:
        warnings.warn(
            f"{type(optimizer).__name__} keeps state that ranktune does not know ({', '.join(sorted(unknown))}): the "
            "moments of pruned components are not cleared. Their gates are set back to zero after every step, so ranks "
            "hold all the same.",
            stacklevel=2,
        )


def _indexed_parameters(update: LowRankUpdate) -> Iterator[tuple[nn.Parameter, int]]:
    for tensor, dim in update.components():
        if isinstance(tensor, nn.Parameter):
            yield tensor, dim


def _forget(
    name: str, value: Tensor, parameter: nn.Parameter, dim: int, forgotten: Tensor, state: dict[str, Any]
) -> None:
    if is_quantised(name, value):
        clear_codes(state, name, dim, forgotten)
    elif (name in _PER_ELEMENT or name in MOMENTS) and value.shape == parameter.shape:
        value.index_fill_(dim, forgotten, 0)
    elif _FACTORED.get(name) == dim and parameter.ndim > 1:
        value.index_fill_(_component_dim(value, dim), forgotten, 0)


def _component_dim(value: Tensor, dim: int) -> int:
    """Where a factored statistic lists the components: torch keeps the averaged dimension, transformers drops it."""
    return dim if value.ndim > 1 else 0
