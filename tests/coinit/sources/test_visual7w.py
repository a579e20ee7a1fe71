"""Visual7W pointing: boxes from -1, wrong choices, a drawn order of candidates that both forms share."""

import json

import numpy as np
import pytest

from vistallm.coinit.sources.base import SourceOptions
from vistallm.coinit.sources.genome import load_visual7w

BOXES = [
    {"box_id": 1001, "name": "bowl", "x": -1, "y": -1, "width": 11, "height": 9},
    {"box_id": 1002, "name": "cup", "x": 20, "y": 10, "width": 10, "height": 10},
    {"box_id": 1003, "name": "cup", "x": 40, "y": 10, "width": 30, "height": 10},
    {"box_id": 1004, "name": "jar", "x": 2, "y": 30, "width": 8, "height": 10},
    {"box_id": 1005, "name": "gone", "x": 64, "y": 30, "width": 8, "height": 10},
]
PAIRS = [
    {"qa_id": 9, "question": "Which bowl is white?", "answer": 1001, "multiple_choices": [1002, 1003, 1004]}
    | {"type": "which"},
    {
        "qa_id": 10,
        "question": "Which is gone?",
        "answer": 1005,
        "multiple_choices": [1002, 1003, 1004],
        "type": "which",
    },
]
DATA = {
    "dataset": "visual7w",
    "images": [
        {"image_id": 7, "filename": "v7w_7.jpg", "split": "train", "qa_pairs": PAIRS},
        {"image_id": 7, "filename": "v7w_7.jpg", "split": "test", "qa_pairs": PAIRS[:1]},
    ],
    "boxes": BOXES,
}
CUT = {1001: (0, 0, 10, 8), 1002: (20, 10, 30, 20), 1003: (40, 10, 64, 20), 1004: (2, 30, 10, 40)}


def write(root, picture, data=DATA):
    picture(root / "images" / "v7w_7.jpg")
    image = {"image_id": 7, "url": "https://host/VG_100K/7.jpg", "width": 64, "height": 48, "coco_id": 5}
    (root / "image_data.json").write_text(json.dumps([image]))
    (root / "dataset_v7w_pointing.json").write_text(json.dumps(data))


MADE = [("visual7w", "train", write)]


def test_candidates_and_targets(build, rejects):
    samples = build("visual7w", "train", write)
    assert sorted(samples) == ["visual7w-train-9-box", "visual7w-train-9-point"]
    box, point = samples["visual7w-train-9-box"], samples["visual7w-train-9-point"]
    assert (box.task, point.task) == ("v7w", "v7w_point")
    assert box.meta == {"image_ids": ["vg:7|coco:5"], "qa_id": 9}
    for sample in (box, point):
        assert sample.fields["question"] == "Which bowl is white?"
        assert sample.fields["candidates"] == "{regions:0:box} {regions:1:box} {regions:2:box} {regions:3:box}"
        assert sorted(region.box for region in sample.regions) == sorted(CUT.values())
        assert sample.regions[sample.fields["targets"][0]].box == CUT[1001]
    assert box.fields["targets"] == point.fields["targets"]
    assert point.regions[point.fields["targets"][0]].point == (5, 4)
    assert {region.kind for region in point.regions} == {"point"}
    assert [reason for reason, _ in rejects("visual7w")] == ["empty-box"]


def test_candidates_are_written_as_boxes_and_the_answer_as_a_point(build, tiny_words):
    from vistallm.config import Config, apply_overrides
    from vistallm.data.sequence import build_codec, build_sequencer
    from vistallm.data.vocabulary import Vocabulary

    config = apply_overrides(Config(), tiny_words)
    builder = build_sequencer(config, Vocabulary.build(config.model, build_codec(config)))
    sample = build("visual7w", "train", write)["visual7w-train-9-point"]
    sample.pixels = [np.zeros((48, 64, 3), np.uint8)]
    sequence = builder.build(sample)
    assert sequence.prompt.count("<b_st>") == 4
    assert "<p_st>" not in sequence.prompt
    assert sequence.answer.count("<p_st>") == 1
    assert "<b_st>" not in sequence.answer


def test_the_toolkit_s_file_and_the_missing_image_data(build, refusal):
    def unpacked(root, picture):
        write(root, picture)
        (root / "dataset_v7w_pointing.json").rename(root / "dataset.json")

    assert len(build("visual7w", "train", unpacked)) == 2

    def without(root, picture):
        write(root, picture)
        (root / "image_data.json").unlink()

    message = refusal("visual7w", "train", without)
    assert "expected image_data.json there, got no such file; it is Visual Genome's" in message


def test_order_depends_on_seed_and_question(build, tmp_path):
    first = build("visual7w", "test", write)["visual7w-test-9-box"]
    orders = [
        next(load_visual7w(SourceOptions(tmp_path / "root", "test", None, seed)).unit(0)).sample.fields
        for seed in range(8)
    ]
    assert orders[0] == first.fields
    assert len({fields["targets"][0] for fields in orders}) > 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"multiple_choices": [1002, 1003]}, "qa_id 9: expected 3 wrong choices, got 2"),
        ({"answer": 99}, "qa_id 9: expected ids of `boxes`, got 99"),
    ],
)
def test_records_that_differ_stop_the_build(refusal, change, message):
    def write_wrong(root, picture):
        images = [{**DATA["images"][0], "qa_pairs": [{**PAIRS[0], **change}]}]
        write(root, picture, {**DATA, "images": images})

    assert message in refusal("visual7w", "train", write_wrong)
