from __future__ import annotations

import csv
import json
import re
import shutil

import pytest
import torch

from vistallm.config import config_from_file
from vistallm.model.checkpoint import find_checkpoint, load_run
from vistallm.train.callbacks import COLUMNS
from vistallm.train.run import train

# rows equal apart from the clock
FIXED = [c for c in COLUMNS if c not in ("seconds", "wait")]


def facts(rows):
    return [{k: row[k] for k in FIXED} for row in rows]


def test_run_folder(stage_one):
    assert config_from_file(stage_one.dir / "config.yaml").seed == 0
    assert sorted(p.name for p in (stage_one.dir / "checkpoints").iterdir()) == ["step-000003.ckpt", "step-000006.ckpt"]
    assert (stage_one.dir / "vocabulary" / "vocabulary.json").is_file()
    with (stage_one.dir / "metrics.csv").open() as file:
        assert next(csv.reader(file)) == COLUMNS
    for number, row in enumerate(stage_one.rows, 1):
        assert row["step"] == number
        assert row["samples"] == 4
        assert row["tokens"] > 0
        assert row["seconds"] >= row["wait"] >= 0
        assert 0 <= row["padding"] < 1
        assert row["grad_norm"] > 0
        tasks = {k: v for k, v in row.items() if k.startswith("loss/") and v is not None}
        assert 1 <= len(tasks) <= 4
        assert min(tasks.values()) - 1e-5 <= row["loss"] <= max(tasks.values()) + 1e-5
    assert [row["lr"] for row in stage_one.rows] == sorted((row["lr"] for row in stage_one.rows), reverse=True)


def test_same_seed_same_losses_other_seed_other_losses(stage_one, train_tiny, tmp_path):
    words = ["trainer.max_steps=6", "checkpoint.every_n_steps=3"]
    assert facts(train_tiny(tmp_path / "again", *words).rows) == facts(stage_one.rows)
    assert train_tiny(tmp_path / "other", *words, "seed=1").losses != stage_one.losses


@pytest.mark.parametrize("workers", [0, 1])
def test_resume_in_mid_epoch_continues_bit_for_bit(stage_one, train_tiny, tmp_path, workers):
    """3 steps + checkpoint + 3 steps = 6 steps unbroken: losses, norms, metrics.csv and final weights."""
    words = ["trainer.max_steps=6", "checkpoint.every_n_steps=3", "checkpoint.keep=5", f"data.workers={workers}"]
    whole = stage_one if workers == 0 else train_tiny(tmp_path / "whole", *words)
    if workers == 0:
        words[-1] = "data.workers=0"
    shutil.copytree(whole.dir, tmp_path / "broken")
    (tmp_path / "broken" / "checkpoints" / "step-000006.ckpt").unlink()
    resumed = train_tiny(tmp_path / "broken", *words)
    assert facts(resumed.rows) == facts(whole.rows)
    states = [torch.load(r.dir / "checkpoints" / "step-000006.ckpt", weights_only=True) for r in (whole, resumed)]
    for key, value in states[0]["state_dict"].items():
        assert torch.equal(value, states[1]["state_dict"][key]), key


def test_resume_across_an_epoch_edge_with_workers_that_read_ahead(train_tiny, tmp_path):
    """Epochs of 5 batches: the checkpoint lies before an edge that the workers have already read over."""
    words = ["data.weights.rec=1", "trainer.max_steps=8", "checkpoint.every_n_steps=4", "checkpoint.keep=5"]
    words += ["data.workers=2", "data.pool_batches=1"]
    whole = train_tiny(tmp_path / "whole", *words)
    path = whole.dir / "checkpoints" / "step-000004.ckpt"
    assert facts(train_tiny(tmp_path / "rest", *words, f"resume={path}").rows) == facts(whole.rows[4:])


def test_resume_from_a_named_checkpoint_into_another_folder(stage_one, train_tiny, tmp_path):
    path = stage_one.dir / "checkpoints" / "step-000003.ckpt"
    resumed = train_tiny(tmp_path / "b", "trainer.max_steps=6", f"resume={path}", "checkpoint.every_n_steps=3")
    assert facts(resumed.rows) == facts(stage_one.rows[3:])


def test_a_finished_run_can_be_made_longer(train_tiny, tmp_path):
    """The last checkpoint, written when training ends, knows its place in the data as well."""
    words = ["train.lr=0.0", "checkpoint.every_n_steps=100"]
    whole = train_tiny(tmp_path / "whole", *words, "trainer.max_steps=5")
    train_tiny(tmp_path / "longer", *words, "trainer.max_steps=2")
    assert facts(train_tiny(tmp_path / "longer", *words, "trainer.max_steps=5").rows) == facts(whole.rows)


