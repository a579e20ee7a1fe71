"""What a run writes while it trains: metrics.csv, one row per optimizer step, continued after a resume."""

from __future__ import annotations

import csv
import time
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback

from vistallm.coinit.tasks import TASKS
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
    `samples` and `tokens` are this rank's. On resume, rows after the checkpoint's step are dropped.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._clock = self._ready = 0.0
        self._step = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Keep the rows up to the step that the run resumes from, then start the clock of the first step."""
        # Not in on_fit_start: Lightning restores the step count after it.
        self._step = trainer.global_step
        if trainer.is_global_zero:
            kept = [row for row in read_metrics(self.path) if int(row["step"]) <= self._step]
            with self.path.open("w", newline="") as file:
                writer = csv.DictWriter(file, COLUMNS)
                writer.writeheader()
                writer.writerows(kept)
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
        with self.path.open("a", newline="") as file:
            csv.DictWriter(file, COLUMNS).writerow(row)
        for logger in trainer.loggers:
            logger.log_metrics({k: v for k, v in row.items() if k != "step"}, step=row["step"])


class FinalCheckpoint(Callback):
    """Saves `step-<n>.ckpt` when training ends, whatever `checkpoint.every_n_steps` is."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save unless the periodic checkpoint of this very step is there."""
        path = self.folder / f"step-{trainer.global_step:06d}.ckpt"
        if not path.exists():
            trainer.save_checkpoint(path)


def read_metrics(path: Path) -> list[dict[str, str]]:
    """Return the rows of a metrics.csv, an empty list when there is none; raises ValueError for other columns."""
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        rows = list(reader)
    if reader.fieldnames and list(reader.fieldnames) != COLUMNS:
        raise ValueError(f"{path}: columns of another version; move the run folder away or choose another run_dir=")
    return rows
