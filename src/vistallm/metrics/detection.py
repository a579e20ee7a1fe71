"""Scores of answers that name classes: detection and keypoints (COCO AP), semantic masks, counts.

A region's class is its `label`, compared in lower case. AP is COCOeval's, per class and then the mean over the classes
that have a target: what an answer finds of a class that is absent from the image counts against that class; a class
without any target in the samples counts nowhere. A sample is one or more images of its own: regions of another question
about the same picture are never mixed with it.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from vistallm.metrics.regions import answered, image_masks, mask_counts, mask_of, target_regions
from vistallm.metrics.scores import NamedScores, Row, SampleScores, Sums, mean
from vistallm.regions.masks import box_of, rle_area, rle_box
from vistallm.schema import Prediction, Region

IouType = Literal["bbox", "segm", "keypoints"]
KEYPOINT_SIGMA = 0.05  # of every keypoint, except those of COCO's 17 of a person, which have their own


def label_of(region: Region) -> str:
    """Return a region's class in lower case, "" without one."""
    return " ".join((region.label or "").lower().split())


def coco_objects(regions: Sequence[Region], prediction: Prediction) -> list[list[dict[str, Any]]]:
    """Return, for each image, its regions as COCO annotations, JSON-ready; "category" is their class.

    Boxes become x, y, width, height. The area is the mask's, else the box's.
    """
    found: list[list[dict[str, Any]]] = [[] for _ in prediction.images]
    for one in regions:
        shape: dict[str, Any] = {}
        if one.kind == "mask" or one.rle is not None:
            shape["segmentation"] = mask_of(one, prediction.images[one.image])
        if one.keypoints is not None:
            points = np.array(one.keypoints, float).reshape(-1, 3)
            shape |= {"keypoints": points.ravel().tolist(), "num_keypoints": int((points[:, 2] > 0).sum())}
        x0, y0, x1, y1 = one.box or (rle_box(shape["segmentation"]) if "segmentation" in shape else box_of(one))
        area = rle_area(shape["segmentation"]) if "segmentation" in shape else (x1 - x0) * (y1 - y0)
        confidence = 1.0 if one.confidence is None else one.confidence
        facts = {"category": label_of(one), "bbox": [x0, y0, x1 - x0, y1 - y0], "area": area, "score": confidence}
        found[one.image].append(facts | shape)
    return found


