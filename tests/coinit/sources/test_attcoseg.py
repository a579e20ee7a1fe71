"""AttCoSeg: which images are examples of a value, hard negatives, groups that depend on the seed alone."""

import json

import cv2
import numpy as np
import pytest

from vistallm.coinit.attcoseg import (
    Limits,
    Named,
    Thing,
    find_attributes,
    find_positions,
    find_thing,
    name_words,
    read_words,
)
from vistallm.coinit.sources.attcoseg import load_attcoseg
from vistallm.coinit.sources.base import SourceOptions
from vistallm.regions.masks import rle_to_mask

COLOURS = {"red": (220, 30, 30), "blue": (30, 60, 220), "green": (30, 160, 60)}
# (COCO id, [(category, x, y, width, height, colour or None)]); images of 120 x 90, in Visual Genome of twice that size.
SCENES = [
    (11, [("bus", 5, 5, 40, 30, "red")]),
    (12, [("bus", 70, 40, 40, 30, "red")]),
    (13, [("cup", 45, 30, 30, 30, "red"), ("bus", 5, 60, 40, 25, "green")]),
    (14, [("bus", 5, 5, 40, 30, "blue")]),
    (15, [("cup", 70, 5, 40, 30, "blue")]),
    (16, [("bus", 40, 30, 40, 30, "blue"), ("bus", 5, 5, 20, 20, None)]),
]
CATEGORIES = [{"id": 1, "name": "bus"}, {"id": 2, "name": "cup", "synonyms": ["mug"]}]


def write(root, picture):
    image_data, attributes, images, annotations = [], [], [], []
    (root / "train2014").mkdir(parents=True)
    for coco_id, things in SCENES:
        vg_id, file = 1000 + coco_id, f"COCO_train2014_{coco_id:012d}.jpg"
        pixels = np.full((90, 120, 3), 200, np.uint8)
        objects = [{"object_id": vg_id, "names": ["sky"], "x": 0, "y": 0, "w": 240, "h": 60, "synsets": []}]
        for category, x, y, w, h, colour in things:
            polygon = [x, y, x + w, y, x + w, y + h, x, y + h - h / 3]
            cv2.fillPoly(pixels, [np.reshape(polygon, (-1, 2)).astype(int)], COLOURS.get(colour, (90, 90, 90)))
            number = 1 + (category == "cup")
            annotation = {"id": len(annotations), "image_id": coco_id, "category_id": number, "bbox": [x, y, w, h]}
            annotations.append(annotation | {"segmentation": [polygon], "area": w * h * 5 / 6, "iscrowd": 0})
            box = {"x": 2 * x + 1, "y": 2 * y, "w": 2 * w, "h": 2 * h}
            said = {"attributes": [f"{colour.title()} ", "parked"]} if colour else {}
            name = "mug" if category == "cup" else "buses"
            objects.append({"object_id": len(annotations), "names": [name], "synsets": [], **box, **said})
        assert cv2.imwrite(str(root / "train2014" / file), pixels[:, :, ::-1])
        image_data.append({"image_id": vg_id, "url": f"https://host/VG_100K/{vg_id}.jpg", "coco_id": coco_id})
        image_data[-1] |= {"width": 240, "height": 180}
        attributes.append({"image_id": vg_id, "attributes": objects})
        images.append({"id": coco_id, "file_name": file, "width": 120, "height": 90})
    image_data.append({"image_id": 5, "url": "https://host/VG_100K/5.jpg", "coco_id": None, "width": 9, "height": 9})
    attributes.append({"image_id": 5, "attributes": []})
    files = {"image_data": image_data, "attributes": attributes}
    files["instances"] = {"images": images, "annotations": annotations, "categories": CATEGORIES}
    for name, data in files.items():
        (root / f"{name}.json").write_text(json.dumps(data))


WORDS = ("--set", "masks={root}/instances.json", "--set", "attributes=colour")
MADE = [("attcoseg", "train", write, *WORDS)]


