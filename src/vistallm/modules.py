"""Calls of modules in a text, after Vitron (arXiv 2412.19806), and three modules that a trained model runs itself.

    Here it is. <module>segment</module><instruction>the red star</instruction>
    <module>crop</module><instruction>the red star</instruction><region>10,20,90,80</region>

`read_calls` accepts exactly this grammar and says where a text leaves it; `write_calls` is its inverse. A module gets a
`Message` and answers as `vistallm.VistaLLM.predict` does, with regions in pixels of the images it was given.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from vistallm.api import Answer, AnswerRegion, VistaLLM
from vistallm.regions.masks import mask_to_rle

_TAG = re.compile(r"</?(module|instruction|region)>")
_NAME = re.compile(r"[a-z][a-z0-9_]*")
_MARGIN = 0.5  # of a crop: added on each side of the region, as a share of the box's longer side
_LEAST_CROP = 32  # pixels of a crop's sides


class CallError(ValueError):
    """A text whose calls can't be read, or a module that is not there; `position` counts characters from 0."""

    def __init__(self, position: int, expected: str, got: str) -> None:
        super().__init__(f"calls, position {position}: expected {expected}, got {got[:40]!r}")
        self.position = position


@dataclass(frozen=True)
class Call:
    """One call: the module's name, its instruction, and the box (x0, y0, x1, y1) that it is about, if any."""

    module: str
    instruction: str
    region: tuple[float, ...] | None = None


@dataclass
class Message:
    """What a module gets: the text of the call, its box in pixels, and the images, each (H, W, 3) uint8 RGB.

    `head` is what writes masks: "link", by which the language model hands its hidden states to the mask decoder, or
    "text", by which it hands over tokens alone.
    """

    text: str
    images: Sequence[np.ndarray]
    region: tuple[float, ...] | None = None
    head: str = "link"
    answer: Answer = field(default_factory=lambda: Answer("", ""))  # of the module before it in the text


Module = Callable[[VistaLLM, Message], Answer]


def read_calls(text: str) -> list[str | Call]:
    """Split a text into words and calls, in order; nothing is dropped: `write_calls` gives the text back.

    Raises:
        CallError: a tag that is not closed, out of order or empty, a name or a box that can't be read.
    """
    parts: list[str | Call] = []
    place = 0
    while start := _TAG.search(text, place):
        if start[0] != "<module>":
            raise CallError(start.start(), "<module> first", start[0])
        if start.start() > place:
            parts.append(text[place : start.start()])
        at = start.start()
        name, place = _element(text, at, "module")
        if not _NAME.fullmatch(name):
            raise CallError(at + len("<module>"), "a name of small letters, digits and _", name)
        instruction, place = _element(text, place, "instruction")
        region = None
        if text.startswith("<region>", place):
            at = place
            written, place = _element(text, place, "region")
            region = _box(written, at + len("<region>"))
        parts.append(Call(name, instruction, region))
    return [*parts, text[place:]] if text[place:] else parts


def _element(text: str, place: int, tag: str) -> tuple[str, int]:
    """The content of the element that begins at `place`, and where it ends."""
    opening, closing = f"<{tag}>", f"</{tag}>"
    if not text.startswith(opening, place):
        raise CallError(place, opening, text[place:] or "the end")
    begin = place + len(opening)
    end = _TAG.search(text, begin)
    if end is None or end[0] != closing:
        raise CallError(end.start() if end else len(text), closing, end[0] if end else "the end")
    if not text[begin : end.start()].strip():
        raise CallError(begin, f"a text in {opening}", closing)
    return text[begin : end.start()], end.end()


def _box(written: str, position: int) -> tuple[float, ...]:
    if not re.fullmatch(r"\d+(\.\d+)?(,\d+(\.\d+)?){3}", written):
        raise CallError(position, "a box x0,y0,x1,y1 in pixels", written)
    box = tuple(map(float, written.split(",")))
    if box[0] >= box[2] or box[1] >= box[3]:
        raise CallError(position, "x0 < x1 and y0 < y1", written)
    return box


