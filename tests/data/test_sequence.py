from __future__ import annotations

import copy
import dataclasses
import json
import random

import pytest
import torch

from vistallm.data.sequence import collate
from vistallm.mini.tasks import MAKERS
from vistallm.schema import IGNORE_INDEX, Sample, SampleReject


@pytest.mark.parametrize("task", sorted(MAKERS))
def test_labels_cover_exactly_the_answer_and_the_end_token(builder, samples, task):
    text = builder.vocabulary.lm
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
        text = builder.vocabulary.lm.decode(sequence.input_ids).replace(" ", "")
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
    bins = [token for token in vocabulary.lm.tokenize(sequence.prompt) if token.startswith("<bin_")]
    assert len(bins) >= 2
    guided = vocabulary.qformer.convert_ids_to_tokens(sequence.instruction_ids)
    assert [token for token in guided if token.startswith("<bin_")] == bins
    assert (guided[0], guided[-1]) == ("[CLS]", "[SEP]")


def test_evaluation_template_is_fixed_and_training_draws(builder, samples):
    sample = samples["res"][0]
    assert builder.build(sample).prompt == builder.build(sample).prompt
    drawn = {builder.build(sample, random.Random(i)).prompt for i in range(20)}
    assert len(drawn) > 3
    one = dataclasses.replace(builder, templates=1)
    assert {one.build(sample, random.Random(i)).prompt for i in range(5)} == {builder.build(sample).prompt}


@pytest.fixture
def conversation(samples):
    rounds = [["What is it {regions:0}?", "It is a star."], ["Where?", "The bounding box is {regions:0}."]]
    one = samples["rec"][0]
    return spoilt(one, task="instruct", instruction="Is it red?", answer="No, it is blue.", fields={"rounds": rounds})


def test_every_answer_of_a_conversation_is_supervised(builder, samples, conversation):
    text = builder.vocabulary.lm
    sequence = builder.build(conversation, random.Random(0))
    supervised = (sequence.labels != IGNORE_INDEX).tolist()
    starts = [i for i in range(1, len(supervised)) if supervised[i] and not supervised[i - 1]]
    spans = [text.decode(sequence.input_ids[s : (supervised + [False]).index(False, s)]) for s in starts]
    box = builder.codec.encode(conversation.regions[:1], sequence.letterboxes, "box")
    said = ["It is a star.", f"The bounding box is {box}.", "No, it is blue."]
    assert [span.replace(" ", "") for span in spans] == [f"{answer}</s>".replace(" ", "") for answer in said]
    assert torch.equal(sequence.labels[torch.tensor(supervised)], sequence.input_ids[torch.tensor(supervised)])
    whole = text.decode(sequence.input_ids).replace(" ", "")
    assert whole.endswith(
        "ASSISTANT:Itisastar.</s>USER:Where?ASSISTANT:"
        + f"{said[1]}</s>USER:Isitred?".replace(" ", "")
        + "ASSISTANT:No,itisblue.</s>"
    )
    assert whole.count("<im_start>") == 1
    assert (sequence.prompt, sequence.answer) == ("Is it red?", "No, it is blue.")
    guided = builder.vocabulary.qformer.decode(sequence.instruction_ids).replace(" ", "")
    assert guided == f"[CLS]Whatisit{box}?Where?Isitred?[SEP]"
    cut = dataclasses.replace(builder, max_instruction=5).build(conversation)
    assert cut.instruction_ids[:4].equal(sequence.instruction_ids[:4])
    assert len(cut.instruction_ids) == 5


def test_one_round_is_the_sequence_without_rounds(builder, samples):
    plain = samples["vqa"][0]
    same = builder.build(spoilt(plain, fields=plain.fields | {"rounds": []}))
    assert torch.equal(same.input_ids, builder.build(plain).input_ids)
    assert torch.equal(same.labels, builder.build(plain).labels)


@pytest.mark.parametrize("task", ["rec", "nlvr2", "instruct"])
def test_a_prompt_alone_is_what_generation_reads_of_a_whole_sequence(builder, samples, conversation, task):
    sample = conversation if task == "instruct" else samples[task][0]
    whole = builder.build(sample)
    asked = spoilt(sample, answer=None, fields={k: v for k, v in sample.fields.items() if k != "answer"})
    prompt = builder.build(asked, answered=False)
    assert torch.equal(prompt.instruction_ids, whole.instruction_ids)
    batches = [collate([s], builder.vocabulary, generation=True) for s in (prompt, whole)]
    assert torch.equal(batches[0].input_ids, batches[1].input_ids)
    assert torch.equal(batches[0].input_ids[0], prompt.input_ids)
    assert torch.equal(whole.input_ids[: len(prompt.input_ids)], prompt.input_ids)
    last = [
        *builder.vocabulary.lm.encode(whole.answer, add_special_tokens=False),
        builder.vocabulary.lm.eos_token_id,
    ]
    assert whole.input_ids[len(prompt.input_ids) :].tolist() == last
    assert (prompt.prompt, prompt.answer) == (whole.prompt, "")


