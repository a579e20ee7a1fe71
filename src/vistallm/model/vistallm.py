"""VistaLLM: Batch -> loss, or Batch -> generated token ids. A plain nn.Module that knows no Lightning.

encoder (frozen) -> instruction-guided tokenizer (one run per image) -> image slots of the decoder's input embeddings.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedConfig

from vistallm.config import Config
from vistallm.data.vocabulary import Vocabulary
from vistallm.model.attention import checkpoint_contexts, training_attention
from vistallm.model.encoder import ImageEncoder
from vistallm.model.language_model import add_lora, build_decoder, embedding_weight, initialise_new_rows
from vistallm.model.qformer import InstructionGuidedTokenizer, Tokenizer, build_tokenizer
from vistallm.model.weights import load_tokenizer_weights
from vistallm.schema import IGNORE_INDEX, Batch


@dataclass
class Output:
    """Losses of a batch's M supervised tokens.

    token_loss: (M,) float32 loss of each token, with gradient; row: (M,) int64 its sample; correct: (M,) bool, whether
    it is the most probable one.
    """

    token_loss: Tensor
    row: Tensor
    correct: Tensor

    @property
    def loss(self) -> Tensor:
        """Mean over the supervised tokens, () float32."""
        return self.token_loss.mean()


class VistaLLM(nn.Module):
    """Encoder, instruction-guided tokenizer and decoder behind `forward` (loss) and `generate` (greedy answers)."""

    bin_ids: Tensor  # (num_bins,) int64, ids of the coordinate tokens
    decoder: Any  # transformers' PreTrainedModel, or peft's wrapper of it

    def __init__(
        self,
        config: Config,
        vocabulary: Vocabulary,
        dtype: torch.dtype = torch.float32,
        decoder_config: PreTrainedConfig | None = None,
    ) -> None:
        """Build the three parts and load the pretrained weights that the config names.

        `decoder_config` builds the language model of that shape instead, without weights (they are loaded later).
        """
        super().__init__()
        self.vocabulary, self.bin_sigma = vocabulary, config.train.bin_sigma
        self.encoder = ImageEncoder(config.model.encoder)
        decoder: Any = build_decoder(config.model.decoder, vocabulary.lm, dtype, decoder_config)
        first_new, bin_ids = vocabulary.first_new, vocabulary.bin_ids
        self.register_buffer("bin_ids", torch.tensor(bin_ids, dtype=torch.long), persistent=False)
        for matrix in (decoder.get_input_embeddings().weight, decoder.get_output_embeddings().weight):
            initialise_new_rows(matrix, first_new, bin_ids, torch.as_tensor(vocabulary.bin_values))
        width = decoder.config.hidden_size
        tokenizer = build_tokenizer(config.model.tokenizer, len(vocabulary.qformer), self.encoder, width)
        if isinstance(tokenizer, InstructionGuidedTokenizer):
            if config.model.tokenizer.weights is not None:
                load_tokenizer_weights(tokenizer, config.model.tokenizer.weights, vocabulary)
            else:
                bins = torch.as_tensor(vocabulary.bin_values)
                words = embedding_weight(tokenizer.qformer)
                initialise_new_rows(words, vocabulary.qformer_first_new, vocabulary.qformer_bin_ids, bins)
        self.tokenizer: Tokenizer = tokenizer
        self.decoder = self.with_lora(decoder, config) if config.train.decoder == "lora" else decoder
        if config.train.activation_checkpointing:
            settings: dict[str, Any] = {"use_reentrant": False}
            if config.train.compile is None:  # compiled layers recompute their own kernels and take no contexts
                settings["context_fn"] = checkpoint_contexts
            for part in (self.decoder, getattr(tokenizer, "qformer", None)):
                if part is not None:
                    part.gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings)

    def with_lora(self, decoder: Any, config: Config) -> Any:
        """Wrap a decoder with LoRA in which the rows of the new tokens train, too."""
        new_rows = range(self.vocabulary.first_new, len(self.vocabulary.lm))
        return add_lora(decoder, config.model.decoder, list(new_rows))

    def image_tokens(self, batch: Batch) -> Tensor:
        """Return (N, Q, C) image tokens, one block per image, guided by the instruction of the image's sample."""
        frozen = not any(p.requires_grad for p in self.encoder.parameters())
        with torch.set_grad_enabled(torch.is_grad_enabled() and not frozen), training_attention():
            patch_tokens_NPD = self.encoder(batch.images)
        owner = batch.image_owner
        with training_attention():
            return self.tokenizer(patch_tokens_NPD, batch.instruction_ids[owner], batch.instruction_mask[owner])

    def input_embeddings(self, batch: Batch) -> Tensor:
        """Return (B, T, C) embeddings with the image tokens laid into the image slots."""
        embeddings = self.decoder.get_input_embeddings()(batch.input_ids)
        slots = (batch.input_ids == self.vocabulary.image_id).unsqueeze(-1)
        image_tokens = self.image_tokens(batch).to(embeddings.dtype)
        expected = slots.sum().item()
        if expected != image_tokens.shape[0] * image_tokens.shape[1]:
            raise ValueError(
                f"batch: {expected} image slots, but {tuple(image_tokens.shape[:2])} image tokens; rebuild it"
            )
        return embeddings.masked_scatter(slots, image_tokens)

    def forward(self, batch: Batch) -> Output:
        """Loss over the supervised positions of a right-padded batch; the LM head runs on those positions alone."""
        # Right padding and a causal mask: no real token sees a pad, so the mask is left out (and SDPA stays fast).
        embeddings = self.input_embeddings(batch)
        with training_attention():
            hidden = self.language_model()(inputs_embeds=embeddings).last_hidden_state
        targets = batch.labels[:, 1:]
        row, position = (targets != IGNORE_INDEX).nonzero(as_tuple=True)
        target = targets[row, position]
        logits = self.decoder.get_output_embeddings()(hidden[row, position]).float()
        token_loss = F.cross_entropy(logits, target, reduction="none")
        if self.bin_sigma > 0:
            token_loss = torch.where(self._is_bin(target), self._soft_bin_loss(logits, target), token_loss)
        return Output(token_loss, row, logits.detach().argmax(-1) == target)

    @torch.inference_mode()
    def generate(self, batch: Batch, max_new_tokens: int, **arguments: object) -> Tensor:
        """Greedy answers for a left-padded batch: (B, G) int64 new token ids, padded after the end token."""
        text = self.vocabulary.lm
        return self.decoder.generate(
            inputs_embeds=self.input_embeddings(batch),
            attention_mask=batch.attention_mask,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            eos_token_id=text.eos_token_id,
            pad_token_id=text.pad_token_id,
            **arguments,
        )

    @classmethod
    def from_pretrained(cls, folder: Path | str) -> VistaLLM:
        """Load a folder written by tools/export.py, in evaluation mode; ValueError when it is not whole."""
        from vistallm.model.pretrained import load_pretrained

        return load_pretrained(folder)

    def base_decoder(self) -> Any:
        """The transformers model, also under LoRA."""
        return self.decoder.get_base_model() if hasattr(self.decoder, "get_base_model") else self.decoder

    def language_model(self) -> nn.Module:
        """The decoder without its LM head, also under LoRA."""
        return self.base_decoder().model

    @property
    def decoder_config(self) -> PreTrainedConfig:
        """The transformers configuration of the language model."""
        return self.base_decoder().config

    def tied_weights(self) -> dict[str, str]:
        """Names of weights that are another's tensor -> that other's name (a tied LM head -> the embedding)."""
        if not self.decoder_config.tie_word_embeddings:
            return {}
        names = {name for name, _ in self.named_parameters(remove_duplicate=False)}
        pairs = ((name, name.replace("lm_head.", "model.embed_tokens.")) for name in names if "lm_head." in name)
        return {head: table for head, table in pairs if table in names}

    def _is_bin(self, ids: Tensor) -> Tensor:
        return torch.isin(ids, self.bin_ids)

    def _soft_bin_loss(self, logits_MV: Tensor, target_M: Tensor) -> Tensor:
        """Cross-entropy against a Gaussian over neighbouring coordinate tokens, `bin_sigma` bins wide (ours)."""
        place = torch.arange(len(self.bin_ids), device=target_M.device)
        where = torch.searchsorted(self.bin_ids, target_M).clamp(max=len(place) - 1)
        weight = torch.softmax(-0.5 * ((place[None] - where[:, None]) / self.bin_sigma) ** 2, dim=1)
        return -(weight * torch.log_softmax(logits_MV, 1)[:, self.bin_ids]).sum(1)
