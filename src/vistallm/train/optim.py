"""A VistaLLM and the train config -> its trainable parameters, AdamW and a schedule per step."""

from __future__ import annotations

import math
from itertools import chain

import torch
from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from transformers.modeling_layers import GradientCheckpointingLayer

from vistallm.config import TrainConfig
from vistallm.model.vistallm import VistaLLM


def set_trainable(model: VistaLLM, config: TrainConfig) -> list[tuple[str, str, int, int]]:
    """Freeze and unfreeze the parts as the config says; return name, state, trainable and all parameters of each."""
    model.encoder.requires_grad_(config.encoder)
    model.tokenizer.requires_grad_(config.tokenizer)
    if config.decoder != "lora":  # peft has set the adapters trainable and all else frozen
        model.decoder.requires_grad_(config.decoder == "full")
    # Without a gradient they would stop ddp, which waits for one of each trainable parameter.
    for part in (model.links, model.region_encoder):
        if part is not None:
            part.requires_grad_(config.links)
    for parameter in chain(model.encoder.unread_parameters(), model.tokenizer.unread_parameters()):
        parameter.requires_grad_(False)
    rows = []
    for name in ("encoder", "tokenizer", "decoder", *(["links", "region_encoder"] if model.links is not None else [])):
        setting = getattr(config, name.replace("region_encoder", "links"))
        state = setting if isinstance(setting, str) else "trained" if setting else "frozen"
        counts = [(p.numel(), p.requires_grad) for p in getattr(model, name).parameters()]
        rows.append((name, state, sum(n for n, trains in counts if trains), sum(n for n, _ in counts)))
    return rows


def cast_frozen(model: VistaLLM) -> None:
    """Keep frozen weights in bfloat16 and trained ones in float32, for training under autocast; before sharding."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.float32 if parameter.requires_grad else torch.bfloat16)


def keep_frozen_in_eval(model: VistaLLM) -> None:
    """Put every part without trainable parameters into evaluation mode: no dropout in a frozen part.

    Its checkpointed layers alone stay in training mode, in which transformers checkpoints: their own code has no
    dropout, their submodules are in evaluation mode, and gradients pass through them to what trains before.
    """
    for part in filter(None, (model.encoder, model.tokenizer, model.decoder, model.links, model.region_encoder)):
        if not any(p.requires_grad for p in part.parameters()):
            part.eval()
            for layer in part.modules():
                if isinstance(layer, GradientCheckpointingLayer) and layer.gradient_checkpointing:
                    layer.training = True


def build_optimizer(model: nn.Module, config: TrainConfig, steps: int) -> tuple[AdamW, LambdaLR]:
    """Return AdamW over the trainable parameters and warm-up + cosine per step.

    The matrices of linear, convolution and attention layers decay; norms, biases, embeddings (also a tied LM head),
    positions, new token rows and query tokens do not.
    """
    tables = {p for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters(recurse=False)}
    layers = (m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d | nn.MultiheadAttention))
    matrices = {p for m in layers for p in m.parameters(recurse=False) if p.ndim > 1} - tables
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decay = config.weight_decay if parameter in matrices else 0.0
            groups.setdefault((learning_rate(name, config), decay), []).append(parameter)
    if not groups:
        raise ValueError(
            "nothing to train: expected train.encoder, train.tokenizer or train.decoder to be trained, got none"
        )
    settings = [{"params": params, "lr": lr, "weight_decay": decay} for (lr, decay), params in groups.items()]
    optimizer = AdamW(settings, betas=(config.betas[0], config.betas[1]), fused=True)
    warmup = max(1, round(config.warmup * steps))

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        progress = min(1.0, (step - warmup) / max(1, steps - warmup))
        return config.final_lr + (1 - config.final_lr) * 0.5 * (1 + math.cos(math.pi * progress))

    return optimizer, LambdaLR(optimizer, factor)


def learning_rate(name: str, config: TrainConfig) -> float:
    """Return a parameter's peak learning rate; the projection writes for the decoder and learns as it does."""
    is_qformer = name.startswith("tokenizer.") and not name.startswith("tokenizer.projection.")
    own = config.encoder_lr if name.startswith("encoder.") else config.tokenizer_lr if is_qformer else None
    if name.startswith(("links.", "region_encoder.")):
        own = config.links_lr
    return config.lr if own is None else own
