"""The instruction-guided image tokenizer: patch tokens + instruction -> `queries` tokens of the decoder's width.

A transformers `InstructBlipQFormerModel` runs once per image; its learned queries attend to the instruction
(self-attention) and to the patch tokens (cross-attention), and a linear map takes them to the decoder. The frames of a
video may pass a `FrameMixer` before that map.
Shape legend: N images, P patches, D encoder width, I instruction tokens, Q queries, H QFormer width, C decoder width, V
videos, F frames of the longest one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import InstructBlipQFormerConfig, InstructBlipQFormerModel

from vistallm.config import TokenizerConfig
from vistallm.data.vocabulary import Vocabulary
from vistallm.model.language_model import initialise_new_rows
from vistallm.model.weights import check_keys, read_instructblip, read_safetensors

MAX_FRAMES = 64  # of a video: rows of the frames' embedding
WORDS = "qformer.embeddings.word_embeddings.weight"


class FrameMixer(nn.Module):
    """Tells a video's frames apart: adds each one's place, and may let each query attend to itself in the other frames.

    All that it adds starts as zero, so that a run without it goes on bit by bit as it was.
    """

    def __init__(self, width: int, heads: int, attention: bool) -> None:
        super().__init__()
        self.places = nn.Parameter(torch.zeros(MAX_FRAMES, width))
        self.norm = nn.LayerNorm(width) if attention else None
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True) if attention else None
        if self.attention is not None:
            nn.init.zeros_(self.attention.out_proj.weight)
            nn.init.zeros_(self.attention.out_proj.bias)

    def forward(self, states_NQH: Tensor, frame_N: Tensor | None) -> Tensor:
        """Return the states (N, Q, H); `frame_N` is `Batch.frame`, and images that are no frames stay as they are."""
        if frame_N is None:  # ddp waits for a gradient of every parameter
            return states_NQH + sum(parameter.sum() for parameter in self.parameters()) * 0.0
        known = frame_N >= 0
        frames_MQH, place_M = states_NQH[known], frame_N[known]
        frames_MQH = frames_MQH + self.places[place_M].unsqueeze(1)
        if self.attention is not None and self.norm is not None:
            video_M = (place_M == 0).cumsum(0) - 1
            queries, width = frames_MQH.shape[1:]
            rows_VFQH = frames_MQH.new_zeros(int(video_M[-1]) + 1, int(place_M.max()) + 1, queries, width)
            rows_VFQH[video_M, place_M] = self.norm(frames_MQH).to(rows_VFQH.dtype)
            absent_VF = torch.ones(rows_VFQH.shape[:2], dtype=torch.bool, device=place_M.device)
            absent_VF[video_M, place_M] = False
            x = rows_VFQH.transpose(1, 2).flatten(0, 1)  # (V * Q, F, H)
            mixed = self.attention(x, x, x, absent_VF.repeat_interleave(queries, 0), need_weights=False)[0]
            frames_MQH = frames_MQH + mixed.unflatten(0, (-1, queries)).transpose(1, 2)[video_M, place_M]
        return states_NQH.masked_scatter(known[:, None, None], frames_MQH.to(states_NQH.dtype))


class InstructionGuidedTokenizer(nn.Module):
    """QFormer with learned queries and a projection (paper.md 1.1; layout of InstructBLIP, arXiv 2305.06500).

    `video` is `model.video` of the configuration.
    """

    def __init__(
        self, config: TokenizerConfig, vocabulary: int, encoder_width: int, decoder_width: int, video: str = "none"
    ) -> None:
        super().__init__()
        self.sees_instruction, self.tokens = config.sees_instruction, config.queries
        qformer = InstructBlipQFormerConfig(
            vocab_size=vocabulary,
            hidden_size=config.hidden_size,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            intermediate_size=config.intermediate_size,
            hidden_dropout_prob=config.dropout,
            attention_probs_dropout_prob=config.dropout,
            max_position_embeddings=max(512, config.max_instruction_tokens),
            cross_attention_frequency=config.cross_attention_every,
            encoder_hidden_size=encoder_width,
            initializer_range=config.hidden_size**-0.5,  # BERT's 0.02 leaves the attention of a narrow model flat
        )
        qformer._attn_implementation = "sdpa"
        self.feature_norm = nn.LayerNorm(encoder_width, eps=config.norm_eps)  # InstructBLIP's vision post-layernorm
        queries = torch.zeros(1, config.queries, config.hidden_size).normal_(std=qformer.initializer_range)
        self.query_tokens = nn.Parameter(queries)
        self.qformer = InstructBlipQFormerModel(qformer)
        self.projection = nn.Linear(config.hidden_size, decoder_width)
        mixes, attention = video in ("embedding", "attention"), video == "attention"
        self.frames = FrameMixer(config.hidden_size, config.heads, attention) if mixes else None

    def forward(
        self,
        patch_tokens_NPD: Tensor,
        instruction_ids_NI: Tensor,
        instruction_mask_NI: Tensor,
        frame_N: Tensor | None = None,
    ) -> Tensor:
        """Return image tokens (N, Q, C).

        `instruction_mask_NI` is 1 on real tokens, ids are right-padded; `frame_N` is `Batch.frame`.
        """
        states_NQH = self.query_states(patch_tokens_NPD, instruction_ids_NI, instruction_mask_NI)
        return self.projection(states_NQH if self.frames is None else self.frames(states_NQH, frame_N))

    @property
    def layers(self) -> Iterable[nn.Module]:
        """The repeated blocks: units of sharding and of activation checkpointing."""
        return self.qformer.encoder.layer

    def unread_parameters(self) -> Iterator[nn.Parameter]:
        """Yield the weights that `forward` never reads: without instruction, those that serve its words alone."""
        if not self.sees_instruction:
            for name, parameter in self.qformer.named_parameters():
                if re.match(r"embeddings\.\w+_embeddings\.|encoder\.layer\.\d+\.(intermediate|output)\.", name):
                    yield parameter

    def query_states(self, patch_tokens_NPD: Tensor, instruction_ids_NI: Tensor, instruction_mask_NI: Tensor) -> Tensor:
        """Return the queries' last hidden states (N, Q, H), before the projection."""
        features_NPD = self.feature_norm(patch_tokens_NPD)
        queries_NQH = self.query_tokens.expand(len(features_NPD), -1, -1)
        query_mask = instruction_mask_NI.new_ones(queries_NQH.shape[:2])
        words = {"input_ids": None, "attention_mask": query_mask}
        if self.sees_instruction:
            words = {"input_ids": instruction_ids_NI, "attention_mask": torch.cat([query_mask, instruction_mask_NI], 1)}
        output = self.qformer(**words, query_embeds=queries_NQH, encoder_hidden_states=features_NPD)
        return output.last_hidden_state[:, : queries_NQH.shape[1]]


