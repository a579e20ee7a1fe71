"""Configuration and vocabulary -> VistaLLM, with the pretrained weights that the configuration names, or empty."""

from __future__ import annotations

import contextlib
import copy
import math
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from transformers import AutoConfig, PreTrainedConfig

from vistallm.config import Config
from vistallm.data.vocabulary import Vocabulary, loading
from vistallm.links.decoder import LinkDecoder
from vistallm.links.prompts import RegionEncoder
from vistallm.model.encoder import ImageEncoder
from vistallm.model.language_model import add_lora, build_decoder, check_sizes, initialise_new_rows
from vistallm.model.qformer import MAX_FRAMES, InstructionGuidedTokenizer, build_tokenizer, load_tokenizer_weights
from vistallm.model.vistallm import VistaLLM, training_attention


def build_model(
    config: Config,
    vocabulary: Vocabulary,
    dtype: torch.dtype = torch.float32,
    decoder_config: PreTrainedConfig | None = None,
) -> VistaLLM:
    """Build the three parts and load the pretrained weights that the configuration names.

    `dtype` is the language model's; with a `decoder_config` it gets that shape, and its weights are loaded later.
    Raises ValueError where weights are missing or broken, or settings do not fit them.
    """
    linked = config.model.links != "none"
    encoder = ImageEncoder(
        config.model.encoder, config.model.tokenizer.class_token, config.links.blocks if linked else ()
    )
    decoder: Any = build_decoder(config.model.decoder, vocabulary.lm, dtype, decoder_config)
    bins = torch.as_tensor(vocabulary.bin_values)
    for matrix in (decoder.get_input_embeddings().weight, decoder.get_output_embeddings().weight):
        initialise_new_rows(matrix, vocabulary.first_new, vocabulary.bin_ids, bins, vocabulary.link_ids)
    rows, width = len(vocabulary.qformer), decoder.config.hidden_size
    if config.model.video in ("embedding", "attention") and config.data.frames > MAX_FRAMES:
        raise ValueError(f"data.frames={config.data.frames}: expected at most {MAX_FRAMES}, or model.video=index")
    tokenizer = build_tokenizer(config.model.tokenizer, rows, encoder.tokens, encoder.width, width, config.model.video)
    if isinstance(tokenizer, InstructionGuidedTokenizer):
        load_tokenizer_weights(tokenizer, config.model.tokenizer.weights, vocabulary)
    if config.train.decoder == "lora":
        decoder = wrap_with_lora(decoder, config, vocabulary)
    if config.train.activation_checkpointing:
        settings: dict[str, Any] = {"use_reentrant": False}
        if config.train.compile is None:  # compiled layers recompute their own kernels and take no contexts
            settings["context_fn"] = lambda: (contextlib.nullcontext(), training_attention())
        for part in (decoder, *([tokenizer.qformer] if isinstance(tokenizer, InstructionGuidedTokenizer) else [])):
            part.gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings)
    parts = build_links(config, encoder) if linked else (None, None)
    return VistaLLM(encoder, tokenizer, decoder, vocabulary, config.train.bin_sigma, *parts)


def build_links(config: Config, encoder: ImageEncoder) -> tuple[LinkDecoder, RegionEncoder]:
    """Build the decoder of links and the encoder of region prompts."""
    blocks, width = len(encoder.read), config.model.decoder.hidden_size
    links = LinkDecoder(config.links, blocks, encoder.width, math.isqrt(encoder.patches), width)
    return links, RegionEncoder(blocks, encoder.width, width)


def wrap_with_lora(decoder: Any, config: Config, vocabulary: Vocabulary) -> Any:
    """Wrap a language model with LoRA in which the rows of the new tokens train, too."""
    return add_lora(decoder, config.model.decoder, list(range(vocabulary.first_new, len(vocabulary.lm))))


def build_empty(config: Config, vocabulary: Vocabulary, folder: Path | None) -> VistaLLM:
    """Build the model with weights that take no memory yet: `fill` or `shard` must follow.

    `folder`: a run's or an exported one, which knows the language model's shape; None = take it from the config.
    """
    config = copy.deepcopy(config)
    config.model.encoder.weights = config.model.tokenizer.weights = None
    shape = config.model.decoder.weights
    if folder is not None and (folder / "decoder").is_dir():
        if shape is None:
            check_sizes(config.model.decoder, folder)
        shape = str(folder / "decoder")
    decoder_config = None
    if shape is not None:
        with loading("model.decoder.weights", shape):
            decoder_config = AutoConfig.from_pretrained(shape)
    with init_empty_weights(include_buffers=False):
        model = build_model(config, vocabulary, decoder_config=decoder_config)
    tie(model)
    return model


def tie(model: VistaLLM) -> None:
    """Make tied weights one parameter again."""
    for name, other in model.tied_weights().items():
        owner, _, weight = name.rpartition(".")
        setattr(model.get_submodule(owner), weight, model.get_parameter(other))
