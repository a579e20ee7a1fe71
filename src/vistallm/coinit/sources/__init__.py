"""Sources of instruction data, one module per dataset family, and the table of them all."""

from __future__ import annotations

from collections.abc import Callable

from vistallm.coinit.sources.base import Source, SourceOptions
from vistallm.coinit.sources.coco_caption import load_coco_caption
from vistallm.coinit.sources.llava import load_llava_instruct, load_llava_pretrain
from vistallm.coinit.sources.pope import load_pope
from vistallm.coinit.sources.refcoco import load_grefcoco, load_refcoco, load_refcoco_plus, load_refcocog
from vistallm.coinit.sources.vcr import load_vcr
from vistallm.coinit.sources.vqa import load_vqa_e, load_vqa_x, load_vqav2

SOURCES: dict[str, Callable[[SourceOptions], Source]] = {
    "refcoco": load_refcoco,
    "refcoco+": load_refcoco_plus,
    "refcocog": load_refcocog,
    "grefcoco": load_grefcoco,
    "coco-caption": load_coco_caption,
    "vqav2": load_vqav2,
    "vqa-e": load_vqa_e,
    "vqa-x": load_vqa_x,
    "vcr": load_vcr,
    "pope": load_pope,
    "llava-instruct": load_llava_instruct,
    "llava-pretrain": load_llava_pretrain,
}
