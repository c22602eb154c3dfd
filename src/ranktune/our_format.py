"""Our own format of a saved adapter, whatever its method."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

import torch
from torch import Tensor

import ranktune.methods  # noqa: F401  (registers every method)
from ranktune.adapter_file import CONFIG_FILE, AdapterFile
from ranktune.adapter_format import AdapterFormat, Reading, Shapes
from ranktune.config import RankConfig, config_from_fields
from ranktune.errors import AdapterFileError, ConfigError
from ranktune.growing import GrowingUpdate
from ranktune.nested import NestedUpdate
from ranktune.peft_compat import PREFIX
from ranktune.update import LowRankUpdate

# Numbers that a module may have room for, beside those in the file.
_MOST_ROOM = 1 << 28


class OurFormat(AdapterFormat):
    """``RANKTUNE``: tensors and rank state as `LowRankUpdate` and its kinds have them."""

    place = re.compile(rf"(?P<module>.+)\.{PREFIX}update\.(?P<tensor>\w+)")

    def __init__(self, file: AdapterFile, names: Collection[str]) -> None:
        super().__init__(file, names)
        self._config = _config_of(file)
        self._updates: dict[str, LowRankUpdate] = {}

    @property
    def method(self) -> str:
        return self._config.method

    def check(self, name: str, shapes: Shapes) -> None:
        """Make the method's own update for the shapes in the file, without values."""
        A, B = shapes.get("lora_A", ()), shapes.get("lora_B", ())
        if len(A) != 2 or len(B) != 2:
            raise AdapterFileError(f"{self.file.tensor_file}: module {name} lacks lora_A [r, in] or lora_B [out, r].")
        config = self.file.path / CONFIG_FILE
        capacity = self.pattern_value("rank_pattern", name, self._config.capacity)
        if capacity * (A[1] + B[0]) > _MOST_ROOM:
            raise AdapterFileError(f"{config}: room for {capacity:,} components in {name} is too much.")
        try:
            # First without storage: what the configuration asks for may be anything, until it fits what is in the file.
            with torch.device("meta"):
                misfit = self._make_update(A[1], B[0], capacity, shapes).misfit(shapes)
        except (TypeError, ValueError, RuntimeError, OverflowError) as error:
            reason = str(error).splitlines()[0]
            raise AdapterFileError(f"{config}: no module can be made from it: {reason}") from error
        if misfit is not None:
            raise AdapterFileError(f"{self.file.tensor_file}: module {name} {misfit}.")
        self._updates[name] = self._make_update(A[1], B[0], capacity, shapes)

    def read(self, name: str, tensors: Mapping[str, Tensor]) -> Reading:
        """Load the update's tensors."""
        update = self._updates[name]
        update.load_state_dict(dict(tensors))
        alpha = self.pattern_value("alpha_pattern", name, self._config.lora_alpha)
        scale = self._config.scaling(alpha, self.pattern_value("rank_pattern", name, self._config.capacity))
        if isinstance(update, (GrowingUpdate, NestedUpdate)) and update.rank < 1:
            raise AdapterFileError(f"{self.file.tensor_file}: module {name} has no component in use.")
        return Reading(update.rank, scale, update)

    def _make_update(
        self, in_features: int, out_features: int, capacity: int, tensors: Collection[str]
    ) -> LowRankUpdate:
        update = self._config.make_update(in_features, out_features, capacity)
        self._config.as_saved(update, tensors)
        if self._config.use_dora:
            update.lora_magnitude_vector = torch.nn.Parameter(torch.empty(out_features))
        return update


def _config_of(file: AdapterFile) -> RankConfig:
    fields = {key: value for key, value in file.config.items() if key != "peft_type"}
    try:
        return config_from_fields(fields)
    except (ConfigError, TypeError, ValueError, AttributeError) as error:
        raise AdapterFileError(f"{file.path / CONFIG_FILE}: {error}") from error
