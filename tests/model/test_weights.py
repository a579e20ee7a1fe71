from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
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

from vistallm.config import CLIP_MEAN, CLIP_STD
from vistallm.data.sequence import build_codec, collate
from vistallm.data.vocabulary import Vocabulary
from vistallm.model.build import build_model
from vistallm.model.qformer import load_tokenizer_weights

NAMES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "the", "mask"]


def instructblip(folder, layers=1):
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
        hidden_size=192, intermediate_size=768, num_hidden_layers=layers, num_attention_heads=2, image_size=42
    )
    text = LlamaConfig(vocab_size=60, hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    parts = {"vision_config": vision.to_dict(), "qformer_config": qformer.to_dict(), "text_config": text.to_dict()}
    torch.manual_seed(4)
    made = InstructBlipForConditionalGeneration(InstructBlipConfig(**parts, num_query_tokens=4, image_token_index=59))
    for parameter in made.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    made.eval().save_pretrained(folder, max_shard_size="100KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    words = Tokenizer(models.WordLevel({name: i for i, name in enumerate(NAMES)}, "[UNK]"))
    special = {"unk_token": "[UNK]", "pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(folder / "qformer_tokenizer")
    return made


def join(folder):
    """Turn the files of the checkpoint into one, without an index."""
    state = {}
    for path in folder.glob("*.safetensors"):
        state |= load_file(path)
        path.unlink()
    save_file(state, folder / "model.safetensors")
    (folder / "model.safetensors.index.json").unlink()


def as_bin(folder, index):
    """Turn the checkpoint into the files that InstructBLIP was published in: pickles, and position numbers in them."""
    if not index:
        join(folder)
    else:
        places = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
        (folder / "model.safetensors.index.json").unlink()
    for path in folder.glob("*.safetensors"):
        state = load_file(path) | {"qformer.embeddings.position_ids": torch.arange(512)[None]}
        torch.save(state, folder / f"pytorch_{path.stem}.bin")
        path.unlink()
    if index:
        places = {key: f"pytorch_{Path(file).stem}.bin" for key, file in places.items()}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))


def test_fewer_queries_are_the_first_of_the_file(tiny_config, tmp_path):
    theirs = {key.removeprefix("model."): value for key, value in instructblip(tmp_path).state_dict().items()}
    words = [f"model.tokenizer.weights={tmp_path}", f"model.tokenizer.text_tokenizer={tmp_path}"]
    config = tiny_config(*words, "model.tokenizer.queries=3")
    ours = build_model(config, Vocabulary.build(config.model, build_codec(config))).tokenizer.query_tokens
    assert torch.equal(ours, theirs["query_tokens"][:, :3])
    config = tiny_config(*words, "model.tokenizer.queries=5")
    with pytest.raises(ValueError, match=r"query_tokens \(1, 4, 32\) in the file, \(1, 5, 32\) here"):
        build_model(config, Vocabulary.build(config.model, build_codec(config)))


@pytest.mark.parametrize("layout", ["safetensors", "safetensors, whole", "bin", "bin, whole"])
def test_instructblip_checkpoint_in_its_real_layout(tiny_config, tmp_path, layout):
    theirs = {key.removeprefix("model."): value for key, value in instructblip(tmp_path).state_dict().items()}
    if layout.startswith("bin"):
        as_bin(tmp_path, index=layout == "bin")
    elif "whole" in layout:
        join(tmp_path)
    config = tiny_config(f"model.tokenizer.weights={tmp_path}", f"model.tokenizer.text_tokenizer={tmp_path}")
    vocabulary = Vocabulary.build(config.model, build_codec(config))
    assert vocabulary.qformer_first_new == len(NAMES)
    ours = build_model(config, vocabulary).tokenizer.state_dict()
    for key, value in theirs.items():
        if key.startswith("qformer.") and "word_embeddings" not in key:
            assert torch.equal(ours[key], value), key
    assert torch.equal(ours["query_tokens"], theirs["query_tokens"])
    assert torch.equal(ours["projection.weight"], theirs["language_projection.weight"])
    assert torch.equal(ours["feature_norm.weight"], theirs["vision_model.post_layernorm.weight"])
    words = ours["qformer.embeddings.word_embeddings.weight"]
    assert torch.equal(words[: len(NAMES)], theirs["qformer.embeddings.word_embeddings.weight"])
    near, far = ((words[vocabulary.qformer_bin_ids[i]] - words[len(NAMES) + 10]).norm() for i in (1, 30))
    assert near != far, "new rows hold the coordinate code"


@torch.no_grad()
def test_tokens_are_those_that_transformers_gives_its_language_model(tiny_config, tmp_path):
    """Encoder features -> norm -> QFormer with instruction -> projection, on one checkpoint."""
    theirs, seen = instructblip(tmp_path), []
    words = (f"model.tokenizer.weights={tmp_path}", f"model.tokenizer.text_tokenizer={tmp_path}")
    config = tiny_config(*words, "model.tokenizer.norm_eps=1e-6")
    tokenizer = build_model(config, Vocabulary.build(config.model, build_codec(config))).tokenizer.eval()
    norm = next(part for name, part in theirs.named_modules() if name.endswith("post_layernorm"))
    norm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    ids = torch.tensor([[2, 4, 5, 3, 0], [2, 5, 4, 4, 3]])
    mask = (ids != 0).long()
    pixels = torch.randn(2, 3, 42, 42, generator=torch.Generator().manual_seed(0))
    expected = theirs.get_image_features(pixels, ids, mask, return_dict=True).pooler_output
    features = seen[0]
    assert features.shape == (2, 10, 192)
    assert expected.shape == (2, 4, 64)
    torch.testing.assert_close(tokenizer(features, ids, mask), expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(tokenizer(features, ids.flip(0), mask.flip(0)), expected, atol=1e-3)


@torch.no_grad()
def test_whole_path_is_that_of_instructblip(tiny_config, tmp_path, monkeypatch):
    """Pixels to logits on one set of weights: tower, class token and patches, norm, QFormer, projection, slots.

    The tower is timm's, as in the real model, with a block more than theirs, which `layer=-2` leaves out.
    """
    theirs, made = instructblip(tmp_path, layers=2), timm.create_model
    sizes = {"img_size": 42, "embed_dim": 192, "depth": 3, "num_heads": 2, "mlp_ratio": 4.0}
    monkeypatch.setattr(timm, "create_model", lambda name, **settings: made(name, **settings, **sizes))
    words = [f"model.tokenizer.weights={tmp_path}", f"model.tokenizer.text_tokenizer={tmp_path}"]
    words += ["model.encoder.name=EVA01-g-14", "model.encoder.image_size=42", "model.encoder.layer=-2"]
    words += ["model.tokenizer.norm_eps=1e-6", "model.tokenizer.class_token=true"]
    config = tiny_config(*words)
    model = build_model(config, Vocabulary.build(config.model, build_codec(config))).eval()
    assert (model.encoder.patches, model.encoder.tokens) == (9, 10)
    state = model.encoder.visual.trunk.state_dict()
    for key, value in theirs.state_dict().items():
        if ".vision_model." in f".{key}" and "post_layernorm" not in key:
            name = key.partition("vision_model.")[2]
            for old, new in NAMES_IN_TIMM.items():
                name = name.replace(old, new)
            if name.endswith("qkv.bias"):  # the bias of keys changes no attention, and timm has none
                query, _, value = value.chunk(3)
                state[name.replace("qkv.bias", "q_bias")].copy_(query)
                name = name.replace("qkv.bias", "v_bias")
            state[name].copy_(value)
    model.decoder = next(part for key, part in theirs.named_modules() if key.endswith("language_model"))
    ids = torch.tensor([[2, 4, 5, 3, 0], [2, 5, 4, 4, 3]])
    images = torch.randint(256, (2, 3, 42, 42), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    text = torch.tensor([[1, 59, 59, 59, 59, 7, 8, 9], [1, 59, 59, 59, 59, 10, 11, 12]])
    pixels = (images / 255 - torch.tensor(CLIP_MEAN).view(3, 1, 1)) / torch.tensor(CLIP_STD).view(3, 1, 1)
    expected = theirs(
        pixel_values=pixels,
        qformer_input_ids=ids,
        qformer_attention_mask=(ids != 0).long(),
        input_ids=text,
        attention_mask=torch.ones_like(text),
    ).logits
    seen = {"images": images, "image_owner": torch.arange(2), "instruction_ids": ids}
    batch = SimpleNamespace(input_ids=text, instruction_mask=(ids != 0).long(), first_copy=None, frame=None, **seen)
    model.vocabulary = SimpleNamespace(image_id=59)
    logits = model.decoder(inputs_embeds=model.input_embeddings(batch)).logits
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    model.encoder.class_token = False
    logits = model.decoder(inputs_embeds=model.input_embeddings(batch)).logits
    assert (logits - expected).abs().max() > 1e-2, "the class token counts"


NAMES_IN_TIMM = {
    "embeddings.class_embedding": "cls_token",
    "embeddings.position_embedding": "pos_embed",
    "embeddings.patch_embedding": "patch_embed.proj",
    "encoder.layers.": "blocks.",
    "layer_norm": "norm",
    "self_attn.projection": "attn.proj",
    "self_attn.": "attn.",
}
FIRST = "qformer.encoder.layer.0.attention.attention.query.weight"


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (
            "layers",
            r"missing: qformer\.encoder\.layer\.\{2\.\.3\}\.\S+query\.weight\n(.*\n)*.*output_query\.LayerNorm\.bias",
        ),
        ("fewer", r"unexpected: qformer\.encoder\.layer\.1\."),
        (
            "width",
            r"2 keys of another shape.*\n  of another shape: projection.weight \(64, 32\) in the file, \(32, 32\) here",
        ),
        ("gone", rf"the index lists it, but it is not there; it holds .*{FIRST}"),
        ("cut", rf"not readable \(half-downloaded\?\); fetch it again .*it holds .*{FIRST}"),
        ("cut bin", rf"not readable \(half-downloaded\?\); fetch it again .*it holds .*{FIRST}"),
        ("index", "expected an index with a weight_map"),
        ("empty", "found no weights of one"),
        ("nowhere", "no such folder, and not on the hub"),
    ],
)
def test_damaged_and_other_checkpoints_are_one_line(damage, said, tiny_config, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    folder = tmp_path / "given"
    instructblip(folder)
    if damage == "cut bin":
        as_bin(folder, index=True)
    index = next(folder.glob("*.index.json"))
    places = json.loads(index.read_text())["weight_map"]
    path = folder / next(file for key, file in places.items() if key.endswith(FIRST))
    if damage.startswith("cut"):
        path.write_bytes(path.read_bytes()[:-1000])
    elif damage == "gone":
        path.unlink()
    elif damage == "index":
        index.write_text(index.read_text()[:-10])
    elif damage == "empty":
        index.unlink()
        for weights in folder.glob("*.safetensors"):
            weights.unlink()
    change = {"layers": ["model.tokenizer.layers=4"], "fewer": ["model.tokenizer.layers=1"]}
    change |= {"width": ["model.decoder.hidden_size=32"], "nowhere": [f"model.tokenizer.weights={tmp_path}/wrong"]}
    words = [f"model.tokenizer.weights={folder}", f"model.tokenizer.text_tokenizer={folder}"]
    config = tiny_config(*words, *change.get(damage, []))
    with pytest.raises(ValueError, match=said) as error:
        build_model(config, Vocabulary.build(config.model, build_codec(config)))
    assert all(line.startswith("  ") for line in str(error.value).splitlines()[1:]), "a line, and one for each key"


def test_own_file_matches_word_rows_by_name(tiny_model, vocabulary, tmp_path):
    """A file written with another order of words, and without some, fills the rows of the words it names."""
    path, key = tmp_path / "t.safetensors", "qformer.embeddings.word_embeddings.weight"
    state = {k: v.clone() for k, v in tiny_model.tokenizer.state_dict().items() if not k.startswith("projection.")}
    names = vocabulary.qformer.convert_ids_to_tokens(list(range(len(vocabulary.qformer))))
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
        model = build_model(tiny_config(f"train.activation_checkpointing={flag}"), vocabulary).train()
        model.encoder.requires_grad_(False)
        model(batch).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    assert model.decoder.is_gradient_checkpointing
    for name, gradient in gradients[0].items():
        if gradient is not None:
            torch.testing.assert_close(gradients[1][name], gradient, msg=name)
