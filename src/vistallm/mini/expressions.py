"""Referring expressions of the mini world: scene objects in, unambiguous phrases out (and their meaning back).

A phrase is `[quantity] [size] [texture] [colour] noun [side]`: "the small red star", "all blue objects", "the leftmost
circle". `Expression.resolve` is its meaning, and the only definition of it: the builders keep a phrase when it resolves
to exactly the wanted objects.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from vistallm.mini.scene import ATTRIBUTES, HELD_OUT, NOUN, Attributes, Rng, Scene, SceneObject

AT_SIDE = {"left": "on the left", "right": "on the right", "top": "at the top", "bottom": "at the bottom"}
EXTREMES = {"left": "leftmost", "right": "rightmost", "top": "topmost", "bottom": "bottommost"}
_SIDE_MARGIN, _EXTREME_MARGIN = 0.22, 0.12  # distance to the next candidate, as a share of the canvas side

# Attributes that a phrase names and its weight; colour and shape are how one speaks, so they come first.
_FORMS = (
    ("colour shape", 5.0),
    ("shape", 3.0),
    ("colour", 1.0),
    ("size shape", 1.5),
    ("texture shape", 1.5),
    ("texture", 0.7),
    ("size", 0.5),
    ("size colour", 0.7),
    ("texture colour", 0.7),
    ("size colour shape", 2.0),
    ("texture colour shape", 2.0),
    ("size texture colour shape", 2.0),
)
_FORMS_AT_SIDE = (("colour shape", 3.0), ("shape", 3.0), ("", 0.3))


def plural(noun: str) -> str:
    """Plural of a noun of the mini world."""
    return noun + ("es" if noun.endswith("s") else "s")


def article(phrase: str) -> str:
    """The phrase with "a" or "an" before it."""
    return ("an " if phrase[0] in "aeiou" else "a ") + phrase


def matches(attributes: Attributes, wanted: Attributes) -> bool:
    """Whether an object of `attributes` has all of `wanted`."""
    return all(attributes[name] == value for name, value in wanted.items())


@dataclass(frozen=True)
class Expression:
    """What a phrase says of its targets (None = nothing); `side` is a key of AT_SIDE, `extreme` its "-most" form."""

    shape: str | None = None
    colour: str | None = None
    size: str | None = None
    texture: str | None = None
    side: str | None = None
    extreme: bool = False

    @classmethod
    def of(cls, scene_object: SceneObject, names: Sequence[str]) -> Expression:
        """An expression that states the named attributes of the object."""
        return cls(**{name: getattr(scene_object, name) for name in names})

    def phrase(self, many: bool = False) -> str:
        """The words without a quantity: "small red star on the left" or, for many, "red stars"."""
        noun = self.shape or NOUN
        words = [self.size, self.texture, self.colour, plural(noun) if many else noun]
        if self.side is not None:
            words = [EXTREMES[self.side], *words] if self.extreme else [*words, AT_SIDE[self.side]]
        return " ".join(word for word in words if word)

    def resolve(self, scene: Scene) -> list[int]:
        """Indices of the scene's objects that the phrase means; empty when none, or when a side is not clear cut."""
        wanted = {name: value for name in ATTRIBUTES if (value := getattr(self, name)) is not None}
        candidates = [i for i, o in enumerate(scene.objects) if matches(o.attributes, wanted)]
        if self.side is None:
            return candidates
        axis, sign = (0 if self.side in ("left", "right") else 1), (1 if self.side in ("left", "top") else -1)
        ranked = sorted(candidates, key=lambda i: sign * scene.objects[i].centre[axis])
        if len(ranked) < 2:
            return []  # a side would say nothing about a lone candidate
        length = (scene.width, scene.height)[axis]
        first, second = (scene.objects[i].centre[axis] / length for i in ranked[:2])
        near_side = first < 0.5 if sign > 0 else first > 0.5
        clear = abs(second - first) >= (_EXTREME_MARGIN if self.extreme else _SIDE_MARGIN)
        return ranked[:1] if clear and (near_side or self.extreme) else []

    @property
    def held_out(self) -> bool:
        """Whether it names a pair of shape and colour that training never names."""
        return (self.shape, self.colour) in HELD_OUT


def unambiguous(scene: Scene, target: int, without: Sequence[str] = ()) -> Iterator[tuple[Expression, float]]:
    """All phrases that mean exactly object `target` and hold no needless word, with a weight for drawing one.

    `without` lists attributes that must not be named (the question asks for them).
    """
    scene_object = scene.objects[target]
    shortest: list[set[str]] = []
    for form, weight in _FORMS:
        names = form.split()
        expression = Expression.of(scene_object, names)
        # Any phrase but the first is kept only if no part of it is enough.
        needless = any(enough < set(names) for enough in shortest)
        if not set(names) & set(without) and not needless and expression.resolve(scene) == [target]:
            shortest.append(set(names))
            yield expression, weight
    for form, weight in _FORMS_AT_SIDE:
        if not set(form.split()) & set(without):
            plain = Expression.of(scene_object, form.split())
            for side in AT_SIDE:
                for extreme in (False, True):
                    if (expression := replace(plain, side=side, extreme=extreme)).resolve(scene) == [target]:
                        yield expression, weight / 2


def refer(rng: Rng, scene: Scene, target: int, without: Sequence[str] = ()) -> Expression | None:
    """Draw an unambiguous expression for the target; None when there is none."""
    options = list(unambiguous(scene, target, without))
    if not options:
        return None
    weights = np.cumsum([weight for _, weight in options])
    return options[int(np.searchsorted(weights, rng.random() * weights[-1], side="right"))][0]


def describe(scene: Scene, target: int) -> Expression | None:
    """The one expression that region captions use: colour, shape and what else is needed; None if nothing helps."""
    scene_object = scene.objects[target]
    full = [Expression.of(scene_object, form.split()) for form, _ in _FORMS if "colour shape" in form]
    full += [replace(full[0], side=side, extreme=extreme) for extreme in (False, True) for side in AT_SIDE]
    return next((expression for expression in full if expression.resolve(scene) == [target]), None)


def grid_position(scene: Scene, scene_object: SceneObject) -> str:
    """The ninth of the image that the object is in, in words: "on the left", "at the top right", "in the middle"."""
    x, y = scene_object.centre
    column = ("left", "", "right")[int(x / scene.width > 0.38) + int(x / scene.width > 0.62)]
    row = ("top", "", "bottom")[int(y / scene.height > 0.38) + int(y / scene.height > 0.62)]
    if row:
        return f"at the {row} {column}".strip()
    return AT_SIDE[column] if column else "in the middle"
