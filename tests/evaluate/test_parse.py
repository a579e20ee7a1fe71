"""Answers of every task: perfect ones are read back, spoilt ones are refused with their reason."""

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vistallm.evaluate.generate import read_answer
from vistallm.regions.codec import RegionCodec
from vistallm.regions.letterbox import Letterbox
from vistallm.regions.masks import box_of
from vistallm.tasks import TASKS
from vistallm.tasks.answers import READERS

FRAME = Letterbox(100, 80, 112)
CODEC = RegionCodec(num_bins=101, points=12)
MASK = "<m_st><bin_10><bin_20><bin_50><bin_20><bin_50><bin_60><m_ed>"
BOX = "<b_st><bin_10><bin_20><bin_50><bin_60><b_ed>"
POINT = "<p_st><bin_10><bin_20><p_ed>"


def read(text, task, letterboxes=(FRAME,)):
    return read_answer(text, letterboxes, CODEC, TASKS[task])


def test_every_task_has_a_reader():
    for task in TASKS.values():
        assert task.kind != "text" or task.metric in READERS, task.name


def test_perfect_answers_of_every_task_are_read(predictions, samples):
    for prediction, sample in zip(predictions, samples, strict=True):
        assert prediction.failure is None, (prediction.task, prediction.text)
        kind = TASKS[prediction.task].kind
        assert prediction.parsed.kind == kind
        if kind == "box":
            wanted = [sample.regions[i] for i in sample.fields.get("targets", [0])]
            for region, truth in zip(prediction.parsed.regions, wanted, strict=True):
                assert box_of(region) == pytest.approx(box_of(truth), abs=0.5)
        if kind == "mask":
            assert all(region.polygons for region in prediction.parsed.regions)
            assert [r.image for r in prediction.parsed.regions] == [r["image"] for r in prediction.target["regions"]]
        if kind == "text" and "answer" in sample.fields:
            assert prediction.parsed.answer == sample.fields["answer"].strip("()")


@pytest.mark.parametrize(
    ("text", "task", "answer"),
    [
        ("The answer is red.", "vqa", "red"),
        ("It is warm. So the answer is  hot.", "vqa", "hot"),
        ("red", "vqa", "red"),
        ("The answer is (B).", "vcr", "B"),
        ("C", "vcr", "C"),
        ("The answer is no.", "pope", "no"),
        ("Yes, there is.", "pope", "yes"),
        ("There is not one. Yes.", "pope", "no"),
        ("That is False.", "nlvr2", "False"),
        ("that is true", "nlvr2", "True"),
        ("A red star.", "caption", "A red star."),
    ],
)
def test_words(text, task, answer):
    parsed, failure = read(text, task)
    assert failure is None
    assert parsed.answer == answer


@pytest.mark.parametrize(
    ("text", "task", "reason"),
    [
        ("", "caption", "empty"),
        ("The answer is .", "vqa", "empty"),
        ("The answer is the red one.", "vcr", "no-choice"),
        ("A star.", "pope", "no-yes-or-no"),
        ("True or False", "nlvr2", "no-true-or-false"),
        ("It is untrue.", "nlvr2", "no-true-or-false"),
        ("The mask is there.", "res", "no-region"),
        (BOX, "res", "wrong-kind"),
        (MASK, "rec", "wrong-kind"),
        ("<b_st><b_ed>", "rec", "wrong-count"),
        (BOX.replace("<b_ed>", "<b_sep>") + BOX[6:], "rec", "wrong-count"),
        (MASK[:-6], "res", "unclosed"),
        (MASK.replace("<bin_10>", ""), "res", "odd-count"),
        ("<m_st><bin_1><bin_2><m_ed>", "res", "too-few-points"),
        (MASK.replace("<bin_10>", "<bin_101>"), "res", "bad-bin"),
    ],
)
def test_unreadable(text, task, reason):
    assert read(text, task) == (None, reason)


def test_several_images():
    letterboxes = [FRAME, Letterbox(40, 60, 112)]
    assert read(MASK, "coseg", letterboxes)[1] == "no-image"
    assert read(f"image 3: {MASK}", "coseg", letterboxes)[1] == "bad-image"
    parsed, _ = read(f"The images are 1 and 2. image 1: {MASK} image 2: {MASK}", "attcoseg", letterboxes)
    assert [region.image for region in parsed.regions] == [0, 1]


def test_spaces_that_a_tokenizer_adds_change_nothing(predictions, codec):
    for prediction in predictions:
        letterboxes = [Letterbox(i["width"], i["height"], 112) for i in prediction.images]
        spaced = re.sub(r"([.,:()]|<[^>]+>)", r" \1 ", prediction.text)
        parsed, failure = read_answer(spaced, letterboxes, codec, TASKS[prediction.task])
        assert failure is None, spaced
        assert [r.to_json() for r in parsed.regions] == [r.to_json() for r in prediction.parsed.regions]
        if prediction.task not in ("caption", "reg") and parsed.kind == "text":
            assert parsed.answer == prediction.parsed.answer


def test_an_empty_pair_says_no_target():
    for text, task in (("<m_st><m_ed>", "gres"), ("<b_st><b_ed>", "grec")):
        parsed, failure = read(text, task)
        assert failure is None
        assert parsed.regions == []


def test_candidates_may_be_pointed_at():
    parsed, failure = read(f"The answer is {POINT}.", "v7w")
    assert failure is None
    assert np.allclose(parsed.regions[0].point, (10, 10), atol=0.5)  # the 100 x 80 image lies 10 px down in its square


tokens = [
    "<m_st>",
    "<m_ed>",
    "<m_sep>",
    "<m_part>",
    "<b_st>",
    "<b_ed>",
    "<bin_1>",
    "<bin_50>",
    "<bin_99>",
    " ",
    "image 1: ",
    "no",
    "(A)",
]


@given(st.lists(st.sampled_from(tokens), max_size=25).map("".join), st.sampled_from(sorted(TASKS)))
def test_any_text_is_read_or_refused_never_raised(text, task):
    parsed, failure = read(text, task)
    assert (parsed is None) == (failure is not None)
