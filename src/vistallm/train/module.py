"""The LightningModule: VistaLLM with its loss, optimiser, gradient clipping and what it reports per step."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor

from vistallm.config import Config
from vistallm.model.vistallm import Output, VistaLLM
from vistallm.schema import IGNORE_INDEX, Batch
from vistallm.train.optim import build_optimizer, keep_frozen_in_eval
from vistallm.train.strategy import shard

BAD_STEPS = 3  # in a row, with a gradient that is not finite, stop the run


class VistaModule(L.LightningModule):
    """Trains a VistaLLM; `report` holds the numbers of the last optimizer step for the loggers.

    Args:
        model: with its trainable parts already set.
        config: the run's configuration; steps: optimizer steps of the whole run, for the schedule.
    """

    def __init__(self, model: VistaLLM, config: Config, steps: int) -> None:
        super().__init__()
        self.model, self.config, self.steps = model, config, steps
        self.report: dict[str, float] = {}
        self._sums: dict[str, float] = {}
        self._ids: list[str] = []
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

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the mean loss over the batch's supervised tokens."""
        output = self.model(batch)
        self._add(batch, output)
        return output.loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Teacher-forced loss and token accuracy (no generation inside training)."""
        output = self.model(batch)
        size = len(output.token_loss)
        self.log("val_loss", output.loss, batch_size=size, sync_dist=True, prog_bar=True)
        self.log("val_accuracy", output.correct.float().mean(), batch_size=size, sync_dist=True, prog_bar=True)

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None
    ) -> None:
        """Clip by the global norm over all ranks and remember it."""
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        limit = self.config.train.gradient_clip
        norm = torch.nn.utils.clip_grad_norm_(parameters, limit if limit > 0 else float("inf"))
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        self._close_step(optimizer, float(norm))
        self._guard(parameters, float(norm))

    def _guard(self, parameters: list[torch.nn.Parameter], norm: float) -> None:
        """Skip the step when the gradient is not finite, and stop the run at the third such step in a row.

        The norm is over all ranks, so they decide alike; each writes the ids of its own samples.
        """
        ids, self._ids = self._ids, []
        if math.isfinite(norm):
            self._bad_steps = 0
            return
        for parameter in parameters:
            parameter.grad = None  # the optimizer leaves such parameters and their moments as they are
        self._bad_steps += 1
        path = Path(str(self.config.run_dir)) / "nonfinite.jsonl"
        facts = {"step": self.global_step + 1, "rank": self.global_rank, "loss": self.report["loss"], "ids": ids}
        with path.open("a") as file:
            file.write(json.dumps(facts) + "\n")
        if self._bad_steps >= BAD_STEPS:
            raise ValueError(
                f"step {facts['step']}: the gradient was not finite {BAD_STEPS} times in a row; the samples are in "
                f"{path}; lower train.lr, train with precision=fp32, or go back to an earlier checkpoint (resume=PATH)"
            )

    def _add(self, batch: Batch, output: Output) -> None:
        """Add a micro-batch to the running sums of this optimizer step."""
        sums = self._sums
        self._ids += batch.ids
        cells = batch.input_ids.numel()
        row_loss = torch.zeros(len(batch)).index_add_(0, output.row.cpu(), output.token_loss.float().cpu())
        row_size = torch.zeros(len(batch)).index_add_(0, output.row.cpu(), torch.ones(len(output.row)))
        facts = {
            "samples": len(batch),
            "rejects": batch.rejects,
            "tokens": int(batch.attention_mask.sum()),
            "cells": cells,
            "supervised": int((batch.labels != IGNORE_INDEX).sum()),
            "loss": float(output.token_loss.sum()),
            "correct": float(output.correct.sum()),
        }
        for task, loss, size in zip(batch.tasks, row_loss.tolist(), row_size.tolist(), strict=True):
            facts[f"loss/{task}"] = facts.get(f"loss/{task}", 0.0) + loss
            facts[f"size/{task}"] = facts.get(f"size/{task}", 0.0) + size
        for key, value in facts.items():
            sums[key] = sums.get(key, 0.0) + value

    def _close_step(self, optimizer: Any, norm: float) -> None:
        """Turn the sums of the optimizer step into `report`."""
        sums, self._sums = self._sums, {}
        tasks = {k.removeprefix("size/"): v for k, v in sums.items() if k.startswith("size/")}
        self.report = {
            "loss": sums["loss"] / sums["supervised"],
            "accuracy": sums["correct"] / sums["supervised"],
            "lr": max(group["lr"] for group in optimizer.param_groups),
            "grad_norm": norm,
            "samples": sums["samples"],
            "tokens": sums["tokens"],
            "rejects": sums["rejects"],
            "skipped": float(not math.isfinite(norm)),
            "padding": 1 - sums["tokens"] / sums["cells"],
            **{f"loss/{task}": sums[f"loss/{task}"] / size for task, size in tasks.items()},
        }
