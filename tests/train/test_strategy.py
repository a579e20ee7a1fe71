"""Two processes on the CPU (gloo), started as a user starts them: `python train.py trainer.devices=2 strategy=...`."""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import pytest
import torch

from vistallm.config import load_config
from vistallm.data.stream import RejectLog
from vistallm.train.callbacks import read_metrics
from vistallm.train.checkpoint import load_run, newest_checkpoint
from vistallm.train.optim import build_optimizer
from vistallm.train.run import build

ROOT = Path(__file__).parents[2]
STEPS = ["trainer.max_steps=2", "checkpoint.every_n_steps=1", "checkpoint.keep=2", "trainer.accelerator=cpu"]


def launch(words, run_dir):
    words = [*words, f"run_dir={run_dir}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "train.py", *words], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240
    )


@pytest.fixture(scope="module")
def words(tiny_words, mini_root):
    return ["model=mini", "data=mini", *tiny_words, *STEPS, f"data.root={mini_root}"]


@pytest.fixture(scope="module")
def both_ranks(words, mini_root):
    """Two steps in one process over both ranks' batches, gradients averaged over the ranks: a plain loop."""
    config = load_config(words)
    L.seed_everything(config.seed, verbose=False)
    module, data = build(config, mini_root)
    model, optimizer, scheduler = module.model, *build_optimizer(module.model, config.train, 2)
    streams = [data.stream(rank, world_size=2, workers=0, rejects=RejectLog(None, 1.0)) for rank in range(2)]
    rows = []
    for batches in islice(zip(*streams, strict=True), 2):
        losses = [model(batch).loss for batch in batches]
        optimizer.zero_grad()
        (sum(losses) / 2).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.train.gradient_clip)
        optimizer.step()
        scheduler.step()
        rows.append({"loss": losses[0].item(), "grad_norm": norm.item()})
    assert rows[0]["grad_norm"] > 1.2 * config.train.gradient_clip, "clipping must have had something to do"
    return SimpleNamespace(rows=rows, weights={n: p.detach() for n, p in model.named_parameters()})


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_take_the_steps_of_one(strategy, words, tmp_path, both_ranks):
    run_dir = tmp_path / strategy
    two = [*words, f"strategy={strategy}", "trainer.devices=2"]
    done = launch(two, run_dir)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    rows = read_metrics(run_dir / "metrics.csv")
    assert [row["step"] for row in rows] == ["1", "2"]
    for row, expected in zip(rows, both_ranks.rows, strict=True):
        assert float(row["loss"]) == pytest.approx(expected["loss"], rel=1e-4), "of rank 0's own batch"
        assert float(row["grad_norm"]) == pytest.approx(expected["grad_norm"], rel=1e-3), "of the mean gradient"
    model, _, path = load_run(str(run_dir))
    assert path == newest_checkpoint(run_dir)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.detach(), both_ranks.weights[name], rtol=1e-3, atol=1e-4, msg=name)
    if strategy == "fsdp":
        path.unlink()
        done = launch(two, run_dir)
        assert f"resuming from {run_dir}/checkpoints/step-000001.ckpt" in done.stdout, done.stderr[-5000:]
        for row, again in zip(rows, read_metrics(run_dir / "metrics.csv"), strict=True):
            assert {**again, "seconds": "", "wait": ""} == {**row, "seconds": "", "wait": ""}
