"""Search settings with Optuna: each trial is a training run and its evaluation, with the overrides of train.py.

    python tools/sweep.py --metric mini_rec.p_at_50 --trials 8 train.lr=3e-4..3e-3:log train.warmup=0..0.2
    python tools/sweep.py ... points='8|12|16' data.batch_size=16..64:int --out runs/sweep --jobs 2

`key=low..high` is searched evenly, `:log` by its logarithm, `:int` in whole numbers, `key=a|b` among the choices; other
words are the same for all trials. Needs `pip install optuna`. Trials lie in --out (trials.csv, optuna.db, a run folder
each); the same command goes on until --trials are done, and takes up a trial that was cut short.
"""

from __future__ import annotations

import argparse
import csv
import re
import sys
from pathlib import Path
from typing import Any

import optuna

from vistallm.ablation.arms import Run, slug
from vistallm.ablation.results import read_score
from vistallm.ablation.runner import Runner
from vistallm.config import load_config
from vistallm.evaluate.benchmarks import load_benchmarks

NUMBER = r"-?\d+(?:\.\d+)?(?:e-?\d+)?"
RANGE = re.compile(rf"({NUMBER})\.\.({NUMBER})(?::(log|int))?")


def read_space(words: list[str]) -> tuple[dict[str, Any], list[str]]:
    """Split words into what is searched, key -> an Optuna distribution, and what is fixed.

    Raises:
        ValueError: nothing is searched, or a range that is empty or has no logarithm.
    """
    space: dict[str, Any] = {}
    fixed = []
    for word in words:
        key, _, value = word.partition("=")
        if found := RANGE.fullmatch(value):
            low, high, kind = float(found[1]), float(found[2]), found[3]
            if low >= high or (kind == "log" and low <= 0):
                raise ValueError(f"{word}: expected low..high with low < high, and above 0 for :log")
            whole = optuna.distributions.IntDistribution(int(low), int(high))
            space[key] = (
                whole if kind == "int" else optuna.distributions.FloatDistribution(low, high, log=kind == "log")
            )
        elif re.fullmatch(r"[^\[{(|]+(\|[^|]+)+", value):
            space[key] = optuna.distributions.CategoricalDistribution(value.split("|"))
        else:
            fixed.append(word)
    if not space:
        raise ValueError("nothing to search: expected a word such as train.lr=1e-4..1e-3:log or points=8|16")
    return space, fixed


def make_trial(settings: dict[str, Any], fixed: list[str], benchmark: str) -> Run:
    """The run of a trial; its folder is named by its settings, so that a trial cut short is taken up."""
    own = tuple(
        f"{key}={value:.4g}" if isinstance(value, float) else f"{key}={value}" for key, value in settings.items()
    )
    decode = tuple(word for word in fixed if word.startswith("decode."))
    words = tuple(word for word in fixed if word not in decode)
    return Run(slug("trial", own), (*words, *own), None, decode, (benchmark,))


def search(study: optuna.Study, space: dict[str, Any], fixed: list[str], runner: Runner, arguments: Any) -> None:
    """Run trials until the study has as many as asked for; `arguments.jobs` of them at a time."""
    benchmark, _, score = arguments.metric.partition(".")
    states = optuna.trial.TrialState
    for trial in study.get_trials(states=[states.RUNNING]):  # of a process that was killed
        study.enqueue_trial(trial.params)
        study.tell(trial.number, state=states.FAIL)
    while (left := arguments.trials - len(study.get_trials(states=[states.COMPLETE]))) > 0:
        asked = [study.ask(space) for _ in range(min(left, arguments.jobs))]
        jobs = [(make_trial(trial.params, fixed, benchmark), 0) for trial in asked]
        failures = runner.run(jobs)
        if failures:
            for trial in asked:
                study.tell(trial, state=states.FAIL)
            raise ValueError("\n".join(failures.values()))
        for trial, job in zip(asked, jobs, strict=True):
            found, _ = read_score(runner.scores(job), (benchmark, score))
            study.tell(trial, found)
            print(
                f"trial {trial.number}: {score} {found:.4f} with {', '.join(job[0].words[-len(space) :])}",
                flush=True,
            )


def main(argv: list[str]) -> None:
    """Search, print the best, write trials.csv."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="+", help="key=low..high, key=a|b, key=value")
    parser.add_argument("--metric", required=True, help="BENCHMARK.SCORE to maximise, for example mini_res.miou")
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--jobs", type=int, default=1, help="trials at a time")
    parser.add_argument("--out", type=Path, default=Path("runs/sweep"))
    arguments = parser.parse_intermixed_args(argv)
    space, fixed = read_space(arguments.words)
    if (benchmark := arguments.metric.partition(".")[0]) not in load_benchmarks():
        raise ValueError(f"--metric {arguments.metric}: no benchmark {benchmark!r} in configs/benchmarks.yaml")
    firsts = {key: d.choices[0] if hasattr(d, "choices") else d.low for key, d in space.items()}
    load_config(list(make_trial(firsts, fixed, benchmark).words))  # typos are told before anything runs
    arguments.out.mkdir(parents=True, exist_ok=True)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(
        storage=f"sqlite:///{arguments.out / 'optuna.db'}",
        study_name=slug("sweep", (arguments.metric, *arguments.words)),
        direction="maximize",
        load_if_exists=True,
    )
    study.sampler = optuna.samplers.TPESampler(seed=len(study.trials))  # else a second call would draw the same again
    search(study, space, fixed, Runner(arguments.out.resolve(), arguments.jobs), arguments)
    done = sorted(study.get_trials(states=[optuna.trial.TrialState.COMPLETE]), key=lambda t: -(t.value or 0))
    with (arguments.out / "trials.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(
            [["trial", arguments.metric, *space], *([t.number, t.value, *t.params.values()] for t in done)]
        )
    print(
        f"best of {len(done)}: {arguments.metric} {done[0].value:.4f}, {done[0].params}; see {arguments.out}/trials.csv"
    )


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except ValueError as error:
        sys.exit(f"sweep.py: {error}")
