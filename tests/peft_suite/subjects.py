"""The config classes under test, and the cases that take the place of PEFT's own in its tests' lists."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from peft import LoraConfig, PeftConfig

from ranktune.errors import ConfigError
from tests.methods import ROWS, Row

AGAINST = "PEFT_SUITE_AGAINST"  # "ours", or "stock": PEFT's own LoRA and DoRA, to tell its failures from ours

Kwargs = dict[str, Any]


@dataclass(frozen=True)
class Subject:
    """One config class, with the keywords that every case of it carries."""

    label: str
    config_cls: type[PeftConfig]
    kwargs: Kwargs = field(default_factory=dict)
    init_keyword: str = "init_weights"

    def build(self, **kwargs: Any) -> PeftConfig:
        """What a test written for `LoraConfig` or `LoKrConfig` gets instead of it."""
        for name in ("init_lora_weights", "init_weights"):
            if name in kwargs:
                kwargs[self.init_keyword] = kwargs.pop(name)
        return self.config_cls(**{**self.kwargs, **kwargs})

    def takes_rank_pattern(self) -> bool:
        """Whether ranks can be set per module; methods that choose them refuse the field by name."""
        try:
            self.build(rank_pattern={"layer": 1})
        except ConfigError:
            return False
        return True

    def random_init(self) -> Kwargs:
        """Keywords for an adapter that changes the output from the start."""
        return {**self.kwargs, self.init_keyword: False}


def is_about_ours() -> bool:
    return os.environ.get(AGAINST) != "stock"


def load_subjects() -> list[Subject]:
    if not is_about_ours():
        return [
            Subject("LoRA", LoraConfig, init_keyword="init_lora_weights"),
            Subject("DoRA", LoraConfig, {"use_dora": True}, init_keyword="init_lora_weights"),
        ]
    first_rows: dict[type[PeftConfig], Row] = {}
    for row in ROWS:
        first_rows.setdefault(row.config_class, row)
    return [_from_row(row) for row in first_rows.values()]


def _from_row(row: Row) -> Subject:
    """A config class as the shared table has it first."""
    # said although it is the class's default: the suite lowers its learning rate where it sees the keyword
    decomposed = {"use_dora": True} if row.config().use_dora else {}
    # the suite's scales are those of PEFT's default
    alpha = {} if row.config_class().lora_alpha == LoraConfig().lora_alpha else {"lora_alpha": LoraConfig().lora_alpha}
    return Subject(row.config_class.__name__, row.config_class, {**row.fields, **decomposed, **alpha})


_CUSTOM_MODELS: list[tuple[str, str, Kwargs]] = [
    ("MLP regex", "MLP", {"target_modules": "lin0"}),
    ("MLP first layer", "MLP", {"target_modules": ["lin0"]}),
    ("MLP last layer", "MLP", {"target_modules": ["lin1"], "lora_alpha": 32}),
    ("MLP both layers", "MLP", {"target_modules": ["lin0", "lin1"]}),
    ("MLP modules_to_save", "MLP", {"target_modules": ["lin0"], "modules_to_save": ["lin1"]}),
    ("MLP dropout", "MLP", {"target_modules": ["lin0"], "lora_alpha": 4, "lora_dropout": 0.1}),
    ("MLP rslora", "MLP", {"target_modules": ["lin0", "lin1"], "r": 4, "lora_alpha": 2, "use_rslora": True}),
    ("MLP excluded", "MLP", {"target_modules": "lin.*", "exclude_modules": ["lin1"]}),
    ("MLP all-linear", "MLP", {"target_modules": "all-linear"}),
    (
        "MLP patterns",
        "MLP",
        {"target_modules": ["lin0", "lin1"], "rank_pattern": {"lin1": 2}, "alpha_pattern": {"lin0": 12}},
    ),
    ("Conv1D", "EmbConv1D", {"target_modules": ["conv1d"]}),
    ("Conv1D and Linear", "EmbConv1D", {"target_modules": ["conv1d", "lin0"]}),
    ("Conv1D modules_to_save", "EmbConv1D", {"target_modules": ["conv1d"], "modules_to_save": ["lin0"]}),
    ("Conv1D dropout", "EmbConv1D", {"target_modules": ["conv1d"], "r": 2, "lora_dropout": 0.1}),
]

_TWO_ADAPTERS: list[tuple[str, Kwargs, Kwargs]] = [
    ("same layer", {"target_modules": ["lin0"]}, {"target_modules": ["lin0"]}),
    ("two layers", {"target_modules": ["lin0"]}, {"target_modules": ["lin1"]}),
    ("overlap", {"target_modules": ["lin0", "lin1"]}, {"target_modules": ["lin1"], "r": 4, "lora_alpha": 16}),
    ("dropout", {"target_modules": ["lin0"], "lora_dropout": 0.1}, {"target_modules": ["lin0"]}),
]


def custom_model_cases(subjects: list[Subject]) -> list[tuple[str, str, type[PeftConfig], Kwargs]]:
    """For `TEST_CASES`: (name, model, config class, keywords)."""
    return [
        (f"{name} {subject.label}", model, subject.config_cls, {**kwargs, **subject.kwargs})
        for subject in subjects
        for name, model, kwargs in _CUSTOM_MODELS
        if "rank_pattern" not in kwargs or subject.takes_rank_pattern()
    ]


def config_classes(subjects: list[Subject]) -> list[type[PeftConfig]]:
    """For `ALL_PEFT_CONFIG_CLASSES`."""
    return list(dict.fromkeys(subject.config_cls for subject in subjects))


def two_adapter_cases(subjects: list[Subject]) -> list[tuple[str, str, type[PeftConfig], Kwargs, Kwargs]]:
    """For `MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES`: (name, tuner, config class, keywords of each adapter)."""
    plain: Kwargs = {"target_modules": ["lin0"]}
    decomposed: Kwargs = {**plain, "use_dora": True}
    pairs = [(subject, *pair) for subject in subjects for pair in _TWO_ADAPTERS]
    pairs += [(subjects[0], "then DoRA", plain, decomposed), (subjects[0], "after DoRA", decomposed, plain)]
    # the tuner's name is "ranktune": PEFT's "lora" goes on to test add_weighted_adapter, which is LoRA's alone
    return [
        (
            f"{subject.label} {name}",
            "ranktune",
            subject.config_cls,
            {**subject.random_init(), **first},
            {**subject.random_init(), **second},
        )
        for subject, name, first, second in pairs
    ]


def single_configs(subjects: list[Subject]) -> list[PeftConfig]:
    """For lists of ready-made configs on the MLP."""
    return [subject.build(target_modules=["lin0"], init_weights=False) for subject in subjects]


def transformer_cases(task_type: str | None) -> Callable[[list[Subject]], list[tuple[type[PeftConfig], Kwargs]]]:
    """For `ALL_CONFIGS` of the tests on transformers models: (config class, keywords)."""

    def cases(subjects: list[Subject]) -> list[tuple[type[PeftConfig], Kwargs]]:
        common: Kwargs = {"task_type": task_type, "r": 8, "lora_alpha": 32, "lora_dropout": 0.05}
        return [(subject.config_cls, {**common, "target_modules": None, **subject.kwargs}) for subject in subjects]

    return cases
