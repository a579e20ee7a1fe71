"""POPE: JSON lines in a file named .json, one split per way of picking absent objects."""

import json

import pytest

LINES = [
    {"question_id": 1, "image": "COCO_val2014_000000310196.jpg", "text": "Is there a snowboard in the image?"}
    | {"label": "yes"},
    {"question_id": 2, "image": "COCO_val2014_000000310196.jpg", "text": "Is there a car in the image?"}
    | {"label": "no"},
]


def write(root, picture, lines=LINES):
    picture(root / "val2014" / "COCO_val2014_000000310196.jpg")
    text = "\n".join(json.dumps(line) for line in lines) + "\n"
    (root / "coco_pope_popular.json").write_text(text)


MADE = [("pope", "popular", write)]


def test_samples(build):
    found = build("pope", "popular", write)
    assert list(found) == ["pope-popular-1", "pope-popular-2"]
    sample = found["pope-popular-2"]
    assert (sample.task, sample.fields) == ("pope", {"question": "Is there a car in the image?", "answer": "no"})
    assert sample.meta == {"image_ids": ["coco:310196"], "level": "popular", "question_id": 2}


@pytest.mark.parametrize(
    ("questions", "file", "image", "image_id"),
    [
        ("aokvqa", "aokvqa/aokvqa_pope_seem_popular.json", "val2014/COCO_val2014_000000310196.jpg", "coco:310196"),
        ("gqa", "gqa_pope_popular.json", "images/2405722.jpg", "vg:2405722"),
    ],
)
def test_the_other_two_sets_are_indented_lists(build, questions, file, image, image_id):
    def write_other(root, picture):
        picture(root / image)
        lines = [dict(line, image=image.rpartition("/")[2]) for line in LINES]
        (root / file).parent.mkdir(exist_ok=True)
        (root / file).write_text("\n" + json.dumps(lines, indent=4))

    found = build("pope", "popular", write_other, "--set", f"questions={questions}")
    assert list(found) == [f"pope-{questions}-popular-1", f"pope-{questions}-popular-2"]
    sample = found[f"pope-{questions}-popular-1"]
    assert sample.fields == {"question": "Is there a snowboard in the image?", "answer": "yes"}
    assert sample.meta == {"image_ids": [image_id], "level": "popular", "question_id": 1}


def test_refusals(refusal):
    def other_label(root, picture):
        write(root, picture, [LINES[0], dict(LINES[1], label="maybe")])

    message = refusal("pope", "popular", other_label)
    assert "coco_pope_popular.json, record 1: expected label yes or no" in message
    assert "'maybe'" in message
    assert "coco_pope_random.json" in refusal("pope", "random", other_label)
    assert "one of random, popular, adversarial" in refusal("pope", "test", other_label)
