"""Predictions of other systems: every form scores as the predictions it was made from, and nothing is lost silently."""

import copy
import json
import math
from pathlib import Path

import cv2
import numpy as np
import pytest
import yaml
from pycocotools import mask as coco_mask
from scipy import stats

from vistallm.config import Config, ForeignConfig, apply_overrides
from vistallm.evaluate.benchmarks import load_benchmarks, score
from vistallm.evaluate.conventions import compare, interval
from vistallm.evaluate.foreign import Given, place, read_foreign, written_numbers
from vistallm.evaluate.predictions import Faults
from vistallm.evaluate.run import run
from vistallm.metrics.regions import boxes_of
from vistallm.regions.letterbox import Letterbox
from vistallm.regions.masks import polygons_to_mask

KNOWN = load_benchmarks()


def shift(region, dx):
    """A region moved to the right, so that it is wrong by a known amount."""
    moved = copy.deepcopy(region)
    moved.box = None if region.box is None else (region.box[0] + dx, region.box[1], region.box[2] + dx, region.box[3])
    return moved


@pytest.fixture(scope="module")
def answers(samples_of_mini, perfect, codec):
    """Our own answers, the boxes moved by 3 pixels, and what each benchmark scores with them."""
    made = [perfect(sample, codec) for sample in samples_of_mini]
    for one in made:
        one.parsed.regions = [shift(region, 3) for region in one.parsed.regions]
    return made


@pytest.fixture(scope="module")
def samples_of_mini(mini_root):
    from vistallm.coinit.shards import read_raw, split_shards
    from vistallm.schema import Sample

    raws = (raw for shard in split_shards(mini_root, "test") for raw in read_raw(shard))
    return [Sample.from_json(raw.record) for raw in raws if raw.record["task"] in ("rec", "res", "grec", "gres")]


def read(mini_root, path, form, names, *words):
    faults = Faults()
    config = apply_overrides(Config(), [f"predictions={path}", f"format={form}", f"data.root={mini_root}", *words])
    return read_foreign(config, mini_root, {name: KNOWN[name] for name in names}, faults), faults.found


def scores_of(predictions):
    return {name: one.scores for name, one in score(predictions, KNOWN).items()}


def same(found, expected):
    """Scores equal up to the rounding of the written file."""
    return all(
        found[name].keys() == row.keys()
        and all(
            found[name][key] == value or math.isclose(found[name][key], value, abs_tol=0.01)
            for key, value in row.items()
        )
        for name, row in expected.items()
    )


def drawn(one):
    image = one.images[0]
    masks = [polygons_to_mask(r.polygons, image["height"], image["width"]) for r in one.parsed.regions]
    return np.any(masks, axis=0) if masks else np.zeros((image["height"], image["width"]), bool)


def rle(mask):
    coded = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": coded["size"], "counts": coded["counts"].decode()}


MASKS = ("mini_res", "mini_gres")
BOXES = ("mini_rec", "mini_grec")


@pytest.mark.parametrize("form", ["coco", "glamm", "lisa"])
def test_masks_score_as_the_answers_they_were_made_of(form, answers, mini_root, tmp_path):
    own = [one for one in answers if one.benchmark in MASKS]
    if form == "coco":
        path = tmp_path / "results.json"
        path.write_text(json.dumps([{"id": one.id, "segmentation": rle(drawn(one)), "score": 0.5} for one in own]))
    elif form == "glamm":  # a file per image: a mask for each phrase
        path = tmp_path / "glamm"
        path.mkdir()
        for one in own:
            record = {"expression": one.id, "phrases": ["it"], "pred_masks": [rle(drawn(one))]}
            (path / f"{one.id}.json").write_text(json.dumps(record))
    else:  # 0 and 100 as JPEG, an image per object
        path = tmp_path / "lisa"
        path.mkdir()
        for one in own:
            assert cv2.imwrite(str(path / f"{one.id}_mask_0.jpg"), drawn(one).astype(np.uint8) * 100)
    predictions, faults = read(mini_root, path, "masks" if form == "lisa" else "coco", MASKS)
    assert faults == {}
    expected = scores_of(own)
    if form == "lisa":  # JPEG moves an edge pixel here and there
        for name, row in scores_of(predictions).items():
            assert row[KNOWN[name].headline] == pytest.approx(expected[name][KNOWN[name].headline], abs=0.03)
    else:
        assert scores_of(predictions) == expected


