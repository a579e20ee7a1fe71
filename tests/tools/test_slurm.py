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
# sbatch SCRIPT WORDS...: two tasks on this machine; runs again for as long as scontrol has asked for it.
export SLURM_JOB_ID=4711 SLURM_JOB_NAME=test SLURM_SUBMIT_DIR=$PWD SLURM_JOB_NUM_NODES=1 SLURM_NTASKS_PER_NODE=2
export SLURM_NTASKS=2 SLURM_NNODES=1 SLURM_CPUS_PER_TASK=1 SLURM_NODELIST=localhost
grep -q '^#SBATCH --requeue' "$1" || { echo "$1 can't be requeued" >&2; exit 9; }
bash "$@"; code=$?
while [ -e "$STANDIN/requeue" ]; do rm "$STANDIN/requeue"; bash "$@"; code=$?; done
exit $code
"""
SRUN = r"""#!/usr/bin/env bash
# srun COMMAND...: both tasks; at the first start SIGUSR1 once metrics.csv has two steps. Exit code: the largest.
for rank in 0 1; do
    SLURM_PROCID=$rank SLURM_LOCALID=$rank SLURM_NODEID=0 "$@" & tasks="$tasks $!"
done
if [ -n "$SIGNAL_AFTER" ] && [ ! -e "$STANDIN/signalled" ]; then
    touch "$STANDIN/signalled"
    until [ "$(wc -l 2>/dev/null <"$SIGNAL_AFTER")" -ge 3 ]; do kill -0 $tasks || break; sleep 0.05; done
    kill -USR1 ${tasks##* }  # one rank is enough: the ranks agree
fi
worst=0
for task in $tasks; do wait $task; code=$?; [ $code -gt $worst ] && worst=$code; done
exit $worst
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


@pytest.mark.slow
def test_signalled_job_requeues_and_ends_as_the_unbroken_one(cluster, tiny_words, mini_root, tmp_path):
    words = [*tiny_words, f"data.root={mini_root}", "strategy=ddp", "trainer.accelerator=cpu", "trainer.max_steps=40"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    done = cluster("stage1.sbatch", *words, f"run_dir={whole}")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    done = cluster("stage1.sbatch", *words, f"run_dir={broken}", SIGNAL_AFTER=str(broken / "metrics.csv"))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert "goes back into the queue" in done.stdout
    assert "resuming from" in done.stdout
    rows = [list(csv.DictReader((run / "metrics.csv").open())) for run in (whole, broken)]
    assert [row["step"] for row in rows[1]] == [str(step) for step in range(1, 41)], "one continuous curve"
    assert [row["loss"] for row in rows[1]] == [row["loss"] for row in rows[0]]
    weights = [
        torch.load(run / "checkpoints/step-000040.ckpt", weights_only=True)["state_dict"] for run in (whole, broken)
    ]
    for name, value in weights[0].items():
        assert torch.equal(value, weights[1][name]), name


@pytest.mark.parametrize("script", sorted((ROOT / "tools/slurm").glob("*.sbatch")), ids=lambda path: path.stem)
def test_scripts_hold_nothing_of_a_cluster(script):
    text = script.read_text()
    subprocess.run(["bash", "-n", script], check=True)
    for word in ("--partition", "--account", "--qos", "--mail", "/home", "/scratch"):
        assert word not in text
    usage = next(line for line in text.splitlines() if line.startswith("#   sbatch "))
    assert f"tools/slurm/{script.name}" in " ".join(shlex.split(usage.strip("# \\")))
