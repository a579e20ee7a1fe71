from __future__ import annotations

import dataclasses

import pytest
import torch

from vistallm.data.sequence import collate
from vistallm.model.build import build_model
from vistallm.schema import IGNORE_INDEX

TASKS = ("attcoseg", "pope", "rec", "nlvr2", "res", "caption")


@pytest.fixture
def sequences(builder, samples):
    return [builder.build(samples[task][0]) for task in TASKS]


@pytest.fixture
def livelier(tiny_model):
    """A random model whose answers differ: larger weights, an end token that comes now and then."""
    torch.manual_seed(5)
    for parameter in tiny_model.parameters():
        if parameter.ndim > 1:
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    return tiny_model


def test_loss_equals_transformers_own(livelier, sequences, vocabulary):
    batch = collate(sequences, vocabulary)
    with torch.no_grad():
        output = livelier(batch)
        embeddings = livelier.input_embeddings(batch)
        theirs = livelier.decoder(inputs_embeds=embeddings, attention_mask=batch.attention_mask, labels=batch.labels)
    torch.testing.assert_close(output.loss, theirs.loss, rtol=1e-5, atol=1e-6)
    targets = batch.labels[:, 1:]
    row, column = (targets != IGNORE_INDEX).nonzero(as_tuple=True)
    right = theirs.logits[row, column].argmax(-1) == targets[row, column]
    assert torch.equal(output.correct, right)
    assert torch.equal(output.row, row)
    assert output.token_loss.mean().item() == pytest.approx(output.loss.item())


def test_lm_head_runs_on_supervised_positions_only(tiny_model, sequences, vocabulary):
    seen = []
    tiny_model.decoder.get_output_embeddings().register_forward_hook(lambda m, args, out: seen.append(args[0].shape))
    batch = collate(sequences, vocabulary)
    tiny_model(batch)
    assert seen == [(int((batch.labels != IGNORE_INDEX).sum()), 64)]


def test_neighbours_in_a_batch_do_not_matter(livelier, sequences, vocabulary):
    """Padding and images of other samples change nothing: a batch's loss is made of its samples' own."""
    with torch.no_grad():
        together = livelier(collate(sequences, vocabulary))
        alone = [livelier(collate([sequence], vocabulary)).token_loss for sequence in sequences]
    for number, losses in enumerate(alone):
        torch.testing.assert_close(together.token_loss[together.row == number], losses, rtol=1e-4, atol=1e-5)


def test_image_order_matters(livelier, builder, samples, vocabulary):
    sample = samples["nlvr2"][0]
    swapped = dataclasses.replace(sample, pixels=sample.pixels[::-1], images=sample.images[::-1])
    with torch.no_grad():
        one, two = (livelier(collate([builder.build(s)], vocabulary)).token_loss for s in (sample, swapped))
    assert (one - two).abs().max() > 1e-3


def test_soft_coordinate_targets(tiny_config, vocabulary, builder, samples):
    """A narrow Gaussian is cross-entropy, a wide one forgives near misses; words keep their cross-entropy."""
    batch = collate([builder.build(samples["rec"][0])], vocabulary)
    losses = {}
    for sigma in (0, 1e-3, 2):
        torch.manual_seed(0)
        model = build_model(tiny_config(f"train.bin_sigma={sigma}"), vocabulary).eval()
        with torch.no_grad():
            losses[sigma] = model(batch).token_loss
    targets = batch.labels[batch.labels != IGNORE_INDEX]
    bins = torch.isin(targets, torch.tensor(vocabulary.bin_ids))
    assert bins.sum() == 4
    torch.testing.assert_close(losses[0], losses[1e-3])
    assert torch.equal(losses[0][~bins], losses[2][~bins])
    assert not torch.allclose(losses[0][bins], losses[2][bins], atol=1e-4)


def uncached(model, sequence, vocabulary, new_tokens):
    """Greedy decoding without a cache, one token at a time over the whole sequence."""
    batch = collate([sequence], vocabulary, generation=True)
    embeddings, written = model.input_embeddings(batch), []
    for _ in range(new_tokens):
        logits = model.decoder(inputs_embeds=embeddings, use_cache=False).logits[0, -1]
        written.append(int(logits.argmax()))
        if written[-1] == vocabulary.lm.eos_token_id:
            break
        token = model.decoder.get_input_embeddings()(torch.tensor([[written[-1]]]))
        embeddings = torch.cat([embeddings, token], 1)
    return written


@torch.no_grad()
def test_batched_cached_answers_equal_single_and_uncached_ones(livelier, sequences, vocabulary):
    end, pad = vocabulary.lm.eos_token_id, vocabulary.lm.pad_token_id

    def answers(rows):
        ids = livelier.generate(collate(rows, vocabulary, generation=True), 12).ids.tolist()
        return [row[: row.index(end) + 1] if end in row else row for row in ids], ids

    expected = [uncached(livelier, sequence, vocabulary, 12) for sequence in sequences]
    assert len({tuple(row) for row in expected}) > 3, "answers that are all alike would prove nothing"
    together, padded = answers(sequences)
    assert together == expected
    assert [answers([sequence])[0][0] for sequence in sequences] == expected
    for row, answer in zip(padded, expected, strict=True):
        assert set(row[len(answer) :]) <= {pad}


@torch.no_grad()
def test_generation_stops_at_the_end_token(livelier, sequences, vocabulary):
    first = uncached(livelier, sequences[0], vocabulary, 6)
    livelier.vocabulary = dataclasses.replace(vocabulary)
    text = livelier.vocabulary.lm
    end, text.eos_token = text.eos_token, text.convert_ids_to_tokens(first[2])
    try:
        ids = livelier.generate(collate(sequences[:1], vocabulary, generation=True), 6).ids[0].tolist()
    finally:
        text.eos_token = end
    assert ids == first[: first.index(first[2]) + 1]


def test_a_batch_whose_slots_and_images_disagree(tiny_model, sequences, vocabulary):
    batch = collate(sequences, vocabulary)
    broken = dataclasses.replace(batch, images=batch.images[:-1], image_owner=batch.image_owner[:-1])
    with pytest.raises(ValueError, match="<im_patch> tokens"):
        tiny_model(broken)
