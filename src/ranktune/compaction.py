"""`compact`: drop the inactive components of an adapter for real, from its tensors and from the optimizer's state."""

from __future__ import annotations

from torch import nn
from torch.optim import Optimizer

from ranktune.adapters import updates
from ranktune.attachment import plain_optimizer
from ranktune.errors import ConfigError
from ranktune.optimizer_state import keep_components


def compact(model: nn.Module, optimizer: Optimizer | None = None, adapter_name: str | None = None) -> dict[str, int]:
    """Give every module exactly its active components: less memory, less work, smaller files, the same output.

    Parameters stay the objects they are, so training may go on with the same optimizer. A module whose components are
    all inactive keeps an update of rank 0. Adapters whose ranks never move are left as they are. The ranks are final:
    further training needs no controller.

    Args:
        model: the PEFT model.
        optimizer: its optimizer, if training goes on; its state is sliced with the parameters.
        adapter_name: which adapter; the active one by default.

    Returns:
        Module name to its rank.

    Raises:
        ConfigError: a controller is attached that will still move these ranks.
    """
    found = list(updates(model, adapter_name))
    for name, update in found:
        if update.ranks_will_move:
            raise ConfigError(
                f"the ranks of {name} are still being moved: compact after the rank schedule has ended, or close the "
                "controller first."
            )
    for _, update in found:
        if update.rank_active is None:
            continue
        kept = update.rank_active.nonzero().squeeze(1)
        if optimizer is not None:
            keep_components(plain_optimizer(optimizer), update, kept)
        update.keep_components(kept)
        update.needs_controller = False
    return {name: update.rank for name, update in found}