FORMS = {
    "unit": lambda b, w, h: f"It is at [{b[0] / w:.4f}, {b[1] / h:.4f}, {b[2] / w:.4f}, {b[3] / h:.4f}].",
    "thousand": lambda b, w, h: "<box>({:.1f},{:.1f}),({:.1f},{:.1f})</box>".format(
        *(1000 * v / s for v, s in zip(b, (w, h, w, h), strict=True))
    ),
    "pixels": lambda b, w, h: json.dumps({"bbox_2d": [round(v, 2) for v in b]}),
    "unit yxyx": lambda b, w, h: json.dumps([b[1] / h, b[0] / w, b[3] / h, b[2] / w]),
    "unit padded": lambda b, w, h: json.dumps(
        Letterbox(w, h, 7).to_unit(np.reshape(b, (2, 2))).ravel().round(4).tolist()
    ),
    "pixels xywh": lambda b, w, h: json.dumps([b[0], b[1], b[2] - b[0], b[3] - b[1]]),
}


def write_text(path, answers, form):
    lines = []
    for one in answers:
        size = one.images[0]["width"], one.images[0]["height"]
        boxes = np.clip(boxes_of(one.parsed.regions).reshape(-1, 2, 2), 0, size).reshape(-1, 4)
        lines.append({"id": one.id, "text": " and ".join(FORMS[form](box.tolist(), *size) for box in boxes) or "[]"})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.mark.parametrize("form", FORMS)
def test_boxes_in_text_score_as_the_answers_they_were_made_of(form, answers, mini_root, tmp_path, capsys):
    own, path = [one for one in answers if one.benchmark in BOXES], tmp_path / "answers.jsonl"
    write_text(path, own, form)
    words = form.split()
    declared = [
        f"foreign.coordinates={words[0]}",
        "foreign.padded=true" if "padded" in words else "foreign.padded=false",
    ]
    declared += [f"foreign.order={word}" for word in words if word in ("yxyx", "xywh")]
    predictions, faults = read(mini_root, path, "text", BOXES, *declared)
    assert faults == {}
    assert same(scores_of(predictions), scores_of(own))
    assert capsys.readouterr().err == ""


def test_another_convention_is_a_warning_and_changes_nothing(answers, mini_root, tmp_path, capsys):
    own, path = [one for one in answers if one.benchmark == "mini_rec"], tmp_path / "answers.jsonl"
    write_text(path, own, "thousand")
    predictions, _ = read(mini_root, path, "text", ["mini_rec"], "foreign.coordinates=pixels")
    assert scores_of(predictions)["mini_rec"]["p_at_50"] == 0
    told = capsys.readouterr().err
    assert "coordinates=thousand order=xyxy padded=False would give" in told


def test_missing_unknown_repeated_and_malformed_records_are_counted(answers, mini_root, tmp_path):
    own, path = [one for one in answers if one.benchmark == "mini_rec"], tmp_path / "answers.jsonl"
    write_text(path, own, "pixels")
    lines = path.read_text().splitlines()
    strange = json.dumps({"id": "of-another-set", "text": "[1, 2, 3, 4]"})
    path.write_text("\n".join([lines[1], lines[1], strange, "{broken", json.dumps({"id": own[0].id, "bbox": 3})]))
    predictions, faults = read(mini_root, path, "text", ["mini_rec"], "foreign.coordinates=pixels")
    assert len(predictions) == len(own)
    text = "\n".join(fault for some in faults.values() for fault in some)
    assert "1 of 2 samples have more than one record" in text
    assert "1 of 2 samples have a malformed record" in text
    assert "1 of 4 records name no sample" in text
    assert "line 4: expected a record" in text
    path.write_text(lines[0])
    predictions, faults = read(mini_root, path, "text", ["mini_rec"], "foreign.coordinates=pixels")
    assert "1 of 2 samples have no record, which counts as wrong" in faults["mini_rec"][0]
    assert {one.failure for one in predictions} == {None, "missing"}


