"""The table of what each source needs: complete, true to the settings that the loaders know, and the same in docs."""

import re
from pathlib import Path

import pytest

from vistallm.coinit.sources import SOURCES, describe_source
from vistallm.coinit.sources.base import SourceOptions

PAGE = (Path(__file__).parents[3] / "docs" / "coinit.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("source", SOURCES)
def test_rows(source, tmp_path):
    text = describe_source(source)
    assert text in PAGE
    row = {line[2:12].strip(): line[12:] for line in text.splitlines()[1:]}
    assert all(row.values())
    split = re.search(r"--split (\S+) --", row["command"])[1]
    with pytest.raises(ValueError, match="this source knows") as error:
        SOURCES[source](SourceOptions(tmp_path, split, settings={"nonsense": "1"}))
    known = str(error.value).partition("this source knows ")[2].replace("no setting", "none").split(", ")
    known = ["layout", "classes"] if source == "coseg" else known
    assert set(known) <= set(re.findall(r"\w+", row["settings"]))


def test_help_prints_the_row(command, capsys):
    with pytest.raises(SystemExit):
        command("grefcoco", "--help")
    assert describe_source("grefcoco") in capsys.readouterr().out
