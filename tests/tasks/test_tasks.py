"""The task table and its templates: placeholders, rendering, and what a template file may hold."""

import random
import re

import pytest

from vistallm.schema import ImageInfo, Region, Sample
from vistallm.tasks import TASKS, RegionSlot, find_task, load_templates, render, split_placeholders


def sample(task, fields=None, **values):
    return Sample("s", task, "test", [ImageInfo("0.jpg", 10, 10)], fields=fields or {}, **values)


# Words that would ask for another answer than the one that is trained on, by what the task answers.
_AREA = r"segment|mask|pixel|polygon|silhouette|contour|outline|trace|cut .*out"
_BOX, _POINT = r"\bbox|rectangle|frame\b", r"\b(a|by|with|your) points?\b|\bpoint at|click|\btap\b|coordinate"
_SHORT = r"in (a|one|a single) word|single word|one word|briefly|short answer|no explanation"
_LONG = r"explain|explanation|reason|justif|why\b|full sentence|in detail|paragraph"
_OTHER_FORM = r"yes or no|true or false|a letter|the letter|by letter"
_MANY = r"\bboxes|\bmasks|\bif any|\bnone\b|\bevery (match|one)|\ball (the|that)|or nothing"
_OPEN = r"\bany|none|nothing|\bif\b|you find|may not|possibly|perhaps|even|whatever|empty|no match|wherever|in case"
_ALWAYS = r"\d|\[|\]|\(|coordinates|number of points|json|bullet"
CONTRADICTIONS = {
    "caption": (_AREA, _BOX, _POINT, _OTHER_FORM, r"one word|in detail|paragraph|sentences"),
    "reg": (_AREA, _POINT, _OTHER_FORM, r"one word|in detail|sentence"),
    "vqa": (_AREA, _BOX, _POINT, _OTHER_FORM, _LONG),
    "vqa_e": (_AREA, _BOX, _POINT, _OTHER_FORM, _SHORT, r"then explain|answer first|only the answer"),
    "rec": (_AREA, _POINT, _OTHER_FORM, _MANY),
    "res": (_BOX, _POINT, _OTHER_FORM, _MANY),
    "grec": (_AREA, _POINT, _OTHER_FORM, r"the (object|person|thing)\b|\bone box\b|the single"),
    "gres": (_BOX, _POINT, _OTHER_FORM, r"the (object|person|thing)\b|\bone mask\b|the single"),
    "pointqa": (_AREA, _BOX, _OTHER_FORM, _LONG.replace("explanation|", "")),
    "boxqa": (_AREA, _POINT, _OTHER_FORM, _LONG.replace("explanation|", "")),
    "v7w": (_AREA, _POINT, _OTHER_FORM, _LONG, r"\bnone\b|if any|all that"),
    "v7w_point": (_AREA, r"\bbox", _OTHER_FORM, _LONG, r"\bnone\b|if any|all that|points\b"),
    "vcr": (_AREA, _BOX, _POINT, _LONG, r"yes or no|true or false|one word|options (are|that) right"),
    "pope": (_AREA, _BOX, _POINT, _LONG, r"true or false|a letter|one word|how many"),
    "nlvr2": (_AREA, _BOX, _POINT, _LONG, r"yes or no|one word|a letter|\b(this|the) image\b"),
    "coseg": (_BOX, _POINT, _OTHER_FORM, r"which (of the )?images|name the images|if any"),
    "attcoseg": (
        _BOX,
        _POINT,
        _OTHER_FORM,
        r"if any|several images|not all of them|(show|in|of) every image|all (of the )?images have",
    ),
    "flickr": (_AREA, _POINT, _OTHER_FORM, r"one word|in detail|if any"),
    "det": (_AREA, _POINT, _OTHER_FORM, r"\bthe object\b|\bone box\b"),
    "insseg": (_BOX, _POINT, _OTHER_FORM, r"one mask of|pixels"),
    "semseg": (_BOX, _POINT, _OTHER_FORM, r"(each|every) (one|object|instance)"),
    "count": (_AREA, _OTHER_FORM, r"if any|\bnone\b|in a word|a number"),
    "interactive": (_BOX, _OTHER_FORM, r"\bmasks\b|if any"),
    "incontext": (_BOX, _POINT, _OTHER_FORM),
    "pose": (_AREA, _BOX, _OTHER_FORM),
    "video_ref": (r"\bbox|rectangle", _POINT, _OTHER_FORM),
    "video_grounding": (_AREA, _POINT, _OTHER_FORM),
    "video_qa": (_AREA, r"\bbox|rectangle", _POINT, _OTHER_FORM, _LONG),
}
# What at least one word of every template must ask for, or leave open.
ASKED = {
    "rec": r"box|rectangle|detect",
    "grec": _OPEN,
    "gres": _OPEN,
    "res": _AREA + "|separate|isolate|recolour",
    "coseg": _AREA + "|separate|mark the object",
    "attcoseg": f"(image|picture|photo).*({_AREA})|({_AREA}).*(image|picture|photo)",
    "flickr": r"box",
    "det": r"box|detect",
    "insseg": r"segment|mask|outline|cut",
    "semseg": r"segment|mask|region|pixels",
    "count": r"count|how many|total",
    "interactive": _AREA,
    "incontext": r"other image",
    "pose": r"point|locate|\bpose\b|mark|where|find",
    "video_ref": _AREA,
    "video_grounding": r"box|tube",
    "v7w_point": r"point|click|tap|finger|touch",
    "nlvr2": r"true.*false|false.*true",
    "vqa_e": r"expla|reason|justif|why|how (do )?(you|one)|evidence|know|support|think so|argue|convince|follows|show"
    r"|matter|back it up|leads|tells us|visible|think|which detail|how can",
}


