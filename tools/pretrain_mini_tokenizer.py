r"""Pretrain the mini instruction-guided tokenizer and write assets/mini_tokenizer.safetensors.

The real model starts from InstructBLIP's QFormer; this is its counterpart for `model=mini`, without a language model.
From a training sample's instruction and image, groups of query tokens must tell, through linear heads that are thrown
away, the objects that the answer is about (all objects where the instruction names none), left to right: whether there
is one, its box, shape, colour, size and texture, and its mask inside the box.

    python tools/build_coinit.py mini --train 80000 --seed 1 --out data/mini-pretrain
    python tools/pretrain_mini_tokenizer.py --root data/mini-pretrain --steps 2000
    python tools/pretrain_mini_tokenizer.py --root data/mini-pretrain --steps 1200 --lr 6e-4 --seed 1 \
        --init assets/mini_tokenizer.safetensors
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import re
import time
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset

from vistallm.config import load_config
from vistallm.data.datamodule import build_codec, build_sequencer, split_shards
from vistallm.data.reader import decode_sample, read_raw
from vistallm.data.sequence import Sequence, SequenceBuilder, collate
from vistallm.data.vocabulary import Vocabulary
from vistallm.mini.scene import ATTRIBUTES
from vistallm.model.attention import training_attention
from vistallm.model.qformer import InstructionGuidedTokenizer
from vistallm.model.vistallm import VistaLLM
from vistallm.regions.masks import rle_box, rle_to_mask
from vistallm.schema import Batch, Sample

SLOTS, GRID, VERTICES = 4, 12, 12  # objects told at most; cells of a mask in its box, per side; corners told at most
ASKED = {"pope": "question", "vqa": "question", "vcr": "question", "nlvr2": "statement"}  # told by their words
NAMED = ("rec", "res", "grec", "gres", "v7w", "attcoseg", "pointqa", "boxqa", "reg")  # the rest: all objects


class SlotStream(IterableDataset):
    """Endless (Batch, labels, boxes, masks, corners) over the training shards, in a shuffled order of shards."""

    def __init__(self, shards: list[Path], builder: SequenceBuilder, batch_size: int, seed: int) -> None:
        super().__init__()
        self.shards, self.builder, self.batch_size, self.seed = shards, builder, batch_size, seed

    def __iter__(self) -> Iterator[tuple[Batch, Tensor, Tensor, Tensor, Tensor]]:
        rng = random.Random(self.seed)
        rows: list[Sequence] = []
        while True:
            for shard in rng.sample(self.shards, len(self.shards)):
                for raw in read_raw(shard):
                    rows.append(self.builder.build(decode_sample(raw), rng))
                    if len(rows) == self.batch_size:
                        facts = [slots(s, image, self.builder) for s in rows for image in range(len(s.images))]
                        yield (
                            collate(rows, self.builder.vocabulary),
                            *(torch.stack(f) for f in zip(*facts, strict=True)),
                        )
                        rows = []


def slots(sequence: Sequence, image: int, builder: SequenceBuilder) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Targets of one image: labels (SLOTS, 4) with -1 for no object, boxes (SLOTS, 4) in [0, 1], masks (SLOTS, GRID^2).

    The fourth is the corners (SLOTS, VERTICES, 2) in [0, 1] that the codec writes, parts in a row, -1 beyond the last.
    Masks and corners are known (not -1) only where the sample holds the object's RLE.
    """
    sample, letterbox = sequence.sample, sequence.letterboxes[image]
    labels, boxes = torch.full((SLOTS, len(ATTRIBUTES)), -1), torch.zeros(SLOTS, 4)
    masks, corners = torch.full((SLOTS, GRID**2), -1.0), torch.full((SLOTS, VERTICES, 2), -1.0)
    chosen = told_objects(sample, image)[:SLOTS]
    for slot, (*names, x0, y0, x1, y1) in enumerate(chosen):
        labels[slot] = torch.tensor([values.index(n) for n, values in zip(names, ATTRIBUTES.values(), strict=True)])
        boxes[slot] = torch.from_numpy(letterbox.to_unit(np.array([[x0, y0], [x1, y1]], float)).ravel())
        for region in sample.regions:
            if region.image == image and region.rle is not None and box_key(rle_box(region.rle)) == (x0, y0, x1, y1):
                crop = rle_to_mask(region.rle)[y0:y1, x0:x1].astype(np.uint8) * 255
                small = cv2.resize(crop, (GRID, GRID), interpolation=cv2.INTER_AREA)
                masks[slot] = torch.from_numpy((small > 127).astype(np.float32).ravel())
                answer = builder.codec.decode(
                    builder.codec.encode([dataclasses.replace(region, image=0)], [letterbox], "mask"), [letterbox]
                )
                walk = letterbox.to_unit(np.concatenate(answer.regions[0].polygons or []))[:VERTICES]
                corners[slot, : len(walk)] = torch.from_numpy(walk).float()
    return labels, boxes, masks, corners


