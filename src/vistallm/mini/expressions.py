"""Referring expressions of the mini world: scene objects in, unambiguous phrases out (and their meaning back).

A phrase is `[quantity] [size] [texture] [colour] noun [place]`: "the small red star", "all blue objects", "the leftmost
circle". `Expression.resolve` is its meaning, and the only definition of it: the builders keep a phrase when it resolves
to exactly the wanted objects.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from vistallm.mini.scene import ATTRIBUTES, HELD_OUT, NOUN, Attributes, Scene, SceneObject

PLACES = {"left": "on the left", "right": "on the right", "top": "at the top", "bottom": "at the bottom"}
EXTREMES = {"left": "leftmost", "right": "rightmost", "top": "topmost", "bottom": "bottommost"}
PLACE_MARGIN, EXTREME_MARGIN = 0.22, 0.12  # distance to the next candidate, as a share of the canvas side

# What may be said of one object, short and natural first; `describe` keeps the first that is unambiguous.
_FORMS: tuple[tuple[tuple[str, ...], float], ...] = (
    (("colour", "shape"), 5.0),
    (("shape",), 3.0),
    (("colour",), 1.0),
    (("size", "shape"), 1.5),
    (("texture", "shape"), 1.5),
    (("texture",), 0.7),
    (("size",), 0.5),
    (("size", "colour"), 0.7),
    (("texture", "colour"), 0.7),
    (("size", "colour", "shape"), 2.0),
    (("texture", "colour", "shape"), 2.0),
    (("size", "texture", "colour", "shape"), 2.0),
)
_PLACED_FORMS = ((("colour", "shape"), 3.0), (("shape",), 3.0), ((), 0.3))


def plural(noun: str) -> str:
    """Plural of a noun of the mini world."""
    return noun + ("es" if noun.endswith("s") else "s")


def article(phrase: str) -> str:
    """The phrase with "a" or "an" before it."""
    return ("an " if phrase[0] in "aeiou" else "a ") + phrase


@dataclass(frozen=True)
class Expression:
    """What a phrase says of its targets (None = nothing); `place` is a key of PLACES, `extreme` its "-most" form."""

    shape: str | None = None
    colour: str | None = None
    size: str | None = None
    texture: str | None = None
    place: str | None = None
    extreme: bool = False

    @classmethod
    def of(cls, attributes: Attributes) -> Expression:
        """An expression that states these attributes."""
        shape, colour, size, texture = (attributes.get(name) for name in ATTRIBUTES)
        return cls(shape, colour, size, texture)

    def attributes(self) -> Attributes:
        """The named attributes alone."""
        return {name: value for name in ATTRIBUTES if (value := getattr(self, name)) is not None}

    def phrase(self, many: bool = False) -> str:
        """The words without a quantity: "small red star on the left" or, for many, "red stars"."""
        noun = self.shape or NOUN
        words = [self.size, self.texture, self.colour, plural(noun) if many else noun]
        if self.place is not None:
            words = [EXTREMES[self.place], *words] if self.extreme else [*words, PLACES[self.place]]
        return " ".join(word for word in words if word)

    def resolve(self, scene: Scene) -> list[int]:
        """Indices of the scene's objects that the phrase means; empty when none, or when a place is not clear cut."""
        found = [i for i, o in enumerate(scene.objects) if matches(attributes_of(o), self.attributes())]
        if self.place is None:
            return found
        axis, sign = (0 if self.place in ("left", "right") else 1), (1 if self.place in ("left", "top") else -1)
        side = (scene.width, scene.height)[axis]
        ranked = sorted(found, key=lambda i: sign * scene.objects[i].centre[axis])
        if len(ranked) < 2:
            return []  # a place word on a lone candidate would say nothing
        first, second = (scene.objects[i].centre[axis] / side for i in ranked[:2])
        near_side = first < 0.5 if sign > 0 else first > 0.5
        clear = abs(second - first) >= (EXTREME_MARGIN if self.extreme else PLACE_MARGIN)
        return ranked[:1] if clear and (near_side or self.extreme) else []

    @property
    def held_out(self) -> bool:
        """Whether it names a pair of shape and colour that training never names."""
        return (self.shape, self.colour) in HELD_OUT


def attributes_of(scene_object: SceneObject) -> Attributes:
    """The four attributes of an object as words."""
    return {name: getattr(scene_object, name) for name in ATTRIBUTES}


def matches(attributes: Attributes, wanted: Attributes) -> bool:
    """Whether an object of `attributes` has all of `wanted`."""
    return all(attributes[name] == value for name, value in wanted.items())


def expression_of(scene_object: SceneObject, names: Sequence[str]) -> Expression:
    """An expression that states the named attributes of the object."""
    return Expression.of({name: getattr(scene_object, name) for name in names})


def unambiguous(scene: Scene, target: int, without: Sequence[str] = ()) -> Iterator[tuple[Expression, float]]:
    """All phrases that mean exactly the target and hold no needless word, with a weight for drawing one.

    Args:
        scene: the scene.
        target: index of the object.
        without: attributes that must not be named (the question asks for them).
    """
    scene_object = scene.objects[target]
    shortest: list[set[str]] = []
    for names, weight in _FORMS:
        expression = expression_of(scene_object, names)
        # Colour and shape (tried first) are how one speaks; any other phrase is kept only if no part of it is enough.
        needless = any(done < set(names) for done in shortest)
        if not set(names) & set(without) and not needless and expression.resolve(scene) == [target]:
            shortest.append(set(names))
            yield expression, weight
    for names, weight in _PLACED_FORMS:
        plain = expression_of(scene_object, names)
        if set(names) & set(without):
            continue
        for place in PLACES:
            for extreme in (False, True):
                placed = replace(plain, place=place, extreme=extreme)
                if placed.resolve(scene) == [target]:
                    yield placed, weight / 2


def refer(rng: np.random.Generator, scene: Scene, target: int, without: Sequence[str] = ()) -> Expression | None:
    """Draw an unambiguous expression for the target; None when there is none."""
    found = list(unambiguous(scene, target, without))
    if not found:
        return None
    weights = np.cumsum([weight for _, weight in found])
    return found[int(np.searchsorted(weights, rng.random() * weights[-1], side="right"))][0]


def describe(scene: Scene, target: int) -> Expression | None:
    """The one expression that region captions use: colour, shape and what else is needed; None if nothing helps."""
    scene_object = scene.objects[target]
    forms = [names for names, _ in _FORMS if "colour" in names and "shape" in names]
    for names in forms:
        if (expression := expression_of(scene_object, names)).resolve(scene) == [target]:
            return expression
    plain = expression_of(scene_object, ("colour", "shape"))
    for extreme in (False, True):
        for place in PLACES:
            if (placed := replace(plain, place=place, extreme=extreme)).resolve(scene) == [target]:
                return placed
    return None


def grid_place(scene: Scene, target: int) -> str:
    """Where the object is, roughly, in words: "on the left", "at the top right", "in the middle"."""
    x, y = scene.objects[target].centre
    column = ("left", "", "right")[int(x / scene.width > 0.38) + int(x / scene.width > 0.62)]
    row = ("top", "", "bottom")[int(y / scene.height > 0.38) + int(y / scene.height > 0.62)]
    if row:
        return f"at the {row} {column}".strip()
    return PLACES[column] if column else "in the middle"
