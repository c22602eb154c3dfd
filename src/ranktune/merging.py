"""`merge_trained`: an adapter built into its base model, as a plain transformers folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import nn
from transformers import AutoConfig, GenerationConfig, PreTrainedModel

from ranktune.approximation import activate_approximation, check_approximation
from ranktune.dequantising import quantisation
from ranktune.errors import ConfigError, ExportError
from ranktune.export import refuse_occupied
from ranktune.run.atomic import write_folder
from ranktune.run.session import libraries_quiet
from ranktune.static_mixture import MeanGate
from ranktune.storage_dtype import DTYPES, name_of, storage_dtype
from ranktune.verification.opening import Opened, open_trained
from ranktune.verification.proof import Agreement, agreement_of, expected_outputs, model_agreement, outputs_of


@dataclass(frozen=True)
class Merged:
    """What `merge_trained` wrote, and how well it agrees with the adapter on its base.

    Attributes:
        merging: the largest difference of an output between the float32 sum and the adapter on its base.
        rounding: the same of the sum rounded to ``dtype``; equal to ``merging`` in float32.
        agreement: of a fresh process with the rounded sum.
        approximation: what was merged in place of the trained adapter, with its error; the
            adapter is then this.
    """

    directory: Path
    dtype: torch.dtype
    nbytes: int
    merging: float
    rounding: float
    agreement: Agreement
    approximation: MeanGate | None = None


def merge_trained(
    path: Path,
    out: Path,
    dtype: str | None = None,
    max_shard_size: str = "5GB",
    approximate: str | None = None,
    *,
    dequantize: bool = False,
) -> Merged:
    """Write the base model with the adapter merged into it: `from_pretrained` loads the folder without PEFT or us.

    The sum is computed in float32, which is to give the adapter's outputs, and cast once: what that does to outputs is
    told, not judged. Tied weights stay tied, the generation settings and the tokenizer travel along, and the folder is
    checked in a fresh process, where it has to give the outputs of what was cast, before it appears.

    Args:
        path: a run's output directory, or an adapter folder.
        out: the folder to make; it must not exist, or be empty.
        dtype: ``float32``, ``bfloat16`` or ``float16``; the base model's own by default.
        max_shard_size: of one file of weights, as in transformers.
        approximate: ``"mean_gate"`` merges a mor adapter as `ranktune.mean_gate` approximates it on the inputs that the
            folder is checked with. Without it, such an adapter is refused.
        dequantize: merge into the dequantised weights of a quantised base model, and write an ordinary one.

    Raises:
        ConfigError: the adapter cannot be merged (its update depends on the input, or the base is quantised), or a
            value is wrong.
        ExportError: what was written gives other outputs than the adapter on its base; nothing was kept.
    """
    chosen = None if dtype is None else storage_dtype(dtype)
    refuse_occupied(out)
    check_approximation(approximate)
    opened = open_trained(path, dequantise=dequantize)
    if quantisation(opened.model.get_base_model()) is not None:
        raise ConfigError(
            f"the base model of {path} is quantised: merging into its few bits would round the update away. Merge "
            "into the weights they stand for, with --dequantize, for an ordinary model of full size; or keep the "
            "adapter apart."
        )
    wanted = chosen or _own_dtype(opened)
    with libraries_quiet():
        approximation = activate_approximation(opened, approximate)
        expected, effect = expected_outputs(opened)
        try:
            model = cast(PreTrainedModel, opened.model.merge_and_unload(safe_merge=True))
        except ValueError as error:
            raise ConfigError(f"{path}: {error}") from error
        summed = agreement_of(outputs_of(model, opened.batch), expected, effect, opened.inputs)
        if not summed.holds:
            raise ExportError(
                f"with the adapter merged, outputs differ by up to {summed.difference:.3g} from the adapter's on its "
                f"base, in outputs up to {summed.largest:.3g}. Nothing was kept."
            )
        _round(model, wanted)
        if infinite := [name for name, tensor in model.state_dict().items() if not torch.isfinite(tensor).all()]:
            raise ConfigError(f"{infinite[0]} has values that {name_of(wanted)} cannot hold: choose another dtype.")
        if (generation := _generation_config(opened)) is not None:
            model.generation_config = generation
        rounded = outputs_of(model, opened.batch)
        cast(nn.Module, model).to(wanted)

        def fill(folder: Path) -> None:
            model.save_pretrained(str(folder), max_shard_size=max_shard_size)
            if opened.tokenizer is not None:
                opened.tokenizer.save_pretrained(str(folder))
            found.append(model_agreement(opened, rounded, effect, folder))
            if not found[0].holds:
                raise ExportError(
                    f"the merged model's outputs differ by up to {found[0].difference:.3g} in a fresh process, in "
                    f"outputs up to {found[0].largest:.3g}. Nothing was kept."
                )

        found: list[Agreement] = []
        out.parent.mkdir(parents=True, exist_ok=True)
        write_folder(out, fill)
    size = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    difference = float((rounded - expected).abs().max())
    return Merged(out, wanted, size, summed.difference, difference, found[0], approximation)


@torch.no_grad()
def _round(model: nn.Module, dtype: torch.dtype) -> None:
    """Give what will be in the file, in place and still in float32, the values that it will have there.

    Other tensors, such as the frequencies of rotary positions, are made anew when a model is loaded.
    """
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(tensor.to(dtype))


def _own_dtype(opened: Opened) -> torch.dtype:
    """What the base model's weights are stored in."""
    config = AutoConfig.from_pretrained(opened.path, revision=opened.revision or "main")
    stored = getattr(config, "dtype", None)
    return next((dtype for dtype in DTYPES.values() if dtype == stored), torch.float32)


def _generation_config(opened: Opened) -> GenerationConfig | None:
    """The base model's own, where it has one: a task may have replaced it for its scores."""
    try:
        return GenerationConfig.from_pretrained(opened.path, revision=opened.revision or "main")
    except OSError:
        return None
