"""Text classification: one class per text or pair of texts; accuracy, F1 and Matthews correlation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

from ranktune.tasks.base import Data, first_output
from ranktune.tasks.text_inputs import TextInputTask

if TYPE_CHECKING:
    import datasets
    import torch
    from transformers import EvalPrediction

    from ranktune.recipe import DataRecipe


class Classification(TextInputTask):
    """Choose one of `labels`.

    F1 is of the second class when there are two classes, else the mean over classes.
    """

    name: ClassVar[str] = "classification"

    def __init__(self, recipe: DataRecipe, data: Data) -> None:
        super().__init__(recipe, data)
        self.labels = list(data.labels or [])

    def _head(self) -> dict[str, Any]:
        return {
            "id2label": dict(enumerate(self.labels)),
            "label2id": {label: number for number, label in enumerate(self.labels)},
            "problem_type": "single_label_classification",
        }

    def preprocess_logits(self, logits: Any, labels: torch.Tensor) -> torch.Tensor:  # noqa: ARG002
        """[batch, classes] -> the chosen class [batch]."""
        return first_output(logits).argmax(dim=-1)

    def compute_metrics(self, prediction: EvalPrediction, examples: datasets.Dataset) -> dict[str, float]:  # noqa: ARG002
        """Accuracy, F1 and Matthews correlation, each at most 1."""
        chosen, truth = np.asarray(prediction.predictions), np.asarray(prediction.label_ids)
        average = "binary" if len(self.labels) == 2 else "macro"
        return {
            "accuracy": float(accuracy_score(truth, chosen)),
            # zero_division: a class that is never chosen scores 0, without a warning
            "f1": float(f1_score(truth, chosen, average=average, zero_division=0)),  # pyright: ignore[reportArgumentType]
            "matthews": _matthews(truth, chosen),
        }


def _matthews(truth: np.ndarray, chosen: np.ndarray) -> float:
    # Undefined when either side has one class only; scikit-learn then warns, and gives 0 as well.
    if len(np.unique(truth)) < 2 or len(np.unique(chosen)) < 2:
        return 0.0
    return float(matthews_corrcoef(truth, chosen))
