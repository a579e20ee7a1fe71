"""Texts of real datasets in templates: marks, case, doubled spaces, a tokeniser's spaces."""

import pytest

from vistallm.schema import ImageInfo, Sample
from vistallm.tasks import TASKS, load_templates, write_answer, write_instruction
from vistallm.tasks.texts import join, tidy


def prompt(task, template, **fields):
    (number,) = [i for i, line in enumerate(load_templates(task)) if line == template]
    return write_instruction(Sample("s", task, "test", [ImageInfo("0.jpg", 9, 9)], fields=fields), number)


@pytest.mark.parametrize(
    ("task", "template", "fields", "written"),
    [
        (
            "nlvr2",
            "{statement} Your answer, True or False?",
            {"statement": "One of the hands has  the fingers uncovered"},
            "One of the hands has the fingers uncovered. Your answer, True or False?",
        ),
        (
            "nlvr2",
            "{statement} Your answer, True or False?",
            {"statement": "Are there two dogs?"},
            "Are there two dogs? Your answer, True or False?",
        ),
        (
            "res",
            "Where is {expr}? Give the mask.",
            {"expr": "A man dressed in a red shirt and black pants."},
            "Where is a man dressed in a red shirt and black pants? Give the mask.",
        ),
        ("res", "Can you segment {expr} for me?", {"expr": "The TV."}, "Can you segment the TV for me?"),
        ("res", "Segment {expr}.", {"expr": "Santa's sleigh."}, "Segment Santa's sleigh."),
        ("res", "Segment {expr}.", {"expr": "Two young , White males"}, "Segment two young, White males."),
        ("res", "Segment {expr}.", {"expr": "a person ' s jacket"}, "Segment a person's jacket."),
        (
            "res",
            'Which mask fits the description "{expr}"?',
            {"expr": "A man."},
            'Which mask fits the description "A man"?',
        ),
        ("res", "{expr}: mask, please.", {"expr": "A man."}, "A man: mask, please."),
        (
            "res",
            "Read the description, then segment what it means: {expr}",
            {"expr": "A man."},
            "Read the description, then segment what it means: A man.",
        ),
        ("vqa_e", "{question} Back it up.", {"question": "how many dogs"}, "how many dogs? Back it up."),
        ("vqa_e", "{question} Back it up.", {"question": "Name the dog"}, "Name the dog. Back it up."),
        (
            "vqa_e",
            "{question} Back it up.",
            {"question": "What is at {regions:0} ?"},
            "What is at {regions:0}? Back it up.",
        ),
    ],
)
def test_prompts(task, template, fields, written):
    assert prompt(task, template, **fields) == written


def test_answers_keep_their_words():
    def answer(task, **fields):
        return write_answer(Sample("s", task, "test", [ImageInfo("0.jpg", 9, 9)], fields=fields))

    assert answer("vqa", answer="A few.") == "The answer is A few."
    assert answer("vqa", answer="...") == "The answer is ...."
    assert answer("vqa_e", explanation="a net is there", answer="net") == "a net is there. So the answer is net."
    assert answer("reg", expr="A man.") == "A man."


@pytest.mark.parametrize(
    "text",
    [
        "a man - far right",  # a dash
        "the boys' room",
        "the sign says ' stop '",
        "the one that says ' s '",
        "at 3:45 p.m., or .5 later",
        "first line\nsecond line",
        "A (B) {regions:0,1} c",
        "wait ... what",
        "",
    ],
)
def test_texts_that_stay(text):
    assert tidy(text) == text


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("she does n't look , does she ?", "she doesn't look, does she?"),
        ("A man {regions:0} in a hat {regions:1} .", "A man {regions:0} in a hat {regions:1}."),
        ("  the dog 's  ball", "the dog's ball"),
        ("they ' re here", "they're here"),
        ("the woman's bag ; red", "the woman's bag; red"),
    ],
)
def test_a_tokeniser_s_spaces_go(text, clean):
    assert tidy(text) == clean
    assert tidy(clean) == clean


def test_hyphens_are_joined_where_the_source_is_known_to_split_them():
    assert tidy("a person ' s candle - holder , black - and - white", tokenised=True) == (
        "a person's candle-holder, black-and-white"
    )


@pytest.mark.parametrize("task", [name for name, task in TASKS.items() if set(task.fields) & {"expr", "statement"}])
@pytest.mark.parametrize("text", ["A dog in red.", "a dog in red", "the  dog 's ball ."])
def test_no_template_doubles_a_mark_or_a_space(task, text):
    for line in load_templates(task):
        for name in ("expr", "statement"):
            before, field, after = line.partition(f"{{{name}}}")
            if field:
                written = before + join(before, name, text, after) + after
                for wrong in ("..", ".?", ".,", ".!", ".:", "  ", " .", "?.", " ,"):
                    assert wrong not in written, written
                assert not any(f"{stop} {word}" in written for stop in "." for word in ("or ", "and ", "from ", "is "))
