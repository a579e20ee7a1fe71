"""Sample -> Sequence: prompt and answer as token ids, with the labels made in the same pass.

`USER: [Image 1: ]<im_start><im_patch>*Q<im_end> instruction ASSISTANT:` then the answer and the end token, which alone
are supervised (vicuna_v1.1, paper.md 1.6). Earlier rounds of a conversation come before, `USER: .. ASSISTANT: ..</s>`,
each answer supervised. The instructions of all rounds, joined, also go to the QFormer. A special token that a
sample's text spells out is text: only the codec's region tokens and the image slots are tokens.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import cv2
import numpy as np
import torch
from torch import Tensor

from vistallm.config import PAD_COLOUR
from vistallm.data.vocabulary import Piece, Vocabulary, encode, encode_pieces, token_ids
from vistallm.regions.codec import RegionCodec
from vistallm.regions.letterbox import Letterbox, square_resize
from vistallm.schema import IGNORE_INDEX, Batch, Sample, SampleReject
from vistallm.tasks import (
    TASKS,
    TemplateRange,
    earlier_rounds,
    find_region,
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
    _openings: dict[int, list[int]] = field(default_factory=dict, init=False, repr=False)

    def build(
        self, sample: Sample, rng: random.Random | None = None, generation: bool = False, answered: bool = True
    ) -> Sequence:
        """Build the sequence of a decoded sample; `rng` draws the template, without it number `template` is taken.

        With `generation`, `max_length` counts the prompt alone: what the true answer is must not decide which samples
        are evaluated. Without `answered` the sequence ends where the answer begins, and the sample needs none.

        Raises:
            SampleReject: unknown task, a placeholder without its region, no answer token, too many tokens, or a special
                token in the text that the tokenizer can't read as text.
        """
        if sample.task not in TASKS:
            raise SampleReject("unknown-task", f"{sample.id}: task {sample.task!r}; known: {', '.join(TASKS)}")
        images, letterboxes = self._images(sample)
        try:
            texts = [text for pair in earlier_rounds(sample) for text in pair]
            texts.append(write_instruction(sample, None if rng else self.template, rng, self.templates))
            if answered:
                texts.append(write_answer(sample))
            written = [self._write_regions(text, sample, letterboxes) for text in texts]
        except (KeyError, ValueError) as error:
            raise SampleReject("bad-text", f"{sample.id}: {error}") from error
        instructions, answers = written[0::2], written[1::2]
        qformer = self.vocabulary.qformer
        joined = [piece for instruction in instructions for piece in [Piece(" "), *instruction]][1:]
        ids, labels = self._tokens(sample, instructions, answers, generation or not answered)
        guide = encode_pieces(qformer, joined)[: self.max_instruction - 2]
        return Sequence(  # NumPy reads a list five times as quickly as torch
            input_ids=torch.from_numpy(np.array(ids)),
            labels=torch.from_numpy(np.array(labels)),
            instruction_ids=torch.from_numpy(np.array([qformer.cls_token_id, *guide, qformer.sep_token_id])),
            images=images,
            letterboxes=letterboxes,
            prompt="".join(piece.text for piece in instructions[-1]),
            answer="".join(piece.text for piece in answers[-1]) if answered else "",
            sample=sample,
        )

    def _tokens(
        self, sample: Sample, instructions: list[list[Piece]], answers: list[list[Piece]], generation: bool
    ) -> tuple[list[int], list[int]]:
        """Token ids of the rounds, one after another, and their labels: every answer and the end token behind it."""
        lm, counted = self.vocabulary.lm, 0
        ids, labels = self._opening_ids(len(sample.images)), list[int]()
        for number, instruction in enumerate(instructions):
            ids += encode_pieces(lm, [Piece("USER: " if number else ""), *instruction, Piece(" ASSISTANT:")])
            labels += [IGNORE_INDEX] * (len(ids) - len(labels))
            counted = len(ids)
            if number == len(answers):
                break
            answer = [*encode_pieces(lm, answers[number]), lm.eos_token_id]
            if len(answer) < 2 and not generation:
                raise SampleReject("empty-answer", f"{sample.id}: the answer has no token to supervise")
            ids += answer
            labels += answer
        counted = counted if generation else len(ids)
        if counted > self.max_length:
            raise SampleReject("too-long", f"{sample.id}: {counted} tokens, data.max_length is {self.max_length}")
        return ids, labels

    def _write_regions(self, text: str, sample: Sample, letterboxes: list[Letterbox]) -> list[Piece]:
        """Replace `{regions:...}` placeholders by region tokens; raises ValueError for a missing object."""
        pieces = []
        for part in split_placeholders(text):
            if isinstance(part, str):
                pieces.append(Piece(part))
                continue
            chosen = [find_region(sample, number, part.kind) for number in part.objects]
            written = self.codec.encode(chosen, letterboxes, part.kind or chosen[0].kind)
            pieces.append(Piece(written, tokens=written.count("<")))
        return pieces

    def _images(self, sample: Sample) -> tuple[Tensor, list[Letterbox]]:
        assert sample.pixels, "the stream decodes the images before building"
        size = self.image_size
        images = np.empty((len(sample.images), 3, size, size), np.uint8)
        for planes, pixels, info in zip(images, sample.pixels, sample.images, strict=True):
            if pixels.shape[:2] != (size, size):  # else it is the square already
                pixels = square_resize(pixels, size, PAD_COLOUR, (info.width, info.height))[0]
            cv2.split(pixels, list(planes))
        return torch.from_numpy(images), [Letterbox(info.width, info.height, size) for info in sample.images]

    def _opening_ids(self, images: int) -> list[int]:
        """System prompt, `USER:` and the image slots: the same for all samples of so many images, so they are kept."""
        if images not in self._openings:
            lm = self.vocabulary.lm
            start, end = token_ids(lm, ["<im_start>", "<im_end>"])
            ids = [] if lm.bos_token_id is None else [lm.bos_token_id]
            ids += encode(lm, f"{self.system_prompt} USER:".strip())
            for number in range(1, images + 1):
                if images > 1:
                    ids += encode(lm, f"Image {number}:")
                ids += [start, *[self.vocabulary.image_id] * self.queries, end]
            self._openings[images] = ids
        return list(self._openings[images])


def collate(sequences: list[Sequence], vocabulary: Vocabulary, generation: bool = False) -> Batch:
    """Pad `sequences` to one batch.

    With `generation`, the rows hold the prompt only (no last answer) and are padded on the left.
    """
    # The last answer ends the sequence; those of earlier rounds belong to the prompt.
    ends = [int((s.labels == IGNORE_INDEX).nonzero()[-1]) + 1 if generation else None for s in sequences]
    ids = [s.input_ids[:end] for s, end in zip(sequences, ends, strict=True)]
    labels = [s.labels[:end] for s, end in zip(sequences, ends, strict=True)]
    counts = torch.tensor([len(s.images) for s in sequences])
    pad = vocabulary.lm.pad_token_id
    instruction = [s.instruction_ids for s in sequences]
    return Batch(
        input_ids=_pad(ids, pad, generation),
        labels=_pad(labels, IGNORE_INDEX, generation),
        attention_mask=_pad([torch.ones_like(i) for i in ids], 0, generation),
        instruction_ids=_pad(instruction, vocabulary.qformer.pad_token_id),
        instruction_mask=_pad([torch.ones_like(i) for i in instruction], 0),
        images=torch.cat([s.images for s in sequences]),
        image_owner=torch.repeat_interleave(torch.arange(len(sequences)), counts),
        ids=[s.sample.id for s in sequences],
        tasks=[s.sample.task for s in sequences],
    )


def _pad(rows: list[Tensor], value: int, left: bool = False) -> Tensor:
    side = "left" if left else "right"
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value, padding_side=side)
