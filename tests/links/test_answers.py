"""Answers by links: what the grammar lets random models write, and what is read of it."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask
from torch.nn import functional as F

from vistallm.config import load_config
from vistallm.data.sequence import build_codec
from vistallm.data.vocabulary import Vocabulary
from vistallm.evaluate.grammar import AnswerGrammars, Rule
from vistallm.evaluate.links import full_mask, read_link_answer
from vistallm.links import read_links
from vistallm.links.decoder import LinkAnswer
from vistallm.model.vistallm import ForcedSlots
from vistallm.regions.codec import RegionCodec
from vistallm.regions.letterbox import Letterbox
from vistallm.tasks import TASKS

WORDS = "model.links=all model.encoder.weights= model.tokenizer.weights= num_bins=33 points=6".split()  # noqa: SIM905
RULES = {
    "res": Rule("mask", True, 1, (TASKS["res"].answer,), link="GRD"),
    "gres": Rule("mask", False, 1, (TASKS["gres"].answer,), link="GRD"),
    "attcoseg": Rule("mask", False, 3, (TASKS["attcoseg"].answer,), link="SEG"),
    "det": Rule("box", False, 1, words="list", link="DET"),
    "pose": Rule("keypoints", False, 1, words="list", link="POSE"),
}


@functools.cache
def parts():
    config = load_config(WORDS)
    vocabulary = Vocabulary.build(config.model, build_codec(config), config.links)
    return vocabulary, AnswerGrammars(vocabulary, 6, 60)


def write(rules, seed, favour=3.0):
    """Answers from random scores that favour links, marks and the end."""
    vocabulary, grammars = parts()
    lm, generator = vocabulary.lm, torch.Generator().manual_seed(seed)
    liked = torch.zeros(len(lm))
    liked[[ids[0] for ids in vocabulary.link_ids]] = favour
    liked[[lm.eos_token_id, *(lm.get_vocab()[mark] for mark in (",", ".", "image"))]] = favour
    grammar, ids = grammars.constrain(rules), torch.zeros(len(rules), 0, dtype=torch.long)
    forced = ForcedSlots(torch.tensor(vocabulary.link_ids), len(lm))
    for _ in range(grammar.limit):
        scores = grammar(ids, forced(ids, torch.randn(len(rules), len(lm), generator=generator) + liked))
        ids = torch.cat([ids, scores.argmax(-1, keepdim=True)], 1)
        if (ids == lm.eos_token_id).any(1).all():
            break
    rows = [row[: row.index(lm.eos_token_id)] for row in ids.tolist()]
    return [str(lm.decode(row)) for row in rows]


def found(count, objects=2):
    return [
        LinkAnswer(
            torch.tensor([0.9] * objects), torch.rand(objects, 4).sort(1).values, torch.randn(objects, 8, 8), None
        )
    ] * count


@pytest.mark.parametrize("task", RULES)
def test_answers_of_random_models_are_readable(task):
    letterboxes = [Letterbox(40, 30, 40)] * RULES[task].images
    texts = [text for seed in range(3) for text in write([RULES[task]] * 40, seed)]
    counts = set()
    for text in texts:
        links = read_links(text)
        parsed, failure = read_link_answer(text, found(len(links)), letterboxes, TASKS[task])
        assert failure is None, text
        assert {link.kind for link in links} == {RULES[task].link}
        counts.add(len(links))
        if RULES[task].words == "list":
            assert all(link.phrase for link in links), "a link stands behind a phrase"
        if task == "attcoseg":
            images = [link.image for link in links]
            assert images == sorted(set(images))
    assert len(texts) == 120
    assert (counts == {1}) == (task in ("res", "gres")), counts


def test_text_answers_of_a_model_with_links_hold_none():
    codec = RegionCodec(num_bins=33, points=6)
    rules = [
        Rule("box", False, 1, words="list"),
        Rule("mask", False, 1, (TASKS["gres"].answer,)),
        Rule(None, words="some"),
    ]
    for text in write(rules * 30, 7):
        assert not read_links(text), text
        codec.decode(text, [Letterbox(40, 30, 40)], labels=True)


def test_phrases_become_labels_of_regions_in_original_pixels():
    text = "red star [DET] [DET_1] [DET_2] [DET_3] [DET_4] , circle [DET] [DET_1] [DET_2] [DET_3] [DET_4] ."
    boxes = torch.tensor([[0.25, 0.25, 0.5, 0.75], [0.0, 0.0, 1.0, 1.0]])
    answers = [
        LinkAnswer(torch.tensor([0.9, 0.04]), boxes, torch.zeros(2, 8, 8), None),
        LinkAnswer(torch.tensor([0.2, 0.1]), boxes, torch.zeros(2, 8, 8), None),
    ]
    parsed, _ = read_link_answer(text, answers, [Letterbox(80, 40, 64)], TASKS["det"])
    # the square is 80 pixels a side with 20 above and below the image
    assert [(r.label, r.box, r.confidence) for r in parsed.regions] == [
        ("red star", (20, 0, 40, 40), pytest.approx(0.9)),
        ("circle", (20, 0, 40, 40), pytest.approx(0.2)),
        ("circle", (0, 0, 80, 40), pytest.approx(0.1)),
    ]
    assert parsed.answer == "red star [0], circle []."
    assert read_link_answer(text, answers[:1], [Letterbox(80, 40, 64)], TASKS["det"]) == (None, "cut-link")
    assert read_link_answer("nothing", [], [Letterbox(80, 40, 64)], TASKS["det"]) == (None, "no-region")
    assert read_link_answer("image 2: [SEG]", answers[:1], [Letterbox(8, 4, 64)], TASKS["coseg"]) == (None, "bad-image")


def test_keypoints_belong_to_the_objects_before_them():
    text = "star [POSE] [POSE_1], top [POSE] [POSE_1], left [POSE] [POSE_1]."
    scores, boxes, masks = torch.tensor([0.8, 0.6]), torch.rand(2, 4).sort(1).values, torch.zeros(2, 8, 8)
    top, left = (torch.tensor([[x, 0.5, 0.9], [x + 0.1, 0.5, 0.9]]) for x in (0.25, 0.5))
    answers = [LinkAnswer(scores, boxes, masks, points) for points in (None, top, left)]
    parsed, _ = read_link_answer(text, answers, [Letterbox(100, 100, 64)], TASKS["pose"])
    assert [region.label for region in parsed.regions] == ["star", "star"]
    assert parsed.answer == "star [0, 1], top, left."
    expected = [[(25, 50), (50, 50)], [(35, 50), (60, 50)]]
    for region, points in zip(parsed.regions, expected, strict=True):
        np.testing.assert_allclose([p[:2] for p in region.keypoints], points, atol=1e-3)


def test_a_mask_is_drawn_on_the_original_image():
    """Against torch's bilinear resize of the whole square, cut out."""
    logits, box = torch.randn(12, 12), Letterbox(90, 60, 24)
    square = F.interpolate(logits[None, None], size=(90, 90), mode="bilinear", align_corners=False)[0, 0]
    drawn = coco_mask.decode(full_mask(logits, box)).astype(bool)
    assert drawn.shape == (60, 90)
    assert (drawn != (square[15:75] > 0).numpy()).mean() < 1e-3
