"""Text regression: one number per text or pair of texts; Pearson and Spearman correlation, squared error."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import mean_squared_error

from ranktune.tasks.base import first_output
from ranktune.tasks.text_inputs import TextInputTask

if TYPE_CHECKING:
    import datasets
    import torch
    from transformers import EvalPrediction


class Regression(TextInputTask):
    """Predict one number with a linear head and squared loss."""

    name: ClassVar[str] = "regression"

    def _head(self) -> dict[str, Any]:
        return {"num_labels": 1, "problem_type": "regression"}

    def preprocess_logits(self, logits: Any, labels: torch.Tensor) -> torch.Tensor:  # noqa: ARG002
        """[batch, 1] -> [batch], float32."""
        return first_output(logits).squeeze(-1).float()

    def compute_metrics(self, prediction: EvalPrediction, examples: datasets.Dataset) -> dict[str, float]:  # noqa: ARG002
        """Pearson and Spearman correlation, and the mean squared error in squared label units."""
        predicted = np.asarray(prediction.predictions, dtype=np.float64)
        truth = np.asarray(prediction.label_ids, dtype=np.float64)
        return {
            "pearson": _correlation(pearsonr, truth, predicted),
            "spearman": _correlation(spearmanr, truth, predicted),
            "mse": float(mean_squared_error(truth, predicted)) if np.isfinite(predicted).all() else float("nan"),
        }


def _correlation(measure: Any, truth: np.ndarray, predicted: np.ndarray) -> float:
    if not np.isfinite(predicted).all():
        return float("nan")
    # A constant explains nothing: 0, where scipy would warn and give NaN.
    if np.ptp(truth) == 0 or np.ptp(predicted) == 0:
        return 0.0
    return float(measure(truth, predicted).statistic)
