"""`Baseline`: a method that is not ours, in the words of a recipe's `method` section."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from torch import nn

from ranktune.policy import Layout

if TYPE_CHECKING:
    from ranktune.integrations.trainer import RankCallback


@dataclass
class Baseline(ABC):
    """What training has to know of a method. Its fields are what a recipe may set; `task_type` is set by the run."""

    method_name: ClassVar[str]
    # PEFT's own name of it, None where it is no adapter.
    peft_type: ClassVar[str | None] = None
    # Whether a checkpoint has all that it needs to go on.
    resumable: ClassVar[bool] = True

    task_type: str | None = None

    @abstractmethod
    def put_on(self, base: nn.Module) -> Any:
        """The model to train, made of the base model; on the meta device too.

        Raises:
            ValueError: PEFT finds nothing to adapt, or something it cannot adapt.
        """

    @abstractmethod
    def callback(self) -> RankCallback:
        """The Trainer callback that moves its ranks and keeps their history, or only says that they are fixed."""

    def policy(self, layout: Layout, total_steps: int) -> None:  # noqa: ARG002
        """Nothing: its ranks are fixed, or moved by its own callback.

        Raises:
            ConfigError: its schedule does not fit into so many optimizer steps.
        """
        return


BASELINES: dict[str, type[Baseline]] = {}
"""Method name, as in a recipe, to the class of its fields."""

Kind = TypeVar("Kind", bound=Baseline)


def register_baseline(kind: type[Kind]) -> type[Kind]:
    """Class decorator: make a baseline known by its ``method_name``."""
    BASELINES[kind.method_name] = kind
    return kind
