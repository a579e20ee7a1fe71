"""Evaluation by several processes: the files of one, of two, and of two that are killed again and again."""

import dataclasses
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from vistallm.config import save_config
from vistallm.evaluate import run as R
from vistallm.evaluate.benchmarks import load_benchmarks
from vistallm.evaluate.generate import Answerer, Pace, generate_predictions
from vistallm.evaluate.predictions import Faults

ROOT = Path(__file__).parents[2]
WORDS = ("decode.max_new_tokens=60", "decode.limit=2", "decode.batch_size=1")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_config, vocabulary):
    """A run folder of a random tiny model."""
    from vistallm.model.build import build_model

    torch.manual_seed(3)
    config, folder = tiny_config(*WORDS), tmp_path_factory.mktemp("run")
    model = build_model(config, vocabulary)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    save_config(config, folder / "config.yaml")
    vocabulary.save(folder / "vocabulary")
    (folder / "checkpoints").mkdir()
    state = {f"model.{key}": value for key, value in model.state_dict().items()}
    torch.save({"state_dict": state}, folder / "checkpoints" / "step-000001.ckpt")
    return folder


def words(folder, out, *more):
    return [f"ckpt={folder}", f"run_dir={out}", "trainer.accelerator=cpu", *more]


def start(folder, out, *more):
    command = [sys.executable, str(ROOT / "eval.py"), *words(folder, out, *more)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def files(out):
    return {name: (out / name).read_bytes() for name in ("predictions.jsonl", "scores.json")}


def test_a_run_goes_on_with_what_is_missing_and_never_mixes_settings(folder, tmp_path, monkeypatch):
    assert R.run(words(folder, tmp_path / "whole")) == 0
    assert not (tmp_path / "whole" / "parts").exists()
    answer, asked = Answerer.answer_unit, []

    def counted(self, unit, rejects):
        if len(asked) == 12:
            raise KeyboardInterrupt
        asked.append((unit.benchmark.name, unit.number))
        return answer(self, unit, rejects)

    monkeypatch.setattr(Answerer, "answer_unit", counted)
    with pytest.raises(KeyboardInterrupt):
        R.run(words(folder, tmp_path / "cut"))
    (part,) = (tmp_path / "cut" / "parts").iterdir()
    part.write_bytes(part.read_bytes()[:-7])  # the last line is cut, too
    first, asked[:] = list(asked), []
    content = part.read_bytes()

    def noted(self, unit, rejects):
        asked.append((unit.benchmark.name, unit.number))
        return answer(self, unit, rejects)

    monkeypatch.setattr(Answerer, "answer_unit", noted)
    assert R.run(words(folder, tmp_path / "cut")) == 0
    assert set(asked) & set(first) == {first[-1]}
    assert files(tmp_path / "cut") == files(tmp_path / "whole")
    done, asked[:] = len(asked) + len(first) - 1, []
    (tmp_path / "cut" / "parts").mkdir()
    part.write_bytes(content)
    assert R.run(words(folder, tmp_path / "cut", "points=5")) == 0
    assert len(asked) == done, "another setting: nothing is taken from the parts"


def test_parts_of_another_checkpoint_are_not_used(folder, tiny_config, mini_root):
    config = dataclasses.replace(tiny_config(*WORDS), ckpt=str(folder))
    one, checkpoint = load_benchmarks()["mini_rec"], folder / "checkpoints" / "step-000001.ckpt"
    before = R.stamp(config, mini_root, one)
    assert R.stamp(dataclasses.replace(config, trainer={"devices": 2}, run_dir="x"), mini_root, one) == before
    assert R.stamp(dataclasses.replace(config, answer="text", compare={"a": "b"}), mini_root, one) == before
    assert R.stamp(dataclasses.replace(config, points=5), mini_root, one) != before
    assert R.stamp(config, mini_root, dataclasses.replace(one, head="link")) != before
    os.utime(checkpoint, (1, 1))
    assert R.stamp(config, mini_root, one) != before


def test_a_benchmark_that_fails_leaves_the_others(folder, tmp_path, monkeypatch, capsys):
    answer = Answerer.answer_unit

    def failing(self, unit, rejects):
        if unit.benchmark.name == "mini_gres":
            raise RuntimeError("out of memory")
        return answer(self, unit, rejects)

    monkeypatch.setattr(Answerer, "answer_unit", failing)
    names = "benchmarks=[mini_res,mini_gres,mini_pope,refcoco_val_res]"
    assert R.run(words(folder, tmp_path, names)) == 1
    assert set(json.loads((tmp_path / "scores.json").read_text())["benchmarks"]) == {"mini_res", "mini_pope"}
    printed = capsys.readouterr().err
    assert "mini_gres: no score: RuntimeError: out of memory" in printed
    assert "refcoco_val_res: no score" in printed
    monkeypatch.setattr(Answerer, "answer_unit", answer)
    assert R.run(words(folder, tmp_path, "benchmarks=[mini_res,mini_gres,mini_pope]")) == 0
    assert not (tmp_path / "parts").exists()


def test_evaluation_takes_no_other_trainer_arguments(folder, tmp_path):
    with pytest.raises(ValueError, match="trainer.max_steps: evaluation takes only"):
        R.run(words(folder, tmp_path, "trainer.max_steps=3"))


@pytest.mark.slow
def test_two_processes_killed_and_started_again_end_with_the_files_of_one(folder, tmp_path):
    assert R.run(words(folder, tmp_path / "one")) == 0
    whole, out, kills = files(tmp_path / "one"), tmp_path / "two", 0
    for seed in range(30):
        process, parts, chance = start(folder, out, "trainer.devices=2"), out / "parts", random.Random(seed)
        written = -1 if kills >= 3 else sum(path.stat().st_size for path in parts.glob("*"))
        while process.poll() is None and written >= 0:
            time.sleep(0.02)
            if sum(path.stat().st_size for path in parts.glob("*")) > written:
                time.sleep(chance.uniform(0, 0.3))
                # all at once, or the first process alone, whose children go on for a while
                chance.choice([os.killpg, os.kill])(process.pid, signal.SIGKILL)
                kills += 1
                break
        printed = process.communicate()[0]
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL, printed
    assert process.returncode == 0
    assert kills >= 2
    assert files(out) == whole


@pytest.mark.slow
def test_processes_end_with_the_one_that_started_them(folder, tmp_path):
    """Killed while the second one starts: it would wait for the first, and keep its device."""
    process = start(folder, tmp_path, "trainer.devices=2")
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    while process.poll() is None and not children.read_text():
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate(timeout=120)  # returns when no process has the pipe open
    assert process.returncode == -signal.SIGKILL, "killed, and not ended before"


def _validate(rank, port, size, folder, root, config, out):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=size)
    model = R.load_run(str(folder), config)[0]
    torch.save(R.validator(config, root)(model), f"{out}-{rank}")
    dist.destroy_process_group()


