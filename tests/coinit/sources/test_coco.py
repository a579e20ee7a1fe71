"""One's own COCO-style file: the samples of boxes, polygons, run lengths and crowds, absent names, box conventions."""

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest

from vistallm.regions.masks import rle_to_mask

GUIDE = (Path(__file__).parents[3] / "docs" / "custom_data.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^    python (.*(?:data|runs)/photos.*)$", GUIDE, re.MULTILINE)

CATEGORIES = [{"id": 3, "name": "dog"}, {"id": 1, "name": "traffic_light"}, {"id": 7, "name": "boat"}]


def square(x, y, side):
    """A polygon of a square."""
    return [[x, y, x + side, y, x + side, y + side, x, y + side]]


def annotations():
    """Two dogs, the right one first and of two parts, a light by run lengths, a crowd, a box without a mask."""
    from pycocotools import mask

    light = np.zeros((48, 64), np.uint8)
    light[4:14, 2:7] = 1
    rle = mask.encode(np.asfortranarray(light))
    rows = [
        {"image_id": 5, "category_id": 3, "bbox": [40, 10, 20, 12]},
        {"image_id": 5, "category_id": 3, "bbox": [10, 20, 8, 8], "segmentation": square(10, 20, 8)},
        {"image_id": 5, "category_id": 1, "bbox": [2, 4, 5, 10]},
        {"image_id": 9, "category_id": 3, "bbox": [0, 0, 64, 40], "iscrowd": 1},
        {"image_id": 9, "category_id": 1, "bbox": [3, 3, 9, 9]},
        {"image_id": 9, "category_id": 7, "segmentation": square(30, 30, 10)},
    ]
    rows[0]["segmentation"] = square(40, 10, 8) + square(52, 14, 8)
    rows[2]["segmentation"] = {"size": rle["size"], "counts": rle["counts"].decode()}
    rows[3]["segmentation"] = {"size": [48, 64], "counts": [0, 48 * 10, 48 * 54]}  # not compressed: columns 0 to 9
    words = "spotted one", "puppy on the left", "light", "dogs", "light", "boat"
    return [{"id": i, "phrase": words[i], **row} for i, row in enumerate(rows)]


def write(root, picture, change=lambda data: None):
    images = [{"id": i, "file_name": f"{name}.jpg", "width": 64, "height": 48} for i, name in ((5, "a"), (9, "b"))]
    data = {"images": images, "annotations": annotations(), "categories": CATEGORIES}
    change(data)
    for image in data["images"]:
        picture(root / "images" / image["file_name"], image["width"], image["height"])
    (root / "train.json").write_text(json.dumps(data))


LINKS = "tasks=det,insseg,semseg,count,interactive,pose"


def with_keypoints(data):
    """The dogs of image 5 get a nose and a tail: the left dog both, the right one a hidden nose at the image's edge."""
    data["categories"] = [{"id": 3, "name": "dog", "keypoints": ["nose", "tail_end"]}, *CATEGORIES[1:]]
    data["annotations"][0] |= {"keypoints": [63, 12, 1, 0, 0, 0], "num_keypoints": 1}
    data["annotations"][1] |= {"keypoints": [11, 21, 2, 17, 27, 2], "num_keypoints": 2}


def write_links(root, picture):
    write(root, picture, with_keypoints)


MADE = [("coco", "train", write, "--set", "absent=1")]


