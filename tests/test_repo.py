"""The paths, commands and numbers of README and docs, the dependencies, and what must not be in the repository."""

import argparse
import ast
import re
import runpy
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from vistallm.config import load_config

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SOURCES = sorted([*ROOT.glob("src/**/*.py"), *ROOT.glob("tools/*.py"), ROOT / "train.py", ROOT / "eval.py"])
TOOLS = sorted(path for path in ROOT.glob("tools/*.py") if "__main__" in path.read_text())
ORDER = "config schema regions tasks links coinit mini data model train metrics evaluate ablation api modules".split()  # noqa: SIM905
COMMAND = re.compile(r"^(?:    |\t)((?:python|bash|sbatch) [^#\n\\]*(?:\\\n[^#\n\\]*)*)", re.MULTILINE)


def commands():
    """The words of every command line in a page's code blocks, and of the quickstart."""
    lines = [(page, line) for page in PAGES for line in COMMAND.findall(page.read_text(encoding="utf-8"))]
    quickstart = ROOT / "tools" / "quickstart.sh"
    script = quickstart.read_text()
    for name, words in re.findall(r"\b(\w+)=\(([^)]*)\)", script):
        script = script.replace(f'"${{{name}[@]}}"', words)
    lines += [(quickstart, line) for line in re.findall(r"^python (?:.*\\\n)*.*", script, re.MULTILINE)]
    for page, line in lines:
        words = re.sub(r"\[(--?[^\]]*)\]", r"\1", line.replace("\\\n", " "))  # [--optional words]
        words = words.replace("$run", "runs/quickstart").replace(" >/dev/null", "")
        yield pytest.param(shlex.split(words), id=f"{page.name}: {line.strip()[:60]}")


class Parsed(Exception):  # noqa: N818 (not an error)
    pass


@pytest.fixture
def parse_only(monkeypatch):
    """Callable: run a tool as a script with words, until its words are read."""

    def stopping(parse):
        def parse_and_stop(*arguments):
            parse(*arguments)
            raise Parsed

        return parse_and_stop

    for name in ("parse_args", "parse_intermixed_args"):
        monkeypatch.setattr(argparse.ArgumentParser, name, stopping(getattr(argparse.ArgumentParser, name)))

    def run(script, words):
        monkeypatch.setattr(sys, "argv", [script, *words])
        monkeypatch.syspath_prepend(str(ROOT / "tools"))
        with pytest.raises(Parsed):
            runpy.run_path(str(ROOT / script), run_name="__main__")

    return run


@pytest.mark.parametrize("words", commands())
def test_every_command_of_the_docs_has_known_words(words, parse_only):
    program, script, *words = [
        word for word in words if not word.startswith(("--nodes", "--gpus", "--ntasks", "--array"))
    ]
    assert (ROOT / script).is_file() or script in ("-m", "-c"), script
    settings = [w for w in words if "=" in w and not w.startswith(("-", "data.root="))]
    if script in ("train.py", "eval.py") or (program == "sbatch" and "ablations" not in script):
        assert all("=" in word or word == "..." for word in words), words
        load_config(settings)
    elif script == "tools/plan.py":
        runpy.run_path(str(ROOT / script))["read_words"](words)
    elif script.endswith(".py"):
        parse_only(script, words)


@pytest.mark.parametrize("tool", TOOLS, ids=lambda path: path.name)
def test_every_tool_prints_its_help(tool, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(tool), "--help"])
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    with pytest.raises(SystemExit) as left:
        runpy.run_path(str(tool), run_name="__main__")
    assert not left.value.code
    text, doc = capsys.readouterr().out, ast.get_docstring(ast.parse(tool.read_text()))
    assert " ".join(doc.split())[:60] in " ".join(text.split()), "the help begins with what the tool does"


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_every_path_of_the_docs_exists(page):
    text = page.read_text(encoding="utf-8")
    words = re.findall(r"[\w./{},*-]+/[\w./{},*-]*|[\w-]+\.(?:py|sh|yml|yaml|toml)", text)
    ours = re.compile(r"(src|tools|tests|configs|assets|examples)/|train\.py$|eval\.py$|environment\.yml")
    known = {word.strip(".,") for word in words if ours.match(word)}
    assert not sorted(p for p in known if not (ROOT / p).exists() and not list(ROOT.glob(p)))
    links = [link for link in re.findall(r"\]\(([^)#]+)", text) if not link.startswith("http")]
    assert not [link for link in links if not (page.parent / link).exists()]


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_tables_are_whole_and_name_the_command_of_their_numbers(page):
    text = page.read_text(encoding="utf-8")
    for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        columns = {len(re.findall(r"(?<!\\)\|", row)) for row in table.splitlines()}
        assert len(columns) == 1, f"rows of different length:\n{table[:200]}"
        if re.search(r"\|\s*\**\d+\.\d", table):
            assert "`" in text[: text.index(table)][-900:], f"a table of numbers without its command:\n{table[:200]}"


