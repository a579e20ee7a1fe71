"""The mini world's tasks for links: a random generator and a split in, scenes with template fields and regions out.

As in `mini/tasks.py`; the regions carry the class or kind that they are asked by as `label`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial

from vistallm.mini.expressions import Expression
from vistallm.mini.scene import KEYPOINTS, Rng, Scene, is_held_out, pick, random_scene
from vistallm.mini.tasks import Maker, SceneSample, absent, draw_group, draw_pair, region_of, scene_with
from vistallm.regions.masks import mask_to_rle
from vistallm.schema import PROMPT_SHAPES, Region
from vistallm.tasks import list_objects

_CLASS_FORMS = ("shape", "shape", "shape", "shape", "colour shape", "colour shape", "colour shape", "texture shape")
_ANY_OBJECT = 0.08  # share of the lists that ask for "object" alone


def _classes(rng: Rng, split: str) -> tuple[Scene, list[Expression]]:
    """A scene and one to five classes to look for, in random order; no object is of two, and the scene lacks some."""
    several = rng.random() < 0.4
    scene = (
        scene_with(rng, split, draw_group(rng, split), pick(rng, (2, 2, 3))) if several else random_scene(rng, split)
    )
    if rng.random() < _ANY_OBJECT:
        return scene, [Expression({})]
    classes: list[Expression] = []

    def add(new: Expression) -> None:
        """Add a class that differs from each one before in an attribute that both name."""
        if all(
            any(value != old.attributes.get(name, value) for name, value in new.attributes.items()) for old in classes
        ):
            classes.append(new)

    for number, index in enumerate([scene.focus, *rng.permutation(len(scene.objects)).tolist()]):
        if number == 0 or rng.random() < 0.8:
            attributes = scene.objects[index].attributes
            add(Expression({name: attributes[name] for name in pick(rng, _CLASS_FORMS).split()}))
    if rng.random() < 0.1:
        classes.clear()
    for _ in range(int(rng.integers(0 if classes else 1, 3))):
        add(absent(rng, split, scene, hard=rng.random() < 0.5, sides=False))
    return scene, [classes[i] for i in rng.permutation(len(classes))]


def _listed(
    scene: Scene, classes: Sequence[Expression], kind: str, union: bool = False
) -> tuple[str, list[Region], bool]:
    """What an answer lists, "star {regions:0,1}, circle {regions::box}", its regions, and whether a pair is held out.

    The objects of a class come from left to right; with `union` they are one region.
    """
    found: list[tuple[str, list[Region]]] = []
    for expression in classes:
        targets, first = (
            sorted(expression.resolve(scene), key=lambda i: scene.objects[i].centre),
            sum(len(r) for _, r in found),
        )
        if union and targets:
            regions = [Region(0, "mask", first, rle=mask_to_rle(scene.masks[targets].max(0)))]
        else:
            regions = [region_of(scene, target, kind, first + i) for i, target in enumerate(targets)]
        found.append((expression.phrase(), [replace(region, label=expression.phrase()) for region in regions]))
    held_out = scene.held_out or any(is_held_out(c.attributes) for c in classes)
    return list_objects(found, kind), [region for _, regions in found for region in regions], held_out


def _find(rng: Rng, split: str, serial: int, kind: str, union: bool = False) -> Iterator[SceneSample]:
    """Detection, instance or semantic segmentation of named classes."""
    scene, classes = _classes(rng, split)
    found, regions, held_out = _listed(scene, classes, kind, union)
    fields = {"names": ", ".join(expression.phrase() for expression in classes), "found": found}
    yield SceneSample([scene], fields, regions, {"held_out": held_out})


def _count(rng: Rng, split: str, serial: int) -> Iterator[SceneSample]:
    """None to four objects of a kind, equally often."""
    group = Expression(draw_group(rng, split))
    scene = scene_with(rng, split, group.attributes, serial % 5)
    found, regions, held_out = _listed(scene, [group], "box")
    yield SceneSample([scene], {"expr": group.phrase(many=True), "found": found}, regions, {"held_out": held_out})


def _interactive(rng: Rng, split: str, serial: int) -> Iterator[SceneSample]:
    """An object shown by one of the six prompts, equally often."""
    scene, shape = random_scene(rng, split), PROMPT_SHAPES[serial % len(PROMPT_SHAPES)]
    fields = {"prompt": f"{{region:0:{shape}}}"}
    yield SceneSample([scene], fields, [region_of(scene, scene.focus, "mask")], {"prompt": shape})


def _incontext(rng: Rng, split: str, serial: int) -> Iterator[SceneSample]:
    """An example in the first image; in the second none, one or two of its shape and colour."""
    pair, number = draw_pair(rng, split), (0, 1, 1, 1, 2)[serial % 5]
    example, scene = random_scene(rng, split, [pair]), scene_with(rng, split, pair, number)
    targets = sorted(Expression(pair).resolve(scene), key=lambda i: scene.objects[i].centre)
    regions = [region_of(example, example.focus, "mask")]
    regions += [region_of(scene, target, "mask", i + 1, image=1) for i, target in enumerate(targets)]
    fields = {"prompt": "{region:0:mask}", "targets": list(range(1, number + 1))}
    yield SceneSample([example, scene], fields, regions, {"targets": number})


def _pose(rng: Rng, split: str, serial: int) -> Iterator[SceneSample]:
    """None to three objects of a shape, with the keypoints of that shape by name."""
    wanted = draw_pair(rng, split)
    while wanted["shape"] not in KEYPOINTS:
        wanted = draw_pair(rng, split)
    kind = Expression(wanted if rng.random() < 0.25 else {"shape": wanted["shape"]})
    scene = scene_with(rng, split, kind.attributes, (0, 1, 1, 1, 1, 1, 2, 2, 2, 3)[serial % 10])
    found, regions, held_out = _listed(scene, [kind], "keypoints")
    names = list(KEYPOINTS[wanted["shape"]])
    found += "".join(f", {name} {{point:{i}}}" for i, name in enumerate(names))
    fields = {"expr": kind.phrase(), "points": ", ".join(names), "found": found}
    yield SceneSample([scene], fields, regions, {"held_out": held_out})


LINK_MAKERS: dict[str, Maker] = {
    "det": partial(_find, kind="box"), "insseg": partial(_find, kind="mask"),
    "semseg": partial(_find, kind="mask", union=True), "count": _count,
    "interactive": _interactive, "incontext": _incontext, "pose": _pose,
}  # fmt: skip


def link_words() -> list[str]:
    """Every word that the fields of these samples hold beside `mini_words`, sorted."""
    return sorted({word for names in KEYPOINTS.values() for name in names for word in name.split()})
