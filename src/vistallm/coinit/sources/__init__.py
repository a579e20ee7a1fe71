"""Sources of instruction data, one module per dataset family, and the table of them all."""

from __future__ import annotations

from collections.abc import Callable

from vistallm.coinit.sources.attcoseg import load_attcoseg
from vistallm.coinit.sources.base import Source, SourceOptions
from vistallm.coinit.sources.coco_caption import load_coco_caption
from vistallm.coinit.sources.coseg import load_coseg
from vistallm.coinit.sources.flickr30k import load_flickr30k
from vistallm.coinit.sources.jsonl import load_jsonl
from vistallm.coinit.sources.llava import load_llava_instruct, load_llava_pretrain
from vistallm.coinit.sources.nlvr2 import load_nlvr2
from vistallm.coinit.sources.pointqa import load_pointqa_local, load_pointqa_looktwice
from vistallm.coinit.sources.pope import load_pope
from vistallm.coinit.sources.refcoco import load_grefcoco, load_refcoco, load_refcoco_plus, load_refcocog
from vistallm.coinit.sources.vcr import load_vcr
from vistallm.coinit.sources.visual7w import load_visual7w
from vistallm.coinit.sources.visual_genome import load_visual_genome
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
    "jsonl": load_jsonl,
    "visual-genome": load_visual_genome,
    "flickr30k": load_flickr30k,
    "visual7w": load_visual7w,
    "pointqa-local": load_pointqa_local,
    "pointqa-looktwice": load_pointqa_looktwice,
    "nlvr2": load_nlvr2,
    "coseg": load_coseg,
    "attcoseg": load_attcoseg,
}
