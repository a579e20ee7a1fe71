"""Scores on words: hand-worked cases of the public evaluations and brute-force references."""

import doctest

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vistallm.metrics import words as W


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
    assert W.normalise_vqa(text) == expected


def test_vqa_accuracy_is_the_leave_one_out_mean():
    assert W.vqa_accuracy("red", ["red"] * 10) == 1
    assert W.vqa_accuracy("blue", ["red"] * 10) == 0
    # two of ten say it: those two see one other, the eight see both
    assert W.vqa_accuracy("red", ["red"] * 2 + ["pink"] * 8) == pytest.approx((2 * 1 / 3 + 8 * 2 / 3) / 10)


@given(st.lists(st.sampled_from(["a", "red", "2"]), min_size=1, max_size=10), st.sampled_from(["red", "2", "x"]))
def test_vqa_accuracy_equals_the_loop(references, answer):
    loop = [
        min(1, sum(other == answer for j, other in enumerate(references) if j != i) / 3) for i in range(len(references))
    ]
    assert W.vqa_accuracy(answer, references) == pytest.approx(np.mean(loop))


def test_docstring_numbers():
    assert doctest.testmod(W) == (0, 2)
