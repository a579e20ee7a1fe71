"""PointQA: the answer of a point is its own, three kinds of question per object, keys that are checked."""

import json

import pytest

from vistallm.coinit.sources.genome import place_region

LOCAL = {
    "7": [
        {
            "id": 7,
            "question": "What color is the bus?",
            "all_ans": ["red", "blue"],  # a set: not in the order of the objects
            "all_objs": [
                {"x": 2, "y": 4, "w": 20, "h": 10, "object_id": 1, "names": ["bus"], "attributes": ["blue"]},
                {"x": 40, "y": 4, "w": 30, "h": 20, "object_id": 2, "names": ["bus"], "attributes": ["red"]},
            ],
            "points": [{"x": 12, "y": 9, "ans": "blue"}, {"x": 55, "y": 14, "ans": "red"}],
        }
    ]
}
TWICE = {
    "7": [
        {
            "id": 7,
            "obj_type": "bears",
            "obj_question": "How many of these bears?",
            "super_question": "How many of these animals?",
            "general_question": "How many of these?",
            "ans": "2",
            "bbox": {"x": 4, "y": 8, "w": 11, "h": 20, "object_id": 3},
            "point": {"x": 10, "y": 18, "ans": "2"},
        }
    ]
}


def write(root, picture, local=LOCAL, twice=TWICE):
    picture(root / "VG_100K" / "7.jpg")
    image = {"image_id": 7, "url": "https://host/VG_100K/7.jpg", "width": 64, "height": 48, "coco_id": 5}
    (root / "image_data.json").write_text(json.dumps([image]))
    for stem, data, splits in (("localqa", local, ("train", "testfinal")), ("looktwiceqa", twice, ("train", "test"))):
        (root / f"{stem}_dataset.json").write_text(json.dumps(data))
        for split in splits:
            (root / f"{stem}_{split}_imgs.json").write_text('["7"]')


MADE = [("pointqa-local", "train", write), ("pointqa-looktwice", "train", write)]


def test_local(build):
    samples = build("pointqa-local", "testfinal", write)
    assert sorted(samples) == [f"pointqa-local-testfinal-7-0-{i}-{form}" for i in (0, 1) for form in ("box", "point")]
    point = samples["pointqa-local-testfinal-7-0-1-point"]
    assert (point.task, point.source, point.meta) == ("pointqa", "pointqa-local", {"image_ids": ["vg:7|coco:5"]})
    assert point.fields == {"question": "What color is the bus {regions:0}?", "answer": "red"}
    assert point.regions[0].point == (55, 14)
    box = samples["pointqa-local-testfinal-7-0-1-box"]
    assert (box.task, box.regions[0].box) == ("boxqa", (40, 4, 64, 24))
    assert samples["pointqa-local-testfinal-7-0-0-box"].fields["answer"] == "blue"


def test_look_twice(build):
    samples = build("pointqa-looktwice", "test", write)
    assert len(samples) == 6
    general = samples["pointqa-looktwice-test-7-0-general-point"]
    assert general.fields == {"question": "How many of these {regions:0}?", "answer": "2"}
    assert general.meta == {"image_ids": ["vg:7|coco:5"], "asks": "general"}
    assert general.regions[0].point == (10, 18)
    kinds = {sample.meta["asks"]: sample.fields["question"] for sample in samples.values()}
    assert kinds["object"] == "How many of these {regions:0} bears?"
    assert kinds["super"] == "How many of these {regions:0} animals?"
    assert samples["pointqa-looktwice-test-7-0-object-box"].regions[0].box == (4, 8, 15, 28)


def test_settings_choose_forms_and_questions(build):
    words = ("--set", "forms=box", "--set", "asks=super")
    assert list(build("pointqa-looktwice", "train", write, *words)) == ["pointqa-looktwice-train-7-0-super-box"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bbox": [4, 8, 15, 28]}, "expected the point in the middle of the box [x, y, w, h]"),  # x0 y0 x1 y1
        ({"bbox": {"x": 40, "y": 8, "w": 5, "h": 5}}, "expected the point in the box"),
        ({"bbox": {"x": 4, "y": 8, "width": 5}}, "expected key 'w'"),
        ({"ans": "many"}, "expected key 'ans' as a number, got 'many'"),
        ({"super_question": None}, "expected 'super_question' to be str"),
    ],
)
def test_look_twice_records_that_differ_stop_the_build(refusal, change, message):
    def write_wrong(root, picture):
        write(root, picture, twice={"7": [{**TWICE["7"][0], **change}]})

    error = refusal("pointqa-looktwice", "train", write_wrong)
    assert message in error
    assert "looktwiceqa_dataset.json, record 7, question 0" in error


def test_a_list_box_is_read_when_the_point_is_its_middle(build):
    def write_list(root, picture):
        write(root, picture, twice={"7": [{**TWICE["7"][0], "bbox": [4, 8, 11, 20], "ans": 2}]})

    sample = build("pointqa-looktwice", "train", write_list)["pointqa-looktwice-train-7-0-object-box"]
    assert (sample.regions[0].box, sample.fields["answer"]) == ((4, 8, 15, 28), "2")


def test_points_and_objects_must_be_pairs(refusal):
    def write_wrong(root, picture):
        write(root, picture, local={"7": [{**LOCAL["7"][0], "points": LOCAL["7"][0]["points"][:1]}]})

    assert "expected as many points as all_objs, got 1 and 2" in refusal("pointqa-local", "train", write_wrong)


@pytest.mark.parametrize(
    ("question", "written"),
    [
        ("Is this wet", "Is this wet {regions:0}"),
        ("How many of these are there?", "How many of these {regions:0} are there?"),
        ("What shape is the sign ?", "What shape is the sign {regions:0}?"),
    ],
)
def test_place_of_the_region(question, written):
    assert place_region(question) == written
