"""Run ablations of configs/ablations.yaml and report what they show of each claim.

    python tools/ablate.py NAME[,NAME...]|all [--seeds 3] [--jobs 1] [--out runs/ablations] [any train.py key=value ...]
    python tools/ablate.py list
    python tools/ablate.py all --slurm | bash          # sends an array; without `| bash` the sbatch lines are printed
    python tools/ablate.py all --part i/n              # every n-th run from i on: a task of that array

Writes results.csv, results.md, results.html and plots/ into --out. The same command resumes after a stop: finished runs
are kept, interrupted ones resume. `--jobs` runs share the cores (and the devices of CUDA_VISIBLE_DEVICES).
"""

from __future__ import annotations

import argparse
import re
import shlex
import subprocess
import sys
from pathlib import Path

from vistallm.ablation.arms import load_ablations
from vistallm.ablation.results import collect, write_results
from vistallm.ablation.runner import PREEMPTED, ROOT, Runner, Stopped, in_order


def main(argv: list[str]) -> int:
    """Run, print, write; returns the exit code: 1 when a run failed, 75 when a signal stopped it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", help="ablations of the file, comma-separated; all; or list")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="overrides of train.py for every run")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each arm")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--out", type=Path, default=Path("runs/ablations"))
    parser.add_argument("--part", default="0/1", metavar="i/n", help="every n-th run from i on")
    parser.add_argument("--slurm", action="store_true", help="print the sbatch lines")
    arguments = parser.parse_intermixed_args(argv)
    part = re.fullmatch(r"(\d+)/(\d+)", arguments.part)
    if part is None or int(part[1]) >= int(part[2]):
        raise ValueError(f"--part {arguments.part}: expected i/n with 0 <= i < n")
    if min(arguments.seeds, arguments.jobs) < 1:
        raise ValueError(f"--seeds {arguments.seeds} --jobs {arguments.jobs}: expected numbers of 1 or more")
    file = load_ablations(tuple(arguments.overrides))
    if arguments.names == "list":
        for one in file.ablations.values():
            print(f"{one.name}: {one.claim}\n  {', '.join(one.arms)}; {one.metric}")
        return 0
    chosen = file.choose(arguments.names)
    trials = in_order([run for ablation in chosen for run in ablation.runs.values()], arguments.seeds)
    if arguments.slurm:  # the second job waits for the array and writes the results
        words = [arguments.names, "--seeds", str(arguments.seeds), "--out", str(arguments.out), *arguments.overrides]
        job = shlex.join(["tools/slurm/ablations.sbatch", *words])
        print(
            f"array=$(sbatch --parsable --array=0-{len(trials) - 1} {job})\nsbatch --dependency=afterany:$array {job}"
        )
        return 0
    if not any(word.startswith(("data=", "data.root=")) for word in arguments.overrides):
        subprocess.run([sys.executable, *file.prepare], check=True, cwd=ROOT)
    runner = Runner(arguments.out.resolve(), arguments.jobs)
    try:
        failures = runner.run(trials[int(part[1]) :: int(part[2])])
    except Stopped:
        print(f"stopped by a signal; the same command resumes ({arguments.out})")
        return PREEMPTED
    if arguments.part == "0/1":
        results = [collect(ablation, runner, arguments.seeds) for ablation in chosen]
        write_results(results, arguments.out, " ".join(["python tools/ablate.py", *argv]))
        print((arguments.out / "results.md").read_text(encoding="utf-8"))
    for reason in failures.values():
        print(reason, file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except ValueError as error:
        sys.exit(f"ablate.py: {error}")
