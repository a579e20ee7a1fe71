"""The mini set: same bytes for any number of processes, unambiguous questions, balanced answers, nothing leaked.

`meaning` is a second, independent reading of the mini world's language: it works on the words of an instruction and the
objects listed in `meta["scenes"]`, never on the builder's `Expression`.
"""

import hashlib
import json
import re
from collections import Counter

import numpy as np
import pytest

from vistallm.mini import build
from vistallm.mini.build import MiniRecipe, build_mini, ensure_mini, make_sample
from vistallm.mini.link_tasks import LINK_MAKERS, link_words
from vistallm.mini.scene import ATTRIBUTES, HELD_OUT, random_scene
from vistallm.mini.tasks import MAKERS, mini_words, point_of
from vistallm.regions.masks import rle_box, rle_to_mask
from vistallm.schema import PROMPT_SHAPES
from vistallm.tasks import TASKS, find_region, load_templates, render, split_placeholders

RECIPE = MiniRecipe(seed=11)
WORD = {value: name for name, values in ATTRIBUTES.items() for value in values}
WORD |= {("crosses" if shape == "cross" else shape + "s"): "shape" for shape in ATTRIBUTES["shape"]}
SIDES = {"left": (0, 1), "right": (0, -1), "top": (1, 1), "bottom": (1, -1)}


def singular(word):
    return "cross" if word == "crosses" else word.rstrip("s") if word not in ("cross",) else word


def objects(sample, image=0):
    names = (*ATTRIBUTES, "box")
    return [dict(zip(names, (*row[:4], row[4:]), strict=True)) for row in sample.meta["scenes"][image]]


def meaning(phrase, sample, image=0):
    """Indices of the objects that the words of a phrase mean."""
    words = re.findall(r"[a-z]+", phrase)
    said = {WORD[w]: singular(w) if WORD[w] == "shape" else w for w in words if w in WORD}
    found = [i for i, o in enumerate(objects(sample, image)) if all(o[k] == v for k, v in said.items())]
    side = next((s for s in SIDES if s in words or s + "most" in words), None)
    if side is None or not found:
        return found
    axis, sign = SIDES[side]
    centre = {
        i: sign * (objects(sample, image)[i]["box"][axis] + objects(sample, image)[i]["box"][axis + 2]) for i in found
    }
    return [i for i in found if centre[i] == min(centre.values())]


def samples(task, number, split="train"):
    return [make_sample(RECIPE, split, task, serial)[0] for serial in range(number)]


def boxes_of(sample):
    return [tuple(r.box) if r.box is not None else tuple(rle_box(r.rle)) for r in sample.regions]


@pytest.mark.parametrize("task", ["rec", "res", "grec", "gres"])
@pytest.mark.parametrize("split", ["train", "test"])
def test_expressions_mean_exactly_the_targets(task, split):
    empty = 0
    for sample in samples(task, 150, split):
        expected = sorted(tuple(objects(sample)[i]["box"]) for i in meaning(sample.fields["expr"], sample))
        assert sorted(boxes_of(sample)) == expected, (sample.fields["expr"], sample.meta["scenes"])
        assert len(expected) == len(sample.fields.get("targets", [0]))
        if sample.fields["expr"].startswith("the"):
            assert len(expected) <= 1
        if sample.fields["expr"].startswith("both"):
            assert len(expected) == 2
        empty += not expected
    assert empty == (45 if task in ("grec", "gres") else 0)


def test_region_captions_name_their_region():
    for sample in samples("reg", 150):
        for phrase in (sample.fields["expr"], *sample.meta["references"]):
            (index,) = meaning(phrase, sample)
            assert boxes_of(sample) == [tuple(objects(sample)[index]["box"])]


def count_asked(sample):
    phrase = re.search(r"How many (.*) are there", sample.fields["question"])[1]
    return len(meaning(phrase, sample))


