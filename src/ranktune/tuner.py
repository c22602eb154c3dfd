"""The PEFT host: `RankTuner` puts a `RankLayer` around each targeted module, one `LowRankUpdate` per adapter in it.

PEFT resolves targets, injects, saves, loads and switches; the tuner says what is injected, the layer what it computes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING, resolve_quantization_backend
from torch import nn
from transformers.pytorch_utils import Conv1D

import ranktune.methods  # noqa: F401  (registers every method, so that saved adapters of any of them load)
from ranktune.config import RankConfig
from ranktune.errors import ConfigError
from ranktune.layer import RankLayer
from ranktune.left_out import is_all_linear, warn_of_left_out
from ranktune.peft_compat import PREFIX, CheckedLoading, register
from ranktune.quantised_weight import keep_layout, quantisation_options, warn_of_misread
from ranktune.unmatched import refuse_unmatched


class RankTuner(CheckedLoading):
    """PEFT's handle on a model with our adapters, whatever their methods."""

    prefix = PREFIX
    tuner_layer_cls = RankLayer
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Add an adapter to every targeted module; say what `all-linear` does not reach.

        Raises:
            ConfigError: an entry of the configuration matches nothing, and a misspelt name would silently adapt less,
                or with another rank, than was asked for (`ranktune.unmatched`).
        """
        config = cast(RankConfig, self.peft_config[adapter_name])
        modules = dict(modules_outside_adapters(model))
        refuse_unmatched(config, modules, [name for name, module in modules.items() if _is_linear(module)])
        keep_layout(model)
        warn_of_misread(model)
        if is_all_linear(config):
            warn_of_left_out(model)
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        layers = ((name, layer) for name, layer in model.named_modules() if isinstance(layer, RankLayer))
        config.connect(
            {name: layer.update_of(adapter_name) for name, layer in layers if adapter_name in layer.ranktune_update}
        )

    def _create_and_replace(
        self,
        peft_config: PeftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,  # noqa: ARG002  (PEFT's signature)
    ) -> None:
        config = cast(RankConfig, peft_config)
        layer = target if isinstance(target, RankLayer) else self._wrapped(target, adapter_name, current_key)
        layer.update_layer(adapter_name, config, current_key)
        layer.update_of(adapter_name).warned = self._warned_about(adapter_name)
        if layer is not target:
            if adapter_name not in self.active_adapters:
                layer.requires_grad_(False)
            self._replace_module(parent, target_name, layer, target)

    def _wrapped(self, target: nn.Module, adapter_name: str, current_key: str) -> RankLayer:
        """A layer around ``target`` that has no adapter yet."""
        quantization = quantisation_options(self)
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        if not isinstance(base, (nn.Linear, Conv1D)) and not resolve_quantization_backend(base, **quantization):
            raise ConfigError(
                f"target module {current_key!r} is a {type(base).__name__}: only torch.nn.Linear, transformers' Conv1D "
                "and quantised linear layers can be adapted. Name its linear layers instead, or exclude it with "
                "exclude_modules."
            )
        layer = RankLayer(target, **quantization)
        layer._active_adapter = adapter_name
        return layer

    def _warned_about(self, adapter_name: str) -> dict[Any, Any]:
        """What the modules of one adapter share, so that a warning about it comes once."""
        # PEFT injects adapters from the constructor, before this class could set anything up.
        return vars(self).setdefault("_warned", {}).setdefault(adapter_name, {})

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """PEFT's merging, refused before the first layer has changed where one adapter cannot be merged."""
        self._refuse_unmergeable(adapter_names)
        super().merge_adapter(adapter_names, safe_merge)

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> None:
        if merge:
            self._refuse_unmergeable(adapter_names)
        return super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)

    def _refuse_unmergeable(self, adapter_names: list[str] | None) -> None:
        for layer in self.model.modules():
            if isinstance(layer, RankLayer):
                for name in layer.active_adapters if adapter_names is None else adapter_names:
                    if name in layer.ranktune_update:
                        layer.update_of(name).require_mergeable()

    @contextmanager
    def _enable_peft_forward_hooks(self, *_: Any, **kwargs: Any) -> Iterator[None]:
        """PEFT passes per-sample adapters here, and drops them silently where a tuner does not take them."""
        if kwargs.get("adapter_names") is not None:
            raise ConfigError(
                "adapter_names (a different adapter per sample) is not supported by ranktune adapters: call "
                "set_adapter and run the samples of each adapter as a batch of their own."
            )
        yield


def modules_outside_adapters(module: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The model's own modules by name: an adapted layer counts as one, whatever is inside it."""
    yield name, module
    if not isinstance(module, RankLayer):
        for child_name, child in module.named_children():
            yield from modules_outside_adapters(child, f"{name}.{child_name}" if name else child_name)


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, Conv1D, RankLayer))


register(RankTuner)
