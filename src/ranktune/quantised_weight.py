"""A quantised layer's weight as `FrozenRows`: how its rows are made, for the libraries that PEFT knows.

bitsandbytes in 8 bits and torchao keep a scale per row, so that any rows can be made alone; bitsandbytes in 4 bits
keeps one for each run of (say) 64 numbers of the flat weight, so that a block of rows has to begin where a run does.
Any other library is asked, through PEFT, for the whole weight at a time.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from typing import Any, cast

import torch
from peft.utils import get_quantization_kwargs
from peft.utils.quantization_utils import ForwardOnlyQuantizationBackend, QuantizationBackend
from torch import Tensor, nn

from ranktune.errors import ConfigError
from ranktune.frozen_weight import FrozenRows

# Rows that exist in a wider dtype at a time.
_BLOCK_ROWS = 1024


def quantisation_options(tuner: nn.Module) -> dict[str, Any]:
    """What PEFT wants to know of a model before it looks at a quantised layer in it.

    It asks how torchao quantises again after merging, which we refuse; a model of one's own making need not know.
    """
    return {"get_apply_tensor_subclass": None.__class__, **get_quantization_kwargs(tuner)}


def can_dequantise(backend: QuantizationBackend) -> bool:
    """Whether the library can say what its weights are as floating-point numbers."""
    return not isinstance(backend, ForwardOnlyQuantizationBackend)


def quantised_weight(layer: nn.Module, backend: QuantizationBackend) -> FrozenRows:
    """The weight [out, in] of a quantised linear layer.

    Raises:
        ConfigError: its library cannot dequantise it.
    """
    if not can_dequantise(backend):
        raise ConfigError(
            f"a {backend.backend_name} weight cannot be dequantised, and its values are needed here: train without "
            "use_dora, or quantise with bitsandbytes or torchao."
        )
    make = {"bnb 8bit": _eight_bits, "bnb 4bit": _four_bits, "torchao": _torchao}.get(backend.backend_name, _whole)
    return make(layer, backend)


def keep_layout(model: nn.Module) -> None:
    """Have 4-bit layers keep their weights as they are, also when they are evaluated on a CPU.

    On CPUs with AVX512-BF16 the first evaluation makes bitsandbytes rearrange a weight in place, for a kernel that has
    no gradient and computes in bfloat16; nothing can be dequantised or trained through it from then on.

    Raises:
        ConfigError: it has happened already.
    """
    for name, module in model.named_modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            if getattr(getattr(module.weight, "quant_state", None), "packing_format_for_cpu", False):
                raise ConfigError(
                    f"{name}: the quantised model has been evaluated on this CPU already, for which bitsandbytes "
                    "rearranges 4-bit weights so that they can no longer be trained or read. Load the model again, "
                    "and add the adapter before the first evaluation."
                )
            cast(Any, module).support_avx512bf16_for_cpu = False


def _rows_begin_inside_runs(layer: Any) -> bool:
    return layer.weight.quant_state.shape[1] % layer.weight.quant_state.blocksize != 0


def warn_of_misread(model: nn.Module) -> None:
    """Warn of 4-bit layers that bitsandbytes' CPU kernels compute with wrong scales.

    In version 0.50.2 they take every row of the weight to begin a new run of scales, also where its width is no
    multiple of a run's length: the layer's output then belongs to another weight than the one that was quantised.
    """
    found = [name for name, module in model.named_modules() if _misread(module)]
    if found:
        warnings.warn(
            f"bitsandbytes on the CPU reads the 4-bit weights of {len(found)} layers with wrong scales, because their "
            f"input width is no multiple of 64 ({found[0]} is one): the base model is not the one that was quantised, "
            "and an adapter trained here will not fit it on a GPU. Leave these layers unquantised "
            "(llm_int8_skip_modules), or use int8.",
            stacklevel=2,
        )


def _misread(module: Any) -> bool:
    """Whether a layer's own dequantised weight is another than that of its first row's and last row's own scales."""
    state = getattr(getattr(module, "weight", None), "quant_state", None)
    if state is None or module.weight.device.type != "cpu" or not _rows_begin_inside_runs(module):
        return False
    from bitsandbytes.functional import dequantize_4bit

    flat = copy.copy(state)
    flat.shape = torch.Size((state.shape.numel(),))
    read, meant = (dequantize_4bit(module.weight.data, each).flatten() for each in (state, flat))
    return not torch.equal(read, meant)


