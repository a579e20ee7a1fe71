from __future__ import annotations

import re

import pytest
import torch

from vistallm.config import TrainConfig
from vistallm.data.sequence import collate
from vistallm.model.build import build_model
from vistallm.tasks import TASKS
from vistallm.train.module import FACTS, VistaModule
from vistallm.train.optim import build_optimizer, cast_frozen, keep_frozen_in_eval, set_trainable
from vistallm.train.run import build, build_trainer, quiet

# The feed-forward of the last QFormer layer that serves the text alone (queries have their own): nothing reads it, in
# InstructBLIP neither, so its gradient is zero.
UNREACHED = ("tokenizer.qformer.encoder.layer.1.intermediate.", "tokenizer.qformer.encoder.layer.1.output.")
LORA = ("train.decoder=lora", "model.decoder.lora_rank=2")
PAPER = {
    1: (["train.encoder=false", "train.tokenizer=true", "train.decoder=full"], {"tokenizer", "decoder"}),
    2: (["train.encoder=false", "train.tokenizer=true", "train.decoder=frozen"], {"tokenizer"}),
}


@pytest.mark.parametrize("stage", [1, 2])
def test_one_step_moves_exactly_the_trainable_set(tiny_config, mini_root, tmp_path, stage):
    """Frozen weights are bit-identical after a step, every trainable tensor has moved (the paper's sets)."""
    words, trained = PAPER[stage]
    config = tiny_config(f"stage={stage}", f"run_dir={tmp_path}", *words, "trainer.max_steps=1", "data.batch_size=16")
    torch.manual_seed(0)
    quiet()
    module, data = build(config, mini_root)
    before = {name: p.detach().clone() for name, p in module.model.named_parameters()}
    buffers = {name: b.detach().clone() for name, b in module.model.named_buffers()}
    build_trainer(config, tmp_path).fit(module, datamodule=data)
    parts = set()
    for name, parameter in module.model.named_parameters():
        part = name.split(".")[0]
        moved = not torch.equal(parameter, before[name])
        assert moved == (part in trained and not name.startswith(UNREACHED)), name
        assert parameter.requires_grad == (part in trained), name
        parts.add(part)
    assert parts == {"encoder", "tokenizer", "decoder"}
    assert all(torch.equal(b, buffers[name]) for name, b in module.model.named_buffers())
    assert all(
        not part.training for part in module.model.children() if not any(p.requires_grad for p in part.parameters())
    )


def test_mini_may_train_the_encoder_with_its_own_rate(tiny_model):
    config = TrainConfig(encoder=True, decoder="frozen", lr=1e-3, encoder_lr=1e-5, weight_decay=0.1)
    rows = {name: (state, part, whole) for name, state, part, whole in set_trainable(tiny_model, config)}
    assert 0 < rows["encoder"][1] < rows["encoder"][2], "all but the final norm, which nothing reads"
    assert rows["decoder"][:2] == ("frozen", 0)
    optimizer, _ = build_optimizer(tiny_model, config, 100)
    encoder = {id(p) for p in tiny_model.encoder.parameters() if p.requires_grad}
    for group in optimizer.param_groups:
        assert {id(p) in encoder for p in group["params"]} == {group["initial_lr"] == 1e-5}
    assert sum(len(g["params"]) for g in optimizer.param_groups) == sum(
        p.requires_grad for p in tiny_model.parameters()
    )


@pytest.mark.parametrize("words", [(), LORA, ("model.decoder.tie_embeddings=false",)])
def test_matrices_decay_and_nothing_else(words, tiny_config, vocabulary):
    config = tiny_config("train.weight_decay=0.1", "train.encoder=true", *words)
    model = build_model(config, vocabulary)
    set_trainable(model, config.train)
    optimizer, _ = build_optimizer(model, config.train, 100)
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    tied = "lm_head" if config.model.decoder.tie_embeddings else "none"
    kept = rf"norm|ln_|bias|embedding|embed_tokens|query_tokens|trainable_tokens|{tied}"
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert decays[id(parameter)] == (0.0 if re.search(kept, name, re.IGNORECASE) else 0.1), name
    assert len(set(decays.values())) == 2


@pytest.mark.parametrize("words", [[], ["model.encoder.layer=-3", "model.tokenizer.sees_instruction=false"]])
def test_what_the_forward_never_reads_is_frozen(words, tiny_config, vocabulary, builder, samples):
    """Every trainable parameter gets a gradient (else ddp would stop), and what gets none is not trainable."""
    config = tiny_config("train.encoder=true", *words)
    model = build_model(config, vocabulary)
    model.requires_grad_(True)
    batch = collate([builder.build(samples["res"][0])], vocabulary)
    model(batch).loss.backward()
    read = {name for name, p in model.named_parameters() if p.grad is not None}
    assert len(read) < len(list(model.parameters()))
    set_trainable(model, config.train)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == read


def test_cast_frozen_keeps_tied_weights_tied(tiny_model):
    set_trainable(tiny_model, TrainConfig(decoder="frozen"))
    cast_frozen(tiny_model)
    for name, parameter in tiny_model.named_parameters():
        assert parameter.dtype == (torch.float32 if name.startswith("tokenizer.") else torch.bfloat16), name
    assert tiny_model.decoder.lm_head.weight is tiny_model.decoder.model.embed_tokens.weight


def test_schedule(tiny_model):
    config = TrainConfig(lr=1.0, warmup=0.1, final_lr=0.2)
    set_trainable(tiny_model, config)
    optimizer, scheduler = build_optimizer(tiny_model, config, 100)
    rates = []
    for _ in range(101):
        rates.append(optimizer.param_groups[0]["lr"])
        scheduler.step()
    assert rates[:11] == pytest.approx([i / 10 for i in range(1, 11)] + [1.0])
    assert rates[55] == pytest.approx(0.6)
    assert rates[100] == pytest.approx(0.2)
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_nothing_to_train(tiny_model):
    config = TrainConfig(tokenizer=False, decoder="frozen")
    set_trainable(tiny_model, config)
    with pytest.raises(ValueError, match="nothing to train"):
        build_optimizer(tiny_model, config, 10)


def test_dropout_is_off_in_frozen_parts_only(tiny_model):
    set_trainable(tiny_model, TrainConfig(decoder="frozen"))
    tiny_model.train()
    keep_frozen_in_eval(tiny_model)
    assert tiny_model.tokenizer.training
    assert not tiny_model.encoder.training
    assert not tiny_model.decoder.training


@pytest.mark.parametrize("limit", [0.01, 0.0])
def test_clipping_by_the_global_norm(tiny_config, tiny_model, tmp_path, limit):
    module = VistaModule(tiny_model, tiny_config(f"train.gradient_clip={limit}"), steps=10)
    module.trainer = build_trainer(module.config, tmp_path)
    module._sums = torch.ones(len(FACTS) + 2 * len(TASKS))
    torch.manual_seed(0)
    for parameter in tiny_model.parameters():
        parameter.grad = torch.randn_like(parameter)
    norm = torch.cat([p.grad.flatten() for p in tiny_model.parameters()]).norm().item()
    optimizer = torch.optim.SGD(tiny_model.parameters(), lr=0.5)
    module.configure_gradient_clipping(optimizer)
    module.read_report()
    after = torch.cat([p.grad.flatten() for p in tiny_model.parameters()]).norm().item()
    assert module.report["grad_norm"] == pytest.approx(norm, rel=1e-4), "the norm before clipping is reported"
    assert after == pytest.approx(limit or norm, rel=1e-3)
