from __future__ import annotations

import copy
import dataclasses
import random

import pytest
import torch

from vistallm.coinit.mini import MAKERS
from vistallm.data.sequence import SampleReject
from vistallm.schema import IGNORE_INDEX


@pytest.mark.parametrize("task", sorted(MAKERS))
def test_labels_cover_exactly_the_answer_and_the_end_token(builder, samples, task):
    text = builder.vocabulary.text
    for sample in samples[task]:
        sequence = builder.build(sample)
        supervised = sequence.labels != IGNORE_INDEX
        answer = [*text.encode(sequence.answer, add_special_tokens=False), text.eos_token_id]
        assert sequence.labels[supervised].tolist() == answer
        assert sequence.input_ids[supervised].tolist() == answer
        assert supervised.tolist() == sorted(supervised.tolist()), "one run of labels at the end"
        assert text.decode(sequence.input_ids[~supervised]).endswith("ASSISTANT :")
        assert sequence.input_ids.dtype == sequence.labels.dtype == torch.int64


@pytest.mark.parametrize("task", ["res", "nlvr2", "coseg", "attcoseg"])
def test_image_slots(builder, samples, task):
    for sample in samples[task]:
        sequence = builder.build(sample)
        images = len(sample.images)
        text = builder.vocabulary.text.decode(sequence.input_ids).replace(" ", "")
        assert (sequence.input_ids == builder.vocabulary.image_id).sum() == images * builder.queries
        assert sequence.images.shape == (images, 3, 48, 48)
        assert sequence.images.dtype == torch.uint8
        slot = "<im_start>" + "<im_patch>" * builder.queries + "<im_end>"
        shown = "".join(f"Image{k}:{slot}" for k in range(1, images + 1)) if images > 1 else slot
        assert f"USER:{shown}" in text


@pytest.mark.parametrize("task", ["pointqa", "boxqa", "reg"])
def test_both_tokenizers_see_the_regions_of_the_prompt(builder, samples, task):
    vocabulary = builder.vocabulary
    sequence = builder.build(samples[task][0])
    bins = [token for token in vocabulary.text.tokenize(sequence.prompt) if token.startswith("<bin_")]
    assert len(bins) >= 2
    guided = vocabulary.instruction.convert_ids_to_tokens(sequence.instruction_ids)
    assert [token for token in guided if token.startswith("<bin_")] == bins
    assert (guided[0], guided[-1]) == ("[CLS]", "[SEP]")


def test_evaluation_template_is_fixed_and_training_draws(builder, samples):
    sample = samples["res"][0]
    assert builder.build(sample).prompt == builder.build(sample).prompt
    drawn = {builder.build(sample, random.Random(i)).prompt for i in range(20)}
    assert len(drawn) > 3
    one = dataclasses.replace(builder, templates=1)
    assert {one.build(sample, random.Random(i)).prompt for i in range(5)} == {builder.build(sample).prompt}


def spoilt(sample, **changes):
    return dataclasses.replace(copy.copy(sample), **changes)


@pytest.mark.parametrize(
    ("changes", "reason", "said"),
    [
        ({"task": "segment"}, "unknown-task", "'segment'"),
        ({"answer": "It is {regions:9}."}, "bad-text", "object 9"),
        ({"answer": "It is {regions:0:point}."}, "bad-text", "no such point"),
        ({"answer": ""}, "empty-answer", "no token"),
        ({"fields": {}}, "bad-text", "expr"),
        ({"answer": "word " * 600}, "too-long", "data.max_length is 512"),
    ],
)
def test_rejects(builder, samples, changes, reason, said):
    with pytest.raises(SampleReject, match=said) as error:
        builder.build(spoilt(samples["res"][0], **changes))
    assert error.value.reason == reason


def test_long_instructions_are_cut_for_the_image_tokenizer_alone(builder, samples):
    short = dataclasses.replace(builder, max_instruction=6)
    sequence = short.build(samples["res"][0])
    assert len(sequence.instruction_ids) == 6
    assert torch.equal(sequence.input_ids, builder.build(samples["res"][0]).input_ids)


def test_system_prompt_comes_first(builder, samples):
    told = dataclasses.replace(builder, system_prompt="Answer well.")
    text = told.vocabulary.text
    assert text.decode(told.build(samples["vqa"][0]).input_ids).replace(" ", "").startswith("<s>Answerwell.USER:")
