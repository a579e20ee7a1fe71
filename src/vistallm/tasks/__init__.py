"""The task table: a stored sample in, its instruction and answer text out.

Regions stay placeholders in both texts: `{regions:0,2}` writes objects 0 and 2 of the sample, `{regions::mask}` an
empty pair (no target), `{regions:0:point}` overrides the kind. Two more belong to links: `{region:0:circle}` in an
instruction shows object 0 to the model as a region prompt of that shape (without one: its mask), and `{point:1}` in an
answer writes keypoint 1 of the objects of the placeholder before it. Other braces in a template name a key of
`Sample.fields`; a field's text may itself hold placeholders.
"""

from __future__ import annotations

import functools
import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Literal

import numpy as np

from vistallm.schema import PROMPT_SHAPES, REGION_KINDS, Region, Sample
from vistallm.tasks.texts import join

_SLOT = re.compile(
    r"\{regions:(?P<objects>\d+(?:,\d+)*)?(?::(?P<kind>mask|box|point|keypoints))?\}"
    rf"|\{{region:(?P<shown>\d+)(?::(?P<shape>{'|'.join(PROMPT_SHAPES)}))?\}}|\{{point:(?P<keypoint>\d+)\}}"
)
_SLOT_START = re.compile(r"\{(?:regions:|(?:region|point):\d)")
_FIELD = re.compile(r"\{([a-z_0-9]+)\}")
# Which instruction templates are drawn: the first n, those of the mini world, or all (None).
TemplateRange = int | Literal["mini"] | None


@dataclass(frozen=True)
class RegionSlot:
    """A place in a text where regions are written: object numbers of the sample, and a kind if not the regions' own.

    `shape`: the place is a region prompt, one of PROMPT_SHAPES, of its one object. `keypoint`: it is the keypoint of
    that number, from 0, of the objects of the place before it; `objects` is empty then.
    """

    objects: list[int]
    kind: str | None = None
    shape: str | None = None
    keypoint: int | None = None


@dataclass(frozen=True)
class Task:
    """One kind of instruction."""

    name: str  # in shards, configs and template files
    kind: Literal["text", "mask", "box", "point", "keypoints"]  # of what the answer holds
    answer: str  # answer template; `{targets}` writes the objects of `fields["targets"]` (default: object 0)
    metric: str  # the family of scores, by which benchmarks choose their torchmetrics class
    plural: str | None = None  # answer template for several targets, when its words differ
    fields: tuple[str, ...] = ()  # keys of `Sample.fields` that every instruction template must use
    regions: bool = False  # whether every instruction template must hold a region placeholder of its own
    multi_image: bool = False  # whether samples hold several images (stage 2)
    own_texts: bool = False  # whether every sample brings its instruction and answer; there are no templates then
    # The mini world draws from the first so many templates and its vocabulary holds their words; 0 = a task that it
    # lacks. Templates added after them change nothing for a mini model.
    mini: int = 10
    link: str = ""  # the kind of link that can write the answer's regions, one of `vistallm.links.LINKS`; "" = none
    mini_links: bool = False  # whether the mini world has the task only where links are on
    video: bool = False  # whether samples are videos; the mini world has the task only where model.video is on

    @property
    def heads(self) -> tuple[str, ...]:
        """By what the answer's regions can be written: "text" (region tokens), "link", or both."""
        return ("text",) * (self.kind != "keypoints") + ("link",) * bool(self.link)


