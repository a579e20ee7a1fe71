"""The mini world's pictures: a random generator and conditions in; a scene, its image and exact visible masks out.

Frame: pixels of the image, x right, y down, pixel edges at integers. The mask rule: a pixel belongs to an outline when
at least half of its area is inside it (measured on 4 x 4 sub-pixels), and to an object when no later layer owns it too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import cv2
import numpy as np

SHAPES = ("circle", "square", "triangle", "star", "cross", "diamond")
COLOURS = {
    "red": (214, 36, 44),
    "orange": (246, 132, 22),
    "yellow": (244, 216, 40),
    "green": (36, 152, 58),
    "cyan": (60, 200, 214),
    "blue": (34, 66, 206),
    "purple": (150, 44, 180),
}
SIZES = {"small": (0.24, 0.30), "large": (0.42, 0.55)}  # diameter as a share of sqrt(width * height)
TEXTURES = ("plain", "striped", "dotted")
Attributes = dict[str, str]  # attribute name -> value; of an object all four of ATTRIBUTES
Rng = np.random.Generator
ATTRIBUTES = {"shape": SHAPES, "colour": tuple(COLOURS), "size": tuple(SIZES), "texture": TEXTURES}
# One colour per shape that training never shows or names: val and test scores on these measure generalisation.
HELD_OUT = frozenset((shape, tuple(COLOURS)[i]) for i, shape in enumerate(SHAPES))
TRAIN_PAIRS = tuple((s, c) for s in SHAPES for c in COLOURS if (s, c) not in HELD_OUT)
NOUN = "object"  # the word for a shape of any kind
SIDES = ("left", "right", "top", "bottom")
BACKGROUNDS = ((206, 204, 200), (188, 186, 184), (214, 206, 190), (198, 188, 170), (178, 180, 184), (224, 222, 218))

_SUB, _SHIFT = 4, 4  # sub-pixels per pixel and axis; fractional bits of cv2.fillPoly
_BAR_SHARE = 0.12  # of the objects are crossed by a grey bar
_MAX_TURN = math.pi / 12
_MIN_VISIBLE, _MIN_VISIBLE_BARRED = 0.62, 0.52  # share of its outline that an object must show
_LARGE_CHANCE = (0.5, 0.5, 0.5, 0.35, 0.2)  # by number of objects: four large ones do not fit


def pick(rng: Rng, options: Sequence[Any]) -> Any:
    """One of the options."""
    return options[int(rng.integers(len(options)))]


def is_held_out(attributes: Attributes) -> bool:
    """Whether training never shows or names the pair of shape and colour, where both are given."""
    return (attributes.get("shape"), attributes.get("colour")) in HELD_OUT


def _star(points: int, outer: float, inner: float) -> np.ndarray:
    angle = np.arange(2 * points) * math.pi / points - math.pi / 2
    radius = np.where(np.arange(2 * points) % 2 == 0, outer, inner)
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], 1)


_ARM = 0.17
_OUTLINES = {  # corners for a diameter of 1 around (0, 0); areas are alike, so size and shape stay apart
    "circle": _star(20, 0.5, 0.5),
    "square": np.array([(-0.43, -0.43), (0.43, -0.43), (0.43, 0.43), (-0.43, 0.43)]),
    "triangle": _star(3, 0.60, 0.30),
    "star": _star(5, 0.58, 0.26),
    "cross": np.array(
        [(-_ARM, -0.53), (_ARM, -0.53), (_ARM, -_ARM), (0.53, -_ARM), (0.53, _ARM), (_ARM, _ARM)]
        + [(_ARM, 0.53), (-_ARM, 0.53), (-_ARM, _ARM), (-0.53, _ARM), (-0.53, -_ARM), (-_ARM, -_ARM)]
    ),
    "diamond": np.array([(0, -0.58), (0.34, 0), (0, 0.58), (-0.34, 0)]),
}
# Corners of an outline by name, in COCO's manner of keypoints; of two corners the middle. A turn changes no name.
KEYPOINTS: dict[str, dict[str, list[int]]] = {
    "square": {"top left": [0], "top right": [1], "bottom right": [2], "bottom left": [3]},
    "triangle": {"top": [0], "right": [2], "left": [4]},
    "star": {"top": [0], "right": [2], "bottom right": [4], "bottom left": [6], "left": [8]},
    "cross": {"top": [0, 1], "right": [3, 4], "bottom": [6, 7], "left": [9, 10]},
    "diamond": {"top": [0], "right": [1], "bottom": [2], "left": [3]},
}


@dataclass
class Layer:
    """One drawn outline: `coverage` (h, w) uint8, 255 = fully inside, of the pixels `window` (rows, columns)."""

    window: tuple[slice, slice]
    coverage: np.ndarray


@dataclass
class SceneObject:
    """One shape. `x`, `y`, `diameter` in pixels, `angle` and `texture_angle` in radians, `rgb` in 0..255.

    `bar` is (offset from the centre in diameters, angle) of a grey bar across the object, or None.
    `box` is the tight box (x0, y0, x1, y1) of the visible mask, filled when the scene is placed.
    """

    attributes: Attributes
    x: float = 0.0
    y: float = 0.0
    diameter: float = 0.0
    angle: float = 0.0
    texture_angle: float = 0.0
    rgb: tuple[float, ...] = (0.0, 0.0, 0.0)
    bar: tuple[float, float] | None = None
    box: tuple[int, int, int, int] = (0, 0, 0, 0)

    @property
    def centre(self) -> tuple[float, float]:
        """Centre (x, y) of the visible box, in pixels."""
        return (self.box[0] + self.box[2]) / 2, (self.box[1] + self.box[3]) / 2

    def outline(self) -> np.ndarray:
        """Corners (n, 2) float64 in pixels of the image."""
        cos, sin = math.cos(self.angle), math.sin(self.angle)
        turn = np.array([[cos, sin], [-sin, cos]])
        return _OUTLINES[self.attributes["shape"]] @ turn * self.diameter + (self.x, self.y)

    def bar_outline(self) -> np.ndarray:
        """Corners (4, 2) float64 of the occluding bar, in pixels."""
        assert self.bar is not None
        offset, angle = self.bar
        along, across = np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
        middle = np.array([self.x, self.y]) + across * offset * self.diameter
        along, across = along * 0.72 * self.diameter, across * max(1.6, 0.065 * self.diameter)
        return np.array(
            [middle - along - across, middle + along - across, middle + along + across, middle - along + across]
        )


@dataclass
class Scene:
    """Objects on a canvas, later ones over earlier ones; `focus` is the object that the caller asked for first."""

    width: int
    height: int
    objects: list[SceneObject]
    background_seed: int = 0
    focus: int = 0
    masks: np.ndarray = field(default_factory=lambda: np.zeros((0, 0, 0), bool))
    layers: list[tuple[Layer, Layer | None]] = field(default_factory=list)

    @property
    def held_out(self) -> bool:
        """Whether an object is of a pair of shape and colour that training never shows."""
        return any(is_held_out(o.attributes) for o in self.objects)

    def keypoints(self, index: int) -> tuple[tuple[float, float, int], ...]:
        """Keypoints of an object, in the order of KEYPOINTS: x and y in pixels, 2 = visible or 1 = hidden.

        Visible: most of the object's own pixels around the point are seen.
        """
        scene_object, window = self.objects[index], self.layers[index][0].window
        outline, (y, x) = scene_object.outline(), np.ogrid[window]
        own, seen, found = self.layers[index][0].coverage >= 128, self.masks[index][window], []
        for corners in KEYPOINTS[scene_object.attributes["shape"]].values():
            px, py = outline[corners].mean(0).tolist()
            near = own & (np.hypot(x + 0.5 - px, y + 0.5 - py) <= max(2.5, 0.08 * scene_object.diameter))
            found.append((px, py, 1 + int(2 * np.count_nonzero(near & seen) >= np.count_nonzero(near))))
        return tuple(found)

    def render(self) -> tuple[np.ndarray, np.ndarray]:
        """Draw the scene: image (H, W, 3) uint8 RGB and visible masks (n, H, W) bool, one per object, disjoint."""
        rng = np.random.default_rng(self.background_seed)
        image = _background(rng, self.width, self.height)
        for scene_object, (layer, bar) in zip(self.objects, self.layers, strict=True):
            paints = [(layer, _fill(scene_object, layer))]
            if bar is not None:
                paints.append((bar, np.full(3, rng.uniform(78, 100), np.float32)))
            for painted, fill in paints:
                window = image[painted.window]
                alpha = painted.coverage.astype(np.float32)[:, :, None] * np.float32(1 / 255)
                window[...] = (window + (fill - window) * alpha + 0.5).astype(np.uint8)
        return image, self.masks


def _background(rng: Rng, width: int, height: int) -> np.ndarray:
    """Plain, soft gradient or soft noise in a muted tone: (H, W, 3) uint8."""
    tone = np.array(pick(rng, BACKGROUNDS), np.float32) + rng.uniform(-8, 8)
    kind = rng.integers(3)
    if kind == 0:
        return np.full((height, width, 3), tone, np.float32).astype(np.uint8)
    spread, grid = (18, (2, 2)) if kind == 1 else (12, (max(3, height // 9), max(3, width // 9)))
    coarse = rng.uniform(-spread, spread, grid).astype(np.float32)
    light = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_LINEAR)
    return np.clip(tone + light[:, :, None], 0, 255).astype(np.uint8)


def _fill(scene_object: SceneObject, layer: Layer) -> np.ndarray:
    """Colour of every pixel of the layer: (3,) or (h, w, 3) float32."""
    rgb = np.array(scene_object.rgb, np.float32)
    if (texture := scene_object.attributes["texture"]) == "plain":
        return rgb
    y, x = np.ogrid[layer.window]
    dx, dy = x + 0.5 - scene_object.x, y + 0.5 - scene_object.y
    cos, sin = math.cos(scene_object.texture_angle), math.sin(scene_object.texture_angle)
    period = min(max(0.2 * scene_object.diameter, 6.0), 10.0)
    u = (dx * cos + dy * sin) * np.float32(2 * math.pi / period)
    if texture == "striped":
        ink = 0.5 + 0.25 * period * np.sin(u)
    else:
        v = (dy * cos - dx * sin) * np.float32(2 * math.pi / period)
        ink = 0.5 + 0.25 * period * (0.5 * (np.cos(u) + np.cos(v)) - 0.30)
    return rgb * (1 - 0.62 * np.clip(ink, 0, 1).astype(np.float32)[:, :, None])


def draw(outline: np.ndarray, width: int, height: int) -> Layer:
    """Coverage of a polygon (n, 2), clipped to the image."""
    x0, y0 = np.maximum(np.floor(outline.min(0)).astype(int), 0).tolist()
    x1, y1 = np.minimum(np.ceil(outline.max(0)).astype(int), (width, height)).tolist()
    fine = np.zeros(((y1 - y0) * _SUB, (x1 - x0) * _SUB), np.uint8)
    # OpenCV counts pixel centres as integers, this package pixel edges: hence the half sub-pixel.
    points = np.round(((outline - (x0, y0)) * _SUB - 0.5) * (1 << _SHIFT)).astype(np.int32)
    cv2.fillPoly(fine, [points], 255, shift=_SHIFT)
    coverage = cv2.resize(fine, (x1 - x0, y1 - y0), interpolation=cv2.INTER_AREA)
    return Layer((slice(y0, y1), slice(x0, x1)), coverage)


def _arrange(rng: Rng, attributes: Sequence[Attributes]) -> Scene | None:
    """Put objects of these attributes on a fresh canvas; None when they hide each other too much or do not fit."""
    short = int(rng.integers(80, 129))
    long = min(160, int(short * rng.uniform(1.0, 1.6)))
    width, height = (short, long) if rng.random() < 0.5 else (long, short)
    apart = 0.62 if rng.random() < 0.35 else 0.98  # a third of the scenes may overlap
    objects: list[SceneObject] = []
    for wanted in attributes:
        new = SceneObject(wanted)
        # Of the geometric mean of the sides, so that small and large stay apart once the image is padded to a square.
        new.diameter = rng.uniform(*SIZES[wanted["size"]]) * math.sqrt(width * height)
        new.angle, new.texture_angle = rng.uniform(-_MAX_TURN, _MAX_TURN), rng.uniform(0, math.pi)
        shades = rng.uniform(0.93, 1.04) * np.array(COLOURS[wanted["colour"]]) + rng.uniform(-8, 8, 3)
        new.rgb = tuple(np.clip(shades, 0, 255).tolist())
        # The outline stays inside the canvas and `apart` from the others' outlines.
        corners = new.outline()
        (left, top), (right, bottom) = 1 - corners.min(0), np.array((width, height)) - 1 - corners.max(0)
        for dx, dy in rng.random((12, 2)).tolist():
            new.x, new.y = float(left + dx * (right - left)), float(top + dy * (bottom - top))
            if all(math.hypot(new.x - o.x, new.y - o.y) >= apart * (new.diameter + o.diameter) / 2 for o in objects):
                break
        else:
            return None
        if rng.random() < _BAR_SHARE:
            new.bar = (rng.uniform(-0.08, 0.08), rng.uniform(0, math.pi))
        objects.append(new)
    scene = Scene(width, height, objects, background_seed=int(rng.integers(2**31)))
    return scene if _cover(scene) else None


def _cover(scene: Scene) -> bool:
    """Fill layers, masks and boxes; False when an object is too hidden or a bar does not split its object in two."""
    masks = scene.masks = np.zeros((len(scene.objects), scene.height, scene.width), bool)
    for index, scene_object in enumerate(scene.objects):
        layer = draw(scene_object.outline(), scene.width, scene.height)
        bar = None if scene_object.bar is None else draw(scene_object.bar_outline(), scene.width, scene.height)
        scene.layers.append((layer, bar))
        masks[(slice(0, index), *layer.window)] &= layer.coverage < 128
        masks[(index, *layer.window)] = layer.coverage >= 128
        if bar is not None:
            masks[(slice(0, index + 1), *bar.window)] &= bar.coverage < 128
    for scene_object, mask, (layer, bar) in zip(scene.objects, masks, scene.layers, strict=True):
        visible, area = int(np.count_nonzero(mask)), np.count_nonzero(layer.coverage >= 128)
        if visible < area * (_MIN_VISIBLE if bar is None else _MIN_VISIBLE_BARRED):
            return False
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        x0, y0, x1, y1 = int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1
        scene_object.box = (x0, y0, x1, y1)
        if bar is not None:
            parts, _, stats, _ = cv2.connectedComponentsWithStats(mask[y0:y1, x0:x1].astype(np.uint8), connectivity=4)
            if parts != 3 or int(stats[1:, cv2.CC_STAT_AREA].min()) < 0.15 * visible:  # the first part is the rest
                return False
    return True


def random_attributes(
    rng: Rng, wanted: Attributes, like: Sequence[Attributes] = (), held_out: bool = False, large: float = 0.5
) -> Attributes:
    """Attributes of one object: those of `wanted` kept, the others drawn; a held-out pair only when `held_out`.

    Over half of the time shape or colour is that of an object of `like`, so that expressions need more words. `large`
    is the chance of a large object.
    """
    wanted = dict(wanted)
    if like and rng.random() < 0.5:
        name = pick(rng, ("shape", "colour"))
        wanted.setdefault(name, pick(rng, like)[name])
    matching = [
        [(s, c) for s, c in pairs if wanted.get("shape", s) == s and wanted.get("colour", c) == c]
        for pairs in (sorted(HELD_OUT) if held_out else [], TRAIN_PAIRS)
    ]
    # The last: a held-out pair asked for by name.
    shape, colour = pick(rng, matching[0] or matching[1] or [(wanted["shape"], wanted["colour"])])
    size = wanted.get("size") or ("large" if rng.random() < large else "small")
    texture = wanted.get("texture") or TEXTURES[pick(rng, (0, 0, 1, 2))]
    return {"shape": shape, "colour": colour, "size": size, "texture": texture}


def random_scene(
    rng: Rng,
    split: str = "train",
    wanted: Sequence[Attributes] = (),
    *,
    count: int | None = None,
    allow: Callable[[Attributes], bool] | None = None,
    accept: Callable[[Scene], bool] | None = None,
) -> Scene:
    """A scene of 1 to 4 objects (mostly 2 or 3) on a canvas of 80..160 px a side.

    "train" holds no held-out pair of shape and colour; in other splits half of the scenes get one, as the focus object.
    The first of `count` objects have the `wanted` attributes, and the very first is the focus; `allow` says which
    attributes the others may have, and `accept` tests the scene (positions).

    Raises:
        RuntimeError: no scene passes after many draws: the conditions contradict each other.
    """
    held_out = split != "train" and rng.random() < 0.5
    for attempt in range(2000):
        held_out = held_out and attempt < 20  # a held-out focus may contradict the conditions
        number = count or max(len(wanted), pick(rng, (1, 2, 2, 2, 2, 3, 3, 3, 3, 4)))
        drawn: list[Attributes] = []
        for i in range(number):
            fixed, like = (wanted[i], []) if i < len(wanted) else ({}, drawn)
            drawn.append(random_attributes(rng, fixed, like, held_out and i == 0, _LARGE_CHANCE[min(number, 4)]))
        if allow is not None and not all(map(allow, drawn[len(wanted) :])):
            continue
        order = rng.permutation(number).tolist()
        for _ in range(3):
            if (scene := _arrange(rng, [drawn[i] for i in order])) is not None:
                scene.focus = order.index(0)
                if accept is None or accept(scene):
                    return scene
    raise RuntimeError(f"no scene for {list(wanted)} with {count or '1 to 4'} objects; loosen the conditions")
