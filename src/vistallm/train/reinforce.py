"""Reinforcement (stage=rl): drawn answers with their rewards -> losses, beside a replay of supervised tasks.

The policy is the model under the region grammar, at the temperature of sampling. `coordinate` knows, beside the reward
of an answer, that of many others: each coordinate moved by a few bins, and each place where the list of vertices or
objects could have ended (an edit). Its loss is minus the expected change of the reward over the edits,
sum of p(edit) * (reward(edited answer) - reward(answer)): a token is judged by what it alone does to the mask.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vistallm.config import Config, ReinforceConfig
from vistallm.model.vistallm import Drawn, Prompts, VistaLLM
from vistallm.schema import RolloutBatch
from vistallm.train.module import VistaModule
from vistallm.train.strategy import shard

FACTS: tuple[str, ...] = ("answers", "reward", "length", "unreadable", "empty", "duplicates", "flat_groups", "change")
FACTS += ("entropy", "kl", "mismatch", "replay_weight")


@dataclass
class Rollouts:
    """N drawn answers, G in a row for each prompt, and what they are worth."""

    prompts: Prompts  # with gradient
    drawn: Drawn
    valid: Tensor  # (N, L) bool, the tokens up to the end token, that included
    reward: Tensor  # (N,) float32 in [0, 1]
    shared: Tensor  # (N, L) bool, tokens that no edit judges: under `coordinate` the answer's advantage does
    edits: Tensor  # (E, 3) int64: row, position, other token
    change: Tensor  # (E,) float32, of the reward if that token stood there
    ends: Tensor  # (E,) bool, whether the other token ends the group: what follows it in the answer is then left out
    facts: dict[str, float]  # sums over the answers, named as in FACTS


Sampler = Callable[[VistaLLM, RolloutBatch], Rollouts]


class ReinforceModule(VistaModule):
    """Trains a VistaLLM on answers that it draws itself; `sampler` draws and scores them.

    Samples of `reinforce.tasks` are prompts; the others are replayed with the loss of the other stages. No part has
    dropout: the probabilities of an answer are those that it was drawn with.
    """

    extra_facts, divisor = FACTS, "answers"

    def __init__(self, model: VistaLLM, config: Config, steps: int, sampler: Sampler) -> None:
        super().__init__(model, config, steps)
        self.sampler = sampler
        # in a tuple: it is no part of the module's state
        self._reference = (deepcopy(model).requires_grad_(False),) if config.reinforce.kl > 0 else ()

    def configure_model(self) -> None:
        """Shard both models when the strategy brings a device mesh (FSDP2)."""
        super().configure_model()
        for model in self._reference:
            if (mesh := getattr(self, "device_mesh", None)) is not None:
                shard(model, mesh["data_parallel"], self.config)

    def on_train_epoch_start(self) -> None:
        """Put all parts into evaluation mode (Lightning puts the whole module into training mode)."""
        self.model.eval()
        for model in self._reference:
            if getattr(self, "device_mesh", None) is None:
                model.eval().to(self.device)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the loss of the drawn answers and of the replay, summed over the answers."""
        config, rollouts = self.config.reinforce, self.sampler(self.model, batch)
        self._ids += batch.prompts.ids
        states, logits = self.model.answer_logits(rollouts.prompts, rollouts.drawn.ids)
        logprob = masked_logprob(logits, rollouts.drawn.allowed, config.temperature)
        valid, taken = rollouts.valid, logprob.gather(2, rollouts.drawn.ids[..., None])[..., 0]
        if config.loss == "coordinate":
            loss = coordinate_loss(rollouts, logprob, config.copies)
        else:
            loss = group_loss(rollouts, taken, config)
        facts: dict[str, Any] = rollouts.facts | {"answers": len(valid)}
        with torch.no_grad():
            spread = -(logprob.exp() * logprob.masked_fill(logprob.isinf(), 0.0)).sum(2)
            facts["entropy"] = (spread * valid).sum() / valid.sum() * len(valid)
            facts["mismatch"] = torch.where(valid, taken - rollouts.drawn.logprob, 0.0).abs().amax() * len(valid)
        for model in self._reference:
            divergence = self._divergence(model, batch, rollouts, taken)
            facts["kl"], loss = divergence.detach(), loss + config.kl * divergence
        if batch.replay is not None:
            replayed, output = self.supervise(batch.replay)
            with torch.no_grad():
                # The gradient of the LM head stands for all: it costs no backward pass.
                wanted = head_gradient(loss, states.flatten(0, 1), logits).norm()
                given = head_gradient(replayed, output.states, output.logits).norm()
            weight = config.replay * wanted / given.clamp(min=1e-12)
            facts["replay_weight"], loss = weight * len(valid), loss + weight * replayed
        self.add_facts([torch.as_tensor(facts.get(name, 0.0), device=loss.device) for name in FACTS])
        return loss

    def _divergence(self, model: VistaLLM, batch: RolloutBatch, rollouts: Rollouts, taken: Tensor) -> Tensor:
        """KL(policy | reference) estimated on the drawn tokens (never negative), mean of a token, times the answers."""
        with torch.no_grad():
            prompts = model.read_prompts(batch.prompts, self.config.reinforce.copies)
            logits = model.answer_logits(prompts, rollouts.drawn.ids)[1]
            known = masked_logprob(logits, rollouts.drawn.allowed, self.config.reinforce.temperature)
            known = known.gather(2, rollouts.drawn.ids[..., None])[..., 0]
        ratio = torch.where(rollouts.valid, known - taken, 0.0)
        return (ratio.exp() - ratio - 1).sum() / rollouts.valid.sum() * len(taken)

    def read_report(self) -> dict[str, float]:
        """Return the numbers of the oldest unread step; those of reinforcement are means of an answer."""
        report = super().read_report()
        answers = report.pop("answers")
        report["samples"] += answers
        for name in FACTS[1:]:
            report[f"reinforce/{name}"] = report.pop(name) / answers
        return report


