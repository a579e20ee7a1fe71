"""torchmetrics classes for boxes and for answers in words; sums and conventions as in `mask_metrics.py`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torchmetrics import Metric

from vistallm.metrics import functional
from vistallm.metrics.mask_metrics import RatioState


class BoxAccuracy(RatioState, Metric):
    """P@0.5 of REC: share of the samples whose box has an IoU above `threshold` with the target's.

    >>> metric = BoxAccuracy()
    >>> metric.update([[0, 0, 4, 4], [0, 0, 4, 2], None], [[0, 0, 4, 5], [0, 0, 4, 4], [0, 0, 1, 1]])
    >>> round(metric.compute().item(), 4)  # IoU 0.8 is a hit, exactly 0.5 is not
    0.3333
    """

    def __init__(self, threshold: float = 0.5) -> None:
        super().__init__()
        self.threshold = threshold

    def update(self, predicted: Sequence[Sequence[float] | None], target: Sequence[Sequence[float]]) -> None:
        """Add N boxes (x0, y0, x1, y1), pixels of the original image, with their targets."""
        hits = [functional.box_hit(*pair, self.threshold) for pair in zip(predicted, target, strict=True)]
        self.add((sum(hits), len(hits)))


class GeneralizedBoxPrecision(RatioState, Metric):
    """Pr(F1=1, IoU>=0.5) of GREC: share of the samples whose set of boxes is exactly right.

    >>> metric = GeneralizedBoxPrecision()
    >>> two = [[0, 0, 4, 4], [6, 6, 8, 8]]
    >>> metric.update([two[::-1], two[:1], [], None], [two, two, [], []])
    >>> metric.compute().item()
    0.5
    """

    def __init__(self, threshold: float = 0.5, generalized: bool = False) -> None:
        super().__init__()
        self.threshold = threshold
        self.generalized = generalized

    def update(self, predicted: Sequence[Sequence | None], target: Sequence[Sequence]) -> None:
        """Add N sets of boxes, each (n, 4) with n >= 0, with their N sets of targets."""
        pairs = zip(predicted, target, strict=True)
        right = [functional.matched_f1(*pair, self.threshold, self.generalized) == 1 for pair in pairs]
        self.add((sum(right), len(right)))


class AnswerAccuracy(RatioState, Metric):
    """Mean of per-sample scores in [0, 1]: exact match, multiple choice, or VQAv2's soft accuracy.

    >>> metric = AnswerAccuracy()
    >>> metric.update([1.0, 0.0, 0.9, 0.1])
    >>> metric.compute().item()
    0.5
    """

    sum_dtype = torch.float64

    def update(self, scores: Sequence[float]) -> None:
        """Add N scores."""
        self.add((functional.exact_sum(scores), len(scores)))
