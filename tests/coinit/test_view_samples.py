"""tools/view_samples.py: the page shows the exact tokens, and says which of them are supervised."""

import html
import importlib.util
import re
from pathlib import Path

import numpy as np
import pytest

from vistallm.schema import IGNORE_INDEX

ROOT = Path(__file__).parents[2]
VIEWER = ROOT / "tools" / "view_samples.py"


@pytest.fixture(scope="module")
def viewer():
    spec = importlib.util.spec_from_file_location("view_samples", VIEWER)
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    return tool


def spans(text):
    return [
        (kind.split(), html.unescape(name)) for kind, name in re.findall(r'<span class="([sr ]*)"[^>]*>([^<]*)<', text)
    ]


@pytest.mark.parametrize("task", ["res", "nlvr2", "vcr"])
def test_tokens_are_those_of_training(viewer, samples, builder, task):
    sequence = builder.build(samples[task][0])
    shown = spans(viewer.html_page([viewer.describe(samples[task][0], builder, 340)], "one").partition("<main>")[2])
    shown = [(kind, name) for kind, name in shown if " × " not in name]
    text = builder.vocabulary.lm
    kept = [(i, label) for i, label in zip(sequence.input_ids.tolist(), sequence.labels.tolist(), strict=True)]
    kept = [pair for pair in kept if pair[0] != builder.vocabulary.image_id]
    assert [name for _, name in shown] == text.convert_ids_to_tokens([i for i, _ in kept])
    assert ["s" in kind for kind, _ in shown] == [label != IGNORE_INDEX for _, label in kept]
    assert {name for kind, name in shown if "r" in kind} <= set(builder.vocabulary.region_tokens)


def test_page_of_a_mixed_folder(viewer, mini_root, builder):
    chosen = viewer.choose(mini_root, "test", None, 15, 0)
    assert len({sample.task for sample in chosen}) == 15
    page = viewer.html_page([viewer.describe(sample, builder, 340) for sample in chosen], "mini <set>")
    assert page.count("<figure>") == 15
    assert page.count("data:image/jpeg;base64,") == sum(len(sample.images) for sample in chosen)
    assert "mini &lt;set&gt;: 15 samples" in page
    assert "http" not in page


def test_a_sample_that_training_leaves_out_says_why(viewer, samples, builder):
    import dataclasses

    view = viewer.describe(samples["res"][0], dataclasses.replace(builder, max_length=10), 340)
    page = viewer.html_page([view], "one").partition("<main>")[2]
    assert "No tokens, training would leave it out: too-long" in page
    assert 'class="tokens"' not in page
    assert np.asarray(viewer.png_sheet([view]))[..., 0].max() == 255


def test_what_the_tokens_say_is_drawn_in_white(viewer, samples, builder):
    """Stored and trained regions differ by the bins alone, so white lines lie on the stored box."""
    sample = samples["rec"][0]
    scale = 340 / 1.6 / sample.images[0].height
    stored, trained = (viewer.describe(sample, one, 340)["panels"][0] for one in (None, builder))
    y, x = np.nonzero((stored != trained).any(2) & (trained == 255).all(2))
    seen = np.array([x.min(), y.min(), x.max(), y.max()]) / scale
    assert np.abs(seen - sample.regions[0].box).max() < 6


def test_prompts_and_keypoints_are_shown(viewer):
    from vistallm.coinit.images import decode_pixels
    from vistallm.mini.build import MiniRecipe, make_sample

    builder, views = viewer.load_builder(None, ["model.links=all"]), []
    for task, one in (("interactive", builder), ("interactive", None), ("pose", builder)):
        sample, files = make_sample(MiniRecipe(), "test", task, 5)
        sample.pixels = [decode_pixels(data, "") for data, _ in files]
        views.append(viewer.describe(sample, one, 340))
    assert views[0]["rounds"] == [["Segment [0] (mask).", "The mask is [0]."]]
    assert (views[0]["panels"][0] > 200).sum() > (views[1]["panels"][0] > 200).sum() + 100, "the prompt is drawn"
    assert "square [0], top left (0)" in views[2]["rounds"][0][1]
    assert "[POSE]" in {token["name"] for token in views[2]["tokens"]}


def test_sheet(viewer, mini_root):
    chosen = viewer.choose(mini_root, "test", "coseg", 2, 0)
    assert {sample.task for sample in chosen} == {"coseg"}
    sheet = viewer.png_sheet([viewer.describe(sample, None, viewer.TILE) for sample in chosen])
    assert sheet.width == 4 * (viewer.TILE + 2 * viewer.GAP)


def test_sheet_of_a_models_answers(viewer, mini_root, tmp_path):
    """Prompts are those of the samples, texts and regions those of the shipped model."""
    samples = viewer.choose(mini_root, "test", None, 0, 0, ["mini-test-pointqa-000001", "mini-test-res-000000"])
    asked, shown = viewer.answered(samples, str(ROOT / "assets/mini"))
    assert (asked.id, shown.id) == ("mini-test-pointqa-000001", "mini-test-res-000000")
    assert [region.kind for region in asked.regions] == ["point"], "given by the prompt"
    assert "[point]" in asked.instruction
    assert shown.instruction == viewer.describe(samples[1], None, 340)["rounds"][-1][0]
    assert re.fullmatch(r"The mask is \[mask, \d+ points\]\.", shown.answer)
    assert shown.regions[0].polygons is not None
    words = [str(mini_root), "--split", "test", "--answers", str(ROOT / "assets/mini"), "--ids", shown.id, "--out"]
    assert viewer.main([*words, str(tmp_path / "a.png")]) == 0
    assert viewer.main([*words, str(tmp_path / "a.html")]) == 1
