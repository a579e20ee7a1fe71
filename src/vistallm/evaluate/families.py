"""All score families by name, and the names of their scores in words; definitions are in `vistallm.metrics`."""

from __future__ import annotations

from vistallm.evaluate.box_scores import BOX_FAMILIES
from vistallm.evaluate.family import Family
from vistallm.evaluate.mask_scores import MASK_FAMILIES, PRECISIONS
from vistallm.evaluate.word_scores import WORD_FAMILIES

FAMILIES: dict[str, Family] = {**MASK_FAMILIES, **BOX_FAMILIES, **WORD_FAMILIES}
_SINGLE = {
    "miou": "Mean IoU (mIoU)",
    "ciou": "Cumulative IoU (cIoU)",
    "giou": "gRefCOCO gIoU",
    **{name: f"Precision at IoU {threshold}" for name, threshold in PRECISIONS.items()},
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
# meta key that samples can be grouped by -> suffix of the averaged scores' names, and their words
GROUPS = {"ref_id": ("instance", "mean per instance"), "class": ("class", "mean per class")}
SCORE_NAMES = _SINGLE | {
    f"{name}_{suffix}": f"{_SINGLE[name]}, {words}"
    for suffix, words in GROUPS.values()
    for family in FAMILIES.values()
    for name in family.means
}