class PatchProjection(nn.Module):
    """The ablation without a tokenizer: every patch token, normed and projected; the instruction is not read."""

    layers: Iterable[nn.Module] = ()

    def __init__(self, config: TokenizerConfig, patches: int, encoder_width: int, decoder_width: int) -> None:
        super().__init__()
        if config.queries != patches or config.weights is not None:
            raise ValueError(
                f"model.tokenizer.kind=patches: expected queries={patches}, the tokens of the encoder, and no weights; "
                f"got queries={config.queries} weights={config.weights}; set model.tokenizer.queries={patches} "
                "model.tokenizer.weights="
            )
        self.tokens = patches
        self.feature_norm = nn.LayerNorm(encoder_width, eps=config.norm_eps)
        self.projection = nn.Linear(encoder_width, decoder_width)

    def forward(
        self,
        patch_tokens_NPD: Tensor,
        instruction_ids_NI: Tensor,
        instruction_mask_NI: Tensor,
        frame_N: Tensor | None = None,
    ) -> Tensor:
        """Return image tokens (N, P, C); frames are told apart by the text alone."""
        return self.projection(self.feature_norm(patch_tokens_NPD))

    def unread_parameters(self) -> Iterator[nn.Parameter]:
        """Yield nothing: every weight is read."""
        return iter(())


Tokenizer = InstructionGuidedTokenizer | PatchProjection


def build_tokenizer(
    config: TokenizerConfig, rows: int, patches: int, width: int, decoder_width: int, video: str = "none"
) -> Tokenizer:
    """Build the kind that the configuration names; ValueError where its settings do not fit the encoder or videos."""
    if config.kind == "patches":
        if video in ("embedding", "attention"):
            raise ValueError(f"model.video={video} model.tokenizer.kind=patches: expected kind=qformer, or video=index")
        return PatchProjection(config, patches, width, decoder_width)
    return InstructionGuidedTokenizer(config, rows, width, decoder_width, video)


def load_tokenizer_weights(tokenizer: InstructionGuidedTokenizer, path: str | None, vocabulary: Vocabulary) -> None:
    """Set the weights of `tokenizer` in place, from an InstructBLIP folder or hub name, or a file of pretrain_mini.py.

    Such a file has no projection, and none has a FrameMixer: they stay as they are; path=None leaves all random. Word
    rows are matched by token where the file names its tokens, else by number (BERT's order); tokens that it does not
    have start as `initialise_new_rows` says. Raises ValueError where a file is cut short, or a weight is missing or
    does not fit.
    """
    known = vocabulary.qformer.get_vocab()
    own = {key: value for key, value in tokenizer.state_dict().items() if not key.startswith("frames.")}
    first_new, bins = vocabulary.qformer_first_new, torch.as_tensor(vocabulary.bin_values)
    if path is None:
        initialise_new_rows(own[WORDS], first_new, vocabulary.qformer_bin_ids, bins)
        return
    if Path(path).suffix == ".safetensors":
        state, metadata = read_safetensors(Path(path), "model.tokenizer.weights")
        names = json.loads(metadata.get("tokens", "null"))
        if names is None:
            raise ValueError(f"{path}: no token names in its metadata; write it with tools/pretrain_mini.py")
        own = {key: value for key, value in own.items() if not key.startswith("projection.")}
    else:
        state = read_instructblip(path)
        names = vocabulary.qformer.convert_ids_to_tokens(list(range(len(state.get(WORDS, ())))))
    if "query_tokens" in state:  # fewer queries than the file's: its first ones
        state["query_tokens"] = state["query_tokens"][:, : own["query_tokens"].shape[1]]
    advice = "model.tokenizer.* and the width of the decoder must be the checkpoint's"
    check_keys(own, state, f"model.tokenizer.weights={path}", advice, free_rows=WORDS)  # rows are matched by token
    numbers = [number for number, name in enumerate(names) if name in known]
    ids = [known[names[number]] for number in numbers]
    rows = own[WORDS].clone()
    rows[ids] = state[WORDS][numbers].to(rows.dtype)
    # New rows start from the mean of the loaded ones; those that the file has are then set once more.
    initialise_new_rows(rows, first_new, vocabulary.qformer_bin_ids, bins)
    rows[ids] = state[WORDS][numbers].to(rows.dtype)
    tokenizer.load_state_dict(state | {WORDS: rows}, strict=False)
