"""Runs of a few steps, in this process."""

from __future__ import annotations

from types import SimpleNamespace

import pytest


@pytest.fixture(scope="session")
def train_tiny(tiny_config):
    """Callable: run folder and words -> the run's metrics rows, as numbers (`None` = nothing written)."""
    from vistallm.train.callbacks import read_metrics
    from vistallm.train.run import train

    def run(run_dir, *words):
        config = tiny_config(f"run_dir={run_dir}", *words)
        train(config)
        rows = [{k: float(v) if v else None for k, v in row.items()} for row in read_metrics(run_dir / "metrics.csv")]
        return SimpleNamespace(rows=rows, losses=[row["loss"] for row in rows], dir=run_dir, config=config)

    return run


@pytest.fixture(scope="session")
def stage_one(train_tiny, tmp_path_factory):
    """An unbroken run of six steps with a checkpoint after three."""
    folder = tmp_path_factory.mktemp("runs") / "one"
    return train_tiny(folder, "trainer.max_steps=6", "checkpoint.every_n_steps=3", "checkpoint.keep=5")
