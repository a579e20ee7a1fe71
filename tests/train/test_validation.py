"""Scores of generated answers while a run trains, and the checkpoint that is best by one of them."""

from __future__ import annotations

import math
import runpy
from pathlib import Path

import pytest

from vistallm.evaluate.run import validator
from vistallm.model.checkpoint import load_run, newest_checkpoint
from vistallm.train.callbacks import read_metrics
from vistallm.train.run import train

launch = runpy.run_path(str(Path(__file__).with_name("ranks.py")))["launch"]
WORDS = ["trainer.max_steps=6", "checkpoint.every_n_steps=3", "checkpoint.keep=5", "decode.max_new_tokens=40"]
SCORED = ["trainer.val_check_interval=2", "val.benchmarks=[mini_res,mini_gres,mini_pope]", "val.samples=6"]


def scores(run_dir):
    rows = read_metrics(run_dir / "metrics.csv")
    return {int(row["step"]): {k: float(v) for k, v in row.items() if k.startswith("val/") and v} for row in rows}


def test_scores_are_logged_and_the_best_weights_stay(stage_one, tiny_config, mini_root, tmp_path):
    config = tiny_config(f"run_dir={tmp_path}", *WORDS, *SCORED, "checkpoint.best=val/pope_accuracy")
    train(config, validator)
    rows = read_metrics(tmp_path / "metrics.csv")
    found = {step: row for step, row in scores(tmp_path).items() if row}
    assert list(found) == [2, 4, 6]
    assert {"val/res_ciou", "val/res_miou", "val/gres_giou", "val/gres_n_acc", "val/pope_accuracy"} <= set(found[2])
    assert [float(row["loss"]) for row in rows if row["loss"]] == stage_one.losses, "validation changes no step"
    assert newest_checkpoint(tmp_path).name == "step-000006.ckpt", "resume=auto takes the newest"
    model, _, path = load_run(tmp_path / "checkpoints" / "best.ckpt")
    assert path.name == "best.ckpt"
    best = max(found.values(), key=lambda row: row["val/pope_accuracy"])  # the first of equal ones, as Lightning keeps
    assert validator(config, mini_root)(model) == pytest.approx(best, abs=1e-6)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["val.benchmarks=[mini_res]"], r"expected trainer\.val_check_interval=N, too"),
        (["checkpoint.best=val_loss"], r"expected trainer\.val_check_interval=N, too"),
        (["checkpoint.best=val/res_ciou", SCORED[0]], r"checkpoint\.best=val/res_ciou: expected val\.benchmarks"),
        ([SCORED[0], "val.benchmarks=[mini_rex]"], r"benchmark 'mini_rex': .*nearest: mini_re"),
        ([SCORED[0], "val.benchmarks=[refcoco_val_res]"], r"index\.json"),
    ],
)
def test_settings_are_refused_before_anything_is_built(words, said, tiny_config, tmp_path):
    with pytest.raises(ValueError, match=said):
        train(tiny_config(f"run_dir={tmp_path / 'run'}", *words), validator)
    assert not (tmp_path / "run").exists()


def test_a_score_that_no_benchmark_gives_is_named(tiny_config, tmp_path):
    with pytest.raises(ValueError, match=r"checkpoint\.best: .*val/res_iou.*val/res_ciou"):
        train(tiny_config(f"run_dir={tmp_path}", *WORDS, *SCORED, "checkpoint.best=val/res_iou"), validator)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", [["strategy=ddp"], ["strategy=fsdp", "checkpoint.sharded=true"]])
def test_two_processes_score_their_shares_and_train_on(strategy, tiny_config, tiny_words, mini_root, tmp_path):
    """The steps after a pass are those of a run without one; scores are those of the checkpoint in one process."""
    words = ["model=mini", "data=mini", *tiny_words, f"data.root={mini_root}", "trainer.accelerator=cpu", *strategy]
    words += [*WORDS, "trainer.devices=2", "data.batch_size=2", "train.lr=1e-2"]
    scored = [*SCORED, "checkpoint.best=val_loss"]
    todo = {"plain": words, "scored": [*words, *scored]}
    launch([[*run, f"run_dir={tmp_path / name}"] for name, run in todo.items()], 2, tmp_path)
    plain, rows = (read_metrics(tmp_path / name / "metrics.csv") for name in todo)
    losses = [float(row["loss"]) for row in rows if row["loss"]]
    assert losses == pytest.approx([float(row["loss"]) for row in plain], rel=1e-6)
    found = {step: row for step, row in scores(tmp_path / "scored").items() if row}
    assert all(math.isfinite(value) for row in found.values() for value in row.values())
    model = load_run(newest_checkpoint(tmp_path / "scored"))[0]
    own = [word for word in words if not word.startswith(("model=", "data=", "trainer.", "checkpoint."))]
    assert validator(tiny_config(*own, *SCORED, "strategy=auto"), mini_root)(model) == pytest.approx(found[6], abs=1e-6)
    assert load_run(tmp_path / "scored" / "checkpoints" / "best.ckpt")[2].name == "best.ckpt"
