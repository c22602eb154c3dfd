"""The methods of a comparison as they are asked for: `lora,dynamic-dora,mor[num_experts=4]`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ranktune.errors import RecipeError, did_you_mean
from ranktune.recipe.choices import method_class, method_fields
from ranktune.recipe.overrides import split_override

# What the best learning rate of a method is expected to be as a multiple of LoRA's; the search goes on from there.
# Dynamic DoRA's update starts through gates at zero, IncreLoRA's and AdaLoRA's too; full fine-tuning moves far more.
# (On STS-B Dynamic DoRA's best was 2.5 times LoRA's, IncreLoRA's 4 times.)
LEARNING_RATE_FACTORS: Mapping[str, float] = {
    "dynamic-dora": 10**0.5,
    "increlora": 10**0.5,
    "peft-adalora": 10**0.5,
    "full": 0.1,
}

# Words of the recipe's method section that mean the same in every method.
_SHARED = (
    "r",
    "lora_alpha",
    "lora_dropout",
    "target_modules",
    "exclude_modules",
    "modules_to_save",
    "layers_to_transform",
    "layers_pattern",
    "use_rslora",
)


@dataclass(frozen=True)
class Variant:
    """One method of the comparison: `label` as it was written, the method's `name`, and the `fields` set for it."""

    label: str
    name: str
    fields: dict[str, Any]

    @property
    def slug(self) -> str:
        """The label as part of a file name."""
        return re.sub(r"[^A-Za-z0-9.]+", "-", self.label).strip("-")

    @property
    def learning_rate_factor(self) -> float:
        """Where its learning rates are looked for, as a multiple of the recipe's."""
        return LEARNING_RATE_FACTORS.get(self.name, 1.0)

    def section(self, recipe_method: Mapping[str, Any], file: str) -> dict[str, Any]:
        """The `method` section: the recipe's shared words, or all of them for the recipe's own method, then `fields`.

        Raises:
            RecipeError: there is no such method or field.
        """
        known = method_fields(method_class({"name": self.name}, file))
        own = self.name == recipe_method["name"]
        shared = {name: value for name, value in recipe_method.items() if name in known and (own or name in _SHARED)}
        return {**shared, **self.fields, "name": self.name}


def parse_methods(text: str) -> list[Variant]:
    """`a,b[x=1,y=2]` as variants; brackets set fields of the method for this comparison.

    Raises:
        RecipeError: there is no such method, brackets do not match, a field is no `name=value`, or two variants could
            not be told apart.
    """
    variants = [_variant(part.strip()) for part in re.split(r",(?![^\[]*\])", text) if part.strip()]
    if not variants:
        raise RecipeError("--methods names no method; for example: --methods lora,dora,dynamic-dora.")
    for variant in variants:
        if [other.slug for other in variants].count(variant.slug) > 1:
            raise RecipeError(f"--methods names '{variant.label}' twice; every method needs a name of its own.")
    return variants


def default_methods() -> list[Variant]:
    """Every method there is: ours first, then the baselines."""
    import ranktune.methods  # noqa: F401  (importing the methods registers them)
    from ranktune.baselines import BASELINES
    from ranktune.config import METHODS

    return [Variant(name, name, {}) for name in [*METHODS, *BASELINES]]


def _variant(text: str) -> Variant:
    found = re.fullmatch(r"(?P<name>[^\[\]=]+)(\[(?P<fields>.*)\])?", text)
    if found is None:
        raise RecipeError(f"--methods: '{text}' is not a method; write name or name[field=value,field=value].")
    name, known = found["name"].strip(), [variant.name for variant in default_methods()]
    if name not in known:
        near = did_you_mean(name, known)
        raise RecipeError(f"--methods: unknown method '{name}'.{near} Methods: {', '.join(known)}.")
    return Variant(text, name, dict(_fields(found["fields"] or "", text)))


def _fields(text: str, variant: str) -> Iterable[tuple[str, Any]]:
    for part in re.split(r",(?![^\[{]*[\]}])", text):
        if part.strip():
            path, value = split_override(part.strip())
            if len(path) != 1:
                raise RecipeError(f"--methods: '{part}' in '{variant}' must be one field of the method, not a path.")
            yield path[0], value
