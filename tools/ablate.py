"""Run ablations of configs/ablations.yaml and report what they show of each claim.

    python tools/ablate.py NAME[,NAME...]|all [--seeds 3] [--jobs 1] [--out runs/ablations] [any train.py key=value ...]
    python tools/ablate.py list
    python tools/ablate.py all --slurm [--submit]      # the sbatch lines of an array; --submit sends them
    python tools/ablate.py all --part i/n              # every n-th run from i on: a task of that array

Writes results.csv, results.md, results.html and plots/ into --out. The same command resumes after a stop: finished runs
are kept, interrupted ones resume. `--jobs` runs share the cores (and the devices of CUDA_VISIBLE_DEVICES).
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from pathlib import Path

from vistallm.ablation.arms import load_ablations
from vistallm.ablation.results import collect, write_results
from vistallm.ablation.runner import PREEMPTED, ROOT, Runner, Stopped, in_order


def read_arguments(argv: list[str]) -> argparse.Namespace:
    """Read the command line; exits with a message for an unknown option, ValueError for a wrong value."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", help="ablations of the file, comma-separated; all; or list")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="overrides of train.py for every run")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each arm")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--out", type=Path, default=Path("runs/ablations"))
    parser.add_argument("--part", default="0/1", metavar="i/n", help="every n-th run from i on")
    parser.add_argument("--slurm", action="store_true", help="print the sbatch lines")
    parser.add_argument("--submit", action="store_true", help="with --slurm: send them")
    arguments = parser.parse_intermixed_args(argv)
    part = re.fullmatch(r"(\d+)/(\d+)", arguments.part)
    if part is None or int(part[1]) >= int(part[2]):
        raise ValueError(f"--part {arguments.part}: expected i/n with 0 <= i < n")
    if min(arguments.seeds, arguments.jobs) < 1:
        raise ValueError(f"--seeds {arguments.seeds} --jobs {arguments.jobs}: expected numbers of 1 or more")
    if wrong := [word for word in arguments.overrides if "=" not in word]:
        raise ValueError(f"{' '.join(wrong)}: expected key=value")
    arguments.part = slice(int(part[1]), None, int(part[2]))
    return arguments


def submit(arguments: argparse.Namespace, tasks: int) -> None:
    """Print the sbatch line of the array and the one that writes the results after it, or send them."""
    words = [arguments.names, "--seeds", str(arguments.seeds), "--out", str(arguments.out), *arguments.overrides]
    job = ["tools/slurm/ablations.sbatch", *words]
    array = ["sbatch", "--parsable", f"--array=0-{tasks - 1}", *job]
    if not arguments.submit:
        print(f"array=$({subprocess.list2cmdline(array)})")
        print(subprocess.list2cmdline(["sbatch", "--dependency=afterany:$array", *job]))
        return
    sent = subprocess.run(array, check=True, capture_output=True, text=True, cwd=ROOT).stdout.strip()
    subprocess.run(["sbatch", f"--dependency=afterany:{sent.partition(';')[0]}", *job], check=True, cwd=ROOT)


def main(argv: list[str]) -> int:
    """Run, print, write; returns the exit code: 1 when a run failed, 75 when a signal stopped it."""
    arguments = read_arguments(argv)
    file = load_ablations(tuple(arguments.overrides))
    if arguments.names == "list":
        for one in file.ablations.values():
            print(f"{one.name}: {one.claim}\n  {', '.join(one.arms)}; {one.metric}")
        return 0
    chosen = file.choose(arguments.names)
    trials = in_order([run for ablation in chosen for run in ablation.runs.values()], arguments.seeds)
    if arguments.slurm:
        submit(arguments, len(trials))
        return 0
    if not any(word.startswith(("data=", "data.root=")) for word in arguments.overrides):
        subprocess.run([sys.executable, *file.prepare], check=True, cwd=ROOT)
    runner = Runner(arguments.out.resolve(), arguments.jobs)
    try:
        failures = runner.run(trials[arguments.part])
    except Stopped:
        print(f"stopped by a signal; the same command resumes ({arguments.out})")
        return PREEMPTED
    if arguments.part.step == 1:
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
