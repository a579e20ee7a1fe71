"""The README's paths and commands, the promised sizes, and what must not be in the repository."""

import ast
import re
import subprocess
from pathlib import Path

import pytest

from vistallm.config import load_config

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SOURCES = sorted([*ROOT.glob("src/**/*.py"), *ROOT.glob("tools/*.py"), ROOT / "train.py", ROOT / "eval.py"])
MADE_BY_RUNS = ("runs/", "data/", ".venv/", "/shards/", "tensorboard/", "checkpoints/", "vocabulary/")


def _tracked():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    return [line for line in listed.stdout.splitlines() if (ROOT / line).is_file()]


def test_every_path_of_the_readme_exists():
    words = re.findall(r"[\w./{},*-]+/[\w./{},*-]*|[\w-]+\.(?:py|sh|yml|yaml|toml)", README)
    paths = {w.strip(".,") for w in words if not w.startswith(MADE_BY_RUNS) and not w.startswith(("http", "/"))}
    ours = re.compile(r"(src|tools|tests|configs|assets)/|train\.py|eval\.py|environment\.yml")
    known = {path for path in paths if ours.match(path)}
    assert len(known) > 15
    missing = sorted(p for p in known if not (ROOT / p).exists() and not list(ROOT.glob(p)))
    assert not missing


COMMANDS = sorted(set(re.findall(r"^ +(python (?:train|eval)\.py [^#\n]*)", README, re.MULTILINE)))


@pytest.mark.parametrize("command", COMMANDS)
def test_every_train_and_eval_command_of_the_readme_has_known_keys(command):
    words = [word for word in command.split()[2:] if "=" in word]
    assert load_config([w for w in words if not w.startswith("data.root=")]).stage in (1, 2)


def test_every_tool_of_the_readme_prints_its_help():
    tools = sorted(set(re.findall(r"python (tools/\w+\.py)", README)))
    assert len(tools) >= 4
    for tool in tools:
        text = (ROOT / tool).read_text(encoding="utf-8")
        assert "argparse" in text or '"--help"' in text, tool
        assert ast.get_docstring(ast.parse(text)), tool


def test_numbers_of_the_readme_name_their_command():
    for table in re.findall(r"(?:^\|.*\n)+", README, re.MULTILINE):
        if re.search(r"\|\s*\d+\.\d", table):
            before = README[: README.index(table)]
            assert "`" in before[-900:], f"a table of numbers without its command:\n{table[:200]}"


def test_imports_point_one_way():
    order = [
        "config",
        "schema",
        "regions",
        "tasks",
        "coinit",
        "mini",
        "data",
        "model",
        "train",
        "metrics",
        "evaluate",
        "ablation",
    ]
    allowed = {"metrics": {"schema", "regions", "tasks", "metrics"}}  # a score needs neither data nor model
    wrong = []
    for path in (ROOT / "src" / "vistallm").rglob("*.py"):
        stage = path.relative_to(ROOT / "src" / "vistallm").parts[0].removesuffix(".py")
        if stage not in order:
            continue
        seen = re.findall(r"^from vistallm\.(\w+)", path.read_text(encoding="utf-8"), re.MULTILINE)
        fine = allowed.get(stage, set(order[: order.index(stage) + 1]))
        wrong += [f"{path.name}: {name}" for name in seen if name not in fine]
    assert not wrong


def test_no_machine_paths_and_no_large_files():
    tracked = _tracked()
    if not tracked:
        pytest.skip("not a git checkout")
    assert [f for f in tracked if (ROOT / f).stat().st_size > 15_000_000] == []
    pattern = re.compile(r"(?<![\w.])/(?:root|home|work)/\w")
    named = []
    for name in tracked:
        if Path(name).suffix in {".py", ".sh", ".md", ".yaml", ".yml", ".toml"}:
            named += [name for line in (ROOT / name).read_text(encoding="utf-8").splitlines() if pattern.search(line)]
    assert named == []
