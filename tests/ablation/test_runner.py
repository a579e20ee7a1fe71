"""The runner with stand-ins for train.py and eval.py that note when they are called, and once with the real ones."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vistallm.ablation import runner as runner_module
from vistallm.ablation.arms import Run
from vistallm.ablation.runner import Runner, Stopped, in_order

ROOT = Path(__file__).parents[2]
PLAIN = Run("base/plain", ("a=1",), None, (), ("mini_res",))
ARMS = [Run(f"arms/b={i}", ("a=1", f"b={i}"), PLAIN, (), ("mini_res",)) for i in range(3)]
FREE = Run("arms/b=0", ("a=1", "b=0"), PLAIN, ("decode.grammar=false",), ("mini_res",))
SCRIPT = """
import os, signal, sys, time
from pathlib import Path
words = dict(word.split("=", 1) for word in sys.argv[1:])
folder = Path(words["run_dir"])
folder.mkdir(parents=True, exist_ok=True)
for number in (signal.SIGUSR1, signal.SIGINT):
    signal.signal(number, lambda *_: sys.exit(75))
with open("calls.txt", "a") as calls:
    calls.write(f"{Path(__file__).stem} {folder.relative_to(Path.cwd() / 'out')}\\n")
if "ckpt" in words and not (Path(words["ckpt"]) / "weights").exists():
    sys.exit("no weights to start from")
time.sleep(float(os.environ.get("SECONDS_EACH", 0)))
if words.get("b") == os.environ.get("FAILS", "none"):
    sys.exit("out of memory")
(folder / ("scores.json" if "eval" in __file__ else "weights")).write_text("{}")
"""


@pytest.fixture
def root(tmp_path, monkeypatch):
    for name in ("train.py", "eval.py"):
        (tmp_path / name).write_text(SCRIPT)
    monkeypatch.setattr(runner_module, "ROOT", tmp_path)
    return tmp_path


def calls(root):
    return sorted((root / "calls.txt").read_text().splitlines())


def test_shared_runs_happen_once_and_nothing_twice(root):
    jobs = in_order([*ARMS, FREE], seeds=2)
    assert len(jobs) == 8
    assert Runner(root / "out", 3).run(jobs) == {}
    names = [f"{run}/seed{seed}" for run in ("arms/b=0", "arms/b=1", "arms/b=2", "base/plain") for seed in range(2)]
    scored = [f"{name}/eval" for name in names[:6]] + [f"{name}/decode.grammar=false" for name in names[:2]]
    assert calls(root) == sorted([f"train {name}" for name in names] + [f"eval {name}" for name in scored])
    before = calls(root)
    assert Runner(root / "out", 1).run(jobs) == {}
    assert calls(root) == before


def test_a_failure_is_reported_and_the_others_go_on(root, monkeypatch):
    monkeypatch.setenv("FAILS", "1")
    failures = Runner(root / "out", 2).run(in_order(ARMS, seeds=1))
    assert list(failures) == ["arms/b=1/seed0/eval"]
    assert "train.py ended with 1: out of memory" in next(iter(failures.values()))
    assert (root / "out/arms/b=2/seed0/eval/scores.json").exists()
    monkeypatch.delenv("FAILS")
    assert Runner(root / "out", 2).run(in_order(ARMS, seeds=1)) == {}
    assert calls(root).count("train arms/b=1/seed0") == 2


def test_a_start_that_failed_is_not_tried_for_every_arm(root, monkeypatch):
    start = Run("base/plain", ("b=9",), None, (), ("mini_res",))
    arms = [Run(f"arms/c={i}", (f"c={i}",), start, (), ("mini_res",)) for i in range(3)]
    monkeypatch.setenv("FAILS", "9")
    failures = Runner(root / "out", 2).run(in_order(arms, seeds=1))
    assert calls(root) == ["train base/plain/seed0"]
    assert len(failures) == 3
    assert all("base/plain/seed0: train.py ended with 1" in reason for reason in failures.values())


def test_other_words_in_a_folder_are_refused(root):
    Runner(root / "out", 1).run(in_order(ARMS[:1], seeds=1))
    other = Run("arms/b=0", ("a=1", "b=0", "trainer.max_steps=9"), PLAIN, (), ("mini_res",))
    failures = Runner(root / "out", 1).run([(other, 0)])
    assert "holds a run with other overrides (trainer.max_steps=9)" in next(iter(failures.values()))


def main():
    """What `started` runs: all arms over two seeds in the current folder."""
    runner_module.ROOT = Path.cwd()
    try:
        sys.exit(len(Runner(Path.cwd() / "out", 2).run(in_order(ARMS, seeds=2))))
    except Stopped:
        sys.exit(75)


def started(root):
    """A runner in a process of its own."""
    environment = os.environ | {"SECONDS_EACH": "0.4", "PYTHONPATH": str(ROOT / "src")}
    return subprocess.Popen([sys.executable, __file__], cwd=root, env=environment)


def wait_for_calls(root, count):
    for _ in range(600):
        if (root / "calls.txt").exists() and len(calls(root)) >= count:
            return
        time.sleep(0.05)
    raise AssertionError("the runner does not get on")


def test_a_killed_runner_resumes(root):
    """SIGKILL leaves the runner's two processes at work; when they have ended, a second runner does the rest."""
    process = started(root)
    wait_for_calls(root, 4)
    process.send_signal(signal.SIGKILL)
    process.wait()
    time.sleep(1)
    finished = set((root / "out").rglob("scores.json"))
    kept = {path: path.stat().st_mtime_ns for path in finished}
    assert started(root).wait(timeout=60) == 0
    assert len(calls(root)) <= 2 * 4 + 2 * 3 + 2, "at most the two interrupted calls are repeated"
    assert len(list((root / "out").rglob("scores.json"))) == 6
    assert {path: path.stat().st_mtime_ns for path in finished} == kept


def test_two_runners_share_a_folder(root):
    """Tasks of an array need the same start: one trains it, the other waits, and nothing happens twice."""
    both = [started(root), started(root)]
    assert [process.wait(timeout=60) for process in both] == [0, 0]
    assert len(calls(root)) == len(set(calls(root))) == 2 * 4 + 2 * 3


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGINT])
def test_a_signal_is_passed_on_and_the_same_command_resumes(root, number):
    process = started(root)
    wait_for_calls(root, 1)
    process.send_signal(number)
    assert process.wait(timeout=60) == 75
    assert len(calls(root)) <= 2, "nothing new was started"
    assert started(root).wait(timeout=60) == 0
    assert len(list((root / "out").rglob("scores.json"))) == 6


@pytest.mark.slow
def test_real_runs_from_the_command_line(tiny_words, mini_root, tmp_path):
    """Two arms of one run: its start, itself and two evaluations, then results that a second call only writes again."""
    words = [*tiny_words, f"data.root={mini_root}", "trainer.max_steps=2"]
    command = [sys.executable, "tools/ablate.py", "grammar", "--seeds", "1", "--out", str(tmp_path), *words]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "| off |" in done.stdout
    trained = json.loads((tmp_path / "masks/plain/seed0/overrides.json").read_text())
    assert trained[-1] == "seed=0"
    config = (tmp_path / "masks/plain/seed0/config.yaml").read_text()
    assert f"ckpt: {tmp_path}/boxes/plain/seed0" in config
    made = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("metrics.csv")}
    assert len(made) == 2
    again = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert again.returncode == 0
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("metrics.csv")} == made
    assert again.stdout.partition("# Ablations")[2] == done.stdout.partition("# Ablations")[2]


if __name__ == "__main__":
    main()