def test_samples_by_category(build, rejects):
    samples = build("coco", "train", write)
    texts = {name: (s.task, s.fields["expr"], len(s.regions)) for name, s in samples.items()}
    assert texts == {
        "coco-train-5-0-grec": ("grec", "every dog", 2),
        "coco-train-5-0-gres": ("gres", "every dog", 2),
        "coco-train-5-1-rec": ("rec", "the traffic light", 1),
        "coco-train-5-1-res": ("res", "the traffic light", 1),
        "coco-train-5-1-grec": ("grec", "every traffic light", 1),
        "coco-train-5-1-gres": ("gres", "every traffic light", 1),
        "coco-train-9-0-gres": ("gres", "every dog", 1),  # a crowd is no single object
        "coco-train-9-1-rec": ("rec", "the traffic light", 1),  # it has no mask
        "coco-train-9-1-grec": ("grec", "every traffic light", 1),
        "coco-train-9-2-rec": ("rec", "the boat", 1),  # its box is its polygon's
        "coco-train-9-2-res": ("res", "the boat", 1),
        "coco-train-9-2-grec": ("grec", "every boat", 1),
        "coco-train-9-2-gres": ("gres", "every boat", 1),
    }
    assert [r.box for r in samples["coco-train-5-0-grec"].regions] == [(10, 20, 18, 28), (40, 10, 60, 22)]
    assert samples["coco-train-5-0-gres"].fields["targets"] == [0, 1]
    dog = rle_to_mask(samples["coco-train-5-0-gres"].regions[1].rle)
    assert dog.sum() == 128
    assert dog[10:18, 40:48].all()
    assert dog[14:22, 52:60].all()
    assert rle_to_mask(samples["coco-train-5-1-res"].regions[0].rle)[4:14, 2:7].all()
    crowd = rle_to_mask(samples["coco-train-9-0-gres"].regions[0].rle)
    assert crowd[:, :10].all()
    assert crowd.sum() == 480
    assert samples["coco-train-9-2-rec"].regions[0].box == (30, 30, 40, 40)
    assert samples["coco-train-5-1-rec"].meta["image_ids"] == ["custom:a.jpg"]
    ((reason, where),) = rejects("coco")
    assert reason == "empty-mask"
    assert where.endswith("annotation 4: 'every traffic light' has box samples only")


def test_samples_of_links(build):
    samples = build("coco", "train", write_links, "--set", LINKS, "--set", "absent=1")
    det = samples["coco-train-5-det"]
    found = dict(part.split(" {") for part in det.fields["found"].split(", "))
    assert {name: slot.strip("}") for name, slot in found.items() if name == "boat"} == {"boat": "regions::box"}
    assert [name for name in found] == det.fields["names"].split(", ")
    assert set(found) == {"dog", "traffic light", "boat"}
    boxes = {"dog": [(10, 20, 18, 28), (40, 10, 60, 22)], "traffic light": [(2, 4, 7, 14)]}
    for name, expected in boxes.items():
        numbers = [int(n) for n in re.findall(r"\d", found[name])]
        assert [det.regions[n].box for n in numbers] == expected
        assert [(det.regions[n].object, det.regions[n].label) for n in numbers] == [(n, name) for n in numbers]
    assert [len(samples[f"coco-train-5-{task}"].regions) for task in ("insseg", "semseg")] == [3, 2]
    (dogs,) = (r for r in samples["coco-train-5-semseg"].regions if r.label == "dog")
    assert rle_to_mask(dogs.rle).sum() == 8 * 8 * 3
    # In image 9 the dogs are a crowd, which has no box of its own, and the light has no mask.
    assert set(samples["coco-train-9-det"].fields["names"].split(", ")) == {"traffic light", "boat"}
    assert samples["coco-train-9-insseg"].fields["found"] == "boat {regions:0}"
    assert set(samples["coco-train-9-semseg"].fields["names"].split(", ")) == {"dog", "boat"}
    counted = {s.id: (s.fields["expr"], len(s.regions)) for s in samples.values() if s.task == "count"}
    assert counted["coco-train-5-0-count"] == ("instances of dog", 2)
    assert {row for row in counted.values() if row[1] == 0} == {("instances of boat", 0)}
    shown = samples["coco-train-5-0-interactive"]
    assert (shown.fields["prompt"], len(shown.regions)) == (f"{{region:0:{shown.meta['prompt']}}}", 1)


