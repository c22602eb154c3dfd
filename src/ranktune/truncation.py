"""`ranktune truncate` as a function: a nested adapter (dylora) cut at one rank, as a plain LoRA folder."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import ranktune
from ranktune.errors import RecipeError
from ranktune.evaluation import rebuilt
from ranktune.plain_lora import TENSOR_FILE, Profile
from ranktune.rank_curve import RankCurve, curve_of
from ranktune.rank_setting import at_rank, refuse_untrained_rank
from ranktune.run.display import Display


@dataclass(frozen=True)
class Truncated:
    """What was written.

    Attributes:
        folder: the adapter. rank: b. adapter_bytes: of its tensor file.
        parameters: numbers in the adapter, without a head.
        curve: with a share to choose by, what was chosen from.
    """

    folder: Path
    rank: int
    parameters: int
    adapter_bytes: int
    curve: RankCurve | None


def truncate(
    output: Path,
    display: Display,
    *,
    rank: int | None = None,
    within: str | None = None,
    out: Path | None = None,
    profile: Profile = "uniform",
) -> Truncated:
    """Cut a finished run's adapter at a rank that is given, or at the smallest one that is good enough.

    Args:
        output: of a finished run with a nested adapter.
        display: where progress is shown.
        rank: the rank.
        within: instead, how much of the best rank's score may be lost on the evaluation split, such as "1%".
        out: the folder to make, which must not exist or be empty; ``OUT-rankB`` by default.
        profile: of `ranktune.export_lora`.

    Raises:
        RecipeError: not exactly one of rank and within is given, or there is no finished run.
        ConfigError: the adapter is not nested or was not trained at the rank, or the folder is occupied.
        DataError: the run's data is gone.
    """
    if (rank is None) == (within is None):
        raise RecipeError("give one of --rank (such as 4) and --within (such as 1%): which rank to cut at.")
    share = None if within is None else share_of(within)
    with rebuilt(output, display) as scorer:
        model, curve = scorer.model, None
        if rank is None:
            curve = curve_of(scorer, display)
            rank = curve.smallest_within(share or 0.0).rank
        refuse_untrained_rank(model, rank, "default")
        folder = out or output.resolve().with_name(f"{output.resolve().name}-rank{rank}")
        with at_rank(model, rank):
            ranktune.export_lora(model, folder, profile)
            parameters = ranktune.active_parameters(model)
    return Truncated(folder, rank, parameters, (folder / TENSOR_FILE).stat().st_size, curve)


def share_of(text: str) -> float:
    """``"1%"`` to 0.01.

    Raises:
        RecipeError: it is no percentage from 0 to 100.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?%", text.strip())
    if found is None or not 0.0 <= float(found[1]) < 100.0:
        raise RecipeError(f"--within {text!r}: write a percentage of the best score, such as 1% or 0.5%.")
    return float(found[1]) / 100.0
