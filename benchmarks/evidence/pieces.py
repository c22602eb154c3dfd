"""The table of what is compared on GLUE: every piece is one `ranktune compare`. A new question is one new row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from ranktune.recipe import Recipe
from ranktune.recipe.schema import Precision

Part = Literal["main", "low-resource", "ablation"]

# Where a method's learning rate is looked for: LoRA's, of which the others' are multiples.
LEARNING_RATE = 1e-3
EVERY_METHOD = "lora,dora,dylora,mor,dynamic-dora,increlora,peft-lora,peft-dora,peft-adalora,full"
OF_THE_PAPERS = "lora,increlora,dynamic-dora,dora,dylora,mor"


@dataclass(frozen=True)
class Task:
    """A GLUE task as a recipe reads it: its folder, the `data` section, and the longest input in tokens."""

    title: str
    folder: str
    data: dict[str, Any]
    max_length: int


TASKS = {
    "cola": Task(
        "CoLA",
        "CoLA",
        {"header": False, "columns": {"text": "column_3", "label": "column_1"}, "metric": "matthews"},
        32,
    ),
    "mrpc": Task(
        "MRPC",
        "MRPC",
        {"columns": {"text": "#1 String", "text_pair": "#2 String", "label": "Quality"}, "metric": "accuracy"},
        64,
    ),
    "rte": Task(
        "RTE",
        "RTE",
        {"columns": {"text": "sentence1", "text_pair": "sentence2", "label": "label"}, "metric": "accuracy"},
        128,
    ),
    "stsb": Task(
        "STS-B",
        "STS-B",
        {"columns": {"text": "sentence1", "text_pair": "sentence2", "label": "score"}, "task": "regression"},
        64,
    ),
    # A sixth of its 67,349 examples: the whole is days on a processor.
    "sst2": Task(
        "SST-2",
        "SST-2",
        {"columns": {"text": "sentence", "label": "label"}, "metric": "accuracy", "max_train_examples": 11_000},
        48,
    ),
}


@dataclass(frozen=True)
class Piece:
    """One comparison.

    Attributes:
        name: on the command line, and of its file of results.
        part: the section of the page that it belongs to.
        task: a key of `TASKS`. rank: LoRA's, which sets the budget of all. methods: as `--methods` takes them.
        seeds: final runs of each method. examples: how many are trained on; None is all. epochs: over them.
    """

    name: str
    part: Part
    task: str
    rank: int
    methods: str
    seeds: int = 3
    examples: int | None = None
    epochs: int = 3

    @property
    def title(self) -> str:
        """What the piece is about, in words."""
        few = "" if self.examples is None else f", {self.examples:,} training examples"
        return f"{TASKS[self.task].title}, r = {self.rank}{few}"

    def recipe(self, data: str, output: str, precision: Precision = "fp32") -> Recipe:
        """The recipe that its runs share.

        Args:
            data: the folder that holds `glue/`. output: where runs go. precision: what they compute in.
        """
        task = TASKS[self.task]
        section = {
            "source": f"{data}/glue/{task.folder}",
            "task": "classification",
            "quoting": False,
            "max_length": task.max_length,
            **task.data,
        }
        if self.examples is not None:
            section["max_train_examples"] = self.examples
        return Recipe.model_validate(
            {
                "model": "all-minilm",
                "method": {
                    "name": "lora",
                    "r": self.rank,
                    "lora_alpha": 2 * self.rank,
                    "target_modules": "all-linear",
                },
                "data": section,
                "train": {
                    "epochs": float(self.epochs),
                    "learning_rate": LEARNING_RATE,
                    "warmup_ratio": 0.06,
                    "precision": precision,
                    "eval_every": "never",
                    "trainer": {"train_sampling_strategy": "group_by_length"},
                },
                "output": output,
            }
        )


def _main() -> list[Piece]:
    return [Piece(f"{task}-r{rank}", "main", task, rank, EVERY_METHOD) for task in TASKS for rank in (2, 8)]


def _low_resource() -> list[Piece]:
    return [
        Piece(f"{task}-r8-{examples}", "low-resource", task, 8, OF_THE_PAPERS, seeds=5, examples=examples, epochs=10)
        for task in TASKS
        for examples in (500, 1000)
    ]


def _ablations() -> list[Piece]:
    questions = {
        # The penalty that spreads norms over components; how wide to start.
        "dynamic-dora": "lora,dynamic-dora,dynamic-dora[dem_weight=0],dynamic-dora[init_r=24]",
        # What new components get, and how often modules are scored: with rounds as near to one another as in these 160
        # steps, the default of 40 before each is every step.
        "increlora": (
            "lora,increlora,increlora[advance_learning=false],increlora[restart_warmup=false],increlora[score_window=2]"
        ),
        # The norm as a constant in backward (the paper's section 4.3), or not.
        "dora": "lora,dora,dora[detach_norm=false]",
        "dylora": "lora,dylora,dylora[update=all]",
        "mor": "lora,mor,mor[router=uniform],mor[router=balanced]",
    }
    return [
        Piece(f"ablation-{name}", "ablation", "stsb", 8, methods, examples=1000, epochs=5)
        for name, methods in questions.items()
    ]


PIECES = {piece.name: piece for piece in (*_main(), *_low_resource(), *_ablations())}
