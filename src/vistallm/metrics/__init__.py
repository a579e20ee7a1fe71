"""Scores: torchmetrics classes, one per kind of task; predictions with their targets in, named scores out."""

from vistallm.metrics.region_scores import (
    BoxAccuracy,
    CumulativeIoU,
    GeneralizedBoxPrecision,
    GeneralizedIoU,
    MeanSampleIoU,
    NoTargetAccuracy,
    PrecisionAtIoU,
    TargetAccuracy,
)
from vistallm.metrics.scores import NamedScores, SampleScores
from vistallm.metrics.table import METRICS, SCORE_NAMES
from vistallm.metrics.word_scores import AnswerAccuracy

__all__ = [
    "METRICS",
    "SCORE_NAMES",
    "AnswerAccuracy",
    "BoxAccuracy",
    "CumulativeIoU",
    "GeneralizedBoxPrecision",
    "GeneralizedIoU",
    "MeanSampleIoU",
    "NamedScores",
    "NoTargetAccuracy",
    "PrecisionAtIoU",
    "SampleScores",
    "TargetAccuracy",
]
