from __future__ import annotations

import torch

from vistallm.data.collate import collate
from vistallm.schema import IGNORE_INDEX


def rows(builder, samples):
    return [builder.build(samples[task][0]) for task in ("attcoseg", "pope", "nlvr2", "caption")]


def test_training_batch_is_right_padded(builder, samples):
    sequences = rows(builder, samples)
    batch = collate(sequences, builder.vocabulary)
    for i, sequence in enumerate(sequences):
        length = len(sequence.input_ids)
        assert torch.equal(batch.input_ids[i, :length], sequence.input_ids)
        assert torch.equal(batch.labels[i, :length], sequence.labels)
        assert (batch.input_ids[i, length:] == builder.vocabulary.text.pad_token_id).all()
        assert (batch.labels[i, length:] == IGNORE_INDEX).all()
        assert batch.attention_mask[i].tolist() == [1] * length + [0] * (batch.input_ids.shape[1] - length)
    assert batch.sequences == []
    assert len(batch) == 4


def test_generation_batch_is_left_padded_and_holds_no_answer(builder, samples):
    sequences = rows(builder, samples)
    batch = collate(sequences, builder.vocabulary, generation=True)
    assert (batch.labels == IGNORE_INDEX).all()
    for i, sequence in enumerate(sequences):
        prompt = sequence.input_ids[sequence.labels == IGNORE_INDEX]
        width = batch.input_ids.shape[1]
        assert torch.equal(batch.input_ids[i, width - len(prompt) :], prompt)
        assert batch.attention_mask[i].tolist() == [0] * (width - len(prompt)) + [1] * len(prompt)
        assert batch.sequences[i] is sequence


def test_instructions_are_right_padded_in_both(builder, samples):
    sequences = rows(builder, samples)
    for generation in (False, True):
        batch = collate(sequences, builder.vocabulary, generation)
        for i, sequence in enumerate(sequences):
            length = len(sequence.instruction_ids)
            assert torch.equal(batch.instruction_ids[i, :length], sequence.instruction_ids)
            assert batch.instruction_mask[i].sum() == batch.instruction_mask[i, :length].sum() == length


def test_images_lie_one_after_another_with_their_owner(builder, samples):
    sequences = rows(builder, samples)
    batch = collate(sequences, builder.vocabulary)
    owners = [i for i, sequence in enumerate(sequences) for _ in sequence.images]
    assert batch.image_owner.tolist() == owners
    assert torch.equal(batch.images, torch.cat([s.images for s in sequences]))
    assert batch.ids == [s.sample.id for s in sequences]
    assert batch.tasks == ["attcoseg", "pope", "nlvr2", "caption"]
