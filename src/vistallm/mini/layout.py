"""The mini world's layout: a random generator and conditions in, a placed scene with visible masks and boxes out."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import cv2
import numpy as np

from vistallm.mini.scene import (
    COLOURS,
    HELD_OUT,
    SIZES,
    TEXTURES,
    TRAIN_PAIRS,
    Attributes,
    Scene,
    SceneObject,
    draw,
)

_BAR_SHARE = 0.12  # of the objects are crossed by a grey bar
_MAX_TURN = math.pi / 12
_MIN_VISIBLE, _MIN_VISIBLE_BARRED = 0.62, 0.52  # share of its outline that an object must show
_LARGE_CHANCE = (0.5, 0.5, 0.5, 0.35, 0.2)  # by number of objects: four large ones do not fit


def _place(rng: np.random.Generator, attributes: Sequence[Attributes]) -> Scene | None:
    """Put objects of these attributes on a fresh canvas; None when they hide each other too much or do not fit."""
    short = int(rng.integers(80, 129))
    long = min(160, int(short * rng.uniform(1.0, 1.6)))
    width, height = (short, long) if rng.random() < 0.5 else (long, short)
    apart = 0.62 if rng.random() < 0.35 else 0.98  # a third of the scenes may overlap
    objects: list[SceneObject] = []
    for wanted in attributes:
        scene_object = SceneObject(wanted["shape"], wanted["colour"], wanted["size"], wanted["texture"])
        low, high = SIZES[scene_object.size]
        # Of the geometric mean of the sides, so that small and large stay apart once the image is padded to a square.
        scene_object.diameter = rng.uniform(low, high) * math.sqrt(width * height)
        scene_object.angle, scene_object.texture_angle = rng.uniform(-_MAX_TURN, _MAX_TURN), rng.uniform(0, math.pi)
        shades = rng.uniform(0.93, 1.04) * np.array(COLOURS[scene_object.colour]) + rng.uniform(-8, 8, 3)
        scene_object.rgb = tuple(np.clip(shades, 0, 255).tolist())
        if not _find_spot(rng, scene_object, objects, (width, height), apart):
            return None
        if rng.random() < _BAR_SHARE:
            scene_object.bar = (rng.uniform(-0.08, 0.08), rng.uniform(0, math.pi))
        objects.append(scene_object)
    scene = Scene(width, height, objects, background_seed=int(rng.integers(2**31)))
    return scene if _cover(scene) else None


def _find_spot(
    rng: np.random.Generator,
    scene_object: SceneObject,
    others: Sequence[SceneObject],
    canvas: tuple[int, int],
    apart: float,
) -> bool:
    """Set the object's centre so that its outline is inside the canvas and `apart` from the others' outlines."""
    corners = scene_object.outline()
    (left, top), (right, bottom) = 1 - corners.min(0), np.array(canvas) - 1 - corners.max(0)
    for dx, dy in rng.random((12, 2)).tolist():
        x, y = left + dx * (right - left), top + dy * (bottom - top)
        if all(math.hypot(x - o.x, y - o.y) >= apart * (scene_object.diameter + o.diameter) / 2 for o in others):
            scene_object.x, scene_object.y = float(x), float(y)
            return True
    return False


def _cover(scene: Scene) -> bool:
    """Fill layers, masks and boxes; False when an object is too hidden or a bar does not split its object in two."""
    masks = np.zeros((len(scene.objects), scene.height, scene.width), bool)
    areas = []
    for index, scene_object in enumerate(scene.objects):
        layer = draw(scene_object.outline(), scene.width, scene.height)
        bar = None if scene_object.bar is None else draw(scene_object.bar_outline(), scene.width, scene.height)
        scene.layers.append((layer, bar))
        inside = layer.coverage >= 128
        areas.append(int(inside.sum()))
        masks[(slice(0, index), *layer.window())] &= ~inside
        masks[(index, *layer.window())] = inside
        if bar is not None:
            masks[(slice(0, index + 1), *bar.window())] &= bar.coverage < 128
    scene.masks = masks
    return all(_settle(o, mask, area) for o, mask, area in zip(scene.objects, masks, areas, strict=True))


def _settle(scene_object: SceneObject, mask: np.ndarray, area: int) -> bool:
    """Set the object's box from its visible mask; False when too little of it shows."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    visible = int(np.count_nonzero(mask))
    if visible < area * (_MIN_VISIBLE if scene_object.bar is None else _MIN_VISIBLE_BARRED):
        return False
    scene_object.box = (int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1)
    if scene_object.bar is None:
        return True
    x0, y0, x1, y1 = scene_object.box
    count, _, stats, _ = cv2.connectedComponentsWithStats(mask[y0:y1, x0:x1].astype(np.uint8), connectivity=4)
    return count == 3 and int(stats[1:, cv2.CC_STAT_AREA].min()) >= 0.15 * visible