def test_groups_name_and_segment_the_images_of_a_value(build, capsys):
    samples = build("attcoseg", "train", write, *WORDS, "--set", "groups=40")
    said = capsys.readouterr().err
    assert "6 images with masks and attributes" in said
    assert "colour    examples/negatives: blue 3/3, red 3/3" in said
    assert "image-without-masks 1" in said
    assert len(samples) == 40
    of_value = {"red": {11, 12, 13}, "blue": {14, 15, 16}}
    for sample in samples.values():
        assert (sample.task, sample.fields["attribute"]) == ("attcoseg", "colour")
        shown = [int(name.split("coco:")[1]) for name in sample.meta["image_ids"]]
        places = [i for i, coco_id in enumerate(shown) if coco_id in of_value[sample.fields["value"]]]
        assert 2 <= len(shown) <= 4
        assert len(set(shown)) == len(shown)
        assert len(places) >= 2
        numbers = [str(place + 1) for place in places]
        assert sample.fields["images"] == f"{', '.join(numbers[:-1])} and {numbers[-1]}"
        assert [region.image for region in sample.regions] == places
        assert sample.fields["targets"] == [region.object for region in sample.regions] == list(range(len(places)))
    assert {len(sample.images) for sample in samples.values()} == {2, 3, 4}


def test_masks_are_of_the_objects_of_the_value(build):
    samples = build("attcoseg", "train", write, *WORDS, "--set", "groups=40")
    masks = {
        sample.meta["image_ids"][region.image]: rle_to_mask(region.rle)
        for sample in samples.values()
        for region in sample.regions
    }
    cup = masks["vg:1013|coco:13"]  # the red cup, not the green bus
    assert cup.shape == (90, 120)
    assert cup[30:50, 45:75].all()
    assert not cup[60:].any()


def test_a_build_depends_on_the_seed_alone(build, tmp_path, command):
    build("attcoseg", "train", write, *WORDS)
    shard = (tmp_path / "data/attcoseg/train-000000.tar").read_bytes()
    common = (
        "--root",
        tmp_path / "root",
        "--split",
        "train",
        *WORDS[2:],
        "--set",
        f"masks={tmp_path / 'root' / 'instances.json'}",
    )
    assert command("attcoseg", *common, "--out", tmp_path / "same", "--workers", 2) == 0
    assert command("attcoseg", *common, "--out", tmp_path / "other", "--seed", 1) == 0
    assert (tmp_path / "same/train-000000.tar").read_bytes() == shard
    assert (tmp_path / "other/train-000000.tar").read_bytes() != shard


def test_negatives_with_an_object_of_the_same_name_come_first(tmp_path, picture):
    write(tmp_path, picture)
    options = SourceOptions(tmp_path, "train", settings={"masks": str(tmp_path / "instances.json"), "groups": "60"})
    source = load_attcoseg(options)
    group_of = {"bus": {14, 16}, "red": {11, 12, 13}}  # blue buses; images 11 and 12 show red buses
    for i in range(60):
        (draft,) = source.unit(i)
        shown = {int(name.split("coco:")[1]) for name in draft.sample.meta["image_ids"]}
        lacking = shown - group_of["red"]
        if draft.sample.fields["value"] == "red" and len(lacking) == 1 and 13 not in shown:
            assert lacking <= group_of["bus"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--set", "masks=no.json"], "expected a file of instances"),
        (["--set", "iou=high"], "expected a number"),
        (["--set", "attributes=smell"], "expected some of shape,colour,size,position"),
        (["--set", "names=maybe"], "expected one of check, ignore"),
    ],
)
def test_settings_are_checked(refusal, more, message):
    assert message in refusal("attcoseg", "train", write, *WORDS, *more)


def test_masks_of_other_images_are_named(refusal):
    def write_other(root, picture):
        write(root, picture)
        text = (root / "image_data.json").read_text()
        (root / "image_data.json").write_text(text.replace('"coco_id": 1', '"coco_id": 2'))

    message = refusal("attcoseg", "train", write_other, *WORDS)
    assert "got none in 0 images that are in both attributes.json and" in message
    assert "give masks of images that are in Visual Genome too" in message


# ---- the rules, image by image

LIMITS = Limits()


def thing(x, y, w, h, name="car", **more):
    return Thing((x, y, x + w, y + h), w * h / 10_000, name_words([name]), 0, **more)


def named(x, y, w, h, *attributes, thing=None, name="car"):
    return Named((x, y, x + w, y + h), name_words([name]), attributes, thing)