def test_resume_refuses_another_data_order(stage_one, train_tiny, tmp_path):
    path = stage_one.dir / "checkpoints" / "step-000003.ckpt"
    with pytest.raises(ValueError, match=r"resume: the data order depends on batch_size 4 -> 2.*ckpt="):
        train_tiny(tmp_path / "b", "trainer.max_steps=6", f"resume={path}", "data.batch_size=2")


def test_a_finished_run_is_left_as_it_is(stage_one, train_tiny, tmp_path):
    shutil.copytree(stage_one.dir, tmp_path / "done")
    again = train_tiny(tmp_path / "done", "trainer.max_steps=6", "checkpoint.every_n_steps=3", "checkpoint.keep=5")
    assert facts(again.rows) == facts(stage_one.rows)


def test_starting_over_in_a_used_folder_leaves_no_old_checkpoint_behind(stage_one, train_tiny, tmp_path):
    shutil.copytree(stage_one.dir, tmp_path / "used")
    with pytest.raises(ValueError, match=r"step-000006\.ckpt.*resume=never"):
        train_tiny(tmp_path / "used", "trainer.max_steps=2", "resume=never")


def test_micro_batches_add_up(train_tiny, tmp_path):
    """One step over 2 micro-batches of 4: counts add, the loss is the mean over both batches' tokens."""
    run = train_tiny(tmp_path / "a", "trainer.max_steps=2", "trainer.accumulate_grad_batches=2", "train.lr=0.0")
    plain = train_tiny(tmp_path / "b", "trainer.max_steps=4", "train.lr=0.0")
    assert [row["step"] for row in run.rows] == [1, 2]
    for row, one, two in zip(run.rows, plain.rows[::2], plain.rows[1::2], strict=True):
        assert row["samples"] == one["samples"] + two["samples"] == 8
        assert row["tokens"] == one["tokens"] + two["tokens"]
        assert min(one["loss"], two["loss"]) <= row["loss"] <= max(one["loss"], two["loss"])


def test_resume_of_accumulated_steps(train_tiny, tmp_path):
    words = ["trainer.max_steps=4", "trainer.accumulate_grad_batches=2", "checkpoint.every_n_steps=2"]
    whole = train_tiny(tmp_path / "whole", *words)
    path = whole.dir / "checkpoints" / "step-000002.ckpt"
    assert facts(train_tiny(tmp_path / "rest", *words, f"resume={path}").rows) == facts(whole.rows[2:])


def test_validation_rows(train_tiny, tmp_path):
    run = train_tiny(tmp_path / "v", "trainer.max_steps=2", "trainer.val_check_interval=2", "data.val_batches=2")
    (row,) = [row for row in run.rows if row["val_loss"] is not None]
    assert row["step"] == 2
    assert 0 <= row["val_accuracy"] <= 1


def test_dry_run_trains_nothing(tiny_config, tmp_path, capsys):
    train(tiny_config(f"run_dir={tmp_path / 'dry'}", "dry_run=true"))
    said = capsys.readouterr().out
    assert "nothing was trained" in said
    assert re.search(r"\. +rec +\d+ +1 +\d+ +\d+\.\d%", said), said
    assert "left out (weight 0): .:attcoseg" in said
    assert "1 ranks x 1 workers, 1 lanes" in said
    assert re.search(r"\d tokens each .* padding \d+\.\d% of the batches' cells; rejects: none", said, re.DOTALL)
    for part in ("encoder    frozen", "tokenizer  trained", "decoder    full"):
        assert part in said
    assert not list((tmp_path / "dry").rglob("*.ckpt"))


def test_dry_run_of_sources_says_what_is_missing_and_how_ranks_share(tiny_config, mini_root, tmp_path, capsys):
    for source in ("refcoco+", "visual-genome"):
        (tmp_path / "root" / source).parent.mkdir(exist_ok=True)
        (tmp_path / "root" / source).symlink_to(mini_root)
    words = ["data.sources.refcoco+=1", "data.sources.visual-genome=0.5", "data.sources.vcr=1", "data.name=coinit"]
    words += [f"data.root={tmp_path / 'root'}", f"run_dir={tmp_path / 'dry'}", "trainer.devices=8", "data.workers=3"]
    train(tiny_config(*words, "dry_run=true"))
    said = capsys.readouterr().out
    assert "missing in" in said
    assert said.count("vcr") >= 3, "a source and a task"
    assert re.search(r"8 ranks x 3 workers, 24 lanes: (\d+) to (\d+) samples", said)
    with pytest.raises(ValueError, match="1 of 3 sources are missing: vcr"):
        train(tiny_config(*words))