def box_key(box: tuple[float, ...]) -> tuple[int, ...]:
    """A box as whole pixels, to find its object by."""
    return tuple(round(v) for v in box)


def told_objects(sample: Sample, image: int) -> list[tuple]:
    """Return (shape, colour, size, texture, x0, y0, x1, y1) of the objects that the instruction is about."""
    everything = [tuple(o) for o in sample.meta["scenes"][image]]
    if sample.task in NAMED:
        wanted = sample.fields.get("targets", [0])
        regions = [r for r in sample.regions if r.object in wanted and r.image == image]
        keys = {box_key(rle_box(r.rle) if r.rle is not None else r.box) for r in regions if r.rle or r.box}
        points = [r.point for r in regions if r.kind == "point"]
        everything = [o for o in everything if o[4:] in keys or any(nearest(p, everything) == o for p in points)]
    elif sample.task in ASKED:
        words = set(re.findall(r"[a-z]+", str(sample.fields[ASKED[sample.task]]).split("?")[0].lower()))
        wanted = [{v for v in values if words & {v, v + "s", v + "es"}} for values in ATTRIBUTES.values()]
        everything = [o for o in everything if all(o[i] in w for i, w in enumerate(wanted) if w)]
    return sorted(everything, key=lambda o: o[4] + o[6])


def nearest(point: tuple[float, ...], objects: list[tuple]) -> tuple:
    """The object whose box holds the point nearest to its centre."""

    def distance(o: tuple) -> float:
        inside = o[4] <= point[0] <= o[6] and o[5] <= point[1] <= o[7]
        return (0 if inside else 1e6) + abs(point[0] - (o[4] + o[6]) / 2) + abs(point[1] - (o[5] + o[7]) / 2)

    return min(objects, key=distance)


