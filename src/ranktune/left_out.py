"""What `target_modules="all-linear"` does not reach: weights that are no linear layer's, and the output head."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

logger = logging.getLogger("ranktune")

_OTHER_KINDS = (nn.Linear, Conv1D, nn.Embedding, nn.EmbeddingBag, nn.modules.conv._ConvNd)


@dataclass(frozen=True)
class LeftOut:
    """Weights that no adapter is put on.

    `name`: with `*` for the numbers of layers. `count`: how many there are of that name, `shape` each. `parameters`:
    in all of them, those of its own only. `reason`: in words. `head`: whether it is the output head.
    """

    name: str
    count: int
    shape: tuple[int, ...]
    parameters: int
    reason: str
    head: bool = False

    def __str__(self) -> str:
        size = " x ".join(map(str, self.shape))
        number = f"{self.count} of " if self.count > 1 else ""
        return f"{self.name} ({number}{size}: {self.reason})"


class LeftOutWarning(UserWarning):
    """Weights that `all-linear` suggests but does not reach."""


def is_all_linear(config: object) -> bool:
    """Whether the configuration asks for every linear layer in PEFT's own word, in any case."""
    targets = getattr(config, "target_modules", None)
    return isinstance(targets, str) and targets.lower() == "all-linear"


def left_out(model: nn.Module) -> list[LeftOut]:
    """What `all-linear` leaves out of a model: its output head, and weights that multiply but are no linear layer's.

    Mixture-of-experts models keep all experts in one parameter of three dimensions [experts, out, in], and their
    routers in a module of their own. Embeddings, convolutions and normalisation are no linear layers to begin with.
    """
    found: dict[tuple[str, tuple[int, ...], str], list[int]] = {}
    for name, parameter, reason in _unreached(model):
        key = re.sub(r"(?<=\.)\d+(?=\.)", "*", name), tuple(parameter.shape), reason
        found.setdefault(key, []).append(parameter.numel())
    head = _head(model)
    return [
        *([] if head is None else [head]),
        *(LeftOut(name, len(sizes), shape, sum(sizes), reason) for (name, shape, reason), sizes in found.items()),
    ]


def explain(unreached: list[LeftOut], total: int) -> str:
    """One sentence about weights that `all-linear` does not reach; `total`: the model's parameters."""
    own = sum(item.parameters for item in unreached)
    share = f", together {own / total:.0%} of the model's parameters" if own else ""
    return f"target_modules 'all-linear' leaves out {'; '.join(map(str, unreached))}{share}."


def warn_of_left_out(model: nn.Module) -> None:
    """Warn of weights that look adapted under `all-linear` and are not; an output head alone is only logged."""
    items = left_out(model)
    if not items:
        return
    message = explain(items, sum(parameter.numel() for parameter in model.parameters()))
    if all(item.head for item in items):
        logger.info(message)
    else:
        warnings.warn(message, LeftOutWarning, stacklevel=2)


def _unreached(model: nn.Module) -> Iterator[tuple[str, nn.Parameter, str]]:
    for module_name, module in model.named_modules():
        if isinstance(module, _OTHER_KINDS):
            continue
        for name, parameter in module.named_parameters(prefix=module_name, recurse=False):
            if parameter.ndim == 3 and parameter.shape[0] > 1:
                yield name, parameter, "all experts in one parameter, no linear layer"
            elif parameter.ndim == 2 and name.endswith("weight"):
                yield name, parameter, f"{type(module).__name__} is no linear layer"


def _head(model: nn.Module) -> LeftOut | None:
    if not isinstance(model, PreTrainedModel):
        return None
    head = cast("nn.Module | None", model.get_output_embeddings())
    if not isinstance(head, nn.Linear):
        return None
    name = next(name for name, module in model.named_modules() if module is head)
    tied = head.weight is getattr(model.get_input_embeddings(), "weight", None)
    reason = "the output head, whose weight is the input embedding's" if tied else "the output head"
    return LeftOut(name, 1, tuple(head.weight.shape), 0 if tied else head.weight.numel(), reason, head=True)