def test_a_checkpoint_of_another_size_names_every_key(stage_one, train_tiny, tmp_path):
    start = [f"ckpt={stage_one.dir}", "trainer.max_steps=1"]
    with pytest.raises(ValueError, match="weights of another model") as error:
        train_tiny(tmp_path / "x", *start, "model.tokenizer.intermediate_size=32")
    said = "of another shape: tokenizer.qformer.encoder.layer.{0..1}.intermediate.dense.weight (64, 32) in the"
    assert said in str(error.value)
    with pytest.raises(ValueError, match=r"use the model=.*\n  unexpected: tokenizer\.qformer\.encoder\.layer\.1"):
        train_tiny(tmp_path / "x", *start, "model.tokenizer.layers=1")
    with pytest.raises(ValueError, match=r"another model.*model\.decoder\.hidden_size=32, it has 64\); use the model="):
        train_tiny(tmp_path / "x", *start, "model.decoder.hidden_size=32")


def test_resume_with_other_settings_names_every_key(stage_one, train_tiny, tmp_path):
    resume = [f"resume={stage_one.dir}/checkpoints/step-000003.ckpt", "trainer.max_steps=6"]
    for word, key in (("model.tokenizer.layers=1", "layer.1.attention"), ("train.decoder=frozen", "")):
        with pytest.raises(
            ValueError, match=r"step-000003\.ckpt: of a run with other model.*run_dir= with ckpt="
        ) as error:
            train_tiny(tmp_path / "x", *resume, word)
        assert key in str(error.value)


def test_a_folder_of_another_version_is_named(stage_one, train_tiny, tmp_path):
    run = shutil.copytree(stage_one.dir, tmp_path / "run")
    words = [f"ckpt={run}", "trainer.max_steps=1"]
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace("bin_sigma:", "bin_width:"))
    with pytest.raises(ValueError, match=r"config\.yaml, of another version\? .*: unknown key 'train\.bin_width'"):
        load_run(str(run))
    (run / "config.yaml").write_text("".join(line for line in config.splitlines(True) if "bin_sigma" not in line))
    assert load_run(str(run))[1].train.bin_sigma == 0.0, "a key that the older version did not have"
    facts = json.loads((run / "vocabulary" / "vocabulary.json").read_text())
    (run / "vocabulary" / "vocabulary.json").write_text(
        json.dumps({k: v for k, v in facts.items() if k != "bin_values"})
    )
    with pytest.raises(ValueError, match=r"vocabulary: cut short, or of another version \(.*bin_values"):
        train_tiny(tmp_path / "x", *words)


def test_a_folder_without_checkpoint(tmp_path):
    (tmp_path / "junk.ckpt").write_bytes(b"junk")
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(ValueError, match="found no checkpoint"):
        find_checkpoint(str(tmp_path))


def test_a_broken_checkpoint_file_is_one_line(stage_one, train_tiny, tmp_path):
    shutil.copytree(stage_one.dir, tmp_path / "run")
    for path in (tmp_path / "run" / "checkpoints").iterdir():
        path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match="not a readable checkpoint") as error:
        train_tiny(tmp_path / "x", f"ckpt={tmp_path / 'run'}", "trainer.max_steps=1")
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="not a readable checkpoint") as error:
        train_tiny(tmp_path / "run", "trainer.max_steps=6")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("trainer.strategy=ddp", r"trainer\.strategy.*own"),
        ("trainer.precision=16", r"trainer\.precision"),
        ("trainer.max_stepz=3", r"trainer\.max_stepz.*trainer\.max_steps"),
        ("trainer.accelerator=abacus", "abacus"),
        ("trainer.val_check_interval=2.5", r"trainer\.\*.*val_check_interval"),
    ],
)
def test_trainer_arguments_that_are_refused(train_tiny, tmp_path, word, said):
    with pytest.raises(ValueError, match=said):
        train_tiny(tmp_path / "x", word)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_stream_is_one_line_with_and_without_workers(train_tiny, mini_root, tmp_path, workers):
    shutil.copytree(mini_root, tmp_path / "mini")
    for path in (tmp_path / "mini").glob("train-*.tar"):
        path.write_bytes(b"x" * 2000)
    with pytest.raises(ValueError, match="not a readable tar") as error:
        train_tiny(tmp_path / "x", f"data.root={tmp_path / 'mini'}", "trainer.max_steps=2", f"data.workers={workers}")
    assert "\n" not in str(error.value)


def test_rejects_are_written_to_the_run_folder(train_tiny, mini_root, tmp_path):
    train_tiny(tmp_path / "x", "data.max_length=40", "data.max_reject_share=1.0", "trainer.max_steps=4")
    lines = [json.loads(line) for line in (tmp_path / "x" / "rejects.jsonl").read_text().splitlines()]
    assert lines
    assert {line["reason"] for line in lines} == {"too-long"}