def test_the_readme_is_short_and_repeats_the_scores_of_the_results():
    readme, results = (page.read_text(encoding="utf-8") for page in (PAGES[0], ROOT / "docs" / "results.md"))
    assert len(readme.splitlines()) <= 140
    rows = re.findall(r"^\|.*\d\.\d \|.*\|$", readme, re.MULTILINE)
    assert len(rows) > 4
    assert set(rows) <= set(results.splitlines())


def test_the_file_map_names_every_room():
    readme = PAGES[0].read_text(encoding="utf-8")
    rooms = [
        path for path in (ROOT / "src" / "vistallm").iterdir() if path.suffix in ("", ".py") and path.stem[0] != "_"
    ]
    assert [path.name for path in rooms if f"src/vistallm/{path.name}" not in readme] == []


def test_a_mask_and_an_answer_cross_at_most_eight_files():
    design = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    ways = [part for part in design.split("\n## ") if part.startswith("The way of")]
    assert [len(set(re.findall(r"^\d\. `(src/[\w/.]+)`", way, re.MULTILINE))) for way in ways] == [8, 8]


def modules(path):
    """Names that a file imports, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module


def test_imports_point_one_way():
    allowed = {"metrics": {"schema", "regions", "tasks", "metrics"}}  # a score needs neither data nor model
    wrong = []
    for path in (ROOT / "src" / "vistallm").rglob("*.py"):
        stage = path.relative_to(ROOT / "src" / "vistallm").parts[0].removesuffix(".py")
        if stage not in ORDER:
            continue
        seen = {name.split(".")[1] for name in modules(path) if name.startswith("vistallm.")}
        wrong += [f"{path.name}: {name}" for name in seen - allowed.get(stage, set(ORDER[: ORDER.index(stage) + 1]))]
    assert not wrong


def test_imports_have_no_circles():
    graph = {}
    for path in (ROOT / "src").rglob("*.py"):
        name = ".".join(path.relative_to(ROOT / "src").with_suffix("").parts).removesuffix(".__init__")
        graph[name] = set(modules(path))
    done = set()

    def visit(name, above):
        assert name not in above, " -> ".join([*above, name])
        for other in () if name in done else graph[name] & graph.keys() - {name}:
            visit(other, [*above, name])
        done.add(name)

    for name in graph:
        visit(name, [])


def test_direct_imports_are_pinned_dependencies():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pinned = {line.partition("==")[0].lower().replace("-", "_") for line in project["dependencies"] if "==" in line}
    names = {"yaml": "pyyaml", "PIL": "pillow", "cv2": "opencv_python_headless", "open_clip": "open_clip_torch"}
    imported = {name.partition(".")[0] for path in SOURCES for name in modules(path)}
    ours = {"vistallm", *(path.stem for path in SOURCES)}
    optional = {"wandb", "lmms_eval", "gradio", "fastapi", "starlette"}
    external = imported - set(sys.stdlib_module_names) - ours - optional
    assert {names.get(name, name).lower() for name in external} <= pinned


def _tracked():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    return [line for line in listed.stdout.splitlines() if (ROOT / line).is_file()]


def test_no_machine_paths_and_no_large_files():
    tracked = _tracked()
    if not tracked:
        pytest.skip("not a git checkout")
    assert [f for f in tracked if (ROOT / f).stat().st_size > 16_000_000] == []
    pattern = re.compile(r"(?<![\w.])/(?:root|home|work)/\w")
    named = []
    for name in tracked:
        if Path(name).suffix in {".py", ".sh", ".md", ".yaml", ".yml", ".toml"}:
            named += [name for line in (ROOT / name).read_text(encoding="utf-8").splitlines() if pattern.search(line)]
    assert named == []
