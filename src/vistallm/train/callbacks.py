"""What a run writes while it trains, and how it stops: metrics.csv, progress lines, checkpoints, signals."""

from __future__ import annotations

import contextlib
import csv
import os
import signal
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any, cast

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from vistallm.links.losses import PARTS
from vistallm.model.vistallm import VistaLLM
from vistallm.tasks import TASKS

COLUMNS = [
    *("step", "seconds", "wait", "loss", "accuracy", "lr", "grad_norm", "samples", "tokens", "padding", "rejects"),
    *("skipped", "val_loss", "val_accuracy"),
    *(f"loss/{name}" for name in (*TASKS, "links")),
    *(f"links/{name}" for name in PARTS),
]
PREEMPTED = 75  # EX_TEMPFAIL of sysexits.h: try again later
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class Preempted(Exception):
    """Training stopped at a signal after writing its checkpoint; it is to be started again."""


class AnswerScores(Callback):
    """Scores generated answers at each validation pass, by the function that `evaluate.run.validator` makes."""

    def __init__(self, score: Callable[[VistaLLM], dict[str, float]]) -> None:
        self.score = score

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Log `val/...`; every process has the same scores."""
        pl_module.log_dict(self.score(pl_module.model), logger=False)  # MetricsFile hands them to the loggers


class MetricsFile(Callback):
    """Appends the module's report to metrics.csv, hands it to the loggers and prints it every `print_every` seconds.

    `seconds` is the wall time of the step and `wait` the part of it spent waiting for the loader, both in seconds;
    losses (those that are optimised; under stage=rl those of the replay), `samples`, `tokens` and `rejects` are over
    all ranks; `skipped` is 1 where the gradient was not finite. A row is written when the next step has ended, or
    before a checkpoint, so that no step waits for the device. On resume, rows after the checkpoint's step are dropped.
    """

    def __init__(self, path: Path, print_every: float) -> None:
        self.path, self.print_every = path, print_every
        self._clock = self._ready = self._printed = 0.0
        self._closed: dict[str, Any] | None = None  # the step whose report is still to be read
        self._step = self._start = 0
        self._waiting: list[dict[str, Any]] = []
        self._columns = list(COLUMNS)

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Keep the rows up to the step that the run resumes from, then start the clock of the first step."""
        # Not in on_fit_start: Lightning restores the step count after it.
        self._step = self._start = trainer.global_step
        if trainer.is_global_zero:
            rows = read_metrics(self.path)
            kept = [row for row in rows if int(row["step"]) <= self._step]
            columns = COLUMNS + ([column for column in rows[0] if column not in COLUMNS] if rows else [])
            if len(kept) < len(rows) or (rows and list(rows[0]) != columns):
                self._rewrite(kept, columns)
            self._columns = columns
        self._clock = self._began = self._printed = time.perf_counter()

    def on_train_batch_start(self, *_: Any, **__: Any) -> None:
        """The loader has delivered."""
        self._ready = time.perf_counter()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any, **__: Any) -> None:
        """Write the row of the step before this one."""
        if trainer.global_step > self._step:
            self._write_closed(trainer, pl_module)
            now, self._step, wait = time.perf_counter(), trainer.global_step, round(self._ready - self._clock, 5)
            self._closed = {"step": self._step, "seconds": round(now - self._clock, 5), "wait": wait}
            self._clock = now

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Write the row of the step that is saved: a run that resumes here has no other."""
        self._write_closed(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Write the last row."""
        self._write_closed(trainer, pl_module)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Write the scores of a validation pass as a row of the current step."""
        self._write_closed(trainer, pl_module)
        values = {k: round(float(v), 6) for k, v in trainer.callback_metrics.items() if k.startswith(("val_", "val/"))}
        self._write(trainer, {"step": trainer.global_step, **values})
        self._clock = time.perf_counter()

    def _write_closed(self, trainer: L.Trainer, pl_module: Any) -> None:
        if self._closed is None:
            return
        row, self._closed = self._closed, None
        report = pl_module.read_report()
        row |= {key: round(value, 6) if key != "lr" else value for key, value in report.items()}
        self._write(trainer, row)
        if trainer.is_global_zero and self._clock - self._printed >= self.print_every:
            self._printed = self._clock
            left = (trainer.max_steps - row["step"]) * (self._clock - self._began) / (row["step"] - self._start)
            rate = row["samples"] / row["seconds"]
            name = "reinforce/reward" if "reinforce/reward" in row else "loss"
            value = f"{name.rpartition('/')[2]} {row[name]:.4f}"
            text = f"step {row['step']} of {trainer.max_steps}, {value}, {rate:.1f} samples/s"
            print(f"{text}, {timedelta(seconds=round(left))} left", flush=True)

    def _write(self, trainer: L.Trainer, row: dict[str, Any]) -> None:
        if trainer.is_global_zero:
            self._append(row)
            for logger in trainer.loggers:
                logger.log_metrics({k: v for k, v in row.items() if k != "step"}, step=row["step"])

    def _rewrite(self, rows: list[dict[str, str]], columns: list[str]) -> None:
        """Write the file again, whole or not at all: a kill here must not lose the curve."""
        rewritten = self.path.with_suffix(".tmp")
        with rewritten.open("w", newline="") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(rows)
        rewritten.replace(self.path)
        self._columns = columns

    def _append(self, row: dict[str, Any]) -> None:
        """Append a row, which on a full disk waits in memory for the next one."""
        self._waiting.append(row)
        end = self.path.stat().st_size if self.path.exists() else 0
        try:
            if added := [column for column in row if column not in self._columns]:  # scores, facts of stage=rl
                self._rewrite(read_metrics(self.path), self._columns + added)
                end = self.path.stat().st_size
            with self.path.open("a", newline="") as file:
                writer = csv.DictWriter(file, self._columns)
                if end == 0:
                    writer.writeheader()
                writer.writerows(self._waiting)
            self._waiting.clear()
        except OSError as error:
            with contextlib.suppress(OSError):
                os.truncate(self.path, end)  # no half row
            if len(self._waiting) == 1:
                print(f"{self.path}: {error}; rows wait in memory until there is room", flush=True)


def read_metrics(path: Path) -> list[dict[str, str]]:
    """Return the rows of a metrics.csv, an empty list when there is none; raises ValueError for other columns."""
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        rows = list(reader)
    # Columns may have been added since (a task, a fact): missing ones are empty, unknown ones are another program's.
    if any(name not in COLUMNS and not name.startswith(("val/", "reinforce/")) for name in reader.fieldnames or ()):
        raise ValueError(f"{path}: columns of another version; move the run folder away or choose another run_dir=")
    return rows


class Checkpoints(ModelCheckpoint):
    """Saves `step-<n>.ckpt` every few steps and when training ends; the newest `keep` of the former stay.

    Lightning's own `save_last` writes a second file at every save, and none at the end of training.
    """

    def __init__(self, folder: Path, every_n_steps: int, keep: int) -> None:
        name: dict[str, Any] = {"filename": "step-{step:06d}", "auto_insert_metric_name": False}
        newest: dict[str, Any] = {"monitor": "step", "mode": "max", "save_top_k": keep}
        super().__init__(folder, every_n_train_steps=every_n_steps, **name, **newest)

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Save unless the checkpoint of this very step has been written.

        The first rank looks for all: a slower one would find the file that the first is writing, and leave the run.
        """
        path = self.format_checkpoint_name({"step": torch.tensor(trainer.global_step)})
        if not self.file_exists(path, trainer):
            trainer.save_checkpoint(path)


