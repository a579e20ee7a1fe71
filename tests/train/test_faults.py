"""Faults injected into real runs of `train`: each is a counted reject or a clear stop."""

from __future__ import annotations

import csv
import json
import resource
import shutil
import zlib

import cv2
import numpy as np
import pytest

from vistallm.coinit.shards import read_shard, write_index, write_shard
from vistallm.model.vistallm import VistaLLM
from vistallm.schema import ImageInfo
from vistallm.tasks import TASKS
from vistallm.train.module import VistaModule

ANY = ["data.max_reject_share=1.0", "trainer.max_steps=9"]  # 36 samples: more than an epoch


@pytest.fixture
def damaged(mini_root, tmp_path):
    """A mini set of two shards whose second was damaged after its index was written: one fault beside the other."""
    samples = [pair for name in ("train-000000.tar", "train-000001.tar") for pair in read_shard(mini_root / name)]
    samples = [pair for pair in samples if not TASKS[pair[0].task].multi_image]
    samples = samples[: len(samples) // 2 * 2]
    half = len(samples) // 2
    root = tmp_path / "shards"
    root.mkdir()
    rows = []
    for number, (sample, images) in enumerate(samples):
        files = [(data, info.file.rpartition(".")[2]) for data, info in zip(images, sample.images, strict=True)]
        if number == half + 3:
            sample.answer = "ten thousand " * 5_000
        if number == half + 4:  # a small file that says it has a billion pixels
            sample.images = [ImageInfo("0.png", 30_000, 30_000)]
            files = [(bomb(), "png")]
        if number == half + 5:
            files[0] = (files[0][0][: len(files[0][0]) // 8], files[0][1])  # cut in its header
        if number == half + 9:
            known, sample.task = sample.task, "dance"
        rows.append((sample, files))
    shards = dict(write_shard(root, "train", i, rows[half * i : half * i + half]) for i in range(2))
    tasks = shards["train-000001.tar"]["tasks"]
    tasks[known] = tasks.get(known, 0) + tasks.pop("dance")  # an index that names it is refused before the run
    write_index(root, shards)
    return root


def bomb():
    data = bytearray(cv2.imencode(".png", np.zeros((8, 8), np.uint8))[1].tobytes())
    data[16:24] = (30_000).to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(bytes(data[12:29])).to_bytes(4, "big")
    return bytes(data)


def rejects(run):
    return [json.loads(line) for line in (run / "rejects.jsonl").read_text().splitlines()]


def test_faults_of_samples_and_shards_are_counted_and_the_run_goes_on(train_tiny, damaged, tmp_path):
    path = damaged / "train-000001.tar"
    data = bytearray(path.read_bytes())
    keys = [f"train-000001-{place:05d}" for place in range(17)]
    at = data.index(f"{keys[6]}.json".encode())
    data[at + 512] ^= 0xFF  # a flipped byte in a record
    at = data.index(f"{keys[7]}.0.".encode())
    data[at : at + 20] = b"../../../tmp/evil.sh"
    data[at + 148 : at + 156] = b"%06o\0 " % (sum(data[at : at + 148]) + 8 * 32 + sum(data[at + 156 : at + 512]))
    at = data.index(f"{keys[8]}.0.".encode())
    data[at + 512 + int(data[at + 124 : at + 135], 8) // 2] ^= 1  # a flipped bit in the middle of an image
    path.write_bytes(data[: data.index(f"{keys[10]}.json".encode()) + 300])
    run = train_tiny(tmp_path / "run", f"data.root={damaged}", *ANY)
    found = {(line["key"], line["reason"]) for line in rejects(run.dir)}
    assert {
        (keys[3], "too-long"),
        (keys[4], "too-many-pixels"),
        (keys[5], "bad-image"),
        (keys[6], "bad-json"),
        (keys[7], "missing-image"),
        (keys[8], "checksum"),
        (keys[9], "unknown-task"),
        ("", "missing-sample"),
        ("", "changed-shard"),
    } <= found
    assert any(reason == "bad-member" for _, reason in found)
    assert all(line["shard"] == str(path) for line in rejects(run.dir))
    assert [row["step"] for row in run.rows] == list(range(1, 10))
    assert sum(row["rejects"] for row in run.rows) <= len(rejects(run.dir))
    assert sum(row["rejects"] for row in run.rows) >= 6


def test_too_many_rejects_stop_the_run_with_advice(train_tiny, mini_root, tmp_path):
    shutil.copytree(mini_root, tmp_path / "mini")
    for path in sorted((tmp_path / "mini").glob("train-*.tar"))[:9]:
        path.write_bytes(path.read_bytes()[:15_000])
    with pytest.raises(ValueError, match=r"samples rejected.*missing-sample.*max_reject_share.*check DIR"):
        train_tiny(tmp_path / "run", f"data.root={tmp_path / 'mini'}", "trainer.max_steps=60", "data.workers=1")


def test_a_shard_replaced_under_a_running_job(train_tiny, mini_root, tmp_path, monkeypatch):
    """The file changes after the first step: what the index promised and is gone is counted, the run goes on."""
    root = tmp_path / "mini"
    shutil.copytree(mini_root, root)
    plain = VistaModule.training_step

    def replacing(self, batch, batch_idx):
        if self.global_step == 1:
            for path in sorted(root.glob("train-*.tar"))[::2]:
                shutil.copy(mini_root / "test-000000.tar", path.with_suffix(".new"))
                path.with_suffix(".new").replace(path)
        return plain(self, batch, batch_idx)

    monkeypatch.setattr(VistaModule, "training_step", replacing)
    words = ["data.max_reject_share=1.0", "data.mix_shards=2", "data.shuffle_buffer=34", "trainer.max_steps=20"]
    run = train_tiny(tmp_path / "run", f"data.root={root}", *words)
    assert "changed-shard" in {line["reason"] for line in rejects(run.dir)}
    assert len(run.rows) == 20


def test_a_full_disk_while_logging(train_tiny, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    for name in ("metrics.csv", "rejects.jsonl"):
        (tmp_path / "run" / name).symlink_to("/dev/full")
    run = train_tiny(tmp_path / "run", "data.max_length=60", "data.max_reject_share=1.0", "trainer.max_steps=3")
    said = capsys.readouterr().out
    assert said.count("metrics.csv: [Errno 28]") == said.count("rejects.jsonl: [Errno 28]") == 1
    assert (run.dir / "checkpoints" / "step-000003.ckpt").is_file()


def test_a_full_disk_while_writing_a_checkpoint(train_tiny, stage_one, tmp_path, monkeypatch):
    """From the fifth step on no file may outgrow 1 MB: the run stops with advice, and with room goes on as unbroken."""
    words = ["trainer.max_steps=6", "checkpoint.every_n_steps=3", "checkpoint.keep=5"]
    plain, limits = VistaModule.training_step, resource.getrlimit(resource.RLIMIT_FSIZE)

    def filling(self, batch, batch_idx):
        if self.global_step == 4:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
        return plain(self, batch, batch_idx)

    monkeypatch.setattr(VistaModule, "training_step", filling)
    try:
        with pytest.raises(ValueError, match=r"File too large; make room in .*run, then start it again"):
            train_tiny(tmp_path / "run", *words)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        monkeypatch.undo()
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-000003.ckpt"]
    assert train_tiny(tmp_path / "run", *words).losses == stage_one.losses


def test_rows_that_waited_are_written_when_there_is_room(tmp_path):
    from vistallm.train.callbacks import MetricsFile, read_metrics

    path = tmp_path / "metrics.csv"
    path.symlink_to("/dev/full")
    file = MetricsFile(path, 30.0)
    file._append({"step": 1, "loss": 2.0})
    path.unlink()
    file._append({"step": 2, "loss": 1.0})
    assert [(row["step"], row["loss"]) for row in read_metrics(path)] == [("1", "2.0"), ("2", "1.0")]


def test_old_columns_can_be_read(tmp_path, stage_one, train_tiny):
    from vistallm.train.callbacks import read_metrics

    shutil.copytree(stage_one.dir, tmp_path / "run")
    path = tmp_path / "run" / "metrics.csv"
    rows = read_metrics(path)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["step", "loss"], extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    longer = train_tiny(tmp_path / "run", "trainer.max_steps=7", "checkpoint.every_n_steps=3", "checkpoint.keep=5")
    assert [row["step"] for row in longer.rows] == list(range(1, 8))
    assert longer.losses[:6] == stage_one.losses


@pytest.mark.parametrize("bad", [[2, 4, 5], [2, 3, 4]])
def test_a_step_that_is_not_finite_is_skipped_and_the_third_in_a_row_stops(train_tiny, tmp_path, monkeypatch, bad):
    calls, plain = [0], VistaLLM.forward

    def poisoned(self, batch):
        output = plain(self, batch)
        calls[0] += 1
        if calls[0] in bad:
            output.token_loss = output.token_loss * float("nan")
        return output

    monkeypatch.setattr(VistaLLM, "forward", poisoned)
    words = ["trainer.max_steps=6", "checkpoint.every_n_steps=1", "checkpoint.keep=9"]
    if bad == [2, 3, 4]:
        with pytest.raises(ValueError, match=r"step 4: the gradient was not finite 3 times.*nonfinite\.jsonl"):
            train_tiny(tmp_path / "run", *words)
    else:
        run = train_tiny(tmp_path / "run", *words)
        assert [row["skipped"] for row in run.rows] == [0, 1, 0, 1, 1, 0]
        from vistallm.model.checkpoint import read_state

        one, two, three = (read_state(run.dir / "checkpoints" / f"step-00000{i}.ckpt") for i in (1, 2, 3))
        assert all((one[key] == two[key]).all() for key in one), "skipped"
        assert any((two[key] != three[key]).any() for key in one)
    lines = [json.loads(line) for line in (tmp_path / "run" / "nonfinite.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == bad
    assert all(len(line["ids"]) == 4 for line in lines)
