"""VistaLLM: Batch -> loss, or Batch -> generated token ids. A plain nn.Module that knows no Lightning.

encoder (frozen) -> instruction-guided tokenizer (one run per image) -> image slots of the decoder's input embeddings.
With links: the decoder's last hidden states at the slots of a link -> boxes, masks and keypoints (vistallm.links).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import DynamicCache, PreTrainedConfig
from transformers.generation import LogitsProcessor

from vistallm.data.vocabulary import Vocabulary
from vistallm.links import LINKS, read_links
from vistallm.links.decoder import LinkAnswer, LinkDecoder, link_answers
from vistallm.links.losses import link_losses
from vistallm.links.prompts import RegionEncoder
from vistallm.links.targets import links_to_find
from vistallm.model.encoder import ImageEncoder
from vistallm.model.qformer import Tokenizer
from vistallm.schema import IGNORE_INDEX, Batch, LinkBatch


@dataclass
class Output:
    """Losses of a batch's M supervised tokens."""

    token_loss: Tensor  # (M,) float32, with gradient
    row: Tensor  # (M,) int64: the sample of each token
    correct: Tensor  # (M,) bool: whether it is the most probable one
    states: Tensor  # (M, C) of the last layer, with gradient
    logits: Tensor  # (M, V) float32, with gradient
    link_loss: Tensor | None = None  # () float32, summed over the batch's links and objects, with gradient
    link_parts: dict[str, Tensor] = field(default_factory=dict)  # its parts, () float32 each

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


@dataclass
class Generated:
    """The answers of a batch."""

    ids: Tensor  # (B, G) int64 new token ids, padded after the end token
    links: list[list[LinkAnswer]]  # of each row, what its links found, in the order of the answer; empty without links


@dataclass
class Prompts:
    """Prompts as the language model has read them, each G times in a row for as many answers: N = B * G rows."""

    states: Tensor  # (N, C), of the last token
    cache: Any  # keys and values (transformers' DynamicCache)
    mask: Tensor  # (N, T) int64, 0 = left padding


@dataclass
class Drawn:
    """An answer drawn by chance for each of N rows."""

    ids: Tensor  # (N, L) int64, padded after the end token
    logprob: Tensor  # (N, L) float32, of each token when it was drawn
    allowed: Tensor  # (N, L, V) bool, the tokens that could be drawn


