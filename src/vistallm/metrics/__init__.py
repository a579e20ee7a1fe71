"""Scores: torchmetrics classes, one per kind of task; predictions with their targets in, named scores out."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import yaml

from vistallm.metrics import captions, detection, regions, video, words
from vistallm.metrics.scores import GROUPS, NamedScores, SampleScores

__all__ = ["METRICS", "SCORE_NAMES", "NamedScores", "SampleScores"]

METRICS: dict[str, type[SampleScores]] = {  # by the name that the task table and benchmarks.yaml use
    "mask": regions.MaskScores,
    "masks": regions.GeneralizedMaskScores,
    "prompted": regions.PromptedScores,
    "context": regions.ContextScores,
    "semseg": detection.SemanticScores,
    "detection": detection.DetectionScores,
    "pose": detection.PoseScores,
    "count": detection.CountScores,
    "coseg": regions.CosegmentationScores,
    "video": video.TrackScores,
    "video_inner": video.InnerTrackScores,
    "tube": video.TubeScores,
    "box": regions.BoxScores,
    "boxes": regions.BoxSetScores,
    "phrase": regions.PhraseScores,
    "candidates": regions.CandidateScores,
    "vqa": words.VqaAccuracy,
    "exact": words.AnswerAccuracy,
    "asked": words.AskedAccuracy,
    "truth": words.StatementScores,
    "yesno": words.YesNoScores,
    "choice": words.ChoiceScores,
    "letter": words.LetterAccuracy,
    "caption": captions.CaptionScores,
    "coco_caption": captions.PublicCaptionScores,
}
# scores on their own, under their usual names
CumulativeIoU = partial(regions.GeneralizedMaskScores, names=("ciou",))
MeanSampleIoU = partial(regions.GeneralizedMaskScores, names=("miou",))
GeneralizedIoU = partial(regions.GeneralizedMaskScores, names=("giou",))
PrecisionAtIoU = partial(regions.GeneralizedMaskScores, names=("pr50",))
NoTargetAccuracy = partial(regions.GeneralizedMaskScores, names=("n_acc",))
TargetAccuracy = partial(regions.GeneralizedMaskScores, names=("t_acc",))
BoxAccuracy = partial(regions.BoxScores, names=("p_at_50",))
GeneralizedBoxPrecision = partial(regions.BoxSetScores, names=("f1_precision",))
RegionSimilarity = partial(video.TrackScores, names=("j",))
ContourAccuracy = partial(video.TrackScores, names=("f",))
TrackAccuracy = partial(video.TrackScores, names=("j_and_f",))
MeanTubeIoU = partial(video.TubeScores, names=("m_viou",))
MeanTemporalIoU = partial(video.TubeScores, names=("m_tiou",))
AnswerAccuracy = words.AnswerAccuracy

_SINGLE: dict[str, str] = yaml.safe_load(Path(__file__).with_name("names.yaml").read_text(encoding="utf-8"))
SCORE_NAMES = _SINGLE | {  # in words
    f"{name}_{suffix}": f"{_SINGLE[name]}, {text}"
    for suffix, text in GROUPS.values()
    for metric in METRICS.values()
    for name in metric.means
}
