"""Score classes: brute-force NumPy, hand-worked cases, any order and batches, one process against two and three."""

import dataclasses
import os
import socket

import numpy as np
import pytest
import torch
import torch.distributed as dist
from pycocotools import mask as coco_mask

from vistallm import metrics
from vistallm.metrics import METRICS, SCORE_NAMES
from vistallm.metrics.regions import PRECISIONS
from vistallm.schema import PROMPT_SHAPES, Parsed, Prediction, Region

SHAPES = [(1, 1), (7, 5), (40, 64)]
COUNT = 24


def prediction(number, parsed, target, images=((40, 64),), **meta):
    images = [{"width": width, "height": height} for height, width in images]
    target = {"regions": [], "answer": "", "empty": False, "meta": meta, **target}
    failure = None if parsed else "unclosed"
    return Prediction(f"p-{number}", "b", "t", "", "", parsed, failure, images, target)


def rle(mask):
    return coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))


def regions(kind, items):
    field = {"mask": "rle", "box": "box"}[kind]
    return [Region(image, kind, i, **{field: item}) for i, (image, item) in enumerate(items)]


def mask_prediction(number, predicted, target, **meta):
    """One mask (H, W) bool for each image, or None: an image without; `predicted` None: unreadable."""
    drawn = None if predicted is None else [(i, rle(mask)) for i, mask in enumerate(predicted) if mask is not None]
    truth = [(i, rle(mask)) for i, mask in enumerate(target) if mask is not None]
    shapes = [(mask if mask is not None else np.zeros(SHAPES[2])).shape for mask in target]
    parsed = None if drawn is None else Parsed("mask", regions("mask", drawn), "")
    record = {"regions": [one.to_json() for one in regions("mask", truth)], "empty": not truth}
    return prediction(number, parsed, record, shapes, **meta)


def random_masks(seed, count=COUNT):
    """(predicted or None, target or None) bool masks: random, full, absent and unreadable ones."""
    rng = np.random.default_rng(seed)
    rows = []
    for number in range(count):
        shape = SHAPES[number % 3]
        predicted, target = (rng.random(shape) < rng.choice([0.05, 0.5, 0.9, 1]) for _ in range(2))
        target[0, 0] = True  # a target has a pixel
        predicted = [None if rng.random() < 0.2 else predicted] if rng.random() > 0.15 else None
        rows.append((predicted, target if rng.random() < 0.8 or shape != SHAPES[2] else None))
    return rows


