"""Sample -> Sequence: prompt and answer as token ids, with the labels made in the same pass.

`USER: [Image 1: ]<im_start><im_patch>*Q<im_end> instruction ASSISTANT:` then the answer and the end token, which alone
are supervised (vicuna_v1.1, paper.md 1.6); `Frame 1: ` in a video. Earlier rounds of a conversation come before, `USER:
.. ASSISTANT: ..</s>`, each answer supervised. The instructions of all rounds, joined, also go to the QFormer. A special
token that a sample's text spells out is text: only region tokens, links and the image slots are tokens. An answer's
regions are written by one of two heads: region tokens ("text"), or links, whose targets the sequence then holds.
"""

from __future__ import annotations

import dataclasses
import random
import zlib
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import cast

import cv2
import numpy as np
import torch
from torch import Tensor

from vistallm.config import PAD_COLOUR, Config, LinkConfig
from vistallm.data.vocabulary import Piece, Vocabulary, encode, encode_pieces, token_ids
from vistallm.links import REGION_TOKEN, write_link
from vistallm.links.prompts import draw_prompt
from vistallm.links.targets import LinkTarget, link_target, make_links, square_mask
from vistallm.regions.codec import RegionCodec
from vistallm.regions.letterbox import Letterbox, square_resize
from vistallm.regions.masks import rle_to_mask
from vistallm.regions.tracks import write_tracks
from vistallm.schema import IGNORE_INDEX, Batch, Region, RolloutBatch, Sample, SampleReject
from vistallm.tasks import (
    TASKS,
    RegionSlot,
    TemplateRange,
    earlier_rounds,
    find_region,
    find_tracks,
    split_placeholders,
    write_answer,
    write_instruction,
)


@dataclass
class Sequence:
    """One sample as tokens, with its labels made at the same time."""

    input_ids: Tensor  # (T,) int64, prompt then answer then end token; image slots hold the image-patch token
    labels: Tensor  # (T,) int64, the answer's own ids and the end token, IGNORE_INDEX elsewhere
    instruction_ids: Tensor  # (Q,) int64, the instruction in the QFormer's vocabulary
    images: Tensor  # (K, 3, S, S) uint8, square RGB; the encoder normalises them
    letterboxes: list[Letterbox]  # K coordinate maps
    prompt: str  # without image slots
    answer: str
    sample: Sample
    prompt_length: int  # tokens before the last answer
    head: str = "text"  # that writes the answer's regions: text or link
    links: list[LinkTarget] = field(default_factory=list)  # in the order of the routing tokens
    prompts: list[tuple[int, np.ndarray]] = field(default_factory=list)  # image and (S, S) uint8 mask of each <region>
    pixels: Tensor | None = None  # (K, 3, L, L) uint8, larger images for the links' stem


