"""Run ablations of configs/ablations.yaml and report what they show of each claim.

    python tools/ablate.py NAME[,NAME...]|all [--seeds 3] [--jobs 1] [--out runs/ablations] [any train.py key=value ...]
    python tools/ablate.py list

Writes results.csv, results.md and results.html into --out. The same command resumes after a stop: finished runs
are kept, interrupted ones resume. `--jobs` runs share the cores (and the devices of CUDA_VISIBLE_DEVICES).
"""

from __future__ import annotations

import argparse
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
    arguments = parser.parse_intermixed_args(argv)
    if min(arguments.seeds, arguments.jobs) < 1:
        raise ValueError(f"--seeds {arguments.seeds} --jobs {arguments.jobs}: expected numbers of 1 or more")
    file = load_ablations(tuple(arguments.overrides))
    if arguments.names == "list":
        for one in file.ablations.values():
            print(f"{one.name}: {one.claim}\n  {', '.join(one.arms)}; {one.metric}")
        return 0
    chosen = file.choose(arguments.names)
    trials = in_order([run for ablation in chosen for run in ablation.runs.values()], arguments.seeds)
    if not any(word.startswith(("data=", "data.root=")) for word in arguments.overrides):
        subprocess.run([sys.executable, *file.prepare], check=True, cwd=ROOT)
    runner = Runner(arguments.out.resolve(), arguments.jobs)
    try:
        failures = runner.run(trials)
    except Stopped:
        print(f"stopped by a signal; the same command resumes ({arguments.out})")
        return PREEMPTED
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
