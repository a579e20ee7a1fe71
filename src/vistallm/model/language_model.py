"""The causal language model: Vicuna from disk or hub, or a small Llama from scratch, with rows for the new tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import is_flash_attn_2_available

from vistallm.config import DecoderConfig
from vistallm.data.vocabulary import loading
from vistallm.model.weights import raise_faults, reading

SIZES = {  # names of a language model's sizes here -> in transformers' configurations
    "hidden_size": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "intermediate_size": "intermediate_size",
}
LORA_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def build_decoder(
    config: DecoderConfig,
    text_tokenizer: PreTrainedTokenizerBase,
    dtype: torch.dtype,
    shape: PreTrainedConfig | None = None,
) -> PreTrainedModel:
    """Build the language model with one embedding row per token of `text_tokenizer` (transformers causal LM).

    Its weights are those of `config.weights`, or random: for a `shape`, and for a small Llama of the config's sizes.

    Raises:
        ValueError: weights are missing or broken, or are another model's; FlashAttention is asked for and not there.
    """
    if config.attention.startswith("flash_attention_2") and not is_flash_attn_2_available():
        raise ValueError(
            f"model.decoder.attention={config.attention}: the package flash-attn is not installed, or there is no GPU "
            "for it; install it, or use model.decoder.attention=sdpa, which needs none"
        )
    if shape is None and config.weights is not None:
        decoder = _read(config.weights, dtype, config.attention)
    else:
        tokens = {name: getattr(text_tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        shape = shape or llama_config(config, len(text_tokenizer), **tokens)
        # The dtype is given: the file of a shape names that of its weights, which need not be the one wanted here.
        decoder = AutoModelForCausalLM.from_config(shape, dtype=dtype, attn_implementation=config.attention)
    decoder.resize_token_embeddings(len(text_tokenizer), mean_resizing=False)
    return decoder


def llama_config(config: DecoderConfig, rows: int, **tokens: Any) -> LlamaConfig:
    """Return the Llama of the configuration's sizes with a vocabulary of `rows`; `tokens`: ids of its special ones."""
    sizes: dict[str, Any] = {theirs: getattr(config, own) for own, theirs in SIZES.items()}
    tied = config.tie_embeddings
    return LlamaConfig(vocab_size=rows, max_position_embeddings=2048, tie_word_embeddings=tied, **sizes, **tokens)


def _read(weights: str, dtype: torch.dtype, attention: str) -> PreTrainedModel:
    """Load a language model; ValueError when a file is broken or a key is missing, unexpected or of another shape."""
    for path in sorted(Path(weights).glob("*.safetensors")):
        with reading(path), safe_open(path, framework="pt"):  # transformers does not name the file
            pass
    with loading("model.decoder.weights", weights):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            weights,
            dtype=dtype,
            attn_implementation=attention,
            output_loading_info=True,  # transformers gives what is missing random values, and goes on
            ignore_mismatched_sizes=True,
        )
    decoder, report = loaded
    shapes = [f"{key} {tuple(there)} in the file, {tuple(here)} here" for key, there, here in report["mismatched_keys"]]
    faults = {"missing": report["missing_keys"], "unexpected": report["unexpected_keys"], "of another shape": shapes}
    advice = "fetch it again: its files are not those of its config.json"
    raise_faults({what: sorted(keys) for what, keys in faults.items()}, f"model.decoder.weights={weights}", advice)
    return decoder


