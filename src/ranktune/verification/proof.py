"""Compare a model's outputs with what a fresh process gets from a folder, without ranktune."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import peft
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from ranktune.errors import ExportError
from ranktune.verification import in_stock_peft
from ranktune.verification.opening import Opened

# Share of the largest output by which outputs may differ that are computed in float32 from the same weights.
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Agreement:
    """How far the outputs of a fresh process are from the expected ones.

    Attributes:
        difference: the largest difference of an output. largest: the largest expected output.
        effect: by how much the adapter moves an output at most; a difference of this size would be no adapter at all.
        inputs: on what. peft: the version of stock PEFT.
    """

    difference: float
    largest: float
    effect: float
    inputs: str
    peft: str = peft.__version__

    @property
    def holds(self) -> bool:
        """Whether the order of float32 sums explains the difference."""
        return self.difference <= TOLERANCE * self.largest


@torch.no_grad()
def outputs_of(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The first output of a model: logits [batch, ...], or hidden states."""
    outputs = model.eval()(**batch)
    return next(value for value in outputs.values() if isinstance(value, Tensor) and value.ndim > 1).float()


def adapter_agreement(opened: Opened, folder: Path) -> Agreement:
    """Load the base model and the adapter folder in stock PEFT, and compare with the opened model.

    Raises:
        ExportError: the folder does not load there.
    """
    expected, effect = expected_outputs(opened)
    return agreement_of(outputs_in_stock_peft(opened, folder), expected, effect, opened.inputs)


def outputs_in_stock_peft(opened: Opened, folder: Path) -> Tensor:
    """What a fresh process without ranktune computes with an adapter folder, on the opened base and inputs.

    Raises:
        ExportError: the folder does not load there.
    """
    job = {"weights": opened.path, "revision": opened.revision, "adapter": str(folder)}
    return _outputs_elsewhere(opened, job)


def model_agreement(opened: Opened, expected: Tensor, effect: float, folder: Path) -> Agreement:
    """Load a model folder in transformers, in float32 whatever it is stored in, and compare with earlier outputs.

    Raises:
        ExportError: the folder does not load there.
    """
    job = {"weights": str(folder), "revision": None, "adapter": None, "quantization": None, "dequantize": False}
    return agreement_of(_outputs_elsewhere(opened, job), expected, effect, opened.inputs)


def expected_outputs(opened: Opened) -> tuple[Tensor, float]:
    """The opened model's outputs, and by how much the adapter moves them at most."""
    expected = outputs_of(opened.model, opened.batch)
    with opened.model.disable_adapter():
        without = outputs_of(opened.model, opened.batch)
    return expected, float((expected - without).abs().max())


def agreement_of(found: Tensor, expected: Tensor, effect: float, inputs: str) -> Agreement:
    """How far outputs are from the expected ones; the other arguments as in `Agreement`.

    Raises:
        ExportError: they have another shape.
    """
    if found.shape != expected.shape:
        raise ExportError(f"outputs of shape {list(found.shape)} where {list(expected.shape)} were expected.")
    return Agreement(float((found - expected).abs().max()), float(expected.abs().max()), effect, inputs)


def _outputs_elsewhere(opened: Opened, job: dict[str, Any]) -> Tensor:
    """What `in_stock_peft` computes for this job."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        base = cast(PreTrainedModel, opened.model.get_base_model())
        config, quantization = _apart(base.config, opened)
        config.save_pretrained(folder / "config")
        save_file({name: tensor.contiguous() for name, tensor in opened.batch.items()}, folder / "inputs.safetensors")
        job = {
            "class": type(base).__name__,
            "config": str(folder / "config"),
            "quantization": quantization,
            "dequantize": opened.dequantised is not None,
            "seed": opened.seed,
            "inputs": str(folder / "inputs.safetensors"),
            "outputs": str(folder / "outputs.safetensors"),
            **job,
        }
        (folder / "job.json").write_text(json.dumps(job), encoding="utf-8")
        run_elsewhere(folder / "job.json")
        return load_file(folder / "outputs.safetensors")["outputs"]


def _apart(config: PretrainedConfig, opened: Opened) -> tuple[PretrainedConfig, dict[str, Any] | None]:
    """A model's configuration, and how it is quantised while it is loaded, where its weights are not stored so."""
    stored = AutoConfig.from_pretrained(opened.path, revision=opened.revision or "main")
    if not hasattr(config, "quantization_config") or hasattr(stored, "quantization_config"):
        return config, opened.dequantised
    config = copy.deepcopy(config)
    return config, vars(config).pop("quantization_config").to_dict()


def run_elsewhere(job_file: Path) -> None:
    """Do a job of `in_stock_peft` in a new process.

    Raises:
        ExportError: it failed there.
    """
    done = subprocess.run(
        [sys.executable, in_stock_peft.__file__, str(job_file)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "TRANSFORMERS_VERBOSITY": "error"},
    )
    if done.returncode != 0:
        reason = done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"exit code {done.returncode}"
        raise ExportError(f"what was written does not load in a process without ranktune: {reason}")
