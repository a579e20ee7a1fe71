"""The mini world's pictures: placed objects in, an image and exact visible masks out.

Frame: pixels of the image, x right, y down, pixel edges at integers. The mask rule: a pixel belongs to an outline when
at least half of its area is inside it (measured on 4 x 4 sub-pixels), and to an object when no later layer owns it too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

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
ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "shape": SHAPES,
    "colour": tuple(COLOURS),
    "size": tuple(SIZES),
    "texture": TEXTURES,
}
# One colour per shape that training never shows or names: val and test scores on these measure generalisation.
HELD_OUT = frozenset((shape, tuple(COLOURS)[i]) for i, shape in enumerate(SHAPES))
TRAIN_PAIRS = tuple((s, c) for s in SHAPES for c in COLOURS if (s, c) not in HELD_OUT)
NOUN = "object"  # the word for a shape of any kind
PLACE_NAMES = ("left", "right", "top", "bottom")
BACKGROUNDS = ((206, 204, 200), (188, 186, 184), (214, 206, 190), (198, 188, 170), (178, 180, 184), (224, 222, 218))

_SUB = 4  # sub-pixels per pixel and axis
_SHIFT = 4  # fractional bits of cv2.fillPoly
Attributes = dict[str, str]


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


@dataclass
class Layer:
    """One drawn outline: `coverage` (h, w) uint8, 255 = fully inside, at pixel (x, y) of the image."""

    x: int
    y: int
    coverage: np.ndarray

    def window(self) -> tuple[slice, slice]:
        """The rows and columns of the image that the layer may touch."""
        height, width = self.coverage.shape
        return slice(self.y, self.y + height), slice(self.x, self.x + width)


@dataclass
class SceneObject:
    """One shape. `x`, `y`, `diameter` in pixels, `angle` and `texture_angle` in radians, `rgb` in 0..255.

    `bar` is (offset from the centre in diameters, angle) of a grey bar across the object, or None.
    `box` is the tight box (x0, y0, x1, y1) of the visible mask, filled when the scene is placed.
    """

    shape: str
    colour: str
    size: str
    texture: str
    x: float = 0.0
    y: float = 0.0
    diameter: float = 0.0
    angle: float = 0.0
    texture_angle: float = 0.0
    rgb: tuple[float, ...] = (0.0, 0.0, 0.0)
    bar: tuple[float, float] | None = None
    box: tuple[int, int, int, int] = (0, 0, 0, 0)

    @property
    def held_out(self) -> bool:
        """Whether training never shows this pair of shape and colour."""
        return (self.shape, self.colour) in HELD_OUT

    @property
    def centre(self) -> tuple[float, float]:
        """Centre (x, y) of the visible box, in pixels."""
        return (self.box[0] + self.box[2]) / 2, (self.box[1] + self.box[3]) / 2

    def outline(self) -> np.ndarray:
        """Corners (n, 2) float64 in pixels of the image."""
        cos, sin = math.cos(self.angle), math.sin(self.angle)
        turn = np.array([[cos, sin], [-sin, cos]])
        return _OUTLINES[self.shape] @ turn * self.diameter + (self.x, self.y)

    def bar_outline(self) -> np.ndarray:
        """Corners (4, 2) float64 of the occluding bar, in pixels."""
        assert self.bar is not None
        offset, angle = self.bar
        half_length, half_width = 0.72 * self.diameter, max(1.6, 0.065 * self.diameter)
        along = np.array([math.cos(angle), math.sin(angle)])
        across = np.array([-along[1], along[0]])
        middle = np.array([self.x, self.y]) + across * offset * self.diameter
        signs = ((-1, -1), (1, -1), (1, 1), (-1, 1))
        return np.array([middle + a * half_length * along + b * half_width * across for a, b in signs])


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
        """Whether any object is of a combination that training never shows."""
        return any(o.held_out for o in self.objects)

    def render(self) -> tuple[np.ndarray, np.ndarray]:
        """Draw the scene: image (H, W, 3) uint8 RGB and visible masks (n, H, W) bool, one per object, disjoint."""
        rng = np.random.default_rng(self.background_seed)
        image = _background(rng, self.width, self.height)
        for scene_object, (layer, bar) in zip(self.objects, self.layers, strict=True):
            _blend(image, layer, _fill(scene_object, layer))
            if bar is not None:
                _blend(image, bar, np.full(3, rng.uniform(78, 100), np.float32))
        return image, self.masks


def _background(rng: np.random.Generator, width: int, height: int) -> np.ndarray:
    """Plain, soft gradient or soft noise in a muted tone: (H, W, 3) uint8."""
    tone = np.array(BACKGROUNDS[rng.integers(len(BACKGROUNDS))], np.float32) + rng.uniform(-8, 8)
    kind = rng.integers(3)
    if kind == 0:
        return np.full((height, width, 3), tone, np.float32).astype(np.uint8)
    rows, columns = (2, 2) if kind == 1 else (max(3, height // 9), max(3, width // 9))
    spread = 18 if kind == 1 else 12
    light = cv2.resize(
        rng.uniform(-spread, spread, (rows, columns)).astype(np.float32),
        (width, height),
        interpolation=cv2.INTER_LINEAR,
    )
    return np.clip(tone + light[:, :, None], 0, 255).astype(np.uint8)


def _fill(scene_object: SceneObject, layer: Layer) -> np.ndarray:
    """Colour of every pixel of the layer: (3,) or (h, w, 3) float32."""
    rgb = np.array(scene_object.rgb, np.float32)
    if scene_object.texture == "plain":
        return rgb
    height, width = layer.coverage.shape
    y, x = np.ogrid[layer.y : layer.y + height, layer.x : layer.x + width]
    dx, dy = x + 0.5 - scene_object.x, y + 0.5 - scene_object.y
    cos, sin = math.cos(scene_object.texture_angle), math.sin(scene_object.texture_angle)
    period = min(max(0.2 * scene_object.diameter, 6.0), 10.0)
    ink: np.ndarray
    u = (dx * cos + dy * sin) * np.float32(2 * math.pi / period)
    if scene_object.texture == "striped":
        ink = 0.5 + 0.25 * period * np.sin(u)
    else:
        v = (dy * cos - dx * sin) * np.float32(2 * math.pi / period)
        ink = 0.5 + 0.25 * period * (0.5 * (np.cos(u) + np.cos(v)) - 0.30)
    ink = np.clip(ink, 0, 1).astype(np.float32)[:, :, None]
    return rgb * (1 - 0.62 * ink)


def _blend(image: np.ndarray, layer: Layer, fill: np.ndarray) -> None:
    """Paint `fill` over the image where the layer covers it, in place."""
    window = image[layer.window()]
    alpha = layer.coverage.astype(np.float32)[:, :, None] * np.float32(1 / 255)
    window[...] = (window + (fill - window) * alpha + 0.5).astype(np.uint8)


def draw(outline: np.ndarray, width: int, height: int) -> Layer:
    """Coverage of a polygon (n, 2), clipped to the image."""
    x0, y0 = np.maximum(np.floor(outline.min(0)).astype(int), 0).tolist()
    x1, y1 = np.minimum(np.ceil(outline.max(0)).astype(int), (width, height)).tolist()
    fine = np.zeros(((y1 - y0) * _SUB, (x1 - x0) * _SUB), np.uint8)
    # OpenCV counts pixel centres as integers, this package pixel edges: hence the half sub-pixel.
    points = np.round(((outline - (x0, y0)) * _SUB - 0.5) * (1 << _SHIFT)).astype(np.int32)
    cv2.fillPoly(fine, [points], 255, shift=_SHIFT)
    return Layer(x0, y0, cv2.resize(fine, (x1 - x0, y1 - y0), interpolation=cv2.INTER_AREA))
