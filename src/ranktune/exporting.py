"""`export_trained`: a run or an adapter folder as plain LoRA, checked in a process that never imports ranktune."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

from ranktune.adapter_file import CONFIG_FILE, adapter_folder, read_adapter
from ranktune.adapters import updates
from ranktune.approximation import activate_approximation, check_approximation
from ranktune.config import PEFT_TYPE
from ranktune.dequantising import quantisation
from ranktune.errors import ConfigError, ExportError
from ranktune.export import Exported, export_lora, refuse_occupied
from ranktune.plain_lora import Profile
from ranktune.rank_setting import at_rank
from ranktune.run.atomic import write_folder
from ranktune.run.session import libraries_quiet
from ranktune.static_mixture import MeanGate
from ranktune.verification.opening import Opened, open_trained
from ranktune.verification.proof import Agreement, adapter_agreement


@dataclass(frozen=True)
class ExportedRun:
    """What was written, and how well stock PEFT's outputs agree with the adapter's.

    Attributes:
        approximation: what stands for the trained adapter in the file, with its error, if it is not in it itself;
            agreement is then with this.
    """

    exported: Exported
    agreement: Agreement
    approximation: MeanGate | None = None


def export_trained(
    path: Path,
    out: Path,
    profile: Profile = "uniform",
    rank: int | Mapping[str, int] | None = None,
    svd_rank: int | None = None,
    approximate: str | None = None,
) -> ExportedRun:
    """Write `export_lora`'s folder for what `ranktune train` left, and prove it.

    The base model is loaded in float32, and once more in a fresh process of stock PEFT with the new folder; both get
    the same real inputs. The folder appears only if the outputs agree.

    Args:
        path: a run's output directory, or an adapter folder.
        out: the folder to make; it must not exist, or be empty.
        profile: of `export_lora`.
        rank: of a nested adapter (dylora), the rank to cut it at, or module name to rank.
        svd_rank: of `export_lora`. The outputs of a truncated SVD are compared and reported, not judged.
        approximate: ``"mean_gate"`` writes a mor adapter as `ranktune.mean_gate` approximates it on the same inputs.

    Raises:
        ExportError: the outputs differ by more than rounding; nothing was kept.
        RanktuneError: of any other kind: something is missing or cannot work; nothing was written.
    """
    refuse_occupied(out)
    check_approximation(approximate)
    _refuse_stock_adapter(path)
    opened = _opened(path, svd_rank)
    results: list[ExportedRun] = []

    def fill(folder: Path) -> None:
        with nullcontext() if rank is None else at_rank(opened.model, rank):
            name = "default" if approximation is None else approximation.adapter_name
            exported = export_lora(opened.model, folder, profile, adapter_name=name, svd_rank=svd_rank)
            agreement = adapter_agreement(opened, folder)
        if svd_rank is None and not agreement.holds:
            raise ExportError(
                f"in stock PEFT outputs differ by up to {agreement.difference:.3g}, in outputs up to "
                f"{agreement.largest:.3g} that the adapter moves by up to {agreement.effect:.3g}. Nothing was kept."
            )
        results.append(ExportedRun(exported, agreement, approximation))

    with libraries_quiet():
        approximation = activate_approximation(opened, approximate)
        out.parent.mkdir(parents=True, exist_ok=True)
        write_folder(out, fill)
    return results[0]


def _refuse_stock_adapter(path: Path) -> None:
    """There is nothing to export of what PEFT wrote itself.

    Raises:
        ConfigError: telling which commands take it.
    """
    folder = adapter_folder(path)
    if (folder / CONFIG_FILE).exists() and (kind := read_adapter(folder).config["peft_type"]) != PEFT_TYPE:
        raise ConfigError(
            f"{folder} is stock PEFT's own adapter ({kind}), which loads without ranktune as it is. In another layout, "
            f"with one rank and scale for all modules, `ranktune squeeze {folder} --budget energy=100% --profile "
            f"uniform` writes it, and smaller with a smaller budget; `ranktune merge {folder} --out DIR` builds it "
            "into its base model."
        )


def _opened(path: Path, svd_rank: int | None) -> Opened:
    """What was trained, on a base model that stock PEFT can use it with.

    On a CPU its DoRA quantises bitsandbytes' 8-bit weights a second time when it reads them (peft 0.21): the adapter is
    then checked on the weights that they stand for.
    """
    opened = open_trained(path)
    decomposed = any(update.decomposed for _, update in updates(opened.model))
    how = quantisation(opened.model.get_base_model()) or {}
    if svd_rank is not None or not decomposed or not how.get("load_in_8bit") or opened.model.device.type != "cpu":
        return opened
    opened = open_trained(path, dequantise=True)
    note = "on the dequantised base model, because stock PEFT's DoRA spoils 8-bit weights on a CPU"
    return replace(opened, inputs=f"{opened.inputs} ({note})")
