"""Submission files: each is what its own reader takes, with ids of the dataset and nothing lost but the unreadable."""

import csv
import io
import json

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from vistallm.evaluate import benchmarks as B
from vistallm.evaluate.export import EXPORTS, write_exports
from vistallm.regions.masks import mask_to_rle
from vistallm.schema import Parsed, Prediction, Region

SQUARE = np.array([[2, 2], [8, 2], [8, 8], [2, 8]], np.float32)


def prediction(name, regions=(), kind="text", answer="", target="", **meta):
    parsed = None if regions is None else Parsed(kind, list(regions), answer)
    return Prediction(
        name,
        "b",
        "t",
        "Is there a dog?",
        "<m_st>",
        parsed,
        None,
        [{"width": 20, "height": 10}],
        {"answer": target, "meta": meta},
    )


def coco_truth(path):
    mask = np.zeros((10, 20), bool)
    mask[2:8, 2:8] = True
    rle = mask_to_rle(mask)
    annotation = {"id": 1, "image_id": 5, "category_id": 1, "segmentation": rle, "area": 36, "bbox": [2, 2, 6, 6]}
    images = [{"id": 5, "width": 20, "height": 10}, {"id": 6, "width": 20, "height": 10}]
    data = {"images": images, "annotations": [annotation | {"iscrowd": 0}], "categories": [{"id": 1, "name": "object"}]}
    path.write_text(json.dumps(data | {"info": {}}))
    return COCO(str(path))


def written(kind, predictions, tmp_path):
    return write_exports(tmp_path / "exports", kind, "name", predictions)


@pytest.mark.parametrize(("kind", "iou_type"), [("coco_masks", "segm"), ("coco_boxes", "bbox")])
def test_coco_results_are_read_and_scored_by_pycocotools(kind, iou_type, tmp_path):
    regions = [Region(0, "mask", polygons=[SQUARE]) if iou_type == "segm" else Region(0, "box", box=(2, 2, 8, 8))]
    regions[0].confidence = 0.75
    predictions = [
        prediction("a", regions, "mask", image_ids=["vg:9|coco:5"]),
        prediction("none", [], "mask", image_ids=["coco:6"]),
        prediction("unreadable", None, image_ids=["coco:6"]),
    ]
    truth = coco_truth(tmp_path / "instances.json")
    results = truth.loadRes(str(written(kind, predictions, tmp_path)))
    assert [(r["image_id"], r["score"], r["expression"]) for r in results.loadAnns(results.getAnnIds())] == [
        (5, 0.75, "a")
    ]
    evaluation = COCOeval(truth, results, iou_type)
    evaluation.evaluate()
    evaluation.accumulate()
    assert evaluation.eval["precision"].max() == pytest.approx(1)


def test_captions_are_read_by_pycocotools(tmp_path):
    predictions = [prediction("a", answer="a dog", image_ids=["coco:5"]), prediction("b", None, image_ids=["coco:6"])]
    results = coco_truth(tmp_path / "instances.json").loadRes(str(written("captions", predictions, tmp_path)))
    assert [r["caption"] for r in results.loadAnns(results.getAnnIds())] == ["a dog", ""]


def test_grefcoco_says_no_target_and_unreadable_apart(tmp_path):
    ids = {"ref_id": 1, "sent_id": 2, "image_ids": ["coco:5"]}
    regions = [Region(0, "mask", i, polygons=[SQUARE + 8 * i]) for i in range(2)]
    rows = [prediction("a", regions, "mask", **ids), prediction("b", [], "mask", **ids), prediction("c", None, **ids)]
    masks, none, unreadable = json.loads(written("grefcoco", rows, tmp_path).read_text())
    assert masks["segmentation"]["size"] == [10, 20]
    assert none["no_target"]
    assert not unreadable["no_target"]
    assert {key: none[key] for key in ("ref_id", "sent_id", "image_id")} == {"ref_id": 1, "sent_id": 2, "image_id": 5}


def test_vqav2_nlvr2_and_pope(tmp_path):
    rows = [
        prediction("nlvr2-dev-dev-850-0-1", answer="True", question_id=7),
        prediction("nlvr2-dev-dev-2", None, question_id=8),
    ]
    assert json.loads(written("vqav2", rows, tmp_path).read_text()) == [
        {"question_id": 7, "answer": "True"},
        {"question_id": 8, "answer": ""},
    ]
    assert written("nlvr2", rows, tmp_path).read_text() == "dev-850-0-1,True\ndev-2,unreadable\n"
    lines = written("pope", rows, tmp_path).read_text().splitlines()
    assert [json.loads(line)["answer"] for line in lines] == ["True", "<m_st>"]


def test_vcr_has_twenty_probabilities_per_question(tmp_path):
    rows = [prediction("q", answer="B", mode="q_a", group="val-0", target="The answer is (C).")]
    rows += [prediction("r", answer="D", mode="qa_r", group="val-0", target="The answer is (A).")]
    rows += [prediction(f"t{i}", answer="ABCD"[i], mode="qa_r", group="test-0", given=i) for i in range(4)]
    (head, val, test) = csv.reader(io.StringIO(written("vcr", rows, tmp_path).read_text()))
    assert head[:2] == ["annot_id", "answer_0"]
    assert head[-1] == "rationale_conditioned_on_a3_3"
    assert len(val) == 21
    assert val[1:5] == ["0.0", "1.0", "0.0", "0.0"]
    assert val[13:17] == ["0.0", "0.0", "0.0", "1.0"]  # the rationale was asked for given C, the right answer
    assert val[5:9] == ["0.25"] * 4
    assert [test[5 + 4 * i : 9 + 4 * i].index("1.0") for i in range(4)] == [0, 1, 2, 3]


def test_a_missing_id_is_named_and_every_export_is_used(tmp_path):
    with pytest.raises(ValueError, match=r"prediction old: .*'image_ids'"):
        written("coco_masks", [prediction("old", [Region(0, "mask", polygons=[SQUARE])], "mask")], tmp_path)
    assert {one.export for one in B.load_benchmarks().values()} == {None, *EXPORTS}