class Heads(nn.Module):
    """Linear heads on groups of query tokens, and their loss."""

    def __init__(self, width: int, bins: int) -> None:
        super().__init__()
        self.sizes = [
            1,
            *(len(names) for names in ATTRIBUTES.values()),
            4,
            GRID**2,
            4 * bins,
            2 * VERTICES * bins,
            VERTICES,
        ]
        self.out = nn.Linear(width, sum(self.sizes))

    def forward(
        self, queries: Tensor, labels: Tensor, boxes: Tensor, masks: Tensor, corners: Tensor
    ) -> tuple[Tensor, dict[str, float]]:
        """Return the loss and scores for query states (N, Q, H) and the targets of `slots`."""
        pooled = queries.unflatten(1, (SLOTS, -1)).mean(2)
        there, *kinds, box, shape, places, walk, more = self.out(pooled).float().split(self.sizes, -1)
        on, drawn = labels[..., 0] >= 0, masks[..., 0] >= 0
        loss = F.binary_cross_entropy_with_logits(there.squeeze(-1), on.float())
        distance = (box[on] - boxes[on]).abs().mean()
        loss = loss + 5 * distance + F.binary_cross_entropy_with_logits(shape[drawn], masks[drawn])
        # As a language model reads them: one class per bin, the neighbours counting too.
        exists = corners[drawn][..., 0] >= 0
        loss = loss + 0.3 * bin_loss(places[on].unflatten(-1, (4, -1)), boxes[on])
        loss = loss + 0.5 * bin_loss(walk[drawn].unflatten(-1, (VERTICES, 2, -1))[exists], corners[drawn][exists])
        loss = loss + F.binary_cross_entropy_with_logits(more[drawn], exists.float())
        scores = {"presence": ((there.squeeze(-1) > 0) == on).float().mean().item(), "box_error": distance.item()}
        for number, name in enumerate(ATTRIBUTES):
            loss = loss + 0.3 * F.cross_entropy(kinds[number][on], labels[..., number][on])
            scores[name] = (kinds[number][on].argmax(-1) == labels[..., number][on]).float().mean().item()
        scores["cells"] = ((shape[drawn] > 0) == (masks[drawn] > 0.5)).float().mean().item()
        best = walk[drawn].unflatten(-1, (VERTICES, 2, -1)).argmax(-1) / (places.shape[-1] // 4 - 1)
        scores["corner_error"] = (best - corners[drawn])[exists].abs().mean().item()
        return loss, scores


def bin_loss(logits: Tensor, places: Tensor) -> Tensor:
    """Mean cross-entropy of logits (..., bins) against places (...) in [0, 1], spread over neighbouring bins."""
    bins = torch.linspace(0, 1, logits.shape[-1])
    near = torch.softmax(-0.5 * ((places[..., None] - bins) * (len(bins) - 1)) ** 2, -1)
    return -(near * logits.log_softmax(-1)).sum(-1).mean()


def main() -> None:
    """Train for `--steps`, print the scores, write the tokenizer without its projection in bfloat16."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True, help="a mini set; its training split is used")
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--batch", type=int, default=48)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--init", default="", help="go on from this file (the heads start anew)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("assets/mini_tokenizer.safetensors"))
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    config = load_config(["model=mini", f"model.tokenizer.weights={arguments.init}"])
    vocabulary = Vocabulary.build(config.model, build_codec(config))
    model = VistaLLM(config, vocabulary)
    model.encoder.requires_grad_(False)
    heads = Heads(config.model.tokenizer.hidden_size, config.num_bins)
    assert isinstance(model.tokenizer, InstructionGuidedTokenizer)
    parts = {k: p for k, p in model.tokenizer.named_parameters() if not k.startswith("projection.")}
    parameters = [*parts.values(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=arguments.lr, betas=(0.9, 0.98), weight_decay=0.05, fused=True)
    builder = build_sequencer(config, vocabulary)
    stream = SlotStream(split_shards(arguments.root, "train"), builder, arguments.batch, arguments.seed)
    start = time.monotonic()
    for step, (batch, *targets) in zip(range(arguments.steps), DataLoader(stream, None, num_workers=1), strict=False):
        rate = min((step + 1) / 200, 1.0) * (0.5 + 0.5 * np.cos(np.pi * step / arguments.steps))
        for group in optimizer.param_groups:
            group["lr"] = arguments.lr * rate
        optimizer.zero_grad()
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            patch_tokens = model.encoder(batch.images)
        ids, mask = (rows[batch.image_owner] for rows in (batch.instruction_ids, batch.instruction_mask))
        with training_attention(), torch.autocast("cpu", torch.bfloat16):
            loss, scores = heads(model.tokenizer.query_states(patch_tokens, ids, mask), *targets)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if step % 100 == 0:
            told = " ".join(f"{key} {value:.3f}" for key, value in scores.items())
            print(f"step {step} seconds {time.monotonic() - start:.0f} loss {loss:.3f} {told}", flush=True)
    words = json.dumps([vocabulary.qformer.convert_ids_to_tokens(i) for i in range(len(vocabulary.qformer))])
    save_file(
        {k: v.detach().to(torch.bfloat16).contiguous() for k, v in parts.items()}, arguments.out, {"tokens": words}
    )


if __name__ == "__main__":
    cv2.setNumThreads(1)
    main()
