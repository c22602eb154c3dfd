"""`set_rank`: choose the rank at which a nested adapter works from now on, and `at_rank` for a while."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import nn

from ranktune.adapters import updates
from ranktune.attachment import active_adapter, adapter_config
from ranktune.config import is_count
from ranktune.errors import ConfigError, did_you_mean
from ranktune.layer import RankLayer
from ranktune.methods import DyLoraConfig
from ranktune.nested import NestedUpdate


def set_rank(model: nn.Module, b: int | Mapping[str, int], adapter_name: str | None = None) -> None:
    """Let a nested adapter (``dylora``) use its first b components from now on, with the scale of rank b.

    Evaluation, merging, exporting and saving then see rank b; training with a controller goes on drawing its ranks.
    Nothing is lost: a later call may raise the rank again. A module whose own highest rank (``rank_pattern``) is below
    b works at that.

    Args:
        model: the PEFT model.
        b: counted from 1; one of the ranks that were trained. Or module name (as in `ranktune.ranks`) to such a rank:
            other modules stay as they are. No step trains unequal ranks, so what they are worth has to be measured.
        adapter_name: which adapter; the active one by default.

    Raises:
        ConfigError: b is no such rank, a module is not in the adapter, the adapter is not nested, or it is merged into
            the base weights.
    """
    name = adapter_name or active_adapter(model)
    nested = _nested_updates(model, name)
    wanted = b if isinstance(b, Mapping) else dict.fromkeys(nested, b)
    for rank in b.values() if isinstance(b, Mapping) else [b]:
        refuse_untrained_rank(model, rank, name)
    for module in wanted:
        if module not in nested:
            raise ConfigError(f"adapter {name!r} has no module {module!r}.{did_you_mean(module, nested)}")
    for layer in model.modules():
        if isinstance(layer, RankLayer) and name in layer.merged_adapters:
            raise ConfigError(
                f"adapter {name!r} is merged into the base weights at rank {layer.update_of(name).rank}: unmerge it "
                "before its rank is set (model.unmerge_adapter())."
            )
    for module, rank in wanted.items():
        nested[module].set_rank(min(rank, nested[module].capacity))


def refuse_untrained_rank(model: nn.Module, b: int, adapter_name: str) -> None:
    """Raises ConfigError where an adapter is not nested, or was not trained to work at rank b."""
    allowed = trained_ranks(model, adapter_name)
    if not is_count(b) or b not in allowed:
        raise ConfigError(f"rank {b!r} is not among those that adapter {adapter_name!r} was trained at: {allowed}.")


def trained_ranks(model: nn.Module, adapter_name: str | None = None) -> list[int]:
    """The ranks that a nested adapter can be set to, ascending.

    Raises:
        ConfigError: the adapter is not nested.
    """
    name = adapter_name or active_adapter(model)
    config = _nested_config(model, name)
    highest = max(update.capacity for update in _nested_updates(model, name).values())
    # An adapter that was compacted at some rank ends there.
    return [b for b in config.nested_ranks if b < highest] + [highest]


@contextmanager
def at_rank(model: nn.Module, b: int | Mapping[str, int], adapter_name: str | None = None) -> Iterator[None]:
    """Let a nested adapter work at rank b, or each module at its own, inside a ``with``, and as before after it.

    Raises:
        ConfigError: as `set_rank` does.
    """
    nested = _nested_updates(model, adapter_name or active_adapter(model)).values()
    before = [update.rank for update in nested]
    set_rank(model, b, adapter_name)
    try:
        yield
    finally:
        for update, rank in zip(nested, before, strict=True):
            update.set_rank(rank)


def _nested_config(model: nn.Module, name: str) -> DyLoraConfig:
    config = adapter_config(model, name)
    if not isinstance(config, DyLoraConfig):
        raise ConfigError(
            f"adapter {name!r} is of method {config.method!r}: it was not trained to work at other ranks than its own. "
            "Only dylora adapters have a rank that can be set. Any other is made smaller, at a loss that is told, by "
            "`ranktune squeeze` (one budget, a rank for each module) or `ranktune export --svd-rank` (one for all)."
        )
    return config


def _nested_updates(model: nn.Module, name: str) -> dict[str, NestedUpdate]:
    """Module name to its update."""
    _nested_config(model, name)
    return {module: update for module, update in updates(model, name) if isinstance(update, NestedUpdate)}
