"""What is set in every process of the command line before torch and its company are imported."""

from __future__ import annotations

import logging
import os

# They report, on import and in every process, what they could not load and do not need.
_CHATTY = ("torchao", "bitsandbytes", "torch.utils._pytree")


def share_the_cores() -> None:
    """Let torch's idle threads sleep instead of spinning; to be called before torch is imported.

    Spinning wins a quarter on an otherwise idle machine. Beside one other busy process it makes a training step of a
    small model 3 to 8 times slower, since each waiting thread occupies the core that the other one waits for.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def silence_chatty_libraries() -> None:
    """Let the libraries that talk on import report errors only."""
    for library in _CHATTY:
        logging.getLogger(library).setLevel(logging.ERROR)
