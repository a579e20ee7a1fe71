"""All score classes by the name that the task table and benchmarks.yaml use, and the names of their scores in words."""

from __future__ import annotations

from vistallm.metrics import region_scores as regions
from vistallm.metrics import word_scores as words
from vistallm.metrics.scores import GROUPS, SampleScores

METRICS: dict[str, type[SampleScores]] = {
    "mask": regions.MaskScores,
    "masks": regions.GeneralizedMaskScores,
    "coseg": regions.CosegmentationScores,
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
    "caption": words.CaptionScores,
    "coco_caption": words.PublicCaptionScores,
}
_SINGLE = {
    "miou": "Mean IoU (mIoU)",
    "ciou": "Cumulative IoU (cIoU)",
    "giou": "gRefCOCO gIoU",
    **{name: f"Precision at IoU {int(name[2:]) / 100}" for name in regions.PRECISIONS},
    "n_acc": "No-target accuracy (N-acc)",
    "t_acc": "Target accuracy (T-acc)",
    "av_p": "Pixel precision (Av.P)",
    "av_j": "Foreground IoU (Av.J)",
    "images_right": "Right set of images",
    "p_at_50": "Precision at box IoU 0.5",
    "mean_box_iou": "Mean box IoU",
    "f1_precision": "All boxes right (F1 = 1, IoU 0.5)",
    "f1_precision_giou": "All boxes right (F1 = 1, generalised IoU 0.5)",
    "recall_any": "Recall@1 of phrases, any of its boxes",
    "recall_merged": "Recall@1 of phrases, its boxes merged",
    "accuracy": "Accuracy",
    "accuracy_general": "Accuracy, any object asked for",
    "accuracy_super": "Accuracy, super class asked for",
    "accuracy_object": "Accuracy, object asked for",
    "precision": "Precision",
    "recall": "Recall",
    "f1": "F1",
    "yes_share": "Share of yes",
    "consistency": "Consistency",
    "q_a": "Q to A",
    "qa_r": "QA to R",
    "q_ar": "Q to AR",
    "cider": "CIDEr",
    "cider_ptb": "CIDEr, Java tokeniser",
    "spice": "SPICE",
    "exact": "Exact match",
}
SCORE_NAMES = _SINGLE | {
    f"{name}_{suffix}": f"{_SINGLE[name]}, {text}"
    for suffix, text in GROUPS.values()
    for metric in METRICS.values()
    for name in metric.means
}
