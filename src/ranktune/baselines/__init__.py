"""What ranktune is compared with, trained by the same code: stock LoRA, DoRA and AdaLoRA, and the whole model."""

from ranktune.baselines.base import BASELINES, Baseline
from ranktune.baselines.full import Full
from ranktune.baselines.stock import PeftAdaLora, PeftDora, PeftLora

__all__ = ["BASELINES", "Baseline", "Full", "PeftAdaLora", "PeftDora", "PeftLora"]
