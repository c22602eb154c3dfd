"""The types that weights are written in, by name."""

from __future__ import annotations

import torch

from ranktune.errors import ConfigError, did_you_mean

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def storage_dtype(name: str) -> torch.dtype:
    """The type of that name.

    Raises:
        ConfigError: there is none.
    """
    if name not in DTYPES:
        raise ConfigError(f"dtype={name!r} must be one of {', '.join(DTYPES)}.{did_you_mean(str(name), DTYPES)}")
    return DTYPES[name]


def name_of(dtype: torch.dtype) -> str:
    """``bfloat16``, without the library's name in front."""
    return str(dtype).removeprefix("torch.")
