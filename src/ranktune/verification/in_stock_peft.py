"""Run as a script, with the path of a job: load a model with stock libraries only, and write down its outputs.

A job (JSON) names the model's class in transformers, where its weights are, how to quantise them (and whether to take
that back, rounded as they then are), the adapter to put on it if any, the inputs (safetensors) and where the outputs
go. Nothing here may import ranktune.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers.quantizers.auto import AutoQuantizationConfig


def do(job: dict[str, Any]) -> None:
    """Load, compute, write."""
    transformers.set_seed(job["seed"])
    how = job["quantization"]
    model = getattr(transformers, job["class"]).from_pretrained(
        job["weights"],
        config=transformers.AutoConfig.from_pretrained(job["config"]),
        dtype=torch.float32,
        revision=job["revision"] or "main",
        quantization_config=how and AutoQuantizationConfig.from_dict(how),
    )
    if job["dequantize"]:
        model = model.dequantize(torch.float32)
    for module in model.modules():
        # On some CPUs bitsandbytes would rearrange 4-bit weights when evaluated, so that a DoRA could not read them.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    if job["adapter"] is not None:
        model = peft.PeftModel.from_pretrained(model, job["adapter"])
    with torch.no_grad():
        outputs = model.eval()(**load_file(job["inputs"]))
    first = next(value for value in outputs.values() if isinstance(value, torch.Tensor) and value.ndim > 1)
    save_file({"outputs": first.float().contiguous()}, job["outputs"])


def main(job_file: str) -> None:
    """Do a job; it fails if anything in it has imported ranktune."""
    do(json.loads(Path(job_file).read_text(encoding="utf-8")))
    if "ranktune" in sys.modules:
        raise SystemExit("ranktune was imported here: this proves nothing")


if __name__ == "__main__":
    main(sys.argv[1])