def random_attributes(
    rng: np.random.Generator,
    split: str = "train",
    wanted: Attributes | None = None,
    *,
    like: Sequence[Attributes] = (),
    held_out: bool = False,
    large: float = 0.5,
) -> Attributes:
    """Attributes of one object: those of `wanted` kept, the others drawn.

    Args:
        rng: the source of chance.
        split: "train" never gives a held-out pair of shape and colour; neither does another split unless `held_out`.
        wanted: attributes that are fixed.
        like: objects one of whose shape or colour is taken over half of the time (so that expressions need more words).
        held_out: draw shape and colour among the held-out pairs that agree with `wanted`, when there are any.
        large: chance of a large object.
    """
    wanted = dict(wanted or {})
    if like and rng.random() < 0.5:
        name = ("shape", "colour")[rng.integers(2)]
        wanted.setdefault(name, like[int(rng.integers(len(like)))][name])
    pairs: Sequence[tuple[str, str]] = _matching(sorted(HELD_OUT), wanted) if held_out and split != "train" else ()
    pairs = pairs or _matching(TRAIN_PAIRS, wanted)
    if not pairs:  # a held-out pair was asked for by name
        pairs = ((wanted["shape"], wanted["colour"]),)
    shape, colour = pairs[int(rng.integers(len(pairs)))]
    size = wanted.get("size") or ("large" if rng.random() < large else "small")
    texture = wanted.get("texture") or TEXTURES[(0, 0, 1, 2)[rng.integers(4)]]
    return {"shape": shape, "colour": colour, "size": size, "texture": texture}


def _matching(pairs: Sequence[tuple[str, str]], wanted: Attributes) -> list[tuple[str, str]]:
    shape, colour = wanted.get("shape"), wanted.get("colour")
    return [p for p in pairs if shape in (None, p[0]) and colour in (None, p[1])]


def random_scene(
    rng: np.random.Generator,
    split: str = "train",
    wanted: Sequence[Attributes] = (),
    *,
    count: int | None = None,
    allow: Callable[[Attributes], bool] | None = None,
    accept: Callable[[Scene], bool] | None = None,
) -> Scene:
    """A scene of 1 to 4 objects (mostly 2 or 3) on a canvas of 80..160 px a side.

    Args:
        rng: the source of chance; the scene is a pure function of its state.
        split: "train" holds no held-out pair; in "val" and "test" half of the scenes get one, as the focus object.
        wanted: fixed attributes of the first objects; the first is the scene's `focus`.
        count: number of objects, at least len(wanted).
        allow: which attributes the other objects may have.
        accept: a last test of the placed scene (positions).

    Raises:
        RuntimeError: when no scene passes after many draws: the conditions contradict each other.
    """
    held_out = split != "train" and rng.random() < 0.5
    for attempt in range(2000):
        held_out = held_out and attempt < 20  # a held-out focus may contradict the conditions
        number = count or max(len(wanted), (1, 2, 2, 2, 2, 3, 3, 3, 3, 4)[rng.integers(10)])
        large = _LARGE_CHANCE[min(number, 4)]
        drawn: list[Attributes] = []
        for i in range(number):
            fixed = wanted[i] if i < len(wanted) else None
            like = drawn if fixed is None else ()
            new = random_attributes(rng, split, fixed, like=like, held_out=held_out and i == 0, large=large)
            drawn.append(new)
        if allow is not None and not all(allow(new) for new in drawn[len(wanted) :]):
            continue
        order = rng.permutation(number).tolist()
        for _ in range(3):
            scene = _place(rng, [drawn[i] for i in order])
            if scene is not None:
                scene.focus = order.index(0)
                if accept is None or accept(scene):
                    return scene
    raise RuntimeError(f"no scene found for {list(wanted)} with {count or '1 to 4'} objects; loosen the conditions")