@dataclass
class SequenceBuilder:
    """Turns samples into sequences."""

    codec: RegionCodec
    vocabulary: Vocabulary
    queries: int  # image slots per image
    image_size: int  # side of the square input in pixels
    system_prompt: str = ""  # before `USER:`
    max_length: int = 1024  # tokens; a longer sequence is a reject
    max_instruction: int = 128  # tokens of the QFormer's copy, cut beyond
    templates: TemplateRange = None  # only the first n of a task, or "mini" (`Task.mini`); None = all
    template: int = 0  # the one that is taken where none is drawn; 0 = the fixed evaluation template
    links: LinkConfig | None = None  # None: the model has no links
    frames: int = 8  # of a video that are read
    _openings: dict[tuple[int, str], list[int]] = field(default_factory=dict, init=False, repr=False)
    _slot_ids: frozenset[int] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Note the ids of slots: what stands behind a routing token is given, not learned."""
        self._slot_ids = frozenset(slot for _, *slots in self.vocabulary.link_ids for slot in slots)

    def build(
        self,
        sample: Sample,
        rng: random.Random | None = None,
        generation: bool = False,
        answered: bool = True,
        head: str | None = None,
    ) -> Sequence:
        """Build the sequence of a decoded sample; `rng` draws the template, without it number `template` is taken.

        With `generation`, `max_length` counts the prompt alone: what the true answer is must not decide which samples
        are evaluated. Without `answered` the sequence ends where the answer begins, and the sample needs none. `head`
        writes the answer's regions, "text" or "link"; without it `rng` draws one of those that the task has.

        Raises:
            SampleReject: unknown task, a placeholder without its region, no answer token, too many tokens, a special
                token in the text that the tokenizer can't read as text, or a head that model or task does not have.
        """
        if sample.task not in TASKS:
            raise SampleReject("unknown-task", f"{sample.id}: task {sample.task!r}; known: {', '.join(TASKS)}")
        if sample.video and len(sample.images) > self.frames:
            text = f"{sample.id}: a video of {len(sample.images)} frames, data.frames is {self.frames}"
            raise SampleReject("too-many-frames", text)
        letterboxes = [Letterbox(info.width, info.height, self.image_size) for info in sample.images]
        regions = _Regions(self, sample, letterboxes, self._head(sample, rng) if head is None else head)
        try:
            texts = [text for pair in earlier_rounds(sample) for text in pair]
            texts.append(write_instruction(sample, None if rng else self.template, rng, self.templates))
            if answered:
                texts.append(write_answer(sample))
            written = [regions.write(text, answer=bool(number % 2)) for number, text in enumerate(texts)]
        except SampleReject:
            raise
        except (KeyError, ValueError) as error:
            raise SampleReject("bad-text", f"{sample.id}: {error}") from error
        instructions, answers = written[0::2], written[1::2]
        qformer = self.vocabulary.qformer
        joined = [piece for instruction in instructions for piece in [Piece(" "), *instruction]][1:]
        ids, labels, prompt_length = self._tokens(sample, instructions, answers, generation or not answered)
        guide = encode_pieces(qformer, joined)[: self.max_instruction - 2]
        return Sequence(  # NumPy reads a list five times as quickly as torch
            input_ids=torch.from_numpy(np.array(ids)),
            labels=torch.from_numpy(np.array(labels)),
            instruction_ids=torch.from_numpy(np.array([qformer.cls_token_id, *guide, qformer.sep_token_id])),
            images=self._images(sample, self.image_size),
            letterboxes=letterboxes,
            prompt="".join(piece.text for piece in instructions[-1]),
            answer="".join(piece.text for piece in answers[-1]) if answered else "",
            sample=sample,
            prompt_length=prompt_length,
            head=regions.head,
            links=regions.links,
            prompts=regions.prompts,
            pixels=self._images(sample, self.links.image_size) if self.links and self.links.image_size else None,
        )

    def _head(self, sample: Sample, rng: random.Random | None) -> str:
        """The head of a training sample: drawn where both can answer; a question about regions may show them, too."""
        task, share = TASKS[sample.task], self.links.share if self.links else 0.0
        if not self.links or "text" not in task.heads:
            return task.heads[0]
        return "link" if rng and (task.link or task.kind == "text") and rng.random() < share else "text"

    def _tokens(
        self, sample: Sample, instructions: list[list[Piece]], answers: list[list[Piece]], generation: bool
    ) -> tuple[list[int], list[int], int]:
        """Token ids of the rounds, one after another, their labels, and where the last answer begins.

        Every answer is supervised, but for the slots of links, and so is the end token behind it.
        """
        lm, start = self.vocabulary.lm, 0
        ids, labels = self._opening_ids(len(sample.images), "Frame" if sample.video else "Image"), list[int]()
        for number, instruction in enumerate(instructions):
            ids += encode_pieces(lm, [Piece("USER: " if number else ""), *instruction, Piece(" ASSISTANT:")])
            labels += [IGNORE_INDEX] * (len(ids) - len(labels))
            start = len(ids)
            if number == len(answers):
                break
            answer = [*encode_pieces(lm, answers[number]), lm.eos_token_id]
            if len(answer) < 2 and not generation:
                raise SampleReject("empty-answer", f"{sample.id}: the answer has no token to supervise")
            ids += answer
            labels += [IGNORE_INDEX if token in self._slot_ids else token for token in answer]
        counted = start if generation else len(ids)
        if counted > self.max_length:
            raise SampleReject("too-long", f"{sample.id}: {counted} tokens, data.max_length is {self.max_length}")
        return ids, labels, start

    def _images(self, sample: Sample, size: int) -> Tensor:
        assert sample.pixels, "the stream decodes the images before building"
        images = np.empty((len(sample.images), 3, size, size), np.uint8)
        for planes, pixels, info in zip(images, sample.pixels, sample.images, strict=True):
            if pixels.shape[:2] != (size, size):  # else it is the square already
                pixels = square_resize(pixels, size, PAD_COLOUR, (info.width, info.height))[0]
            cv2.split(pixels, list(planes))
        return torch.from_numpy(images)

    def _opening_ids(self, images: int, unit: str) -> list[int]:
        """System prompt, `USER:` and the image slots: the same for all samples of so many images, so they are kept."""
        if (images, unit) not in self._openings:
            lm = self.vocabulary.lm
            start, end = token_ids(lm, ["<im_start>", "<im_end>"])
            ids = [] if lm.bos_token_id is None else [lm.bos_token_id]
            ids += encode(lm, f"{self.system_prompt} USER:".strip())
            for number in range(1, images + 1):
                if images > 1:
                    ids += encode(lm, f"{unit} {number}:")
                ids += [start, *[self.vocabulary.image_id] * self.queries, end]
            self._openings[images, unit] = ids
        return list(self._openings[images, unit])


@dataclass
class _Regions:
    """Writes the regions of one sample's texts, and collects the links and region prompts among them."""

    builder: SequenceBuilder
    sample: Sample
    letterboxes: list[Letterbox]
    head: str
    links: list[LinkTarget] = field(default_factory=list)
    prompts: list[tuple[int, np.ndarray]] = field(default_factory=list)

    def write(self, text: str, answer: bool) -> list[Piece]:
        """Replace placeholders by region tokens, links or `<region>`; ValueError for a missing object."""
        sample, task, config = self.sample, TASKS[self.sample.task], self.builder.links
        unit = "frame" if sample.video else "image"
        shown = self.head == "link" and task.kind == "text" and not answer  # regions of a question become prompts
        pieces = []
        for part in split_placeholders(text):
            if isinstance(part, str):
                pieces.append(Piece(part))
                continue
            by_link = task.link if answer and self.head == "link" else ""
            if config is None and (by_link or part.shape or part.keypoint is not None):
                text = f"{sample.id}: {sample.task} needs a model with links (model.links=all)"
                raise SampleReject("needs-links", text)
            if answer and sample.video and part.keypoint is None and not part.shape:
                pieces.append(self._tracks(part, by_link))
                continue
            chosen = [find_region(sample, number, part.kind) for number in part.objects]
            if config is not None and (part.shape or shown):
                pieces += [self._show(region, part.shape or region.kind) for region in chosen]
            elif config is not None and by_link:
                pieces.append(self._link(part, chosen, task.link, config))
            elif part.keypoint is not None:
                raise ValueError("a keypoint is written by links alone")
            else:
                written = self.builder.codec.encode(chosen, self.letterboxes, part.kind or chosen[0].kind, unit)
                pieces.append(Piece(written, tokens=written.count("<")))
        return pieces

    def _link(self, part: RegionSlot, chosen: list[Region], kind: str, config: LinkConfig) -> Piece:
        """A link per image that holds objects, or one without objects; a keypoint's link shares the objects before."""
        size, links = (config.image_size or self.builder.image_size) // 2, list[LinkTarget]()
        images = sorted({region.image for region in chosen}) or [0]
        for image in images if part.keypoint is None else [self.links[-1].image]:
            objects = [region for region in chosen if region.image == image]
            links.append(link_target(kind, image, objects, self.letterboxes[image], size))
            links[-1].keypoint = part.keypoint
        self.links += links
        named = len(self.letterboxes) > 1 and chosen
        texts = [f"image {one.image + 1}: " * bool(named) + write_link(kind, config) for one in links]
        return Piece(" ".join(texts), tokens=len(links) * (1 + config.queries))

    def _tracks(self, part: RegionSlot, by_link: str) -> Piece:
        """The tracks of a video's objects: as text, or a link whose slots are read in every frame."""
        config, builder = self.builder.links, self.builder
        tracks, kind = find_tracks(self.sample, part)
        if not by_link or config is None:
            written = write_tracks(builder.codec, tracks, self.letterboxes, kind)
            return Piece(written, tokens=written.count("<"))
        size = (config.image_size or builder.image_size) // 2
        for frame, letterbox in enumerate(self.letterboxes):
            objects = [region for track in tracks for region in track if region.image == frame]
            self.links.append(link_target(by_link, frame, objects, letterbox, size))
            self.links[-1].shared = frame > 0
        return Piece(write_link(by_link, config), tokens=1 + config.queries)

    def _show(self, region: Region, shape: str) -> Piece:
        """A region prompt: its mask, or that of its box or point, drawn as `shape`, always alike for one sample."""
        box = self.letterboxes[region.image]
        if region.rle is not None:
            mask = rle_to_mask(region.rle)
        else:
            mask = np.zeros((box.height, box.width), bool)
            x0, y0, x1, y1 = (int(value) for value in region.box or 2 * (region.point or (0, 0)))
            mask[min(y0, box.height - 1) : max(y1, y0 + 1), min(x0, box.width - 1) : max(x1, x0 + 1)] = True
        drawn = draw_prompt(mask, shape, np.random.default_rng(zlib.crc32(self.sample.id.encode())))
        shown = square_mask(drawn, box, self.builder.image_size) > 0  # also a dot that is less than a pixel
        self.prompts.append((region.image, shown.astype(np.uint8)))
        return Piece(REGION_TOKEN, tokens=1)


