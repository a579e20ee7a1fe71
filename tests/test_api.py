"""The Python interface on the shipped model: the answers of eval.py's path, batched, streamed and sampled."""

import json
import runpy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from vistallm import VistaLLM
from vistallm.api import AnswerRegion
from vistallm.evaluate.prompt import make_sample
from vistallm.regions.masks import polygons_to_mask
from vistallm.schema import Region

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def model():
    return VistaLLM.from_pretrained(ROOT / "assets/mini", device="cpu")


@pytest.fixture(scope="module")
def chosen(samples):
    """Samples of segmentation, with the prompt that a user would write."""
    return [(sample.pixels[0], f"Segment {sample.fields['expr']}.") for sample in samples["res"] + samples["gres"]]


@pytest.fixture(scope="module")
def answers(model, chosen):
    return [model.predict(image, prompt) for image, prompt in chosen]


def test_regions_are_those_of_the_generated_text(model, chosen, answers, samples):
    for (image, _), answer in zip(chosen, answers, strict=True):
        assert answer.failure is None
        letterbox = model.builder.build(make_sample([image], "x"), answered=False).letterboxes
        wanted = model.builder.codec.decode(answer.raw, letterbox).regions
        for region, want in zip(answer.regions, wanted, strict=True):
            mask = region.mask()
            assert mask.dtype == bool
            assert np.array_equal(mask, polygons_to_mask(want.polygons, *image.shape[:2]))
            x0, y0, x1, y1 = map(int, region.box)
            assert mask[y0:y1, x0:x1].sum() == mask.sum()
            assert mask[y0, x0:x1].any()
            assert mask[y0:y1, x1 - 1].any()
            assert 0 < region.confidence <= 1
    there = [bool(sample.regions) for sample in samples["res"] + samples["gres"]]
    right = sum(bool(answer.regions) == there for answer, there in zip(answers, there, strict=True))
    assert any(answer.regions for answer in answers)
    assert right > len(chosen) // 2, "half of them ask for what is not there"


def test_a_batch_answers_as_its_prompts_do_alone(model, chosen, answers):
    batch = model.predict([[image] for image, _ in chosen], [prompt for _, prompt in chosen])
    assert [one.raw for one in batch] == [one.raw for one in answers]
    image = chosen[0][0]
    assert [one.raw for one in model.predict(image, [chosen[0][1]] * 2)] == [answers[0].raw] * 2


def test_a_stream_ends_in_the_whole_answer_and_grows_by_whole_regions(model, chosen, answers):
    (image, prompt), whole = max(zip(chosen, answers, strict=True), key=lambda pair: len(pair[1].regions))
    parts = list(model.stream(image, prompt))
    assert parts[-1].to_json() == whole.to_json()
    assert len(parts) > 3
    for before, after in zip(parts[:-1], parts[1:], strict=True):
        assert before.failure is None
        known, more = ([r.to_json() for r in one.regions] for one in (before, after))
        assert [r["polygons"] for r in known] == [r["polygons"] for r in more[: len(known)]]
    stream = model.stream(image, prompt)
    next(stream)
    stream.close()
    assert model.predict(image, prompt).raw == whole.raw, "a closed stream lets go of the model"


def test_sampling_draws_and_a_limit_cuts(model, chosen):
    torch.manual_seed(3)
    image, prompt = chosen[0]
    drawn = {model.predict(image, prompt, temperature=2.0).raw for _ in range(4)}
    assert len(drawn) > 1
    short, usual = (model.predict(image, "Describe the image.", max_new_tokens=n) for n in (2, None))
    assert short.cut
    assert len(short.raw) < len(usual.raw)


def test_questions_about_one_image_read_it_once(model, chosen, monkeypatch):
    read, features = [], model.model.encoder.features
    monkeypatch.setattr(model.model.encoder, "features", lambda images: read.append(len(images)) or features(images))
    images = [chosen[0][0], chosen[1][0]]
    prompts = [prompt for _, prompt in chosen[:2]]
    answers = model.predict([images[0], images[1], images[0], [images[1], images[0]]], [*prompts, *prompts])
    assert read == [2]
    monkeypatch.undo()
    alone = [model.predict(images[0], prompts[0]), model.predict(images[1], prompts[1])]
    assert [one.raw for one in answers[:2]] == [one.raw for one in alone]


