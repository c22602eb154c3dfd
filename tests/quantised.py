"""Small models with quantised weights, and the same models with the weights that these stand for."""

from __future__ import annotations

import copy

import pytest
import torch
from peft.utils import resolve_quantization_backend
from torch import nn

QUANTISATIONS = ["nf4", "nf4-double", "int8", "torchao-int8"]


def quantise(model: nn.Module, how: str, skip: tuple[str, ...] = ("head",)) -> nn.Module:
    """A copy of the model with its linear layers quantised, but for those of these names; skips without the library."""
    model = copy.deepcopy(model).requires_grad_(False)
    named = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    named = [(name, module) for name, module in named if name.rpartition(".")[2] not in skip]
    if how == "torchao-int8":
        quantization = pytest.importorskip("torchao.quantization")
        quantization.quantize_(model, quantization.Int8WeightOnlyConfig(), lambda _, name: name in dict(named))
        return model.requires_grad_(False)
    bnb = pytest.importorskip("bitsandbytes")
    for name, linear in named:
        shape = (linear.in_features, linear.out_features, linear.bias is not None)
        if how == "int8":
            new = bnb.nn.Linear8bitLt(*shape, has_fp16_weights=False, threshold=6.0)
        else:
            new = bnb.nn.Linear4bit(*shape, quant_type="nf4", compress_statistics=how == "nf4-double")
        new.load_state_dict(linear.state_dict())
        model.set_submodule(name, new.to("cpu").requires_grad_(False).train(model.training))
    return model


def dequantised(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy with ordinary layers, which hold what PEFT says the quantised weights are."""
    plain = copy.deepcopy(model)
    for name, module in model.named_modules():
        backend = resolve_quantization_backend(module, get_apply_tensor_subclass=object)
        if backend is not None:
            linear = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
            linear.weight.data = backend.get_base_weight(module).clone()
            if module.bias is not None:
                linear.bias.data = module.bias.data.clone()
            plain.set_submodule(name, linear.requires_grad_(False).train(module.training))
    return plain.to(dtype)