class VistaLLM(nn.Module):
    """Encoder, instruction-guided tokenizer and decoder behind `forward` (losses) and `generate` (answers).

    The decoder is a transformers causal language model or peft's wrapper of one, whose rows are the vocabulary's ids;
    `bin_sigma` is the width of a coordinate's soft target in bins, 0 = cross-entropy. `links` reads the slots of an
    answer's links, `region_encoder` the region prompts; both or none are there.
    """

    bin_ids: Tensor  # (num_bins,) int64, ids of the coordinate tokens
    link_ids: Tensor  # (4, 1 + K) int64, of each kind of link the routing token and its slots; (0,) without links
    phrase_ends: Tensor  # (E,) int64, tokens that no phrase of a link holds

    def __init__(
        self,
        encoder: ImageEncoder,
        tokenizer: Tokenizer,
        decoder: Any,
        vocabulary: Vocabulary,
        bin_sigma: float = 0.0,
        links: LinkDecoder | None = None,
        region_encoder: RegionEncoder | None = None,
    ) -> None:
        super().__init__()
        self.vocabulary, self.bin_sigma = vocabulary, bin_sigma
        self.encoder, self.tokenizer, self.decoder = encoder, tokenizer, decoder
        self.links, self.region_encoder = links, region_encoder
        self.register_buffer("bin_ids", torch.tensor(vocabulary.bin_ids, dtype=torch.long), persistent=False)
        self.register_buffer("link_ids", torch.tensor(vocabulary.link_ids, dtype=torch.long), persistent=False)
        self.register_buffer("phrase_ends", torch.tensor(vocabulary.phrase_ends, dtype=torch.long), persistent=False)

    def encode(self, batch: Batch) -> tuple[Tensor, list[Tensor]]:
        """Return (N, Q, C) image tokens, one block per image, guided by its sample's instruction, and patch tokens.

        The patch tokens, (N, P, D) each, are those of the encoder blocks that links read.
        """
        frozen = not any(p.requires_grad for p in self.encoder.parameters())
        with torch.set_grad_enabled(torch.is_grad_enabled() and not frozen), training_attention():
            tokens_NPD, patches = self._features(batch)
        owner = batch.image_owner
        with training_attention():
            words = batch.instruction_ids[owner], batch.instruction_mask[owner]
            return self.tokenizer(tokens_NPD, *words, batch.frame), patches

    def _features(self, batch: Batch) -> tuple[Tensor, list[Tensor]]:
        """Patch tokens of each image; one that several prompts ask about is read once."""
        if batch.first_copy is None:
            return self.encoder.features(batch.images)
        first, number = batch.first_copy.unique(return_inverse=True)
        tokens, patches = self.encoder.features(batch.images[first])
        return tokens[number], [states[number] for states in patches]

    def input_embeddings(self, batch: Batch, encoded: tuple[Tensor, list[Tensor]] | None = None) -> Tensor:
        """Return (B, T, C) embeddings with image tokens laid into the image slots, and regions into `<region>`.

        `encoded`: what `encode` gives, where it is known.
        """
        image_tokens, patches = encoded or self.encode(batch)
        embeddings = self.decoder.get_input_embeddings()(batch.input_ids)
        laid = {self.vocabulary.image_id: image_tokens.flatten(0, 1)}
        if self.region_encoder is not None and batch.prompts is not None and batch.prompt_image is not None:
            pixels = self.encoder.normalise(batch.images)
            laid[self.vocabulary.region_id] = self.region_encoder(patches, pixels, batch.prompts, batch.prompt_image)
        for token, states in laid.items():
            slots = batch.input_ids == token
            if (expected := slots.sum().item()) != len(states):
                name = self.vocabulary.lm.convert_ids_to_tokens(token)
                raise ValueError(f"batch: {expected} {name} tokens, but {len(states)} states of them; rebuild it")
            embeddings = embeddings.masked_scatter(slots.unsqueeze(-1), states.to(embeddings.dtype))
        return embeddings

    def forward(self, batch: Batch) -> Output:
        """Loss over the supervised positions of a right-padded batch; the LM head runs on those positions alone."""
        # Right padding and a causal mask: no real token sees a pad, so the mask is left out (and SDPA stays fast).
        image_tokens, patches = self.encode(batch)
        embeddings = self.input_embeddings(batch, (image_tokens, patches))
        with training_attention():
            hidden = self.language_model()(inputs_embeds=embeddings).last_hidden_state
        targets = batch.labels[:, 1:]
        row, position = (targets != IGNORE_INDEX).nonzero(as_tuple=True)
        target = targets[row, position]
        states = hidden[row, position]
        logits = self.decoder.get_output_embeddings()(states).float()
        token_loss = F.cross_entropy(logits, target, reduction="none")
        if self.bin_sigma > 0:
            is_bin = torch.isin(target, self.bin_ids)
            token_loss = torch.where(is_bin, self._soft_bin_loss(logits, target), token_loss)
        output = Output(token_loss, row, logits.detach().argmax(-1) == target, states, logits)
        if self.links is not None and self.region_encoder is not None:
            pixels, states = self._stem_pixels(batch), self._slot_states(batch.input_ids, hidden)[0]
            links = batch.links or links_to_find([], [], [], pixels.shape[-1] // 2).to(hidden.device)
            with training_attention():
                families = self.links(_read(states, links), links, patches, pixels)
            loss, output.link_parts = link_losses(families, links)
            # ddp waits for a gradient of every parameter, also where no prompt shows a region
            unread = sum(parameter.sum() for parameter in self.region_encoder.parameters()) * 0.0
            output.link_loss = loss + unread
        return output

    def _slot_states(self, ids: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Read (B, T, D) behind each routing token of `ids` (B, T), where all its K slots are there.

        Returns (L, K + W, D), the states of the slots and the embeddings of the words before the routing token (its
        phrase; padded with zeros, W >= 1), and (L,) int64 rows. Embeddings say which of a list of names is meant.
        """
        row, position = torch.isin(ids, self.link_ids[:, 0]).nonzero(as_tuple=True)
        whole = position + self.link_ids.shape[1] <= ids.shape[1]
        row, position = row[whole], position[whole]
        slots = position[:, None] + torch.arange(1, self.link_ids.shape[1], device=ids.device)
        steps = torch.arange(ids.shape[1], device=ids.device)
        ends = torch.where(torch.isin(ids, self.phrase_ends), steps, -1).cummax(1).values
        before = F.pad(ends, (1, 0), value=-1)[row, position]  # the last token before the phrase
        words = ((steps > before[:, None]) & (steps < position[:, None])).nonzero()  # (W, 2): link, place
        embedded = self.decoder.get_input_embeddings()(ids[row[words[:, 0]], words[:, 1]]).to(hidden.dtype)
        longest = int((position - before - 1).amax()) if len(row) else 0
        phrase = hidden.new_zeros(len(row), max(longest, 1), hidden.shape[2])
        phrase = phrase.index_put((words[:, 0], words[:, 1] - before[words[:, 0]] - 1), embedded)
        return torch.cat([hidden[row[:, None], slots], phrase], 1), row

    def _stem_pixels(self, batch: Batch) -> Tensor:
        return self.encoder.normalise(batch.images if batch.pixels is None else batch.pixels)

    @torch.inference_mode()
    def generate(
        self, batch: Batch, max_new_tokens: int, logits_processor: Sequence[LogitsProcessor] = (), **arguments: object
    ) -> Generated:
        """Answers for a left-padded batch, greedy unless `arguments` of transformers' `generate` say otherwise.

        A routing token is followed by its slots: they are tokens like all others, so a row waits for no other row.
        """
        text, states = self.vocabulary.lm, list[Tensor]()
        image_tokens, patches = self.encode(batch)
        forced = [ForcedSlots(self.link_ids, len(text))] if self.links is not None else []
        handle = self.language_model().register_forward_hook(
            lambda module, inputs, output: states.append(output.last_hidden_state[:, -1]) if forced else None
        )
        try:
            ids = self.decoder.generate(
                inputs_embeds=self.input_embeddings(batch, (image_tokens, patches)),
                attention_mask=batch.attention_mask,
                max_new_tokens=max_new_tokens,
                eos_token_id=text.eos_token_id,
                pad_token_id=text.pad_token_id,
                logits_processor=[*forced, *logits_processor],
                **{"do_sample": False, "num_beams": 1, **arguments},
            )
        finally:
            handle.remove()
        if not forced:
            return Generated(ids, [[] for _ in ids])
        # The first state is of the prompt's last token; a link that the limit has cut lacks its last states.
        return Generated(ids, self._find(batch, ids[:, : len(states) - 1], states[1:], patches))

    def read_prompts(self, batch: Batch, copies: int) -> Prompts:
        """Read the prompts of a left-padded batch once, for `copies` answers each."""
        mask = batch.attention_mask
        with training_attention():
            output = self.language_model()(
                inputs_embeds=self.input_embeddings(batch),
                attention_mask=mask,
                position_ids=(mask.cumsum(1) - 1).clamp(min=0),
                use_cache=True,
            )
        output.past_key_values.batch_repeat_interleave(copies)
        states, mask = (t.repeat_interleave(copies, 0) for t in (output.last_hidden_state[:, -1], mask))
        return Prompts(states, output.past_key_values, mask)

    @torch.no_grad()
    def draw(
        self, prompts: Prompts, limit: int, temperature: float, grammar: LogitsProcessor, sharded: bool = False
    ) -> Drawn:
        """Draw an answer of at most `limit` tokens for each row; `sharded`: all processes take equally many steps."""
        states, mask, cache, text = prompts.states, prompts.mask, DynamicCache(), self.vocabulary.lm
        for number, layer in enumerate(prompts.cache.layers):
            cache.update(layer.keys.detach(), layer.values.detach(), number)
        ids, logprobs, allowed = mask.new_zeros(len(mask), 0), list[Tensor](), list[Tensor]()
        going = torch.arange(len(mask), device=mask.device)  # rows that are still read
        ended = torch.zeros_like(going, dtype=torch.bool)
        waiting = torch.ones((), device=mask.device)
        while True:
            if waiting:
                scores = self.decoder.get_output_embeddings()(states).float()
                scores = scores.new_zeros(len(ids), scores.shape[1]).index_copy(0, going, scores)
                logprob = torch.log_softmax(grammar(ids, scores) / temperature, 1)
                token = torch.multinomial(logprob.exp(), 1)
                allowed.append(logprob.isfinite())
                logprobs.append(logprob.gather(1, token)[:, 0])
                token = torch.where(ended, text.pad_token_id, token[:, 0])
                ids, ended = torch.cat([ids, token[:, None]], 1), ended | (token == text.eos_token_id)
            waiting = (~ended.all() & (ids.shape[1] < limit)).float()
            others = waiting.clone()
            if sharded:
                dist.all_reduce(others, dist.ReduceOp.MAX)
            if not others:
                return Drawn(ids, torch.stack(logprobs, 1), torch.stack(allowed, 1))
            kept = (~ended[going]).nonzero()[:, 0]
            if 0 < len(kept) <= len(going) // 2:
                cache.batch_select_indices(kept)
                going, mask = going[kept], mask[kept]
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
            states = self._read_on(ids[going, -1:], cache, mask)[:, -1]

    def answer_logits(self, prompts: Prompts, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return states (N, L, C) and logits (N, L, V) float32 of answers (N, L), with gradient; uses `prompts` up."""
        mask = torch.cat([prompts.mask, prompts.mask.new_ones(len(ids), ids.shape[1] - 1)], 1)
        with training_attention():
            states = torch.cat([prompts.states[:, None], self._read_on(ids[:, :-1], prompts.cache, mask)], 1)
        return states, self.decoder.get_output_embeddings()(states).float()

    def _read_on(self, ids: Tensor, cache: DynamicCache, mask: Tensor) -> Tensor:
        """Read ids (N, k) behind what the cache holds, mask (N, T + k): their states (N, k, C)."""
        inputs = {"inputs_embeds": self.decoder.get_input_embeddings()(ids), "attention_mask": mask}
        position = mask.cumsum(1)[:, -ids.shape[1] :] - 1
        output = self.language_model()(**inputs, position_ids=position, past_key_values=cache, use_cache=True)
        return output.last_hidden_state

    def _find(self, batch: Batch, ids: Tensor, states: list[Tensor], patches: list[Tensor]) -> list[list[LinkAnswer]]:
        """Run the link decoder on G generated ids (B, G) and the state (B, D) of each."""
        assert self.links is not None
        found: list[list[LinkAnswer]] = [[] for _ in ids]
        if not states:
            return found
        hidden, owners = self._slot_states(ids, torch.stack(states, 1))
        counts = torch.bincount(batch.image_owner, minlength=len(batch)).tolist()
        whole = torch.bincount(owners, minlength=len(ids)).tolist()  # links of each row that have all their slots
        kinds, rows, images, tokens, first, token = list[int](), list[int](), list[int](), list[int](), 0, 0
        video = [False] * int(sum(counts)) if batch.frame is None else (batch.frame >= 0).tolist()
        for row, (answer, count) in enumerate(zip(ids.tolist(), counts, strict=True)):
            for link in read_links(str(self.vocabulary.lm.decode(answer)))[: whole[row]]:
                # Reading the answer faults a wrong number; a link of a video is read in every frame.
                seen = range(count) if video[first] else [min(link.image, count - 1)]
                kinds += [LINKS.index(link.kind)] * len(seen)
                rows += [row] * len(seen)
                images += [first + image for image in seen]
                tokens += [token] * len(seen)
                token += 1
            first += count
        links = links_to_find(kinds, rows, images, 1, tokens).to(ids.device)
        return self._answers(batch, links, hidden, patches) if kinds else found

    def _answers(self, batch: Batch, links: LinkBatch, states: Tensor, patches: list[Tensor]) -> list[list[LinkAnswer]]:
        assert self.links is not None
        families, found = (
            self.links(_read(states, links), links, patches, self._stem_pixels(batch)),
            [list[LinkAnswer]() for _ in batch.ids],
        )
        for row, answer in zip(links.row.tolist(), link_answers(families, len(links.row)), strict=True):
            found[row].append(answer)
        return found

    @torch.inference_mode()
    def find(self, batch: Batch) -> list[list[LinkAnswer]]:
        """What the links of the true answers find, for each row of a right-padded batch (teacher forcing)."""
        assert batch.links is not None, "a batch with answers, of a vocabulary with links"
        image_tokens, patches = self.encode(batch)
        embeddings = self.input_embeddings(batch, (image_tokens, patches))
        states = self._slot_states(batch.input_ids, self.language_model()(inputs_embeds=embeddings).last_hidden_state)[
            0
        ]
        return self._answers(batch, batch.links, states, patches)

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


def _read(states: Tensor, links: LinkBatch) -> Tensor:
    """The slots' states (T, K, D) of T routing tokens, for each of the L links: (L, K, D)."""
    return states if links.token is None else states[links.token]


class ForcedSlots(LogitsProcessor):
    """Lets a routing token be followed by its slots, in order, and nothing else write a slot.

    link_ids: (4, 1 + K) int64, `VistaLLM.link_ids`; size: tokens of the vocabulary.
    """

    def __init__(self, link_ids: Tensor, size: int) -> None:
        self.follower = torch.full((size,), -1, dtype=torch.long, device=link_ids.device)
        self.follower[link_ids[:, :-1]] = link_ids[:, 1:]
        self.slots = link_ids[:, 1:].flatten()

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return the masked scores (B, V)."""
        scores = scores.index_fill(1, self.slots, -torch.inf)
        if input_ids.shape[1] == 0:  # the prompt is not among them
            return scores
        follower = self.follower[input_ids[:, -1]]
        only = torch.full_like(scores, -torch.inf).scatter_(1, follower.clamp(min=0)[:, None], 0.0)
        return torch.where((follower >= 0)[:, None], only, scores)
