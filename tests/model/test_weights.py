from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import (
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    InstructBlipQFormerConfig,
    InstructBlipVisionConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
)

from vistallm.data.collate import collate
from vistallm.data.datamodule import build_codec
from vistallm.data.vocabulary import Vocabulary
from vistallm.model.vistallm import VistaLLM
from vistallm.model.weights import load_tokenizer_weights

NAMES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "the", "mask"]


def instructblip(folder):
    """Write a tiny InstructBLIP in several files, as the real ones are; return its model."""
    qformer = InstructBlipQFormerConfig(
        vocab_size=len(NAMES),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        cross_attention_frequency=1,
        encoder_hidden_size=192,
    )
    vision = InstructBlipVisionConfig(
        hidden_size=192, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, image_size=42
    )
    text = LlamaConfig(vocab_size=60, hidden_size=24, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    parts = {"vision_config": vision.to_dict(), "qformer_config": qformer.to_dict(), "text_config": text.to_dict()}
    torch.manual_seed(4)
    made = InstructBlipForConditionalGeneration(InstructBlipConfig(**parts, num_query_tokens=4))
    for parameter in made.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    made.save_pretrained(folder, max_shard_size="100KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    words = Tokenizer(models.WordLevel({name: i for i, name in enumerate(NAMES)}, "[UNK]"))
    special = {"unk_token": "[UNK]", "pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(folder / "qformer_tokenizer")
    return {key.removeprefix("model."): value for key, value in made.state_dict().items()}


@pytest.mark.parametrize("buffer", [False, True])
def test_instructblip_checkpoint_in_its_real_layout(tiny_config, tmp_path, buffer):
    theirs = instructblip(tmp_path)
    if buffer:  # older files hold the position numbers too
        save_file({"qformer.embeddings.position_ids": torch.arange(512)[None]}, tmp_path / "model-extra.safetensors")
    config = tiny_config(f"model.tokenizer.weights={tmp_path}", f"model.tokenizer.text_tokenizer={tmp_path}")
    vocabulary = Vocabulary.build(config.model, build_codec(config))
    assert vocabulary.instruction_first_new == len(NAMES)
    ours = VistaLLM(config, vocabulary).tokenizer.state_dict()
    for key, value in theirs.items():
        if key.startswith("qformer.") and "word_embeddings" not in key:
            assert torch.equal(ours[key], value), key
    assert torch.equal(ours["query_tokens"], theirs["query_tokens"])
    assert torch.equal(ours["feature_norm.weight"], theirs["vision_model.post_layernorm.weight"])
    words = ours["qformer.embeddings.word_embeddings.weight"]
    assert torch.equal(words[: len(NAMES)], theirs["qformer.embeddings.word_embeddings.weight"])
    near, far = ((words[vocabulary.instruction_bin_ids[i]] - words[len(NAMES) + 10]).norm() for i in (1, 30))
    assert near != far, "new rows hold the coordinate code"


def test_another_shape_is_refused(tiny_config, tmp_path):
    instructblip(tmp_path)
    config = tiny_config(
        f"model.tokenizer.weights={tmp_path}", f"model.tokenizer.text_tokenizer={tmp_path}", "model.tokenizer.layers=3"
    )
    with pytest.raises(ValueError, match="keys missing, unexpected or of another shape"):
        VistaLLM(config, Vocabulary.build(config.model, build_codec(config)))


def test_own_file_matches_word_rows_by_name(tiny_model, vocabulary, tmp_path):
    """A file written with another order of words, and without some, fills the rows of the words it names."""
    path, key = tmp_path / "t.safetensors", "qformer.embeddings.word_embeddings.weight"
    state = {k: v.clone() for k, v in tiny_model.tokenizer.state_dict().items() if not k.startswith("projection.")}
    names = vocabulary.instruction.convert_ids_to_tokens(list(range(len(vocabulary.instruction))))
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(0))[:-5]
    state[key] = torch.randn(len(order), 32)
    tokens = [names[i] for i in order]
    save_file(state, path, {"tokens": json.dumps(tokens)})
    before = tiny_model.tokenizer.projection.weight.clone()
    load_tokenizer_weights(tiny_model.tokenizer, str(path), vocabulary)
    loaded = tiny_model.tokenizer.state_dict()
    assert torch.equal(loaded[key][order], state[key])
    assert torch.equal(loaded["projection.weight"], before)
    assert all(torch.equal(loaded[k], v) for k, v in state.items() if k != key)
    save_file(load_file(path), path)
    with pytest.raises(ValueError, match="no token names"):
        load_tokenizer_weights(tiny_model.tokenizer, str(path), vocabulary)
    with pytest.raises(ValueError, match="no such file"):
        load_tokenizer_weights(tiny_model.tokenizer, str(tmp_path / "gone.safetensors"), vocabulary)


def test_activation_checkpointing_changes_no_gradient(tiny_config, vocabulary, builder, samples):
    batch = collate([builder.build(samples[task][0]) for task in ("res", "coseg")], vocabulary)
    gradients = []
    for flag in ("false", "true"):
        torch.manual_seed(0)
        model = VistaLLM(tiny_config(f"train.activation_checkpointing={flag}"), vocabulary).train()
        model.encoder.requires_grad_(False)
        model(batch).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    assert model.decoder.is_gradient_checkpointing
    for name, gradient in gradients[0].items():
        if gradient is not None:
            torch.testing.assert_close(gradients[1][name], gradient, msg=name)