def test_questions_have_their_answers():
    for sample in samples("vqa", 200, "test"):
        question, answer = sample.fields["question"], sample.fields["answer"]
        if sample.meta["asks"] == "count":
            assert int(answer) == count_asked(sample)
            continue
        words = question.replace(f"What {sample.meta['asks']}", "")
        (index,) = meaning(words, sample)
        assert objects(sample)[index][sample.meta["asks"]] == answer
        assert answer not in question.split()


@pytest.mark.parametrize("task", ["pointqa", "boxqa"])
def test_pointed_questions_have_their_answers(task):
    for sample in samples(task, 200):
        region = sample.regions[0]
        if task == "boxqa":
            (target,) = (o for o in objects(sample) if tuple(o["box"]) == tuple(region.box))
        else:
            x, y = region.point
            near = [o for o in objects(sample) if o["box"][0] < x < o["box"][2] and o["box"][1] < y < o["box"][3]]
            if len(near) != 1:
                continue  # boxes overlap: only the mask tells, see test_points_lie_in_their_object
            target = near[0]
        asks = sample.meta["asks"]
        if asks.startswith("same"):
            name = asks.split()[1]
            assert int(sample.fields["answer"]) == sum(o[name] == target[name] for o in objects(sample))
        else:
            assert sample.fields["answer"] == target[asks]


def test_candidates_hold_the_answer():
    for sample in samples("v7w", 100):
        (index,) = meaning(sample.fields["question"], sample)
        (target,) = sample.fields["targets"]
        assert tuple(sample.regions[target].box) == tuple(objects(sample)[index]["box"])
        assert len({tuple(r.box) for r in sample.regions}) == 4


def test_presence_is_true():
    for split in ("train", "test"):
        for sample in samples("pope", 200, split):
            found = meaning(sample.fields["question"], sample)
            assert (sample.fields["answer"] == "yes") == bool(found)


def test_choices_have_one_right_option():
    for first, second in zip(*[iter(samples("vcr", 200))] * 2, strict=True):
        assert first.meta["group"] == second.meta["group"]
        assert (first.meta["mode"], second.meta["mode"]) == ("q_a", "qa_r")
        options = [dict(re.findall(r"\(([A-D])\) ([^()]*)", s.fields["options"])) for s in (first, second)]
        assert all(len(set(o.values())) == 4 for o in options)
        asks = first.fields["question"].split()[1]
        (index,) = meaning(first.fields["question"].replace(f"What {asks}", ""), first)
        target = objects(first)[index]
        assert options[0][first.fields["answer"].strip("()")].strip() == target[asks]
        texture = "" if target["texture"] == "plain" else target["texture"] + " "
        reason = options[1][second.fields["answer"].strip("()")]
        assert f"a {target['size']} {texture}{target['colour']} {target['shape']}." in reason


def statement_holds(sample):
    text, numbers = sample.fields["statement"], {"one": 1, "two": 2, "three": 3, "four": 4}
    if "more objects" in text:
        left, right = len(objects(sample, 0)), len(objects(sample, 1))
        return left > right if text.startswith("The left") else right > left
    if "total" in text:
        words = text.split()
        return sum(len(meaning(words[3], sample, i)) for i in (0, 1)) == numbers[words[2]]
    words = text[text.index("contain") :]
    left, right = (bool(meaning(words, sample, i)) for i in (0, 1))
    first = text.split()[0] if text[0] in "BE" else text.split()[1]
    return {"Both": left and right, "left": left, "right": right, "Exactly": left != right}[first]


@pytest.mark.parametrize("split", ["train", "test"])
def test_statements_are_true_or_false_as_said(split):
    drawn = samples("nlvr2", 120, split)
    for sample in drawn:
        assert statement_holds(sample) == (sample.fields["answer"] == "True"), sample.fields
    for first, second in zip(*[iter(drawn)] * 2, strict=True):  # consistency needs one statement over several pairs
        assert first.fields["statement"] == second.fields["statement"]
        assert {first.fields["answer"], second.fields["answer"]} == {"True", "False"}


