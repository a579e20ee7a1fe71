"""Referring expressions of the mini world: scene objects in, unambiguous phrases out (and their meaning back).

A phrase is `[quantity] [size] [texture] [colour] noun [side]`: "the small red star", "all blue objects", "the leftmost
circle". `Expression.resolve` is its meaning, and the only definition of it: the builders keep a phrase when it resolves
to exactly the wanted objects.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from vistallm.mini.scene import NOUN, Attributes, Rng, Scene, SceneObject

AT_SIDE = {"left": "on the left", "right": "on the right", "top": "at the top", "bottom": "at the bottom"}
EXTREMES = {"left": "leftmost", "right": "rightmost", "top": "topmost", "bottom": "bottommost"}
_SIDE_MARGIN, _EXTREME_MARGIN = 0.22, 0.12  # distance to the next candidate, as a share of the canvas side

# Attributes that a phrase names and its weight; colour and shape are how one speaks, so they come first.
_FORMS = {
    "colour shape": 5.0, "shape": 3.0, "colour": 1.0, "size shape": 1.5, "texture shape": 1.5, "texture": 0.7,
    "size": 0.5, "size colour": 0.7, "texture colour": 0.7, "size colour shape": 2.0, "texture colour shape": 2.0,
    "size texture colour shape": 2.0,
}  # fmt: skip
_FORMS_AT_SIDE = {"colour shape": 3.0, "shape": 3.0, "": 0.3}


def plural(noun: str) -> str:
    """Plural of a noun of the mini world."""
    return noun + ("es" if noun.endswith("s") else "s")


def article(phrase: str) -> str:
    """The phrase with "a" or "an" before it."""
    return ("an " if phrase[0] in "aeiou" else "a ") + phrase


@dataclass(frozen=True)
class Expression:
    """What a phrase says of its targets; `side` is a key of AT_SIDE or None, `extreme` its "-most" form."""

    attributes: Attributes
    side: str | None = None
    extreme: bool = False

    def phrase(self, many: bool = False) -> str:
        """The words without a quantity: "small red star on the left" or, for many, "red stars"."""
        noun = self.attributes.get("shape", NOUN)
        words = [self.attributes.get(name, "") for name in ("size", "texture", "colour")]
        words.append(plural(noun) if many else noun)
        if self.side is not None:
            words = [EXTREMES[self.side], *words] if self.extreme else [*words, AT_SIDE[self.side]]
        return " ".join(word for word in words if word)

    def resolve(self, scene: Scene) -> list[int]:
        """Indices of the scene's objects that the phrase means; empty when none, or when a side is not clear cut."""
        candidates = [i for i, o in enumerate(scene.objects) if self.attributes.items() <= o.attributes.items()]
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


def _stating(scene: Scene, target: int, form: str) -> Expression:
    """An expression that states the attributes of an object that the form names."""
    return Expression({name: scene.objects[target].attributes[name] for name in form.split()})


def unambiguous(scene: Scene, target: int, without: str = "") -> Iterator[tuple[Expression, float]]:
    """All phrases that mean exactly object `target` and hold no needless word, with a weight for drawing one.

    `without` is an attribute that must not be named (the question asks for it).
    """
    shortest: list[set[str]] = []
    for form, weight in _FORMS.items():
        names, expression = set(form.split()), _stating(scene, target, form)
        # Any phrase but the first is kept only if no part of it is enough.
        needless = any(enough < names for enough in shortest)
        if without not in names and not needless and expression.resolve(scene) == [target]:
            shortest.append(names)
            yield expression, weight
    for form, weight in _FORMS_AT_SIDE.items():
        if without not in form.split():
            for side in AT_SIDE:
                for extreme in (False, True):
                    expression = replace(_stating(scene, target, form), side=side, extreme=extreme)
                    if expression.resolve(scene) == [target]:
                        yield expression, weight / 2


def refer(rng: Rng, scene: Scene, target: int, without: str = "") -> Expression | None:
    """Draw an unambiguous expression for the target; None when there is none."""
    options = list(unambiguous(scene, target, without))
    if not options:
        return None
    weights = np.cumsum([weight for _, weight in options])
    return options[int(np.searchsorted(weights, rng.random() * weights[-1], side="right"))][0]


def describe(scene: Scene, target: int) -> Expression | None:
    """The one expression that region captions use: colour, shape and what else is needed; None if nothing helps."""
    full = [_stating(scene, target, form) for form in _FORMS if "colour shape" in form]
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
