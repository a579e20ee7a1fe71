"""Runs -> exported folders -> models: round trips, LoRA merged, files that plain peft and transformers read, damage."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from vistallm.config import save_config
from vistallm.model.build import build_model
from vistallm.model.checkpoint import MANIFEST, find_checkpoint, load_run, read_state, save_exported

ROOT = Path(__file__).parents[2]
TOOL = runpy.run_path(str(ROOT / "tools/export.py"))


def write_run(folder, config, vocabulary, change=None):
    """A run folder as train.py leaves it: a model of that configuration, its adapters made to matter."""
    torch.manual_seed(0)
    model = build_model(config, vocabulary).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "trainable_tokens" in name:
                parameter.add_(0.02 * torch.randn_like(parameter))
    save_config(config, folder / "config.yaml")
    vocabulary.save(folder / "vocabulary")
    model.decoder_config.save_pretrained(folder / "decoder")
    (folder / "checkpoints").mkdir()
    state = {f"model.{name}": value for name, value in model.state_dict().items()}
    torch.save({"state_dict": state}, folder / "checkpoints" / "step-000007.ckpt")
    return model


@pytest.fixture(params=["true", "false"], ids=["tied", "untied"])
def lora_run(request, tmp_path, tiny_config, vocabulary):
    words = ("train.decoder=lora", "model.decoder.lora_rank=2", f"model.decoder.tie_embeddings={request.param}")
    return tmp_path / "run", write_run(tmp_path / "run", tiny_config(*words), vocabulary)


def test_round_trip_keeps_every_weight_and_no_path(tmp_path, tiny_config, vocabulary):
    model = write_run(tmp_path / "run", tiny_config(), vocabulary)
    differences = TOOL["export"](str(tmp_path / "run"), tmp_path / "out", torch.float32)
    assert differences == {"merge": 0.0, "dtype": 0.0}
    again = load_run(tmp_path / "out")[0]
    assert not again.training
    assert again.decoder.lm_head.weight is again.decoder.model.embed_tokens.weight, "tied as before"
    own = model.state_dict()
    assert again.state_dict().keys() == own.keys()
    for name, value in again.state_dict().items():
        assert torch.equal(value, own[name]), name
    torch.testing.assert_close(TOOL["probe_logits"](again), TOOL["probe_logits"](model), rtol=0, atol=0)
    assert "/" not in (tmp_path / "out" / "config.yaml").read_text().replace("n/a", "")
    manifest = json.loads((tmp_path / "out" / MANIFEST).read_text())
    assert (manifest["step"], manifest["dtype"], manifest["merged"]) == (7, "float32", False)
    assert manifest["versions"]["torch"] == torch.__version__.partition("+")[0]


def test_merged_lora_is_a_full_model_and_the_adapter_is_plain_pefts(lora_run, tmp_path):
    run, model = lora_run
    differences = TOOL["export"](str(run), tmp_path / "out", torch.float32, language_model=True)
    assert 0 < differences["merge"] < 1e-4
    merged = load_run(tmp_path / "out")[0]
    assert not any("lora" in name for name in merged.state_dict())
    expected = TOOL["probe_logits"](model)
    torch.testing.assert_close(TOOL["probe_logits"](merged), expected, rtol=0, atol=1e-4)
    ids = torch.randint(5, len(model.vocabulary.lm), (1, 20))
    with torch.no_grad():
        expected = model.decoder(input_ids=ids).logits
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "language_model")
        torch.testing.assert_close(plain(input_ids=ids).logits, expected, rtol=0, atol=1e-4)
        assert len(AutoTokenizer.from_pretrained(tmp_path / "out" / "language_model")) == len(model.vocabulary.lm)
        base = type(plain)(plain.config)  # the base weights, as if they came from the hub
        wrapped = model.base_decoder().named_parameters(remove_duplicate=False)
        weights = {n.replace(".token_adapter", "").replace(".base_layer", ""): p for n, p in wrapped}
        base.load_state_dict({n: weights[n] for n in base.state_dict()})
        adapted = PeftModel.from_pretrained(base, tmp_path / "out" / "adapter").eval()
        torch.testing.assert_close(adapted(input_ids=ids).logits, expected, rtol=0, atol=1e-5)


def test_a_config_of_other_sizes_is_refused(tmp_path, tiny_config, vocabulary):
    write_run(tmp_path / "run", tiny_config(), vocabulary)
    with pytest.raises(ValueError, match=r"another model .*model.decoder.layers=1, it has 2"):
        load_run(str(tmp_path / "run"), tiny_config("model.decoder.layers=1"))


def test_kept_lora_loads_as_lora(lora_run, tmp_path):
    run, model = lora_run
    TOOL["export"](str(run), tmp_path / "out", torch.float32, merge=False)
    again, config, path = load_run(str(tmp_path / "out"))
    assert (config.train.decoder, path.name) == ("lora", MANIFEST)
    torch.testing.assert_close(TOOL["probe_logits"](again), TOOL["probe_logits"](model), rtol=0, atol=0)


def test_bfloat16_halves_the_file_and_states_its_difference(tmp_path, tiny_config, vocabulary):
    model = write_run(tmp_path / "run", tiny_config(), vocabulary)
    stated = TOOL["export"](str(tmp_path / "run"), tmp_path / "out", torch.bfloat16)["dtype"]
    again = load_run(tmp_path / "out")[0]
    difference = (TOOL["probe_logits"](again) - TOOL["probe_logits"](model)).abs().max().item()
    assert 0 < stated == pytest.approx(difference, rel=1e-4)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        ("key", r"missing: tokenizer\.query_tokens"),
        ("shape", r"shape: tokenizer\.query_tokens \(1, 3, 32\)"),
        ("cut", "expected .* bytes"),
        ("gone", "no such file"),
    ],
)
def test_damaged_folders_are_refused(damage, said, tmp_path, tiny_model, tiny_config):
    manifest = save_exported(tiny_model, tiny_config(), tmp_path / "out", torch.float32)
    path = tmp_path / "out" / "model.safetensors"
    state = load_file(path)
    if damage == "key":
        del state["tokenizer.query_tokens"]
    elif damage == "shape":
        state["tokenizer.query_tokens"] = state["tokenizer.query_tokens"][:, 1:].clone()
    if damage in ("key", "shape"):
        save_file(state, path)
        facts = json.loads(manifest.read_text())
        facts["files"]["model.safetensors"]["bytes"] = path.stat().st_size
        manifest.write_text(json.dumps(facts))
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:-100])
    else:
        path.unlink()
    with pytest.raises(ValueError, match=said):
        load_run(tmp_path / "out")[0]


def test_manifest_of_another_format_is_refused(tmp_path):
    manifest = tmp_path / MANIFEST
    for text, message in (("{", "expected an exported model"), ('{"format": 99}', "expected format 1, got 99")):
        manifest.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_state(find_checkpoint(str(tmp_path))[1])
