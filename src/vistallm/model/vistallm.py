"""VistaLLM: Batch -> loss, or Batch -> generated token ids. A plain nn.Module that knows no Lightning.

encoder (frozen) -> instruction-guided tokenizer (one run per image) -> image slots of the decoder's input embeddings.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedConfig

from vistallm.data.vocabulary import Vocabulary
from vistallm.model.encoder import ImageEncoder
from vistallm.model.qformer import Tokenizer
from vistallm.schema import IGNORE_INDEX, Batch


@dataclass
class Output:
    """Losses of a batch's M supervised tokens."""

    token_loss: Tensor  # (M,) float32, with gradient
    row: Tensor  # (M,) int64: the sample of each token
    correct: Tensor  # (M,) bool: whether it is the most probable one

    @property
    def loss(self) -> Tensor:
        """Mean over the supervised tokens, () float32."""
        return self.token_loss.mean()


@contextlib.contextmanager
def training_attention() -> Iterator[None]:
    """Without an accelerator and with gradients, leave the flash path out: its bf16 backward is slow at small heads.

    Measured on two CPU cores, batch 64, 101 tokens, heads of 64: forward and backward .242 s against .287 s. Passes
    without gradients keep flash, which is faster there; the backward pass uses what the forward pass recorded.
    """
    if torch.cuda.is_available() or not torch.is_grad_enabled():
        yield
    else:
        with sdpa_kernel(SDPBackend.MATH):
            yield


class VistaLLM(nn.Module):
    """Encoder, instruction-guided tokenizer and decoder behind `forward` (losses) and `generate` (greedy answers).

    The decoder is a transformers causal language model or peft's wrapper of one, whose rows are the vocabulary's ids;
    `bin_sigma` is the width of a coordinate's soft target in bins, 0 = cross-entropy.
    """

    bin_ids: Tensor  # (num_bins,) int64, ids of the coordinate tokens

    def __init__(
        self, encoder: ImageEncoder, tokenizer: Tokenizer, decoder: Any, vocabulary: Vocabulary, bin_sigma: float = 0.0
    ) -> None:
        super().__init__()
        self.vocabulary, self.bin_sigma = vocabulary, bin_sigma
        self.encoder, self.tokenizer, self.decoder = encoder, tokenizer, decoder
        self.register_buffer("bin_ids", torch.tensor(vocabulary.bin_ids, dtype=torch.long), persistent=False)

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
            is_bin = torch.isin(target, self.bin_ids)
            token_loss = torch.where(is_bin, self._soft_bin_loss(logits, target), token_loss)
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

    def _soft_bin_loss(self, logits_MV: Tensor, target_M: Tensor) -> Tensor:
        """Cross-entropy against a Gaussian over neighbouring coordinate tokens, `bin_sigma` bins wide (ours)."""
        bins = torch.arange(len(self.bin_ids), device=target_M.device)
        centre = torch.searchsorted(self.bin_ids, target_M).clamp(max=len(bins) - 1)
        weight = torch.softmax(-0.5 * ((bins[None] - centre[:, None]) / self.bin_sigma) ** 2, dim=1)
        return -(weight * torch.log_softmax(logits_MV, 1)[:, self.bin_ids]).sum(1)
