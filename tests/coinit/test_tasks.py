"""The task table and its templates: placeholders, rendering, and what a template file may hold."""

import random
import re

import pytest

from vistallm.coinit.tasks import TASKS, RegionSlot, find_task, load_templates, render, split_placeholders
from vistallm.schema import ImageInfo, Sample


def sample(task, fields=None, **values):
    return Sample("s", task, "test", [ImageInfo("0.jpg", 10, 10)], fields=fields or {}, **values)


def template_faults(task, lines):
    """What is wrong with a task's template lines: the rules that every file must keep."""
    faults = []
    squeezed = [re.sub(r"\W+", " ", line.lower()).strip() for line in lines]
    faults += [f"duplicate: {line}" for i, line in enumerate(lines) if squeezed[i] in squeezed[:i]]
    for line in lines:
        used = set(re.findall(r"\{([a-z_0-9]+)\}", line))
        faults += [f"{line}: lacks {name}" for name in set(TASKS[task].fields) - used]
        faults += [f"{line}: unknown field {name}" for name in used - set(TASKS[task].fields)]
        own = [part for part in split_placeholders(line) if isinstance(part, RegionSlot)]
        if bool(own) != TASKS[task].regions:
            faults.append(f"{line}: region placeholder expected: {TASKS[task].regions}")
        if re.sub(r"\{[a-z_0-9]+\}|\{regions:\d+\}", "", line).count("{"):
            faults.append(f"{line}: a brace that is no placeholder")
    return faults


@pytest.mark.parametrize("task", TASKS)
def test_templates_are_sound(task):
    lines = load_templates(task)
    assert bool(lines) != TASKS[task].own_texts
    assert len(lines) >= TASKS[task].mini
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
    for wrong in ("{regions:}", "{regions:a}", "x {regions:0,}", "{regions::cube}"):
        with pytest.raises(ValueError, match="placeholder"):
            split_placeholders(wrong)


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
