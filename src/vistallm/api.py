"""The model for its users: images and a prompt in, an answer with its regions out.

    from vistallm import VistaLLM
    model = VistaLLM.from_pretrained("assets/mini")
    answer = model.predict("a.jpg", "Segment the red star.")
    answer.text, answer.regions[0].mask()

The network itself is `vistallm.model.vistallm.VistaLLM`. tools/predict.py and tools/demo.py answer by this class;
eval.py shares everything behind it.
"""

from __future__ import annotations

import functools
import queue
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pycocotools import mask as coco_mask

from vistallm.config import Config
from vistallm.data.sequence import Sequence as TokenSequence
from vistallm.data.sequence import SequenceBuilder, collate
from vistallm.evaluate import generate
from vistallm.evaluate.confidence import calibrate, read_calibration
from vistallm.evaluate.grammar import Rule, rule_of
from vistallm.evaluate.prompt import ImageLike, make_sample, read_image
from vistallm.model import vistallm as network
from vistallm.model.checkpoint import load_run
from vistallm.regions.letterbox import Letterbox
from vistallm.regions.masks import box_polygon, polygons_to_rle
from vistallm.schema import Region
from vistallm.tasks import find_task


@dataclass
class AnswerRegion(Region):
    """A region of an answer, in pixels of its original image; a mask has a `box`, too, if it holds any pixel."""

    height: int = 0  # of its image
    width: int = 0

    def mask(self) -> np.ndarray:
        """(height, width) bool; a box is filled. Raises ValueError for a point or keypoints."""
        if self.rle is None and self.polygons is None and (self.kind != "box" or self.box is None):
            raise ValueError(f"expected a mask or a box, got a {self.kind}: it covers no pixels")
        # Not by the compiled functions of regions/masks.py, which a first answer would wait for.
        rle = self.rle or polygons_to_rle(
            self.polygons or [box_polygon(np.array(self.box).reshape(2, 2), 4)], self.height, self.width
        )
        return coco_mask.decode(rle).astype(bool, order="C")


@dataclass
class Answer:
    """What the model answers to one prompt."""

    text: str  # regions by their numbers: "The masks are [0, 1]."; as `raw` where it can't be read
    raw: str  # as generated, with region tokens or links
    kind: str = "text"  # mask, box, point, keypoints, or text without regions
    regions: list[AnswerRegion] = field(default_factory=list)
    failure: str | None = None  # why the regions can't be read ("unclosed", ...), or None
    presence: float | None = None  # how probable any region was against "no target", None where it was no question
    cut: bool = False  # it had to end at the limit of tokens
    calibrated: bool = False  # confidence and presence are chances of being right (tools/calibrate.py), not ranks alone

    def to_json(self) -> dict[str, Any]:
        """JSON-ready, without pixels."""
        return vars(self) | {"regions": [region.to_json() for region in self.regions]}


