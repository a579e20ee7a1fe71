"""tools/slurm with stand-ins for sbatch, srun and scontrol that run the tasks here, signal them and requeue."""

from __future__ import annotations

import csv
import os
import shlex
import subprocess
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]

SBATCH = r"""#!/usr/bin/env bash
# sbatch SCRIPT WORDS...: TASKS (2) tasks on this machine; runs again for as long as scontrol has asked for it.
export SLURM_JOB_ID=4711 SLURM_JOB_NAME=test SLURM_SUBMIT_DIR=$PWD SLURM_JOB_NUM_NODES=1
export SLURM_NTASKS_PER_NODE=${TASKS:-2} SLURM_NTASKS=${TASKS:-2} SLURM_NNODES=1
export SLURM_CPUS_PER_TASK=1 SLURM_NODELIST=localhost
grep -q '^#SBATCH --requeue' "$1" || { echo "$1 can't be requeued" >&2; exit 9; }
bash "$@"; code=$?
while [ -e "$STANDIN/requeue" ]; do rm "$STANDIN/requeue"; bash "$@"; code=$?; done
exit $code
"""
SRUN = """#!/usr/bin/env python3
# srun --kill-on-bad-exit=1 COMMAND...: the tasks. Each start takes the next word of SIGNALS and, once the files of ROWS
# have two lines more, sends it to every process of both tasks as SLURM does (KILL: to one task, as the kernel when
# memory is out; BATCH: USR1 to the batch script). A task that fails, or SIGTERM to srun, ends the others. The exit code
# is the largest; 128 + signal for a task that was killed.
import os, signal, subprocess, sys, time
from pathlib import Path

assert sys.argv[1] == "--kill-on-bad-exit=1", sys.argv
tasks = []
for rank in range(int(os.environ["SLURM_NTASKS"])):
    environment = os.environ | {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank), "SLURM_NODEID": "0"}
    tasks.append(subprocess.Popen(sys.argv[2:], env=environment, start_new_session=True))
todo = Path(os.environ["STANDIN"], "signals")
signals = todo.read_text().split() if todo.exists() else os.environ.get("SIGNALS", "").split()
todo.write_text(" ".join(signals[1:]))
count = lambda: max(1, sum(file.read_text().count("\\n") for file in Path("/").glob(os.environ["ROWS"][1:])))
wanted = count() + 2
signal.signal(signal.SIGTERM, lambda *_: [os.killpg(task.pid, signal.SIGKILL) for task in tasks])
while any(task.poll() is None for task in tasks):
    if signals and count() >= wanted:
        if signals[0] == "BATCH":
            os.kill(os.getppid(), signal.SIGUSR1)
        else:
            for task in tasks[signals[0] == "KILL":]:
                os.killpg(task.pid, getattr(signal, "SIG" + signals[0]))
        signals = []
    if any(task.poll() for task in tasks):
        for task in tasks:
            if task.poll() is None:
                os.killpg(task.pid, signal.SIGKILL)
    time.sleep(0.05)
sys.exit(max(task.returncode if task.returncode >= 0 else 128 - task.returncode for task in tasks))
"""
SCONTROL = '#!/usr/bin/env bash\n[ "$1 $2" = "requeue 4711" ] && touch "$STANDIN/requeue"\n'


@pytest.fixture
def cluster(tmp_path):
    """Callable: script, words, settings -> the finished process of the stand-in sbatch."""
    for name, text in (("sbatch", SBATCH), ("srun", SRUN), ("scontrol", SCONTROL)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    venv = {"VISTALLM_VENV": str(tmp_path / "none")}
    paths = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "STANDIN": str(tmp_path), "PYTHONPATH": str(ROOT / "src")}

    def run(script, *words, **settings):
        environment = os.environ | paths | venv | settings
        command = ["sbatch", f"tools/slurm/{script}", *words]
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)

    return run


@pytest.fixture
def words(tiny_words, mini_root):
    """Overrides of a run of 40 steps on two ranks with a loader process each."""
    words = [*tiny_words, f"data.root={mini_root}", "strategy=ddp", "trainer.accelerator=cpu", "data.workers=1"]
    return [*words, "trainer.max_steps=40"]


