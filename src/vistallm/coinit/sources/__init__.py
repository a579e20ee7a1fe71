"""Sources of instruction data, one module per dataset family, the table of them all, and what each one needs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import yaml

from vistallm.coinit.sources import genome, refer, text, video
from vistallm.coinit.sources.attcoseg import load_attcoseg
from vistallm.coinit.sources.base import Source, SourceOptions
from vistallm.coinit.sources.coco import load_coco
from vistallm.coinit.sources.coseg import load_coseg
from vistallm.coinit.sources.custom import load_jsonl
from vistallm.coinit.sources.vcr import load_vcr

SOURCES: dict[str, Callable[[SourceOptions], Source]] = {
    "refcoco": partial(refer.load_refs, "refcoco", "unc"),
    "refcoco+": partial(refer.load_refs, "refcoco+", "unc"),
    "refcocog": partial(refer.load_refs, "refcocog", "umd"),
    "grefcoco": refer.load_grefcoco,
    "coco-caption": text.load_coco_caption,
    "vqav2": text.load_vqav2,
    "vqa-e": text.load_vqa_e,
    "vqa-x": text.load_vqa_x,
    "vcr": load_vcr,
    "pope": text.load_pope,
    "llava-instruct": partial(text.load_llava, "llava-instruct", "llava_instruct_150k.json"),
    "llava-pretrain": partial(text.load_llava, "llava-pretrain", "blip_laion_cc_sbu_558k.json"),
    "coco": load_coco,
    "jsonl": load_jsonl,
    "visual-genome": genome.load_visual_genome,
    "flickr30k": refer.load_flickr30k,
    "visual7w": genome.load_visual7w,
    "pointqa-local": partial(genome.load_pointqa, "local"),
    "pointqa-looktwice": partial(genome.load_pointqa, "looktwice"),
    "nlvr2": text.load_nlvr2,
    "coseg": load_coseg,
    "attcoseg": load_attcoseg,
    "ref-youtube-vos": partial(video.load_expressions, "ref-youtube-vos"),
    "ref-davis17": partial(video.load_expressions, "ref-davis17"),
    "mevis": partial(video.load_expressions, "mevis"),
    "hcstvg": video.load_hcstvg,
    "activitynet-qa": video.load_activitynet_qa,
}


_ROWS = "tasks", "page", "files", "size", "licence", "settings", "command", "counts"


def describe_source(name: str) -> str:
    """What a source needs and gives, a line each, from sources.yaml."""
    entry = yaml.safe_load(Path(__file__).with_name("sources.yaml").read_text(encoding="utf-8"))[name]
    entry["command"] = f"python tools/build_coinit.py {name} {entry['command']}"
    return "\n".join([name, *(f"  {row:<10}{entry[row]}" for row in _ROWS)])
