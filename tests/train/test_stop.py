"""Runs that are stopped, locked out or refused: one line each, and nothing is lost."""

from __future__ import annotations

import fcntl
import os
import re
import signal
from types import SimpleNamespace

import pytest
import torch

from vistallm.config import load_config
from vistallm.model.checkpoint import newest_checkpoint
from vistallm.train.callbacks import Checkpoints, Preempted, read_metrics
from vistallm.train.module import VistaModule
from vistallm.train.run import train

WORDS = ["trainer.max_steps=6", "checkpoint.every_n_steps=3", "checkpoint.keep=5"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_any_signal_ends_with_a_checkpoint_and_the_run_goes_on_as_unbroken(
    number, stage_one, train_tiny, tiny_config, tmp_path, monkeypatch
):
    plain = VistaModule.training_step

    def signalled(self, batch, batch_idx):
        if self.global_step == 3:
            os.kill(os.getpid(), number)
        return plain(self, batch, batch_idx)

    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        patch.setattr(VistaModule, "training_step", signalled)
        with pytest.raises(Preempted, match=r"stopped by a signal at step 5; start it again to go on") as stop:
            train(tiny_config(f"run_dir={tmp_path}", *WORDS))
    assert "\n" not in str(stop.value)
    assert signal.getsignal(number) == before
    assert newest_checkpoint(tmp_path).name == "step-000005.ckpt"
    assert len(read_metrics(tmp_path / "metrics.csv")) == 5
    assert train_tiny(tmp_path, *WORDS).losses == stage_one.losses


def test_a_second_interrupt_ends_the_run_at_once(tiny_config, tmp_path, monkeypatch):
    def signalled(self, batch, batch_idx):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("not reached")

    monkeypatch.setattr(VistaModule, "training_step", signalled)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        train(tiny_config(f"run_dir={tmp_path}", *WORDS))
    assert newest_checkpoint(tmp_path) is None


def test_one_run_per_folder(tiny_config, train_tiny, tmp_path):
    with (tmp_path / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match=rf"run_dir={tmp_path}: another process trains there"):
            train(tiny_config(f"run_dir={tmp_path}", *WORDS))
    train_tiny(tmp_path, "trainer.max_steps=1")


def test_a_run_folder_that_can_not_be_written(tiny_config, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"run_dir=.*: can't be written .*; choose another folder") as error:
        train(tiny_config(f"run_dir={tmp_path / 'file' / 'run'}"))
    assert "\n" not in str(error.value)


def test_a_missing_logger_is_named_before_anything_is_built(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"log\.wandb=true: the package wandb is not installed"):
        train(load_config(["log.wandb=true", "data.root=/nowhere"]))


@pytest.mark.parametrize(
    "word",
    ["train.lr=-1", "data.batch_size=0", "train.lr=nan", "data.workers=-1", "checkpoint.every_n_steps=0", "points=2"],
)
def test_numbers_out_of_range_are_refused_before_anything_is_built(word):
    key, value = word.split("=")
    with pytest.raises(ValueError, match=rf"{re.escape(key)}={value}.*: expected at least"):
        load_config([word])


def test_without_a_terminal_a_line_says_how_far_it_is(train_tiny, tmp_path, capsys):
    train_tiny(tmp_path, "trainer.max_steps=4", "log.every_n_seconds=0")
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert len(lines) == 4
    assert re.fullmatch(r"step 3 of 4, loss \d\.\d{4}, \d+\.\d samples/s, 0:\d\d:\d\d left", lines[2]), lines
    assert lines[3].endswith("0:00:00 left")


def test_dropout_differs_between_ranks_and_not_after_a_resume(train_tiny, tiny_config, tiny_model, tmp_path):
    def draw(rank, ready):
        module = VistaModule(tiny_model, tiny_config(), 1)
        total = SimpleNamespace(total=SimpleNamespace(ready=ready))
        loop = SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=total))
        module._trainer = SimpleNamespace(fit_loop=loop, world_size=2, global_rank=rank)
        module.on_train_batch_start(None, 0)
        return torch.rand(1000)

    draws = [draw(rank, ready) for rank in (0, 1) for ready in (1, 2)]
    assert all(abs(torch.corrcoef(torch.stack(draws))[i, j]) < 0.1 for i in range(4) for j in range(i))
    words = [*WORDS, "model.tokenizer.dropout=0.3"]
    whole = train_tiny(tmp_path / "whole", *words)
    path = whole.dir / "checkpoints" / "step-000003.ckpt"
    assert train_tiny(tmp_path / "rest", *words, f"resume={path}").losses == whole.losses[3:]


def test_a_slow_rank_saves_with_the_first_one_whose_file_it_finds(tmp_path):
    """Saving ends in a barrier: a rank that left it out would leave the run, and the first would wait for it."""
    (tmp_path / "step-000005.ckpt").write_bytes(b"being written by the first rank")
    saved, strategy = [], SimpleNamespace(reduce_boolean_decision=lambda decision, all: decision)
    trainer = SimpleNamespace(global_step=5, is_global_zero=False, strategy=strategy, save_checkpoint=saved.append)
    callback = Checkpoints(tmp_path, 3, 2)
    callback.on_train_end(trainer, None)
    assert len(saved) == 1
    trainer.is_global_zero = True
    callback.on_train_end(trainer, None)
    assert len(saved) == 1, "the first rank's own file is of this step"
