"""Run as a script with a folder: what stock PEFT computes with the adapters that `tests.support` left in it.

Nothing here may import ranktune.
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModel, BitsAndBytesConfig, PreTrainedModel, TorchAoConfig
from transformers.pytorch_utils import Conv1D


def load_base(path: str, dtype: torch.dtype, kind: str) -> PreTrainedModel:
    """The base model with layers of one kind: `Linear`, `Conv1D`, `NF4`, `int8` or `torchao int8`."""
    how = None
    if kind == "NF4":
        how = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    elif kind == "int8":
        how = BitsAndBytesConfig(load_in_8bit=True)
    elif kind == "torchao int8":
        from torchao.quantization import Int8WeightOnlyConfig

        how = TorchAoConfig(Int8WeightOnlyConfig())
    base = AutoModel.from_pretrained(path, dtype=dtype, quantization_config=how)
    if kind == "Conv1D":
        for name, module in list(base.named_modules()):
            if isinstance(module, nn.Linear):
                transposed = Conv1D(module.out_features, module.in_features).to(dtype)
                transposed.weight.data, transposed.bias.data = module.weight.data.T.contiguous(), module.bias.data
                base.set_submodule(name, transposed)
    for module in base.modules():
        # Or a DoRA could not read 4-bit weights that were evaluated once, on CPUs with AVX512-BF16.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return base.eval()


def main(folder: Path) -> None:
    """Write the outputs [batch, tokens, width] of every case, by its number."""
    job = json.loads((folder / "job.json").read_text())
    inputs, outputs = load_file(folder / "inputs.safetensors"), {}
    for (dtype, kind), cases in job["bases"]:
        base = load_base(job["model"], getattr(torch, dtype), kind)
        for number, dequantise in sorted(cases, key=lambda case: case[1]):
            if dequantise and getattr(base, "is_quantized", False):
                base = base.dequantize(getattr(torch, dtype))
            model = PeftModel.from_pretrained(base, folder / f"adapter-{number}").eval()
            with torch.no_grad():
                outputs[str(number)] = model(**inputs).last_hidden_state.float().contiguous()
            base = model.unload()
    save_file(outputs, folder / "outputs.safetensors")
    if "ranktune" in sys.modules:
        raise SystemExit("ranktune was imported here: this proves nothing")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(Path(sys.argv[1]))