def find(objects, things, limits=LIMITS):
    return find_attributes(objects, things, read_words(), limits)


CAR = thing(10, 10, 40, 30)


def test_every_object_of_the_value_must_have_a_mask_or_be_part_of_one():
    own = named(10, 10, 40, 30, "red", thing=0)
    door, sign = named(20, 20, 10, 10, "red", name="door"), named(70, 10, 20, 20, "red", name="sign")
    assert find([own, door], [CAR]).examples == {("colour", "red"): [CAR]}
    findings = find([own, sign], [CAR])
    assert findings.examples == {}
    assert findings.left_out == {"without-mask": 1}
    assert find([own, sign], [CAR], Limits(outside=1)).examples == {("colour", "red"): [CAR]}
    assert find([sign], [CAR], Limits(outside=1)).left_out == {"without-mask": 1}


@pytest.mark.parametrize(
    ("attributes", "reason"),
    [
        ([("red", "blue")], None),  # an object of two hues is an example of neither
        ([("red and white",)], None),
        ([("red",), ("red and white",)], "two-values"),
        ([("dark red",), ("green",)], "two-values"),  # two descriptions of one object that disagree
    ],
)
def test_objects_of_two_hues_are_not_used(attributes, reason):
    findings = find([named(10, 10, 40, 30, *words, thing=0) for words in attributes], [CAR])
    assert findings.examples == {}
    assert set(findings.left_out) == ({reason} if reason else set())


def test_values_of_different_scales_do_not_exclude_each_other():
    findings = find([named(10, 10, 40, 30, "large", "tall", "light blue", thing=0)], [CAR])
    assert set(findings.examples) == {("size", "large"), ("size", "tall"), ("colour", "blue")}
    assert ("size", "small") in findings.counters
    assert ("size", "short") in findings.counters
    assert ("size", "wide") not in findings.counters  # nothing is said of width
    assert ("colour", "blue") not in findings.counters
    assert sum(attribute == "colour" for attribute, _ in findings.counters) == 10


def test_a_hint_of_a_value_keeps_an_image_from_being_its_negative():
    findings = find([named(10, 10, 40, 30, "red", thing=0), named(60, 60, 9, 9, "blue and white")], [CAR])
    assert ("colour", "blue") not in findings.counters
    assert ("colour", "white") not in findings.counters
    assert ("colour", "green") in findings.counters


@pytest.mark.parametrize(
    ("things", "reason"),
    [
        ([thing(0, 0, 5, 5)], "too-small"),
        ([thing(10, 10, 40, 30, crowd=True)], "too-many"),
        ([thing(10 * i, 10, 10, 30) for i in range(4)], "too-many"),
    ],
)
def test_small_many_and_crowds_are_left_out(things, reason):
    objects = [Named(t.box, t.words, ("red",), i) for i, t in enumerate(things)]
    assert find(objects, things).left_out == {reason: 1}


def test_positions_come_from_the_middles_of_boxes():
    findings = find([], [])
    left, right = thing(0, 40, 20, 20), thing(70, 40, 30, 20)
    find_positions([left, right], 100, 100, LIMITS, findings)
    assert findings.examples == {("position", "left"): [left], ("position", "right"): [right]}
    assert findings.counters == [("position", "top"), ("position", "bottom")]  # the middles are at half the height
    assert findings.left_out == {}


def test_sides_are_clear_or_not_used():
    findings = find([], [])
    find_positions([thing(30, 0, 20, 20)], 100, 100, LIMITS, findings)  # middle at x .4, y .1
    assert set(findings.examples) == {("position", "top")}
    assert findings.counters == [("position", "right"), ("position", "bottom")]
    assert findings.left_out == {"unclear-side": 1}


def test_names_of_box_and_mask_must_agree():
    person = thing(0, 0, 30, 60, "person man woman")
    box = (0.0, 0.0, 30.0, 50.0)
    assert find_thing(box, name_words(["shirt"]), [person], LIMITS) is None
    assert find_thing(box, name_words(["Men", "man"]), [person], LIMITS) == 0
    assert find_thing(box, name_words(["shirt"]), [person], Limits(names=False)) == 0
    assert find_thing((0.0, 0.0, 30.0, 30.0), name_words(["man"]), [person], LIMITS) is None  # IoU .5
