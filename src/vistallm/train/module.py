"""The LightningModule: VistaLLM with its loss, optimiser, gradient clipping and what it reports per step."""

from __future__ import annotations

import json
import math
from collections import deque
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from vistallm.config import Config
from vistallm.links.losses import PARTS, WEIGHTS
from vistallm.model.vistallm import Output, VistaLLM
from vistallm.schema import Batch
from vistallm.tasks import TASKS
from vistallm.train.optim import build_optimizer, keep_frozen_in_eval
from vistallm.train.strategy import shard

# What is summed over the micro-batches and ranks of an optimizer step, before loss and weight of each task.
FACTS = ("weight", "loss", "correct", "tokens", "links", *PARTS, "supervised", "samples", "cells", "rejects", "stop")
TASK_NAMES = list(TASKS)
BAD_STEPS = 3  # in a row, with a gradient that is not finite, stop the run


class VistaModule(L.LightningModule):
    """Trains a VistaLLM.

    Nothing in a step waits for the device: sums stay tensors, a bad gradient is skipped by the optimizer's own kernel,
    and `read_report` fetches the numbers of a step when the next one has been given to the device. The model comes
    with its trainable parts set; `steps` are the optimizer steps of the whole run. `stop`: this process was asked to
    stop; `stop_seen`: any process was, by the last report, so that all act alike. `extra_facts` of a kind of training
    stand behind FACTS and the tasks; `divisor` is the fact whose sum divides the gradient.
    """

    extra_facts: tuple[str, ...] = ()
    divisor = "weight"

    def __init__(self, model: VistaLLM, config: Config, steps: int) -> None:
        super().__init__()
        self.model, self.config, self.steps = model, config, steps
        self.stop = self.stop_seen = False
        self.report: dict[str, float] = {}
        self._sums: Tensor | None = None
        self._ids: list[str] = []
        self._closed: deque[tuple[Tensor, torch.cuda.Event | None, dict[str, Any]]] = deque()
        self._bad_steps = 0

    def configure_model(self) -> None:
        """Shard the model when the strategy brings a device mesh (FSDP2)."""
        mesh = getattr(self, "device_mesh", None)
        if mesh is not None:
            shard(self.model, mesh["data_parallel"], self.config)

    def configure_optimizers(self) -> Any:
        """AdamW with warm-up and cosine, stepped per optimizer step."""
        optimizer, scheduler = build_optimizer(self.model, self.config.train, self.steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        """Move the batch's tensors."""
        return batch.to(device, non_blocking=True)

    def on_train_epoch_start(self) -> None:
        """Keep frozen parts in evaluation mode (Lightning puts the whole module into training mode)."""
        keep_frozen_in_eval(self.model)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Seed dropout by rank and batch: ranks draw different masks, and a resumed run those of an unbroken one."""
        number = self.trainer.fit_loop.epoch_loop.batch_progress.total.ready * self.trainer.world_size
        torch.manual_seed((self.config.seed << 40) + number + self.global_rank)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the batch's weighted sum of token and link losses; the step's total weight divides its gradient."""
        return self.supervise(batch)[0]

    def supervise(self, batch: Batch) -> tuple[Tensor, Output]:
        """Return the weighted sum of token and link losses, and the output they are of; add to the step's facts."""
        output = self.model(batch)
        weights = token_weights(output.row, len(batch), self.config.train.loss_weight)
        losses = output.token_loss * weights
        self._ids += batch.ids
        index = torch.tensor([TASK_NAMES.index(name) for name in batch.tasks]).to(losses.device, non_blocking=True)
        by_task = losses.new_zeros(2, len(TASK_NAMES))
        by_task.index_add_(1, index[output.row], torch.stack([losses.detach(), weights]))
        counts = torch.tensor([len(losses), len(batch), batch.input_ids.numel(), batch.rejects, 0.0])
        # An object of a link weighs as much as `links.weight` supervised tokens: so no sum but theirs has to be shared.
        linked = losses.new_zeros(()) if output.link_loss is None else self.config.links.weight * output.link_loss
        facts = [
            weights.sum(),
            losses.detach().sum(),
            output.correct.sum(),
            batch.attention_mask.sum(),
            linked.detach(),
            *(output.link_parts.get(name, losses.new_zeros(())) for name in PARTS),
        ]
        computed = torch.stack(facts)
        sums = torch.cat([computed, counts.to(losses.device, non_blocking=True), by_task.flatten()])
        self._add(torch.cat([sums, sums.new_zeros(len(self.extra_facts))]))
        return losses.sum() + linked, output

    def add_facts(self, values: list[Tensor]) -> None:
        """Add to the step's `extra_facts`, () each."""
        known = torch.zeros(len(FACTS) + 2 * len(TASK_NAMES), device=values[0].device)
        self._add(torch.cat([known, torch.stack([value.detach().float() for value in values])]))

    def _add(self, sums: Tensor) -> None:
        self._sums = sums if self._sums is None else self._sums + sums

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Log teacher-forced loss and token accuracy."""
        output = self.model(batch)
        size = len(output.token_loss)
        self.log("val_loss", output.loss, batch_size=size, sync_dist=True, prog_bar=True)
        self.log("val_accuracy", output.correct.float().mean(), batch_size=size, sync_dist=True, prog_bar=True)

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None
    ) -> None:
        """Turn the gradient of the summed losses into that of their weighted mean, then clip it by its global norm.

        The mean is over all micro-batches and ranks of the step. Lightning has divided each sum by the number of
        micro-batches, and ddp and fsdp their total by the number of ranks: both constants are taken out again.
        """
        assert self._sums is not None
        if self.stop:
            self._sums[FACTS.index("stop")] = 1.0
        sums, self._sums = self.trainer.strategy.reduce(self._sums, reduce_op="sum"), None
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        names = [*FACTS, *(2 * TASK_NAMES), *self.extra_facts]
        scale = self.trainer.accumulate_grad_batches * self.trainer.world_size / sums[names.index(self.divisor)]
        for parameter in parameters:
            gradient: Any = parameter.grad
            gradient = gradient.to_local() if isinstance(gradient, DTensor) else gradient
            gradient.mul_(scale.to(gradient.device))
        limit = self.config.train.gradient_clip
        norm = torch.nn.utils.clip_grad_norm_(parameters, limit if limit > 0 else float("inf"))
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        # As GradScaler does: AdamW's fused kernel then leaves weights and moments as they are. The norm is over all
        # ranks, so they decide alike.
        optimizer.found_inf = 1.0 - norm.isfinite().float()
        values = torch.cat([sums, norm.to(sums)[None]]).to("cpu", non_blocking=True)
        event = torch.cuda.current_stream().record_event() if sums.is_cuda else None
        lr = max(group["lr"] for group in optimizer.param_groups)
        self._closed.append((values, event, {"step": self.global_step + 1, "lr": lr, "ids": self._ids}))
        self._ids = []

    def read_report(self) -> dict[str, float]:
        """Return the numbers of the oldest optimizer step whose report has not been read, over all ranks.

        Raises:
            ValueError: its gradient was not finite, for the third step in a row.
        """
        closed, event, known = self._closed.popleft()
        if event is not None:
            event.synchronize()
        *values, norm = closed.tolist()
        facts = dict(zip(FACTS, values, strict=False))
        self.stop_seen = facts["stop"] > 0
        losses, weights = (values[len(FACTS) :][i * len(TASK_NAMES) :][: len(TASK_NAMES)] for i in range(2))
        objects = facts["objects"]
        # reinforcement without replay supervises nothing
        weight, supervised, cells = (facts[name] or math.nan for name in ("weight", "supervised", "cells"))
        self.report = {
            "loss": (facts["loss"] + facts["links"]) / weight,
            "accuracy": facts["correct"] / supervised,
            "padding": 1 - facts["tokens"] / cells,
            **dict(zip(self.extra_facts, values[len(FACTS) + 2 * len(TASK_NAMES) :], strict=True)),
            "lr": known["lr"],
            "grad_norm": norm,
            "samples": facts["samples"],
            "tokens": facts["tokens"],
            "rejects": facts["rejects"],
            "skipped": float(not math.isfinite(norm)),
            **{f"loss/{task}": a / b for task, a, b in zip(TASK_NAMES, losses, weights, strict=True) if b},
            **({"loss/links": facts["links"] / facts["weight"]} if facts["links"] else {}),
            **{f"links/{name}": facts[name] / (objects if name in WEIGHTS else 1) for name in PARTS if objects},
        }
        self._bad_steps = self._bad_steps + 1 if self.report["skipped"] else 0
        if self._bad_steps:
            path = Path(str(self.config.run_dir)) / "nonfinite.jsonl"
            record = {"step": known["step"], "rank": self.global_rank, "loss": self.report["loss"], "ids": known["ids"]}
            with path.open("a") as file:  # the samples of this rank
                file.write(json.dumps(record) + "\n")
        if self._bad_steps == BAD_STEPS:
            raise ValueError(
                f"step {known['step']}: the gradient was not finite {BAD_STEPS} times in a row; the samples are in "
                f"{path}; lower train.lr, train with precision=fp32, or go back to an earlier checkpoint (resume=PATH)"
            )
        return self.report


def token_weights(row: Tensor, samples: int, kind: str) -> Tensor:
    """Return the (M,) float32 weight of each supervised token in the loss, from the (M,) int64 sample it belongs to.

    token: 1, so that every token counts the same, as in the likelihood of the data; long answers (masks) weigh most.
    sample: 1 / n for an answer of n tokens, so that a yes or no counts as much as a mask.
    sqrt: 1 / sqrt(n), between the two (the "square averaging" of InternVL 2.5, arXiv 2412.05271).
    """
    sizes = torch.zeros(samples, device=row.device).index_add_(0, row, torch.ones(len(row), device=row.device))
    return sizes.pow({"token": 0.0, "sqrt": -0.5, "sample": -1.0}[kind])[row]