def test_keypoints_are_those_of_the_file(build):
    (sample,) = build("coco", "train", write_links, "--set", "tasks=pose").values()
    assert sample.fields == {
        "expr": "dog",
        "points": "nose, tail end",
        "found": "dog {regions:0,1}, nose {point:0}, tail end {point:1}",
    }
    assert [r.keypoints for r in sample.regions] == [((11.5, 21.5, 2), (17.5, 27.5, 2)), ((63.5, 12.5, 1), (0, 0, 0))]
    assert [(r.kind, r.box) for r in sample.regions] == [
        ("keypoints", (10, 20, 18, 28)),
        ("keypoints", (40, 10, 60, 22)),
    ]
    assert rle_to_mask(sample.regions[1].rle).sum() == 128


@pytest.mark.parametrize(
    ("change", "words", "message"),
    [
        (with_keypoints, ["phrase=phrase"], "these list names; got phrases"),
        (lambda data: None, [], "expected a category with names of 'keypoints'"),
        (
            lambda data: with_keypoints(data) or data["annotations"][1]["keypoints"].pop(),
            [],
            "expected 'keypoints' of 2",
        ),
    ],
)
def test_what_links_need_is_named(refusal, change, words, message):
    words = [word for setting in [LINKS, *words] for word in ("--set", setting)]
    assert message in refusal("coco", "train", lambda *args: write(*args, change), *words)


def test_phrases_stay_as_they_are(build):
    samples = build("coco", "train", write, "--set", "phrase=phrase", "--set", "tasks=rec,grec")
    assert {s.fields["expr"] for s in samples.values() if s.task == "rec"} == {
        "spotted one",
        "puppy on the left",
        "light",
        "boat",
    }


def test_absent_names_are_samples_without_target(build):
    samples = build("coco", "train", write, "--set", "absent=5")
    absent = {(s.id.split("-")[2], s.fields["expr"]) for s in samples.values() if s.fields.get("targets") == []}
    assert absent == {("5", "every boat")}  # image 9 has all three
    assert {s.task for s in samples.values() if not s.regions} == {"grec", "gres"}


def test_lvis_says_what_is_absent_and_what_is_not_all_annotated(build):
    def change(data):
        data["annotations"] = data["annotations"][:3]
        for image, looked_for in zip(data["images"], ([7], []), strict=True):
            image |= {"neg_category_ids": looked_for, "not_exhaustive_category_ids": [1]}

    samples = build("coco", "train", lambda *args: write(*args, change), "--set", "absent=5")
    absent = {(s.id.split("-")[2], s.fields["expr"]) for s in samples.values() if not s.regions}
    assert absent == {("5", "every boat")}  # of the other image nothing was looked for
    assert {s.fields["expr"] for s in samples.values() if s.regions} == {"every dog"}


def test_one_file_for_training_and_test(tmp_path, picture):
    from vistallm.coinit.sources import SOURCES
    from vistallm.coinit.sources.base import SourceOptions

    def change(data):
        data["images"] = [{"id": i, "file_name": f"{i}.jpg", "width": 64, "height": 48} for i in range(200)]
        data["annotations"] = [{"id": i, "image_id": i, "category_id": 3, "bbox": [1, 1, 9, 9]} for i in range(200)]

    write(tmp_path, lambda *args: None, change)
    settings = {"file": "train.json", "holdout": "0.2"}
    sources = [SOURCES["coco"](SourceOptions(tmp_path, split, settings=settings)) for split in ("train", "test")]
    ids = [{draft.sample.meta["image_ids"][0] for i in range(len(s)) for draft in s.unit(i)} for s in sources]
    assert not ids[0] & ids[1]
    assert len(ids[0] | ids[1]) == 200
    assert 25 <= len(ids[1]) <= 55


