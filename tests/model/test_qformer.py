from __future__ import annotations

import dataclasses

import pytest
import torch
from transformers import (
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    InstructBlipQFormerConfig,
    InstructBlipVisionConfig,
    LlamaConfig,
)

from vistallm.coinit.shards import split_shards
from vistallm.config import TokenizerConfig
from vistallm.data.sequence import build_sequencer, collate
from vistallm.data.stream import RejectLog, evaluation_sequences
from vistallm.model.build import build_model
from vistallm.model.qformer import InstructionGuidedTokenizer

SHAPE = TokenizerConfig(
    queries=4, hidden_size=32, layers=4, heads=2, intermediate_size=64, cross_attention_every=2, dropout=0.0
)
WORDS, ENCODER, DECODER = 50, 48, 24


def tokenizer(**changes):
    torch.manual_seed(1)
    made = InstructionGuidedTokenizer(dataclasses.replace(SHAPE, **changes), WORDS, ENCODER, DECODER).eval()
    for parameter in made.parameters():  # fresh LayerNorms and biases would hide a missing one
        parameter.data.add_(0.2 * torch.randn_like(parameter))
    return made


def inputs():
    torch.manual_seed(2)
    ids = torch.randint(3, WORDS, (3, 6))
    mask = torch.tensor([[1] * 6, [1] * 4 + [0] * 2, [1] * 2 + [0] * 4])
    return torch.randn(3, 9, ENCODER), ids, mask


def test_equals_instructblip_on_the_same_weights():
    """Norm, queries, QFormer and projection against transformers' whole InstructBLIP, its vision tower replaced."""
    ours = tokenizer()
    qformer = InstructBlipQFormerConfig(
        vocab_size=WORDS,
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=64,
        cross_attention_frequency=2,
        encoder_hidden_size=ENCODER,
        max_position_embeddings=512,
    )
    vision = InstructBlipVisionConfig(
        hidden_size=ENCODER,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=42,
        layer_norm_eps=1e-5,
    )
    text = LlamaConfig(
        vocab_size=60, hidden_size=DECODER, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    theirs = InstructBlipForConditionalGeneration(
        InstructBlipConfig(
            vision_config=vision.to_dict(),
            qformer_config=qformer.to_dict(),
            text_config=text.to_dict(),
            num_query_tokens=4,
        )
    ).eval()
    base = getattr(theirs, "model", theirs)
    base = base if hasattr(base, "qformer") else theirs
    base.qformer.load_state_dict(ours.qformer.state_dict())
    base.query_tokens.data.copy_(ours.query_tokens.data)
    base.language_projection.load_state_dict(ours.projection.state_dict())
    base.vision_model.post_layernorm.load_state_dict(ours.feature_norm.state_dict())
    patches, ids, mask = inputs()
    with torch.no_grad():
        got = ours(patches, ids, mask)
        features = base.vision_model.post_layernorm(patches)
        queries = base.query_tokens.expand(3, -1, -1)
        seen = torch.cat([torch.ones(3, 4, dtype=torch.long), mask], 1)
        output = base.qformer(
            input_ids=ids,
            attention_mask=seen,
            query_embeds=queries,
            encoder_hidden_states=features,
            encoder_attention_mask=torch.ones(3, 9, dtype=torch.long),
        )
        expected = base.language_projection(output[0][:, :4])
    assert got.shape == (3, 4, DECODER)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_output_depends_on_the_instruction():
    patches, ids, mask = inputs()
    made = tokenizer()
    other = ids.clone()
    other[0, 2] = (other[0, 2] + 1) % WORDS
    with torch.no_grad():
        one, two = made(patches, ids, mask), made(patches, other, mask)
    assert (one[0] - two[0]).abs().max() > 1e-3
    assert torch.equal(one[1:], two[1:]), "an image sees its own sample's instruction alone"


def test_padding_of_the_instruction_does_not_count():
    patches, ids, mask = inputs()
    made = tokenizer()
    changed = torch.where(mask == 0, 1, ids)
    with torch.no_grad():
        torch.testing.assert_close(made(patches, ids, mask), made(patches, changed, mask))
        torch.testing.assert_close(
            made(patches[1:2], ids[1:2, :4], mask[1:2, :4]), made(patches, ids, mask)[1:2], atol=1e-5, rtol=1e-5
        )


def test_without_guidance_the_instruction_does_not_count():
    patches, ids, mask = inputs()
    made = tokenizer(sees_instruction=False)
    with torch.no_grad():
        assert torch.equal(made(patches, ids, mask), made(patches, (ids + 1) % WORDS, mask))


@pytest.mark.parametrize("guided", [True, False])
def test_guidance_in_the_whole_model(tiny_model, builder, samples, guided):
    """Two questions about the same image: its tokens differ if, and only if, the tokenizer sees the instruction."""
    tiny_model.tokenizer.sees_instruction = guided
    sample = samples["pope"][0]
    other = dataclasses.replace(sample, fields=sample.fields | {"question": "Is there a cat in this picture?"})
    batch = collate([builder.build(sample), builder.build(other)], builder.vocabulary)
    with torch.no_grad():
        one, two = tiny_model.encode(batch)[0]
    assert torch.allclose(one, two, atol=1e-6) != guided


def test_patches_go_straight_to_the_decoder(tiny_config, vocabulary, mini_root):
    """Without a tokenizer: the patch tokens, projected, in as many slots; the instruction changes nothing."""
    config = tiny_config("model.tokenizer.kind=patches", "model.tokenizer.queries=16")
    model = build_model(config, vocabulary)
    builder = build_sequencer(config, vocabulary)
    rows = list(evaluation_sequences(split_shards(mini_root, "val", "rec"), builder, "rec", RejectLog(None, 0.0), 2))
    batch = collate(rows, vocabulary)
    expected = model.tokenizer.projection(model.tokenizer.feature_norm(model.encoder(batch.images)))
    torch.testing.assert_close(model.encode(batch)[0], expected)
    slots = model.input_embeddings(batch)[0].isclose(expected[0, 7], atol=1e-4).all(-1)
    assert slots.any(), "a slot holds the eighth patch"
    assert model(batch).loss.isfinite()
    with pytest.raises(ValueError, match=r"expected queries=16.*got queries=4.*set model\.tokenizer\.queries=16"):
        build_model(tiny_config("model.tokenizer.kind=patches"), vocabulary)
