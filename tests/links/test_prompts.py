"""Region prompts: what is drawn on a mask, and its embedding."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch

from vistallm.links.prompts import PROMPT_SHAPES, RegionEncoder, draw_prompt

BLOB = np.zeros((60, 80), np.uint8)
cv2.ellipse(BLOB, (35, 25), (20, 12), 30, 0, 360, 1, -1)
cv2.rectangle(BLOB, (60, 40), (70, 55), 1, -1)  # a second part
ONE = np.zeros((9, 7), bool)
ONE[8, 6] = True


@pytest.mark.parametrize("shape", PROMPT_SHAPES)
@pytest.mark.parametrize("mask", [BLOB.astype(bool), ONE, np.ones((1, 30), bool)], ids=["blob", "pixel", "line"])
def test_a_prompt_lies_on_its_object_and_is_drawn_again_by_its_seed(shape, mask):
    rows, columns = np.nonzero(mask)
    box = np.zeros_like(mask)
    box[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1] = True
    for seed in range(30):
        drawn = draw_prompt(mask, shape, np.random.default_rng(seed))
        assert drawn.dtype == bool
        assert drawn.any()
        assert np.array_equal(drawn, draw_prompt(mask, shape, np.random.default_rng(seed)))
        assert not (drawn & ~(box if shape in ("box", "polygon") else mask)).any()
        if shape == "box":
            assert np.array_equal(drawn, box)
        if shape == "mask":
            assert np.array_equal(drawn, mask)


def test_points_are_small_and_polygons_filled():
    mask = BLOB.astype(bool)
    areas = {
        s: np.mean([draw_prompt(mask, s, np.random.default_rng(i)).sum() for i in range(50)]) for s in PROMPT_SHAPES
    }
    assert areas["point"] < 0.05 * mask.sum() < min(areas["scribble"], areas["circle"])
    assert max(areas["scribble"], areas["circle"]) < areas["mask"] < areas["box"]
    assert areas["polygon"] > 0.5 * areas["mask"]


def test_an_unknown_shape_and_an_empty_mask_are_refused():
    for mask, shape in ((ONE, "star"), (np.zeros((4, 4), bool), "box")):
        with pytest.raises(ValueError, match="expected one of point, box"):
            draw_prompt(mask, shape, np.random.default_rng(0))


def test_region_embeddings_follow_mask_and_image():
    torch.manual_seed(0)
    encoder = RegionEncoder(2, 24, 20)
    features, pixels = [torch.randn(2, 16, 24) for _ in range(2)], torch.randn(2, 3, 32, 32)
    prompts = torch.zeros(3, 32, 32, dtype=torch.uint8)
    prompts[:2, 4:12, 8:20] = prompts[2, 31, 31] = 1
    states = encoder(features, pixels, prompts, torch.tensor([0, 1, 0]))
    assert states.shape == (3, 20)
    assert torch.cdist(states, states).fill_diagonal_(1).min() > 1e-3
    states.sum().backward()
    assert all(p.grad is not None for p in encoder.parameters())
    assert encoder.to(torch.bfloat16)(features, pixels, prompts, torch.tensor([0, 1, 0])).dtype == torch.bfloat16
    alone = encoder.float()(features, pixels, prompts[1:2], torch.tensor([1]))
    torch.testing.assert_close(alone[0], states[1], rtol=0.05, atol=0.05)  # bf16 rounded the weights


def test_without_prompts_every_weight_has_a_gradient_all_the_same():
    encoder = RegionEncoder(1, 24, 20)
    states = encoder([torch.randn(2, 16, 24)], torch.randn(2, 3, 32, 32), torch.zeros(0, 32, 32), torch.zeros(0).long())
    assert states.shape == (0, 20)
    states.sum().backward()
    assert all(p.grad is not None for p in encoder.parameters())