def test_common_objects_are_the_only_common_ones():
    for sample in samples("coseg", 60):
        images = range(len(sample.images))
        assert set.intersection(*({o["shape"] for o in objects(sample, i)} for i in images)) == {sample.meta["class"]}
        assert [r.image for r in sample.regions] == list(images)
        for image, box in zip(images, boxes_of(sample), strict=True):
            (one,) = (o for o in objects(sample, image) if o["shape"] == sample.meta["class"])
            assert tuple(one["box"]) == box


def at_side(box, info, value):
    axis, sign = SIDES[value]
    share = (box[axis] + box[axis + 2]) / 2 / (info.width, info.height)[axis]
    distance = share if sign > 0 else 1 - share
    assert not 0.37 < distance < 0.45  # no doubtful cases
    return distance < 0.4


def test_attribute_answers_name_the_right_images():
    for sample in samples("attcoseg", 100):
        name, value = sample.fields["attribute"], sample.fields["value"]
        expected = {}
        for image, info in enumerate(sample.images):
            for o in objects(sample, image):
                if at_side(o["box"], info, value) if name == "position" else o[name] == value:
                    expected.setdefault(image, []).append(tuple(o["box"]))
        assert all(len(found) == 1 for found in expected.values())
        assert [int(n) - 1 for n in re.findall(r"\d", sample.fields["images"])] == list(expected)
        assert [[box] for box in boxes_of(sample)] == list(expected.values())


def test_captions_name_every_object_from_left_to_right():
    for sample in samples("caption", 100):
        ordered = sorted(objects(sample), key=lambda o: (o["box"][0] + o["box"][2], o["box"][1] + o["box"][3]))
        said = re.findall(
            r"(small|large) (?:(striped|dotted) )?([a-z]+) ([a-z]+) (?:on|at|in)", sample.fields["caption"]
        )
        assert [(s, t or "plain", c, n) for s, t, c, n in said] == [
            (o["size"], o["texture"], o["colour"], o["shape"]) for o in ordered
        ]


def test_points_lie_in_their_object():
    rng = np.random.default_rng(0)

    for _ in range(100):
        scene = random_scene(rng)
        x, y = point_of(rng, scene, scene.focus).point
        assert scene.masks[scene.focus, int(y), int(x)]


def test_answers_are_balanced():
    assert Counter(s.fields["answer"] for s in samples("pope", 100, "test")) == {"yes": 50, "no": 50}
    assert Counter(s.fields["answer"] for s in samples("nlvr2", 100, "test")) == {"True": 50, "False": 50}
    letters = Counter(s.fields["answer"] for s in samples("vcr", 400))
    assert min(letters.values()) > 70
    places = Counter(s.fields["targets"][0] for s in samples("v7w", 200))
    assert min(places.values()) > 30
    by_question = {}
    for sample in samples("vqa", 700):
        by_question.setdefault(sample.meta["asks"], Counter())[sample.fields["answer"]] += 1
    for name, answers in by_question.items():
        values = ATTRIBUTES.get(name, ("0", "1", "2", "3"))
        assert set(answers) == set(values)
        assert min(answers.values()) > 0.5 * answers.total() / len(values), name


@pytest.mark.parametrize("task", MAKERS | LINK_MAKERS)
def test_training_never_shows_or_names_a_held_out_pair(task):
    pairs = re.compile("|".join(rf"{colour} {shape}" for shape, colour in HELD_OUT))
    for sample in samples(task, 60):
        assert not sample.meta["held_out"]
        assert not any((row[0], row[1]) in HELD_OUT for scene in sample.meta["scenes"] for row in scene)
        assert not pairs.search(" ".join(map(str, sample.fields.values())))
    held = np.mean([sample.meta["held_out"] for sample in samples(task, 100, "test")])
    assert 0.3 < held < 0.7