@pytest.mark.slow
def test_signalled_job_requeues_and_ends_as_the_unbroken_one(cluster, words, tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    done = cluster("stage1.sbatch", *words, f"run_dir={whole}", ROWS=str(whole / "metrics.csv"))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    (tmp_path / "signals").unlink()
    settings = {"ROWS": str(broken / "metrics.csv"), "SIGNALS": "USR1 TERM"}
    done = cluster("stage1.sbatch", *words, f"run_dir={broken}", **settings)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert done.stdout.count("goes back into the queue") == 2
    assert "resuming from" in done.stdout
    rows = [list(csv.DictReader((run / "metrics.csv").open())) for run in (whole, broken)]
    assert [row["step"] for row in rows[1]] == [str(step) for step in range(1, 41)], "one continuous curve"
    assert [row["loss"] for row in rows[1]] == [row["loss"] for row in rows[0]]
    weights = [
        torch.load(run / "checkpoints/step-000040.ckpt", weights_only=True)["state_dict"] for run in (whole, broken)
    ]
    for name, value in weights[0].items():
        assert torch.equal(value, weights[1][name]), name


@pytest.mark.slow
def test_a_task_that_dies_ends_the_job(cluster, words, tmp_path):
    """The other task would wait for it; the job fails, and is not put back to fail again."""
    settings = {"ROWS": str(tmp_path / "run/metrics.csv"), "SIGNALS": "KILL"}
    done = cluster("stage2.sbatch", *words, f"run_dir={tmp_path / 'run'}", "trainer.max_steps=4000", **settings)
    assert done.returncode == 137, done.stdout[-2000:] + done.stderr[-3000:]
    assert "goes back into the queue" not in done.stdout


@pytest.mark.slow
def test_ablations_requeue_and_go_on(cluster, tiny_words, mini_root, tmp_path):
    """A job that is stopped in its first run goes on with it, and writes the results."""
    out = tmp_path / "out"
    settings = {"TASKS": "1", "ROWS": str(out / "boxes/plain/seed0/metrics.csv")}
    words = ["coords", "--seeds", "1", "--out", str(out), *tiny_words, f"data.root={mini_root}", "trainer.max_steps=40"]
    done = cluster("ablations.sbatch", *words, **settings, SIGNALS="USR1")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert done.stdout.count("goes back into the queue") == 1
    assert "resuming from" in (out / "boxes/plain/seed0/output.txt").read_text()
    steps = [row["step"] for row in csv.DictReader((out / "boxes/plain/seed0/metrics.csv").open())]
    assert steps == [str(step) for step in range(1, 41)]
    assert "| text |" in (out / "results.md").read_text()


@pytest.mark.slow
def test_an_evaluation_goes_on_after_its_time_limit_and_after_a_kill(cluster, mini_root, tmp_path):
    words = ["ckpt=assets/mini", f"data.root={mini_root}", "trainer.accelerator=cpu", "decode.batch_size=1"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    done = cluster("eval.sbatch", *words, f"run_dir={whole}", TASKS="1", ROWS=str(whole / "parts/*"))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    settings = {"ROWS": str(broken / "parts/*"), "SIGNALS": "BATCH KILL"}
    (tmp_path / "signals").unlink()
    done = cluster("eval.sbatch", *words, f"run_dir={broken}", **settings)
    assert done.returncode == 137, done.stdout[-2000:] + done.stderr[-3000:]
    assert done.stdout.count("goes back into the queue") == 1
    assert len(list((broken / "parts").iterdir())) == 4, "two tasks, started twice"
    done = cluster("eval.sbatch", *words, f"run_dir={broken}", **settings)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    for name in ("predictions.jsonl", "scores.json"):
        assert (broken / name).read_bytes() == (whole / name).read_bytes()


@pytest.mark.parametrize("script", sorted((ROOT / "tools/slurm").glob("*.sbatch")), ids=lambda path: path.stem)
def test_scripts_hold_nothing_of_a_cluster(script):
    text = script.read_text()
    subprocess.run(["bash", "-n", script], check=True)
    for word in ("--partition", "--account", "--qos", "--mail", "/home", "/scratch"):
        assert word not in text
    usage = next(line for line in text.splitlines() if line.startswith("#   sbatch "))
    assert f"tools/slurm/{script.name}" in " ".join(shlex.split(usage.strip("# \\")))
