"""Scores on words: hand-worked cases of the public evaluations and brute-force references."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vistallm.metrics import answers as A


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Yes.", "yes"),
        ("A red, round ball", "red round ball"),
        ("1,000", "1000"),
        ("3.5 metres.", "3.5 metres"),
        ("black/white", "black white"),
        ("None", "0"),
        ("isnt it", "isn't it"),
        ("don't", "don't"),
        ("couldnt've", "couldn't've"),
        ("T-shirt!", "t shirt"),
    ],
)
def test_vqa_normal_form(text, expected):
    assert A.normalise_vqa(text) == expected


def test_vqa_accuracy_is_the_leave_one_out_mean():
    assert A.vqa_accuracy("red", ["red"] * 10) == 1
    assert A.vqa_accuracy("blue", ["red"] * 10) == 0
    # two of ten say it: those two see one other, the eight see both
    assert A.vqa_accuracy("red", ["red"] * 2 + ["pink"] * 8) == pytest.approx((2 * 1 / 3 + 8 * 2 / 3) / 10)


@given(st.lists(st.sampled_from(["a", "red", "2"]), min_size=1, max_size=10), st.sampled_from(["red", "2", "x"]))
def test_vqa_accuracy_equals_the_loop(references, answer):
    loop = [
        min(1, sum(other == answer for j, other in enumerate(references) if j != i) / 3) for i in range(len(references))
    ]
    assert A.vqa_accuracy(answer, references) == pytest.approx(np.mean(loop))


def test_yes_no_scores_by_hand_and_unreadable_is_wrong():
    scores = A.yes_no_scores(["yes", "yes", "no", "no", None, None], ["yes", "no", "no", "yes", "yes", "no"])
    assert scores == {
        "accuracy": pytest.approx(2 / 6),
        "precision": pytest.approx(1 / 3),
        "recall": pytest.approx(1 / 3),
        "f1": pytest.approx(1 / 3),
        "yes_share": pytest.approx(2 / 6),
    }
    assert A.yes_no_scores([], [])["f1"] is None
    assert A.yes_no_scores(["no"], ["no"])["precision"] is None


def test_all_right_share_counts_groups():
    assert A.all_right_share([True, False, True], ["x", "x", "y"]) == 0.5
    assert A.all_right_share([], []) is None


def test_choice_scores_need_both_parts_for_q_ar():
    right = [True, True, True, False, True]
    parts = ["q_a", "qa_r", "q_a", "qa_r", "q_a"]
    scores = A.choice_scores(right, parts, ["1", "1", "2", "2", "3"])
    assert scores == {"q_a": 1.0, "qa_r": 0.5, "q_ar": 0.5}
    assert A.choice_scores([True], ["q_a"], ["1"]) == {"q_a": 1.0, "qa_r": None, "q_ar": None}
