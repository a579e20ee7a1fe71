"""Scores of named objects: COCOeval on written files, torchmetrics' mean AP, a confusion matrix, hand-worked cases."""

import json

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torchmetrics.detection import MeanAveragePrecision

from vistallm.metrics import METRICS
from vistallm.metrics.detection import coco_eval
from vistallm.regions.masks import mask_to_rle, rle_to_mask
from vistallm.schema import Parsed, Prediction, Region

SIZE = (40, 64)  # height, width
LABELS = ("star", "red circle", "bar")


def predict(number, answer, target, head="link", kind="box", images=1, **meta):
    """A prediction whose answer is a list of regions, or None: it can't be read."""
    sizes = [{"height": SIZE[0], "width": SIZE[1]}] * images
    parsed = None if answer is None else Parsed(kind, answer, "")
    record = {"regions": [one.to_json() for one in target], "answer": "", "empty": not target, "meta": meta}
    return Prediction(f"p-{number}", "b", "t", "", "", parsed, None, sizes, record, head=head)


def computed(name, rows):
    metric = METRICS[name]()
    metric.update(rows)
    return metric.compute()


def random_region(rng, kind, near=None, confidence=None):
    """A region of a random class; `near`: of its class, and its shape moved a little."""
    if near is None:
        low = rng.integers(0, (40, 20))
        box, label = np.concatenate([low, low + rng.integers(6, 20, 2)]), str(rng.choice(LABELS))
        points = np.concatenate([box[:2] + rng.random((5, 2)) * (box[2:] - box[:2]), rng.integers(0, 3, (5, 1))], 1)
    else:
        box, label = np.array(near.box) + rng.integers(-1, 2, 4), near.label
        points = np.array(near.keypoints) if near.keypoints else np.zeros((5, 3))
        points[:, :2] += rng.normal(0, 0.7, (5, 2))
        points[:, 2] = 2
    box = (*np.clip(box[:2], 0, 60).tolist(), *np.maximum(box[:2] + 2, box[2:]).tolist())
    mask = np.zeros(SIZE, bool)
    mask[int(box[1]) : int(box[3]), int(box[0]) : int(box[2])] = True
    mask &= rng.random(SIZE) < 0.95
    own = {
        "mask": {"rle": mask_to_rle(mask)},
        "box": {},
        "keypoints": {"keypoints": tuple(map(tuple, points.tolist()))},
    }
    return Region(0, kind, label=label, box=tuple(map(float, box)), confidence=confidence, **own[kind])


def random_rows(seed, kind, count=30):
    """Answers that find most targets with different exactness, and others; some targets are none, some unreadable."""
    rng, rows = np.random.default_rng(seed), []
    for number in range(count):
        target = [random_region(rng, kind) for _ in range(rng.integers(0, 5))]
        answer = [random_region(rng, kind, one, rng.random()) for one in target if rng.random() < 0.8]
        answer += [random_region(rng, kind, confidence=rng.random()) for _ in range(rng.integers(0, 3))]
        rows.append(predict(number, None if number % 9 == 8 else answer, target, kind=kind))
    return rows


def by_files(rows, iou_type, folder):
    """COCOeval's own summary, from an annotation file and a result file."""
    images = [{"id": i + 1, "height": SIZE[0], "width": SIZE[1]} for i in range(len(rows))]
    categories = [{"id": i + 1, "name": name} for i, name in enumerate(LABELS)]

    def records(regions, image):
        for one in regions:
            x0, y0, x1, y1 = one.box
            shape = {"segm": {"segmentation": one.rle}, "bbox": {}, "keypoints": {}}[iou_type]
            if one.keypoints:
                shape["keypoints"] = np.ravel(one.keypoints).tolist()
                shape["num_keypoints"] = sum(v > 0 for _, _, v in one.keypoints)
            if iou_type != "segm":
                shape["bbox"] = [x0, y0, x1 - x0, y1 - y0]
            yield {"image_id": image + 1, "category_id": LABELS.index(one.label) + 1, "score": one.confidence, **shape}

    truth, results = [], []
    for image, row in enumerate(rows):
        for one in records(map(Region.from_json, row.target["regions"]), image):
            area = rle_to_mask(one["segmentation"]).sum() if iou_type == "segm" else np.prod(one["bbox"][2:])
            truth.append(one | {"id": len(truth) + 1, "iscrowd": 0, "area": float(area)})
        results += records(row.parsed.regions if row.parsed else [], image)
    (folder / "truth.json").write_text(json.dumps({"images": images, "annotations": truth, "categories": categories}))
    (folder / "results.json").write_text(json.dumps(results))
    coco = COCO(folder / "truth.json")
    evaluation = COCOeval(coco, coco.loadRes(str(folder / "results.json")), iou_type)
    if iou_type == "keypoints":
        evaluation.params.kpt_oks_sigmas = np.full(5, 0.05)
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return evaluation.stats[:3]