def test_the_commands_of_the_guide(tmp_path, picture, command):
    from vistallm.coinit.shards import read_index
    from vistallm.config import load_config

    def change(data):
        data["images"] = [{"id": i, "file_name": f"{i}.jpg", "width": 64, "height": 48} for i in range(40)]
        data["annotations"] = [row | {"id": i, "image_id": i} for i in range(40) for row in annotations()[:1]]

    write(tmp_path / "photos", picture, change)
    (tmp_path / "photos" / "train.json").rename(tmp_path / "photos" / "annotations.json")
    lines = [shlex.split(re.sub(r"\b(data/)?photos(?=[ .]|$)", rf"{tmp_path}/\1photos", line)) for line in COMMANDS]
    train, _, fit, test, check, evaluate = lines
    assert [command(*words[1:], "--workers", 1) for words in (train, test, check)] == [0, 0, 0]
    counts = read_index(tmp_path / "data" / "photos")["tasks"]
    assert counts["train"] == {"rec": 36, "res": 36, "grec": 72, "gres": 72}
    assert counts["test"] == {"rec": 4, "res": 4, "grec": 8, "gres": 8}
    assert load_config(fit[1:]).data.root == f"{tmp_path}/data/photos"
    assert evaluate[0] == "eval.py"


def boxes(turn):
    """A change of the file: every box rewritten by `turn(x, y, w, h)`."""

    def change(data):
        for annotation in data["annotations"]:
            if "bbox" in annotation:
                annotation["bbox"] = turn(*annotation["bbox"])

    return change


TURNS = {
    "xyxy": lambda x, y, w, h: [x, y, x + w, y + h],
    "yxhw": lambda x, y, w, h: [y, x, h, w],
    "yxyx": lambda x, y, w, h: [y, x, y + h, x + w],
    "cxcywh": lambda x, y, w, h: [x + w / 2, y + h / 2, w, h],
}


@pytest.mark.parametrize("name", TURNS)
def test_boxes_of_another_convention_are_named_and_can_be_read(build, refusal, name):
    turned = boxes(TURNS[name])
    assert f"fit as {name}" in refusal("coco", "train", lambda *args: write(*args, turned))
    samples = build("coco", "train", lambda *args: write(*args, turned), "--set", f"boxes={name}")
    assert samples["coco-train-5-0-grec"].regions[0].box == (10, 20, 18, 28)
    assert len(samples) == 13


def test_boxes_in_shares_of_the_image_are_refused(refusal):
    shares = boxes(lambda x, y, w, h: [x / 64, y / 48, w / 64, h / 48])
    assert "look normalised; multiply x" in refusal("coco", "train", lambda *args: write(*args, shares))


def test_boxes_that_fit_by_no_convention_are_reported(tmp_path, capsys):
    from vistallm.coinit.sources import SOURCES
    from vistallm.coinit.sources.base import SourceOptions

    write(tmp_path, lambda *args: None, boxes(lambda x, y, w, h: [x * 3, y * 3, w * 3, h * 3]))
    SOURCES["coco"](SourceOptions(tmp_path, "train"))
    assert "boxes do not fit their images or polygons as xywh; look at a sheet" in capsys.readouterr().err


def test_a_file_without_masks_makes_box_samples(build, capsys):
    def change(data):
        data["annotations"] = [{k: v for k, v in a.items() if k != "segmentation"} for a in data["annotations"][:3]]

    samples = build("coco", "train", lambda *args: write(*args, change))
    assert {s.task for s in samples.values()} == {"rec", "grec"}


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("image_id", 6, "expected image_id of one of those listed, got 6"),
        ("category_id", 2, "expected category_id of one of those listed, got 2"),
        ("bbox", [1, 2, 3], "expected 'bbox' of four numbers"),
        ("segmentation", "blob", "annotation 1: expected 'segmentation' to be list or dict"),
    ],
)
def test_what_is_not_as_documented_is_named(refusal, key, value, message):
    def change(data):
        data["annotations"][1][key] = value

    assert message in refusal("coco", "train", lambda *args: write(*args, change))


def test_absent_needs_categories(refusal):
    assert "no phrase is known absent" in refusal("coco", "train", write, "--set", "absent=1", "--set", "phrase=phrase")
