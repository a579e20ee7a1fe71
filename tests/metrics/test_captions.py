"""Captions: the words that the public tokeniser makes of a text, and CIDEr with them."""

import shutil

import numpy as np
import pytest

from vistallm.metrics import captions as C

PENN = {  # as pycocoevalcap's PTBTokenizer (Stanford CoreNLP 3.4.1) splits them
    "The dog's T-shirt, red!": "the dog 's t-shirt red",
    "There is a cat that doesn't move.": "there is a cat that does n't move",
    "I can't, they cannot, we're gonna": "i ca n't they can not we 're gon na",
    "People (two) at 5:30 p.m.; 3.5 or 1,000": "people -lrb- two -rrb- at 5:30 p.m. 3.5 or 1,000",
    "Mr. X's $5 sign & 50% off at St. Paul": "mr. x 's $ 5 sign & 50 % off at st. paul",
    'a black-and-white "stop" sign and/or 2nd one': "a black-and-white stop sign and/or 2nd one",
    "10 o'clock - wasn\u2019t it?": "10 o'clock was n't it",
}


@pytest.mark.parametrize(("text", "expected"), PENN.items())
def test_caption_tokens(text, expected):
    assert C.caption_tokens(text) == expected


@pytest.mark.skipif(shutil.which("java") is None, reason="the public tokeniser is a Java program")
def test_the_public_tokeniser_splits_the_same_and_gives_the_same_cider():
    references = [[text, "A red square on the left."] for text in PENN]
    answers = [*list(PENN)[1:], None]
    public = C.cider_scores(answers, references, public=True)
    assert public is not None
    assert np.array_equal(C.cider_scores(answers, references), public)
    assert C.spice_scores([], []) is None


def test_cider_orders_captions_and_forgives_case():
    references = [["a red square on the left"], ["two blue circles"], ["a small green star"]]
    exact, wrong, missing = C.cider_scores(["A red square on the left.", "a green star", None], references)
    assert exact == pytest.approx(10)
    assert wrong == 0
    assert missing == 0
    assert C.cider_scores([], []).shape == (0,)
