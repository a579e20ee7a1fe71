"""configs/ablations.yaml -> ablations, their arms, and the training runs behind them; nothing runs here.

An arm is a list of `key=value` words over its recipe's. `decode.*` words change its evaluation alone, `start=` names
another recipe whose plain run (same seed) gives the weights; all other words are train.py's. Arms of one recipe and the
same words share their run.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from vistallm.config import CONFIG_ROOT, load_config
from vistallm.evaluate.benchmarks import load_benchmarks

ARMS_FILE = CONFIG_ROOT / "ablations.yaml"
ABLATION_KEYS = {"recipe", "claim", "source", "metric", "better", "equal", "axis", "arms"}
RECIPE_KEYS = {"words", "benchmarks", "start"}
Words = tuple[str, ...]


@dataclass(frozen=True)
class Run:
    """One training run and its scores.

    name: folder under the output folder, without the seed; words: of train.py; start: the run whose weights it begins
    with (same seed), None = those of its configuration; decode: words of eval.py alone; benchmarks: names.
    """

    name: str
    words: Words
    start: Run | None
    decode: Words
    benchmarks: Words

    @property
    def scores(self) -> str:
        """Name of the folder, in that of the run, with the scores of this way to decode."""
        return slug("eval", self.decode)

    @property
    def chain(self) -> list[Run]:
        """The runs that have to be there for this one, itself last."""
        return [*(self.start.chain if self.start else []), self]


@dataclass(frozen=True)
class Ablation:
    """One claim and its arms.

    claim, source: what is tested and where it is from; metric: benchmark and score ("mini_res.miou"); better: the arm
    that the claim says wins, against each other; equal: what the arms have in common; axis: what their names count
    (None = they are no numbers); arms: name -> run, in the order they are shown.
    """

    name: str
    claim: str
    source: str
    metric: tuple[str, str]
    better: str
    equal: str
    axis: str | None
    arms: dict[str, Run]


def load_ablations(extra: Words = (), path: Path = ARMS_FILE) -> dict[str, Ablation]:
    """Read the file and check every arm as train.py would; `extra` words come after each arm's own.

    Raises:
        ValueError: all problems at once, one per line.
    """
    content = _read(path)
    recipes, problems = content["recipes"], list[str]()
    for name, recipe in recipes.items():
        problems += _unknown(f"recipe {name}", recipe, RECIPE_KEYS, {"words", "benchmarks"})
    for name, entry in content["ablations"].items():
        problems += _unknown(f"ablation {name}", entry, ABLATION_KEYS, ABLATION_KEYS - {"axis"})
        if not problems and entry["recipe"] not in recipes:
            problems.append(f"ablation {name}: no recipe {entry['recipe']!r}; there are {', '.join(recipes)}")
    if problems:
        raise ValueError("\n".join(f"{path.name}: {problem}" for problem in problems))
    found = {name: _ablation(name, entry, recipes, extra, problems) for name, entry in content["ablations"].items()}
    for run in {run for ablation in found.values() for arm in ablation.arms.values() for run in arm.chain}:
        try:
            load_config([*run.words, *run.decode])
        except ValueError as error:
            problems += [f"run {run.name}: {line}" for line in str(error).splitlines()]
    if problems:
        raise ValueError("\n".join(f"{path.name}: {problem}" for problem in dict.fromkeys(problems)))
    return found


def preparation(extra: Words, path: Path = ARMS_FILE) -> list[str]:
    """The command that makes the data of the arms, after `python`; [] when `extra` names other data."""
    named = any(word.startswith(("data=", "data.root=")) for word in extra)
    return [] if named else [str(word) for word in _read(path)["prepare"]]


def choose(ablations: dict[str, Ablation], names: str) -> list[Ablation]:
    """Return the ablations of `all` or of a comma-separated list; ValueError for a name that is not there."""
    wanted = list(ablations) if names == "all" else names.split(",")
    if missing := [name for name in wanted if name not in ablations]:
        raise ValueError(f"no ablation {', '.join(missing)}; there are {', '.join(ablations)}, or all")
    return [ablations[name] for name in wanted]


def _read(path: Path) -> dict[str, Any]:
    try:
        content = OmegaConf.to_container(OmegaConf.load(path))
    except (OSError, OmegaConfBaseException, YAMLError) as error:
        raise ValueError(f"{path}: not readable as YAML ({' '.join(str(error).split())})") from error
    if not isinstance(content, dict) or set(content) != {"prepare", "recipes", "ablations"}:
        raise ValueError(f"{path}: expected the keys prepare, recipes and ablations")
    return cast(dict[str, Any], content)


def _unknown(where: str, entry: Any, known: set[str], needed: set[str]) -> list[str]:
    if not isinstance(entry, dict):
        return [f"{where}: expected a mapping of {', '.join(sorted(known))}, got {entry!r}"]
    extra, lacking = sorted(set(entry) - known), sorted(needed - set(entry))
    told = [f"{where}: unknown key {key!r}; known are {', '.join(sorted(known))}" for key in extra]
    return told + [f"{where}: {key!r} is missing" for key in lacking]


def _ablation(name: str, entry: dict[str, Any], recipes: dict[str, Any], extra: Words, problems: list[str]) -> Ablation:
    benchmark, _, score = str(entry["metric"]).partition(".")
    arms = {}
    for arm, words in entry["arms"].items():
        try:
            arms[str(arm)] = make_run(recipes, entry["recipe"], tuple(map(str, words)), extra)
        except (KeyError, TypeError, ValueError) as error:
            problems.append(f"ablation {name}, arm {arm}: {error}")
    if str(entry["better"]) not in map(str, entry["arms"]):
        problems.append(
            f"ablation {name}: better: {entry['better']} is none of its arms, {', '.join(map(str, entry['arms']))}"
        )
    if len(entry["arms"]) < 2:
        problems.append(f"ablation {name}: expected two arms or more to compare")
    if benchmark not in load_benchmarks() or benchmark not in recipes[entry["recipe"]]["benchmarks"] or not score:
        problems.append(
            f"ablation {name}: metric {entry['metric']!r}: expected BENCHMARK.SCORE of the recipe's benchmarks "
            f"({', '.join(recipes[entry['recipe']]['benchmarks'])})"
        )
    if entry.get("axis") and not all(_is_number(str(arm)) for arm in entry["arms"]):
        problems.append(f"ablation {name}: axis={entry['axis']}: expected arms named by numbers")
    return Ablation(
        name=name,
        claim=entry["claim"],
        source=entry["source"],
        metric=(benchmark, score),
        better=str(entry["better"]),
        equal=entry["equal"],
        axis=entry.get("axis"),
        arms=arms,
    )


def make_run(recipes: dict[str, Any], recipe: str, words: Words, extra: Words = ()) -> Run:
    """Return the run of a recipe with an arm's words; its start is the plain run of the recipe named by `start`."""
    if recipe not in recipes:
        raise ValueError(f"no recipe {recipe!r}; there are {', '.join(recipes)}")
    entry = recipes[recipe]
    own = tuple(word for word in words if not word.startswith(("decode.", "start=")))
    named = [word.removeprefix("start=") for word in words if word.startswith("start=")]
    start = (named or [entry.get("start")])[-1]
    return Run(
        name=f"{recipe}/{slug('plain', (*own, *(f'start={name}' for name in named)))}",
        words=(*map(str, entry["words"]), *own, *extra),
        start=make_run(recipes, start, (), extra) if start else None,
        decode=tuple(word for word in words if word.startswith("decode.")),
        benchmarks=tuple(entry["benchmarks"]),
    )


def slug(plain: str, words: Words) -> str:
    """A folder name that says the words: `points=8`, `plain` where there are none."""
    return re.sub(r"[^\w.,=+-]+", "_", ",".join(words)).strip("_") or plain


def _is_number(text: str) -> bool:
    try:
        return float(text) == float(text)
    except ValueError:
        return False
