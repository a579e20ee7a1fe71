"""POPE: JSON lines in a file named .json, one split per way of picking absent objects."""

import json

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


def test_refusals(refusal):
    def other_label(root, picture):
        write(root, picture, [LINES[0], dict(LINES[1], label="maybe")])

    message = refusal("pope", "popular", other_label)
    assert "coco_pope_popular.json, record 1: expected label yes or no" in message
    assert "'maybe'" in message
    assert "coco_pope_random.json" in refusal("pope", "random", other_label)
    assert "one of random, popular, adversarial" in refusal("pope", "test", other_label)
