"""A run from the weights of another one that trained its language model in another way."""

from __future__ import annotations

import pytest
import torch

from vistallm.coinit.shards import split_shards
from vistallm.config import save_config
from vistallm.data.sequence import build_sequencer, collate
from vistallm.data.stream import RejectLog, evaluation_sequences
from vistallm.model.build import build_model
from vistallm.model.checkpoint import find_checkpoint
from vistallm.train.run import prepare_model

LORA = ("train.decoder=lora", "model.decoder.lora_rank=2", "model.decoder.lora_dropout=0.0")


@pytest.fixture
def batch(tiny_config, vocabulary, mini_root):
    builder = build_sequencer(tiny_config(), vocabulary)
    rows = evaluation_sequences(split_shards(mini_root, "val", "rec"), builder, "rec", RejectLog(None, 0.0), 2)
    return collate(list(rows), vocabulary)


def saved(config, vocabulary, folder):
    """A run folder with random weights, all LoRA factors and new rows away from zero; returns the model, too."""
    model = build_model(config, vocabulary).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "trainable_tokens" in name or "embed_tokens" in name:
                parameter.add_(0.05 * torch.randn_like(parameter))
    save_config(config, folder / "config.yaml")
    vocabulary.save(folder / "vocabulary")
    (folder / "checkpoints").mkdir()
    state = {f"model.{name}": value for name, value in model.state_dict().items()}
    torch.save({"state_dict": state, "global_step": 1}, folder / "checkpoints" / "step-000001.ckpt")
    return model, find_checkpoint(str(folder))


@torch.no_grad()
@pytest.mark.parametrize("wanted", ["train.decoder=frozen", "train.decoder=full"])
def test_lora_is_merged_where_the_next_run_has_none(tiny_config, vocabulary, batch, tmp_path, wanted):
    model, start = saved(tiny_config(*LORA), vocabulary, tmp_path)
    after, rows = prepare_model(tiny_config(wanted), vocabulary, start)
    assert not any("lora_" in name for name, _ in after.named_parameters())
    assert (rows[2][1], rows[2][2] > 0) == (wanted.partition("=")[2], wanted.endswith("full"))
    torch.testing.assert_close(after.eval()(batch).loss, model(batch).loss, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_lora_is_added_to_weights_without_it(tiny_config, vocabulary, batch, tmp_path):
    model, start = saved(tiny_config(), vocabulary, tmp_path)
    after, _ = prepare_model(tiny_config(*LORA), vocabulary, start)
    trained = {name for name, parameter in after.decoder.named_parameters() if parameter.requires_grad}
    assert trained
    assert all("lora_" in name or "trainable_tokens" in name for name in trained)
    torch.testing.assert_close(after.eval()(batch).loss, model(batch).loss)