def build_codec(config: Config) -> RegionCodec:
    """The codec of a configuration."""
    own = (config.coords, config.num_bins, config.points, config.mask_sampler, config.target_iou)
    return RegionCodec(*own, keyframes=config.video.keyframes)


def build_sequencer(config: Config, vocabulary: Vocabulary) -> SequenceBuilder:
    """The sample-to-sequence builder of a configuration."""
    templates = config.data.templates
    if isinstance(templates, str) and templates != "mini":
        raise ValueError(f"data.templates={templates}: expected a number, mini or null")
    return SequenceBuilder(
        codec=build_codec(config),
        vocabulary=vocabulary,
        queries=config.model.tokenizer.queries,
        image_size=config.model.encoder.image_size,
        system_prompt=config.model.decoder.system_prompt,
        max_length=config.data.max_length,
        max_instruction=config.model.tokenizer.max_instruction_tokens,
        templates=cast(TemplateRange, templates),
        template=config.decode.template,
        links=None if config.model.links == "none" else config.links,
        frames=config.data.frames,
    )


def collate(sequences: list[Sequence], vocabulary: Vocabulary, generation: bool = False) -> Batch:
    """Pad `sequences` to one batch.

    With `generation`, the rows hold the prompt only (no last answer) and are padded on the left, and equal images are
    noted, which the encoder then reads once.
    """
    # The last answer ends the sequence; those of earlier rounds belong to the prompt.
    ends = [s.prompt_length if generation else None for s in sequences]
    ids = [s.input_ids[:end] for s, end in zip(sequences, ends, strict=True)]
    labels = [s.labels[:end] for s, end in zip(sequences, ends, strict=True)]
    counts = torch.tensor([len(s.images) for s in sequences])
    pad = vocabulary.lm.pad_token_id
    instruction = [s.instruction_ids for s in sequences]
    first = (counts.cumsum(0) - counts).tolist()
    prompts = [(image + start, mask) for s, start in zip(sequences, first, strict=True) for image, mask in s.prompts]
    pixels = [s.pixels for s in sequences if s.pixels is not None]
    with_links = bool(vocabulary.link_tokens) and not generation
    images = torch.cat([s.images for s in sequences])
    seen: dict[bytes, int] = {}
    copies = [seen.setdefault(one.numpy().tobytes(), number) for number, one in enumerate(images if generation else ())]
    side = (sequences[0].images if sequences[0].pixels is None else sequences[0].pixels).shape[-1]
    return Batch(
        input_ids=_pad(ids, pad, generation),
        labels=_pad(labels, IGNORE_INDEX, generation),
        attention_mask=_pad([torch.ones_like(i) for i in ids], 0, generation),
        instruction_ids=_pad(instruction, vocabulary.qformer.pad_token_id),
        instruction_mask=_pad([torch.ones_like(i) for i in instruction], 0),
        images=images,
        image_owner=torch.repeat_interleave(torch.arange(len(sequences)), counts),
        ids=[s.sample.id for s in sequences],
        tasks=[s.sample.task for s in sequences],
        first_copy=torch.tensor(copies) if generation else None,
        links=make_links([s.links for s in sequences], counts.tolist(), side // 2) if with_links else None,
        prompts=torch.from_numpy(np.stack([mask for _, mask in prompts])) if prompts else None,
        prompt_image=torch.tensor([image for image, _ in prompts]) if prompts else None,
        pixels=torch.cat(pixels) if pixels else None,
        frame=_frame_places(sequences),
    )


def _frame_places(sequences: list[Sequence]) -> Tensor | None:
    """`Batch.frame`."""
    if not any(s.sample.video for s in sequences):
        return None
    places = [torch.arange(len(s.images)) if s.sample.video else torch.full((len(s.images),), -1) for s in sequences]
    return torch.cat(places)


def collate_rollouts(
    sequences: list[Sequence], vocabulary: Vocabulary, tasks: Collection[str], replay: bool
) -> RolloutBatch:
    """Pad the prompts of the samples of `tasks` (that text answers), and the other samples whole for the replay.

    All processes run both: where a batch lacks samples of one kind, its first sample stands for them.
    """
    drawn = [one for one in sequences if one.sample.task in tasks and one.head == "text"]
    rest = [one for one in sequences if one.sample.task not in tasks or one.head != "text"] or sequences[:1]
    drawn = drawn or sequences[:1]
    return RolloutBatch(
        prompts=collate(drawn, vocabulary, generation=True),
        samples=[dataclasses.replace(one.sample, pixels=None) for one in drawn],
        answers=[one.answer for one in drawn],
        replay=collate(rest, vocabulary) if replay else None,
    )


def _pad(rows: list[Tensor], value: int, left: bool = False) -> Tensor:
    side = "left" if left else "right"
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value, padding_side=side)