@pytest.mark.slow
def test_validation_scores_are_those_of_the_val_split_on_any_number_of_processes(
    folder, tmp_path, tiny_config, mini_root
):
    config = tiny_config(*WORDS, f"run_dir={tmp_path}", "val.benchmarks=[mini_res,mini_gres]", "val.samples=4")
    model = R.load_run(str(folder), config)[0].train()
    scores = R.validator(config, mini_root)(model)
    assert model.training
    chosen = {name: dataclasses.replace(load_benchmarks()[name], split="val") for name in ("mini_res", "mini_gres")}
    model.eval()
    found = R.score(list(generate_predictions(model, config, mini_root, chosen, Pace())), chosen)
    expected = {f"val/{one.task}_{key}": value for one in found.values() for key, value in one.scores.items()}
    assert scores == {key: value for key, value in expected.items() if value is not None}
    assert {"val/res_ciou", "val/gres_giou"} <= set(scores)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = (port, 3, folder, mini_root, config, str(tmp_path / "scores"))
    torch.multiprocessing.spawn(_validate, arguments, nprocs=3)
    assert all(torch.load(f"{tmp_path / 'scores'}-{rank}") == scores for rank in range(3))


def test_missing_data_is_named(folder, tmp_path):
    faults = Faults()
    config = R.evaluation_config(words(folder, tmp_path, f"data.root={tmp_path}", "benchmarks=[mini_res]"))
    with pytest.raises(ValueError, match="no benchmark to run"):
        R.find_data(config, load_benchmarks(), faults)
    assert "mini_res" in faults.found
    config = R.evaluation_config(words(folder, tmp_path, "answer=link"))
    with pytest.raises(ValueError, match="answer=link leaves none"):
        R.find_data(config, load_benchmarks(), faults)


def test_earlier_scores_are_printed_beside(folder, tmp_path, capsys):
    first = words(folder, tmp_path / "first", "benchmarks=[mini_res,mini_pope]")
    assert R.run(first) == 0
    before = tmp_path / "first" / "scores.json"
    again = words(folder, tmp_path / "second", "benchmarks=[mini_pope]", f"compare={{before: {before}}}")
    assert R.run(again) == 0
    value = 100 * json.loads(before.read_text())["benchmarks"]["mini_pope"]["scores"]["f1"]
    assert f", before {value:.1f}" in capsys.readouterr().out
    assert f'<td data-label="before">{value:.1f}</td>' in (tmp_path / "second" / "report.html").read_text()
    with pytest.raises(ValueError, match=r"absent\.json: expected the scores\.json"):
        R.run([*again, "compare={before: absent.json}"])
