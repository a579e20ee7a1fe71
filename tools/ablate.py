"""Run ablations of configs/ablations.yaml and say what they show of each claim.

    python tools/ablate.py NAME[,NAME...]|all [seeds=3] [jobs=1] [out=runs/ablations] [any train.py key=value ...]
    python tools/ablate.py list
    python tools/ablate.py all --slurm [--submit] [seeds=3]      # the sbatch lines of an array; --submit sends them
    python tools/ablate.py all --part i/n                        # every n-th run from i on: a task of that array

Writes results.csv, results.md, results.html and plots/ into out=. The same command goes on where it was stopped: what
is done is kept, what was begun resumes. `jobs` runs share the cores (and the devices of CUDA_VISIBLE_DEVICES).
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

from vistallm.ablation.arms import Ablation, choose, load_ablations, preparation
from vistallm.ablation.results import collect, write_results
from vistallm.ablation.runner import PREEMPTED, ROOT, Runner, Stopped, in_order


@dataclass
class Arguments:
    """The command line: what to run, how often, how many at a time, where, and with which further words."""

    names: str
    seeds: int = 3
    jobs: int = 1
    out: Path = Path("runs/ablations")
    part: tuple[int, int] = (0, 1)
    slurm: bool = False
    submit: bool = False
    extra: list[str] = field(default_factory=list)


def read_arguments(argv: list[str]) -> Arguments:
    """Read the command line; ValueError for a word that is none of it."""
    found = Arguments(argv[0])
    words = iter(argv[1:])
    for word in words:
        key, equals, value = word.partition("=")
        if word in ("--slurm", "--submit"):
            setattr(found, word[2:], True)
        elif word == "--part":
            first, _, of = next(words, "").partition("/")
            if not (first.isdigit() and of.isdigit() and int(first) < int(of)):
                raise ValueError(f"--part {first}/{of}: expected i/n with 0 <= i < n")
            found.part = (int(first), int(of))
        elif key in ("seeds", "jobs") and equals:
            if not value.isdigit() or int(value) < 1:
                raise ValueError(f"{word}: expected a number of 1 or more")
            setattr(found, key, int(value))
        elif key == "out" and equals:
            found.out = Path(value)
        elif equals:
            found.extra.append(word)
        else:
            raise ValueError(f"{word!r}: expected key=value, --part i/n, --slurm or --submit (--help says more)")
    return found


def submit(arguments: Arguments, tasks: int) -> None:
    """Print the sbatch line of the array and the one that writes the results after it, or send them."""
    words = [arguments.names, f"seeds={arguments.seeds}", f"out={arguments.out}", *arguments.extra]
    array = ["sbatch", "--parsable", f"--array=0-{tasks - 1}", "tools/slurm/ablations.sbatch", *words]
    gather = ["tools/slurm/ablations.sbatch", *words]
    if not arguments.submit:
        print(f"array=$({subprocess.list2cmdline(array)})")
        print(subprocess.list2cmdline(["sbatch", "--dependency=afterany:$array", *gather]))
        return
    done = subprocess.run(array, check=True, capture_output=True, text=True, cwd=ROOT)
    number = done.stdout.strip().partition(";")[0]
    subprocess.run(["sbatch", f"--dependency=afterany:{number}", *gather], check=True, cwd=ROOT)


def show(ablations: dict[str, Ablation]) -> None:
    """Print the claims and arms."""
    for ablation in ablations.values():
        print(f"{ablation.name}: {ablation.claim}\n  {', '.join(ablation.arms)}; {'.'.join(ablation.metric)}")


def main(argv: list[str]) -> int:
    """Run, print, write; returns the exit code: 1 when a run failed, 75 when a signal stopped it."""
    if not argv or argv[0] in ("-h", "--help"):
        print(__doc__)
        return 0 if argv else 2
    arguments = read_arguments(argv)
    extra = tuple(arguments.extra)
    known = load_ablations(extra)
    if arguments.names == "list":
        show(known)
        return 0
    chosen = choose(known, arguments.names)
    jobs = in_order([run for ablation in chosen for run in ablation.arms.values()], arguments.seeds)
    if arguments.slurm:
        submit(arguments, len(jobs))
        return 0
    if command := preparation(extra):
        subprocess.run([sys.executable, *command], check=True, cwd=ROOT, env=os.environ)
    first, of = arguments.part
    runner = Runner(arguments.out.resolve(), arguments.jobs)
    try:
        failures = runner.run(jobs[first::of])
    except Stopped:
        print(f"stopped by a signal; the same command goes on ({arguments.out})")
        return PREEMPTED
    if of == 1:
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
