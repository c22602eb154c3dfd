"""DoRA, Weight-Decomposed Low-Rank Adaptation (Liu et al., ICML 2024, arXiv 2402.09353).

Not to be confused with Dynamic Low-Rank Adaptation (Mao et al. 2024), also called DoRA by its authors: here that one is
``dynamic-dora``.

The weight is split into a magnitude per output row and a direction, and both are trained (equation 5):

    W' = diag(m / ||V||_row) V,    V = W + s B A,    m [out] initialised to ||W||_row

so W' = W at the start, and the rows of W' have norm |m| whatever A and B become. The paper writes W as [in, out] and
takes norms per column; on PyTorch's [out, in] weights, and in the authors' code, that is one norm per output row.

Where each part lives:
    section 3, equation 5, the forward pass     `ranktune.lowrank.low_rank_linear` (``offset`` is m / ||V|| - 1)
    the row norms, factored, and their floor     `ranktune.magnitude`
    section 4.3, the norm held constant          ``detach_norm`` (equation 11 prints m C, C = ||V'||; m / C is meant)

What differs from the paper's code: the norm is never formed from a dense V; m, norms and gains are at least float32;
a zero row of W has its norm floored, where 0 / 0 would be NaN, and then behaves like plain LoRA; with several adapters
on a layer every norm refers to the original W.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from ranktune.config import RankConfig, register_method
from ranktune.errors import ConfigError


@register_method
@dataclass
class DoraConfig(RankConfig):
    """Weight-decomposed low-rank adaptation of fixed rank.

    The fields ``detach_norm`` and ``dora_dropout`` of `RankConfig` choose the gradient and the dropout semantics; the
    defaults are the paper's. ``RankConfig(use_dora=True)`` is the same adapter, and every mergeable method takes
    ``use_dora=True``.
    """

    method_name: ClassVar[str] = "dora"

    use_dora: bool = field(default=True, metadata={"help": "Always true for this method."})

    def _check(self) -> None:
        super()._check()
        if not self.use_dora:
            raise ConfigError("use_dora=False contradicts DoraConfig: for plain LoRA use RankConfig.")