_BOX, _BOXES = "The bounding box is {targets}.", "The bounding boxes are {targets}."
_MASK, _MASKS = "The mask is {targets}.", "The masks are {targets}."
_SHARED, _SHARING = f"The image is {{images}}. {_MASK}", f"The images are {{images}}. {_MASKS}"
_ANSWER = "The answer is {answer}."
_CHOSEN = "The answer is {targets}."
_FOUND = "{found}."

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task("caption", "text", "{caption}", "caption"),
        Task("reg", "text", "{expr}", "caption", regions=True),
        Task("vqa", "text", _ANSWER, "vqa", fields=("question",)),
        Task("rec", "box", _BOX, "box", fields=("expr",), link="GRD"),
        Task("res", "mask", _MASK, "mask", fields=("expr",), link="GRD"),
        Task("grec", "box", _BOX, "boxes", plural=_BOXES, fields=("expr",), link="GRD"),
        Task("gres", "mask", _MASK, "masks", plural=_MASKS, fields=("expr",), link="GRD"),
        Task("pointqa", "text", _ANSWER, "exact", fields=("question",), mini=9),
        Task("boxqa", "text", _ANSWER, "exact", fields=("question",), mini=9),
        Task("v7w", "box", _CHOSEN, "candidates", fields=("question", "candidates"), mini=9),
        Task("vcr", "text", _ANSWER, "choice", fields=("question", "options"), mini=9),
        Task("pope", "text", _ANSWER, "yesno", fields=("question",), mini=9),
        Task("nlvr2", "text", "That is {answer}.", "truth", fields=("statement",), multi_image=True, mini=9),
        Task("coseg", "mask", _MASK, "coseg", plural=_MASKS, multi_image=True, link="SEG"),
        Task("attcoseg", "mask", _SHARED, "coseg", _SHARING, ("attribute", "value"), multi_image=True, link="SEG"),
        # `v7w` answered by a point: the target's region has the kind "point", the candidates are boxes or points.
        Task("v7w_point", "point", _CHOSEN, "candidates", fields=("question", "candidates"), mini=0),
        Task("vqa_e", "text", "{explanation} So the answer is {answer}.", "vqa", fields=("question",), mini=0),
        # The caption's phrases are followed by `{regions:i}`: "A man {regions:0} in a hat {regions:1} smiles."
        Task("flickr", "box", "{caption}", "boxes", mini=0),
        # `fields["found"]` lists every name asked for with its objects: "star {regions:0,1}, circle {regions::box}". In
        # semseg all pixels of a name are one object.
        Task("det", "box", _FOUND, "detection", fields=("names",), link="DET", mini_links=True),
        Task("insseg", "mask", _FOUND, "detection", fields=("names",), link="DET", mini_links=True),
        Task("semseg", "mask", _FOUND, "semseg", fields=("names",), link="SEG", mini_links=True),
        Task("count", "box", _FOUND, "count", fields=("expr",), link="DET", mini_links=True),
        # `fields["prompt"]` is a region prompt: of the object to segment, or of an example in the first image.
        Task("interactive", "mask", _MASK, "mask", fields=("prompt",), link="SEG", mini_links=True),
        Task("incontext", "mask", _MASK, "masks", _MASKS, ("prompt",), multi_image=True, link="SEG", mini_links=True),
        # "star {regions:0,1}, top {point:0}, right {point:1}": objects of one class, then its keypoints by name.
        Task("pose", "keypoints", _FOUND, "pose", fields=("expr", "points"), link="POSE", mini_links=True),
        # Tracks: the regions of each target in every frame, an empty pair where it is not seen.
        Task("video_ref", "mask", _MASKS, "video", fields=("expr",), multi_image=True, link="GRD", video=True),
        Task("video_grounding", "box", _BOXES, "tube", fields=("expr",), multi_image=True, link="GRD", video=True),
        Task("video_qa", "text", _ANSWER, "exact", fields=("question",), multi_image=True, mini=9, video=True),
        # Free conversation, with earlier rounds in `fields["rounds"]`.
        Task("instruct", "text", "{answer}", "caption", own_texts=True, mini=0),
    )
}


def find_task(name: str) -> Task:
    """The task of that name; raises ValueError naming those that exist."""
    if name not in TASKS:
        raise ValueError(f"task: expected one of {', '.join(TASKS)}; got {name!r}")
    return TASKS[name]


@functools.cache
def load_templates(task: str, templates: TemplateRange = None) -> tuple[str, ...]:
    """Instruction templates of a task, none for `own_texts`; the first is the fixed one that evaluation uses.

    `templates` takes the first so many only (at least one), or those of the mini world ("mini").
    """
    if templates is not None:
        return load_templates(task)[: max(1, find_task(task).mini if templates == "mini" else templates)]
    if find_task(task).own_texts:
        return ()
    text = resources.files("vistallm.tasks").joinpath("templates", f"{task}.txt").read_text(encoding="utf-8")
    return tuple(line.strip() for line in text.splitlines() if line.strip())


def split_placeholders(text: str) -> list[str | RegionSlot]:
    """Split a text at its region placeholders, without empty strings; raises ValueError for a wrong placeholder."""
    parts: list[str | RegionSlot] = []
    end = 0
    for match in _SLOT.finditer(text):
        objects = [int(number) for number in (match["objects"] or match["shown"] or "").split(",") if number]
        keypoint = int(match["keypoint"]) if match["keypoint"] else None
        shape = (match["shape"] or "mask") if match["shown"] else None
        if not objects and match["kind"] is None and keypoint is None:
            raise ValueError(f"placeholder {match[0]}: an empty one needs a kind, as in {{regions::mask}}")
        parts += [text[end : match.start()], RegionSlot(objects, match["kind"], shape, keypoint)]
        end = match.end()
    for part in (*parts, text[end:]):
        if isinstance(part, str) and (start := _SLOT_START.search(part)):
            forms = "{regions:0,2}, {regions::mask}, {region:0:circle} or {point:1}"
            raise ValueError(f"placeholder: expected {forms}, got {part[start.start() :]!r}")
    return [part for part in (*parts, text[end:]) if part]


