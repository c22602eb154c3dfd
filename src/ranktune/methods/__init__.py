"""The methods, one paper a file. Importing this package registers them all."""

from ranktune.methods.dora import DoraConfig
from ranktune.methods.dylora import DyLoraConfig
from ranktune.methods.dynamic_dora import DynamicDoraConfig
from ranktune.methods.increlora import IncreLoraConfig
from ranktune.methods.mor import MorConfig

__all__ = ["DoraConfig", "DyLoraConfig", "DynamicDoraConfig", "IncreLoraConfig", "MorConfig"]