class StopAtSignal(Callback):
    """Ends training soon after any rank has received one of SIGNALS.

    A queue sends one before it takes the machine away, a user presses Ctrl-C. All ranks finish the same step, write the
    checkpoint, and `train.py` exits with PREEMPTED, upon which tools/slurm/*.sbatch puts the job back into the queue;
    `resume=auto` then goes on at the same sample. A second Ctrl-C ends the run at once.
    """

    def __init__(self) -> None:
        self._module, self._former = cast(Any, None), dict[int, Any]()

    def on_fit_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Take over the signals before the loader's workers are forked: SLURM signals them too, and they would die."""
        self._module = pl_module
        self._former = {number: signal.signal(number, self._ask) for number in SIGNALS}

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Take them from Lightning, which has set its own for SIGTERM since and would raise without a checkpoint."""
        for number in SIGNALS:
            signal.signal(number, self._ask)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self._module.stop and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._module.stop = True

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any, **__: Any) -> None:
        """Stop at the end of a whole step whose report says that a rank was asked, the same one on all ranks."""
        if pl_module.stop_seen and not trainer.fit_loop._should_accumulate():
            trainer.should_stop = True
            trainer.limit_val_batches = 0  # Lightning would validate before it stops, and the time is short

    def teardown(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        """Give the signals back."""
        for number, handler in self._former.items():
            signal.signal(number, handler)
        self._former.clear()
