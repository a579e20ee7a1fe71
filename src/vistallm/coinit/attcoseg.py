"""Which images of Visual Genome show an attribute value, and with which masks: for `attcoseg`.

In: the attributes of one image's objects (words and boxes) and the masks that another dataset has for the same image.
Out: per attribute value whether the image is an example (all objects of the value, with masks), a counter-example, or
neither, with the reason. Frame: boxes are (x0, y0, x1, y1), pixels of the image that the masks belong to.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

Box = tuple[float, float, float, float]
PLACES = ("left", "right", "top", "bottom")
# An object is at a side when its middle is in the third there; up to _CLEAR one may disagree, so the image is not used.
_SIDE, _CLEAR = 1 / 3, 0.45
_PART = 0.8  # share of a box inside a target's from which on it is a part of that object ("red door" of the red bus)


@dataclass(frozen=True)
class Words:
    """The word lists of attribute_words.yaml."""

    scales: dict[tuple[str, str], dict[str, str]]  # (attribute, scale) -> word -> value
    same_as: dict[str, list[str]]  # category -> further names of its objects


def read_words() -> Words:
    """Read the package's word lists."""
    data = yaml.safe_load(Path(__file__).with_name("attribute_words.yaml").read_text(encoding="utf-8"))
    scales = {
        (attribute, scale): {word: value for value, words in values.items() for word in words}
        for attribute, entries in data["attributes"].items()
        for scale, values in entries.items()
    }
    return Words(scales, data["same_as"])


@dataclass(frozen=True)
class Thing:
    """An object with a mask: its box, area as a share of the image, words it may be called, place in the mask file."""

    box: Box
    area: float
    words: frozenset[str]
    number: int
    crowd: bool = False


@dataclass(frozen=True)
class Named:
    """An object of Visual Genome: box, words of its names, attributes in lower case, index of its Thing if any."""

    box: Box
    words: frozenset[str]
    attributes: tuple[str, ...]
    thing: int | None = None


@dataclass(frozen=True)
class Limits:
    """What makes an image an example."""

    iou: float = 0.6  # boxes from this overlap on are one object
    objects: int = 3  # the most objects of a value
    area: float = 0.01  # each one's least share of the image
    outside: int = 0  # so many objects of the value may lack a mask
    names: bool = True  # whether the names of box and mask must agree


@dataclass
class Findings:
    """What one image is to every (attribute, value)."""

    examples: dict[tuple[str, str], list[Thing]] = field(default_factory=dict)  # things that have the value
    counters: list[tuple[str, str]] = field(default_factory=list)  # values it lacks, of scales that it shows
    words: dict[tuple[str, str], frozenset[str]] = field(default_factory=dict)  # names of what decided it
    left_out: Counter[str] = field(default_factory=Counter)  # reason -> times

    def accept(self, key: tuple[str, str], things: list[Thing], words: frozenset[str], limits: Limits) -> None:
        """Take the image as an example of a value, if its objects are few, large and single."""
        if not things:
            self.left_out["without-mask"] += 1
        elif len(things) > limits.objects or any(thing.crowd for thing in things):
            self.left_out["too-many"] += 1
        elif min(thing.area for thing in things) < limits.area:
            self.left_out["too-small"] += 1
        else:
            self.examples[key], self.words[key] = things, words


def name_words(names: list[str]) -> frozenset[str]:
    """The single words of names in lower case, also without a plural's -s or -es ("buses", "horses")."""
    words = " ".join(names).lower().replace("_", " ").replace("(", " ").replace(")", " ").split()
    return frozenset(word.removesuffix(end) for word in words for end in (("", "s", "es") if len(word) > 3 else ("",)))


def _shared(a: Box, b: Box) -> float:
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    return width * height if width > 0 and height > 0 else 0.0


def _area(box: Box) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])


def find_thing(box: Box, words: frozenset[str], things: list[Thing], limits: Limits) -> int | None:
    """Index of the thing that a named box is: the one of the best IoU, from `limits.iou` on, whose names agree."""
    best, chosen = limits.iou, None
    for index, thing in enumerate(things):
        shared = _shared(box, thing.box)
        iou = shared / (_area(box) + _area(thing.box) - shared) if shared else 0.0
        if iou >= best and (not limits.names or words & thing.words):
            best, chosen = iou, index
    return chosen


def find_attributes(objects: list[Named], things: list[Thing], words: Words, limits: Limits) -> Findings:
    """What the image is to every value that words say; the values of a scale exclude each other."""
    findings = Findings()
    for (attribute, _), values in words.scales.items():
        clear: dict[str, list[Named]] = {}  # the objects of each value
        unclear: set[str] = set()  # values that some object has together with another one, "red and white"
        for entry in objects:
            exact = {values[word] for word in entry.attributes if word in values}
            hinted = exact | {values[w] for text in entry.attributes for w in text.split() if w in values}
            if len(exact) == 1 == len(hinted):
                clear.setdefault(min(exact), []).append(entry)
            else:
                unclear |= hinted
        of_value = {value: {e.thing for e in entries if e.thing is not None} for value, entries in clear.items()}
        for value, entries in clear.items():
            targets = [things[index] for index in sorted(of_value[value])]
            bare = [entry.box for entry in entries if entry.thing is None]
            lacking = [box for box in bare if all(_shared(box, t.box) < _PART * _area(box) for t in targets)]
            if value in unclear or any(of_value[value] & of_value[other] for other in clear if other != value):
                findings.left_out["two-values"] += 1
            elif len(lacking) > limits.outside:
                findings.left_out["without-mask"] += 1
            else:
                seen = frozenset(word for entry in entries if entry.thing is not None for word in entry.words)
                findings.accept((attribute, value), targets, seen, limits)
        seen = frozenset(word for entries in clear.values() for entry in entries for word in entry.words)
        for value in dict.fromkeys(values.values()) if clear else ():
            if value not in clear and value not in unclear:
                findings.counters.append((attribute, value))
                findings.words[attribute, value] = seen
    return findings


def find_positions(things: list[Thing], width: int, height: int, limits: Limits, findings: Findings) -> None:
    """Which sides of the image have things, by the middles of their boxes; adds to `findings`."""
    middles = [((x0 + x1) / 2 / width, (y0 + y1) / 2 / height) for x0, y0, x1, y1 in (thing.box for thing in things)]
    for place in PLACES:
        distances = [{"left": x, "right": 1 - x, "top": y, "bottom": 1 - y}[place] for x, y in middles]
        inside = [thing for thing, distance in zip(things, distances, strict=True) if distance < _SIDE]
        words = frozenset(word for thing in inside or things for word in thing.words)
        if any(_SIDE <= distance < _CLEAR for distance in distances):
            findings.left_out["unclear-side"] += 1
        elif inside:
            findings.accept(("position", place), inside, words, limits)
        elif things:
            findings.counters.append(("position", place))
            findings.words["position", place] = words


def named_objects(
    record: list[dict[str, Any]], scale: tuple[float, float], things: list[Thing], limits: Limits
) -> Iterator[Named]:
    """Objects of attributes.json that have attributes, their boxes scaled (x, y) to the image of the masks."""
    for entry in record:
        if attributes := tuple(" ".join(str(text).lower().split()) for text in entry.get("attributes") or ()):
            x, y, w, h = (entry[key] for key in ("x", "y", "w", "h"))
            box = (x * scale[0], y * scale[1], (x + w) * scale[0], (y + h) * scale[1])
            words = name_words([str(name) for name in entry.get("names", ())])
            yield Named(box, words, attributes, find_thing(box, words, things, limits))
