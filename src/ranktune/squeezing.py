"""`squeeze`: a trained LoRA recompressed after the fact, its ranks chosen across all modules by energy.

Each module's update is taken by its singular values (QR of its factors and a small SVD, never a dense matrix). Of all
modules' components together those with the most energy (squared singular value) are kept. For a budget in ranks no
choice loses less of the updates' Frobenius norms; for one in parameters the energy of a component is divided by what
it costs, and what is left at the end is less than any component that was not kept costs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ranktune.adapter_file import TENSOR_FILE, adapter_folder, read_adapter
from ranktune.allocation import keep_best
from ranktune.config import is_count
from ranktune.errors import ConfigError, ExportError
from ranktune.export import refuse_occupied
from ranktune.plain_lora import PlainLora, PlainModule, Profile, check_profile
from ranktune.recompression import SingularForm, difference_norm, product_norm, singular_form
from ranktune.run.atomic import write_folder
from ranktune.saved_adapter import SavedAdapter, load_saved_adapter
from ranktune.storage_dtype import name_of, storage_dtype

# Rounding of the factors in the file, relative to the module's update.
_TOLERANCE = 1e-5
# Singular values below this share of their module's largest are rounding: zeros that a file was filled up with.
_ZERO = 1e-12
# What a LoRA of stock PEFT, or of ours, says beside its ranks and scale, and a recompressed one goes on saying.
_KEPT_FIELDS = (
    "task_type",
    "auto_mapping",
    "base_model_name_or_path",
    "revision",
    "modules_to_save",
    "fan_in_fan_out",
    "trainable_token_indices",
    "layer_replication",
)
_TARGET_FIELDS = ("exclude_modules", "layers_to_transform", "layers_pattern")


@dataclass(frozen=True)
class Squeezed:
    """What `squeeze` wrote.

    Attributes:
        shapes: module name to (out, in).
        ranks_before, ranks: module name to rank. A module at rank 0 is not in the file.
        errors: module name to the share of its update's Frobenius norm that was lost.
        error: the same of all updates together.
        whole: whether the budget was enough for every component that is not zero: there was nothing to squeeze.
        parameters_before, parameters: numbers in the factors, without magnitudes and what was trained in full.
        stored: numbers in the factors in the file, with the zeros that the uniform profile fills them up with.
        folded: gates and scalings of the adapter before, which are now inside its factors. magnitudes: numbers in them.
            Together with ``parameters_before`` that is what `inspect` and a run's summary count.
        nbytes_before, nbytes: the size of the tensor file, with those zeros.
        decomposed: whether the adapter has magnitudes (DoRA); they are kept, and errors are of ``B A`` alone.
    """

    shapes: dict[str, tuple[int, int]]
    ranks_before: dict[str, int]
    ranks: dict[str, int]
    errors: dict[str, float]
    error: float
    whole: bool
    parameters_before: int
    parameters: int
    stored: int
    folded: int
    magnitudes: int
    nbytes_before: int
    nbytes: int
    decomposed: bool


@torch.no_grad()
def squeeze(
    adapter: str | Path,
    directory: str | Path,
    *,
    total_rank: int | None = None,
    target_params: int | None = None,
    energy: float | None = None,
    profile: Profile = "compact",
    dtype: str | None = None,
) -> Squeezed:
    """Recompress a saved adapter of the LoRA family, ours or stock PEFT's, under exactly one budget.

    The result is a plain LoRA for stock PEFT; its base model is not needed to make it. A weight-decomposed adapter
    stays one: it keeps its magnitudes, and at least one component in every module.

    Args:
        adapter: its folder, or a run's output directory.
        directory: the folder to make; it must not exist, or be empty. It appears in one step.
        total_rank: how many components all modules may have together.
        target_params: how many numbers their factors may have together; zeros that the uniform profile fills up with
            do not count.
        energy: keep the fewest components that hold this share, in (0, 1], of the squared norm of all updates.
        profile: of `ranktune.export_lora`.
        dtype: that factors are written in: ``float32``, ``bfloat16`` or ``float16``. By default that of the adapter, if
            it is at least float32, for which half precision becomes float32. Errors are those after rounding.

    Raises:
        AdapterFileError: the adapter cannot be read, or its factors are not all that it adds to its base model.
        ConfigError: not exactly one budget is given or it keeps nothing, the adapter's update depends on its input, or
            ``dtype`` is no such type or cannot hold the factors.
        ExportError: what was written is not what was computed; nothing was kept.
    """
    check_profile(profile)
    rounded = None if dtype is None else storage_dtype(dtype)
    path = Path(directory)
    refuse_occupied(path)
    saved = load_saved_adapter(read_adapter(adapter_folder(adapter)))
    saved.require_unchanged_base()
    modules = {name: module.plain() for name, module in saved.modules.items()}
    forms = {name: singular_form(module.A.double(), module.B.double()) for name, module in modules.items()}
    costs = {name: sum(module.shape) for name, module in saved.modules.items()}
    ranks = dict(
        zip(
            forms,
            chosen_ranks(
                [form.values for form in forms.values()],
                list(costs.values()),
                [int(module.magnitude is not None) for module in modules.values()],
                total_rank=total_rank,
                target_params=target_params,
                energy=energy,
            ),
            strict=True,
        )
    )
    kept = {name: _truncated(forms[name], rank, modules[name], rounded) for name, rank in ranks.items() if rank}
    lora = PlainLora(kept, _targets(saved, kept), saved.others, _fields(saved, kept))

    def fill(folder: Path) -> None:
        lora.write(folder, profile)
        _refuse_unfaithful(folder, kept)

    path.parent.mkdir(parents=True, exist_ok=True)
    write_folder(path, fill)
    before = sum(module.rank * costs[name] for name, module in modules.items())
    magnitudes = sum(module.magnitude.numel() for module in modules.values() if module.magnitude is not None)
    written = load_saved_adapter(read_adapter(path)).modules
    norms = {name: float(form.values.norm()) for name, form in forms.items()}
    lost = {name: float(form.values[ranks[name] :].norm()) for name, form in forms.items()}
    if rounded is not None:
        lost |= {
            name: difference_norm((modules[name].A, modules[name].B), (own.A, own.B)) for name, own in kept.items()
        }
    return Squeezed(
        shapes={name: module.shape for name, module in saved.modules.items()},
        ranks_before={name: module.rank for name, module in modules.items()},
        ranks=ranks,
        errors={name: lost[name] / norms[name] if norms[name] else 0.0 for name in forms},
        error=math.hypot(*lost.values()) / math.hypot(*norms.values()),
        whole=not any((form.values[ranks[name] :] > _ZERO * form.values[:1]).any() for name, form in forms.items()),
        parameters_before=before,
        parameters=sum(rank * costs[name] for name, rank in ranks.items()),
        stored=sum(module.capacity * costs[name] for name, module in written.items()),
        folded=sum(module.parameters for module in saved.modules.values()) - before - magnitudes,
        magnitudes=magnitudes,
        nbytes_before=saved.file.tensor_file.stat().st_size,
        nbytes=(path / TENSOR_FILE).stat().st_size,
        decomposed=lora.decomposed,
    )


def chosen_ranks(
    values: Sequence[Tensor],
    costs: Sequence[int],
    least: Sequence[int] | None = None,
    *,
    total_rank: int | None = None,
    target_params: int | None = None,
    energy: float | None = None,
) -> list[int]:
    """How many leading singular values of each module to keep.

    Args:
        values: of each module, [k] falling. costs: numbers that one component of each module takes.
        least: how many components each module keeps whatever they hold; none by default.
        total_rank, target_params, energy: exactly one budget; see `squeeze`.

    Raises:
        ConfigError: there is not exactly one budget, or it keeps nothing, or less than ``least``.
    """
    given = {"total_rank": total_rank, "target_params": target_params, "energy": energy}
    if sum(value is not None for value in given.values()) != 1:
        raise ConfigError(f"give exactly one budget: {', '.join(given)}.")
    for name, count in (("total_rank", total_rank), ("target_params", target_params)):
        if count is not None and (not is_count(count) or count < 1):
            raise ConfigError(f"{name}={count!r} must be a whole number, at least 1.")
    if energy is not None and not (type(energy) in (int, float) and 0.0 < energy <= 1.0):
        raise ConfigError(f"energy={energy!r} must be a share above 0, at most 1.")
    energies = _padded_squares(values)
    if not (energies > 0.0).any():
        raise ConfigError("every update of this adapter is zero: there is nothing to keep.")
    places = torch.arange(energies.shape[1])
    forced = places < torch.tensor([0] * len(values) if least is None else least).unsqueeze(1)
    price = torch.tensor(costs)
    if energy is not None:
        total_rank = _components_for(energies, forced, energy)
    by_rank = total_rank is not None
    needed = int(forced.sum() if by_rank else (forced * price.unsqueeze(1)).sum())
    budget = total_rank if total_rank is not None else target_params or 0
    if budget < needed:
        raise ConfigError(
            f"a weight-decomposed adapter keeps at least one component in each of its {len(values)} modules: the "
            f"budget must be at least {needed:,} {'components' if by_rank else 'parameters'}, and is {budget:,}."
        )
    if by_rank:
        price = torch.ones_like(price)
    scores = energies / price.unsqueeze(1)
    scores[forced] = float(scores.max()) + 1.0
    kept = keep_best(scores, price, min(budget, int((price.unsqueeze(1) * (scores > 0.0)).sum())))
    ranks = (kept & (scores > 0.0)).sum(1).tolist()
    if not any(ranks):
        raise ConfigError(
            f"every module would have rank 0: target_params={target_params} is less than the cheapest component takes "
            f"({min(costs):,} numbers)."
        )
    return ranks


def _padded_squares(values: Sequence[Tensor]) -> Tensor:
    """Energies [modules, most components], with -1 where a module has none and 0 for rounding."""
    squares = torch.full((len(values), max(len(row) for row in values)), -1.0, dtype=torch.float64)
    for row, own in zip(squares, values, strict=True):
        exact = own.to("cpu", torch.float64)
        row[: len(own)] = torch.where(exact > _ZERO * exact[:1], exact, 0.0).square()
    return squares


def _components_for(energies: Tensor, forced: Tensor, share: float) -> int:
    """The fewest components, forced ones first, with this share of the energy of all."""
    positive = energies.clamp_min(0.0)
    free = positive[~forced].sort(descending=True).values
    reached = positive[forced].sum() + torch.cat([free.new_zeros(1), free.cumsum(0)])
    # Rounding of the sum must not ask for one component more.
    return int(forced.sum()) + int((reached < share * reached[-1] * (1.0 - 1e-12)).sum())


def _truncated(form: SingularForm, rank: int, before: PlainModule, dtype: torch.dtype | None) -> PlainModule:
    """The module at its new rank, in the precision it had, or rounded to another; the magnitude as it is."""
    A, B = (factor.to(dtype or before.A.dtype) for factor in form.factors(rank))
    if not (torch.isfinite(A).all() and torch.isfinite(B).all()):
        raise ConfigError(f"dtype={name_of(A.dtype)!r} cannot hold the factors: choose another, or leave it out.")
    return PlainModule(A, B, before.magnitude)


def _targets(saved: SavedAdapter, kept: Mapping[str, PlainModule]) -> list[str] | str:
    """As in the adapter; by their full names where some modules are left out, or it has no list of its own."""
    targets = saved.file.config.get("target_modules")
    return targets if targets and len(kept) == len(saved.modules) else sorted(kept)


def _fields(saved: SavedAdapter, kept: Mapping[str, PlainModule]) -> dict[str, Any]:
    names = _KEPT_FIELDS if len(kept) < len(saved.modules) else (*_KEPT_FIELDS, *_TARGET_FIELDS)
    return {name: saved.file.config[name] for name in names if saved.file.config.get(name) is not None}


def _refuse_unfaithful(folder: Path, modules: Mapping[str, PlainModule]) -> None:
    """Read the file again and compare it with what was computed."""
    written = load_saved_adapter(read_adapter(folder)).modules
    for name, module in modules.items():
        found = written[name].plain()
        norm = product_norm(module.A, module.B)
        difference = difference_norm((module.A, module.B), (found.A, found.B))
        if not difference <= _TOLERANCE * norm:
            raise ExportError(
                f"{name}: what was written differs from what was computed by {difference:.3g} of {norm:.3g}. Nothing "
                "was kept."
            )