@pytest.mark.parametrize("task", MAKERS | LINK_MAKERS)
def test_words_are_all_listed(task):
    known = set(mini_words()) | (set(link_words()) if TASKS[task].mini_links else set())
    for text in (*load_templates(task, "mini"), TASKS[task].answer, TASKS[task].plural or ""):
        known |= set(re.findall(r"\w+|[^\w\s]", re.sub(r"\{[^}]*\}", " ", text)))
    for sample in samples(task, 40, "test"):
        for text in render(sample, 0):
            words = re.findall(r"\w+|[^\w\s]", re.sub(r"\{[^}]*\}", " ", text))
            assert set(words) <= known


def listed(sample):
    """(name, its regions) in the order of an answer's list; keypoint names are left out."""
    parts = split_placeholders(render(sample, 0)[1])
    pairs = [(word.strip(" ,"), slot) for word, slot in zip(parts[0::2], parts[1::2], strict=False)]
    return [(name, [find_region(sample, i, s.kind) for i in s.objects]) for name, s in pairs if s.keypoint is None]


@pytest.mark.parametrize("task", ["det", "insseg", "semseg", "count", "pose"])
@pytest.mark.parametrize("split", ["train", "test"])
def test_named_objects_are_all_that_the_names_mean(task, split):
    absent = several = 0
    for sample in samples(task, 150, split):
        names = [name for name, _ in listed(sample)]
        asked = sample.fields["names"].split(", ") if "names" in sample.fields else [sample.fields["expr"]]
        assert names == [singular(w) if task == "count" else w for w in asked] or task == "count"
        used = [i for name in names for i in meaning(name, sample)]
        assert len(used) == len(set(used)), "an object belongs to one name"
        for name, regions in listed(sample):
            boxes = [objects(sample)[i]["box"] for i in meaning(name, sample)]
            assert {region.label for region in regions} <= {name}
            if task == "semseg" and boxes:
                low, high = np.array(boxes)[:, :2].min(0), np.array(boxes)[:, 2:].max(0)
                boxes = [[*low.tolist(), *high.tolist()]]
            found = [tuple(r.box) if r.box is not None else tuple(rle_box(r.rle)) for r in regions]
            assert sorted(found) == sorted(map(tuple, boxes))
            assert [b[0] + b[2] for b in found] == sorted(b[0] + b[2] for b in found)
            absent, several = absent + (not boxes), several + (len(boxes) > 1)
    assert absent >= 14
    assert several >= (0 if task == "semseg" else 20)


def test_counts_and_prompts_come_up_equally_often():
    assert set(Counter(len(s.regions) for s in samples("count", 50)).values()) == {10}
    shown = Counter(re.search(r":(\w+)}", s.fields["prompt"])[1] for s in samples("interactive", 60))
    assert shown == dict.fromkeys(PROMPT_SHAPES, 10)
    assert all(s.meta["prompt"] in s.fields["prompt"] for s in samples("interactive", 12))


def test_the_other_image_holds_all_of_the_kind_of_the_example():
    for sample in samples("incontext", 60):
        example, *found = boxes_of(sample)
        (shown,) = (o for o in objects(sample) if tuple(o["box"]) == example)
        same = [o for o in objects(sample, 1) if (o["shape"], o["colour"]) == (shown["shape"], shown["colour"])]
        assert sorted(found) == sorted(tuple(o["box"]) for o in same)
        assert [r.image for r in sample.regions] == [0] + [1] * len(same)
        assert sample.fields["targets"] == list(range(1, len(same) + 1))