def template_faults(task, lines):
    """What is wrong with a task's template lines: the rules that every file must keep."""
    faults = []
    squeezed = [re.sub(r"\W+", " ", line.lower()).strip() for line in lines]
    faults += [f"duplicate: {line}" for i, line in enumerate(lines) if squeezed[i] in squeezed[:i]]
    for line in lines:
        used = re.findall(r"\{([a-z_0-9]+)\}", line)
        faults += [f"{line}: lacks {name}" for name in set(TASKS[task].fields) - set(used)]
        faults += [f"{line}: unknown field {name}" for name in set(used) - set(TASKS[task].fields)]
        faults += [f"{line}: {name} twice" for name in set(used) if used.count(name) > 1]
        own = [part for part in split_placeholders(line) if isinstance(part, RegionSlot)]
        if len(own) != TASKS[task].regions:
            faults.append(f"{line}: region placeholder expected: {TASKS[task].regions}")
        plain = re.sub(r"\{[a-z_0-9]+\}|\{regions:\d+\}", "_", line)
        if "{" in plain or "}" in plain:
            faults.append(f"{line}: a brace that is no placeholder")
        for pattern in (_ALWAYS, *CONTRADICTIONS[task]):
            if found := re.search(pattern, plain.lower()):
                faults.append(f"{line}: {found[0]!r} contradicts the answer form")
        if not re.search(ASKED.get(task, ""), plain.lower()):
            faults.append(f"{line}: does not ask for what is answered")
    return faults


@pytest.mark.parametrize("task", TASKS)
def test_templates_are_sound(task):
    lines = load_templates(task)
    assert len(lines) >= (0 if TASKS[task].own_texts else 12 if TASKS[task].mini_links or TASKS[task].video else 40)
    assert template_faults(task, lines) == []


@pytest.mark.parametrize(
    ("task", "lines"),
    [
        ("res", ["Segment {expr}.", "segment {expr}"]),  # the same but for case and stop
        ("res", ["Segment it."]),
        ("res", ["Segment {expr} {nothing}."]),
        ("reg", ["Describe it."]),
        ("res", ["Segment {expr} in {regions:0}."]),
        ("res", ["Segment {expr} {Regions:0}."]),
        ("res", ["Segment {expr}, that is {expr}."]),
        ("res", ["Segment {expr} and give its box."]),
        ("res", ["Segment {expr}, if any."]),
        ("res", ["Segment {expr} with 16 points."]),
        ("rec", ["Give the box of {expr} as [x0,y0,x1,y1]."]),
        ("rec", ["Where is {expr}?"]),
        ("rec", ["Point at {expr} and box it."]),
        ("gres", ["Segment {expr}."]),
        ("gres", ["Segment the object called {expr}, if any."]),
        ("vqa", ["Explain: {question}"]),
        ("vqa_e", ["{question} Explain in one word."]),
        ("reg", ["Describe {regions:0} with one word."]),
        ("pope", ["{question} True or False?"]),
        ("nlvr2", ["{statement} Yes or no?"]),
        ("attcoseg", ["Segment {attribute} {value}."]),
        ("flickr", ["Describe the image."]),
        ("det", ["Segment {names}."]),
        ("insseg", ["Box {names}."]),
        ("incontext", ["Here is {prompt}. Segment it."]),
    ],
)
def test_template_faults_are_seen(task, lines):
    assert template_faults(task, lines)