def test_a_numbered_template(builder, samples):
    sample = samples["res"][0]
    numbered = [dataclasses.replace(builder, template=number) for number in range(5)]
    prompts = [one.build(sample).prompt for one in numbered]
    assert len(set(prompts)) == 5
    assert numbered[1].build(sample, random.Random(0)).prompt == builder.build(sample, random.Random(0)).prompt
    with pytest.raises(SampleReject, match="expected 0 to 9"):
        dataclasses.replace(builder, template=10).build(sample)
    assert [one.build(sample, answered=False).prompt for one in numbered] == prompts


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
        ({"fields": {"expr": "x", "rounds": ["What?", "This."]}}, "bad-text", r"expected \[\[instruction, answer\]"),
        ({"fields": {"expr": "x", "rounds": [["What?", ""]]}}, "empty-answer", "no token"),
        ({"fields": {"expr": "x", "rounds": [["At {regions:9}?", "So."]]}}, "bad-text", "object 9"),
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
    text = told.vocabulary.lm
    assert text.decode(told.build(samples["vqa"][0]).input_ids).replace(" ", "").startswith("<s>Answerwell.USER:")


SPECIAL = ["<im_patch>", "<im_start>", "</s>", "<s>", "<pad>", "<bin_7>", "<m_st>", "[SEP]", "[CLS]", "＜bin_7＞"]


def special_ids(tokenizer, ids):
    added = set(tokenizer.get_added_vocab().values()) - {tokenizer.unk_token_id}
    return [i for i in ids.tolist() if i in added]


@pytest.mark.parametrize("token", SPECIAL)
def test_a_special_token_in_a_users_text_is_text(builder, samples, conversation, token):
    lm, qformer = builder.vocabulary.lm, builder.vocabulary.qformer
    vqa, rec = samples["vqa"][0], samples["rec"][0]
    rounds = [[f"What is {token} here {{regions:0}}?", f"A star {token}."]]
    for one in (
        spoilt(vqa, fields=vqa.fields | {"question": f"What is {token}?", "answer": f"red{token}"}),
        spoilt(rec, fields=rec.fields | {"expr": f"the {token} one"}),
        spoilt(conversation, fields={"rounds": rounds}, instruction=f"{token} why?", answer=f"{token} so"),
    ):
        clean = json.loads(json.dumps(one.to_json(), ensure_ascii=False).replace(token, "zebra"))
        clean = dataclasses.replace(Sample.from_json(clean), pixels=one.pixels)
        told, plain = builder.build(one), builder.build(clean)
        assert special_ids(lm, told.input_ids) == special_ids(lm, plain.input_ids), "what we write alone"
        assert special_ids(qformer, told.instruction_ids) == special_ids(qformer, plain.instruction_ids)
        assert int((told.input_ids == builder.vocabulary.image_id).sum()) == builder.queries * len(one.images)
        spelled = token.replace("＜", "<").replace("＞", ">")  # as NFKC reads it
        read, expected = (lm.decode(sequence.input_ids).replace(" ", "") for sequence in (told, plain))
        assert read == expected.replace("zebra", spelled)
        assert token in told.prompt + told.answer


def test_prompt_length_alone_decides_at_evaluation(builder, samples):
    one = samples["res"][0]
    prompt = len(builder.build(one, answered=False).input_ids)
    tight = dataclasses.replace(builder, max_length=prompt)
    assert tight.build(one, generation=True).answer == builder.build(one).answer
    with pytest.raises(SampleReject, match="data.max_length"):
        tight.build(one)
    with pytest.raises(SampleReject, match=f"{prompt} tokens, data.max_length is {prompt - 1}"):
        dataclasses.replace(builder, max_length=prompt - 1).build(one, generation=True)


# -- collate ----------------------------------------------------------------------------------------------------------


def rows(builder, samples):
    return [builder.build(samples[task][0]) for task in ("attcoseg", "pope", "nlvr2", "caption")]


def test_training_batch_is_right_padded(builder, samples):
    sequences = rows(builder, samples)
    batch = collate(sequences, builder.vocabulary)
    for i, sequence in enumerate(sequences):
        length = len(sequence.input_ids)
        assert torch.equal(batch.input_ids[i, :length], sequence.input_ids)
        assert torch.equal(batch.labels[i, :length], sequence.labels)
        assert (batch.input_ids[i, length:] == builder.vocabulary.lm.pad_token_id).all()
        assert (batch.labels[i, length:] == IGNORE_INDEX).all()
        assert batch.attention_mask[i].tolist() == [1] * length + [0] * (batch.input_ids.shape[1] - length)
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
