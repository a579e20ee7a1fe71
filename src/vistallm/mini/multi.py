"""The mini world's multi-image tasks: two-image statements, co-segmentation, co-segmentation by attribute."""

from __future__ import annotations

import numpy as np

from vistallm.mini.draft import Draft, Maker, draw_pair, pick, region_of, scene_with
from vistallm.mini.expressions import article, attributes_of, matches, plural
from vistallm.mini.layout import random_scene
from vistallm.mini.scene import ATTRIBUTES, PLACE_NAMES, SHAPES, Attributes, Scene, SceneObject

STATEMENTS = {
    "both": "Both images contain {}.",
    "left": "The left image contains {}.",
    "right": "The right image contains {}.",
    "exactly one": "Exactly one image contains {}.",
    "more": "The {} image has more objects than the {} image.",
    "total": "There are {} {} in total.",
    "one": "There is one {} in total.",
}
NUMBERS = ("no", "one", "two", "three", "four")
_SIDE, _CLEAR = 0.36, 0.46  # "left": the centre is in the left 36% of the image; no other one is in the left 46%


def _nlvr2(rng: np.random.Generator, split: str, serial: int) -> list[Draft]:
    """One statement over two pairs of images: true of the first, false of the second."""
    kind = tuple(STATEMENTS)[:6][serial % 6]
    if kind == "more":
        statement, pairs = _more(rng, split)
    elif kind == "total":
        statement, pairs = _total(rng, split)
    else:
        statement, pairs = _contains(rng, split, kind)
    drafts = []
    for truth, scenes in zip(("True", "False"), pairs, strict=True):
        drafts.append(Draft("nlvr2", scenes, {"statement": statement, "answer": truth}, meta={"asks": kind}))
    return drafts


def _contains(rng: np.random.Generator, split: str, kind: str) -> tuple[str, list[list[Scene]]]:
    pair = draw_pair(rng, split)
    has_both, none = (1, 1), (0, 0)
    left, right = (1, 0), (0, 1)
    true, false = {
        "both": ((has_both,), (left, right, none)),
        "left": ((left, has_both), (right, right, none)),
        "right": ((right, has_both), (left, left, none)),
        "exactly one": ((left, right), (has_both, none)),
    }[kind]
    pairs = [[scene_with(rng, split, pair, number) for number in pick(rng, options)] for options in (true, false)]
    return STATEMENTS[kind].format(article(f"{pair['colour']} {pair['shape']}")), pairs


def _more(rng: np.random.Generator, split: str) -> tuple[str, list[list[Scene]]]:
    sides = pick(rng, (("left", "right"), ("right", "left")))
    pairs = []
    for left_has_more in (sides[0] == "left", sides[0] != "left"):
        few = int(rng.integers(1, 4))
        counts = (int(rng.integers(few + 1, 5)), few)
        pairs.append([random_scene(rng, split, count=n) for n in (counts if left_has_more else counts[::-1])])
    return STATEMENTS["more"].format(*sides), pairs


def _total(rng: np.random.Generator, split: str) -> tuple[str, list[list[Scene]]]:
    shape, number = pick(rng, SHAPES), int(rng.integers(1, 5))
    pairs = []
    for total in (number, number + pick(rng, (-1, 1))):
        left = int(rng.integers(max(0, total - 3), min(3, total) + 1))
        pairs.append([scene_with(rng, split, {"shape": shape}, n) for n in (left, total - left)])
    if number == 1:
        return STATEMENTS["one"].format(shape), pairs
    return STATEMENTS["total"].format(NUMBERS[number], plural(shape)), pairs


def _coseg(rng: np.random.Generator, split: str, serial: int) -> list[Draft]:
    """Two to four images that share one shape, seen once in each; no other shape is in all of them."""
    shape, number = pick(rng, SHAPES), 2 + serial % 3
    while True:
        scenes = [
            random_scene(
                rng, split, [{"shape": shape}], count=pick(rng, (2, 2, 3)), allow=lambda a: a["shape"] != shape
            )
            for _ in range(number)
        ]
        if set.intersection(*({o.shape for o in scene.objects} for scene in scenes)) == {shape}:
            break
    regions = [region_of(scene, scene.focus, "mask", i, image=i) for i, scene in enumerate(scenes)]
    return [Draft("coseg", scenes, {"targets": list(range(number))}, regions, {"class": shape})]


def _from_side(scene: Scene, scene_object: SceneObject, side: str) -> float:
    """Distance of the object's centre from a side, as a share of the image."""
    x, y = scene_object.centre[0] / scene.width, scene_object.centre[1] / scene.height
    return {"left": x, "right": 1 - x, "top": y, "bottom": 1 - y}[side]


def _find(scene: Scene, name: str, value: str) -> list[int] | None:
    """Objects with that value of an attribute, or at that side; None when an object's side is not clear."""
    if name != "position":
        return [i for i, o in enumerate(scene.objects) if matches(attributes_of(o), {name: value})]
    distance = [_from_side(scene, o, value) for o in scene.objects]
    return None if any(_SIDE <= d < _CLEAR for d in distance) else [i for i, d in enumerate(distance) if d < _SIDE]


def _attribute_scene(rng: np.random.Generator, split: str, name: str, value: str, present: bool) -> Scene:
    """A scene with exactly one object of that attribute value, its focus, or with none."""
    wanted: list[Attributes] = [{name: value}] if present and name != "position" else []

    def accept(scene: Scene) -> bool:
        found = _find(scene, name, value)
        if found is None or len(found) != int(present):
            return False
        scene.focus = found[0] if found else scene.focus
        return True

    def allow(attributes: Attributes) -> bool:
        return attributes.get(name) != value

    return random_scene(rng, split, wanted, count=pick(rng, (2, 2, 3)), allow=allow, accept=accept)


def _attcoseg(rng: np.random.Generator, split: str, serial: int) -> list[Draft]:
    """Two to four images; some hold one object of the named attribute value, the others none."""
    values = dict(ATTRIBUTES, position=PLACE_NAMES)
    name = tuple(values)[serial % len(values)]
    value, number = pick(rng, values[name]), int(rng.integers(2, 5))
    positives = sorted(rng.permutation(number)[: int(rng.integers(1, number + 1))].tolist())
    scenes = [_attribute_scene(rng, split, name, value, i in positives) for i in range(number)]
    regions = [region_of(scenes[i], scenes[i].focus, "mask", k, image=i) for k, i in enumerate(positives)]
    numbers = [str(i + 1) for i in positives]
    images = numbers[0] if len(numbers) == 1 else f"{', '.join(numbers[:-1])} and {numbers[-1]}"
    fields = {"attribute": name, "value": value, "images": images, "targets": list(range(len(positives)))}
    return [Draft("attcoseg", scenes, fields, regions, {"asks": name, "positives": len(positives)})]


MULTI_MAKERS: dict[str, Maker] = {"nlvr2": _nlvr2, "coseg": _coseg, "attcoseg": _attcoseg}
MULTI_WORDS = (*STATEMENTS.values(), *NUMBERS, *ATTRIBUTES, "position True False 1 2 3 4 and")