def check_sizes(asked: DecoderConfig, folder: Path) -> None:
    """Raise ValueError when the language model of a run's folder is not of the configuration's, or its weights', sizes.

    LoRA is merged into the language model that it was trained on: a 13B run would go on under the name of 7B.
    """
    if not (folder / "decoder").is_dir():
        return
    saved, wanted = AutoConfig.from_pretrained(folder / "decoder"), {own: getattr(asked, own) for own in SIZES}
    if asked.weights is not None:
        with loading("model.decoder.weights", asked.weights):
            base = AutoConfig.from_pretrained(asked.weights)
        wanted = {own: getattr(base, theirs) for own, theirs in SIZES.items()}
    sizes = {own: (wanted[own], getattr(saved, theirs)) for own, theirs in SIZES.items()}
    wrong = [f"model.decoder.{key}={a}, it has {b}" for key, (a, b) in sizes.items() if a != b]
    if wrong:
        text = f"{folder}: of another model than the config asks for ({'; '.join(wrong)}); use the model= of its run"
        raise ValueError(text)


@torch.no_grad()
def initialise_new_rows(
    weight: Tensor, first_new: int, bin_ids: list[int], bin_values: Tensor, link_ids: Sequence[list[int]] = ()
) -> None:
    """Set the rows of a (V, D) matrix from `first_new` on, in place: the mean of the old rows, plus a smooth code.

    The code is for the rows `bin_ids` of the coordinate tokens, whose (num_bins,) values are in [0, 1]. It is a random
    rotation of sines and cosines from half a period to num_bins / 4 periods over the image, so near coordinates start
    with near rows. As large as an old row is, its amplitude falls with the frequency. The slots of links, behind the
    first of each list of `link_ids`, start as far from the mean as an old row, in random directions.
    """
    if weight.is_meta:  # a model whose weights are loaded later
        return
    old = weight[:first_new].float()
    mean, scale = old.mean(0), (old - old.mean(0)).norm(dim=1).mean()
    weight[first_new:] = mean.to(weight.dtype)
    slots = sorted({number for _, *numbers in link_ids for number in numbers})
    if slots:
        noise = torch.randn(len(slots), weight.shape[1], generator=torch.Generator().manual_seed(1))
        weight[slots] = (mean.cpu() + noise * scale.cpu() / weight.shape[1] ** 0.5).to(weight)
    if not bin_ids:
        return
    bands = min(16, weight.shape[1] // 2)
    frequencies = 0.5 * (len(bin_ids) / 2) ** (torch.arange(bands) / max(bands - 1, 1))
    phase = 2 * math.pi * bin_values[:, None].float().cpu() * frequencies
    waves = torch.cat([phase.cos(), phase.sin()], 1) * frequencies.repeat(2) ** -0.5
    generator = torch.Generator().manual_seed(0)
    rotation, _ = torch.linalg.qr(torch.randn(weight.shape[1], 2 * bands, generator=generator))
    code = waves @ rotation.T
    code = code / code.norm(dim=1, keepdim=True).mean() * scale.cpu()
    weight[bin_ids] = (mean.cpu() + code).to(weight)


def add_lora(decoder: PreTrainedModel, config: DecoderConfig, new_ids: list[int]) -> nn.Module:
    """Wrap with LoRA (peft); the rows of the new tokens train too, in the input and the output matrix."""
    from peft import LoraConfig, get_peft_model  # here, because a model without LoRA loads sooner

    rows: dict[str, list[int]] = {"embed_tokens": new_ids}
    if not decoder.config.tie_word_embeddings:
        rows["lm_head"] = new_ids
    sizes: dict[str, Any] = {"r": config.lora_rank, "lora_alpha": config.lora_alpha}
    sizes |= {"lora_dropout": config.lora_dropout, "trainable_token_indices": rows}
    return get_peft_model(decoder, LoraConfig(target_modules=LORA_TARGETS, task_type="CAUSAL_LM", **sizes))


def copy_token_rows(model: nn.Module) -> None:
    """Set peft's own copies of the new tokens' rows, which are no part of the state, to what has been loaded."""
    from peft.tuners.trainable_tokens.layer import TrainableTokensLayer

    for layer in model.modules():
        if isinstance(layer, TrainableTokensLayer):
            base: Any = layer.base_layer
            for adapter, rows in layer.token_indices.items():
                layer.trainable_tokens_original[adapter] = base.weight.data[rows].clone()
