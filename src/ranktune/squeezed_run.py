"""`squeeze_trained`: a run's adapter, or any adapter folder, recompressed, and what that does to the model's outputs.

Factors alone say how much of each update is lost. How much of what the adapter does to the outputs is lost with it
takes the base model and some inputs: those of the run, or those that are given.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ranktune.adapter_file import CONFIG_FILE, adapter_folder
from ranktune.errors import ExportError, RanktuneError, RecipeError
from ranktune.export import refuse_occupied
from ranktune.plain_lora import Profile
from ranktune.run.atomic import write_folder
from ranktune.run.session import libraries_quiet
from ranktune.squeezing import Squeezed, squeeze
from ranktune.verification.opening import Opened, open_trained
from ranktune.verification.proof import outputs_in_stock_peft, outputs_of


@dataclass(frozen=True)
class OutputLoss:
    """How the outputs of the small adapter, in stock PEFT, differ from those of the adapter it was made of.

    Attributes:
        share: the Frobenius norm of the difference, as a share of that of what the adapter does to the outputs.
        difference: the largest difference of an output. effect: the most that the adapter moves one.
        inputs: on what.
    """

    share: float
    difference: float
    effect: float
    inputs: str


@dataclass(frozen=True)
class SqueezedRun:
    """What was written, what it does to the outputs, or why that is not known."""

    squeezed: Squeezed
    loss: OutputLoss | None
    unknown: str | None


def squeeze_trained(
    path: Path,
    out: Path,
    budget: dict[str, int | float],
    profile: Profile = "compact",
    *,
    dtype: str | None = None,
    base: str | None = None,
    texts: Path | None = None,
    outputs: bool = True,
) -> SqueezedRun:
    """`squeeze`, and the difference it makes to outputs where the base model and data are at hand.

    A run's output directory says where both are. Of a bare adapter folder outputs are compared if ``base`` is given.

    Args:
        path: a run's output directory, or an adapter folder.
        out: the folder to make; it must not exist, or be empty. It appears in one step.
        budget: of `squeeze`, such as ``{"total_rank": 64}``.
        profile: of `ranktune.export_lora`. dtype: of `squeeze`.
        base: the base model, as in a recipe. texts: a file of inputs for it, one text a line.
        outputs: whether outputs are compared at all.

    Raises:
        RanktuneError: of any kind, nothing was written. That a run's own base or data is gone is no error.
    """
    refuse_occupied(out)
    if texts is not None and base is None:
        raise RecipeError("--texts are inputs for a base model: name it with --base.")
    results: list[SqueezedRun] = []

    def fill(folder: Path) -> None:
        squeezed = squeeze(path, folder, **budget, profile=profile, dtype=dtype)  # pyright: ignore[reportArgumentType]
        opened, unknown = _opened(path, base, texts) if outputs else (None, "as you asked")
        loss = None if opened is None else output_loss(opened, folder)
        results.append(SqueezedRun(squeezed, loss, unknown))

    with libraries_quiet():
        out.parent.mkdir(parents=True, exist_ok=True)
        write_folder(out, fill)
    return results[0]


def output_loss(opened: Opened, folder: Path) -> OutputLoss:
    """Compare an adapter folder in stock PEFT with the opened model.

    Raises:
        ExportError: the folder does not load there, or gives outputs of another shape.
    """
    expected = outputs_of(opened.model, opened.batch)
    with opened.model.disable_adapter():
        without = outputs_of(opened.model, opened.batch)
    found = outputs_in_stock_peft(opened, folder)
    if found.shape != expected.shape:
        raise ExportError(f"outputs of shape {list(found.shape)} where {list(expected.shape)} were expected.")
    real = _real_positions(opened, expected)
    difference, effect = (found - expected)[real], (expected - without)[real]
    return OutputLoss(
        share=float(difference.norm() / effect.norm()) if effect.any() else 0.0,
        difference=float(difference.abs().max()),
        effect=float(effect.abs().max()),
        inputs=opened.inputs,
    )


def budget_of(text: str) -> dict[str, int | float]:
    """``rank=64``, ``params=100000`` or ``energy=90%`` (or 0.9) as the argument of `squeeze`.

    Raises:
        RecipeError: it is none of these.
    """
    kind, _, value = (part.strip() for part in text.partition("="))
    try:
        match kind:
            case "rank" | "params" if (count := int(value.replace(",", ""))) > 0:
                return {"total_rank" if kind == "rank" else "target_params": count}
            case "energy":
                share = float(value[:-1]) / 100.0 if value.endswith("%") else float(value)
                if 0.0 < share <= 1.0:
                    return {"energy": share}
    except ValueError:
        pass
    raise RecipeError(
        f"--budget {text!r}: write rank=64 (all modules together, at least 1), params=100000 or energy=90% "
        "(of the squared norm, at most 100%)."
    )


def _opened(path: Path, base: str | None, texts: Path | None) -> tuple[Opened | None, str | None]:
    """The model to compare on, or why there is none."""
    if base is not None:
        return open_trained(adapter_folder(path), base, texts), None
    if (path / CONFIG_FILE).exists():
        return None, "name the base model with --base to see what is lost in them"
    try:
        return open_trained(path), None
    except RanktuneError as error:
        return None, str(error)


def _real_positions(opened: Opened, outputs: Tensor) -> Tensor:
    """[batch, positions] or [batch] bool: where the outputs are not those of padding."""
    mask = opened.batch.get("attention_mask")
    encoder_decoder = getattr(opened.model.get_base_model().config, "is_encoder_decoder", False)
    if mask is None or encoder_decoder or outputs.ndim < 3 or mask.shape != outputs.shape[:2]:
        return torch.ones(outputs.shape[0], dtype=torch.bool)
    return mask.bool()
