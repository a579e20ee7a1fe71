"""Scores: pure functions (`functional`, `answers`) and thin torchmetrics classes on them."""

from vistallm.metrics.box_metrics import AnswerAccuracy, BoxAccuracy, GeneralizedBoxPrecision
from vistallm.metrics.mask_metrics import (
    CumulativeIoU,
    GeneralizedIoU,
    MeanSampleIoU,
    NoTargetAccuracy,
    PrecisionAtIoU,
    TargetAccuracy,
)

__all__ = [
    "AnswerAccuracy",
    "BoxAccuracy",
    "CumulativeIoU",
    "GeneralizedBoxPrecision",
    "GeneralizedIoU",
    "MeanSampleIoU",
    "NoTargetAccuracy",
    "PrecisionAtIoU",
    "TargetAccuracy",
]