def write_calls(parts: Sequence[str | Call]) -> str:
    """Write words and calls as text: inverse of `read_calls`."""
    return "".join(part if isinstance(part, str) else _write(part) for part in parts)


def _write(call: Call) -> str:
    region = "" if call.region is None else f"<region>{','.join(f'{value:g}' for value in call.region)}</region>"
    return f"<module>{call.module}</module><instruction>{call.instruction}</instruction>{region}"


def segment(model: VistaLLM, message: Message) -> Answer:
    """Mask what the text names in one image; with a region, what it shows."""
    if message.region is None:
        return model.predict(list(message.images), f"Segment {message.text}.", "gres", message.head)
    box = ",".join(map(str, message.region))
    return model.predict(list(message.images), f"Segment {{box:{box}}}.", "interactive", message.head)


def crop(model: VistaLLM, message: Message) -> Answer:
    """Ask again on an enlarged cut-out of one image: around the region, else around what a first answer finds."""
    (image,) = message.images
    box = message.region
    if box is None:
        found = [region.box for region in segment(model, message).regions if region.box]
        if not found:
            return Answer("Nothing is found.", "", "mask")
        corners = np.array(found)
        box = (*corners[:, :2].min(0).tolist(), *corners[:, 2:].max(0).tolist())
    x0, y0, x1, y1 = _window(box, image.shape[1], image.shape[0])
    answer = segment(model, replace(message, images=[np.ascontiguousarray(image[y0:y1, x0:x1])], region=None))
    regions = [_moved(region, x0, y0, image.shape[1], image.shape[0]) for region in answer.regions]
    return replace(answer, regions=regions)


def _window(box: Sequence[float], width: int, height: int) -> tuple[int, int, int, int]:
    """A square around a box with a margin, cut to the image."""
    side = max((1 + 2 * _MARGIN) * max(box[2] - box[0], box[3] - box[1]), _LEAST_CROP)
    x, y = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
    left, top = max(0, round(x - side / 2)), max(0, round(y - side / 2))
    return left, top, min(width, round(x + side / 2)), min(height, round(y + side / 2))


def _moved(region: AnswerRegion, x: int, y: int, width: int, height: int) -> AnswerRegion:
    """A mask of a cut-out at (x, y) as one of the whole image."""
    whole = np.zeros((height, width), bool)
    whole[y : y + region.height, x : x + region.width] = region.mask()
    box = region.box and tuple(float(value + offset) for value, offset in zip(region.box, (x, y, x, y), strict=True))
    return replace(region, rle=mask_to_rle(whole), polygons=None, box=box, width=width, height=height)


def track(model: VistaLLM, message: Message) -> Answer:
    """Mask what the text names in every frame; the images are frames in time order."""
    prompt = f"Segment {message.text} in each frame."
    return model.predict([list(message.images)], [prompt], "video_ref", message.head)[0]


MODULES: dict[str, Module] = {"segment": segment, "crop": crop, "track": track}


def run_calls(
    text: str,
    model: VistaLLM,
    images: Sequence[np.ndarray],
    head: str = "link",
    modules: Mapping[str, Module] = MODULES,
) -> list[tuple[Call, Answer]]:
    """Run the calls of a text in order, each on the same images; returns each with its answer.

    Raises:
        CallError: the text can't be read, or names a module that `modules` lacks; nothing is run then.
        ValueError: a module can't use its images or region.
    """
    parts = read_calls(text)
    place, calls = 0, list[Call]()
    for part in parts:
        if isinstance(part, Call):
            if part.module not in modules:
                raise CallError(place + len("<module>"), f"one of {', '.join(modules)}", part.module)
            calls.append(part)
        place += len(write_calls([part]))
    done: list[tuple[Call, Answer]] = []
    for call in calls:
        message = Message(call.instruction, images, call.region, head, *(answer for _, answer in done[-1:]))
        done.append((call, modules[call.module](model, message)))
    return done
