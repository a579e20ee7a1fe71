"""What a run writes while it trains: metrics.csv, one row per optimizer step, continued after a resume."""

from __future__ import annotations

import contextlib
import csv
import os
import time
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback

from vistallm.model.checkpoint import is_whole
from vistallm.tasks import TASKS
from vistallm.train.module import VistaModule

COLUMNS = [
    *(
        "step",
        "seconds",
        "wait",
        "loss",
        "accuracy",
        "lr",
        "grad_norm",
        "samples",
        "tokens",
        "padding",
        "rejects",
        "skipped",
        "val_loss",
        "val_accuracy",
    ),
    *(f"loss/{task}" for task in TASKS),
]


class MetricsFile(Callback):
    """Appends the module's report to metrics.csv and hands it to the loggers.

    `seconds` is the wall time of the step and `wait` the part of it spent waiting for the loader, both in seconds;
    losses (those that are optimised), `samples`, `tokens` and `rejects` are over all ranks; `skipped` is 1 where the
    gradient was not finite. On resume, rows after the checkpoint's step are dropped.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._clock = self._ready = 0.0
        self._step = 0
        self._waiting: list[dict[str, Any]] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Keep the rows up to the step that the run resumes from, then start the clock of the first step."""
        # Not in on_fit_start: Lightning restores the step count after it.
        self._step = trainer.global_step
        if trainer.is_global_zero:
            rows = read_metrics(self.path)
            kept = [row for row in rows if int(row["step"]) <= self._step]
            if len(kept) < len(rows) or (rows and list(rows[0]) != COLUMNS):
                rewritten = self.path.with_suffix(".tmp")
                with rewritten.open("w", newline="") as file:
                    writer = csv.DictWriter(file, COLUMNS)
                    writer.writeheader()
                    writer.writerows(kept)
                rewritten.replace(self.path)  # whole or not at all: a kill here must not lose the curve
        self._clock = time.perf_counter()

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """The loader has delivered."""
        self._ready = time.perf_counter()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write a row when an optimizer step has ended."""
        assert isinstance(pl_module, VistaModule)
        if trainer.global_step == self._step:
            return
        now = time.perf_counter()
        self._step = trainer.global_step
        facts = {
            "step": self._step,
            "seconds": round(now - self._clock, 5),
            "wait": round(self._ready - self._clock, 5),
        }
        row = facts | {key: round(value, 6) if key != "lr" else value for key, value in pl_module.report.items()}
        self._clock = now
        self._write(trainer, row)
        pl_module.log_dict({k: row[k] for k in ("loss", "lr")}, prog_bar=True, logger=False)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write validation loss and accuracy as a row of the current step."""
        if trainer.sanity_checking:
            return
        values = {k: round(float(v), 6) for k, v in trainer.callback_metrics.items() if k.startswith("val_")}
        self._write(trainer, {"step": trainer.global_step, **values})
        self._clock = time.perf_counter()

    def _write(self, trainer: L.Trainer, row: dict[str, Any]) -> None:
        if not trainer.is_global_zero:
            return
        self._append(row)
        for logger in trainer.loggers:
            logger.log_metrics({k: v for k, v in row.items() if k != "step"}, step=row["step"])

    def _append(self, row: dict[str, Any]) -> None:
        """Append a row; on a full disk it waits in memory for the next one, and training goes on."""
        self._waiting.append(row)
        end = self.path.stat().st_size if self.path.exists() else 0
        try:
            with self.path.open("a", newline="") as file:
                writer = csv.DictWriter(file, COLUMNS)
                if end == 0:
                    writer.writeheader()
                writer.writerows(self._waiting)
            self._waiting.clear()
        except OSError as error:
            with contextlib.suppress(OSError):
                os.truncate(self.path, end)  # no half row
            if len(self._waiting) == 1:
                print(f"{self.path}: {error}; rows wait in memory until there is room", flush=True)


class FinalCheckpoint(Callback):
    """Saves `step-<n>.ckpt` when training ends, whatever `checkpoint.every_n_steps` is."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save unless the periodic checkpoint of this very step is there."""
        path = self.folder / f"step-{trainer.global_step:06d}.ckpt"
        if not is_whole(path):
            trainer.save_checkpoint(path)


def read_metrics(path: Path) -> list[dict[str, str]]:
    """Return the rows of a metrics.csv, an empty list when there is none; raises ValueError for other columns."""
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        rows = list(reader)
    # Columns may have been added since (a task, a fact): missing ones are empty, unknown ones are another program's.
    if reader.fieldnames and not set(reader.fieldnames) <= set(COLUMNS):
        raise ValueError(f"{path}: columns of another version; move the run folder away or choose another run_dir=")
    return rows
