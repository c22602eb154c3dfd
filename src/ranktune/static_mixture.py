"""`mean_gate`: a plain LoRA adapter in place of a routed one, with the router's average decision, and its error.

With constant gates g the mixture is one low-rank update of the same rank: ``s (sum_i g_i diag(b_i) B diag(a_i)) A``.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from peft import PeftModel
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from ranktune.adapters import layers
from ranktune.attachment import active_adapter, adapter_config
from ranktune.config import RankConfig
from ranktune.errors import ConfigError
from ranktune.gate_usage import GateUsage
from ranktune.layer import RankLayer
from ranktune.mixture import mixture_delta
from ranktune.routed import RoutedUpdate
from ranktune.tuner import RankTuner


@dataclass(frozen=True)
class MeanGate:
    """What `mean_gate` made, and how far it is from the adapter it stands for, on the batches it was made from.

    Attributes:
        adapter_name: the plain adapter's name on the model.
        gates: module name to the mean gate of each expert.
        module_errors: module name to ``||static - routed|| / ||routed||`` of the update's output, on equal inputs.
        output_error: the same of the whole model: ``||y_static - y_routed|| / ||y_routed - y_base||``.
        routed_loss, static_loss: the model's mean loss over the batches, where it returns one.
    """

    adapter_name: str
    gates: dict[str, list[float]]
    module_errors: dict[str, float]
    output_error: float
    routed_loss: float | None
    static_loss: float | None


def mean_gate(
    model: PeftModel, batches: Iterable[Any], adapter_name: str | None = None, static_name: str = "mean_gate"
) -> MeanGate:
    """Add a plain LoRA adapter that does what a mor adapter does on average over calibration batches.

    The new adapter has the same rank and scale; it merges, exports and loads like any ``lora`` adapter. The mor adapter
    stays as it is, and stays active.

    Args:
        model: the PEFT model, with the routed adapter on it.
        batches: what the model is called with: mappings of keyword arguments, or single inputs. Every token counts,
            padding too. They are kept in memory, since they are needed twice.
        adapter_name: the routed adapter; the active one by default.
        static_name: the name of the new one.

    Returns:
        The gates that were used, and the measured error.

    Raises:
        ConfigError: the adapter is not a mor adapter, the new name is taken, or the batches have no tokens.
    """
    name = adapter_name or active_adapter(model)
    config = adapter_config(model, name)
    if config.method != "mor":
        raise ConfigError(f"adapter {name!r} is of method {config.method!r}: only mor has gates to average.")
    if static_name in model.peft_config:
        raise ConfigError(f"the model already has an adapter {static_name!r}: choose another static_name.")
    calibration = list(batches)
    with _evaluating(model, name):
        gates = _mean_gates(model, calibration, name)
        _add_static(model, config, name, static_name, gates)
        errors, output_error, losses = _measure(model, calibration, name, static_name)
    plain = {module: shares.tolist() for module, shares in gates.items()}
    return MeanGate(static_name, plain, errors, output_error, *losses)


@contextmanager
def _evaluating(model: PeftModel, name: str) -> Iterator[None]:
    """Evaluation mode with one adapter active, and everything as it was afterwards."""
    training, active = model.training, list(model.active_adapters)
    required = {id(parameter): parameter.requires_grad for parameter in model.parameters()}
    model.eval().set_adapter(name)
    try:
        with torch.no_grad():
            yield
    finally:
        model.set_adapter(active[0])
        if len(active) > 1:
            cast(RankTuner, model.base_model).set_adapter(active)
        model.train(training)
        for parameter in model.parameters():
            parameter.requires_grad_(required.get(id(parameter), False))


def _routed(model: nn.Module, name: str) -> dict[str, RoutedUpdate]:
    found = {module: layer.update_of(name) for module, layer in layers(model, name)}
    return {module: update for module, update in found.items() if isinstance(update, RoutedUpdate)}


def _call(model: nn.Module, batch: Any) -> Any:
    return model(**batch) if isinstance(batch, Mapping) else model(batch)


def _mean_gates(model: PeftModel, batches: list[Any], name: str) -> dict[str, Tensor]:
    """Module name to g [N], float32, over all tokens."""
    updates = _routed(model, name)
    watched, before = (
        {module: GateUsage(training=False) for module in updates},
        {m: u.usage for m, u in updates.items()},
    )
    try:
        for module, update in updates.items():
            update.usage = watched[module]
        for batch in batches:
            _call(model, batch)
    finally:
        for module, update in updates.items():
            update.usage = before[module]
    loads = {module: usage.load() for module, usage in watched.items()}
    for module, update in updates.items():
        if not update.routed:
            loads[module] = update.expert_A.new_full((update.num_experts,), 1.0 / update.num_experts)
    if silent := sorted(module for module, load in loads.items() if load is None):
        raise ConfigError(f"no token of the batches reached {silent[0]}: give batches that use the whole model.")
    return {module: load for module, load in loads.items() if load is not None}


def _add_static(model: PeftModel, config: RankConfig, name: str, static_name: str, gates: dict[str, Tensor]) -> None:
    """Put the plain adapter on the model, with its factors and the routed one's fully trained modules."""
    shared = {field.name for field in dataclasses.fields(RankConfig) if field.init} - {"method", "peft_type"}
    model.add_adapter(static_name, RankConfig(**copy.deepcopy({key: getattr(config, key) for key in shared})))
    for module, layer in layers(model, static_name):
        routed, static = cast(RoutedUpdate, layer.update_of(name)), layer.update_of(static_name)
        static.lora_A.copy_(routed.lora_A)
        static.lora_B.copy_(routed.static_B(gates[module].to(routed.expert_A.device)))
    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper):
            trained = module.modules_to_save
            trained[static_name].load_state_dict(trained[name].state_dict())