def test_keypoints_lie_where_their_names_say():
    hidden = []
    for sample in samples("pose", 150):
        names = sample.fields["points"].split(", ")
        for region in sample.regions:
            placed = dict(zip(names, np.array(region.keypoints), strict=True))
            middle = np.mean([p[:2] for p in placed.values()], 0)
            inside = rle_to_mask(region.rle)
            for name, (x, y, v) in placed.items():
                way = np.array([x, y]) - middle
                words = name.split()
                signs = [("right" in words) - ("left" in words), ("bottom" in words) - ("top" in words)]
                assert all(way[axis] * sign > 0 for axis, sign in enumerate(signs) if sign), (name, placed)
                if len(words) == 1:  # the other axis is the smaller one
                    assert abs(way[signs.index(0)]) < abs(way[1 - signs.index(0)])
                rows, columns = np.nonzero(inside)
                near = np.hypot(columns + 0.5 - x, rows + 0.5 - y).min()
                assert near < 4 if v == 2 else near > 0.5
                hidden.append(v == 1)
    assert 0.005 < np.mean(hidden) < 0.15


# Hashes of records from before the tasks of links came; an image's bytes also depend on OpenCV's encoder.
BEFORE = {
    "caption": "89a8a74660c1", "reg": "d52a63a4147b", "vqa": "80eae5965df5", "rec": "c8dadec9a730",
    "res": "ad6cdf5fbb2c", "grec": "abf1846e061e", "gres": "2fd0b4df97ca", "pointqa": "c583bd7ef0dc",
    "boxqa": "2a3bc6d8ca44", "v7w": "2867dfc2f726", "vcr": "11594e73aa38", "pope": "8d133f12baa0",
    "nlvr2": "b37c69e87aa8", "coseg": "d8850eaeec98", "attcoseg": "85044dfda226",
}  # fmt: skip


@pytest.mark.parametrize("task", BEFORE)
def test_older_tasks_keep_their_bytes(task):
    digest = hashlib.sha256()
    for serial in range(4):
        digest.update(json.dumps(make_sample(MiniRecipe(), "test", task, serial)[0].to_json()).encode())
    assert digest.hexdigest()[:12] == BEFORE[task]


def test_without_links_the_set_is_that_of_before():
    plans = [MiniRecipe(links=links).plan("train") for links in (False, True)]
    assert {task for task, _ in plans[0]} == set(MAKERS)
    assert set(plans[0]) == {(task, serial) for task, serial in plans[1] if task in MAKERS}
    assert hashlib.sha256(repr(plans[0]).encode()).hexdigest()[:12] == "633331b1c1ee"


def test_bytes_do_not_depend_on_the_number_of_processes(tmp_path):
    sizes = {"train": 60, "val": 15, "test": 15, "samples_per_shard": 20}
    one = build_mini(tmp_path / "one", workers=1, **sizes)
    two = build_mini(tmp_path / "two", workers=2, **sizes)
    assert one == two
    other = build_mini(tmp_path / "other", seed=1, workers=1, **sizes)
    assert {row["sha256"] for row in other["shards"].values()}.isdisjoint(r["sha256"] for r in one["shards"].values())


def test_ensure_mini_builds_once_and_again_for_another_recipe(tmp_path, monkeypatch):
    sizes = {"workers": 1, "train": 15, "val": 15, "test": 15}
    root = ensure_mini(tmp_path / "data" / "mini", **sizes)
    before = (root / "index.json").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(build.subprocess, "run", lambda *a, **k: pytest.fail("built twice"))
        ensure_mini(root, **sizes)
    ensure_mini(root, seed=4, **sizes)
    assert (root / "index.json").read_bytes() != before
    (root / "val-000000.tar").unlink()
    ensure_mini(root, seed=4, **sizes)
    assert (root / "val-000000.tar").is_file()
    assert not (tmp_path / "data" / ".mini.building").exists()


def test_ensure_mini_leaves_other_files_alone(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    with pytest.raises(ValueError, match="choose another folder"):
        ensure_mini(tmp_path / "mine", train=15, val=15, test=15)
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "x"


def test_two_part_objects_reach_the_mask_tasks():
    import cv2

    parts = [
        cv2.connectedComponents(rle_to_mask(s.regions[0].rle).astype(np.uint8))[0] - 1 for s in samples("res", 200)
    ]
    assert 0.04 < np.mean([n > 1 for n in parts]) < 0.25
