"""What `ranktune export` and `ranktune merge` say when they are done."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ranktune.report.tables import size
from ranktune.run.directory import RunDirectory
from ranktune.storage_dtype import name_of

if TYPE_CHECKING:
    from ranktune.exporting import ExportedRun
    from ranktune.merging import Merged
    from ranktune.static_mixture import MeanGate
    from ranktune.verification.proof import Agreement


def export_lines(result: ExportedRun, folder: Path, trained: Path) -> list[str]:
    """Ranks, errors of an approximation, and the proof."""
    exported = result.exported
    ranks = exported.ranks.values()
    kind = "DoRA" if exported.decomposed else "LoRA"
    spread = f"rank {max(ranks)}" if len(set(ranks)) == 1 else f"ranks {min(ranks)} to {max(ranks)}"
    lines = [f"{kind} of {len(ranks)} modules, {spread}, {size(exported.nbytes)}"]
    lines += _approximation_lines(result.approximation, result.agreement)
    if exported.dropped:
        lines.append(left_out_line(exported.dropped))
    if exported.errors:
        worst = max(exported.errors, key=lambda name: exported.errors[name])
        mean = sum(exported.errors.values()) / len(exported.errors)
        lines.append(
            f"truncated SVD loses {mean:.2%} of an update's norm in the mean, {exported.errors[worst]:.2%} in {worst}"
        )
    if exported.decomposed:
        lines.append("PEFT reads a DoRA; vLLM, TGI and llama.cpp do not: use --svd-rank or `ranktune merge` for them")
    lines.append(f"{agreement_line(result.agreement)}, with stock PEFT {result.agreement.peft}")
    return [*lines, saved_in(folder, trained)]


def merge_lines(result: Merged, trained: Path) -> list[str]:
    """Size and proof."""
    dtype = name_of(result.dtype)
    agreement = result.agreement
    merging = f"merged in float32: largest difference {result.merging:.2g} from the adapter on its base"
    if dtype != "float32":
        share = f", {result.rounding / agreement.effect:.2%} of what the adapter does" if agreement.effect else ""
        merging += f"; rounded to {dtype}: {result.rounding:.2g}{share} (--dtype float32 does not round)"
    return [
        f"{dtype} weights, {size(result.nbytes)}",
        *_approximation_lines(result.approximation, agreement),
        merging,
        agreement_line(agreement),
        saved_in(result.directory, trained),
    ]


def left_out_line(names: list[str]) -> str:
    """Modules that are not in the file: all by name, or how many and the first."""
    if len(names) > 3:
        return f"left out, because they have rank 0: {len(names)} modules, such as {names[0]} and {names[1]}"
    return f"left out, because they have rank 0: {', '.join(names)}"


def saved_in(folder: Path, trained: Path) -> str:
    """Where the result is, and, where it was made of a run, how it is scored."""
    if not RunDirectory(trained).metrics.exists():
        return f"Saved in {folder}."
    return f"Saved in {folder}. Score it: ranktune evaluate {trained} --adapter {folder}"


def _approximation_lines(approximation: MeanGate | None, agreement: Agreement) -> list[str]:
    """What stands for a mor adapter, and how far it is from it."""
    if approximation is None:
        return []
    errors = approximation.module_errors
    worst = max(errors, key=lambda name: errors[name])
    lines = [
        f"approximated, with the router's mean decision on {agreement.inputs}: the output differs by "
        f"{approximation.output_error:.2%} of what the mor adapter changes in it; of a module's update by "
        f"{sum(errors.values()) / len(errors):.2%} in the mean, {errors[worst]:.2%} in {worst}"
    ]
    if approximation.routed_loss is not None and approximation.static_loss is not None:
        lines.append(
            f"loss on them {approximation.static_loss:.4f}, with the mor adapter {approximation.routed_loss:.4f}"
        )
    return lines


def agreement_line(agreement: Agreement) -> str:
    """What a fresh process found."""
    return (
        f"checked on {agreement.inputs} in a process without ranktune: largest difference {agreement.difference:.2g}, "
        f"in outputs up to {agreement.largest:.3g} that the adapter moves by up to {agreement.effect:.3g}"
    )