def _measure(
    model: PeftModel, batches: list[Any], name: str, static_name: str
) -> tuple[dict[str, float], float, tuple[float | None, float | None]]:
    """The errors of the modules, on the inputs the routed model gives them, and of the model's output; both losses."""
    sums: dict[str, Tensor] = {}

    def compare(module: str, layer: RankLayer, _: Any, args: tuple[Any, ...]) -> None:
        routed, static = cast(RoutedUpdate, layer.update_of(name)), layer.update_of(static_name)
        x = args[0].to(routed.lora_A.dtype)
        exact = mixture_delta(x, routed.gates(x), routed.lora_A, routed.lora_B, routed.expert_A, routed.expert_B)
        apart = F.linear(F.linear(x, static.lora_A), static.lora_B) - exact
        found = torch.stack([apart.float().square().sum(), exact.float().square().sum()])
        sums[module] = sums.get(module, torch.zeros_like(found)) + found

    total = torch.zeros(2)
    losses: list[list[float]] = [[], []]
    for batch in batches:
        hooks = [
            layer.register_forward_pre_hook(partial(compare, module, layer)) for module, layer in layers(model, name)
        ]
        try:
            routed = _call(model, batch)
        finally:
            for hook in hooks:
                hook.remove()
        model.set_adapter(static_name)
        static = _call(model, batch)
        model.set_adapter(name)
        with model.disable_adapter():
            base = _call(model, batch)
        for kept, output in zip(losses, (routed, static), strict=True):
            if getattr(output, "loss", None) is not None:
                kept.append(float(output.loss))
        y = _main_output(routed)
        apart, moved = (y - _main_output(static)).square().sum(), (y - _main_output(base)).square().sum()
        total += torch.stack([apart, moved]).cpu()
    errors = {module: _share(found) for module, found in sums.items()}
    means = [sum(kept) / len(kept) if kept else None for kept in losses]
    return errors, _share(total), (means[0], means[1])


def _main_output(output: Any) -> Tensor:
    """The logits, or the first tensor, in float32."""
    if isinstance(output, Tensor):
        return output.float()
    logits = getattr(output, "logits", None)
    values = output.values() if isinstance(output, Mapping) else output
    return (logits if isinstance(logits, Tensor) else next(v for v in values if isinstance(v, Tensor))).float()


def _share(squares: Tensor) -> float:
    """``sqrt(a / b)`` of [a, b], and zero where there is nothing to compare."""
    apart, whole = squares.tolist()
    return (apart / whole) ** 0.5 if whole > 0.0 else 0.0