def test_the_notebook_runs():
    cells = json.loads((ROOT / "examples/vistallm.ipynb").read_text())["cells"]
    assert len([cell for cell in cells if cell["cell_type"] == "code"]) > 5
    names = {}
    for cell in cells:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []
            exec("".join(cell["source"]), names)
    assert names["answer"].regions[0].mask().sum() == names["mask"].sum() > 0


def test_the_exported_language_model_alone_answers_alike(chosen, tmp_path, capsys, monkeypatch):
    """Plain transformers on the embeddings of prompt and image, token by token."""
    monkeypatch.setattr("vistallm.evaluate.generate.PooledBins", lambda roles: lambda ids, scores: scores)
    image, prompt = chosen[0]
    Image.fromarray(image).save(tmp_path / "a.png")
    export = runpy.run_path(str(ROOT / "tools/export.py"))["export"]
    export(str(ROOT / "assets/mini"), tmp_path / "out", torch.float32, language_model=True)
    example = runpy.run_path(str(ROOT / "examples/prompt_embeds.py"))["main"]
    example(str(tmp_path / "out"), str(tmp_path / "a.png"), prompt, str(tmp_path / "e.pt"))
    assert capsys.readouterr().out.splitlines()[-1] == "the same as VistaLLM's"
    assert torch.load(tmp_path / "e.pt").ndim == 2


def test_links_answer_where_the_model_has_them(model, chosen):
    image, prompt = chosen[0]
    answer = model.predict(image, prompt, task="gres", head="link")
    assert answer.raw.startswith("The mask")
    assert "[GRD]" in answer.raw
    assert all(region.rle is not None and region.mask().any() for region in answer.regions)
    found = model.predict(image, "Detect the object.", task="det", head="link")
    assert found.kind == "box"
    with pytest.raises(ValueError, match="expected a model with links"):
        VistaLLM(SimpleNamespace(links=None), model.config).predict(image, prompt, task="gres", head="link")


def test_a_calibration_maps_confidence_and_presence(model, chosen, monkeypatch):
    image, prompt = chosen[0]
    monkeypatch.setattr(model, "calibration", {})
    plain = model.predict(image, prompt)
    monkeypatch.setattr(model, "calibration", {"mask": (2.0, 1.0), "presence": (1.0, 0.0)})
    answer = model.predict(image, prompt)
    assert (plain.calibrated, answer.calibrated) == (False, True)
    odds = np.log(plain.regions[0].confidence / (1 - plain.regions[0].confidence))
    assert answer.regions[0].confidence == pytest.approx(1 / (1 + np.exp(-2 * odds - 1)))
    assert answer.presence == pytest.approx(plain.presence, abs=1e-5)


def test_words_alone_and_what_cannot_be_answered(model, chosen):
    image = chosen[0][0]
    answer = model.predict(image, "How many objects are there?", task="vqa")
    assert (answer.kind, answer.regions, answer.text) == ("text", [], answer.raw.replace(" .", "."))
    for words, wrong in (
        ({"head": "link"}, "link with a task that links answer"),
        ({"task": "ress"}, "expected one of"),
        ({"max_new_tokens": 0}, "at least 1"),
    ):
        with pytest.raises(ValueError, match=wrong):
            model.predict(image, "Segment the star.", **words)
    with pytest.raises(ValueError, match="each of 2 prompts, got 1"):
        model.predict([image], ["a", "b"])
    with pytest.raises(ValueError, match="float32 or torch.bfloat16"):
        VistaLLM.from_pretrained("assets/mini", dtype=torch.float16)
    with pytest.raises(ValueError, match="covers no pixels"):
        AnswerRegion(**vars(Region(0, "point", point=(1, 2)))).mask()