def predictions_of(name, count=COUNT):
    """Predictions that the class of this name scores, some of them unreadable, with groups and a held-out part."""
    rng = np.random.default_rng(5)
    rows = []
    for number, (predicted, target) in enumerate(random_masks(1, count)):
        meta = {"held_out": number % 3 == 0, "group": f"g{number // 2}", "ref_id": number // 3, "asks": "object"}
        meta |= {"mode": ("q_a", "qa_r")[number % 2], "prompt": PROMPT_SHAPES[number % 6]}
        if name in ("mask", "masks", "coseg", "prompted", "context", "semseg"):
            single = name in ("mask", "prompted")
            target = target if not single or target is not None else np.ones(SHAPES[2], bool)
            rows.append(mask_prediction(number, predicted, [target], **meta))
        elif name in ("box", "boxes", "phrase", "candidates", "detection", "count", "pose"):
            corner = rng.integers(0, 10, (3, 2))
            boxes = np.concatenate([corner, corner + rng.integers(2, 9, (3, 2))], 1).tolist()
            boxes[0] = boxes[1] if number % 2 else boxes[0]
            answer, truth = (regions("box", [(0, box)]) for box in boxes[:2])
            answer[0].confidence = 0.5  # ties are ranked by the samples' ids
            if name == "pose":
                for one in (*answer, *truth):
                    one.keypoints = tuple((x, y, 2) for x, y in np.reshape(one.box, (2, 2)).tolist())
            parsed = Parsed("box", answer, "") if number % 5 else None
            target = {"regions": [one.to_json() for one in truth], "candidates": boxes}
            rows.append(prediction(number, parsed, target, **meta))
        else:
            words = {"yesno": ("yes", "no"), "truth": ("True", "False"), "choice": "AB", "letter": "AB"}
            answer, truth = rng.choice(list(words.get(name, ("red", "blue"))), 2).tolist()
            parsed = Parsed("text", [], answer) if number % 5 else None
            rows.append(prediction(number, parsed, {"answer": truth}, **meta))
    return rows


def computed(metric, rows):
    metric.update(rows)
    return metric.compute()


@pytest.mark.parametrize("seed", range(5))
def test_mask_scores_equal_brute_force(seed):
    rows = random_masks(seed, 40)
    scores = computed(METRICS["masks"](), [mask_prediction(i, p, [t]) for i, (p, t) in enumerate(rows)])
    ious, intersections, unions, none, some = [], 0, 0, [], []
    for predicted, target in rows:
        answer = None if predicted is None else predicted[0]
        a, b = (np.zeros(SHAPES[2], bool) if one is None else one for one in (answer, target))
        if target is not None:
            a = a if answer is not None else np.zeros_like(b)
        else:
            b = np.zeros_like(a)
        intersections, unions = intersections + (a & b).sum(), unions + (a | b).sum()
        said_none = predicted is not None and answer is None
        ious.append((a & b).sum() / (a | b).sum() if target is not None else float(said_none))
        (none if target is None else some).append(said_none if target is None else answer is not None)
    assert scores["giou"] == pytest.approx(np.mean(ious), abs=1e-12)
    assert scores["ciou"] == intersections / unions
    assert (scores["n_acc"], scores["t_acc"]) == (np.mean(none), np.mean(some))
    own = [iou for iou, (_, target) in zip(ious, rows, strict=True) if target is not None]
    for name in PRECISIONS:
        assert scores[name] == np.mean(np.array(own) >= int(name[2:]) / 100)


@pytest.mark.parametrize("seed", range(5))
def test_cosegmentation_equals_brute_force(seed):
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(15):
        pair = rng.random((2, 3, *SHAPES[1])) < rng.choice([0.1, 0.6, 1])
        pair[:, rng.random(3) < 0.4] = False
        pair[0, rng.random(3) < 0.3] = False
        rows.append((None if rng.random() < 0.2 else pair[0], pair[1]))

    def listed(masks):
        return None if masks is None else [mask if mask.any() else None for mask in masks]

    made = []
    for number, (predicted, target) in enumerate(rows):
        made.append(mask_prediction(number, listed(predicted), listed(target)))
        made[-1].images = [{"height": SHAPES[1][0], "width": SHAPES[1][1]}] * 3
    scores = computed(METRICS["coseg"](), made)
    ious, pixels, right = [], [], []
    for predicted, target in rows:
        answer = np.zeros_like(target) if predicted is None else predicted
        ious += [(a & t).sum() / (a | t).sum() for a, t in zip(answer, target, strict=True) if (a | t).any()]
        pixels += [0.0 if predicted is None else (a == t).mean() for a, t in zip(answer, target, strict=True)]
        right.append(predicted is not None and (answer.any((1, 2)) == target.any((1, 2))).all())
    assert scores["av_j"] == pytest.approx(np.mean(ious))
    assert scores["av_p"] == pytest.approx(np.mean(pixels))
    assert scores["images_right"] == np.mean(right)


def test_an_answer_without_pixels_is_a_region_answer():
    speck = [Region(0, "mask", 0, polygons=[np.array([[3, 3], [3.01, 3], [3, 3.01]], np.float32)])]
    rows = [prediction(i, Parsed("mask", speck, ""), {"empty": True}) for i in range(2)]
    rows[1].parsed.regions = []
    scores = computed(METRICS["masks"](), rows)
    assert (scores["giou"], scores["n_acc"]) == (0.5, 0.5)
    assert computed(METRICS["coseg"](), rows)["images_right"] == 0.5


def test_rec_counts_an_iou_above_the_threshold_only():
    target = {"regions": [regions("box", [(0, (0, 0, 4, 4))])[0].to_json()]}
    answers = [(0, 0, 4, 2), (0, 0, 4, 2.1)]
    made = [prediction(i, Parsed("box", regions("box", [(0, box)]), ""), target) for i, box in enumerate(answers)]
    assert computed(metrics.BoxAccuracy(), made) == {"p_at_50": 0.5}


def worded(rows):
    texts = [(Parsed("text", [], answer) if answer else None, {"answer": truth}, meta) for answer, truth, meta in rows]
    return [prediction(number, parsed, target, **meta) for number, (parsed, target, meta) in enumerate(texts)]


def test_yes_no_scores_by_hand_and_unreadable_is_wrong():
    pairs = zip(["yes", "yes", "no", "no", None, None], ["yes", "no", "no", "yes", "yes", "no"], strict=True)
    scores = computed(METRICS["yesno"](), worded([(*pair, {}) for pair in pairs]))
    assert scores == {"accuracy": 2 / 6, "precision": 1 / 3, "recall": 1 / 3, "f1": 1 / 3, "yes_share": 2 / 6}
    assert computed(METRICS["yesno"](), worded([("no", "no", {})]))["precision"] is None


def test_consistency_and_choices_count_groups():
    rows = [("True", "True", {"group": "x"}), ("True", "False", {"group": "x"}), ("True", "True", {"group": "y"})]
    assert computed(METRICS["truth"](), worded(rows)) == {"accuracy": 2 / 3, "consistency": 0.5}
    modes, groups, answers = ("q_a", "qa_r", "q_a", "qa_r", "q_a"), "11223", "AAABA"
    rows = [(a, "A", {"mode": m, "group": g}) for a, m, g in zip(answers, modes, groups, strict=True)]
    assert computed(METRICS["choice"](), worded(rows)) == {"q_a": 1.0, "qa_r": 0.5, "q_ar": 0.5}
    assert computed(METRICS["choice"](), worded(rows[-1:])) == {"q_a": 1.0, "qa_r": None, "q_ar": None}


@pytest.mark.parametrize("name", METRICS)
def test_every_score_has_a_name_and_none_without_samples(name):
    metric = METRICS[name]()
    metric.update([])
    assert set(metric.compute().values()) == {None}
    assert set(metric.names) == set(metric.compute()) <= set(SCORE_NAMES)
    assert {metric.headline or metric.names[0], *metric.means} <= set(metric.names)


@pytest.mark.parametrize("name", METRICS)
def test_any_order_and_any_batches_give_the_same_bits(name):
    rows = predictions_of(name)
    average = "ref_id" if METRICS[name].means else None
    whole = computed(METRICS[name](average), rows)
    for seed in range(5):
        rng = np.random.default_rng(seed)
        order, cuts = rng.permutation(COUNT), np.sort(rng.integers(0, COUNT + 1, rng.integers(1, 12)))
        metric = METRICS[name](average)
        for part in np.split(order, cuts):
            metric.update([rows[i] for i in part])
        assert metric.compute() == whole, (seed, cuts)


SINGLE = {
    "CumulativeIoU": ("masks", "ciou"),
    "MeanSampleIoU": ("mask", "miou"),
    "GeneralizedIoU": ("masks", "giou"),
    "PrecisionAtIoU": ("masks", "pr50"),
    "NoTargetAccuracy": ("masks", "n_acc"),
    "TargetAccuracy": ("masks", "t_acc"),
    "BoxAccuracy": ("box", "p_at_50"),
    "GeneralizedBoxPrecision": ("boxes", "f1_precision"),
    "AnswerAccuracy": ("exact", "accuracy"),
}


@pytest.mark.parametrize("name", SINGLE)
def test_a_class_of_one_score_is_that_of_its_table(name):
    family, score = SINGLE[name]
    rows = predictions_of(family)
    assert computed(getattr(metrics, name)(), rows) == {score: computed(METRICS[family](), rows)[score]}


def test_a_missing_target_names_the_prediction():
    for name in ("mask", "box", "vqa", "caption", "coseg"):
        row = dataclasses.replace(predictions_of(name)[1], target={})
        with pytest.raises(ValueError, match="p-1"):
            METRICS[name]().update([row])


def _worker(rank, port, size, out):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=size)
    cuts = [0, 7, 7, COUNT] if size == 3 else [0, 7, COUNT]  # uneven; with three, one process has no sample
    results = {}
    for name in METRICS:
        rows = predictions_of(name)[cuts[rank] : cuts[rank + 1]]
        results[name] = computed(METRICS[name]("ref_id" if METRICS[name].means else None), rows)
    torch.save(results, f"{out}-{rank}")
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3])
def test_processes_together_equal_one(tmp_path, size):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(_worker, (port, size, str(tmp_path / "scores")), nprocs=size)
    for rank in range(size):
        for name, scores in torch.load(tmp_path / f"scores-{rank}").items():
            average = "ref_id" if METRICS[name].means else None
            assert scores == computed(METRICS[name](average), predictions_of(name)), name
