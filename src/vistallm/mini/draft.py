"""What every mini task is made with: drafts of samples, regions of scene objects, scenes with or without something."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import cv2
import numpy as np

from vistallm.mini.expressions import Expression, attributes_of, matches, refer
from vistallm.mini.layout import random_attributes, random_scene
from vistallm.mini.scene import PLACE_NAMES, Attributes, Scene
from vistallm.regions.masks import mask_to_rle
from vistallm.schema import Region


@dataclass
class Draft:
    """A sample before its images are drawn: `scenes` in image order, `regions` refer to them by `Region.image`."""

    task: str
    scenes: list[Scene]
    fields: dict[str, Any]
    regions: list[Region] = field(default_factory=list)
    meta: dict[str, Any] = field(default_factory=dict)


Maker = Callable[[np.random.Generator, str, int], list[Draft]]


def region_of(scene: Scene, index: int, kind: str, number: int = 0, image: int = 0) -> Region:
    """The scene's object `index` as a box or mask region; `number` is its object number in the sample."""
    if kind == "mask":
        return Region(image, "mask", number, rle=mask_to_rle(scene.masks[index]))
    return Region(image, "box", number, box=scene.objects[index].box)


def point_of(rng: np.random.Generator, scene: Scene, index: int) -> Region:
    """A point well inside the visible mask, at a pixel centre."""
    x0, y0, x1, y1 = scene.objects[index].box
    depth = cv2.distanceTransform(np.pad(scene.masks[index, y0:y1, x0:x1], 1).astype(np.uint8), cv2.DIST_L2, 3)
    rows, columns = np.nonzero(depth >= 0.5 * depth.max())
    pick = rng.integers(len(rows))
    return Region(0, "point", 0, point=(float(x0 + columns[pick] - 0.5), float(y0 + rows[pick] - 0.5)))


def pick(rng: np.random.Generator, options: Sequence[Any]) -> Any:
    """One of the options."""
    return options[int(rng.integers(len(options)))]


def draw_pair(rng: np.random.Generator, split: str) -> Attributes:
    """A shape and a colour to ask for: in val and test a held-out pair half of the time."""
    drawn = random_attributes(rng, split, held_out=rng.random() < 0.5)
    return {"shape": drawn["shape"], "colour": drawn["colour"]}


def referred(
    rng: np.random.Generator,
    split: str,
    wanted: Attributes | None = None,
    without: Sequence[str] = (),
    count: int | None = None,
) -> tuple[Scene, Expression]:
    """A scene and an unambiguous expression for its focus object."""
    while True:
        scene = random_scene(rng, split, [wanted or {}], count=count)
        expression = refer(rng, scene, scene.focus, without)
        if expression is not None:
            return scene, expression


def absent(rng: np.random.Generator, split: str, scene: Scene, hard: bool = True, placed: bool = True) -> Expression:
    """An expression that means nothing in the scene; `hard`: each of its words fits some object, but not together."""
    for attempt in range(1000):
        shapes, colours = [o.shape for o in scene.objects], [o.colour for o in scene.objects]
        if hard and attempt < 20:
            expression = Expression(pick(rng, shapes), pick(rng, colours))
        else:  # one word fits, the other is from outside; or one lone word
            colour, shape = draw_pair(rng, split)["colour"], draw_pair(rng, split)["shape"]
            forms = (
                (pick(rng, shapes), colour),
                (shape, pick(rng, colours)),
                (shape, colour),
                (shape, None),
                (None, colour),
            )
            expression = Expression(*pick(rng, forms))
        if expression.held_out and split == "train" or expression.resolve(scene):
            continue
        if placed and rng.random() < 0.15:
            return Expression(
                expression.shape, expression.colour, place=pick(rng, PLACE_NAMES), extreme=rng.random() < 0.5
            )
        return expression
    raise RuntimeError("no absent expression found: the scene holds every pair of shape and colour")


def scene_with(rng: np.random.Generator, split: str, wanted: Attributes, number: int) -> Scene:
    """A scene in which exactly `number` objects have the wanted attributes, beside up to two that do not."""
    low = 1 if number == 0 else number
    count = int(rng.integers(low, min(4, number + 2) + 1)) if number < 4 else number

    def accept(scene: Scene) -> bool:
        return sum(matches(attributes_of(o), wanted) for o in scene.objects) == number

    if number:
        return random_scene(
            rng, split, [wanted] * number, count=count, accept=accept, allow=lambda a: not matches(a, wanted)
        )
    # None of them: one object shares a word with what is asked for, so that absence has to be looked for.
    shared = pick(rng, [{name: value} for name, value in wanted.items()]) if len(wanted) > 1 else {}
    return random_scene(rng, split, [shared], count=count, accept=accept)
