"""Stock AdaLoRA adds its orthogonality penalty to every loss; here to those of training only."""

from __future__ import annotations

from typing import Any, cast

from peft.tuners.adalora import AdaLoraConfig, AdaLoraModel
from torch import nn


def penalise_training_only(model: nn.Module) -> None:
    """Leave the penalty out of evaluation losses: it is no error of the model's, and depends on rows that are masked.

    Otherwise no other method's loss could be compared with it, and its own would change when the file is loaded again.
    """
    for tuner in model.modules():
        if isinstance(tuner, AdaLoraModel):
            _switch(tuner, _config(tuner).orth_reg_weight)


def _switch(tuner: AdaLoraModel, weight: float) -> None:
    tuner.register_forward_pre_hook(lambda tuner, _: _set_weight(tuner, weight if tuner.training else 0.0))
    # Put back at once: this is the configuration that is saved.
    tuner.register_forward_hook(lambda tuner, *_: _set_weight(tuner, weight), always_call=True)


def _set_weight(tuner: Any, weight: float) -> None:
    _config(tuner).orth_reg_weight = weight


def _config(tuner: AdaLoraModel) -> AdaLoraConfig:
    return cast(AdaLoraConfig, tuner.peft_config[tuner.trainable_adapter_name])
