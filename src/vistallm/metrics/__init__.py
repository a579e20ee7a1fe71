"""Scores: torchmetrics classes, one per kind of task; predictions with their targets in, named scores out."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import yaml

from vistallm.metrics import region_scores, word_scores
from vistallm.metrics.scores import GROUPS, NamedScores, SampleScores

__all__ = ["METRICS", "SCORE_NAMES", "NamedScores", "SampleScores"]

METRICS: dict[str, type[SampleScores]] = {  # by the name that the task table and benchmarks.yaml use
    "mask": region_scores.MaskScores,
    "masks": region_scores.GeneralizedMaskScores,
    "coseg": region_scores.CosegmentationScores,
    "box": region_scores.BoxScores,
    "boxes": region_scores.BoxSetScores,
    "phrase": region_scores.PhraseScores,
    "candidates": region_scores.CandidateScores,
    "vqa": word_scores.VqaAccuracy,
    "exact": word_scores.AnswerAccuracy,
    "asked": word_scores.AskedAccuracy,
    "truth": word_scores.StatementScores,
    "yesno": word_scores.YesNoScores,
    "choice": word_scores.ChoiceScores,
    "letter": word_scores.LetterAccuracy,
    "caption": word_scores.CaptionScores,
    "coco_caption": word_scores.PublicCaptionScores,
}
# scores on their own, under their usual names
CumulativeIoU = partial(region_scores.GeneralizedMaskScores, names=("ciou",))
MeanSampleIoU = partial(region_scores.GeneralizedMaskScores, names=("miou",))
GeneralizedIoU = partial(region_scores.GeneralizedMaskScores, names=("giou",))
PrecisionAtIoU = partial(region_scores.GeneralizedMaskScores, names=("pr50",))
NoTargetAccuracy = partial(region_scores.GeneralizedMaskScores, names=("n_acc",))
TargetAccuracy = partial(region_scores.GeneralizedMaskScores, names=("t_acc",))
BoxAccuracy = partial(region_scores.BoxScores, names=("p_at_50",))
GeneralizedBoxPrecision = partial(region_scores.BoxSetScores, names=("f1_precision",))
AnswerAccuracy = word_scores.AnswerAccuracy

_SINGLE: dict[str, str] = yaml.safe_load(Path(__file__).with_name("names.yaml").read_text(encoding="utf-8"))
SCORE_NAMES = _SINGLE | {  # in words
    f"{name}_{suffix}": f"{_SINGLE[name]}, {text}"
    for suffix, text in GROUPS.values()
    for metric in METRICS.values()
    for name in metric.means
}
