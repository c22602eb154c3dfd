"""`RankLayer`: a linear layer as PEFT wraps it, with one `LowRankUpdate` per adapter; what it computes, and merging.

`tuner.py` puts these layers into a model.
"""

from __future__ import annotations

import logging
import warnings
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from peft.utils import quantization_extra_repr, resolve_quantization_backend
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ranktune.config import RankConfig
from ranktune.errors import ConfigError
from ranktune.peft_compat import feature_counts, pattern_value
from ranktune.quantised_weight import can_dequantise, quantised_weight
from ranktune.update import Base, LowRankUpdate

logger = logging.getLogger("ranktune")


class RankLayer(nn.Module, BaseTunerLayer):
    """A linear layer with any number of low-rank adapters.

    Args:
        base_layer: an ``nn.Linear``, a transformers ``Conv1D`` or a quantised linear layer that PEFT knows.
        quantization: what PEFT's quantisation hooks need to know of the model.

    Attributes:
        r, scaling: adapter name to its rank and to the factor on ``B A``.
        ranktune_update: adapter name to its tensors.
    """

    original_weight: Tensor | None

    adapter_layer_names = ("ranktune_update",)
    other_param_names = ("r", "scaling")

    def __init__(self, base_layer: nn.Module, **quantization: Any) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.quantization_backend = resolve_quantization_backend(self.get_base_layer(), **quantization)
        self.in_features, self.out_features = feature_counts(self.get_base_layer())
        self.r: dict[str, int] = {}
        self.scaling: dict[str, float] = {}
        self.ranktune_update = nn.ModuleDict()
        self.merged_adapters = []
        self._disable_adapters = False
        # The weight as it was before merging: the way back, and what every norm refers to. Moves with the module.
        self.register_buffer("original_weight", None, persistent=False)

    def update_layer(self, adapter_name: str, config: RankConfig, key: str) -> None:
        """Add an adapter, or replace the one of that name.

        Args:
            adapter_name: its name on this model.
            config: its configuration.
            key: the module's name, which ``rank_pattern`` and ``alpha_pattern`` are matched against.
        """
        r = pattern_value(config.rank_pattern, key, config.capacity)
        alpha = pattern_value(config.alpha_pattern, key, config.lora_alpha)
        update = config.make_update(self.in_features, self.out_features, r).train(self.training)
        config.reset_parameters(update)
        self.r[adapter_name] = r
        self.scaling[adapter_name] = config.scaling(alpha, r)
        self.ranktune_update[adapter_name] = update
        super()._move_adapter_to_device_of_base_layer(adapter_name)
        if config.use_dora:
            # After the move: the norms are those of the factors as they will be used, and stay float32.
            zero_rows = update.init_magnitude(self.frozen().weight, self.scaling[adapter_name])
            if zero_rows:
                logger.warning(
                    "%s: %d rows of the weight are zero; their direction is undefined, so they start as plain LoRA.",
                    key,
                    zero_rows,
                )
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Move an adapter that was just loaded, without casting it.

        PEFT casts to the base's dtype and back to float32 here, which would round what the file holds to bfloat16.
        """
        if adapter_name not in self.ranktune_update:
            return
        update = self.update_of(adapter_name)
        if not any(parameter.is_meta for parameter in update.parameters()):
            update.to(self._weight.device if device is None else device)

    def frozen(self) -> Base:
        """The base layer's own weight [out, in], whether or not an adapter is merged into it, and its bias."""
        layer = self.get_base_layer()
        bias = cast("Tensor | None", layer.bias)
        if self.quantization_backend is not None:
            return Base(quantised_weight(layer, self.quantization_backend), bias)
        weight = self._weight if self.original_weight is None else self.original_weight
        return Base(weight.T if isinstance(layer, Conv1D) else weight, bias)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The adapted output [..., out] for x [..., in]; further arguments go to the base layer."""
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(x, *args, **kwargs)
        names = [] if self.merged else [name for name in self.active_adapters if name in self.ranktune_update]
        if self.training and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            for name in names:
                if (update := self.update_of(name)).needs_controller:
                    warn_without_controller(name, update.warned)
        if len(names) == 1 and not args and not kwargs and self._can_fuse():
            return self.update_of(names[0])(x, self.frozen(), self.scaling[names[0]])
        output = base_output = self.base_layer(x, *args, **kwargs)
        for name in names:
            output = output + self.update_of(name).plain_delta(x, base_output, self.frozen, self.scaling[name])
        return output

    def _can_fuse(self) -> bool:
        """Whether the fused op may stand in for the base layer's own forward.

        It reads an ordinary frozen weight and never calls the layer, so nothing may hang on that call; of a quantised
        layer it calls forward and does the way back itself. The compiler fuses the plain formula itself.
        """
        layer = self.base_layer
        backend = self.quantization_backend
        if torch.compiler.is_compiling() or isinstance(layer, BaseTunerLayer):
            return False
        if backend is None and type(layer) not in (nn.Linear, Conv1D):
            return False
        hooked = (
            layer._forward_hooks
            or layer._forward_pre_hooks
            or layer._backward_hooks
            or layer._backward_pre_hooks
            or "forward" in vars(layer)
            or "_hf_hook" in vars(layer)
        )
        if hooked:
            return False
        bias = cast("Tensor | None", layer.bias)
        if bias is not None and bias.requires_grad:
            return False
        if backend is not None:
            return can_dequantise(backend)
        return type(self._weight) in (nn.Parameter, Tensor) and not self._weight.requires_grad

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the adapters to the base weight: computed in float32 from the original weight and cast once.

        The original is kept until `unmerge`, which therefore restores it bit for bit.

        Args:
            safe_merge: refuse, changing nothing, when the result is not finite.
            adapter_names: which adapters; all active ones by default.

        Raises:
            ValueError: ``safe_merge`` found NaN or infinity.
            ConfigError: the base is quantised.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.ranktune_update]
        if not names:
            return
        if self.quantization_backend is not None:
            raise ConfigError(
                f"merging into a {self.quantization_backend.backend_name} weight would round the update away: load "
                "the base model unquantised and merge there (`ranktune merge --dequantize` does, into the weights that "
                "the few bits stand for), or keep the adapter apart."
            )
        original = self._weight.data if self.original_weight is None else self.original_weight
        merged = original
        for name in (*self.merged_adapters, *names):
            merged = merged + self._delta_weight(name)
            if safe_merge and not torch.isfinite(merged).all():
                raise ValueError(f"NaNs detected in the merged weights. The adapter {name} seems to be broken")
        self.original_weight = original
        self._weight.data = merged.to(original.dtype).contiguous()
        self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        """Put the original weight back, bit for bit."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        if self.original_weight is not None:
            self._weight.data = self.original_weight
        self.original_weight = None
        self.merged_adapters.clear()

    def get_delta_weight(self, adapter: str) -> Tensor:
        """What the adapter adds to the base weight, in the base weight's layout and the adapter's dtype."""
        return self._delta_weight(adapter).to(self.update_of(adapter).lora_A.dtype)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Where the update is the same for every input, PEFT can approximate it by a LoRA.

        That is exact, unless the update is weight-decomposed.
        """
        return adapter_name not in self.ranktune_update or self.update_of(adapter_name).mergeable

    def _delta_weight(self, name: str) -> Tensor:
        with torch.no_grad():
            delta = self.update_of(name).delta_weight(self.frozen().weight, self.scaling[name])
        return delta.T if isinstance(self.get_base_layer(), Conv1D) else delta

    def update_of(self, adapter: str) -> LowRankUpdate:
        """The tensors of one adapter on this layer."""
        return cast(LowRankUpdate, self.ranktune_update[adapter])

    @property
    def _weight(self) -> Tensor:
        return cast(Tensor, self.get_base_layer().weight)

    def __repr__(self) -> str:
        return "ranktune." + super().__repr__()

    def extra_repr(self) -> str:
        return quantization_extra_repr(self)


def warn_without_controller(adapter: str, warned: dict[Any, Any]) -> None:
    """Say that an adapter whose ranks should move is being trained without anybody to move them.

    Args:
        warned: shared by the modules of the adapter. Python's own registry of warnings is one per line of source: in a
            notebook it would keep silent about every model but the first.
    """
    message = (
        f"adapter {adapter!r} is being trained without a controller, so its ranks stay as they are. In a Trainer add "
        "callbacks=[ranktune.RankCallback()]; in a loop of your own make ranktune.RankController(model, optimizer, "
        "total_steps=...) before it."
    )
    warnings.warn_explicit(message, UserWarning, __file__, 1, module=__name__, registry=warned)
