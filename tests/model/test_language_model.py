from __future__ import annotations

import json

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import is_flash_attn_2_available

from vistallm.config import DecoderConfig, load_config
from vistallm.data.sequence import build_codec, build_sequencer, collate
from vistallm.data.vocabulary import Vocabulary
from vistallm.model.build import build_model
from vistallm.model.language_model import build_decoder, initialise_new_rows
from vistallm.train.optim import set_trainable


def test_new_rows_start_with_near_coordinates_near():
    torch.manual_seed(0)
    weight = torch.randn(150, 64)
    before, values = weight.clone(), torch.linspace(0, 1, 101)
    bins = list(range(45, 146))
    initialise_new_rows(weight, 40, bins, values)
    assert torch.equal(weight[:40], before[:40]), "old rows are not touched"
    others = [i for i in range(40, 150) if i not in bins]
    assert torch.allclose(weight[others], before[:40].mean(0).expand(len(others), -1), atol=1e-6)
    distance = torch.cdist(weight[bins], weight[bins])
    near = distance.diagonal(1).mean()
    assert near < distance.diagonal(4).mean() < distance.diagonal(25).mean()
    assert near < 0.75 * distance.diagonal(50).mean()
    assert distance.fill_diagonal_(9).min() > 0.01, "no two coordinates start equal"
    scale = (before[:40] - before[:40].mean(0)).norm(dim=1).mean()
    code = weight[bins] - before[:40].mean(0)
    assert code.norm(dim=1).mean() == pytest.approx(scale.item(), rel=1e-3)


def test_lora_trains_adapters_and_new_rows_alone(tiny_config, vocabulary, builder, samples):
    config = tiny_config("train.decoder=lora", "model.decoder.lora_rank=2", "model.decoder.tie_embeddings=false")
    torch.manual_seed(0)
    model = build_model(config, vocabulary)
    rows = {name: trainable for name, _, trainable, _ in set_trainable(model, config.train)}
    trained = [name for name, p in model.named_parameters() if p.requires_grad and name.startswith("decoder.")]
    assert trained
    assert all("lora_" in name or "trainable_tokens" in name for name in trained)
    assert rows["encoder"] == 0
    new = len(vocabulary.lm) - vocabulary.first_new
    token_rows = [p for n, p in model.named_parameters() if "trainable_tokens" in n and p.requires_grad]
    assert [tuple(p.shape) for p in token_rows] == [(new, 64), (new, 64)]
    sequences = [builder.build(samples[task][0]) for task in ("rec", "nlvr2")]
    model(collate(sequences, vocabulary)).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    answer = model.eval().generate(collate(sequences, vocabulary, generation=True), 3).ids
    assert answer.shape[1] <= 3


@pytest.fixture
def checkpoints(tmp_path):
    """Tiny checkpoints in the layouts of the real ones: a Llama folder and an InstructBLIP folder."""
    words = {word: i for i, word in enumerate(["<unk>", "<s>", "</s>", *"abcdefghijklmnopqrstuvwxyz.:,", "the", "is"])}
    llama = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, "<unk>")),
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
    )
    llama.backend_tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    config = LlamaConfig(
        vocab_size=len(words), hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=96
    )
    torch.manual_seed(3)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    llama.save_pretrained(tmp_path / "llama")
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "the", "mask"]
    bert = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({n: i for i, n in enumerate(names)}, "[UNK]")),
        unk_token="[UNK]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
    )
    bert.save_pretrained(tmp_path / "instructblip" / "qformer_tokenizer")
    return tmp_path


