"""Which images of Visual Genome show an attribute value, and with which masks: for `attcoseg`.

In: the attributes of one image's objects (words and boxes) and the masks that another dataset has for the same image.
Out: per attribute value whether the image is an example (all objects of the value, with masks), a counter-example, or
neither, with the reason. Frame: boxes are (x0, y0, x1, y1), pixels of the image that the masks belong to.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from importlib import resources
from typing import Any

from omegaconf import OmegaConf

Box = tuple[float, float, float, float]
PLACES = ("left", "right", "top", "bottom")
# An object is at a side when its middle is in the third there; up to _CLEAR one may disagree, so the image is not used.
_SIDE, _CLEAR = 1 / 3, 0.45
_PART = 0.8  # share of a box inside a target's from which on it is a part of that object ("red door" of the red bus)


@dataclass(frozen=True)
class Words:
    """The word lists of attribute_words.yaml.

    Attributes:
        scales: (attribute, scale) -> word -> value. same_as: category -> further names of its objects.
    """

    scales: dict[tuple[str, str], dict[str, str]]
    same_as: dict[str, list[str]]


def read_words() -> Words:
    """Read the package's word lists."""
    text = resources.files("vistallm.coinit").joinpath("attribute_words.yaml").read_text(encoding="utf-8")
    data: Any = OmegaConf.to_container(OmegaConf.create(text))
    scales = {
        (attribute, scale): {word: value for value, words in values.items() for word in words}
        for attribute, found in data["attributes"].items()
        for scale, values in found.items()
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
    """What makes an image an example.

    Attributes:
        iou: boxes from this overlap on are one object. objects: the most objects of a value. area: each one's least
            share of the image. outside: so many objects of the value may lack a mask. names: whether the names of box
            and mask must agree.
    """

    iou: float = 0.6
    objects: int = 3
    area: float = 0.01
    outside: int = 0
    names: bool = True


@dataclass
class Findings:
    """What one image is to every value.

    Attributes:
        examples: (attribute, value) -> things that have it. counters: values that it lacks, though it shows another of
            the same scale. words: (attribute, value) -> names of what decided it. left_out: reason -> times.
    """

    examples: dict[tuple[str, str], list[Thing]] = field(default_factory=dict)
    counters: list[tuple[str, str]] = field(default_factory=list)
    words: dict[tuple[str, str], frozenset[str]] = field(default_factory=dict)
    left_out: Counter[str] = field(default_factory=Counter)

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

    def lacks(self, key: tuple[str, str], words: frozenset[str]) -> None:
        """Take the image as a counter-example of a value."""
        self.counters.append(key)
        self.words[key] = words


def name_words(names: list[str]) -> frozenset[str]:
    """The single words of names in lower case, also without a plural's -s or -es ("buses", "horses")."""
    words = " ".join(names).lower().replace("_", " ").replace("(", " ").replace(")", " ").split()
    return frozenset(word.removesuffix(end) for word in words for end in (("", "s", "es") if len(word) > 3 else ("",)))


def overlap(a: Box, b: Box) -> float:
    """Area that two boxes share, in pixels."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    return width * height if width > 0 and height > 0 else 0.0


def _area(box: Box) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])


def find_thing(box: Box, words: frozenset[str], things: list[Thing], limits: Limits) -> int | None:
    """Index of the thing that a named box is: the one of the best IoU, from `limits.iou` on, whose names agree."""
    best, found = limits.iou, None
    for index, thing in enumerate(things):
        shared = overlap(box, thing.box)
        iou = shared / (_area(box) + _area(thing.box) - shared) if shared else 0.0
        if iou >= best and (not limits.names or words & thing.words):
            best, found = iou, index
    return found


def find_attributes(objects: list[Named], things: list[Thing], words: Words, limits: Limits) -> Findings:
    """What the image is to every value that words say; the values of a scale exclude each other."""
    findings = Findings()
    for (attribute, _), values in words.scales.items():
        clear, unclear = _sort_objects(objects, values)
        of_value = {value: {e.thing for e in entries if e.thing is not None} for value, entries in clear.items()}
        for value, entries in clear.items():
            targets = [things[index] for index in sorted(of_value[value])]
            if value in unclear or any(of_value[value] & of_value[other] for other in clear if other != value):
                findings.left_out["two-values"] += 1
            elif _outside(entries, targets) > limits.outside:
                findings.left_out["without-mask"] += 1
            else:
                seen = _all_words(entry for entry in entries if entry.thing is not None)
                findings.accept((attribute, value), targets, seen, limits)
        seen = _all_words(entry for entries in clear.values() for entry in entries)
        for value in dict.fromkeys(values.values()) if clear else ():
            if value not in clear and value not in unclear:
                findings.lacks((attribute, value), seen)
    return findings


def _sort_objects(objects: list[Named], values: dict[str, str]) -> tuple[dict[str, list[Named]], set[str]]:
    """The objects of each value of a scale, and the values that some object has together with another one."""
    clear: dict[str, list[Named]] = {}
    unclear: set[str] = set()
    for entry in objects:
        said = {values[word] for word in entry.attributes if word in values}
        hinted = said | {values[w] for text in entry.attributes for w in text.split() if w in values}
        if len(said) == 1 == len(hinted):
            clear.setdefault(min(said), []).append(entry)
        else:  # "red and white", or both: neither value is the object's
            unclear |= hinted
    return clear, unclear


def _all_words(things: Iterable[Named | Thing]) -> frozenset[str]:
    return frozenset(word for thing in things for word in thing.words)


def _outside(entries: list[Named], targets: list[Thing]) -> int:
    """Objects of a value that neither have a mask nor are part of one that has."""
    return sum(
        entry.thing is None and not any(overlap(entry.box, thing.box) >= _PART * _area(entry.box) for thing in targets)
        for entry in entries
    )


def find_positions(things: list[Thing], width: int, height: int, limits: Limits, findings: Findings) -> None:
    """Which sides of the image have things, by the middles of their boxes; adds to `findings`."""
    for place in PLACES:
        inside, unsure = [], False
        for thing in things:
            x, y = (thing.box[0] + thing.box[2]) / 2 / width, (thing.box[1] + thing.box[3]) / 2 / height
            distance = {"left": x, "right": 1 - x, "top": y, "bottom": 1 - y}[place]
            if distance < _SIDE:
                inside.append(thing)
            unsure |= _SIDE <= distance < _CLEAR
        key = ("position", place)
        if unsure:
            findings.left_out["unclear-side"] += 1
        elif inside:
            findings.accept(key, inside, _all_words(inside), limits)
        elif things:
            findings.lacks(key, _all_words(things))


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
