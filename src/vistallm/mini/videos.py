"""The mini world's videos: shapes that move, turn, stop, start, cross, hide behind a wall and leave the picture.

As in `mini/tasks.py`, but a sample's scenes are the frames of one video. What is asked is said by motion: at least two
objects fit the other words of an expression, so that no single frame answers it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from vistallm.mini.expressions import Expression
from vistallm.mini.scene import (
    COLOURS,
    SHAPES,
    SIZES,
    Attributes,
    Layer,
    Rng,
    Scene,
    SceneObject,
    draw,
    pick,
    random_attributes,
)
from vistallm.mini.tasks import Maker, SceneSample
from vistallm.regions.masks import mask_to_rle, rle_box
from vistallm.schema import Region

FRAMES = 8
WAYS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
VERBS = {  # what an object does -> the words after "that"
    "moves": "moves {}", "stops": "stops", "starts": "starts", "turns": "turns", "leaves": "leaves", "hides": "hides",
    "stays": "stays",
}  # fmt: skip
MOVING = ("moves", "stops", "starts", "leaves", "hides")  # these go one of WAYS
QUESTIONS = {
    "way": "Which way does the {} move?",
    "colour": "What colour is the {} that {}?",
    "shape": "What shape is the {} that {}?",
    "doing": "What does the {} do?",
    "order": "What colour is the object that leaves {}?",
    "count": "How many objects move?",
}
SPANS = {"moves": "while it moves", "stays": "while it stays", "seen": "before it {}"}
_LEAST_SEEN = 0.45  # share of its outline that an object shows in a frame, unless it hides or leaves
_LEAST_PIXELS = 8  # fewer visible pixels count as unseen


@dataclass
class Actor:
    """An object and what it does; `places` (FRAMES, 2) float64 pixels and `angles` (FRAMES,) radians."""

    look: SceneObject
    verb: str
    way: str = ""  # one of WAYS, of the verbs in MOVING
    turn: int = FRAMES  # the frame from which it stands, moves, or is gone
    places: np.ndarray = field(default_factory=lambda: np.zeros((FRAMES, 2)))
    angles: np.ndarray = field(default_factory=lambda: np.zeros(FRAMES))

    @property
    def facts(self) -> set[str]:
        """All that can be said of it after "that"."""
        return {VERBS[self.verb].format(self.way)} | ({VERBS["moves"].format(self.way)} if self.way else set())


@dataclass
class Video:
    """A drawn video; `masks` (actors, FRAMES, H, W) bool, empty where an actor is unseen."""

    actors: list[Actor]
    scenes: list[Scene]
    masks: np.ndarray

    def track(self, actor: int, kind: str, frames: Sequence[int] = range(FRAMES)) -> list[Region]:
        """The regions of an actor, object 0, in these frames where it is seen."""
        seen = [(frame, mask_to_rle(self.masks[actor, frame])) for frame in frames if self.masks[actor, frame].any()]
        if kind == "mask":
            return [Region(frame, kind, 0, rle=rle) for frame, rle in seen]
        return [Region(frame, kind, 0, box=rle_box(rle)) for frame, rle in seen]


def _travel(rng: Rng, actor: Actor, width: int, height: int, wall: tuple[float, float] | None) -> bool:
    """Fill the actor's path; False where the canvas is too small for it. `wall`: centre of what it hides behind."""
    radius, sides = 0.6 * actor.look.diameter, np.array((width, height), float)
    way = np.array(WAYS.get(actor.way, (0, 0)), float)
    axis = int(abs(way[1]) > 0)
    start = radius + rng.random(2) * (sides - 2 * radius)
    time = np.arange(FRAMES) / (FRAMES - 1)
    spin = 0.0
    if actor.verb in ("moves", "stops", "starts"):
        length = rng.uniform(0.35, 0.55) * sides[axis]
        room = sides[axis] - 2 * radius - length
        if room < 0:
            return False
        ends = radius + rng.random() * room, radius + rng.random() * room + length
        start[axis] = min(ends) if way[axis] > 0 else sides[axis] - min(ends)
        if actor.verb != "moves":
            actor.turn = int(rng.integers(3, 6))
            frames, last = np.arange(FRAMES), FRAMES - 1
            time = np.clip(frames / actor.turn, 0, 1)
            if actor.verb == "starts":
                time = np.clip((frames - actor.turn) / (last - actor.turn), 0, 1)
    elif actor.verb == "leaves":
        actor.turn = actor.turn if actor.turn < FRAMES else int(rng.integers(3, 7))
        inside = start[axis] if way[axis] < 0 else sides[axis] - start[axis]
        length, time = inside + radius + 1, np.arange(FRAMES) / actor.turn
    elif actor.verb == "hides" and wall is not None:
        actor.turn = int(rng.integers(3, 6))
        length, time = rng.uniform(0.4, 0.6) * sides[axis], np.clip(np.arange(FRAMES) / actor.turn, 0, 1)
        start = np.array(wall) - way * length
        if not (radius <= start).all() or not (start <= sides - radius).all():
            return False
    else:
        length, spin = 0.0, pick(rng, (-1, 1)) * rng.uniform(0.24, 0.34) * (actor.verb == "turns")
    actor.places = start + way * length * time[:, None]
    actor.angles = actor.look.angle + spin * np.arange(FRAMES)
    return True


