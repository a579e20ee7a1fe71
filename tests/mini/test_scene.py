"""Scenes: exact masks, boxes, bars, held-out pairs, determinism."""

import cv2
import numpy as np
import pytest

from vistallm.mini.scene import (
    COLOURS,
    HELD_OUT,
    SHAPES,
    SIZES,
    TRAIN_PAIRS,
    SceneObject,
    draw,
    is_held_out,
    random_scene,
)


@pytest.fixture(scope="module")
def scenes():
    rng = np.random.default_rng(7)
    return [random_scene(rng, "train") for _ in range(250)]


def test_masks_are_disjoint_tight_and_mostly_visible(scenes):
    for scene in scenes:
        image, masks = scene.render()
        assert image.shape == (scene.height, scene.width, 3)
        assert image.dtype == np.uint8
        assert masks.shape == (len(scene.objects), scene.height, scene.width)
        assert masks.sum(0).max() <= 1
        for scene_object, mask, (layer, _) in zip(scene.objects, masks, scene.layers, strict=True):
            rows, columns = np.nonzero(mask)
            assert scene_object.box == (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
            assert len(rows) >= (0.52 if scene_object.bar else 0.62) * (layer.coverage >= 128).sum()


def test_masks_show_the_objects_own_colour(scenes):
    for scene in scenes:
        image, masks = scene.render()
        for scene_object, mask in zip(scene.objects, masks, strict=True):
            inside = cv2.erode(mask.astype(np.uint8), np.ones((3, 3))) > 0
            if scene_object.attributes["texture"] == "plain" and inside.any():
                assert np.abs(image[inside].mean(0) - scene_object.rgb).max() < 4


def test_coverage_is_exact_for_a_box():
    square = np.array([(2.25, 3.0), (7.0, 3.0), (7.0, 5.5), (2.25, 5.5)])
    layer = draw(square, 20, 20)
    full = np.zeros((20, 20))
    full[layer.window] = layer.coverage / 255
    expected = np.zeros((20, 20))
    expected[3:5, 3:7], expected[5, 3:7], expected[3:5, 2], expected[5, 2] = 1, 0.5, 0.75, 0.375
    assert np.abs(full - expected).max() <= 0.26  # the outline's own sub-pixels count as inside
    assert np.array_equal(full >= 0.9, expected == 1)


def test_areas_match_the_outlines():
    for shape in SHAPES:
        one = SceneObject({"shape": shape}, 40.3, 40.8, 60.0, angle=0.2)
        outline = one.outline()
        x, y = outline.T
        area = abs(np.dot(x, np.roll(y, 1)) - np.dot(y, np.roll(x, 1))) / 2
        drawn = (draw(outline, 80, 80).coverage >= 128).sum()
        assert drawn == pytest.approx(area, rel=0.03)


def test_bars_split_their_object_in_two(scenes):
    split = [
        cv2.connectedComponents(mask.astype(np.uint8), connectivity=4)[0] - 1
        for scene in scenes
        for scene_object, mask in zip(scene.objects, scene.masks, strict=True)
        if scene_object.bar is not None
    ]
    assert set(split) == {2}
    assert 0.06 < len(split) / sum(len(scene.objects) for scene in scenes) < 0.18


def test_sizes_stay_apart_in_the_padded_square(scenes):
    shares = {size: [] for size in SIZES}
    for scene in scenes:
        for scene_object in scene.objects:
            shares[scene_object.attributes["size"]].append(scene_object.diameter / max(scene.width, scene.height))
    assert max(shares["small"]) < min(shares["large"])


def test_held_out_pairs():
    assert len(HELD_OUT) == len(SHAPES)
    assert len(HELD_OUT) + len(TRAIN_PAIRS) == len(SHAPES) * len(COLOURS)
    rng = np.random.default_rng(3)
    train = [random_scene(rng, "train") for _ in range(300)]
    test = [random_scene(rng, "test") for _ in range(300)]
    assert not any(scene.held_out for scene in train)
    assert 0.4 < np.mean([scene.held_out for scene in test]) < 0.6
    assert all(is_held_out(scene.objects[scene.focus].attributes) for scene in test if scene.held_out)


def test_same_seed_same_picture_and_canvas_range():
    one, other = (random_scene(np.random.default_rng(5), "val") for _ in range(2))
    assert np.array_equal(one.render()[0], other.render()[0])
    assert np.array_equal(one.render()[0], one.render()[0])
    rng = np.random.default_rng(9)
    sizes = [(scene.width, scene.height) for scene in (random_scene(rng) for _ in range(200))]
    assert min(map(min, sizes)) >= 80
    assert max(map(max, sizes)) <= 160
    assert max(w / h for w, h in sizes) > 1.3
    assert max(h / w for w, h in sizes) > 1.3


def test_contradicting_conditions_end_with_an_error():
    with pytest.raises(RuntimeError, match="loosen the conditions"):
        random_scene(np.random.default_rng(0), count=2, allow=lambda attributes: False)
