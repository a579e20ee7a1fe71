"""SIGTERM or SIGUSR1 in, a checkpoint and a clean end out: what a queue sends before it takes the machine away.

The step in progress is finished on every rank, the checkpoint written, and `train.py` exits with PREEMPTED, upon which
tools/slurm/*.sbatch puts the job back into the queue; `resume=auto` then goes on at the same sample.
"""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback

PREEMPTED = 75  # EX_TEMPFAIL of sysexits.h: try again later
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Preempted(Exception):
    """Training stopped at a signal after writing its checkpoint; it is to be started again."""


class StopAtSignal(Callback):
    """Ends training after the step in which any rank has received one of SIGNALS; `stopped` says that it did."""

    def __init__(self) -> None:
        self.asked = self.stopped = False
        self._former: dict[int, Any] = {}

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take over the signals before the loader's workers are forked: SLURM signals them too, and they would die."""
        for number in SIGNALS:
            self._former[number] = signal.signal(number, self._ask)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take them from Lightning, which has set its own for SIGTERM since and would raise without a checkpoint."""
        for number in SIGNALS:
            signal.signal(number, self._ask)

    def _ask(self, number: int, letterbox: FrameType | None) -> None:
        self.asked = True

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop on all ranks at the same step; a step in the middle of gradient accumulation is finished first."""
        if trainer.fit_loop._should_accumulate():
            return
        if trainer.strategy.reduce_boolean_decision(self.asked, all=False):
            self.stopped = trainer.should_stop = True
            trainer.limit_val_batches = 0  # Lightning would validate before it stops, and the time is short

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Give the signals back."""
        for number, handler in self._former.items():
            signal.signal(number, handler)
        self._former.clear()