def _frame(actors: Sequence[Actor], frame: int, canvas: Scene, wall: np.ndarray | None) -> tuple[Scene, np.ndarray]:
    """Draw a frame: its scene, which holds the actors that are seen, and the visible masks of all (n, H, W) bool."""
    width, height = canvas.width, canvas.height
    seen: list[tuple[int, SceneObject, Layer]] = []
    for number, actor in enumerate(actors):
        (x, y), angle = actor.places[frame].tolist(), float(actor.angles[frame])
        texture = actor.look.texture_angle + angle - actor.look.angle
        look = replace(actor.look, x=x, y=y, angle=angle, texture_angle=texture)
        low, high = look.outline().min(0), look.outline().max(0)
        if (np.ceil(high) > 0).all() and (np.floor(low) < (width, height)).all():
            seen.append((number, look, draw(look.outline(), width, height)))
    if wall is not None:
        shades = SceneObject({"shape": "wall", "colour": "grey", "size": "large", "texture": "plain"}, rgb=(96, 96, 96))
        seen.append((-1, shades, draw(wall, width, height)))
    masks = np.zeros((len(actors) + 1, height, width), bool)  # the last one is the wall's
    for number, _, layer in seen:
        masks[(slice(None), *layer.window)] &= layer.coverage < 128
        masks[(number, *layer.window)] = layer.coverage >= 128
    scene = replace(canvas, objects=[], layers=[])
    for number, look, layer in seen:
        rows, columns = np.nonzero(masks[number])
        if len(rows) < _LEAST_PIXELS:
            masks[number] = False
        else:
            look.box = int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1
            scene.objects.append(look)
            scene.layers.append((layer, None))
    return scene, masks[:-1]


def _shown(video: Video) -> bool:
    """Whether every actor is seen well where it should be, and at least in the first two frames."""
    for actor, masks in zip(video.actors, video.masks, strict=True):
        pixels = masks.sum((1, 2))
        until = actor.turn - 2 if actor.verb in ("hides", "leaves") else FRAMES
        if pixels[: max(2, until)].min() < _LEAST_SEEN * pixels.max():
            return False
        if actor.verb == "hides" and pixels[actor.turn :].any():
            return False
    return True


def make_video(rng: Rng, looks: Sequence[Attributes], verbs: Sequence[str], turns: Sequence[int] = ()) -> Video:
    """Draw a video of actors with these attributes and verbs; the `turns` of those that leave, where they matter.

    Raises:
        RuntimeError: none is found after many draws.
    """
    for _ in range(400):
        short = int(rng.integers(88, 129))
        long = min(160, int(short * rng.uniform(1.0, 1.4)))
        width, height = (short, long) if rng.random() < 0.5 else (long, short)
        canvas = Scene(width, height, [], background_seed=int(rng.integers(2**31)))
        wall = middle = None
        if "hides" in verbs or rng.random() < 0.3:
            half = rng.uniform(0.17, 0.2) * math.sqrt(width * height) * np.array((1.0, 1.1))
            middle = tuple((half + rng.random(2) * ((width, height) - 2 * half)).tolist())
            wall = np.array(middle) + half * np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)])
        actors: list[Actor] = []
        for number, (attributes, verb) in enumerate(zip(looks, verbs, strict=True)):
            look = SceneObject({**attributes, "size": "small"})
            look.diameter = rng.uniform(*SIZES["small"]) * math.sqrt(width * height)
            look.angle, look.texture_angle = rng.uniform(-0.25, 0.25), rng.uniform(0, math.pi)
            shades = rng.uniform(0.93, 1.04) * np.array(COLOURS[attributes["colour"]]) + rng.uniform(-8, 8, 3)
            look.rgb = tuple(np.clip(shades, 0, 255).tolist())
            way = pick(rng, tuple(WAYS)) if verb in MOVING else ""
            actors.append(Actor(look, verb, way, turns[number] if turns else FRAMES))
        if not all(_travel(rng, actor, width, height, middle) for actor in actors):
            continue
        drawn = [_frame(actors, frame, canvas, wall) for frame in range(FRAMES)]
        video = Video(actors, [scene for scene, _ in drawn], np.stack([masks for _, masks in drawn], 1))
        if _shown(video):
            return video
    raise RuntimeError(f"no video for {list(verbs)}; loosen the conditions")


def _looks(rng: Rng, split: str, count: int, shared: str) -> list[Attributes]:
    """Attributes of `count` actors, no two of one shape and colour; the first two share the attribute `shared`."""
    held_out = split != "train" and rng.random() < 0.5
    looks: list[Attributes] = []
    while len(looks) < count:
        wanted = {shared: looks[0][shared]} if len(looks) == 1 and shared else {}
        new = random_attributes(rng, wanted, looks, held_out and not looks)
        if all((new["shape"], new["colour"]) != (old["shape"], old["colour"]) for old in looks):
            looks.append(new)
    return looks


