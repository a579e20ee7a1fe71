"""The mini world's single-image tasks: a random generator and a split in, drafts of samples out.

A draft holds scenes, template fields and regions; `mini.py` draws and stores them. Every maker draws a fresh scene to
its needs, so answers are balanced by construction, and puts the focus object of the scene to the question: in val and
test half of the focus objects are of a shape and colour that training never shows together.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vistallm.mini import expressions as ex
from vistallm.mini.draft import Draft, Maker, absent, draw_pair, pick, point_of, referred, region_of, scene_with
from vistallm.mini.expressions import Expression, article, attributes_of
from vistallm.mini.layout import random_scene
from vistallm.mini.scene import ATTRIBUTES, COLOURS, NOUN, SHAPES, Attributes, Scene

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
LETTERS = ("(A)", "(B)", "(C)", "(D)")


def _caption(rng: np.random.Generator, split: str, serial: int) -> list[Draft]:
    scene = random_scene(rng, split)
    order = sorted(range(len(scene.objects)), key=lambda i: scene.objects[i].centre)
    items = [article(f"{full_phrase(attributes_of(scene.objects[i]))} {ex.grid_place(scene, i)}") for i in order]
    text = items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"
    return [Draft("caption", [scene], {"caption": text[0].upper() + text[1:] + "."})]


def full_phrase(attributes: Attributes) -> str:
    """All attributes of an object in words: "large striped red star"; a plain texture goes without saying."""
    texture = "" if attributes["texture"] == "plain" else attributes["texture"]
    return " ".join(w for w in (attributes["size"], texture, attributes["colour"], attributes["shape"]) if w)


def _reg(rng: np.random.Generator, split: str, serial: int) -> list[Draft]:
    expression = None
    while expression is None:
        scene = random_scene(rng, split)
        expression = ex.describe(scene, scene.focus)
    references = [f"the {other.phrase()}" for other, _ in ex.unambiguous(scene, scene.focus)]
    fields, region = {"expr": f"the {expression.phrase()}"}, region_of(scene, scene.focus, "box")
    return [Draft("reg", [scene], fields, [region], {"references": references})]


def _attribute_question(rng: np.random.Generator, split: str, serial: int) -> tuple[Scene, str, str, str]:
    """Scene, attribute asked for, expression in words, answer; attributes and their values come up equally often."""
    name = tuple(ATTRIBUTES)[serial % len(ATTRIBUTES)]
    scene, expression = referred(rng, split, {name: pick(rng, ATTRIBUTES[name])}, without=(name,))
    return scene, name, f"the {expression.phrase()}", getattr(scene.objects[scene.focus], name)


def _group(rng: np.random.Generator, split: str) -> Attributes:
    """Attributes that several objects may share: a shape, a colour, a texture, or shape and colour."""
    pair = draw_pair(rng, split)
    kind = rng.integers(5)
    if kind == 4:
        return {"texture": pick(rng, ATTRIBUTES["texture"])}
    return ({"shape": pair["shape"]}, {"shape": pair["shape"]}, {"colour": pair["colour"]}, pair)[kind]


def _vqa(rng: np.random.Generator, split: str, serial: int) -> list[Draft]:
    if serial % 5 == 4:
        group, number = _group(rng, split), int(rng.integers(4))
        scene = scene_with(rng, split, group, number)
        question, answer = QUESTIONS["count"].format(Expression.of(group).phrase(many=True)), str(number)
        return [Draft("vqa", [scene], {"question": question, "answer": answer}, meta={"asks": "count", "words": group})]
    scene, name, phrase, answer = _attribute_question(rng, split, serial % 5)
    return [Draft("vqa", [scene], {"question": QUESTIONS[name].format(phrase), "answer": answer}, meta={"asks": name})]


def _one(task: str, kind: str) -> Maker:
    """Maker of REC or RES: one expression, one region."""

    def make(rng: np.random.Generator, split: str, serial: int) -> list[Draft]:
        scene, expression = referred(rng, split)
        return [Draft(task, [scene], {"expr": f"the {expression.phrase()}"}, [region_of(scene, scene.focus, kind)])]

    return make


def _many(task: str, kind: str) -> Maker:
    """Maker of GREC or GRES: no target (3 of 10), one (2 of 10) or several (5 of 10)."""

    def make(rng: np.random.Generator, split: str, serial: int) -> list[Draft]:
        if serial % 10 < 3:
            scene = random_scene(rng, split)
            expression = absent(rng, split, scene, hard=rng.random() < 0.6)
            targets: list[int] = []
            quantity = "the" if expression.place else pick(rng, ("the", "all"))
        elif serial % 10 < 5:
            scene, expression = referred(rng, split)
            targets, quantity = [scene.focus], "the"
        else:
            group, number = _group(rng, split), pick(rng, (2, 2, 2, 3))
            scene, expression = scene_with(rng, split, group, number), Expression.of(group)
            targets, quantity = expression.resolve(scene), "both" if number == 2 and rng.random() < 0.5 else "all"
            targets.sort(key=lambda i: scene.objects[i].centre)  # left to right: an order that can be learnt
        phrase = expression.phrase(many=quantity != "the")
        fields = {"expr": f"{quantity} {phrase}", "targets": list(range(len(targets)))}
        regions = [region_of(scene, target, kind, number) for number, target in enumerate(targets)]
        meta = {"targets": len(targets), "held_out": scene.held_out or expression.held_out}
        return [Draft(task, [scene], fields, regions, meta)]

    return make


def _look(task: str) -> Maker:
    """Maker of PointQA or BoxQA: a question about the object at a point or in a box."""

    def make(rng: np.random.Generator, split: str, serial: int) -> list[Draft]:
        kind = serial % 6
        if kind < 4:
            scene, name, _, answer = _attribute_question(rng, split, kind)
            target = scene.focus
        else:
            name, number, pair = ("same shape", "same colour")[kind - 4], int(rng.integers(1, 4)), draw_pair(rng, split)
            wanted = {name.split()[1]: pair[name.split()[1]]}
            scene, answer = scene_with(rng, split, wanted, number), str(number)
            target = scene.focus
        region = point_of(rng, scene, target) if task == "pointqa" else region_of(scene, target, "box")
        question = QUESTIONS[name].format("{regions:0}" if name.startswith("same") else "this {regions:0}")
        return [Draft(task, [scene], {"question": question, "answer": answer}, [region], {"asks": name})]

    return make


def _v7w(rng: np.random.Generator, split: str, serial: int) -> list[Draft]:
    scene, expression = referred(rng, split, count=4)
    order = rng.permutation(4).tolist()
    regions = [region_of(scene, i, "box", number) for number, i in enumerate(order)]
    fields = {
        "question": QUESTIONS["which"].format(f"the {expression.phrase()}"),
        "candidates": " ".join(f"{{regions:{number}}}" for number in range(4)),
        "targets": [order.index(scene.focus)],
    }
    return [Draft("v7w", [scene], fields, regions)]


def _options(rng: np.random.Generator, right: str, wrong: Sequence[str]) -> tuple[str, str]:
    """Four lettered options in random order, and the letter of the right one."""
    options = [right, *wrong[:3]]
    order = rng.permutation(4).tolist()
    return " ".join(f"{letter} {options[i]}" for letter, i in zip(LETTERS, order, strict=True)), LETTERS[order.index(0)]


def _vcr(rng: np.random.Generator, split: str, serial: int) -> list[Draft]:
    name = ("colour", "shape")[serial % 2]
    scene, expression = referred(rng, split, without=(name,))
    target = attributes_of(scene.objects[scene.focus])
    question, right = QUESTIONS[name].format(f"the {expression.phrase()}"), target[name]
    seen = dict.fromkeys(getattr(o, name) for o in scene.objects)
    values = list(seen) + rng.permutation([v for v in ATTRIBUTES[name] if v not in seen]).tolist()
    options, letter = _options(rng, right, [value for value in values if value != right])
    fields = {"question": question, "options": options, "answer": letter}
    answer_draft = Draft("vcr", [scene], fields, meta={"mode": "q_a"})

    other_size = {"large": "small", "small": "large"}[target["size"]]
    wrong = [dict(target, size=other_size)]  # false; then what is true but beside the point
    wrong += [attributes_of(o) for o in scene.objects]
    while len({full_phrase(w) for w in wrong} - {full_phrase(target)}) < 3:
        colour, shape = pick(rng, tuple(COLOURS)), pick(rng, SHAPES)
        wrong.append(dict(target, **pick(rng, ({"colour": colour}, {"shape": shape}))))
        if split == "train" and Expression(wrong[-1]["shape"], wrong[-1]["colour"]).held_out:
            wrong.pop()
    reasons = [r for r in dict.fromkeys(full_phrase(w) for w in wrong) if r != full_phrase(target)]
    said = [QUESTIONS["reason"].format(article(reason)) for reason in (full_phrase(target), *reasons)]
    options, letter = _options(rng, said[0], said[1:])
    fields = {
        "question": QUESTIONS["why"].format(question, article(right) if name == "shape" else right),
        "options": options,
        "answer": letter,
    }
    return [answer_draft, Draft("vcr", [scene], fields, meta={"mode": "qa_r"})]


def _pope(rng: np.random.Generator, split: str, serial: int) -> list[Draft]:
    scene = random_scene(rng, split)
    level = pick(rng, ("random", "hard"))
    if serial % 2 == 0:
        names = pick(rng, (("shape", "colour"), ("shape", "colour"), ("shape", "colour"), ("shape",), ("colour",)))
        expression = ex.expression_of(scene.objects[scene.focus], names)
    else:
        expression = absent(rng, split, scene, hard=level == "hard", placed=False)
    question = QUESTIONS["presence"].format(article(expression.phrase()))
    meta = {"level": level, "held_out": scene.held_out or expression.held_out}
    return [Draft("pope", [scene], {"question": question, "answer": "no" if serial % 2 else "yes"}, meta=meta)]


SINGLE_MAKERS: dict[str, Maker] = {
    "caption": _caption,
    "reg": _reg,
    "vqa": _vqa,
    "rec": _one("rec", "box"),
    "res": _one("res", "mask"),
    "grec": _many("grec", "box"),
    "gres": _many("gres", "mask"),
    "pointqa": _look("pointqa"),
    "boxqa": _look("boxqa"),
    "v7w": _v7w,
    "vcr": _vcr,
    "pope": _pope,
}
SINGLE_WORDS = (
    *QUESTIONS.values(),
    *LETTERS,
    "the all both in middle top bottom and yes no 0 1 2 3 . ,",
    NOUN,
    ex.plural(NOUN),
)