def list_objects(found: Iterable[tuple[str, Sequence[Region]]], kind: str) -> str:
    """What an answer lists of names and their objects, `fields["found"]`; a name without objects has an empty `kind`.

    >>> list_objects([("star", [Region(0, "box", 0), Region(0, "box", 1)]), ("circle", [])], "box")
    'star {regions:0,1}, circle {regions::box}'
    """
    numbers = ((name, ",".join(str(region.object) for region in regions)) for name, regions in found)
    return ", ".join(f"{name} {{regions:{objects or ':' + kind}}}" for name, objects in numbers)


def find_region(sample: Sample, number: int, kind: str | None) -> Region:
    """The region of object `number` that a placeholder names; ValueError when the sample has none of that kind.

    A region may hold more than its own kind: a candidate of `v7w_point` is a point with its box.
    """
    same = [region for region in sample.regions if region.object == number]
    fitting = [r for r in same if kind in (None, r.kind)] or [r for r in same if kind and getattr(r, kind, None)]
    if not fitting:
        have = ", ".join(f"{r.object} ({r.kind})" for r in sample.regions) or "none"
        named = f"object {number} as {kind}" if kind else f"object {number}"
        raise ValueError(f"a placeholder names {named}: there is no such {kind or 'region'}, the regions are {have}")
    return fitting[0]


def find_tracks(sample: Sample, slot: RegionSlot) -> tuple[list[list[Region]], str]:
    """The regions of each object of a video that a placeholder of the answer names, over all frames, and their kind.

    An object without any is one that is seen in no frame. Raises ValueError where the kind is not known.
    """
    kind = slot.kind or find_task(sample.task).kind
    if kind not in REGION_KINDS:
        raise ValueError(f"a track of a {sample.task} sample needs its kind, as in {{regions:0:mask}}")
    fitting = [region for region in sample.regions if kind == region.kind or getattr(region, kind, None)]
    return [[region for region in fitting if region.object == number] for number in slot.objects], kind


def render(
    sample: Sample,
    template: int | None = None,
    rng: random.Random | np.random.Generator | None = None,
    templates: TemplateRange = None,
) -> tuple[str, str]:
    """A sample's instruction and answer, of the last round: `write_instruction` and `write_answer`."""
    return write_instruction(sample, template, rng, templates), write_answer(sample)


def write_instruction(
    sample: Sample,
    template: int | None = None,
    rng: random.Random | np.random.Generator | None = None,
    templates: TemplateRange = None,
) -> str:
    """A sample's instruction: its own, or else a template of the task filled with its `fields`; placeholders stay.

    Template 0 is the evaluation template, None is drawn by `rng` among those that `templates` allows. Raises ValueError
    for an unknown task or template, a missing field, or a task whose samples bring their own instruction.
    """
    if find_task(sample.task) and sample.instruction is not None:
        return sample.instruction
    pool = load_templates(sample.task, templates)
    if not pool:
        raise ValueError(f"sample {sample.id} ({sample.task}): expected its own instruction, got none")
    if template is None:
        if rng is None:
            raise ValueError("render: expected a template number or an rng to draw one, got neither")
        template = int(rng.random() * len(pool))
    if not 0 <= template < len(pool):
        raise ValueError(f"template of {sample.task}: expected 0 to {len(pool) - 1}, got {template}")
    return _fill(pool[template], sample)


def write_answer(sample: Sample) -> str:
    """A sample's answer: its own, or else the task's answer form; raises ValueError as `write_instruction` does."""
    task = find_task(sample.task)
    if sample.answer is not None:
        return sample.answer
    several = len(sample.fields.get("targets", (0,))) > 1
    return _fill(task.plural if several and task.plural else task.answer, sample)


def earlier_rounds(sample: Sample) -> list[tuple[str, str]]:
    """(instruction, answer) of each round before the sample's own, from `fields["rounds"]`; ValueError for others."""
    rounds = sample.fields.get("rounds", [])
    try:
        pairs = [(instruction, answer) for instruction, answer in rounds]
    except (TypeError, ValueError):
        pairs = [(None, None)]
    if not all(isinstance(text, str) for pair in pairs for text in pair):
        raise ValueError(f'sample {sample.id}: fields["rounds"]: expected [[instruction, answer], ...], got {rounds!r}')
    return pairs


def _fill(text: str, sample: Sample) -> str:
    """Replace `{field}` by the sample's fields, joined by `texts.join`; braces inside a field's text are left alone."""

    def replace(match: re.Match[str]) -> str:
        name = match[1]
        if name == "targets":
            targets = sample.fields.get("targets", [0])
            kind = "" if targets else f":{TASKS[sample.task].kind}"
            return f"{{regions:{','.join(str(t) for t in targets)}{kind}}}"
        if name not in sample.fields:
            have = ", ".join(sample.fields) or "none"
            raise ValueError(f"sample {sample.id} ({sample.task}): text needs field {name!r}, fields are: {have}")
        return join(text[: match.start()], name, str(sample.fields[name]), text[match.end() :])

    return _FIELD.sub(replace, text)
