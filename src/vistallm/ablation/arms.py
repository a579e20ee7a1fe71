"""configs/ablations.yaml -> ablations, their arms, and the training runs behind them; nothing runs here."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from vistallm.config import CONFIG_ROOT, load_config
from vistallm.evaluate.benchmarks import load_benchmarks

ARMS_FILE = CONFIG_ROOT / "ablations.yaml"
Overrides = tuple[str, ...]


@dataclass(frozen=True)
class Run:
    """One training run and its evaluation.

    name: folder under the output folder, without the seed; overrides: of train.py; start: the run (same seed) whose
    weights it starts from, None = those of its configuration; decode: overrides of eval.py alone; benchmarks: names.
    """

    name: str
    overrides: Overrides
    start: Run | None
    decode: Overrides
    benchmarks: Overrides

    @property
    def evaluation(self) -> str:
        """Name of the folder, inside the run's, that holds the scores under `decode`."""
        return _folder_name(self.decode, plain="eval")

    @property
    def chain(self) -> list[Run]:
        """The runs that this one needs in the order of training, itself last."""
        return [*(self.start.chain if self.start else []), self]


@dataclass
class Recipe:
    """What runs share: overrides of train.py, benchmarks, and the recipe whose plain run they start from."""

    overrides: list[str]
    benchmarks: list[str]
    start: str | None = None


@dataclass
class Ablation:
    """One claim, as the file gives and explains it, and `runs`: arm -> run, in the order of the tables."""

    recipe: str
    claim: str
    source: str
    metric: str
    better: str
    equal: str
    arms: dict[str, list[str]]
    name: str = ""
    runs: dict[str, Any] = field(default_factory=dict)


@dataclass
class ArmsFile:
    """The whole file; `prepare`: the command that builds the arms' data, after `python`."""

    prepare: list[str]
    recipes: dict[str, Recipe]
    ablations: dict[str, Ablation]

    def choose(self, names: str) -> list[Ablation]:
        """The ablations of `all` or of a comma-separated list; ValueError for an unknown name."""
        wanted = list(self.ablations) if names == "all" else names.split(",")
        if unknown := [name for name in wanted if name not in self.ablations]:
            raise ValueError(f"no ablation {', '.join(unknown)}; there are {', '.join(self.ablations)}, or all")
        return [self.ablations[name] for name in wanted]


def load_ablations(extra: Overrides = (), path: Path = ARMS_FILE) -> ArmsFile:
    """Read the file and check every arm as train.py would; `extra` overrides come after each arm's own.

    Raises:
        ValueError: what is wrong, one line per problem.
    """
    try:
        content = OmegaConf.merge(OmegaConf.structured(ArmsFile), OmegaConf.load(path))
        file = cast(ArmsFile, OmegaConf.to_object(content))
    except (OSError, OmegaConfBaseException, YAMLError) as error:
        raise ValueError(f"{path}: {' '.join(str(error).split())}") from error
    problems, runs, known = list[str](), set[Run](), load_benchmarks()
    for name, ablation in file.ablations.items():
        ablation.name = name
        try:
            for arm, own in ablation.arms.items():
                ablation.runs[arm] = make_run(file.recipes, ablation.recipe, tuple(own), extra)
                runs |= set(ablation.runs[arm].chain)
            _check(ablation, [one for one in file.recipes[ablation.recipe].benchmarks if one in known])
        except ValueError as error:
            problems.append(f"ablation {name}: {error}")
    for run in runs:
        try:
            load_config([*run.overrides, *run.decode])
        except ValueError as error:
            problems += [f"run {run.name}: {line}" for line in str(error).splitlines()]
    if problems:
        raise ValueError("\n".join(f"{path.name}: {problem}" for problem in problems))
    return file


def _check(ablation: Ablation, scored: list[str]) -> None:
    if len(ablation.arms) < 2 or ablation.better not in ablation.arms:
        raise ValueError(f"better={ablation.better}: expected one of two arms or more, got {', '.join(ablation.arms)}")
    benchmark, _, score = ablation.metric.partition(".")
    if benchmark not in scored or not score:
        raise ValueError(f"metric={ablation.metric}: expected BENCHMARK.SCORE, a benchmark among {', '.join(scored)}")


def make_run(recipes: dict[str, Recipe], name: str, arm: Overrides, extra: Overrides = ()) -> Run:
    """Return the run of a recipe with an arm's overrides; its start is the plain run of the recipe named by `start`."""
    if name not in recipes:
        raise ValueError(f"no recipe {name!r}; there are {', '.join(recipes)}")
    recipe, start = recipes[name], recipes[name].start
    own = [word for word in arm if not word.startswith("decode.")]
    for word in own:
        start = word.removeprefix("start=") if word.startswith("start=") else start
    return Run(
        name=f"{name}/{_folder_name(own, plain='plain')}",
        overrides=(*recipe.overrides, *(word for word in own if not word.startswith("start=")), *extra),
        start=make_run(recipes, start, (), extra) if start else None,
        decode=tuple(word for word in arm if word not in own),
        benchmarks=tuple(recipe.benchmarks),
    )


def _folder_name(overrides: Iterable[str], plain: str) -> str:
    """A folder name made of overrides, `points=8`; `plain` without any."""
    return re.sub(r"[^\w.,=+-]+", "_", ",".join(overrides)).strip("_") or plain