def test_split_placeholders():
    assert split_placeholders("a {regions:0,2}{regions::mask} b {regions:1:point}.") == [
        "a ",
        RegionSlot([0, 2]),
        RegionSlot([], "mask"),
        " b ",
        RegionSlot([1], "point"),
        ".",
    ]
    assert split_placeholders("no place {here}") == ["no place {here}"]
    assert split_placeholders("{region:3:circle} and {region:0}: top {point:2}") == [
        RegionSlot([3], shape="circle"),
        " and ",
        RegionSlot([0], shape="mask"),
        ": top ",
        RegionSlot([], keypoint=2),
    ]
    wrong_links = ("{region:0,1}", "{region:0:cube}", "{point:0,1}")
    for wrong in ("{regions:}", "{regions:a}", "x {regions:0,}", "{regions::cube}", *wrong_links):
        with pytest.raises(ValueError, match="placeholder"):
            split_placeholders(wrong)


def test_keypoints_are_stored():
    region = Region(0, "keypoints", box=(0.0, 1.0, 5.0, 9.0), keypoints=((1.5, 2.0, 2), (3.25, 4.0, 0)), label="star")
    assert Region.from_json(region.to_json()) == region
    for keypoints in ([[1, 2]], [[1, 2, 3]], [[1, float("nan"), 2]]):
        with pytest.raises(ValueError, match="expected finite \\(x, y, v\\)"):
            Region.from_json(region.to_json() | {"keypoints": keypoints})
    with pytest.raises(ValueError, match="a keypoints region needs its keypoints field"):
        Region.from_json({"kind": "keypoints", "box": [0, 1, 5, 9]})


@pytest.mark.parametrize(
    ("task", "fields", "answer"),
    [
        ("gres", {"targets": []}, "The mask is {regions::mask}."),
        ("gres", {"targets": [0]}, "The mask is {regions:0}."),
        ("gres", {"targets": [0, 1]}, "The masks are {regions:0,1}."),
        ("grec", {"targets": []}, "The bounding box is {regions::box}."),
        ("rec", {}, "The bounding box is {regions:0}."),
        ("pope", {"answer": "yes"}, "The answer is yes."),
        ("nlvr2", {"answer": "True"}, "That is True."),
        ("vqa_e", {"explanation": "It rains.", "answer": "wet"}, "It rains. So the answer is wet."),
        ("v7w_point", {"targets": [2]}, "The answer is {regions:2}."),
        ("flickr", {"caption": "A man {regions:0} smiles."}, "A man {regions:0} smiles."),
        ("attcoseg", {"images": "2", "targets": [0]}, "The image is 2. The mask is {regions:0}."),
        (
            "det",
            {"found": "star {regions:0,1}, red cross {regions::box}"},
            "star {regions:0,1}, red cross {regions::box}.",
        ),
        ("incontext", {"targets": [1, 2]}, "The masks are {regions:1,2}."),
        ("attcoseg", {"images": "2 and 3", "targets": [0, 1]}, "The images are 2 and 3. The masks are {regions:0,1}."),
    ],
)
def test_answer_forms(task, fields, answer):
    filled = dict.fromkeys(TASKS[task].fields, "x") | fields
    assert render(sample(task, filled), 0)[1] == answer


def test_render_draws_templates_and_keeps_own_texts():
    one = sample("res", {"expr": "the {odd} star"})
    assert render(one, 0)[0] == load_templates("res")[0].replace("{expr}", "the {odd} star")
    rng = random.Random(0)
    drawn = {render(one, rng=rng)[0] for _ in range(300)}
    assert len(drawn) == len(load_templates("res"))
    few = {render(one, rng=rng, templates=2)[0] for _ in range(50)}
    assert few == {line.replace("{expr}", "the {odd} star") for line in load_templates("res")[:2]}
    assert render(sample("res", instruction="Do {it}", answer="Done"), None) == ("Do {it}", "Done")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: find_task("rez"), "expected one of caption"),
        (lambda: render(sample("instruct"), 0), "its own instruction"),
        (lambda: render(sample("res"), 0), "needs field 'expr'"),
        (lambda: render(sample("res", {"expr": "x"}), 99), "expected 0 to"),
        (lambda: render(sample("res", {"expr": "x"})), "template number or an rng"),
    ],
)
def test_errors_name_what_is_wrong(call, message):
    with pytest.raises(ValueError, match=message):
        call()
