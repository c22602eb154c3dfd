"""`dequantised`: a quantised transformers model as an ordinary one, with the weights that its few bits stand for."""

from __future__ import annotations

from typing import Any, cast

import torch
from peft.utils import resolve_quantization_backend
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ranktune.quantised_weight import quantisation_options, quantised_weight


def quantisation(model: nn.Module) -> dict[str, Any] | None:
    """How a transformers model is quantised, as its configuration writes it down; None where it is not."""
    config = getattr(getattr(model, "config", None), "quantization_config", None)
    return None if config is None else config.to_dict()


def dequantised(model: PreTrainedModel) -> PreTrainedModel:
    """The model with ordinary float32 linear layers in place of quantised ones, changed in place.

    Raises:
        ConfigError: its library cannot dequantise.
    """
    if quantisation(model) is None:
        return model
    for name, module in list(model.named_modules()):
        backend = resolve_quantization_backend(module, **quantisation_options(model))
        if backend is not None:
            weight = quantised_weight(module, backend).dense().float()
            model.set_submodule(name, _ordinary(module, weight).train(module.training))
    loaded = cast(Any, model)
    loaded.hf_quantizer.remove_quantization_config(model)
    # Saving undoes what loading did to the weights; making them quantised is done with.
    if conversions := getattr(loaded, "_weight_conversions", None):
        loaded._weight_conversions = [
            each
            for each in conversions
            if not any(hasattr(step, "hf_quantizer") for step in getattr(each, "operations", []))
        ]
    return model


def _ordinary(module: Any, weight: torch.Tensor) -> nn.Module:
    """A linear layer of the kind that there was before, with this weight [out, in]."""
    rows, columns = weight.shape
    with torch.device("meta"):
        if getattr(module, "source_cls", None) is Conv1D:  # bitsandbytes' layers hold GPT-2's transposed
            new, weight = Conv1D(rows, columns), weight.T.contiguous()
        else:
            new = nn.Linear(columns, rows, bias=module.bias is not None)
    new.weight = nn.Parameter(weight, requires_grad=False)
    new.bias = module.bias
    return new
