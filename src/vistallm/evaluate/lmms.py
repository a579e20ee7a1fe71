"""lmms-eval: a benchmark -> a task folder for its `--include_path`; text answers of any of its models -> our scores.

Boxes and polygons travel as text, in shares of width and height. `vistallm.lmms_model` is our model there.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

from vistallm.coinit.shards import read_shard, split_shards
from vistallm.config import ForeignConfig
from vistallm.evaluate.benchmarks import Benchmark
from vistallm.evaluate.foreign import read_given, text_given
from vistallm.evaluate.generate import target_of
from vistallm.metrics import METRICS, SCORE_NAMES
from vistallm.schema import Prediction
from vistallm.tasks import find_task, write_answer, write_instruction

# What a model that is not ours has to be asked for.
ASKED = " Answer with a JSON list of {}, in shares (0 to 1) of the image's width and height; [] if there is none."
FORMS = {"mask": "polygons, [[[x, y], ...], ...]", "box": "boxes, [[x0, y0, x1, y1], ...]"}
FUNCTIONS = ("doc_to_visual", "doc_to_text", "process_results")
Doc = dict[str, Any]


def write_task(root: Path, benchmark: Benchmark, out: Path, limit: int | None = None) -> int:
    """Write a benchmark of masks or boxes as `<name>.yaml`, `<name>.jsonl` and images; return the number of samples.

    Raises ValueError for another kind of benchmark, or shards that can't be read.
    """
    task, name, rows = find_task(benchmark.task), benchmark.name, []
    if task.multi_image or task.kind not in FORMS:
        raise ValueError(f"{name}: expected a benchmark of masks or boxes, of one image a sample")
    (out / name).mkdir(parents=True, exist_ok=True)
    shards = split_shards(root / benchmark.shards, benchmark.split, task.name)
    own = (pair for shard in shards for pair in read_shard(shard) if pair[0].task == task.name)
    for sample, images in islice(own, limit):
        path = (out / name / f"{sample.id}{Path(sample.images[0].file).suffix}").absolute()
        path.write_bytes(images[0])
        size = {"width": sample.images[0].width, "height": sample.images[0].height}
        facts = {"id": sample.id, "benchmark": name, "task": task.name, "metric": benchmark.metric, **size}
        texts = {"prompt": write_instruction(sample, 0), "target": json.dumps(target_of(sample, write_answer(sample)))}
        rows.append(facts | texts | {"image": str(path)})
    lines = (out / f"{name}.jsonl").absolute()
    lines.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    asked = ASKED.format(FORMS[task.kind])
    settings = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(lines)}},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_target": "target",
        "generation_kwargs": {"max_new_tokens": 1024, "temperature": 0, "do_sample": False},
        "lmms_eval_specific_kwargs": {"default": {"post_prompt": asked}, "vistallm": {"post_prompt": ""}},
    }
    scores = [f"{one}\n  higher_is_better: true\n  aggregation: " for one in METRICS[benchmark.metric].names]
    metrics = [f"- metric: {one}!function {__name__}.{one.partition(chr(10))[0]}\n" for one in scores]
    functions = [f"{one}: !function {__name__}.{one}\n" for one in FUNCTIONS]
    text = "".join([yaml.safe_dump(settings, sort_keys=False), *functions, "metric_list:\n", *metrics])
    (out / f"{name}.yaml").write_text(text, encoding="utf-8")
    return len(rows)


def doc_to_visual(doc: Doc) -> list[Image.Image]:
    """The sample's image."""
    return [Image.open(doc["image"]).convert("RGB")]


def doc_to_text(doc: Doc, lmms_eval_specific_kwargs: dict[str, str] | None = None) -> str:
    """The prompt, for other models with the form of the answer."""
    return doc["prompt"] + (lmms_eval_specific_kwargs or {}).get("post_prompt", "")


def process_results(doc: Doc, results: list[str]) -> dict[str, Doc]:
    """Score name -> the prediction, as JSON, that the score is taken of."""
    image, declared = {"width": doc["width"], "height": doc["height"]}, ForeignConfig(coordinates="unit")
    try:
        parsed, failure = read_given(text_given(results[0], declared.none), find_task(doc["task"]), image, declared)
    except ValueError:
        parsed, failure = None, "malformed"
    facts = (doc["id"], doc["benchmark"], doc["task"], doc["prompt"], results[0])
    record = Prediction(*facts, parsed, failure, [image], json.loads(doc["target"])).to_json()
    del record["score"]  # lmms-eval would take it for a number
    return dict.fromkeys(METRICS[doc["metric"]].names, {**record, "metric": doc["metric"]})


def __getattr__(name: str) -> Callable[[list[Doc]], float]:
    """The aggregation of a score, by its name."""
    if name not in SCORE_NAMES:
        raise AttributeError(name)

    def aggregate(records: list[Doc]) -> float:
        metric = METRICS[records[0]["metric"]]()
        metric.update([Prediction.from_json(record) for record in records])
        value = metric.compute()[name]
        return float("nan") if value is None else 100 * value

    return aggregate


def manifest() -> Any:
    """What the entry point `lmms_eval.models` registers."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest("vistallm", simple_class_path="vistallm.lmms_model.LmmsModel")