def test_vicuna_config_builds_through_the_same_classes(checkpoints, samples):
    config = load_config(
        [
            *("model=vicuna-7b", "data=mini", "num_bins=33", "points=6", "model.encoder.name=vistallm-mini"),
            *("model.encoder.weights=", "model.encoder.image_size=48", "model.tokenizer.layers=2"),
            *("model.tokenizer.hidden_size=32", "model.tokenizer.heads=2", "model.tokenizer.weights="),
            f"model.decoder.weights={checkpoints / 'llama'}",
            f"model.tokenizer.text_tokenizer={checkpoints / 'instructblip'}",
        ]
    )
    vocabulary = Vocabulary.build(config.model, build_codec(config))
    assert vocabulary.lm.pad_token == "<unk>", "no row is added for padding"
    assert vocabulary.qformer.cls_token == "[CLS]"
    model = build_model(config, vocabulary).eval()
    old = LlamaForCausalLM.from_pretrained(checkpoints / "llama")
    assert model.decoder.config.vocab_size == len(vocabulary.lm) > vocabulary.first_new == 34
    weight = model.decoder.get_input_embeddings().weight
    assert torch.equal(weight[: vocabulary.first_new], old.get_input_embeddings().weight)
    assert torch.equal(model.decoder.model.layers[1].mlp.up_proj.weight, old.model.layers[1].mlp.up_proj.weight)
    builder = build_sequencer(config, vocabulary)
    sequences = [builder.build(samples[task][0]) for task in ("res", "coseg")]
    assert torch.isfinite(model(collate(sequences, vocabulary)).loss)
    assert model.generate(collate(sequences, vocabulary, generation=True), 4).ids.shape[0] == 2


def test_missing_decoder_weights_are_named(tmp_path):
    config = load_config(["model=vicuna-7b", f"model.decoder.weights={tmp_path / 'gone'}"])
    with pytest.raises(ValueError, match=r"model\.decoder\.weights.*gone"):
        Vocabulary.build(config.model, build_codec(config))
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.json").write_text(json.dumps({"model_type": "llama"}))
    config.model.decoder.weights = str(tmp_path / "empty")
    with pytest.raises(ValueError, match=r"model\.decoder\.weights.*empty"):
        Vocabulary.build(config.model, build_codec(config))


def llama(folder):
    """A Llama of 3 layers in several files, as Vicuna's are, and its configuration."""
    sizes = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 96}
    LlamaForCausalLM(LlamaConfig(vocab_size=40, **sizes)).save_pretrained(folder, max_shard_size="100KB")
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        ("cut", r"model-00002-of-0000\d\.safetensors: not readable \(half-downloaded\?\); fetch it again"),
        ("gone", r"can't be loaded; give a whole local folder .*model-00002-of-0000\d\.safetensors"),
        ("index", r"model\.decoder\.weights=.*can't be loaded"),
        (
            {"num_hidden_layers": 5},
            r"18 keys missing\); fetch it again.*\n  missing: model\.layers\.\{3\.\.4\}\.input_layernorm",
        ),
        ({"num_hidden_layers": 2}, r"9 keys unexpected\).*\n  unexpected: model\.layers\.2\.input_layernorm\.weight"),
        (
            {"intermediate_size": 80},
            r"shape: model\.layers\.\{0\.\.2\}\.mlp\.up_proj\.weight \(96, 64\) in the file, \(80, 64\)",
        ),
    ],
)
def test_nothing_loads_half(damage, said, tmp_path, vocabulary):
    """transformers fills what is missing with random values and says so in a table; here it is an error."""
    config = llama(tmp_path)
    path = sorted(tmp_path.glob("*.safetensors"))[1]
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-500])
    elif damage == "gone":
        path.unlink()
    elif damage == "index":
        (tmp_path / "model.safetensors.index.json").write_text("{")
    else:
        (tmp_path / "config.json").write_text(json.dumps(config | damage))
    with pytest.raises(ValueError, match=said):
        build_decoder(DecoderConfig(weights=str(tmp_path)), vocabulary.lm, torch.float32)


def test_flash_attention_is_never_required(tmp_path, vocabulary):
    if is_flash_attn_2_available():
        pytest.skip("it is installed")
    llama(tmp_path)
    for weights in (None, str(tmp_path)):
        with pytest.raises(ValueError, match=r"flash-attn is not installed.*model\.decoder\.attention=sdpa"):
            build_decoder(DecoderConfig(weights, attention="flash_attention_2"), vocabulary.lm, torch.float32)
    assert (
        build_decoder(DecoderConfig(str(tmp_path)), vocabulary.lm, torch.float32).config._attn_implementation == "sdpa"
    )
