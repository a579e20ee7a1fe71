"""torchmetrics classes for masks, boxes and presence: samples in, one ratio out, equal for any number of processes.

Each class keeps two sums (int64 counts, float64 sums) that processes add; the definitions are in `functional.py`.
A predicted item that is None is an unreadable answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torchmetrics import Metric

from vistallm.metrics import functional
from vistallm.metrics.functional import MaskCounts, Sums
from vistallm.regions.masks import polygons_to_rle
from vistallm.schema import Rle

MaskLike = Rle | Sequence[np.ndarray] | None
"""A COCO RLE of the target's size, polygons (each (n, 2), original pixels; [] = no mask), or None (unreadable)."""


class RatioState:
    """Mixin of the metrics here: two sums that processes add, and their ratio as the score."""

    full_state_update: bool | None = False
    higher_is_better: bool | None = True
    sum_dtype = torch.int64
    numerator: torch.Tensor
    denominator: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        metric: Any = self
        metric.add_state("numerator", torch.zeros((), dtype=self.sum_dtype), dist_reduce_fx="sum")
        metric.add_state("denominator", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def add(self, sums: Sums) -> None:
        """Add the sums of a batch."""
        self.numerator += sums[0]
        self.denominator += sums[1]

    def compute(self) -> torch.Tensor:
        """Return the score, () float64 in [0, 1], NaN where no sample counts."""
        return self.numerator.double() / self.denominator.double()


def counts_of(predicted: Sequence[MaskLike], target: Sequence[Rle]) -> MaskCounts:
    """Count N predicted masks, given as RLE or polygons, against N targets (COCO RLE)."""
    drawn = [
        mask if mask is None or isinstance(mask, dict) else polygons_to_rle(list(mask), *truth["size"])
        for mask, truth in zip(predicted, target, strict=True)
    ]
    return functional.mask_counts(drawn, target)


class CumulativeIoU(RatioState, Metric):
    """cIoU: sum of intersections over sum of unions; large objects weigh more.

    >>> square, half = ({"size": [2, 2], "counts": counts} for counts in ("04", "022"))
    >>> metric = CumulativeIoU()
    >>> metric.update([half, None], [square, square])  # 2 of 4 pixels, then an unreadable answer: 0 of 4
    >>> metric.compute().item()
    0.25
    """

    def update(self, predicted: Sequence[MaskLike], target: Sequence[Rle]) -> None:
        """Add N predicted masks with their N targets."""
        self.add(functional.cumulative_iou(counts_of(predicted, target)))


class MeanSampleIoU(RatioState, Metric):
    """mIoU: mean over samples of the sample's own IoU; every sample weighs the same.

    >>> square, half = ({"size": [2, 2], "counts": counts} for counts in ("04", "022"))
    >>> metric = MeanSampleIoU()
    >>> metric.update([half, square], [square, square])
    >>> metric.compute().item()
    0.75
    """

    sum_dtype = torch.float64

    def update(self, predicted: Sequence[MaskLike], target: Sequence[Rle]) -> None:
        """Add N predicted masks with their N targets."""
        self.add(functional.mean_sample_iou(counts_of(predicted, target)))


class GeneralizedIoU(MeanSampleIoU):
    """gRefCOCO's gIoU: `MeanSampleIoU` of samples some of which have no target; a right "none" counts 1, a wrong one 0.

    >>> square, empty = ({"size": [2, 2], "counts": counts} for counts in ("04", "4"))
    >>> metric = GeneralizedIoU()
    >>> metric.update([[], square, []], [empty, empty, square])
    >>> round(metric.compute().item(), 4)
    0.3333
    """


class PrecisionAtIoU(RatioState, Metric):
    """Pr@: share of the samples with a target whose IoU is at least `threshold`.

    >>> square, half = ({"size": [2, 2], "counts": counts} for counts in ("04", "022"))
    >>> metric = PrecisionAtIoU(0.7)
    >>> metric.update([half, square], [square, square])
    >>> metric.compute().item()
    0.5
    """

    def __init__(self, threshold: float = 0.5) -> None:
        super().__init__()
        self.threshold = threshold

    def update(self, predicted: Sequence[MaskLike], target: Sequence[Rle]) -> None:
        """Add N predicted masks with their N targets."""
        self.add(functional.precision_at_iou(counts_of(predicted, target), self.threshold))


def _presence(predicted: Sequence[bool | None], target: Sequence[bool]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return (
        np.array([bool(empty) for empty in predicted], bool),
        np.array(target, bool),
        np.array([empty is not None for empty in predicted], bool),
    )


class NoTargetAccuracy(RatioState, Metric):
    """N-acc: share of the samples without a target that are answered "none".

    >>> metric = NoTargetAccuracy()
    >>> metric.update([True, False, None, True], [True, True, True, False])
    >>> round(metric.compute().item(), 4)
    0.3333
    """

    def update(self, predicted_empty: Sequence[bool | None], target_empty: Sequence[bool]) -> None:
        """Add N answers: whether each names no region (None: unreadable), and whether its target is empty."""
        self.add(functional.no_target_accuracy(*_presence(predicted_empty, target_empty)))


class TargetAccuracy(RatioState, Metric):
    """T-acc: share of the samples with a target that are answered with some region, right or not.

    >>> metric = TargetAccuracy()
    >>> metric.update([False, True, None, True], [False, False, False, True])
    >>> round(metric.compute().item(), 4)
    0.3333
    """

    def update(self, predicted_empty: Sequence[bool | None], target_empty: Sequence[bool]) -> None:
        """Add N answers: whether each names no region (None: unreadable), and whether its target is empty."""
        self.add(functional.target_accuracy(*_presence(predicted_empty, target_empty)))