def coco_eval(images: Sequence[dict[str, Any]], iou_type: IouType) -> COCOeval:
    """Return COCOeval after `evaluate`, for objects of any size; the first 100 of a class and image count (20 poses).

    Args:
        images: each {"size": [height, width], "target": COCO annotations, "answer": the same with scores}.
        iou_type: what overlap is measured on; objects with fewer keypoints than others are padded with unlabelled ones.
    """
    names = sorted({one["category"] for image in images for side in ("target", "answer") for one in image[side]})
    numbers = {name: number for number, name in enumerate(names, 1)}
    every = [one for image in images for one in (*image["target"], *image["answer"])]
    most = max((len(one.get("keypoints", ())) for one in every), default=0)
    sides = []
    for side in ("target", "answer"):
        coco, annotations = COCO(), list[dict[str, Any]]()
        for number, image in enumerate(images, 1):
            for one in image[side]:
                ids = {"id": len(annotations) + 1, "image_id": number, "category_id": numbers[one["category"]]}
                points = one.get("keypoints", [])
                annotations.append(one | ids | {"iscrowd": 0, "keypoints": points + [0] * (most - len(points))})
        sizes = [(number, *image["size"]) for number, image in enumerate(images, 1)]
        coco.dataset = {
            "images": [{"id": number, "height": height, "width": width} for number, height, width in sizes],
            "categories": [{"id": number} for number in numbers.values()],
            "annotations": annotations,
        }
        coco.createIndex()
        sides.append(coco)
    evaluation = COCOeval(*sides, iou_type)
    evaluation.params.areaRng, evaluation.params.areaRngLbl = [[0, 1e10]], ["all"]
    if iou_type == "keypoints" and most // 3 != 17:
        evaluation.params.kpt_oks_sigmas = np.full(most // 3, KEYPOINT_SIGMA)
    evaluation.evaluate()
    return evaluation


def average_precision(images: Sequence[dict[str, Any]], iou_type: IouType) -> list[float | None]:
    """Return COCO's AP (mean over IoU .5:.95), AP50 and AP75 in [0, 1] of images as `coco_eval` takes them.

    All None where no image has a target.
    """
    with contextlib.redirect_stdout(io.StringIO()):  # COCOeval prints its progress
        evaluation = coco_eval(images, iou_type)
        evaluation.accumulate()
    precision = evaluation.eval["precision"]  # thresholds, recalls, classes, sizes, limits; -1: no target
    parts = (part[part > -1] for part in (precision[..., -1], precision[0, ..., -1], precision[5, ..., -1]))
    return [float(part.mean()) if part.size else None for part in parts]


def matched_objects(images: Sequence[dict[str, Any]], iou_type: IouType) -> float:
    """Return F1 in [0, 1] of the objects of one sample, matched by COCOeval at IoU (or OKS) 0.5 within their class.

    Targets without a labelled keypoint count nowhere; 1 where there is neither target nor answer.
    """
    with contextlib.redirect_stdout(io.StringIO()):
        found = [one for one in coco_eval(images, iou_type).evalImgs if one is not None]
    right = sum(np.count_nonzero((one["dtMatches"][0] > 0) & ~one["dtIgnore"][0].astype(bool)) for one in found)
    targets = sum(np.count_nonzero(~np.asarray(one["gtIgnore"], bool)) for one in found)
    answers = sum(np.count_nonzero(~one["dtIgnore"][0].astype(bool)) for one in found)
    return 2 * right / (targets + answers) if targets + answers else 1.0


class DetectionScores(SampleScores):
    """Objects of named classes: COCO AP, AP50 and AP75 of boxes, and of masks where the targets are masks.

    `f1_precision` is the share of samples with exactly the right objects: F1 = 1 at IoU >= 0.5 within each class.
    """

    names: tuple[str, ...] = ("ap", "ap50", "ap75", "mask_ap", "mask_ap50", "mask_ap75", "f1_precision")
    types: tuple[IouType, ...] = ("bbox", "segm")

    def _measure(self, prediction: Prediction) -> Sums:
        target, said = target_regions(prediction, optional=True), answered(prediction)
        targets, answers, sures = (coco_objects(one, prediction) for one in (target, said, prediction.sure_regions))
        sizes = [[int(image["height"]), int(image["width"])] for image in prediction.images]
        images, certain = (
            [
                dict(zip(("size", "target", "answer"), one, strict=True))
                for one in zip(sizes, targets, side, strict=True)
            ]
            for side in (answers, sures)
        )
        boxes = any(region.kind == "box" for region in (*target, *said))
        readable = prediction.parsed is not None
        f1 = matched_objects(certain, "bbox" if boxes else self.types[-1]) if readable else 0.0
        return {"score": (f1, 1), self.names[-1]: (f1 == 1, 1), "boxes": boxes, "images": images}

    def _ratios(self, rows: Sequence[Row]) -> NamedScores:
        # COCOeval ranks equal confidences by their order
        images = [image for row in sorted(rows, key=lambda row: row["id"]) for image in row["images"]]
        exact = self.names[-1]
        scores: NamedScores = {exact: mean(row[exact][0] for row in rows)}
        for number, iou_type in enumerate(self.types):
            absent = iou_type == "segm" and any(row["boxes"] for row in rows)
            values = [None] * 3 if absent else average_precision(images, iou_type)
            scores |= zip(self.names[3 * number :], values, strict=False)
        return {name: scores[name] for name in self.names}


class PoseScores(DetectionScores):
    """Keypoints of objects of named classes: COCO's AP over object keypoint similarity (OKS), AP50 and AP75.

    COCO's 17 keypoints of a person have COCO's tolerances, any other number of keypoints 0.05 each. OKS is relative to
    the area of the object's mask, or of its box where the target has no mask.
    """

    names = ("oks_ap", "oks_ap50", "oks_ap75", "f1_oks")
    types = ("keypoints",)


class SemanticScores(SampleScores):
    """Masks of classes: mean IoU over classes, of intersections and unions summed over all samples, and cIoU.

    A class of the answers that no target has counts with an IoU of 0. Pixel accuracy is not given: masks of classes may
    overlap and leave pixels without a class, so a pixel has no single label.
    """

    names = ("semantic_miou", "ciou")

    def _measure(self, prediction: Prediction) -> Sums:
        sides = target_regions(prediction, optional=True), answered(prediction)
        classes = {}
        for name in sorted({label_of(region) for regions in sides for region in regions}):
            own = (image_masks([one for one in regions if label_of(one) == name], prediction) for regions in sides)
            pixels = np.array([mask_counts(answer, target) for target, answer in zip(*own, strict=True)])
            classes[name] = pixels.sum(0)[:2].tolist()
        ious = [intersection / union for intersection, union in classes.values() if union]
        score = (sum(ious), len(ious)) if ious else (prediction.parsed is not None, 1)
        total = tuple(sum(pair[i] for pair in classes.values()) for i in (0, 1))
        return {"score": score, "semantic_miou": (0, 0), "ciou": total, "classes": classes}

    def _ratios(self, rows: Sequence[Row]) -> NamedScores:
        classes: dict[str, np.ndarray] = {}
        for row in rows:
            for name, pixels in row["classes"].items():
                classes[name] = classes.get(name, np.zeros(2, np.int64)) + pixels
        ious = (float(pixels[0] / pixels[1]) for _, pixels in sorted(classes.items()) if pixels[1])
        return super()._ratios(rows) | {"semantic_miou": mean(ious)}


class CountScores(SampleScores):
    """Counting by naming objects: share of right numbers, and how many objects 100 readable answers miscount.

    `miscounted` is the mean absolute error of the number; printed in per cent it reads as objects per 100 answers.
    """

    names = ("accuracy", "miscounted")

    def _measure(self, prediction: Prediction) -> Sums:
        error = abs(len(prediction.sure_regions) - len(target_regions(prediction, optional=True)))
        readable = prediction.parsed is not None
        return {
            **dict.fromkeys(("score", "accuracy"), (readable and error == 0, 1)),
            "miscounted": (readable * error, readable),
        }