def test_what_can_not_be_read_is_refused(answers, mini_root, tmp_path):
    path = tmp_path / "answers.jsonl"
    path.write_text(json.dumps({"id": "x", "text": "[1, 2, 3, 4]"}))
    with pytest.raises(ValueError, match="expected foreign.coordinates= with one of unit, thousand, pixels"):
        read(mini_root, path, "text", ["mini_rec"])
    with pytest.raises(ValueError, match="none of its 1 records names a sample of mini_rec"):
        read(mini_root, path, "text", ["mini_rec"], "foreign.coordinates=unit")
    with pytest.raises(ValueError, match="one image a sample"):
        read(mini_root, path, "coco", ["mini_coseg"])
    with pytest.raises(ValueError, match="expects a folder of mask images"):
        read(mini_root, path, "masks", ["mini_res"])
    one = next(one for one in answers if one.benchmark == "mini_res")
    path.write_text(json.dumps({"id": one.id, "segmentation": rle(np.ones((7, 9)))}))
    predictions, faults = read(mini_root, path, "coco", ["mini_res"])
    assert predictions[[p.id for p in predictions].index(one.id)].failure == "malformed"
    assert "expected run lengths of size" in "".join(faults["mini_res"])
    size = [one.images[0]["height"], one.images[0]["width"]]
    path.write_text(json.dumps([{"id": one.id, "segmentation": {"size": size, "counts": "5"}}]))
    assert "do not fill" in "".join(read(mini_root, path, "coco", ["mini_res"])[1]["mini_res"])


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("[0.1, 0.2, 0.3, 0.4]", [[0.1, 0.2, 0.3, 0.4]]),
        ("(1,2),(3,4)", [[1, 2, 3, 4]]),
        ("<box>[[1, 2, 3, 4], [5, 6, 7, 8]]</box>", [[1, 2, 3, 4], [5, 6, 7, 8]]),
        ("[0.1,0.2,0.3,0.4;0.5,0.6,0.7,0.8]", [[0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8]]),
        ("[[[1, 2], [3, 4], [5, 6]], [[7, 8], [9, 10], [11, 12]]]", [[1, 2, 3, 4, 5, 6], [7, 8, 9, 10, 11, 12]]),
        ("a star (1) of 2, see [3]", []),
        ("[1, 2, 3", []),
        ("[-1, 2e, 3, 4]", []),
    ],
)
def test_numbers_of_a_text(text, numbers):
    assert written_numbers(text) == numbers


def test_pixels_of_a_resized_image_are_scaled_back():
    box = place([28, 56, 56, 112], "box", (100, 50), ForeignConfig("pixels"), Given(size=(56.0, 112.0)))
    assert box.tolist() == [[50, 25], [100, 50]]


def test_ids_are_matched_by_reference_sentence_or_words(answers, mini_root, tmp_path, monkeypatch):
    from vistallm.evaluate import foreign
    from vistallm.schema import ImageInfo, Region, Sample

    def made(ref, sent, image, words):
        meta = {"ref_id": ref, "sent_id": sent, "image_ids": [f"coco:{image}"]}
        region = Region(0, "box", box=(0, 0, 4, 4))
        return Sample(
            f"s-{ref}-{sent}", "rec", "x", [ImageInfo("0.jpg", 8, 8)], None, {"expr": words}, None, [region], meta
        )

    samples = [
        made(1, 0, 5, "Left man"),
        made(1, 1, 5, "the dog"),
        made(2, 7, 6, "left man"),
        made(3, 8, 6, "left man"),
    ]
    monkeypatch.setattr(foreign, "_samples", lambda *_: samples)
    path, box = tmp_path / "r.json", [0, 0, 4, 4]
    records = [
        {"expression": "s-1-0", "bbox": box},
        {"ref_id": 1, "sent_id": 1, "bbox": box},
        {"sent_id": 7, "bbox": box},
        {"image_id": "COCO_train2014_000000000006", "phrase": "left  man", "bbox": box},  # of two samples: nobody's
    ]
    path.write_text(json.dumps(records))
    predictions, faults = read(mini_root, path, "coco", ["mini_rec"])
    assert [one.failure for one in predictions] == [None, None, None, "missing"]
    assert "1 of 4 records name no sample" in faults[""][0]
    samples[2].meta["image_ids"] = ["custom:a dog.jpg"]
    for image, row in ((5, 0), ("a dog.jpg", 2)):
        path.write_text(json.dumps([{"image_id": image, "sentence": "LEFT man", "bbox": box}]))
        assert read(mini_root, path, "coco", ["mini_rec"])[0][row].parsed.regions[0].box == (0, 0, 4, 4)


