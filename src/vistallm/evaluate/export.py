"""Predictions -> the files that public evaluations take: each benchmark's own submission or result file.

COCO results (masks, boxes, captions) are read by pycocotools' `COCO.loadRes` beside the dataset's own annotations;
VQAv2's JSON by the VQA evaluation, NLVR2's CSV by its metrics.py, POPE's lines by its evaluate.py; VCR's CSV is the
leaderboard's. gRefCOCO has no public file format: one record per expression, with RLE or boxes and "no target".
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from vistallm.metrics.regions import boxes_of, image_masks
from vistallm.metrics.scores import fact
from vistallm.schema import Prediction, Region
from vistallm.tasks.answers import read_words

Predictions = Sequence[Prediction]


def write_exports(folder: Path, kind: str, name: str, predictions: Predictions) -> Path:
    """Write one benchmark's file as `folder/<name><suffix>` and return its path.

    Raises:
        ValueError: a prediction lacks the id that the file needs (older predictions have no `image_ids`).
    """
    suffix, write = EXPORTS[kind]
    text = write(predictions)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}{suffix}"
    path.write_text(text, encoding="utf-8")
    return path


def _needed(prediction: Prediction, key: str) -> Any:
    value = fact(prediction, key)
    if value is None:
        raise ValueError(f"prediction {prediction.id}: its target's meta has no {key!r}")
    return value


def _image_id(prediction: Prediction) -> int | str:
    """The dataset's id of the first image: a number for COCO ("vg:1|coco:5" -> 5), else the text after the colon."""
    names = str(_needed(prediction, "image_ids")[0]).split("|")
    chosen = next((name for name in names if name.startswith("coco:")), names[0]).partition(":")[2]
    return int(chosen) if chosen.isdigit() else chosen


def _regions(prediction: Prediction) -> list[Region]:
    return prediction.parsed.regions if prediction.parsed else []


def _answer(prediction: Prediction, unreadable: str = "") -> str:
    return prediction.parsed.answer if prediction.parsed else unreadable


def _score(regions: Sequence[Region]) -> float:
    """The lowest confidence among the regions, 1 where they have none (older predictions, coordinates as text)."""
    return min((1.0 if region.confidence is None else region.confidence for region in regions), default=0.0)


def _boxes(prediction: Prediction) -> list[list[float]]:
    """The answer's boxes as x, y, width, height."""
    boxes = boxes_of(_regions(prediction))
    return [[round(float(v), 3) for v in (x0, y0, x1 - x0, y1 - y0)] for x0, y0, x1, y1 in boxes]


def _mask(prediction: Prediction) -> dict[str, Any]:
    """The answer's regions in the first image as one RLE with text counts, as JSON needs them."""
    rle = image_masks(_regions(prediction), prediction)[0]
    counts = rle["counts"]
    return {"size": list(rle["size"]), "counts": counts.decode() if isinstance(counts, bytes) else counts}


def _json(records: Any) -> str:
    return json.dumps(records, ensure_ascii=False) + "\n"


def _coco(predictions: Predictions, masks: bool) -> str:
    """COCO results: one per expression with its regions joined (masks), or one per region (boxes)."""
    results = []
    for p in predictions:
        regions, shapes = _regions(p), list[tuple[list[Region], dict[str, Any]]]()
        if not masks:
            shapes = [([region], {"bbox": box}) for region, box in zip(regions, _boxes(p), strict=True)]
        elif regions:
            shapes = [(regions, {"segmentation": _mask(p)})]
        for own, shape in shapes:
            ids = {"image_id": _image_id(p), "category_id": 1}
            results.append(ids | shape | {"score": _score(own), "expression": p.id})
    return _json(results)


def _grefcoco(predictions: Predictions) -> str:
    records = []
    for p in predictions:
        regions = _regions(p)
        ids = {key: _needed(p, key) for key in ("ref_id", "sent_id")} | {"image_id": _image_id(p)}
        masks = any(region.kind == "mask" for region in regions)
        shape = {"segmentation": _mask(p)} if masks else {"boxes": _boxes(p)}
        records.append(ids | {"no_target": p.parsed is not None and not regions, "score": _score(regions)} | shape)
    return _json(records)


def _vcr(predictions: Predictions) -> str:
    """Annotation id and 20 probabilities, 1 for the chosen letter; .25 each where nothing was asked or read.

    A rationale's prompt holds an answer: its number is `meta["given"]` in the test set, which asks for all four; in
    other sets it is the right one, known from the question's own sample.
    """
    names = ["answer", *(f"rationale_conditioned_on_a{i}" for i in range(4))]
    right, rows = dict[str, int](), dict[str, dict[str, list[float]]]()
    for p in predictions:
        if fact(p, "mode") == "q_a":
            letter = read_words(str(p.target.get("answer")), "choice")[0] or "?"
            right[str(_needed(p, "group"))] = "ABCD".find(letter)
    for p in predictions:
        group, chosen = str(_needed(p, "group")), "ABCD".find(_answer(p) or "?")
        given = fact(p, "given", right.get(group, -1))
        name = "answer" if fact(p, "mode") == "q_a" else f"rationale_conditioned_on_a{given}"
        rows.setdefault(group, {})[name] = [float(i == chosen) for i in range(4)] if chosen >= 0 else [0.25] * 4
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["annot_id", *(f"{name}_{i}" for name in names for i in range(4))])
    for group, row in rows.items():
        writer.writerow([group, *(value for name in names for value in row.get(name, [0.25] * 4))])
    return text.getvalue()


EXPORTS: dict[str, tuple[str, Callable[[Predictions], str]]] = {
    "coco_masks": (".json", lambda ps: _coco(ps, masks=True)),
    "coco_boxes": (".json", lambda ps: _coco(ps, masks=False)),
    "grefcoco": (".json", _grefcoco),
    "captions": (".json", lambda ps: _json([{"image_id": _image_id(p), "caption": _answer(p)} for p in ps])),
    "vqav2": (
        ".json",
        lambda ps: _json([{"question_id": _needed(p, "question_id"), "answer": _answer(p)} for p in ps]),
    ),
    "vcr": (".csv", _vcr),
    # `identifier,True`; the identifier is what the sample's id has after its source and split.
    "nlvr2": (".csv", lambda ps: "".join(f"{p.id.split('-', 2)[2]},{_answer(p, 'unreadable')}\n" for p in ps)),
    # What could not be read stays as it was written: POPE's own code takes it for a yes.
    "pope": (".json", lambda ps: "".join(_json({"question": p.prompt, "answer": _answer(p, p.text)}) for p in ps)),
}