@pytest.mark.parametrize(
    ("kind", "iou_type", "metric", "names"),
    [
        ("box", "bbox", "detection", ("ap", "ap50", "ap75")),
        ("mask", "segm", "detection", ("mask_ap", "mask_ap50", "mask_ap75")),
        ("keypoints", "keypoints", "pose", ("oks_ap", "oks_ap50", "oks_ap75")),
    ],
)
@pytest.mark.parametrize("seed", range(3))
def test_ap_equals_cocoeval_on_files(seed, kind, iou_type, metric, names, tmp_path, capsys):
    rows = random_rows(seed, kind)
    expected = by_files(rows, iou_type, tmp_path)
    capsys.readouterr()
    scores = computed(metric, rows[::-1])
    assert [scores[name] for name in names] == pytest.approx(expected, abs=1e-12)
    assert 0.1 < scores[names[0]] < scores[names[1]] < 1
    assert capsys.readouterr().out == ""
    part = METRICS[metric]()
    part.update(rows)
    chosen = rows[:11]
    found = part.summarise([row for row in part.rows() if row["id"] in {one.id for one in chosen}])
    assert [found[name] for name in names] == pytest.approx(by_files(chosen, iou_type, tmp_path), abs=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_ap_equals_torchmetrics(seed):
    import torch

    def record(regions):
        return {
            "boxes": torch.tensor([one.box for one in regions]).reshape(-1, 4),
            "masks": torch.from_numpy(np.array([rle_to_mask(one.rle) for one in regions]).reshape(-1, *SIZE)),
            "labels": torch.tensor([LABELS.index(one.label) for one in regions], dtype=torch.long),
            "scores": torch.tensor([one.confidence or 1.0 for one in regions], dtype=torch.float64),
        }

    rows = random_rows(seed + 10, "mask")
    thresholds = {  # torchmetrics' own are float32, which moves a recall of exactly one half
        "iou_thresholds": np.linspace(0.5, 0.95, 10).tolist(),
        "rec_thresholds": np.linspace(0, 1, 101).tolist(),
    }
    reference = MeanAveragePrecision(box_format="xyxy", iou_type=("bbox", "segm"), **thresholds)
    for row in rows:
        answer = record(row.parsed.regions if row.parsed else [])
        reference.update([answer], [record([Region.from_json(one) for one in row.target["regions"]])])
    expected, scores = reference.compute(), computed("detection", rows)
    for ours, theirs in (("", "bbox_"), ("mask_", "segm_")):
        for name, other in (("ap", "map"), ("ap50", "map_50"), ("ap75", "map_75")):
            assert scores[ours + name] == pytest.approx(float(expected[theirs + other]), abs=1e-6)


def box(x, label, confidence=None, image=0, side=10.0):
    return Region(image, "box", label=label, box=(x, 0.0, x + side, side), confidence=confidence)


def test_what_is_found_of_an_absent_class_counts_against_it():
    target = [[box(0, "star"), box(30, "star")], [box(0, "bar")]]
    good = [[box(0, "Star", 0.9), box(30, "star", 0.8)], [box(0, "bar", 0.9)]]
    assert set(computed("detection", map_rows(good, target)).values()) == {1, None}
    absent = [good[0], [box(0, "bar", 0.9), box(30, "star", 0.85)]]  # ranks between the two stars of the other image
    assert computed("detection", map_rows(absent, target))["ap50"] == pytest.approx((51 + 50 * 2 / 3) / 101 / 2 + 0.5)
    doubtful = [good[0], [box(0, "bar", 0.9), box(30, "star", 0.1)]]
    scores = computed("detection", map_rows(doubtful, target))
    assert (scores["ap50"], scores["f1_precision"]) == (1, 1)  # of a link, what is under .5 is not said
    texts = computed("detection", map_rows(doubtful, target, head="text"))
    assert texts["f1_precision"] == 0.5
    unknown = [good[0], [box(0, "bar", 0.9), box(30, "moon", 0.95)]]  # no target is one: no class of the mean
    assert computed("detection", map_rows(unknown, target))["ap"] == 1


def map_rows(answers, targets, **options):
    return [predict(i, a, t, **options) for i, (a, t) in enumerate(zip(answers, targets, strict=True))]


def test_a_sample_scores_the_f1_of_its_objects():
    target = [box(0, "star"), box(20, "star"), box(40, "bar")]
    answers = [
        target,
        [box(0, "star", 0.9), box(40, "star", 0.9)],  # one right, one of the wrong class: 2 * 1 / (2 + 3)
        [],
        None,
        [box(0, "star", 0.9, image=1)],
    ]
    metric = METRICS["detection"]()
    metric.update([predict(i, answer, target, images=2, head="text") for i, answer in enumerate(answers)])
    assert [row["score"][0] for row in metric.rows()] == pytest.approx([1, 0.4, 0, 0, 0])
    metric.reset()
    metric.update([predict(0, [], []), predict(1, None, []), predict(2, target, [])])
    assert [row["score"][0] for row in metric.rows()] == [1, 0, 0]
    assert metric.compute() == dict.fromkeys(METRICS["detection"].names) | {"f1_precision": pytest.approx(1 / 3)}


def test_keypoints_of_classes_with_different_numbers():
    def pose(label, number, shift=0.0, confidence=None, v=2):
        points = tuple((10.0 * i + shift, 5.0, v) for i in range(number))
        return Region(0, "keypoints", label=label, box=(0.0, 0.0, 40.0, 10.0), keypoints=points, confidence=confidence)

    target = [pose("star", 5), pose("triangle", 3)]
    exact = [predict(0, [pose("star", 5, 0, 0.9), pose("triangle", 3, 0, 0.9)], target, kind="keypoints")]
    assert list(computed("pose", exact).values()) == pytest.approx([1] * 4)
    shifted = [predict(0, [pose("star", 5, 3, 0.9), pose("triangle", 3, 0, 0.9)], target, kind="keypoints")]
    oks = np.exp(-(3**2) / (2 * 400 * (2 * 0.05) ** 2))  # area 400
    assert 0.3 < oks < 0.5
    assert computed("pose", shifted)["oks_ap50"] == pytest.approx(0.5)
    hidden = [predict(0, [pose("star", 5, 0, 0.9)], [pose("star", 5), pose("star", 5, v=0)], kind="keypoints")]
    assert computed("pose", hidden)["f1_oks"] == 1  # a target without labelled keypoints is ignored
    person = {"size": [9, 9], "answer": [], "target": [{"category": "", "bbox": [0, 0, 9, 9], "area": 1, "score": 1}]}
    person["target"][0] |= {"keypoints": [1, 1, 2] * 17, "num_keypoints": 17}
    assert coco_eval([person], "keypoints").params.kpt_oks_sigmas[0] == pytest.approx(0.026)


@pytest.mark.parametrize("seed", range(3))
def test_semantic_scores_equal_a_confusion_count(seed):
    rng, rows, sums = np.random.default_rng(seed), [], {name: np.zeros(2) for name in LABELS}
    for number in range(20):
        masks = rng.random((2, 3, 2, *SIZE)) < rng.choice([0, 0.3, 0.8], (2, 3, 2, 1, 1))  # side, class, image
        regions = [
            [
                Region(image, "mask", label=LABELS[k], rle=mask_to_rle(side[k, image]))
                for k in range(3)
                for image in range(2)
                if side[k, image].any()
            ]
            for side in masks
        ]
        readable = number % 6 > 0
        rows.append(predict(number, regions[0] if readable else None, regions[1], kind="mask", images=2))
        answer, target = masks[0] & readable, masks[1]
        for k, name in enumerate(LABELS):
            sums[name] += (answer[k] & target[k]).sum(), (answer[k] | target[k]).sum()
    scores = computed("semseg", rows)
    assert scores["semantic_miou"] == pytest.approx(np.mean([a / b for a, b in sums.values()]), abs=1e-12)
    total = sum(sums.values())
    assert scores["ciou"] == pytest.approx(total[0] / total[1], abs=1e-12)


def test_a_class_that_only_the_answers_hold_has_an_iou_of_0():
    mask = {"rle": mask_to_rle(np.ones(SIZE, bool))}
    star, moon = (Region(0, "mask", label=label, **mask) for label in ("star", "moon"))
    assert computed("semseg", [predict(0, [star, moon], [star])])["semantic_miou"] == 0.5
    assert computed("semseg", [predict(0, [star], [star]), predict(1, [], [])])["semantic_miou"] == 1


def test_counting_by_hand():
    targets = [[box(0, "star"), box(20, "star")], [], [box(0, "bar")], [box(0, "bar")]]
    answers = [[box(0, "star", 0.9), box(20, "star", 0.7), box(40, "star", 0.2)], [box(0, "bar", 0.9)], [], None]
    scores = computed("count", map_rows(answers, targets))
    assert scores == {"accuracy": 0.25, "miscounted": pytest.approx(2 / 3)}
    assert computed("count", map_rows(answers, targets, head="text"))["accuracy"] == 0  # a text says all its regions


def test_prompted_masks_are_averaged_over_the_six_shapes():
    whole, half = np.ones(SIZE, bool), np.ones(SIZE, bool)
    half[:, ::2] = False
    target = [Region(0, "mask", rle=mask_to_rle(whole))]
    rows = [predict(0, target, target, prompt="point"), predict(1, target, target, prompt="point")]
    rows.append(predict(2, [Region(0, "mask", rle=mask_to_rle(half))], target, prompt="scribble"))
    scores = computed("prompted", rows)
    assert (scores["miou_prompts"], scores["miou_point"], scores["miou_scribble"]) == (0.75, 1, 0.5)
    assert (scores["miou"], scores["miou_box"]) == (pytest.approx(2.5 / 3), None)
    with pytest.raises(ValueError, match="expected one of point, box"):
        METRICS["prompted"]().update([predict(0, target, target, prompt="ring")])


def test_in_context_masks_count_targets_alone_in_miou():
    target = [Region(0, "mask", rle=mask_to_rle(np.ones(SIZE, bool)))]
    scores = computed("context", [predict(0, target, target), predict(1, [], target), predict(2, [], [])])
    assert (scores["miou"], scores["giou"], scores["n_acc"]) == (0.5, pytest.approx(2 / 3), 1)