def _told_apart(rng: Rng, split: str, shared: str, target: str = "") -> tuple[Video, str, str]:
    """A video whose actor 0 alone fits a noun and what it does; another one fits the noun. Also both, in words."""
    while True:
        verbs = [target or pick(rng, tuple(VERBS)), *(pick(rng, tuple(VERBS)) for _ in range(int(rng.integers(1, 3))))]
        looks = _looks(rng, split, len(verbs), shared)
        turning = any(v == "turns" and o["shape"] == "circle" for v, o in zip(verbs, looks, strict=True))
        if verbs.count("hides") > 1 or turning:
            continue
        video = make_video(rng, looks, verbs)
        fact = VERBS[verbs[0]].format(video.actors[0].way)
        fitting = [i for i, look in enumerate(looks) if not shared or look[shared] == looks[0][shared]]
        if [i for i in fitting if fact in video.actors[i].facts] == [0]:
            return video, Expression({shared: looks[0][shared]} if shared else {}).phrase(), fact


def _sample(video: Video, fields: dict[str, Any], regions: Sequence[Region] = (), **meta: Any) -> Iterator[SceneSample]:
    yield SceneSample(video.scenes, {"video": True, **fields}, list(regions), meta)


def _video_ref(rng: Rng, split: str, serial: int) -> Iterator[SceneSample]:
    """Masks over the frames of the one that does something: every verb equally often."""
    video, noun, fact = _told_apart(rng, split, ("shape", "shape", "colour", "")[serial % 4], tuple(VERBS)[serial % 7])
    yield from _sample(video, {"expr": f"the {noun} that {fact}"}, video.track(0, "mask"), asks=video.actors[0].verb)


def _named(rng: Rng, split: str, verb: str) -> tuple[Video, str]:
    """A video whose actor 0 has this verb, and its colour and shape."""
    video, _, _ = _told_apart(rng, split, pick(rng, ("shape", "colour")), verb)
    look = video.actors[0].look.attributes
    return video, f"{look['colour']} {look['shape']}"


def _video_grounding(rng: Rng, split: str, serial: int) -> Iterator[SceneSample]:
    """When and where: boxes in the frames in which an object moves, stands still, or is still to be seen."""
    span = tuple(SPANS)[serial % 3]
    verb = pick(rng, ("leaves", "hides") if span == "seen" else ("stops", "starts"))
    video, noun = _named(rng, split, verb)
    turn = video.actors[0].turn
    early = span == "seen" or (span == "moves") == (verb == "stops")
    frames = range(FRAMES) if span == "seen" else range(turn) if early else range(turn, FRAMES)
    regions = video.track(0, "box", frames)
    expr = f"the {noun} {SPANS[span].format(verb)}"
    yield from _sample(video, {"expr": expr}, regions, asks=span)


def _video_qa(rng: Rng, split: str, serial: int) -> Iterator[SceneSample]:
    """Questions about motion, six kinds equally often."""
    asks = tuple(QUESTIONS)[serial % len(QUESTIONS)]
    question, answer = QUESTIONS[asks], ""
    if asks == "way":
        video, noun = _named(rng, split, "moves")
        question, answer = question.format(noun), video.actors[0].way
    elif asks == "doing":
        video, noun = _named(rng, split, tuple(VERBS)[serial // len(QUESTIONS) % len(VERBS)])
        question, answer = question.format(noun), video.actors[0].verb
    elif asks == "order":
        first, gone = int(rng.integers(2)), sorted(rng.permutation(np.arange(2, 7))[:2].tolist())
        looks = _looks(rng, split, 2, "shape")
        gone[1] = max(gone[1], gone[0] + 2)
        video = make_video(rng, looks, ["leaves", "leaves"], gone if first else gone[::-1])
        question, answer = question.format("first" if first else "last"), looks[0]["colour"]
    elif asks == "count":
        moving, count = int(rng.integers(4)), 3
        verbs = ["moves"] * moving + [pick(rng, ("stays", "stays", "turns")) for _ in range(count - moving)]
        looks = _looks(rng, split, count, "")
        verbs = ["stays" if v == "turns" and o["shape"] == "circle" else v for v, o in zip(verbs, looks, strict=True)]
        video, answer = make_video(rng, looks, verbs), str(moving)
    else:
        video, noun, fact = _told_apart(rng, split, {"colour": "shape", "shape": "colour"}[asks])
        question, answer = question.format(noun, fact), video.actors[0].look.attributes[asks]
    yield from _sample(video, {"question": question, "answer": answer}, asks=asks)


VIDEO_MAKERS: dict[str, Maker] = {
    "video_ref": _video_ref, "video_grounding": _video_grounding, "video_qa": _video_qa,
}  # fmt: skip


def video_words() -> list[str]:
    """Every word that the fields and frames of these samples hold, sorted, with those of `mini_words` among them."""
    texts = [*VERBS, *VERBS.values(), *WAYS, *QUESTIONS.values(), *SPANS.values(), *SHAPES, "first last Frame frame"]
    return sorted(set(re.findall(r"\w+", " ".join(texts))))
