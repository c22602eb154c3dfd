"""`AdapterFormat`: what every format of a saved adapter answers about its modules, and entries of its patterns."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from ranktune.adapter_file import CONFIG_FILE, AdapterFile
from ranktune.errors import AdapterFileError
from ranktune.peft_compat import pattern_value
from ranktune.update import LowRankUpdate

# A pattern's regular expression could be made to take for ever: characters of the longest name, to the power of its
# repetitions, times the modules it is matched against.
_MOST_STEPS = 10**8

# A tensor's own name to its shape.
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Reading:
    """What a format makes of one module's tensors.

    Attributes:
        rank: components in use. scale: the factor on ``B A``, gates apart.
        update: of ours, the update itself with its tensors loaded.
    """

    rank: int
    scale: float
    update: LowRankUpdate | None = None


class AdapterFormat(ABC):
    """One format's reading of a folder.

    Args:
        file: the folder, checked.
        names: of the adapted modules.

    Attributes:
        place: where the format keeps a module's tensors: its name, and what follows it.
    """

    place: ClassVar[re.Pattern[str]]

    def __init__(self, file: AdapterFile, names: Collection[str]) -> None:
        self.file = file
        self.names = names

    @property
    @abstractmethod
    def method(self) -> str:
        """The name of ours, or ``lora``, ``dora``, ``adalora`` of stock PEFT."""

    @abstractmethod
    def check(self, name: str, shapes: Shapes) -> None:
        """Refuse a module whose tensors do not fit together, before any is read.

        Raises:
            AdapterFileError: they do not.
        """

    @abstractmethod
    def read(self, name: str, tensors: Mapping[str, Tensor]) -> Reading:
        """Understand a module that `check` has passed.

        Raises:
            AdapterFileError: the values mean nothing.
        """

    def pattern_value(self, pattern: str, name: str, default: Any) -> Any:
        """PEFT's rule for ``rank_pattern`` and ``alpha_pattern``, unless a key would take for ever to match."""
        values = self.file.config.get(pattern) or {}
        config = self.file.path / CONFIG_FILE
        longest = max(map(len, self.names))
        for key in values:
            repetitions = len(re.findall(r"[*+{]", key))
            steps = longest ** (repetitions + 1) * len(self.names)
            if len(key) > 4 * longest + 64 or (repetitions and steps > _MOST_STEPS):
                raise AdapterFileError(f"{config}: {pattern} has a key too costly to match: {key[:80]!r}.")
        try:
            return pattern_value(values, name, default)
        except (re.error, RecursionError, OverflowError) as error:
            raise AdapterFileError(f"{config}: a key of {pattern} is no pattern: {error}.") from error
