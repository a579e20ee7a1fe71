"""Predictions of one benchmark -> the submission or result file that its own evaluation reads.

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

from vistallm.evaluate.parse import read_words
from vistallm.evaluate.targets import boxes_of, fact, image_masks
from vistallm.schema import Prediction, Region, Rle

Export = Callable[[Sequence[Prediction]], str]


def write_exports(folder: Path, kind: str, name: str, predictions: Sequence[Prediction]) -> Path:
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


def _xywh(prediction: Prediction) -> list[list[float]]:
    boxes = boxes_of(prediction.parsed.regions if prediction.parsed else [])
    return [[round(float(v), 3) for v in (x0, y0, x1 - x0, y1 - y0)] for x0, y0, x1, y1 in boxes]


def _score(regions: Sequence[Region]) -> float:
    """The lowest confidence among the regions, 1 where they have none (older predictions, coordinates as text)."""
    return min((1.0 if region.confidence is None else region.confidence for region in regions), default=0.0)


def _mask(prediction: Prediction) -> Rle:
    """The answer's regions in the first image as one RLE with text counts, as JSON needs them."""
    rle = image_masks(prediction.parsed.regions if prediction.parsed else [], prediction)[0]
    counts = rle["counts"]
    return {"size": list(rle["size"]), "counts": counts.decode() if isinstance(counts, bytes) else counts}


def _json(records: list[dict[str, Any]]) -> str:
    return json.dumps(records, ensure_ascii=False) + "\n"


def _coco_masks(predictions: Sequence[Prediction]) -> str:
    """One result per expression, its regions joined; an answer without a region has none."""
    records = []
    for p in predictions:
        if p.parsed is not None and (regions := p.parsed.regions):
            mask, score = _mask(p), _score(regions)
            found = {"image_id": _image_id(p), "category_id": 1, "segmentation": mask, "score": score}
            records.append(found | {"expression": p.id})
    return _json(records)


def _coco_boxes(predictions: Sequence[Prediction]) -> str:
    records = []
    for p in predictions:
        for region, box in zip(p.parsed.regions if p.parsed else [], _xywh(p), strict=True):
            found = {"image_id": _image_id(p), "category_id": 1, "bbox": box, "score": _score([region])}
            records.append(found | {"expression": p.id})
    return _json(records)


def _grefcoco(predictions: Sequence[Prediction]) -> str:
    records = []
    for p in predictions:
        regions = p.parsed.regions if p.parsed else []
        found: dict[str, Any] = {key: _needed(p, key) for key in ("ref_id", "sent_id")}
        found |= {"image_id": _image_id(p), "no_target": p.parsed is not None and not regions, "score": _score(regions)}
        masks = any(region.kind == "mask" for region in regions)
        records.append(found | ({"segmentation": _mask(p)} if masks else {"boxes": _xywh(p)}))
    return _json(records)


def _captions(predictions: Sequence[Prediction]) -> str:
    return _json([{"image_id": _image_id(p), "caption": p.parsed.answer if p.parsed else ""} for p in predictions])


def _vqav2(predictions: Sequence[Prediction]) -> str:
    found = [(_needed(p, "question_id"), p.parsed.answer if p.parsed else "") for p in predictions]
    return _json([{"question_id": question_id, "answer": answer} for question_id, answer in found])


def _nlvr2(predictions: Sequence[Prediction]) -> str:
    """`identifier,True`; the identifier is what the sample's id has after its source and split."""
    rows = ((p.id.split("-", 2)[2], p.parsed.answer if p.parsed else "unreadable") for p in predictions)
    return "".join(f"{identifier},{answer}\n" for identifier, answer in rows)


def _pope(predictions: Sequence[Prediction]) -> str:
    """What could not be read stays as it was written: POPE's own code takes it for a yes."""
    lines = [{"question": p.prompt, "answer": p.parsed.answer if p.parsed else p.text} for p in predictions]
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)


def _vcr(predictions: Sequence[Prediction]) -> str:
    """Annotation id and 20 probabilities, 1 for the chosen letter; .25 each where nothing was asked or read.

    A rationale's prompt holds an answer: its number is `meta["given"]` in the test set, which asks for all four; in
    other sets it is the right one, known from the question's own sample.
    """
    names = ["answer", *(f"rationale_conditioned_on_a{i}" for i in range(4))]
    rows: dict[str, dict[str, list[float]]] = {}
    right = {
        str(_needed(p, "group")): "ABCD".find(read_words(str(p.target.get("answer")), "choice")[0] or "?")
        for p in predictions
        if fact(p, "mode") == "q_a"
    }
    for p in predictions:
        group = str(_needed(p, "group"))
        given = fact(p, "given", right.get(group, -1))
        name = "answer" if fact(p, "mode") == "q_a" else f"rationale_conditioned_on_a{given}"
        chosen = "ABCD".find(p.parsed.answer) if p.parsed and p.parsed.answer else -1
        letters = [float(i == chosen) for i in range(4)] if chosen >= 0 else [0.25] * 4
        rows.setdefault(group, {})[name] = letters
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["annot_id", *(f"{name}_{i}" for name in names for i in range(4))])
    for group, found in rows.items():
        writer.writerow([group, *(value for name in names for value in found.get(name, [0.25] * 4))])
    return text.getvalue()


EXPORTS: dict[str, tuple[str, Export]] = {
    "coco_masks": (".json", _coco_masks),
    "coco_boxes": (".json", _coco_boxes),
    "grefcoco": (".json", _grefcoco),
    "captions": (".json", _captions),
    "vqav2": (".json", _vqav2),
    "vcr": (".csv", _vcr),
    "nlvr2": (".csv", _nlvr2),
    "pope": (".json", _pope),
}