def masked_logprob(logits: Tensor, allowed: Tensor, temperature: float) -> Tensor:
    """Return (N, L, V) log-probabilities of the tokens that were allowed, -inf for the others."""
    return torch.log_softmax((logits / temperature).masked_fill(~allowed, -torch.inf), 2)


def advantages(reward: Tensor, copies: int, scaled: bool) -> Tensor:
    """Return (N,) rewards less the mean of their group of `copies`, `scaled`: over its standard deviation (GRPO)."""
    groups = reward.view(-1, copies)
    centred = groups - groups.mean(1, keepdim=True)
    return (centred / (groups.std(1, correction=0, keepdim=True) + 1e-4) if scaled else centred).flatten()


def coordinate_loss(rollouts: Rollouts, logprob: Tensor, copies: int) -> Tensor:
    """Minus the expected change of the reward, summed over answers, () float32.

    Where an answer could have ended a group its edits are known only if it went on, so they count 1 / p(going on).
    Tokens that no edit judges (words, numbers of images) are judged by their answer's advantage.
    """
    row, position, token = rollouts.edits.unbind(1)
    chance, ends = logprob[row, position, token].exp(), rollouts.ends
    taken = logprob.gather(2, rollouts.drawn.ids[..., None])[..., 0]
    going = torch.ones_like(taken).index_put((row[ends], position[ends]), 1 - chance[ends].detach()).clamp(min=0.01)
    expected = (chance * rollouts.change / going[row, position]).sum()
    judged = torch.where(rollouts.shared, taken, 0.0).sum(1)
    return -expected - (advantages(rollouts.reward, copies, False) * judged).sum()


def group_loss(rollouts: Rollouts, taken: Tensor, config: ReinforceConfig) -> Tensor:
    """Clipped policy gradient of the answers' advantages, summed over answers, () float32.

    grpo (arXiv 2402.03300): scaled advantages, mean over an answer's tokens. dr_grpo (2503.20783): unscaled, a sum over
    tokens. gspo (2507.18071): scaled, one ratio per answer, the geometric mean of its tokens'. The policy has not moved
    since it drew, so ratios differ from 1 by rounding alone, and grpo and gspo differ by nothing else.

    Args:
        rollouts: the answers.
        taken: (N, L) log-probabilities of their tokens now.
        config: loss, copies and clip.
    """
    ratio = torch.where(rollouts.valid, taken - rollouts.drawn.logprob, 0.0)
    length = rollouts.valid.sum(1, keepdim=True)
    advantage = advantages(rollouts.reward, config.copies, config.loss != "dr_grpo")[:, None]
    if config.loss == "gspo":
        ratio = ratio.sum(1, keepdim=True) / length
    ratio = ratio.exp()
    gain = torch.minimum(ratio * advantage, ratio.clamp(1 - config.clip, 1 + config.clip) * advantage)
    if config.loss == "gspo":
        return -gain.sum()
    return -(gain * rollouts.valid / (1 if config.loss == "dr_grpo" else length)).sum()


def head_gradient(loss: Tensor, states: Tensor, logits: Tensor) -> Tensor:
    """Return the gradient (V, C) float32 of the LM head: `logits` (..., V) come from the M `states` (M, C)."""
    (gradient,) = torch.autograd.grad(loss, logits, retain_graph=True)
    return gradient.flatten(0, -2).T @ states.detach().float()
