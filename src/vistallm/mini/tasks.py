"""The mini world's tasks: a random generator and a split in, scenes with template fields and regions out.

Every maker draws a fresh scene to its needs, so answers are balanced by construction, and puts the focus object of the
scene to the question: in val and test half of the focus objects are of a shape and colour that training never shows
together. A maker gives one sample, or the two of a pair (a question and its reason; a true and a false statement).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import cv2
import numpy as np

from vistallm.mini import expressions as ex
from vistallm.mini.expressions import Expression, article, refer
from vistallm.mini.scene import (
    ATTRIBUTES,
    SHAPES,
    SIDES,
    Attributes,
    Rng,
    Scene,
    is_held_out,
    pick,
    random_attributes,
    random_scene,
)
from vistallm.regions.masks import mask_to_rle
from vistallm.schema import Region

QUESTIONS = {
    "colour": "What colour is {}?",
    "shape": "What shape is {}?",
    "size": "What size is {}?",
    "texture": "What texture does {} have?",
    "count": "How many {} are there?",
    "same shape": "How many of these {} are there?",
    "same colour": "How many objects of this colour {} are there?",
    "which": "Which is {}?",
    "presence": "Is there {} in the image?",
    "why": "{} It is {}. Why?",
    "reason": "There is {}.",
}
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
# How many objects the left and the right image may hold, where the statement is true and where it is false.
_HOLDING = {
    "both": (((1, 1),), ((1, 0), (0, 1), (0, 0))),
    "left": (((1, 0), (1, 1)), ((0, 1), (0, 1), (0, 0))),
    "right": (((0, 1), (1, 1)), ((1, 0), (1, 0), (0, 0))),
    "exactly one": (((1, 0), (0, 1)), ((1, 1), (0, 0))),
}
LETTERS = ("(A)", "(B)", "(C)", "(D)")
OTHER_WORDS = "the all both in middle top bottom left right and yes no True False position 0 1 2 3 4 . , a an A An"
_AT_SIDE, _CLEAR = 0.36, 0.46  # "left": the centre is in the left 36% of the image; no other one is in the left 46%


@dataclass
class SceneSample:
    """A sample before its images are drawn: `scenes` in image order, `regions` refer to them by `Region.image`."""

    scenes: list[Scene]
    fields: dict[str, Any]
    regions: list[Region] = field(default_factory=list)
    meta: dict[str, Any] = field(default_factory=dict)


Maker = Callable[[Rng, str, int], Iterator[SceneSample]]


def region_of(scene: Scene, index: int, kind: str, number: int = 0, image: int = 0) -> Region:
    """The scene's object `index` as a region of a kind; `number` is its object number in the sample.

    One with keypoints holds box and mask too.
    """
    box = None if kind == "mask" else scene.objects[index].box
    rle = None if kind == "box" else mask_to_rle(scene.masks[index])
    return Region(image, kind, number, box, rle=rle, keypoints=scene.keypoints(index) if kind == "keypoints" else None)


def point_of(rng: Rng, scene: Scene, index: int) -> Region:
    """A point well inside the visible mask, at a pixel centre."""
    x0, y0, x1, y1 = scene.objects[index].box
    depth = cv2.distanceTransform(np.pad(scene.masks[index, y0:y1, x0:x1], 1).astype(np.uint8), cv2.DIST_L2, 3)
    row, column = pick(rng, np.argwhere(depth >= 0.5 * depth.max()).tolist())
    return Region(0, "point", 0, point=(x0 + column - 0.5, y0 + row - 0.5))


def draw_pair(rng: Rng, split: str) -> Attributes:
    """A shape and a colour to ask for: in val and test a held-out pair half of the time."""
    drawn = random_attributes(rng, {}, held_out=rng.random() < 0.5 and split != "train")
    return {"shape": drawn["shape"], "colour": drawn["colour"]}


def referred(
    rng: Rng, split: str, wanted: Attributes | None = None, without: str = "", count: int | None = None
) -> tuple[Scene, Expression]:
    """A scene and an unambiguous expression for its focus object."""
    while True:
        scene = random_scene(rng, split, [wanted or {}], count=count)
        if (expression := refer(rng, scene, scene.focus, without)) is not None:
            return scene, expression


def absent(rng: Rng, split: str, scene: Scene, hard: bool = True, sides: bool = True) -> Expression:
    """An expression that means nothing in the scene; `hard`: each of its words fits some object, but not together."""

    def seen(name: str) -> str:
        return pick(rng, scene.objects).attributes[name]

    for attempt in range(1000):
        if hard and attempt < 20:
            wanted = {"shape": seen("shape"), "colour": seen("colour")}
        else:  # one word fits, the other is from outside; or one lone word
            colour, shape = draw_pair(rng, split)["colour"], draw_pair(rng, split)["shape"]
            forms = [{"shape": seen("shape"), "colour": colour}, {"shape": shape, "colour": seen("colour")}]
            wanted = pick(rng, [*forms, {"shape": shape, "colour": colour}, {"shape": shape}, {"colour": colour}])
        if is_held_out(wanted) and split == "train" or Expression(wanted).resolve(scene):
            continue
        if sides and rng.random() < 0.15:
            return Expression(wanted, side=pick(rng, SIDES), extreme=rng.random() < 0.5)
        return Expression(wanted)
    raise RuntimeError("no absent expression exists: the scene holds every pair of shape and colour")


def scene_with(rng: Rng, split: str, wanted: Attributes, number: int) -> Scene:
    """A scene in which exactly `number` objects have the wanted attributes, beside up to two that do not."""
    count = int(rng.integers(max(1, number), min(4, number + 2) + 1)) if number < 4 else number

    def accept(scene: Scene) -> bool:
        return sum(wanted.items() <= o.attributes.items() for o in scene.objects) == number

    if number:
        draw = partial(random_scene, rng, split, [wanted] * number, count=count, accept=accept)
        return draw(allow=lambda other: not wanted.items() <= other.items())
    # None of them: one object shares a word with what is asked for, so that absence has to be looked for.
    shared = pick(rng, [{name: value} for name, value in wanted.items()]) if len(wanted) > 1 else {}
    return random_scene(rng, split, [shared], count=count, accept=accept)


def full_phrase(attributes: Attributes) -> str:
    """All attributes of an object in words: "large striped red star"; a plain texture goes without saying."""
    return Expression({**attributes, "texture": attributes["texture"].replace("plain", "")}).phrase()


def _caption(rng: Rng, split: str, serial: int) -> Iterator[SceneSample]:
    scene = random_scene(rng, split)
    ordered = sorted(scene.objects, key=lambda o: o.centre)
    items = [article(f"{full_phrase(o.attributes)} {ex.grid_position(scene, o)}") for o in ordered]
    text = _listing(items)
    yield SceneSample([scene], {"caption": text[0].upper() + text[1:] + "."})


def _listing(items: Sequence[str]) -> str:
    """Items as a list in words: "a", "a and b", "a, b and c"."""
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"


def _reg(rng: Rng, split: str, serial: int) -> Iterator[SceneSample]:
    expression = None
    while expression is None:
        scene = random_scene(rng, split)
        expression = ex.describe(scene, scene.focus)
    references = [f"the {other.phrase()}" for other, _ in ex.unambiguous(scene, scene.focus)]
    fields, region = {"expr": f"the {expression.phrase()}"}, region_of(scene, scene.focus, "box")
    yield SceneSample([scene], fields, [region], {"references": references})


def _attribute_question(rng: Rng, split: str, serial: int) -> tuple[Scene, str, str, str]:
    """Scene, attribute asked for, expression in words, answer; attributes and their values come up equally often."""
    name = tuple(ATTRIBUTES)[serial % len(ATTRIBUTES)]
    scene, expression = referred(rng, split, {name: pick(rng, ATTRIBUTES[name])}, without=name)
    return scene, name, f"the {expression.phrase()}", scene.objects[scene.focus].attributes[name]


def draw_group(rng: Rng, split: str) -> Attributes:
    """Attributes that several objects may share: a shape, a colour, a texture, or shape and colour."""
    pair = draw_pair(rng, split)
    kind = rng.integers(5)
    if kind == 4:
        return {"texture": pick(rng, ATTRIBUTES["texture"])}
    return ({"shape": pair["shape"]}, {"shape": pair["shape"]}, {"colour": pair["colour"]}, pair)[kind]


def _vqa(rng: Rng, split: str, serial: int) -> Iterator[SceneSample]:
    if serial % 5 == 4:
        group, number = draw_group(rng, split), int(rng.integers(4))
        scene = scene_with(rng, split, group, number)
        fields = {"question": QUESTIONS["count"].format(Expression(group).phrase(many=True)), "answer": str(number)}
        yield SceneSample([scene], fields, meta={"asks": "count", "words": group})
    else:
        scene, name, phrase, answer = _attribute_question(rng, split, serial % 5)
        yield SceneSample([scene], {"question": QUESTIONS[name].format(phrase), "answer": answer}, meta={"asks": name})


def _refer_one(rng: Rng, split: str, serial: int, kind: str) -> Iterator[SceneSample]:
    """REC or RES: one expression, one region."""
    scene, expression = referred(rng, split)
    yield SceneSample([scene], {"expr": f"the {expression.phrase()}"}, [region_of(scene, scene.focus, kind)])


def _refer_many(rng: Rng, split: str, serial: int, kind: str) -> Iterator[SceneSample]:
    """GREC or GRES: no target (3 of 10), one (2 of 10) or several (5 of 10)."""
    targets: list[int] = []
    if serial % 10 < 3:
        scene = random_scene(rng, split)
        expression = absent(rng, split, scene, hard=rng.random() < 0.6)
        quantity = "the" if expression.side else pick(rng, ("the", "all"))
    elif serial % 10 < 5:
        scene, expression = referred(rng, split)
        targets, quantity = [scene.focus], "the"
    else:
        group, number = draw_group(rng, split), pick(rng, (2, 2, 2, 3))
        scene, expression = scene_with(rng, split, group, number), Expression(group)
        quantity = "both" if number == 2 and rng.random() < 0.5 else "all"
        # From left to right: an order that can be learnt.
        targets = sorted(expression.resolve(scene), key=lambda i: scene.objects[i].centre)
    fields = {"expr": f"{quantity} {expression.phrase(many=quantity != 'the')}", "targets": list(range(len(targets)))}
    regions = [region_of(scene, target, kind, number) for number, target in enumerate(targets)]
    meta = {"targets": len(targets), "held_out": scene.held_out or is_held_out(expression.attributes)}
    yield SceneSample([scene], fields, regions, meta)


def _look_at(rng: Rng, split: str, serial: int, kind: str) -> Iterator[SceneSample]:
    """PointQA or BoxQA: a question about the object at a point or in a box."""
    if serial % 6 < 4:
        scene, name, _, answer = _attribute_question(rng, split, serial % 6)
        words = "this {regions:0}"
    else:
        asks, number, pair = ("shape", "colour")[serial % 6 - 4], int(rng.integers(1, 4)), draw_pair(rng, split)
        scene, name, answer = scene_with(rng, split, {asks: pair[asks]}, number), f"same {asks}", str(number)
        words = "{regions:0}"
    region = point_of(rng, scene, scene.focus) if kind == "point" else region_of(scene, scene.focus, "box")
    yield SceneSample([scene], {"question": QUESTIONS[name].format(words), "answer": answer}, [region], {"asks": name})


def _v7w(rng: Rng, split: str, serial: int) -> Iterator[SceneSample]:
    scene, expression = referred(rng, split, count=4)
    order = rng.permutation(4).tolist()
    fields = {
        "question": QUESTIONS["which"].format(f"the {expression.phrase()}"),
        "candidates": " ".join(f"{{regions:{number}}}" for number in range(4)),
        "targets": [order.index(scene.focus)],
    }
    yield SceneSample([scene], fields, [region_of(scene, i, "box", number) for number, i in enumerate(order)])


def _vcr(rng: Rng, split: str, serial: int) -> Iterator[SceneSample]:
    """A question with four answers, then its answer with four reasons."""
    name = ("colour", "shape")[serial % 2]
    scene, expression = referred(rng, split, without=name)
    target = scene.objects[scene.focus].attributes
    question, right = QUESTIONS[name].format(f"the {expression.phrase()}"), target[name]
    seen = dict.fromkeys(o.attributes[name] for o in scene.objects)
    values = list(seen) + rng.permutation([v for v in ATTRIBUTES[name] if v not in seen]).tolist()
    options = _options(rng, right, [value for value in values if value != right])
    yield SceneSample([scene], {"question": question, **options}, meta={"mode": "q_a"})

    wrong = [{**target, "size": {"large": "small", "small": "large"}[target["size"]]}]  # false
    wrong += [o.attributes for o in scene.objects]  # true but beside the point
    while len({full_phrase(w) for w in wrong} - {full_phrase(target)}) < 3:
        colour, shape = pick(rng, ATTRIBUTES["colour"]), pick(rng, SHAPES)
        new = {**target, **pick(rng, ({"colour": colour}, {"shape": shape}))}
        if split != "train" or not is_held_out(new):
            wrong.append(new)
    reasons = dict.fromkeys(full_phrase(w) for w in (target, *wrong))
    first, *others = [QUESTIONS["reason"].format(article(reason)) for reason in reasons]
    why = QUESTIONS["why"].format(question, article(right) if name == "shape" else right)
    yield SceneSample([scene], {"question": why, **_options(rng, first, others)}, meta={"mode": "qa_r"})


def _options(rng: Rng, right: str, wrong: Sequence[str]) -> dict[str, str]:
    """The fields of a choice: four lettered options in random order, and the letter of the right one."""
    options, order = [right, *wrong[:3]], rng.permutation(4).tolist()
    text = " ".join(f"{letter} {options[i]}" for letter, i in zip(LETTERS, order, strict=True))
    return {"options": text, "answer": LETTERS[order.index(0)]}


def _pope(rng: Rng, split: str, serial: int) -> Iterator[SceneSample]:
    scene = random_scene(rng, split)
    level = pick(rng, ("random", "hard"))
    if serial % 2 == 0:
        names = pick(rng, (("shape", "colour"), ("shape", "colour"), ("shape", "colour"), ("shape",), ("colour",)))
        expression = Expression({name: scene.objects[scene.focus].attributes[name] for name in names})
    else:
        expression = absent(rng, split, scene, hard=level == "hard", sides=False)
    question = QUESTIONS["presence"].format(article(expression.phrase()))
    fields = {"question": question, "answer": ("yes", "no")[serial % 2]}
    held_out = scene.held_out or is_held_out(expression.attributes)
    yield SceneSample([scene], fields, meta={"level": level, "held_out": held_out})


def _nlvr2(rng: Rng, split: str, serial: int) -> Iterator[SceneSample]:
    """One statement over two pairs of images: true of the first, false of the second."""
    kind = tuple(STATEMENTS)[:6][serial % 6]
    pairs: list[list[Scene]] = []
    if kind == "more":
        words = pick(rng, (("left", "right"), ("right", "left")))
        for larger in words:  # the image that really has more objects
            few = int(rng.integers(1, 4))
            counts = (int(rng.integers(few + 1, 5)), few)
            pairs.append([random_scene(rng, split, count=n) for n in (counts if larger == "left" else counts[::-1])])
    elif kind == "total":
        shape, number = pick(rng, SHAPES), int(rng.integers(1, 5))
        for total in (number, number + pick(rng, (-1, 1))):
            left = int(rng.integers(max(0, total - 3), min(3, total) + 1))
            pairs.append([scene_with(rng, split, {"shape": shape}, n) for n in (left, total - left)])
        words = (shape,) if number == 1 else (NUMBERS[number], ex.plural(shape))
    else:
        wanted = draw_pair(rng, split)
        for options in _HOLDING[kind]:
            pairs.append([scene_with(rng, split, wanted, number) for number in pick(rng, options)])
        words = (article(f"{wanted['colour']} {wanted['shape']}"),)
    statement = STATEMENTS["one" if kind == "total" and number == 1 else kind].format(*words)
    for truth, scenes in zip(("True", "False"), pairs, strict=True):
        yield SceneSample(scenes, {"statement": statement, "answer": truth}, meta={"asks": kind})


def _coseg(rng: Rng, split: str, serial: int) -> Iterator[SceneSample]:
    """Two to four images that share one shape, seen once in each; no other shape is in all of them."""
    shape, number = pick(rng, SHAPES), 2 + serial % 3
    common, draw = (
        set[str](),
        partial(random_scene, rng, split, [{"shape": shape}], allow=lambda a: a["shape"] != shape),
    )
    while common != {shape}:
        scenes = [draw(count=pick(rng, (2, 2, 3))) for _ in range(number)]
        common = set.intersection(*({o.attributes["shape"] for o in scene.objects} for scene in scenes))
    regions = [region_of(scene, scene.focus, "mask", i, image=i) for i, scene in enumerate(scenes)]
    yield SceneSample(scenes, {"targets": list(range(number))}, regions, {"class": shape})


def _attribute_scene(rng: Rng, split: str, name: str, value: str, present: bool) -> Scene:
    """A scene with exactly one object of that attribute value (or clearly at that side), its focus, or with none."""

    def accept(scene: Scene) -> bool:
        targets = [i for i, o in enumerate(scene.objects) if o.attributes.get(name) == value]
        if name == "position":
            axis, far = divmod(SIDES.index(value), 2)
            shares = [o.centre[axis] / (scene.width, scene.height)[axis] for o in scene.objects]
            distances = [1 - share if far else share for share in shares]
            if any(_AT_SIDE <= distance < _CLEAR for distance in distances):
                return False
            targets = [i for i, distance in enumerate(distances) if distance < _AT_SIDE]
        scene.focus = targets[0] if targets else scene.focus
        return len(targets) == int(present)

    wanted: list[Attributes] = [{name: value}] if present and name != "position" else []
    count = pick(rng, (2, 2, 3))
    return random_scene(rng, split, wanted, count=count, allow=lambda a: a.get(name) != value, accept=accept)


def _attcoseg(rng: Rng, split: str, serial: int) -> Iterator[SceneSample]:
    """Two to four images; some hold one object of the named attribute value, the others none."""
    values = {**ATTRIBUTES, "position": SIDES}
    name = tuple(values)[serial % len(values)]
    value, number = pick(rng, values[name]), int(rng.integers(2, 5))
    positives = sorted(rng.permutation(number)[: int(rng.integers(1, number + 1))].tolist())
    scenes = [_attribute_scene(rng, split, name, value, i in positives) for i in range(number)]
    regions = [region_of(scenes[i], scenes[i].focus, "mask", k, image=i) for k, i in enumerate(positives)]
    images = _listing([str(i + 1) for i in positives])
    fields = {"attribute": name, "value": value, "images": images, "targets": list(range(len(positives)))}
    yield SceneSample(scenes, fields, regions, {"asks": name, "positives": len(positives)})


MAKERS: dict[str, Maker] = {
    "caption": _caption, "reg": _reg, "vqa": _vqa,
    "rec": partial(_refer_one, kind="box"), "res": partial(_refer_one, kind="mask"),
    "grec": partial(_refer_many, kind="box"), "gres": partial(_refer_many, kind="mask"),
    "pointqa": partial(_look_at, kind="point"), "boxqa": partial(_look_at, kind="box"),
    "v7w": _v7w, "vcr": _vcr, "pope": _pope, "nlvr2": _nlvr2, "coseg": _coseg, "attcoseg": _attcoseg,
}  # fmt: skip


def mini_words() -> list[str]:
    """Every word that the fields of mini samples can hold, sorted; with the templates' words, a whole vocabulary."""
    attributes = [word for name, values in ATTRIBUTES.items() for word in (name, *values)]
    nouns = [ex.NOUN, *map(ex.plural, (ex.NOUN, *SHAPES)), *ex.AT_SIDE.values(), *ex.EXTREMES.values()]
    texts = [*attributes, *nouns, *QUESTIONS.values(), *STATEMENTS.values(), *NUMBERS, *LETTERS, OTHER_WORDS]
    return sorted(set(re.findall(r"\w+|[.,?()]", " ".join(texts))))