def _eight_bits(layer: Any, backend: QuantizationBackend) -> FrozenRows:  # noqa: ARG001
    from bitsandbytes.functional import int8_vectorwise_dequant

    def rows(first: int, end: int) -> Tensor:
        # The scales are on the weight until the first forward pass takes them to the layer's state.
        scales = layer.weight.SCB if layer.state.SCB is None else layer.state.SCB
        return int8_vectorwise_dequant(layer.weight.data[first:end], scales[first:end])

    return FrozenRows(layer.weight.shape, torch.float32, layer.weight, _BLOCK_ROWS, rows, layer)


def _four_bits(layer: Any, backend: QuantizationBackend) -> FrozenRows:
    from bitsandbytes.functional import QuantState, dequantize_4bit, dequantize_blockwise

    state = layer.weight.quant_state
    width, run = state.shape[1], state.blocksize
    if _rows_begin_inside_runs(layer) and layer.weight.device.type == "cpu":
        return _whole(layer, backend)  # whatever the layer itself computes with: see `warn_of_misread`

    def scales(first: int, end: int) -> Tensor:
        """The scales of these runs; they may be quantised themselves."""
        if not state.nested:
            return state.absmax[first:end]
        run_of_scales = state.state2.blocksize
        before, after = first // run_of_scales, -(-end // run_of_scales)
        codes = state.absmax[before * run_of_scales : end]
        found = dequantize_blockwise(
            codes, absmax=state.state2.absmax[before:after], code=state.state2.code, blocksize=run_of_scales
        )
        return found[first - before * run_of_scales :] + state.offset

    def rows(first: int, end: int) -> Tensor:
        packed = layer.weight.data.view(torch.uint8).flatten()[first * width // 2 : (end * width + 1) // 2]
        part = QuantState(
            scales(first * width // run, -(-end * width // run)).float(),
            torch.Size(((end - first) * width,)),
            blocksize=run,
            quant_type=state.quant_type,
            dtype=state.dtype,
        )
        return dequantize_4bit(packed.unsqueeze(1), part).view(-1, width)

    together = run // math.gcd(width, run)  # rows that fill whole runs
    block = max(1, _BLOCK_ROWS // together) * together
    return FrozenRows(state.shape, state.dtype, layer.weight, block, rows, layer)


def _torchao(layer: Any, backend: QuantizationBackend) -> FrozenRows:
    from torchao.quantization import Int8Tensor

    weight = layer.weight
    if not isinstance(weight, Int8Tensor):
        return _whole(layer, backend)
    return FrozenRows(
        weight.shape,
        weight.dtype,
        weight.qdata,
        _BLOCK_ROWS,
        lambda first, end: layer.weight[first:end].dequantize(),
        layer,
    )


def _whole(layer: nn.Module, backend: QuantizationBackend) -> FrozenRows:
    weight = backend.get_base_weight(layer)
    make: Callable[[int, int], Tensor] = lambda first, end: backend.get_base_weight(layer)[first:end]  # noqa: E731
    return FrozenRows(weight.shape, weight.dtype, _stored(layer), weight.shape[0], make, layer)


def _stored(layer: nn.Module) -> Tensor:
    """Some tensor of the layer that has a storage of its own."""
    weight = next(tensor for _, tensor in layer.state_dict(keep_vars=True).items())
    names = getattr(weight, "tensor_data_names", None)
    return getattr(weight, names[0]) if names else weight
