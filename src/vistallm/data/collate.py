"""Sequences -> Batch: right-padded with labels for training, left-padded without the answer for generation."""

from __future__ import annotations

import torch
from torch import Tensor

from vistallm.data.vocabulary import Vocabulary
from vistallm.schema import IGNORE_INDEX, Batch, Sequence


def collate(sequences: list[Sequence], vocabulary: Vocabulary, generation: bool = False) -> Batch:
    """Pad `sequences` to one batch.

    With `generation`, the rows hold the prompt only (no last answer), are padded on the left, and the batch keeps
    its sequences; without it the answer is there and `sequences` stays empty.
    """
    # The last answer ends the sequence; those of earlier rounds belong to the prompt.
    ends = [int((s.labels == IGNORE_INDEX).nonzero()[-1]) + 1 if generation else None for s in sequences]
    ids = [s.input_ids[:end] for s, end in zip(sequences, ends, strict=True)]
    labels = [s.labels[:end] for s, end in zip(sequences, ends, strict=True)]
    counts = torch.tensor([len(s.images) for s in sequences])
    pad = vocabulary.text.pad_token_id
    instruction = [s.instruction_ids for s in sequences]
    return Batch(
        input_ids=_pad(ids, pad, generation),
        labels=_pad(labels, IGNORE_INDEX, generation),
        attention_mask=_pad([torch.ones_like(i) for i in ids], 0, generation),
        instruction_ids=_pad(instruction, vocabulary.instruction.pad_token_id),
        instruction_mask=_pad([torch.ones_like(i) for i in instruction], 0),
        images=torch.cat([s.images for s in sequences]),
        image_owner=torch.repeat_interleave(torch.arange(len(sequences)), counts),
        ids=[s.sample.id for s in sequences],
        tasks=[s.sample.task for s in sequences],
        sequences=list(sequences) if generation else [],
    )


def _pad(rows: list[Tensor], value: int, left: bool = False) -> Tensor:
    side = "left" if left else "right"
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value, padding_side=side)