@dataclass
class VistaLLM:
    """A trained model that answers prompts."""

    model: network.VistaLLM
    config: Config
    half: bool | None = None  # whether to compute in bf16; None = on an accelerator
    calibration: dict[str, tuple[float, float]] = field(default_factory=dict)  # of mask, box and presence
    _answerers: dict[int | None, generate.Answerer] = field(default_factory=dict, init=False, repr=False)
    _lock: Any = field(default_factory=threading.Lock, init=False, repr=False)  # one generation at a time

    @classmethod
    def from_pretrained(
        cls, path: str | Path, device: str | torch.device | None = None, dtype: torch.dtype | None = None
    ) -> VistaLLM:
        """Load a run folder, a checkpoint in one, or what tools/export.py writes.

        Args:
            path: the folder or file.
            device: None = a CUDA GPU where there is one, else the CPU.
            dtype: torch.float32 or torch.bfloat16; None = bfloat16 on a GPU that computes in it, else float32.

        Raises:
            ValueError: nothing of the kind is there, or it can't be read.
        """
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if dtype is None:
            half = device.type == "cuda" and torch.cuda.is_bf16_supported()
            dtype = torch.bfloat16 if half else torch.float32
        if dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"dtype: expected torch.float32 or torch.bfloat16, got {dtype}")
        model, config, checkpoint = load_run(path, dtype=dtype)
        return cls(model.to(device), config, dtype == torch.bfloat16, read_calibration(checkpoint))

    def predict(
        self,
        images: Any,
        prompt: str | list[str],
        task: str | None = None,
        head: str = "text",
        temperature: float = 0.0,
        max_new_tokens: int | None = None,
    ) -> Any:
        """Return the `Answer` to one prompt, or the list of those to a list of prompts, which share batches.

        Args:
            images: of the prompt, one (`ImageLike`) or a list; for several prompts a list that holds the image or
                the list of images of each, or one image that all of them ask about.
            prompt: the instruction; regions in it as `vistallm.evaluate.prompt.FORMS` says, in pixels.
            task: whose form of answer is expected (`vistallm.tasks.TASKS`: res, gres, rec, vqa, ...); None = any. The
                images of a task of videos are its frames (video_ref, video_grounding, video_qa).
            head: what writes the regions: "text", or "link" for a model with links, which needs a task.
            temperature: of sampling; 0 = the most probable token.
            max_new_tokens: where free words end; None = as the model's own setting.

        Raises:
            OSError, ValueError: an image, a prompt or an option can't be used; it says which.
        """
        prompts = [prompt] if isinstance(prompt, str) else prompt
        if isinstance(prompt, str) or not isinstance(images, (list, tuple)):
            images = [images] * len(prompts)
        if len(images) != len(prompts):
            raise ValueError(f"expected the images of each of {len(prompts)} prompts, got {len(images)}")
        groups = [list(group) if isinstance(group, (list, tuple)) else [group] for group in images]
        pixels = {id(one): read_image(one, f"image {n}") for group in groups for n, one in enumerate(group, 1)}
        sequences = [
            self._sequence([pixels[id(one)] for one in group], text, task, head)
            for group, text in zip(groups, prompts, strict=True)
        ]
        with self._lock:
            rules = [self._rule(one, task) for one in sequences]
            replies = self._answerer(max_new_tokens).answer_all(sequences, rules, temperature)
        answers = [self._read(*pair, task) for pair in zip(sequences, replies, strict=True)]
        return answers[0] if isinstance(prompt, str) else answers

    def stream(
        self,
        images: ImageLike | Sequence[ImageLike],
        prompt: str,
        task: str | None = None,
        head: str = "text",
        temperature: float = 0.0,
        max_new_tokens: int | None = None,
    ) -> Iterator[Answer]:
        """Return an iterator over the answer to one prompt as it grows by a word or a whole region; the last is whole.

        Arguments and errors are those of `predict`. Regions that links find come with the last one. Generation ends
        where the iterator is closed.
        """
        group = images if isinstance(images, (list, tuple)) else [images]
        pixels = [read_image(one, f"image {number}") for number, one in enumerate(group, 1)]
        sequence = self._sequence(pixels, prompt, task, head)
        answerer, parts, closed = self._answerer(max_new_tokens), queue.SimpleQueue[Any](), threading.Event()

        def watch(reply: generate.Answer) -> None:
            if closed.is_set():
                raise _ClosedError
            parts.put(self._read(sequence, reply, None))

        def work() -> None:
            try:
                with self._lock:
                    reply = answerer.answer([sequence], [self._rule(sequence, task)], temperature, watch)[0]
                parts.put(self._read(sequence, reply, task))
                parts.put(None)
            except Exception as error:  # for the thread that reads
                parts.put(error)

        def read() -> Iterator[Answer]:
            threading.Thread(target=work, daemon=True).start()
            try:
                while (part := parts.get()) is not None:
                    if isinstance(part, Exception):
                        raise part
                    yield part
            finally:
                closed.set()

        return read()

    @functools.cached_property
    def builder(self) -> SequenceBuilder:
        """Builds the sequences of prompts."""
        return self._answerer(None).builder

    @torch.inference_mode()
    def prompt_embeddings(self, images: ImageLike | Sequence[ImageLike], prompt: str) -> torch.Tensor:
        """(T, C) input embeddings of the language model for a prompt with its images: what a serving engine takes."""
        group = images if isinstance(images, (list, tuple)) else [images]
        pixels = [read_image(one, f"image {number}") for number, one in enumerate(group, 1)]
        batch = collate([self._sequence(pixels, prompt, None, "text")], self.model.vocabulary, generation=True)
        with torch.autocast(self.model.bin_ids.device.type, torch.bfloat16, enabled=bool(self.half)):
            return self.model.input_embeddings(batch.to(self.model.bin_ids.device))[0]

    def _answerer(self, max_new_tokens: int | None) -> generate.Answerer:
        """The one of this limit; it keeps its compiled grammars."""
        limit = self.config.decode.max_new_tokens if max_new_tokens is None else max_new_tokens
        if limit is not None and limit < 1:
            raise ValueError(f"max_new_tokens: expected at least 1, got {limit}")
        if limit not in self._answerers:
            decode = replace(self.config.decode, max_new_tokens=limit)
            self._answerers[limit] = generate.Answerer(self.model, replace(self.config, decode=decode), half=self.half)
        return self._answerers[limit]

    def _sequence(self, pixels: list[np.ndarray], prompt: str, task: str | None, head: str) -> TokenSequence:
        if head == "link" and self.model.links is None:
            raise ValueError("head=link: expected a model with links (model.links=all); this one answers by text alone")
        return self.builder.build(make_sample(pixels, prompt, task, head), answered=False, head=head)

    def _rule(self, sequence: TokenSequence, task: str | None) -> Rule:
        """What an answer may hold: the forms of its task, or free words around regions of one kind."""
        if task is None:
            return Rule(images=len(sequence.images))
        return rule_of(sequence.sample, sequence.head, self.builder.codec.keyframes)

    def _read(self, sequence: TokenSequence, reply: generate.Answer, task: str | None) -> Answer:
        """Read a reply; without a task also one that is not whole."""
        codec, linked = self.builder.codec, sequence.head == "link"
        parsed, failure = generate.read_reply(reply, sequence, codec, find_task(task) if task else None)
        if parsed is None:
            return Answer(reply.text, reply.text, failure=failure, presence=reply.presence, cut=reply.cut)
        words = reply.text
        for slot in (slot for _, *slots in self.model.vocabulary.link_tokens for slot in slots):
            words = words.replace(slot, "")
        found = [one for one in parsed.regions if not linked or one.sure]
        regions = [_answer_region(one, sequence.letterboxes[one.image]) for one in found]
        curve = None if linked else self.calibration.get(parsed.kind)
        if curve:
            for one in regions:
                one.confidence = one.confidence and calibrate(one.confidence, *curve)
            if parsed.presence is not None and "presence" in self.calibration:
                parsed.presence = calibrate(parsed.presence, *self.calibration["presence"])
        text = parsed.answer if linked and task else codec.number_regions(words)
        return Answer(text, reply.text, parsed.kind, regions, None, parsed.presence, reply.cut, bool(curve))


class _ClosedError(Exception):
    """Nobody reads the stream any more."""


def _answer_region(region: Region, letterbox: Letterbox) -> AnswerRegion:
    found = AnswerRegion(**vars(region), height=letterbox.height, width=letterbox.width)
    if found.kind == "mask" and found.box is None:
        rows, columns = np.nonzero(found.mask())
        if len(rows):
            found.box = (*map(float, (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)),)
    return found