def test_a_task_of_lmms_eval_scores_text_answers_as_we_do(answers, mini_root, tmp_path):
    """The files are what lmms-eval reads (docs/evaluation.md names the run with the real package)."""
    from vistallm.evaluate import lmms

    assert lmms.write_task(mini_root, KNOWN["mini_gres"], tmp_path) == 2
    text = (tmp_path / "mini_gres.yaml").read_text()
    loader = type("Loader", (yaml.SafeLoader,), {})
    loader.add_constructor("!function", lambda own, node: getattr(lmms, own.construct_scalar(node).rpartition(".")[2]))
    task = yaml.load(text, loader)
    docs = [json.loads(line) for line in Path(task["dataset_kwargs"]["data_files"]["test"]).read_text().splitlines()]
    own = {one.id: one for one in answers if one.benchmark == "mini_gres"}
    results = []
    for doc in docs:
        one, size = own[doc["id"]], (doc["width"], doc["height"])
        assert task["doc_to_visual"](doc)[0].size == size
        assert task["doc_to_text"](doc, task["lmms_eval_specific_kwargs"]["vistallm"]) == one.prompt
        assert "JSON list of polygons" in task["doc_to_text"](doc, task["lmms_eval_specific_kwargs"]["default"])
        polygons = [(p / size).round(6).tolist() for region in one.parsed.regions for p in region.polygons]
        results.append(task["process_results"](doc, [json.dumps(polygons)]))
        assert "score" not in next(iter(results[-1].values()))
    expected = scores_of(own.values())["mini_gres"]
    for row in task["metric_list"]:
        found, truth = row["aggregation"]([one[row["metric"]] for one in results]), expected[row["metric"]]
        assert math.isnan(found) if truth is None else found == pytest.approx(100 * truth, abs=0.5)
    unreadable = task["process_results"](docs[0], ["[0.1, 0.2, 0.3, 0.4]"])["giou"]
    assert unreadable["failure"] == "malformed"
    with pytest.raises(ValueError, match="expected a benchmark of masks or boxes"):
        lmms.write_task(mini_root, KNOWN["mini_vqa"], tmp_path)


def test_intervals_are_those_of_scipy():
    rng = np.random.default_rng(1)
    pairs = np.stack([rng.random(80), rng.random(80) + 1], 1)
    found = interval(pairs)
    truth = stats.bootstrap(
        (pairs[:, 0], pairs[:, 1]),
        lambda a, b, axis: a.sum(axis) / b.sum(axis),
        paired=True,
        n_resamples=4000,
        method="percentile",
        rng=0,
    ).confidence_interval
    assert found == pytest.approx((truth.low, truth.high), abs=0.01)


def test_rows_stand_beside_their_own_definition_and_full_sets_alone(answers):
    own = [copy.deepcopy(one) for one in answers if one.benchmark == "mini_res"]
    for number, one in enumerate(own):
        one.score, one.target["meta"]["ref_id"] = 1.0, number // 2
    paper = [
        {"model": "A", "source": "page", "scores": {"miou": 77.2}},
        {"model": "B", "source": "x", "scores": {"ciou": 5}},
    ]
    benchmark = copy.copy(KNOWN["mini_res"])
    benchmark.paper, benchmark.size = paper, len(own)
    lines = {line.split("|")[1].strip(): line for line in compare(benchmark, own) if line.count("|") == 5}
    assert "A 77.2 (page)" in lines["Mean IoU (mIoU)"]
    assert "A" not in lines["Cumulative IoU (cIoU)"].split("|")[4]
    assert lines["Mean IoU (mIoU), mean per instance"].endswith("|  |")
    benchmark.size = 10834
    text = "\n".join(compare(benchmark, own))
    assert "all 10834 samples" in text
    assert "A 77.2" not in text


def test_the_command_writes_predictions_that_score_alike(answers, mini_root, tmp_path, capsys):
    own, path = [one for one in answers if one.benchmark == "mini_res"], tmp_path / "results.json"
    path.write_text(json.dumps([{"id": one.id, "segmentation": rle(drawn(one))} for one in own]))
    assert run([f"predictions={path}", "format=coco", "benchmarks=[mini_res]", f"data.root={mini_root}"]) == 0
    assert "| Cumulative IoU (cIoU) |" in capsys.readouterr().out
    out = tmp_path / "results-scores"
    again = tmp_path / "again"
    assert run([f"predictions={out}/predictions.jsonl", f"run_dir={again}"]) == 0
    rows = [json.loads((folder / "scores.json").read_text())["benchmarks"]["mini_res"] for folder in (out, again)]
    assert rows[0]["scores"] == rows[1]["scores"]
    assert (out / "conventions.md").read_text() == (again / "conventions.md").read_text()
    with pytest.raises(ValueError, match=r"expected the file's benchmarks=\[...\], got none"):
        run([f"predictions={path}", "format=coco", f"data.root={mini_root}"])
