"""The methods, one paper a file. Importing this package registers them all."""

from ranktune.methods.dora import DoraConfig

__all__ = ["DoraConfig"]
